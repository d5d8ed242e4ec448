"""Context parallelism: rows too long for one card, their tokens divided among several that exchange keys and values.

The YAML's parallelism_config asks for it, Accelerate and torch do it: each card gets two pieces of every row, one from
the front and the matching one from the back, so that causal attention is equally much work everywhere.
Source: https://huggingface.co/docs/accelerate/concept_guides/context_parallelism
"""

import os
from collections.abc import Callable
from functools import partial

import torch
from accelerate import Accelerator
from transformers import TrainingArguments

from common.console import InputError


def parallel_size(kind: str) -> int:
    """Return a size of the YAML's parallelism_config, 1 if there is none: dp_replicate, dp_shard, tp, cp or sp."""
    asked = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true"
    return int(os.environ.get(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", "1")) if asked else 1


def row_readers(training: TrainingArguments) -> int:
    """Return how many processes, or groups that share their rows, read rows of their own."""
    return max(1, training.world_size // parallel_size("cp"))


def reads_first(training: TrainingArguments) -> bool:
    """Whether this process is the first of those that share its rows."""
    return training.process_index % parallel_size("cp") == 0


def check_parallelism(training: TrainingArguments, context_length: int, isolated: bool) -> None:
    """Refuse what the YAML's parallelism_config cannot do with these recipes.

    Raises:
        InputError: with what works.
    """
    for kind, name in (("tp", "tensor"), ("sp", "DeepSpeed's sequence")):
        if parallel_size(kind) > 1:
            raise InputError(
                f"parallelism_config_{kind}_size {parallel_size(kind)}: {name} parallelism is not with these recipes: "
                "it needs a model that is loaded in pieces. Use fsdp2.yaml; for long rows fsdp2_context_parallel.yaml."
            )
    cp, copies = parallel_size("cp"), parallel_size("dp_replicate")
    divided, rest = divmod(training.world_size, cp * copies)
    if cp * copies > 1 and (rest or divided != parallel_size("dp_shard")):
        raise InputError(
            f"parallelism_config asks for {copies} x {parallel_size('dp_shard')} x {cp} processes (dp_replicate x "
            f"dp_shard x cp), and these are {training.world_size}. Use --parallelism_config_dp_shard_size "
            f"{max(1, divided)} before the recipe, or --num_processes {copies * parallel_size('dp_shard') * cp}."
        )
    if cp == 1:
        return
    if isolated:
        raise InputError("--packing isolated under context parallelism: its attention knows no borders. Use cross.")
    if context_length % (2 * cp):
        raise InputError(
            f"--context_length {context_length}: {cp} cards share each row as {2 * cp} equal pieces. Use "
            f"{max(1, round(context_length / (2 * cp))) * 2 * cp}."
        )


def divided_rows(accelerator: Accelerator, inputs: dict[str, torch.Tensor]) -> Callable:
    """Return a context in which the tensors of ``inputs``, (rows, tokens) each, are this process's share of tokens."""
    ids = inputs["input_ids"]
    inputs["position_ids"] = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
    cut = [inputs["input_ids"], inputs["shift_labels"], inputs["position_ids"]]
    return partial(
        accelerator.maybe_context_parallel, buffers=cut, buffer_seq_dims=[1] * len(cut), no_restore_buffers=set(cut)
    )
