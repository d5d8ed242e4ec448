"""ZeRO on another number of processes: through DeepSpeed's universal format, which has one file for each tensor.

DeepSpeed reads its checkpoints on as many processes as wrote them. Its converter puts the parts together; that copy of
weights and states is written beside the checkpoint, read on any number of processes, and removed.
Source: https://www.deepspeed.ai/tutorials/universal-checkpointing/
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from accelerate.utils import gather_object

from common.console import InputError, is_main_process, say
from common.run.checkpoints import reading, unfinished

NAME = "universal"  # in place of a step: a launch removes what a killed one left
COPIES = 2  # the converter writes slices of the tensors, then the tensors


def load_on_other_processes(engine, checkpoint: str, folder: str, wait_for_everyone: Callable[[], None]) -> None:
    """Load a checkpoint of DeepSpeed into ``engine``, whatever the number of processes that wrote it.

    Args:
        engine: DeepSpeedEngine.
        folder: of this run; all processes see it.

    Raises:
        InputError: it cannot be converted.
    """
    aside = unfinished(folder, NAME)
    problem = _convert(Path(checkpoint), aside) if is_main_process() else None
    problem = next(filter(None, gather_object([problem])), None)
    if problem is not None:
        raise InputError(problem)
    config = engine._config  # the flag is DeepSpeed's "checkpoint": {"load_universal": true}, for this one load
    config.load_universal_checkpoint = True
    try:
        with reading(checkpoint, "DeepSpeed's weights and states"):
            engine.load_checkpoint(str(aside))
    finally:
        config.load_universal_checkpoint = False
    wait_for_everyone()
    if is_main_process():
        _remove(aside)


def _convert(checkpoint: Path, aside: Path) -> str | None:
    """Write the copy to ``aside``; return why that failed, or None."""
    [parts] = [path for path in checkpoint.glob("global_step*") if path.is_dir()]
    needed = COPIES * sum(file.stat().st_size for file in parts.iterdir())
    free = shutil.disk_usage(aside.parent.parent).free
    if free < needed:
        return (
            f"{checkpoint}: to continue on another number of processes, DeepSpeed's states are copied, and "
            f"{free / 2**30:.2f} GiB are free at {aside.parent.parent}, of {needed / 2**30:.2f} needed. Make room, or "
            "launch as many processes as before."
        )
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    say(f"{checkpoint}: another number of processes wrote it; converting DeepSpeed's states")
    # In a process of its own: the converter starts others, which must not be copies of one that uses a GPU.
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(parts), "--output_folder", str(aside / parts.name)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    _remove(aside)
    reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1][:300]
    return f"{checkpoint}: DeepSpeed's states cannot be converted ({reason}). Launch as many processes as before."


def _remove(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):  # something else is in it
        aside.parent.rmdir()
