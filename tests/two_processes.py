"""A check that two processes do together, over gloo on the CPU."""

import os
from pathlib import Path

import torch
import torch.multiprocessing


def in_two_processes(check, folder: Path) -> None:
    """Run ``check(rank, folder)``, a function of a test module, in two processes that are one process group.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the check that failed.
    """
    torch.multiprocessing.spawn(_one_of_two, (check, Path(folder)), nprocs=2)


def _one_of_two(rank: int, check, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    check(rank, folder)
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the interpreter, and abort the process that has passed
