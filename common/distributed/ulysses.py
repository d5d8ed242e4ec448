"""Ulysses: rows too long for one card, their tokens divided among several, their attention by heads.

Each process has a piece of every row: the same number of tokens, in order. Before attention the processes of a group
exchange pieces for heads, and after it heads for pieces. So each computes attention over whole rows, for its share of
the heads, and whatever attention is right on one card is right here, also that of isolated documents:

    (rows, heads, tokens / size, head size)  ->  (rows, heads / size, tokens, head size)

Source: https://arxiv.org/abs/2309.14509. Accelerate's own engine (1.15) needs DeepSpeed, drops the borders of
documents, and cannot be launched by a YAML: the launcher takes a parallelism_config with FSDP2 only.
"""

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from common.console import InputError
from common.distributed.launch import Launch


def group_of_rows(launch: Launch) -> dist.ProcessGroup:
    """Return the group of this process: neighbours that share their rows. All processes must call this."""
    group, _ = dist.new_subgroups(launch.sequence_parallel)
    return group


def pieces_of_rows(launch: Launch, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``inputs`` with this process's piece of each tensor of (rows, tokens), each token with its position."""
    ids = inputs["input_ids"]
    if "position_ids" not in inputs:
        positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        inputs = inputs | {"position_ids": positions}
    length = ids.shape[1] // launch.sequence_parallel
    begin = launch.process % launch.sequence_parallel * length
    names = ("input_ids", "position_ids", "shift_labels", "labels")
    return inputs | {name: inputs[name][:, begin : begin + length] for name in names if name in inputs}


def check_heads(model: PreTrainedModel, launch: Launch) -> None:
    """Refuse a model whose heads cannot be divided. It may be on the meta device.

    Raises:
        InputError: with what works.
    """
    size = launch.sequence_parallel
    if size == 1:
        return
    config, name = model.config.get_text_config(), type(model).__name__
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % size or key_heads % size:
        raise InputError(
            f"parallelism_config_sp_size {size}: {name} has {heads} heads and {key_heads} key-value heads, and both "
            "are divided among the processes of a row. Use a --parallelism_config_sp_size that divides both, or "
            "fsdp2_context_parallel.yaml."
        )


def heads_of_rows(pieces: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return this process's heads of whole rows, for all heads of its piece of them.

    Args:
        pieces: (rows, heads, tokens / size, head size).

    Returns:
        (rows, heads / size, tokens, head size).
    """
    rows, heads, tokens, width = pieces.shape
    size = group.size()
    sent = pieces.view(rows, size, heads // size, tokens, width).movedim(1, 0)  # (process, rows, heads / size, ...)
    received = Exchange.apply(sent.contiguous(), group)  # from each process its tokens
    return received.movedim(0, 2).reshape(rows, heads // size, size * tokens, width)


def pieces_of_heads(heads: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return all heads of this process's piece of the rows: the way back.

    Args:
        heads: (rows, tokens, heads / size, head size), as attention in transformers returns it.

    Returns:
        (rows, tokens / size, heads, head size).
    """
    rows, tokens, own, width = heads.shape
    size = group.size()
    sent = heads.reshape(rows, size, tokens // size, own, width).movedim(1, 0)
    received = Exchange.apply(sent.contiguous(), group)  # from each process its heads
    return received.movedim(0, 2).reshape(rows, tokens // size, size * own, width)


class Exchange(torch.autograd.Function):
    """Send part i of a tensor to process i of the group, get one from each; gradients go the same way back."""

    @staticmethod
    def forward(context, parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        context.group = group
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return Exchange.apply(gradient.contiguous(), context.group), None
