"""Cross entropy and its gradient for a chunk of logits, in place, in one Triton kernel.

The logits are the largest tensor of a training step, so the number of passes over them decides the time. Here they are
read once for the softmax's maximum and sum (online softmax), and read and written once for the gradient. torch's
log_softmax, nll_loss and their backward make at least twice as many passes, over an fp32 copy.

Source: https://arxiv.org/abs/1805.02867 (online softmax).
"""

import torch
import triton
import triton.language as tl

# How many numbers a program takes at once, at most, and each of its warps. Of 23 choices these were the fastest for
# 151,680 logits on an H100 (benchmarks/README.md). A program fills a multiprocessor, so few rows are in work at a time.
# They have 303 KB each, and are partly still in the L2 cache when they are read again.
BLOCK = 32_768
NUMBERS_A_WARP = 2048 if torch.version.hip else 1024  # AMD's warps have 64 threads, and a program at most 1,024


def cross_entropy_in_place(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    ignore_index: int,
    with_gradient: bool,
) -> torch.Tensor:
    """Return the loss of each row, fp32, shape (rows,); overwrite ``logits`` with the gradient of the losses' sum.

    ``cross_entropy_plain`` in linear_cross_entropy.py does the same in plain torch, and explains the arguments. If the
    rows in memory are wider than the vocabulary (``logits`` is a view), the gradient of the rest is set to 0. A target
    outside the vocabulary gives NaN.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    block = min(BLOCK, max(NUMBERS_A_WARP, triton.next_power_of_2(logits.stride(0))))
    with torch.cuda.device_of(logits):
        _cross_entropy[(len(logits),)](
            logits,
            logits.stride(0),
            targets,
            losses,
            logits.shape[1],
            ignore_index,
            scale,
            1.0 if soft_cap is None else soft_cap,
            CAPPED=soft_cap is not None,
            GRADIENT=with_gradient,
            BLOCK=block,
            num_warps=block // NUMBERS_A_WARP,
        )
    return losses


@triton.jit
def _cross_entropy(
    logits,
    width,
    targets,
    losses,
    vocabulary,
    ignore_index,
    scale,
    soft_cap,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one row in each program.

    Loads are bounded by the row's width in memory, not by the vocabulary: a width with factors of two lets the compiler
    read 16 bytes at a time.
    """
    row = tl.program_id(0).to(tl.int64)  # rows x vocabulary goes beyond 32 bits
    logits += row * width
    columns = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocabulary)
    target_logit = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)  # before it is overwritten

    maximum = -float("inf")
    total = 0.0  # of exp(logit - maximum)
    for start in range(0, width, BLOCK):
        column = start + columns
        values = tl.load(logits + column, mask=column < width, other=0.0, eviction_policy="evict_last")
        values = values.to(tl.float32)
        values = tl.where(column < vocabulary, _transformed(values, scale, soft_cap, CAPPED), -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(values))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(values - new_maximum))
        maximum = new_maximum
    normalizer = maximum + tl.log(total)
    used = target != ignore_index
    loss = normalizer - _transformed(target_logit, scale, soft_cap, CAPPED)
    tl.store(losses + row, tl.where(used, loss, 0.0))

    if GRADIENT:
        for start in range(0, width, BLOCK):
            column = start + columns
            values = tl.load(logits + column, mask=column < width, other=0.0, eviction_policy="evict_first")
            values = values.to(tl.float32)
            values = _transformed(values, scale, soft_cap, CAPPED)
            gradient = (tl.exp(values - normalizer) - tl.where(column == target, 1.0, 0.0)) * scale
            if CAPPED:
                gradient *= 1.0 - (values / soft_cap) * (values / soft_cap)
            gradient = tl.where(used & (column < vocabulary), gradient, 0.0)
            gradient = gradient.to(logits.dtype.element_ty)
            tl.store(logits + column, gradient, mask=column < width, eviction_policy="evict_first")


@triton.jit
def _transformed(values, scale, soft_cap, CAPPED: tl.constexpr):
    values = values * scale
    if CAPPED:
        values = soft_cap * (2.0 * tl.sigmoid(2.0 * values / soft_cap) - 1.0)  # tanh
    return values
