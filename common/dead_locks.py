"""Locks that killed compilations leave, for which torch would wait without end.

DeepSpeed compiles operations at its first launch through ``torch.utils.cpp_extension``. That keeps a file named
``lock`` open in the operation's folder meanwhile, and removes it at the end (torch/utils/file_baton.py). A process
that is killed in between leaves it, and every later launch hangs before its first line.
"""

import os
import time
from pathlib import Path

import psutil

FOREIGN_SECONDS = 180  # nothing in the folder has changed for so long: no other machine compiles there either


def remove_dead_locks() -> None:
    """Remove the locks of dead compilations, and say so, on every machine; wait for what may be another machine's."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true" or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted(root.rglob("lock")):
        said = False
        while lock.exists() and not held_here(lock):
            idle = time.time() - last_change(lock.parent)
            if idle >= FOREIGN_SECONDS:
                lock.unlink(missing_ok=True)
                print(
                    f"removed {lock}: its compilation was killed, DeepSpeed would wait for it without end", flush=True
                )
            elif not said:
                said = True
                wait = f"waiting up to {FOREIGN_SECONDS - idle:.0f} s for {lock}"
                print(f"{wait}: another machine may be compiling there", flush=True)
            else:
                time.sleep(0.5)


def held_here(lock: Path) -> bool:
    """Return whether a process of this machine has the file open."""
    path = os.path.realpath(lock)  # as psutil names it, whatever links lead there
    for process in psutil.process_iter():
        try:
            if path in (file.path for file in process.open_files()):
                return True
        except (psutil.Error, OSError):  # ended meanwhile, or somebody else's
            continue
    return False


def last_change(folder: Path) -> float:
    """Return when the newest file of ``folder`` was written, in seconds since 1970."""
    times = [folder.stat().st_mtime]
    for file in folder.iterdir():
        try:
            times.append(file.stat().st_mtime)
        except FileNotFoundError:  # ninja's own files come and go
            continue
    return max(times)
