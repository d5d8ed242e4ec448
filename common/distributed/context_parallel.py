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
    check_divided(launch)
    check_sequence_parallelism(launch)
    sharing = launch.row_pieces * launch.tensor_parallel
    asked = launch.replicas * launch.shards * sharing
    shards, rest = divmod(launch.processes, sharing * launch.replicas)
    dimension = "tp" if launch.tensor_parallel > 1 else "sp" if launch.sequence_parallel > 1 else "cp"
    if (sharing * launch.replicas > 1 or launch.divided) and (rest or shards != launch.shards):
        size = f"--parallelism_config_dp_shard_size {shards} before the recipe"
        works = f"{size}, or --num_processes {asked}"
        if rest:  # no size fits them all
            fewer = f", or {launch.processes - rest} with {size}"
            works = f"--num_processes {asked}{'' if shards in (0, launch.shards) else fewer}"
        raise InputError(
            f"parallelism_config asks for {launch.replicas} x {launch.shards} x {sharing} processes (dp_replicate x "
            f"dp_shard x {dimension}), and these are {launch.processes}. Use {works}."
        )
    if launch.replicas > 1 and launch.shards * sharing == 1:  # accelerate's own message comes late
        raise InputError(
            f"parallelism_config_dp_replicate_size {launch.replicas} with dp_shard_size 1: copies of one process each, "
            "which shard nothing. Use accelerate_configs/ddp.yaml, or --parallelism_config_dp_shard_size 2 or more."
        )
    if launch.row_pieces == 1:
        return
    if isolated and launch.context_parallel > 1:
        raise InputError(
            "--packing isolated under context parallelism: its attention ignores where documents begin. Use cross, or "
            "fsdp2_ulysses.yaml, which keeps documents apart."
        )
    pieces = 2 * launch.context_parallel if launch.context_parallel > 1 else launch.sequence_parallel
    if context_length % pieces:
        raise InputError(
            f"--context_length {context_length}: {launch.row_pieces} cards share each row as {pieces} equal pieces. "
            f"Use {max(1, round(context_length / pieces)) * pieces}."
        )


def check_sequence_parallelism(launch: Launch) -> None:
    """Refuse what was not tried beside Ulysses, and so might train wrongly.

    Raises:
        InputError: with what works.
    """
    if launch.sequence_parallel == 1:
        return
    for wrong, what, works in (
        (not launch.strategy.is_fsdp, f"{launch.strategy}", "--config_file accelerate_configs/fsdp2_ulysses.yaml"),
        (launch.context_parallel > 1, "context parallelism", "--parallelism_config_cp_size 1"),
        (launch.replicas > 1, "dp_replicate_size above 1", "--parallelism_config_dp_replicate_size 1"),
        (launch.precision == "fp16", "fp16", "--mixed_precision bf16"),
        (launch.offloads, "parameters in main memory", "--fsdp_offload_params false"),
    ):
        if wrong:
            raise InputError(
                f"parallelism_config_sp_size {launch.sequence_parallel} with {what}: not tried here. Use {works} "
                "before the recipe."
            )


def check_divided(launch: Launch) -> None:
    """Refuse what was not tried beside tensor or expert parallelism, and so might train wrongly.

    Raises:
        InputError: with what works.
    """
    if not launch.divided:
        return
    experts, asked = launch.expert_parallel, f"parallelism_config_tp_size {launch.tensor_parallel}"
    if experts > 1:
        asked = f"parallelism_config_ep_size {experts}"
        if launch.shards % experts:
            raise InputError(
                f"{asked} does not divide the {launch.shards} processes of parallelism_config_dp_shard_size. Write one "
                "that does into the YAML, or PARALLELISM_CONFIG_EP_SIZE=NUMBER before the command."
            )
    for wrong, what, works in (
        (experts > 1 and launch.tensor_parallel > 1, "tensor parallelism", "--parallelism_config_tp_size 1"),
        (launch.context_parallel > 1, "context parallelism", "--parallelism_config_cp_size 1"),
        (launch.sequence_parallel > 1, "sequence parallelism", "--parallelism_config_sp_size 1"),
        (launch.replicas > 1, "dp_replicate_size above 1", "--parallelism_config_dp_replicate_size 1"),
        (launch.precision == "fp16", "fp16", "--mixed_precision bf16"),
        (launch.compiled, "torch.compile", "--dynamo_backend no"),
        (launch.offloads, "parameters in main memory", "--fsdp_offload_params false"),
    ):
        if wrong:
            raise InputError(f"{asked} with {what}: not tried here. Use {works} before the recipe.")


def divided_rows(accelerator: Accelerator, inputs: dict[str, torch.Tensor]) -> Callable:
    """Return a context in which the tensors of ``inputs``, (rows, tokens) each, are this process's share of tokens."""
    ids = inputs["input_ids"]
    inputs["position_ids"] = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
    cut = [inputs["input_ids"], inputs["shift_labels"], inputs["position_ids"]]
    return partial(
        accelerator.maybe_context_parallel, buffers=cut, buffer_seq_dims=[1] * len(cut), no_restore_buffers=set(cut)
    )
