"""Which attention a model trains with, and attention that stays within a document of rows that several share.

Isolated rows carry position ids that start again at 0 with every document. There are two ways to use them:

documents       flex attention with a block mask made once a batch: blocks without a common document cost nothing.
a full mask     transformers reads the borders off the position ids, whenever no cache and no attention mask are given,
                for every kind of layer (sliding windows too): slow next to plain causal attention, but right anywhere.

Rows whose documents see each other need no mask at all. transformers looks for borders all the same, and to do so
waits for the GPU in every forward, which then runs dry. ``causal`` is its own sdpa under a name for which it knows no
mask to make (what that gains: benchmarks/README.md). It must not be given padded rows: see ``generating``.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from common.console import InputError, say
from common.dataset.packing import document_positions
from common.model.counts import head_size

CAUSAL, DOCUMENTS = "causal", "documents"  # ours, beside transformers' own attention implementations

# Tiles of flex attention's kernels, by compute capability and head size: what torch's autotuning chose on an H100 in
# 48 s, but for one stage. Without them torch takes others, a quarter slower at 512 tokens a row (benchmarks/README.md).
TILES = {
    ((9, 0), 64): dict(
        fwd_BLOCK_M=128, fwd_BLOCK_N=64, fwd_num_warps=4, fwd_num_stages=3,
        bwd_BLOCK_M1=64, bwd_BLOCK_N1=64, bwd_BLOCK_M2=64, bwd_BLOCK_N2=64, bwd_num_warps=4, bwd_num_stages=3,
    ),
}  # fmt: skip


@torch.no_grad()
def check_isolation(model: PreTrainedModel) -> None:
    """Raise InputError unless ``model`` keeps documents in a row apart: another first one must not move the second.

    Not every architecture of transformers reads position ids (Bloom does not), and one that ignores them would train
    on mixed-up documents without a word. The model's mode and random state are left as they were.
    """
    was_training = model.training
    model.eval()
    length, border = 12, 7
    # Two rows, because some code paths look at a batch of one only.
    ids = torch.arange(1, 2 * length + 1, device=model.device).view(2, length) % model.config.vocab_size
    other = ids.clone()
    other[:, :border] = ids[:, :border].flip(1)
    positions = document_positions(np.arange(length) == border)
    positions = torch.from_numpy(positions).to(model.device).expand(2, length)
    try:
        first, second = (
            model(input_ids=row, position_ids=positions, use_cache=False).logits[:, border:].float()
            for row in (ids, other)
        )
        apart = torch.allclose(first, second, rtol=1e-3, atol=1e-4)
    except TypeError:  # a forward without position_ids
        apart = False
    model.train(was_training)
    if not apart:
        raise InputError(
            f"--packing isolated: {type(model).__name__} lets documents of a row see each other (it does not take "
            "their borders from position ids). Use --packing cross."
        )


def set_attention(
    model: PreTrainedModel, wanted: str, isolated: bool, device: torch.device, context_parallel: bool = False
) -> None:
    """Set the attention of ``model`` to ``wanted``, a name of transformers, and say which kernel that is.

    ``auto`` is the fastest: ``documents`` for isolated rows and ``causal`` for others where they can be had, else what
    transformers chose.

    Raises:
        InputError: the model or this machine does not support ``wanted``, or the model cannot keep documents apart.
    """
    if isolated:
        check_isolation(model)
        if "flash" in wanted:
            raise InputError(
                f"--attn_implementation {wanted} with --packing isolated: transformers reads the borders of documents "
                "in batches of one row only, and would mix them up here. Leave the flag out."
            )
    AttentionInterface.register(CAUSAL, causal_attention)
    AttentionInterface.register(DOCUMENTS, document_attention)
    default, no_documents = model.config._attn_implementation, why_not_documents(model, device)
    if wanted in (CAUSAL, DOCUMENTS):
        raise InputError(f"--attn_implementation {wanted}: used by itself where it fits. Leave the flag out.")
    if wanted == "auto" and isolated:
        wanted = default if no_documents else DOCUMENTS
    elif wanted == "auto":
        wanted = CAUSAL if default == "sdpa" and may_change(model) and looks_at_all_before(model) else default
    if context_parallel and (wanted not in (CAUSAL, "sdpa") or not looks_at_all_before(model)):
        raise InputError(
            f"context parallelism is for causal attention by torch's sdpa over whole rows; here {type(model).__name__} "
            f"has {wanted} attention{'' if looks_at_all_before(model) else ' with windows'}. Use fsdp2.yaml."
        )
    repeats = wanted == CAUSAL and repeats_heads(model, device)
    if repeats:
        AttentionInterface.register(CAUSAL, repeating_attention)
    if wanted == DOCUMENTS:
        tiles = TILES.get((torch.cuda.get_device_capability(device), head_size(model)))
        AttentionInterface.register(DOCUMENTS, partial(document_attention, kernel_options=tiles))
    try:
        model.set_attn_implementation(wanted)
    except (ValueError, ImportError) as error:
        raise InputError(f"--attn_implementation {wanted}: {error} Leave the flag out for the best there is.") from None
    if model.config._attn_implementation != wanted:
        raise InputError(f"--attn_implementation {wanted}: {type(model).__name__} has no choice. Leave the flag out.")
    if wanted == CAUSAL:
        repeated = ", with keys and values repeated for every query head" if repeats else ""
        say(f"attention: causal, by torch's {sdpa_kernel_name(model, device, grouped=not repeats)} kernel{repeated}")
    elif wanted == DOCUMENTS:
        say("attention: causal within documents, by flex attention")
    elif isolated and no_documents:
        say(f"attention: {wanted} with a full mask, exact but slow; no flex attention, because {no_documents}")
    else:
        say(f"attention: {wanted}")


def may_change(model: PreTrainedModel) -> bool:
    """Whether the attention of ``model`` can be chosen: an older class (Falcon) has its own."""
    return model._can_set_attn_implementation()


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Give ``model`` an attention that understands caches and padding, and is not compiled for each new length."""
    trained_with = model.config._attn_implementation
    if trained_with in (CAUSAL, DOCUMENTS):
        model.set_attn_implementation("sdpa")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.set_attn_implementation(trained_with)


def why_not_documents(model: PreTrainedModel, device: torch.device) -> str | None:
    """Return what keeps ``model`` from training with flex attention on ``device``, or None."""
    if device.type != "cuda":
        return "it trains on CUDA devices only"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not model._supports_flex_attn or not looks_at_all_before(model):
        return f"{type(model).__name__} does not support it here"
    return None


def looks_at_all_before(model: PreTrainedModel) -> bool:
    """Whether every layer's attention goes back to the row's beginning: no sliding windows, no chunks."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None and getattr(config, "attention_chunk_size", None) is None


def causal_attention(module, query, key, value, attention_mask=None, **kwargs):
    """Attend to all before, in rows without padding: transformers' sdpa, for (rows, heads, tokens, size) each."""
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


def repeating_attention(module, query, key, value, attention_mask=None, *, dropout=0.0, scaling=None, **kwargs):
    """The same, with keys and values repeated for every query head, for a kernel that wants as many of each."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scaling, is_causal=query.shape[2] > 1
    )
    return output.transpose(1, 2).contiguous(), None


def document_attention(module, query, key, value, attention_mask=None, *, document_mask=None, **kwargs):
    """Attend to what ``document_mask`` leaves, which the batch brings along."""
    if document_mask is None:
        raise InputError("the model does not hand document_mask on to its attention: --attn_implementation sdpa.")
    return flex_attention_forward(module, query, key, value, document_mask, **kwargs)


@torch.compile(dynamic=False)
def block_mask(positions: torch.Tensor) -> BlockMask:
    """Return the mask of causal attention within documents, which begin where ``positions`` (rows, tokens) are 0."""
    documents = (positions == 0).cumsum(1)

    def seen(row, head, query, key):
        return (query >= key) & (documents[row, query] == documents[row, key])

    rows, tokens = positions.shape
    return create_block_mask(seen, rows, None, tokens, tokens, device=positions.device)


def repeats_heads(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether torch has a fused kernel for ``model`` only if keys and values are repeated for every query head.

    So it is before Ampere: its one kernel there, "efficient", knows no grouped heads, and the way out, "math", holds
    all scores of a layer.
    """
    return sdpa_kernel_name(model, device) == "math" != sdpa_kernel_name(model, device, grouped=False)


def sdpa_kernel_name(model: PreTrainedModel, device: torch.device, grouped: bool = True) -> str:
    """Return which of its kernels scaled_dot_product_attention takes for plain causal rows of ``model``.

    ``grouped``: with as many heads of keys and values as the model has, or one for every query head.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    key_heads = (getattr(config, "num_key_value_heads", None) or heads) if grouped else heads
    dtype = torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported(False) else torch.float16
    query, key = (
        torch.empty(1, n, 128, head_size(model), dtype=dtype, device=device, requires_grad=True)
        for n in (heads, key_heads)
    )
    choice = torch._fused_sdp_choice(query, key, key, None, 0.0, True, enable_gqa=key_heads != heads)
    return SDPBackend(choice).name.split("_")[0].lower()
