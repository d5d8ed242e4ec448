"""A stand-in for Huawei's torch_npu, which needs an Ascend card: torch.npu is a device with the CPU's kernels.

transformers and accelerate take it for torch_npu, because they look for the package's name. The first import compiles
device.cpp into ``$STAND_IN_FOLDER``.
"""

import os
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

__version__ = torch.__version__

_device = cpp_extension.load(
    "stand_in_npu",
    [str(Path(__file__).with_name("device.cpp"))],
    extra_cflags=["-O1", "-w"],
    build_directory=os.environ["STAND_IN_FOLDER"],
)


class npu(types.ModuleType):
    """What torch.npu is asked for."""

    Event, Stream = torch.Event, torch.Stream

    def __init__(self):
        super().__init__("torch.npu")
        self.random = self

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device) -> None:
        assert torch.device(device).index == 0

    def get_device_name(self, device=None) -> str:
        return "Ascend910B2"

    def get_device_properties(self, device=None):
        return types.SimpleNamespace(name="Ascend910B2", total_memory=torch.accelerator.get_memory_info()[1])

    def is_bf16_supported(self, including_emulation: bool = False) -> bool:
        return True

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def memory_allocated(self, device=None) -> int:
        return torch.accelerator.memory_allocated()

    def max_memory_allocated(self, device=None) -> int:
        return torch.accelerator.max_memory_allocated()

    def reset_peak_memory_stats(self, device=None) -> None:
        torch.accelerator.reset_peak_memory_stats()

    def synchronize(self, device=None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_rng_state(self, device=None) -> torch.Tensor:
        return _device.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device=None) -> None:
        _device.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        _device.manual_seed(seed)

    manual_seed_all = manual_seed


torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu())
torch.utils.generate_methods_for_privateuse1_backend()


def _no_kernel(*_, **__):
    raise NotImplementedError("the stand-in has no kernel of Ascend's own")


npu_fusion_attention = npu_rotary_mul = _no_kernel  # transformers imports them
