"""Whether an output folder can be written to, and whether a run's checkpoints fit its disk."""

import math
import os
import shutil
from pathlib import Path

from transformers import TrainingArguments

from common.console import InputError
from common.distributed.strategy import Strategy
from common.run.checkpoints import checkpoints

LONGEST_NAME = 255  # bytes, of a file or folder, on all usual file systems


def check_path(folder: str, flag: str = "--output_dir") -> None:
    """Raise InputError if ``folder``, which need not be there yet, cannot be a folder that is written to.

    Args:
        flag: that gave it.
    """
    path = Path(folder).absolute()
    try:
        there = next(parent for parent in (path, *path.parents) if parent.is_symlink() or parent.exists())
        problem = None
        if not there.exists():
            problem = f"{there} is a link to {os.readlink(there)}, which is not there"
        elif not there.is_dir():
            problem = f"{there} is a file"
        elif not os.access(there, os.W_OK | os.X_OK):
            problem = f"{there} may not be written to"
        for part in path.parts:
            if len(os.fsencode(part)) > LONGEST_NAME:
                problem = f"a name of {len(os.fsencode(part))} bytes, and {LONGEST_NAME} is the limit"
    except OSError as error:
        problem = error.strerror
    if problem is not None:
        shown = folder if len(folder) <= 100 else f"{folder[:100]}..."
        raise InputError(f"{flag} {shown}: {problem}. Choose another folder.")


def check_disk_space(
    folder: str,
    parameters: int,
    strategy: Strategy,
    training: TrainingArguments,
    weight_bytes: int = 4,
    state_bytes: int = 8,
    merged_bytes: int = 0,
) -> None:
    """Raise InputError if the checkpoints that will be kept, and the one being written, do not fit the disk.

    A checkpoint takes ``weight_bytes`` + ``state_bytes`` a parameter (12 with AdamW in fp32), and what the strategy
    writes beside them. The final model takes ``weight_bytes`` a parameter. ``merged_bytes`` are written at the end.
    Without a limit on checkpoints, and with steps that are not counted yet (max_steps -1), call it again later.
    """
    if training.save_strategy == "no":
        kept = 0
    elif training.save_total_limit is None and training.max_steps < 0:
        kept = 2
    elif training.save_total_limit is None:
        interval = training.save_steps if training.save_steps >= 1 else training.save_steps * training.max_steps
        kept = math.ceil(training.max_steps / interval) if interval > 0 else 1
    else:
        kept = training.save_total_limit + 1
    checkpoint_bytes = parameters * (weight_bytes + state_bytes + second_copy_bytes(strategy, training))
    needed = checkpoint_bytes * kept + parameters * weight_bytes + merged_bytes
    free = shutil.disk_usage(_existing(folder)).free
    # A continued run's checkpoints are there already, and make room for the next ones.
    free += sum(file.stat().st_size for _, path in checkpoints(folder) for file in path.rglob("*") if file.is_file())
    if free < needed:
        merging = f", merged {merged_bytes / 2**30:.2f}" if merged_bytes else ""
        raise InputError(
            f"{folder}: {free / 2**30:.2f} GiB are available, {needed / 2**30:.2f} needed for {kept} checkpoints of "
            f"{checkpoint_bytes / 2**30:.2f} and the model{merging}. Make room, choose another --output_dir, or keep "
            "fewer checkpoints: --save_total_limit 1, or --save_strategy no."
        )


def second_copy_bytes(strategy: Strategy, training: TrainingArguments) -> int:
    """Return the bytes a parameter in a checkpoint of FSDP2 or DeepSpeed beside safetensors and AdamW's states.

    FSDP2 also writes the weights in its own format. DeepSpeed writes them and its fp32 masters: a checkpoint has 16
    bytes a parameter in all, in fp32 20.
    """
    if strategy.is_deepspeed:
        return 4 if training.bf16 or training.fp16 else 8
    return 4 if strategy.is_fsdp else 0


def _existing(folder: str) -> Path:
    """Return ``folder``, or the nearest folder above it that exists."""
    path = Path(folder).absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())
