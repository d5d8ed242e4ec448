"""Output layer and cross entropy together, over chunks of rows: the logits of all rows are never held.

16,384 rows of 151,680 logits take 4.6 GiB in bf16; an fp32 copy and its softmax take twice as much each. Here, one
chunk of rows after another goes through three products, and its logits are overwritten by the next chunk's:

    logits = hidden @ weight.T                                      # (rows of the chunk, vocabulary)
    loss = cross entropy; logits = softmax(logits) - 1 at the target, in place
    hidden's gradient = logits @ weight
    weight's gradient += logits.T @ hidden

So the gradients are there before backward is called. Backward only multiplies them by the gradient of the loss. They
are summed in fp32 before they are scaled: scaled by 1 / (targets of a step), they would be too small for fp16.

Source: https://arxiv.org/abs/2410.10989 (Liger Kernel: gradients in the forward pass, chunks of rows).
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from common.console import InputError

try:
    from common.model.cross_entropy_kernel import cross_entropy_in_place
except ImportError:  # no Triton, which comes with torch for CUDA on Linux
    cross_entropy_in_place = None

# 1.25 GiB. 4,096 rows of 151,680 logits in bf16 take 1.16 GiB, and let the products run at full speed on an H100
# (measured).
CHUNK_BYTES = 5 * 2**28
TILE = 128  # rows: the unit in which GPUs compute matrix products
# Products are slow if the vocabulary is not a multiple of some power of two, and most are not: 262k tokens/s with
# 151,646 rows, 394k with 151,680 (measured on an H100). The weight is copied anyway to cast it, so the copy is padded
# to a multiple of this number of rows.
PADDING = 64


@dataclass(frozen=True)
class Vocabulary:
    """A part of a vocabulary that processes share.

    Attributes:
        first: id of the first row of this part.
        whole: rows of all parts.
        group: the processes that have the other parts.
    """

    first: int
    whole: int
    group: torch.distributed.ProcessGroup

    def columns(self, targets: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the columns of ``targets`` in this part, of ``rows`` rows, and whether they are in it; else column 0.

        A target outside of the whole vocabulary is left outside, so that it is an error, as without parts.
        """
        here = (targets >= self.first) | ((self.first == 0) & (targets < 0))
        here &= (targets < self.first + rows) | (targets >= self.whole)
        return (targets - self.first).where(here, 0), here

    def over_all(self, normalizer: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logarithm of the sum of exponentials, and the target's logit, over all parts; (rows, 1) each.

        Args:
            normalizer: of this part.
            wanted: the target's logit, 0 where the target is in another part.
        """
        own = torch.stack([normalizer, wanted])
        parts = [torch.empty_like(own) for _ in range(self.group.size())]
        torch.distributed.all_gather(parts, own, group=self.group)
        normalizers, logits = torch.stack(parts, dim=1)
        return normalizers.logsumexp(0), logits.sum(0)


def divided_vocabulary(weight: DTensor) -> Vocabulary:
    """Return which part of the vocabulary this process has of ``weight``, (vocabulary, hidden_size).

    Raises:
        InputError: it is not divided by vocabulary, and only so.
    """
    mesh, places = weight.device_mesh, weight.placements
    if mesh.ndim != 1 or places != (Shard(0),):
        raise InputError(f"the head is divided as {places}; its loss needs parts of the vocabulary.")
    rows = -(-weight.shape[0] // mesh.size())  # as torch divides a dimension
    return Vocabulary(mesh.get_local_rank() * rows, weight.shape[0], mesh.get_group())


def fused_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
    ignore_index: int = -100,
    num_items: torch.Tensor | int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    vocabulary: Vocabulary | None = None,
) -> torch.Tensor:
    """Return the cross entropy of scale * (hidden @ weight.T + bias) against ``targets``, fp32, shape ().

    Under autocast the products are computed in autocast's dtype. Each gradient has the dtype of its tensor. Backward
    can be called once only.

    Args:
        hidden: (rows, hidden_size).
        weight: (vocabulary, hidden_size).
        targets: (rows,), int64; ``ignore_index`` where a row has no target.
        bias: (vocabulary,).
        soft_cap: logits become soft_cap * tanh(scale * logits / soft_cap).
        num_items: the sum of the losses is divided by it; None: by the number of targets.
        chunk_bytes: the most that a chunk's logits may take, with the copies that plain torch makes of them.
        vocabulary: which part of it ``weight`` and ``bias`` are, if processes share it. All of them have the same
            ``hidden`` and ``targets``, and get the same loss and the same gradient of ``hidden``.

    Raises:
        ValueError: ``hidden`` and ``targets`` differ in their number of rows.
    """
    if not len(hidden) == len(targets) == targets.numel():
        raise ValueError(f"{len(hidden)} rows of hidden states against targets of shape {tuple(targets.shape)}")
    if num_items is None:
        num_items = (targets != ignore_index).sum()
    elif torch.is_tensor(num_items):
        num_items = num_items.to(hidden.device)
    options = (targets.contiguous(), scale, soft_cap, ignore_index, chunk_bytes, vocabulary)
    parts = (hidden, weight, bias)
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts):
        total = _GradientsInForward.apply(*parts, *options)
    else:
        total, _ = _loss_and_gradients(*parts, *options, wanted=(False, False, False))
    return total / num_items


class _GradientsInForward(torch.autograd.Function):
    """The sum of the losses. Its gradients are computed in forward and only scaled in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, *options):
        parts = (hidden, weight, bias)
        total, ctx.gradients = _loss_and_gradients(*parts, *options, wanted=ctx.needs_input_grad[:3])
        ctx.dtypes = [None if part is None else part.dtype for part in parts]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        if ctx.gradients is None:
            raise RuntimeError("backward a second time: the first call has used up the gradients of the chunked loss")
        gradients = ctx.gradients
        ctx.gradients = None  # with no other reference to them, autograd keeps the tensors and makes no copy
        scaled = (
            None if gradient is None else gradient.mul_(grad_output).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None, None, None


def _loss_and_gradients(hidden, weight, bias, targets, scale, soft_cap, ignore_index, chunk_bytes, shared, wanted):
    """Return the sum of the losses, and its gradients with respect to hidden, weight and bias.

    The gradients are in fp32, or in fp64 if the weight is; None where not ``wanted``.
    """
    device, rows, vocabulary = hidden.device, len(hidden), len(weight)  # of this process's part
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    hidden = hidden.to(dtype or hidden.dtype)
    weight = _padded(weight, dtype)  # once, not once a chunk
    bias = None if bias is None else _padded(bias, dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    use_kernel = _kernel_runs_on(device) and wide == torch.float32 and shared is None
    cross_entropy = cross_entropy_in_place if use_kernel else partial(cross_entropy_plain, vocabulary=shared)
    logit_bytes = weight.itemsize + (0 if use_kernel else 2 * wide.itemsize)
    chunk_rows = rows_of_a_chunk(rows, len(weight) * logit_bytes, chunk_bytes)
    buffer = torch.empty(chunk_rows, len(weight), dtype=weight.dtype, device=device)
    losses = torch.empty(rows, dtype=wide, device=device)
    hidden_gradient, weight_gradient, bias_gradient = (
        torch.zeros_like(part, dtype=wide) if want else None
        for part, want in zip((hidden, weight, bias), wanted, strict=True)
    )
    with torch.autocast(device.type, enabled=False):
        for start in range(0, rows, chunk_rows):
            chunk = slice(start, start + chunk_rows)
            logits = buffer[: len(targets[chunk])]  # (rows of the chunk, padded vocabulary)
            if bias is None:
                torch.mm(hidden[chunk], weight.t(), out=logits)
            else:
                torch.addmm(bias, hidden[chunk], weight.t(), out=logits)
            losses[chunk] = cross_entropy(
                logits[:, :vocabulary], targets[chunk], scale, soft_cap, ignore_index, any(wanted)
            )
            if hidden_gradient is not None:
                _add_product(hidden_gradient[chunk], logits, weight)
            if weight_gradient is not None:
                _add_product(weight_gradient, logits.t(), hidden[chunk])
            if bias_gradient is not None:
                bias_gradient += logits.sum(0, dtype=wide)
    if shared is not None and hidden_gradient is not None:
        # Each process has the gradient by way of its own logits. Without their sum the loss is right, and all layers
        # below the head are trained wrongly.
        torch.distributed.all_reduce(hidden_gradient, group=shared.group)
    # The padding is cut off in place. If this returned a view, autograd would add the other gradient of a tied
    # embedding into a new tensor of the same size.
    for part in (weight_gradient, bias_gradient):
        if part is not None:
            part.resize_(vocabulary, *part.shape[1:])
    return losses.sum(), [hidden_gradient, weight_gradient, bias_gradient]


def _padded(part: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return ``part`` in ``dtype``, with rows of zeros up to a multiple of PADDING; itself if nothing changes."""
    rows = -(-len(part) // PADDING) * PADDING
    if rows == len(part):
        return part.to(dtype or part.dtype)
    padded = torch.zeros(rows, *part.shape[1:], dtype=dtype or part.dtype, device=part.device)
    padded[: len(part)] = part
    return padded


def cross_entropy_plain(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    ignore_index: int,
    with_gradient: bool,
    vocabulary: Vocabulary | None = None,
) -> torch.Tensor:
    """Return the loss of each row, in fp32 or fp64, shape (rows,); 0 where the target is ``ignore_index``.

    Overwrites ``logits``, shape (rows, vocabulary); if ``with_gradient``, with the gradient of the sum of the losses.
    """
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))  # no copy if the logits are in fp32
    slope = scale
    if scale != 1:
        values.mul_(scale)
    if soft_cap is not None:
        values.div_(soft_cap).tanh_()
        slope = scale * (1 - values.square()) if with_gradient else None
        values.mul_(soft_cap)
    used = (targets != ignore_index)[:, None]
    columns = targets[:, None].where(used, 0)
    here = torch.ones_like(used)
    if vocabulary is not None:
        columns, here = vocabulary.columns(columns, values.shape[1])
    normalizer = values.logsumexp(1, keepdim=True)
    wanted = values.gather(1, columns).where(here, 0)
    if vocabulary is not None:
        normalizer, wanted = vocabulary.over_all(normalizer, wanted)
    losses = (normalizer - wanted).where(used, 0)
    if with_gradient:
        values.sub_(normalizer).exp_().scatter_add_(1, columns, -here.to(values.dtype))
        if scale != 1 or soft_cap is not None:
            values.mul_(slope)
        logits.copy_(values.masked_fill_(~used, 0))
    return losses.squeeze(1)


def rows_of_a_chunk(rows: int, row_bytes: int, chunk_bytes: int) -> int:
    """Return the number of rows in a chunk: the fewest chunks that ``chunk_bytes`` allows, all of about the same size.

    It is at least 1, and a multiple of TILE where a chunk has room for a tile: 16,384 rows, of which 4,400 fit into
    ``chunk_bytes``, are 4 chunks of 4,096.
    """
    most = max(1, chunk_bytes // row_bytes)
    if rows <= most:
        return max(1, rows)
    step = TILE if most >= TILE else 1
    chunks = -(-rows // (most // step * step))
    return -(-rows // (chunks * step)) * step


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left @ right to ``total``, whose dtype is as wide as theirs or wider."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        # Other devices have no product with a wider result: the product of each chunk is rounded, their sum is not.
        total.add_(left @ right)


def _kernel_runs_on(device: torch.device) -> bool:
    """Whether the Triton kernel can be used: Triton is installed, and the GPU is Turing (T4) or newer."""
    return (
        cross_entropy_in_place is not None
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (7, 5)
    )
