"""What the device's memory holds now, and held at most."""

import sys

import psutil
import torch

from common.memory import GIB


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
