"""This machine: the cores that this process may use, and the memory in use."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Return the cores that affinity and quota leave to this process; at least 1.

    More threads than that wait for each other at every step of an operation that they share.
    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files (``cpu.max``: quota and period)
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # versions 2 and 1
        with suppress(OSError, ValueError):  # no quota: no file, or "max"
            quota, period = (int(word) for file in files for word in (cgroup / file).read_text().split())
            if quota > 0:  # version 1 says -1 for none
                cores = min(cores, quota // period)
    return max(1, cores)


def take_cores(local_processes: int) -> int:
    """Give torch's operations on the CPU this process's share of the cores; return how many threads these are.

    Launchers leave one to each process, or all cores of the machine: enough for training on a GPU, and either is wrong
    where the optimizer's states are in main memory.
    """
    torch.set_num_threads(max(1, usable_cores() // local_processes))
    return torch.get_num_threads()


GIB = 2**30


def memory_gib(device: torch.device) -> dict[str, float]:
    """Return memory in use and its peak so far, in GiB: of the accelerator, or of this process on a CPU."""
    if device.type == "cpu":
        usage = psutil.Process().memory_info()
        return {"memory_allocated_gib": usage.rss / GIB, "memory_peak_gib": _peak_bytes(usage) / GIB}
    return {
        "memory_allocated_gib": torch.accelerator.memory_allocated(device) / GIB,
        "memory_peak_gib": torch.accelerator.max_memory_allocated(device) / GIB,
    }


def _peak_bytes(usage) -> int:
    if sys.platform == "win32":
        return usage.peak_wset
    import resource  # POSIX only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
