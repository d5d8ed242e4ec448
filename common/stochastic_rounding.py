"""fp32 -> bf16, up or down at random, so that on average nothing is lost.

bf16 keeps eight bits of a number: the next one above 1 is 1.0078. An optimizer's step of 1e-5 added to a weight of 1 is
rounded away, every time, and such a weight never moves. Rounded up with probability 1e-5 / 0.0078 instead, it moves
by the right amount on average.

Sources: https://arxiv.org/abs/2010.06192 (training in bf16 alone), https://arxiv.org/abs/1502.02551 (the rounding).
"""

import torch


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return ``values`` (fp32, left as they are) in bf16, each one of its two neighbours there, drawn by distance.

    The expected value is the value itself. Numbers that bf16 has stay; infinity and NaN, too.

    Args:
        generator: on the device of ``values``.
    """
    # bf16 is the upper half of an fp32: adding a random lower half carries into it as often as the lower half is large.
    # The sign is apart in both, so a negative number is rounded alike.
    bits = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits.add_(values.view(torch.int32)).bitwise_and_(-1 << 16)
    rounded = bits.view(torch.float32)
    return torch.where(values.isnan(), values, rounded).bfloat16()  # a carry in a NaN would make a number of it
