"""One output folder, one run: what the run is, who trains into it, where it stopped, whether it is finished."""

import json
import math
import os
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from transformers import TrainingArguments

from common.arguments import SharedArguments
from common.console import InputError, is_local_main_process, is_main_process, say
from common.distributed.strategy import precision_of, strategy_of
from common.io import write_json
from common.run.checkpoints import checkpoints, newest_whole, no_space_left, remove_unfinished

RUN_FILE, RESULTS_FILE = "run.json", "all_results.json"
# What decides the losses. Anything else (logging, saving, micro-batch) may change at a relaunch; the number of steps,
# too, which moves the learning-rate schedule: PretrainingTrainer says so.
DECIDING = [
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "seed", "data_seed", "bf16", "fp16",
]  # fmt: skip
DECIDING_ROWS = [
    "context_length", "packing", "held_out_fraction", "split", "keep_duplicates", "data_weights",
]  # fmt: skip


def run_identity(recipe: str, model: dict, data: dict, arguments: SharedArguments, training: TrainingArguments) -> dict:
    """Describe a run by what decides its losses, as JSON types."""
    rows = {name: getattr(arguments, name) for name in DECIDING_ROWS}
    values = training.to_dict()
    deciding = {name: values[name] for name in DECIDING}
    if precision_of(training) == "fp8":  # which TrainingArguments call bf16
        deciding["fp8"] = True
    return {"recipe": recipe, "model": model, "data": data | rows, "training": deciding}


def claim_output_folder(folder: str, identity: dict, allow_changes: Sequence[str] = ()) -> FileLock | None:
    """Make ``folder`` this run's, or check that it already is; return its lock, to be kept while the run goes on.

    Args:
        allow_changes: names, as the refusal gives them, of what may differ all the same: said, and kept.

    Raises:
        InputError: another process trains into it now; or another run's checkpoints or results are in it: every
            difference is named.
    """
    lock = lock_folder(folder)
    if is_main_process():
        remove_unfinished(folder)
    path = Path(folder) / RUN_FILE
    identity = json.loads(json.dumps(identity))
    worth_keeping = bool(checkpoints(folder)) or (Path(folder) / RESULTS_FILE).exists()
    if worth_keeping and path.exists():
        found = _check_changes(folder, _read_json(path), identity, allow_changes)
        for name, was, now in found:
            say(f"--allow_changes: {name} was {was!r}, and is {now!r} from here on")
        if found and is_local_main_process():
            _write_identity(path, identity)
    elif worth_keeping:
        raise InputError(
            f"{folder} holds checkpoints or results but no {RUN_FILE}: not a run of these recipes. Choose another "
            "--output_dir."
        )
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_local_main_process():  # the folder may be each machine's own
            _write_identity(path, identity)
    return lock


def _write_identity(path: Path, identity: dict) -> None:
    try:
        write_json(path, identity, durable=True)
    except OSError as error:
        if not no_space_left(error, path.parent):
            raise
        raise InputError(f"{path}: no space left ({error}). Make room, or choose another --output_dir.") from None


def check_folder(folder: str, recipe: str, arguments: SharedArguments, training: TrainingArguments) -> str:
    """Return what ``folder`` holds of this run, by what is known before data and model are.

    Raises:
        InputError: another recipe's run, or one with other flags, is in it.
    """
    path = Path(folder) / RUN_FILE
    steps = [step for step, _ in checkpoints(folder)]
    if not path.exists() or not (steps or (Path(folder) / RESULTS_FILE).exists()):
        return f"{folder}, a new run"
    known = json.loads(json.dumps(run_identity(recipe, {}, {}, arguments, training)))
    was = _read_json(path)
    was = {"recipe": was.get("recipe"), "training": was.get("training"), "model": {}} | {
        "data": {name: was.get("data", {}).get(name) for name in DECIDING_ROWS}
    }
    _check_changes(folder, was, known, arguments.allow_changes)
    return f"{folder}, " + (f"to be continued from step {steps[-1]}" if steps else "with results")


def _check_changes(folder: str, was: dict, now: dict, allow_changes: Sequence[str]) -> list[tuple[str, object, object]]:
    """Return what differs and may; refuse what may not."""
    found = differences(was, now)
    if refused := [change for change in found if not _allowed(change[0], allow_changes)]:
        raise InputError(
            f"{folder} holds another run; relaunching there continues it, and these differ:\n"
            + "\n".join(f"  {name}: {old!r} in the folder, {new!r} now" for name, old, new in refused)
            + "\nGo back to the old values, choose another --output_dir, or continue with the new ones:\n"
            + f"  --allow_changes {' '.join(name for name, _, _ in refused)}"
        )
    return found


def check_disk_space(folder: str, parameters: int, training: TrainingArguments, weight=4, states=8, merged=0) -> None:
    """Raise InputError if the checkpoints that will be kept, and the one being written, do not fit the disk.

    A checkpoint takes ``weight`` + ``states`` bytes a parameter (12 of AdamW in float32), and what the strategy writes
    beside them, the final model ``weight``; ``merged`` bytes more are written at the end.
    Without a limit on checkpoints, and with steps that are not counted yet (max_steps -1), it is asked again later.
    """
    if training.save_strategy == "no":
        kept = 0
    elif training.save_total_limit is None and training.max_steps < 0:
        kept = 2
    elif training.save_total_limit is None:
        interval = training.save_steps if training.save_steps >= 1 else training.save_steps * training.max_steps
        kept = math.ceil(training.max_steps / interval)
    else:
        kept = training.save_total_limit + 1
    a_checkpoint = parameters * (weight + states + second_copy_bytes(training))
    needed, free = a_checkpoint * kept + parameters * weight + merged, shutil.disk_usage(_existing(folder)).free
    # A continued run's checkpoints are there already, and make room for the next ones.
    free += sum(file.stat().st_size for _, path in checkpoints(folder) for file in path.rglob("*") if file.is_file())
    if free < needed:
        merging = f", merged {merged / 2**30:.2f}" if merged else ""
        raise InputError(
            f"{folder}: {free / 2**30:.2f} GiB to be had, {needed / 2**30:.2f} needed for {kept} checkpoints of "
            f"{a_checkpoint / 2**30:.2f} and the model{merging}. Make room, choose another --output_dir, or keep fewer "
            "checkpoints: --save_total_limit 1, or --save_strategy no."
        )


def second_copy_bytes(training: TrainingArguments) -> int:
    """Return the bytes a parameter that a checkpoint of FSDP2 or DeepSpeed takes beside safetensors and AdamW's states.

    FSDP2 writes the weights in its own format, too; DeepSpeed writes them, and its masters in fp32: 16 bytes in all, in
    fp32 20.
    """
    strategy = strategy_of(training)
    if strategy.startswith("zero"):
        return 4 if training.bf16 or training.fp16 else 8
    return 4 if strategy == "fsdp2" else 0


def _existing(folder: str) -> Path:
    """Return ``folder``, or the nearest folder above it that there is."""
    path = Path(folder).absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def last_checkpoint(folder: str) -> str | None:
    """Return the newest whole checkpoint of ``folder``, or None, the same on every process; others are named.

    Raises:
        InputError: the main process has a checkpoint that this one does not see.
    """
    found = newest_whole(folder) if is_main_process() else None
    [checkpoint] = broadcast_object_list([None if found is None else str(found)])
    if checkpoint is not None and not Path(checkpoint).exists():
        raise InputError(f"{checkpoint} is not on this machine: --output_dir must be shared by all machines.")
    if checkpoint is not None:
        say(f"continuing from {checkpoint}")
    return checkpoint


def finished_results(folder: str, max_steps: int, tokens: int) -> dict | None:
    """Return the results of a run that made its ``max_steps`` steps or trained its ``tokens``, else None.

    Half a file of results is what a run leaves that is killed while it writes them: it is removed, and written again.
    """
    path, results = Path(folder) / RESULTS_FILE, {}
    if is_main_process() and path.exists():
        try:
            results = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError):
            say(f"removing {path}: half-written when the run ended")
            path.unlink()
    reached = results.get("steps") == max_steps or results.get("ledger", {}).get("tokens_trained") == tokens
    [results] = broadcast_object_list([results if reached and "eval_loss" in results else None])
    return results


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}). Repair or remove it, or choose another --output_dir.") from None


def _allowed(name: str, allow_changes: Sequence[str]) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in allow_changes)


def differences(was: dict, now: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    """Return (dotted name, old value, new value) of every leaf that differs."""
    found = []
    for name in sorted({*was, *now}):
        old, new = was.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append((f"{prefix}{name}", old, new))
    return found


STATUS_FILE, LOCK_FILE = "status.json", ".lock"
LOCK_SECONDS = 15  # loader workers of a killed run hold its lock until they notice, after at most 5 s


def lock_folder(folder: str | Path, seconds: float = LOCK_SECONDS) -> FileLock | None:
    """Lock ``folder`` for this process, or say who has it. Keep what is returned: the lock goes with it.

    The operating system gives the lock back when its owner dies, however it dies. Only the main process locks, the
    others get None. On a file system without locks, which is said, nothing is locked.

    Raises:
        InputError: another process has trained into ``folder`` for all of ``seconds``.
    """
    if not is_main_process():
        return None
    path = Path(folder) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, is_singleton=True)  # so that a notebook may call main() again
    try:
        lock.acquire(timeout=0)
        return lock
    except NotImplementedError as error:
        say(f"note: {folder} cannot be locked here ({error}): see to it that nobody else trains into it")
        return lock
    except Timeout:
        say(f"{folder} is in use; waiting up to {seconds:g} s for its owner to end")
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        status = read_status(folder)
        owner = f"process {status['pid']} on {status['host']}, at step {status['step']}" if status else "unknown"
        raise InputError(
            f"{folder} is being trained into by another process ({owner}). Wait for it, stop it, or choose another "
            "--output_dir."
        ) from None
    return lock


def write_status(folder: str | Path, state: str, step: int, max_steps: int, reason: str | None = None) -> None:
    """Write ``status.json`` on the main process: what the run does now, and at which step.

    A run that was killed with SIGKILL still says "running": it could not say more. Its lock is free then.

    Args:
        state: running, interrupted (the same command continues), finished, or failed.
        reason: the signal or the error.

    Raises:
        OSError: the disk is full.
    """
    if not is_main_process():
        return
    status = {"state": state, "step": step, "max_steps": max_steps, "pid": os.getpid(), "host": socket.gethostname()}
    status |= {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | ({"reason": reason} if reason else {})
    write_json(Path(folder) / STATUS_FILE, status)


def read_status(folder: str | Path) -> dict | None:
    """Return what ``status.json`` says, None where it says nothing."""
    try:
        status = json.loads((Path(folder) / STATUS_FILE).read_text(encoding="utf-8"))
        return status if {"state", "step", "pid", "host"} <= status.keys() else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
