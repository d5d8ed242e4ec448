"""Context parallelism: rows too long for one card, their tokens divided among several that exchange keys and values.

The YAML's parallelism_config asks for it, Accelerate and torch do it: each card gets two pieces of every row, one from
the front and the matching one from the back, so that causal attention is equally much work everywhere.
Source: https://huggingface.co/docs/accelerate/concept_guides/context_parallelism
"""

from collections.abc import Callable
from functools import partial

import torch
from accelerate import Accelerator

from common.console import InputError
from common.distributed.launch import Launch


def check_parallelism(launch: Launch, context_length: int, isolated: bool) -> None:
    """Refuse what the YAML's parallelism_config cannot do with these recipes.

    Raises:
        InputError: with what works.
    """
    for kind, name, size in (
        ("tp", "tensor", launch.tensor_parallel),
        ("sp", "DeepSpeed's sequence", launch.sequence_parallel),
    ):
        if size > 1:
            raise InputError(
                f"parallelism_config_{kind}_size {size}: {name} parallelism is not supported by these recipes: it "
                "needs a model that is loaded in pieces. Use fsdp2.yaml; for long rows fsdp2_context_parallel.yaml."
            )
    sharing = launch.context_parallel
    asked = launch.replicas * launch.shards * sharing
    shards, rest = divmod(launch.processes, sharing * launch.replicas)
    if sharing * launch.replicas > 1 and (rest or shards != launch.shards):
        raise InputError(
            f"parallelism_config asks for {launch.replicas} x {launch.shards} x {sharing} processes (dp_replicate x "
            f"dp_shard x cp), and these are {launch.processes}. Use --parallelism_config_dp_shard_size "
            f"{max(1, shards)} before the recipe, or --num_processes {asked}."
        )
    if sharing == 1:
        return
    if isolated:
        raise InputError(
            "--packing isolated under context parallelism: its attention ignores where documents begin. Use cross."
        )
    if context_length % (2 * sharing):
        raise InputError(
            f"--context_length {context_length}: {sharing} cards share each row as {2 * sharing} equal pieces. Use "
            f"{max(1, round(context_length / (2 * sharing))) * 2 * sharing}."
        )


def divided_rows(accelerator: Accelerator, inputs: dict[str, torch.Tensor]) -> Callable:
    """Return a context in which the tensors of ``inputs``, (rows, tokens) each, are this process's share of tokens."""
    ids = inputs["input_ids"]
    inputs["position_ids"] = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
    cut = [inputs["input_ids"], inputs["shift_labels"], inputs["position_ids"]]
    return partial(
        accelerator.maybe_context_parallel, buffers=cut, buffer_seq_dims=[1] * len(cut), no_restore_buffers=set(cut)
    )
