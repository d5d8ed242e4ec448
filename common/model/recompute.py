"""Recompute: what backward computes again instead of keeping it. ``--recompute`` chooses among:

all               every layer: only its input is kept. The least memory, a third more computation.
2 (3, 4 ...)      every second (third, fourth ...) layer; the others keep everything.
keep_attention    every layer, but for the results of attention: for long rows, whose attention is the most work.
keep_products     every layer, but for the results of attention and of matrix products: what is computed again (norms,
                  activation functions, rotary embeddings) costs little.

The YAML's recompute, or --gradient_checkpointing, means all; --recompute narrows it down. The last two are torch's
selective activation checkpointing. Source: https://pytorch.org/blog/activation-checkpointing-techniques/
"""

from dataclasses import replace

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel, TrainingArguments

from common.console import InputError
from common.distributed.launch import Launch

ALL, KEEP_ATTENTION, KEEP_PRODUCTS = "all", "keep_attention", "keep_products"
# Batched products (bmm) are not among them: where attention is not one operation, they make all of its scores.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::_scaled_mm", "aten::_grouped_mm")
# The beginnings of attention's names: torch's kernels, flex attention, and the flash-attn packages.
ATTENTION = (
    "aten::_scaled_dot_product_", "aten::_flash_attention_forward", "aten::_efficient_attention_forward",
    "aten::_cudnn_attention_forward", "flex_attention", "torch_attn::", "flash_attn",
)  # fmt: skip


def choose_recompute(wanted: str | None, launch: Launch, training: TrainingArguments) -> Launch:
    """Switch recompute on if ``wanted`` asks for it; return the launch with what is recomputed, and why.

    Call this after ``take_over_recompute``.

    Args:
        wanted: --recompute; None: what the YAML or the flags of transformers say.

    Raises:
        InputError: ``wanted`` is none of the choices, or two flags choose layers.
    """
    names = [name for name in ("gradient_checkpointing", "activation_checkpointing") if hasattr(training, name)]
    given = getattr(training, f"{names[0]}_kwargs", None) or {}
    if wanted is None:
        if launch.recompute is None and training.gradient_checkpointing:
            launch = replace(launch, recompute="--gradient_checkpointing")
        return replace(launch, recomputed=str(given["every_n_layers"])) if "every_n_layers" in given else launch
    every = int(wanted) if wanted.isdecimal() else 1
    if every < 1 or (wanted not in (ALL, KEEP_ATTENTION, KEEP_PRODUCTS) and not wanted.isdecimal()):
        raise InputError(
            f"--recompute {wanted}: all, keep_attention, keep_products, or a number from 1: 2 recomputes every second "
            "layer."
        )
    if given:
        raise InputError(
            f"--recompute {wanted} with --gradient_checkpointing_kwargs {given}: both say what is recomputed. Leave "
            "one of them out."
        )
    for name in names:
        setattr(training, name, True)
        if every > 1:
            setattr(training, f"{name}_kwargs", {"every_n_layers": every})
    by_yaml = "" if launch.recompute is None else f"{launch.recompute}, "
    recomputed = ALL if every == 1 and wanted.isdecimal() else wanted
    return replace(launch, recompute=f"{by_yaml}--recompute {wanted}", recomputed=recomputed)


def keep_results(model: PreTrainedModel, recomputed: str, compiled: bool) -> None:
    """Have the recompute of ``model``, when it is switched on, keep the results that ``recomputed`` names.

    Trainer switches recompute on by ``gradient_checkpointing_enable`` of the model, and would have to be given a
    function among its arguments, which trackers cannot write down. So that method gets another argument here.

    Args:
        recomputed: of Launch.
        compiled: the layers will be.

    Raises:
        InputError: what is to be kept is not one operation here, or gradients would be wrong.
    """
    if recomputed not in (KEEP_ATTENTION, KEEP_PRODUCTS):
        return
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # beneath adapters
    check_kept(model, recomputed, compiled)
    enable = model.gradient_checkpointing_enable
    contexts = keeping_attention if recomputed == KEEP_ATTENTION else keeping_products

    def enable_keeping(gradient_checkpointing_kwargs: dict | None = None, **settings) -> None:
        given = gradient_checkpointing_kwargs or {}
        enable({**given, "use_reentrant": False, "context_fn": contexts}, **settings)

    model.gradient_checkpointing_enable = enable_keeping


def check_kept(model: PreTrainedModel, recomputed: str, compiled: bool) -> None:
    """Refuse to keep results that are none of one operation, and those that dropout makes wrong."""
    config, kind = model.config.get_text_config(), model.config._attn_implementation
    works = "Use --recompute all, or a number: 2 recomputes every second layer."
    if kind in (None, "eager"):
        raise InputError(
            f"--recompute {recomputed}: the attention of {type(model).__name__} here ({kind}) is no single operation "
            f"whose result can be kept. {works}"
        )
    if kind in ("documents", "ulysses_documents", "flex_attention") and not compiled:
        raise InputError(
            f"--recompute {recomputed}: flex attention, which keeps documents apart, is compiled by itself here, and "
            f"its result cannot be kept. Use a YAML with dynamo_config. {works}"
        )
    dropouts = [name for name in vars(config) if "drop" in name and "att" in name and getattr(config, name)]
    if dropouts:  # what is kept draws no random numbers again: dropout after it would draw others than in forward
        raise InputError(
            f"--recompute {recomputed} with {dropouts[0]} {getattr(config, dropouts[0])}: dropout after attention "
            f"would differ when it is computed again, and gradients be wrong. Set it to 0.0 in the config. {works}"
        )


def keeping_attention():
    """Return the contexts of forward and recompute in which the results of attention are kept."""
    return create_selective_checkpoint_contexts(lambda _, operation, *args, **kwargs: policy(operation, ()))


def keeping_products():
    """Return the contexts of forward and recompute in which those of matrix products are kept, too."""
    return create_selective_checkpoint_contexts(lambda _, operation, *args, **kwargs: policy(operation, PRODUCTS))


# Under these names torch.compile finds what it compiled in an earlier run.
keeping_attention.cache_hash, keeping_products.cache_hash = KEEP_ATTENTION, KEEP_PRODUCTS


def policy(operation: torch._ops.OpOverload | torch._ops.HigherOrderOperator, products: tuple) -> CheckpointPolicy:
    """Return whether the result of an operation is kept: of attention, and of those that ``products`` names."""
    name = operation.name().split(".")[0]  # "aten::mm" of "aten::mm.default"
    kept = name in products or name.startswith(ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
