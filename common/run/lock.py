"""Who trains into an output folder, and how far: a lock that dies with its owner, and ``status.json``."""

import json
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from common.console import InputError, is_main_process, say
from common.io import write_json

STATUS_FILE, LOCK_FILE = "status.json", ".lock"
LOCK_SECONDS = 15  # loader workers of a killed run hold its lock until they notice, after at most 5 s


def lock_folder(folder: str | Path, seconds: float = LOCK_SECONDS) -> FileLock | None:
    """Lock ``folder`` for this process, or say who has it. Keep what is returned: the lock goes with it.

    The operating system gives the lock back when its owner dies, however it dies. Only the main process locks, the
    others get None. On a file system without locks nothing is locked, and a note says so.

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
        say(f"note: {folder} cannot be locked here ({error}): make sure that nobody else trains into it")
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

    A run that was killed with SIGKILL still says "running", because it could not say more. Its lock is free then.

    Args:
        state: running, interrupted (the same command continues), finished, or failed.
        reason: the signal or the error.

    Raises:
        OSError: the disk is full.
    """
    if not is_main_process():
        return
    status = {"state": state, "step": step, "max_steps": max_steps, "pid": os.getpid(), "host": socket.gethostname()}
    status["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    if reason:
        status["reason"] = reason
    write_json(Path(folder) / STATUS_FILE, status)


def read_status(folder: str | Path) -> dict | None:
    """Return the content of ``status.json``, None if there is none or it is damaged."""
    try:
        status = json.loads((Path(folder) / STATUS_FILE).read_text(encoding="utf-8"))
        return status if {"state", "step", "pid", "host"} <= status.keys() else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
