"""How many cores this process may use: in a container or under a batch system fewer than the machine has."""

import os
from contextlib import suppress
from pathlib import Path

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


def take_cores() -> int:
    """Give torch's operations on the CPU this process's share of the cores; return how many threads these are.

    Launchers leave one to each process, or all cores of the machine: enough for training on a GPU, and either is wrong
    where the optimizer's states are in main memory.
    """
    torch.set_num_threads(max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return torch.get_num_threads()
