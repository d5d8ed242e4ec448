"""The accelerator: its name, its memory, its random state, and what it can do.

torch.accelerator is the same for every kind of device. What it does not know, the module of the kind does: torch.cuda
(NVIDIA and AMD), torch.npu (Ascend), torch.xpu (Intel) and torch.mps (Apple, which lacks the most). What has been run
on which of them: docs/platforms.md.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.system import GIB, process_memory_bytes

# What chooses the cards that a process may see.
VISIBLE_DEVICES = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}


def device_name(device: torch.device) -> str:
    """Return the name of ``device``, such as "NVIDIA H100 80GB HBM3", "Ascend910B2" or "Apple M2 Max"."""
    if device.type == "mps":
        return torch.backends.mps.get_name()
    module = torch.get_device_module(device)
    if device.type != "cpu" and hasattr(module, "get_device_name"):
        return module.get_device_name(device)
    return f"{device.type}, {platform.machine()}"


def card_bytes(device: torch.device) -> int | None:
    """Return the bytes of memory of a card; None for what shares the machine's memory: a CPU, and Apple's GPUs."""
    if device.type in ("cpu", "mps"):
        return None
    return torch.get_device_module(device).get_device_properties(device).total_memory


def memory_gib(device: torch.device) -> dict[str, float]:
    """Return the memory in use and its peak so far, in GiB: of the accelerator, or of this process on a CPU.

    Apple's GPUs keep no peak, and torch.accelerator raises an error there before pytorch #186748 (June 2026). What
    Metal has given to torch stands for the peak: torch seldom gives any of it back.
    """
    if device.type == "cpu":
        now, peak = process_memory_bytes()
    elif device.type == "mps":
        now, peak = torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory()
    else:
        now, peak = torch.accelerator.memory_allocated(device), torch.accelerator.max_memory_allocated(device)
    return {"memory_allocated_gib": now / GIB, "memory_peak_gib": peak / GIB}


def reset_peak_memory(device: torch.device) -> None:
    """Let the peak begin again, where the device keeps one."""
    if device.type not in ("cpu", "mps"):
        torch.accelerator.reset_peak_memory_stats(device)


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether ``error`` says that a device has no memory left. Metal's error has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error)


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bf16 itself. A CPU, and what only emulates it, does not count."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # all of AMD's that torch supports have 9 or more
    if device.type == "xpu":
        return torch.xpu.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return supported is not None and supported()


def pins_memory(device: torch.device) -> bool:
    """Whether pinned main memory can be copied to ``device`` while it computes.

    torch has no pinned memory for Apple's GPUs. A copy from other memory must be waited for: that memory may be in use
    again before it is read.
    """
    return device.type not in ("cpu", "mps")


def random_state(device: torch.device) -> torch.Tensor:
    """Return the state of the random numbers of ``device``."""
    return torch.get_device_module(device).get_rng_state(device)


def set_random_state(device: torch.device, state: torch.Tensor) -> None:
    """Continue the random numbers of ``device`` from ``state``."""
    torch.get_device_module(device).set_rng_state(state, device)


class RandomState:
    """The random numbers of a device, for what saves and loads objects by their ``state_dict``."""

    def __init__(self, device: torch.device):
        self.device = device

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"random": random_state(self.device)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        set_random_state(self.device, state["random"])


@contextmanager
def torch_random_states_kept(device: torch.device) -> Iterator[None]:
    """Leave torch's random states as they were: that of the CPU, and that of ``device``."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield
