"""Copies in main memory of what training changes, so that training goes on while they are written to the disk."""

import weakref

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from common.console import say
from common.distributed.strategy import local
from common.system import GIB, available_memory

RESERVE_BYTES = 2 * GIB  # of main memory, left to everything else
PINNED_BYTES = 2**20  # tensors of at least this size are copied to pinned memory


class Copies:
    """Copy tensors to main memory, into the same memory every time: taking new memory costs more than the copy.

    torch's own stager (torch.distributed.checkpoint.staging, 2.13) finds the memory by the identity of what is copied,
    and fails at the second save of a tensor that is made anew for each. Here the place in the state finds it.
    """

    def __init__(self):
        self._kept: dict[str, list[torch.Tensor]] = {}
        self._taken_bytes = 0
        self._said = False

    def take(self, name: str, state: dict) -> dict:
        """Return a copy of ``state``, nested dicts, lists and tensors. A tensor that is there twice still is.

        The copies of an earlier call with this ``name`` are no more: these are made in their memory.
        """
        kept, taken, seen = self._kept.get(name, []), [], {}

        def copy(value):
            if not isinstance(value, torch.Tensor):
                return value
            part = local(value.detach())
            place = (part.data_ptr(), part.dtype, part.shape, part.stride())
            if place not in seen or part.numel() == 0:
                memory = kept[len(taken)] if len(taken) < len(kept) else None
                if memory is None or memory.shape != part.shape or memory.dtype != part.dtype:
                    memory = new_memory(part)
                memory.copy_(part, non_blocking=True)
                taken.append(memory)
                seen[place] = memory
            if isinstance(value, DTensor):  # from_local would move it to the devices that share it
                return DTensor(seen[place], value._spec, requires_grad=False)
            return seen[place]

        copied = tree_map(copy, state)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._kept[name] = taken
        return copied

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


def new_memory(like: torch.Tensor) -> torch.Tensor:
    """Return main memory for a copy of ``like``: pinned if it is large, because CUDA copies there much faster.

    torch.empty(pin_memory=True) would take up to twice as much.
    """
    memory = torch.empty(like.shape, dtype=like.dtype, device="cpu")
    if like.is_cuda and memory.nbytes >= PINNED_BYTES:
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 1)) == 0:  # otherwise it is only slower
            weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
    return memory
