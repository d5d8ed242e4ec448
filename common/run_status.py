"""Who trains into an output folder, and how far: a lock that dies with its owner, ``status.json``, small files."""

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from common.messages import InputError, is_main_process, say

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


def write_json(path: Path, content, durable: bool = False) -> None:
    """Write ``content`` so that ``path`` is always whole: the old one or the new one. ``durable``: through a crash."""
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.partial")  # machines may write at once
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def append_lines(path: Path, entries: list[dict]) -> None:
    """Add a line of JSON for each of ``entries``, all or none: where they do not fit the disk, ``path`` is as before.

    Half a line, as a kill in the middle of this leaves, is ended first.
    """
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    with open(path, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        cut_off = size > 0 and file.read(1) != b"\n"
        left = memoryview(("\n" * cut_off + lines).encode(errors="backslashreplace"))
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise
