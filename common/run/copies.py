"""Copies in main memory of what training changes, so that training goes on while they are written to the disk."""

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from common.console import say
from common.system import GIB, available_memory

RESERVE_BYTES = 2 * GIB  # of main memory, left to everything else


class Copies:
    """Copy tensors to main memory, into the same memory every time: taking new memory costs more than the copy."""

    def __init__(self):
        on_cuda = torch.cuda.is_available()  # from there, pinned memory is copied to several times as fast
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_cuda,
                use_shared_memory=False,
                use_async_staging=False,  # when ``take`` returns, the copies are made
                use_non_blocking_copy=torch.accelerator.is_available(),
            )
        )
        self._taken_bytes = 0
        self._said = False

    def take(self, state: dict) -> dict:
        """Return a copy of ``state``, nested dicts, lists and tensors. Tensors that share memory still do.

        The copies of an earlier call are no more: the same tensors are copied into the same memory.
        """
        return self._stager.stage(state)

    def have_room(self, needed_bytes: int, sharers: int, again: bool) -> bool:
        """Return whether main memory has room for copies of ``needed_bytes``; if not, say so once.

        Args:
            sharers: processes of this machine that take as much each.
            again: the next copies go into the memory of these.
        """
        needed = sharers * (needed_bytes - self._taken_bytes)
        free = available_memory()
        if needed > 0 and needed + RESERVE_BYTES > free:
            if not self._said:
                say(
                    f"note: training stops while a checkpoint is written: a copy of it would take {needed / GIB:.1f} "
                    f"GiB of main memory, of which {free / GIB:.1f} are free."
                )
            self._said = True
            return False
        if again:
            self._taken_bytes = max(self._taken_bytes, needed_bytes)
        return True
