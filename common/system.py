"""This machine: the cores that this process may use, the main memory in use, and what is left of it."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")
# The files with a container's limit on CPU time: quota and period, in microseconds.
QUOTA_FILES = (
    ("cpu.max",),  # cgroup version 2: both in one file, "1600000 100000" for 16 cores, "max 100000" for no limit
    ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"),  # version 1: quota -1 for no limit
)
# The files with a container's limit on memory and its use, in bytes, and what of its use is only a cache of files.
MEMORY_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),  # cgroup version 2; "max" for no limit
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
GIB = 2**30


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Return how many cores this process may use, by its CPU affinity and its container's quota; at least 1.

    Use no more threads than this: surplus threads of one operation would wait for each other.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cores = len(os.sched_getaffinity(0))
    for names in QUOTA_FILES:
        with suppress(OSError, ValueError):  # there is no such file, or it says "max"
            quota, period = (int(word) for name in names for word in (cgroup / name).read_text().split())
            if quota > 0:
                cores = min(cores, quota // period)
    return max(1, cores)


def take_cores(local_processes: int) -> int:
    """Let torch's CPU operations use this process's share of the cores; return the number of threads.

    Launchers set one thread a process, or all cores of the machine. That is enough for training on a GPU, but wrong
    where the optimizer's states are in main memory and the optimizer step runs on the CPU.
    """
    torch.set_num_threads(max(1, usable_cores() // local_processes))
    return torch.get_num_threads()


def available_memory(cgroup: Path = CGROUP) -> int:
    """Return how many bytes of main memory can still be taken, on this machine and within its container's limit.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    """
    available = psutil.virtual_memory().available
    for limit_file, used_file, details_file, cached in MEMORY_FILES:
        with suppress(OSError, ValueError, KeyError):  # there is no such file, or no limit
            limit, used = (int((cgroup / name).read_text()) for name in (limit_file, used_file))
            details = dict(line.split() for line in (cgroup / details_file).read_text().splitlines())
            available = min(available, limit - used + int(details[cached]))
    return max(0, available)


def process_memory_bytes() -> tuple[int, int]:
    """Return the main memory that this process uses now, and its peak so far."""
    usage = psutil.Process().memory_info()
    return usage.rss, _peak_bytes(usage)


def _peak_bytes(usage) -> int:
    """Return this process's peak memory in bytes; ``usage`` is what psutil says of it now."""
    if sys.platform == "win32":
        return usage.peak_wset
    import resource  # POSIX only

    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
