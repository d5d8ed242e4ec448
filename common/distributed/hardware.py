"""What a card and its software can do, against what the launcher's YAML asks of them: compiling, bf16, FP8."""

import importlib.util
import os
import shutil
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from common.console import InputError
from common.distributed.accelerator import computes_in_bf16, device_name
from common.distributed.strategy import DDP, FSDP2, SINGLE, Strategy

WHERE_TRITON = {
    "cuda": "which comes with torch on Linux (on Windows: pip install triton-windows)",
    "npu": "as Huawei builds it (pip install triton-ascend)",
    "xpu": "which comes with torch for Intel's GPUs",
}


def check_compiler(backend: str, device: torch.device) -> None:
    """Refuse the YAML's ``dynamo_backend`` where torch.compile would fail at the first step."""
    if backend.lower() != "inductor":
        return
    compilers = ("g++", "clang++", "c++", "cl")
    if device.type == "mps":
        problem = "torch's compiler for Apple's GPUs is an early prototype (torch 2.13). Train uncompiled"
    elif device.type == "cpu" and not any(map(shutil.which, compilers)):
        problem = f"that needs a C++ compiler ({', '.join(compilers)}). Install it, or train uncompiled"
    elif device.type != "cpu" and importlib.util.find_spec("triton") is None:
        problem = f"that needs Triton, {WHERE_TRITON.get(device.type, '')}. Install it, or train uncompiled"
    else:
        return
    raise InputError(
        f"the YAML's dynamo_config compiles the model, and {problem}:\n"
        "  accelerate launch --config_file YAML --dynamo_backend no RECIPE"
    )


def compiled_code_folder(compiler: str, machines: int, cache_dir: str) -> str | None:
    """Return where torch keeps what inductor compiles, from run to run; None under another ``compiler``.

    Sets it to ``cache_dir``/compiled, unless the environment names a folder. torch would take one in /tmp, which a
    restart of the machine or its container empties. Several machines keep that: each has its own disk there.
    """
    if compiler.lower() != "inductor":
        return None
    if machines == 1:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(cache_dir).absolute() / "compiled"))
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR", "torch's own folder")


def check_bf16(device: torch.device, precision: str) -> None:
    """Refuse bf16 on an accelerator that only emulates it, other than NVIDIA's: see ``check_cuda_device``."""
    knows = device.type != "cuda" and hasattr(torch.get_device_module(device), "is_bf16_supported")
    if precision == "bf16" and knows and not computes_in_bf16(device):
        raise InputError(
            f"{device_name(device)} has no bf16, only a slow emulation. Use fp16:\n"
            "  accelerate launch --config_file YAML --mixed_precision fp16 RECIPE"
        )


def check_cuda_device(name: str, capability: tuple[int, int], architectures: list[str], precision: str) -> None:
    """Refuse a card that this torch build has no code for, or bf16 on a card that only emulates it.

    Args:
        capability: compute capability, for example (7, 0) for a V100.
        architectures: ``torch.cuda.get_arch_list()``, for example ["sm_80", "sm_90"].
        precision: "no", "fp16" or "bf16".
    """
    major, minor = capability
    targets = [name.split("_")[1].rstrip("af") for name in architectures if name.startswith("sm_")]
    # Binary code for x.y runs on every x.z with z >= y.
    if not any(int(target[:-1]) == major and int(target[-1]) <= minor for target in targets):
        raise InputError(
            f"{name} has compute capability {major}.{minor}, and this torch build has code for {architectures} only. "
            "For an older card such as the V100 install the CUDA 12.6 build, for a newer one a newer torch:\n"
            "  pip install --force-reinstall 'torch>=2.11,<2.14' --index-url https://download.pytorch.org/whl/cu126"
        )
    if precision == "bf16" and major < 8:
        raise InputError(
            f"{name} (compute capability {major}.{minor}) has no bf16, only a slow emulation. Use fp16:\n"
            "  accelerate launch --config_file YAML --mixed_precision fp16 RECIPE"
        )


def check_fp8(strategy: Strategy, training: TrainingArguments) -> None:
    """Refuse FP8 where the card has none, and where accelerate would not train all layers.

    Accelerate exchanges the linear layers for torchao's when it prepares the model, all but the first and the head.
    Call this before an Accelerator is made, because it sets the backend's name in capitals, the only form that an
    Accelerator knows.
    Sources: https://huggingface.co/docs/accelerate/usage_guides/low_precision_training,
    https://docs.nvidia.com/cuda/parallel-thread-execution/ (FP8 products: compute capability 8.9).

    Raises:
        InputError: with what works.
    """
    capability = torch.cuda.get_device_capability() if training.device.type == "cuda" else (0, 0)
    backend = os.environ.get("ACCELERATE_FP8_BACKEND", "no")
    gathered = parse_flag_from_env("ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER", default=True)
    if capability < (8, 9):
        raise InputError(
            f"mixed_precision fp8: needs a card of compute capability 8.9 or more (Ada, Hopper, Blackwell), and this "
            f"{training.device.type.upper()} has {'.'.join(map(str, capability)) if any(capability) else 'none'}. Use "
            "another YAML, or --mixed_precision bf16."
        )
    if strategy not in (SINGLE, DDP, FSDP2):
        raise InputError(
            f"mixed_precision fp8 under {strategy}: DeepSpeed changes the layers' parameters itself, which was not "
            "tried with layers in FP8. Use fsdp2.yaml with the flags that fp8.yaml names, or bf16 with this YAML."
        )
    if backend.lower() != "ao":
        raise InputError(f"mixed_precision fp8 with backend {backend}: only torchao's is tried here. Use fp8.yaml.")
    if gathered:  # seen with accelerate 1.15 and torchao 0.18
        raise InputError(
            "mixed_precision fp8 with enable_fsdp_float8_all_gather, accelerate's default: it exchanges the layers' "
            "parameters after the optimizer has taken them, and the new ones are never trained. Use fp8.yaml, which "
            "switches it off."
        )
    os.environ["ACCELERATE_FP8_BACKEND"] = "AO"  # the launcher's flag says "ao", which Accelerator does not know
