"""How the work is divided among processes, and what follows from it."""

import torch
from torch.distributed.tensor import DTensor


class Strategy(str):
    """The name of a strategy: single, ddp, zero1, zero2, zero3, fsdp1 or fsdp2.

    A process holds its share of what the strategy shards, and all of the rest:

        strategy        optimizer states    gradients    parameters
        single, ddp     whole               whole        whole
        zero1           sharded             whole        whole
        zero2           sharded             sharded      whole
        zero3, fsdp     sharded             sharded      sharded
    """

    @property
    def is_deepspeed(self) -> bool:
        return self.startswith("zero")

    @property
    def is_fsdp(self) -> bool:
        return self.startswith("fsdp")

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 under every other strategy."""
        return int(self[-1]) if self.is_deepspeed else 0

    @property
    def shards_states(self) -> bool:
        return self.is_deepspeed or self.is_fsdp

    @property
    def shards_gradients(self) -> bool:
        return self.zero_stage >= 2 or self.is_fsdp

    @property
    def shards_parameters(self) -> bool:
        return self.zero_stage == 3 or self.is_fsdp


SINGLE, DDP, FSDP2 = Strategy("single"), Strategy("ddp"), Strategy("fsdp2")
ZERO1, ZERO2, ZERO3 = Strategy("zero1"), Strategy("zero2"), Strategy("zero3")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor, gathered if it is divided. Then all processes that share it must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process has: the same memory, and all of it if it is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
