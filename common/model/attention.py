"""The attention that a model trains with; attention that keeps the documents of a row apart.

Rows with ``--packing isolated`` come with position ids that start again at 0 with every document. There are two ways to
keep the documents apart by them:

documents       flex attention with a block mask that is made once a batch. Blocks without a common document are
                skipped.
a full mask     transformers finds the borders in the position ids if it is given neither a cache nor an attention
                mask. This works for every kind of layer, also with sliding windows, but is slower.

With ``--packing cross``, the documents of a row see each other, and no mask is needed. transformers looks for borders
all the same. To do so it waits for the GPU in every forward pass, and the GPU then has nothing to do. ``causal`` is
transformers' own sdpa under another name, for which transformers makes no mask (what this gains: benchmarks/README.md).
It does not understand padding: see ``generating``.
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
from common.distributed.accelerator import computes_in_bf16, torch_random_states_kept
from common.distributed.launch import Launch
from common.distributed.ulysses import check_heads, group_of_rows, heads_of_rows, pieces_of_heads
from common.late_compile import compiled_late
from common.model.counts import head_size

# Our own attention implementations, registered with transformers beside its own.
CAUSAL = "causal"
DOCUMENTS = "documents"
ULYSSES_CAUSAL, ULYSSES_DOCUMENTS = ULYSSES = "ulysses_causal", "ulysses_documents"  # rows divided among processes
OWN = (CAUSAL, DOCUMENTS, *ULYSSES)

# Tiles of flex attention's kernels, by compute capability and head size. torch's autotuning chose them on an H100 in
# 48 s; only one number of stages is ours. torch's default tiles are a quarter slower at 512 tokens a row
# (benchmarks/README.md).
TILES = {
    ((9, 0), 64): dict(
        fwd_BLOCK_M=128, fwd_BLOCK_N=64, fwd_num_warps=4, fwd_num_stages=3,
        bwd_BLOCK_M1=64, bwd_BLOCK_N1=64, bwd_BLOCK_M2=64, bwd_BLOCK_N2=64, bwd_num_warps=4, bwd_num_stages=3,
    ),
}  # fmt: skip


def check_targets_hidden(model: PreTrainedModel, isolated: bool) -> None:
    """Raise InputError if ``model`` sees the tokens that it is to predict, or other documents of ``isolated`` rows.

    Changes the last token of a row: no logit before it, and none of another row, may move. Then changes the first
    document of two rows: no logit of the second may move. Encoders such as BERT fail the first check, architectures
    that do not read position ids, such as Bloom, the second. They would train without any message. The check takes four
    forward passes of 24 tokens; the model's mode and the random states stay as they are.
    """
    length, border = 12, 7
    name, config = type(model).__name__, model.config.get_text_config()
    # Two rows, because transformers has code for batches of one row only.
    ids = torch.arange(1, 2 * length + 1, device=model.device).view(2, length) % config.vocab_size
    changed = torch.zeros_like(ids, dtype=torch.bool)
    changed[0, -1] = True
    if logits_moved(model, ids, changed):
        decoder = ' Write "is_decoder": true in its config.' if getattr(config, "is_decoder", None) is False else ""
        raise InputError(
            f"{name}: its logits change with tokens after them, so it would see the tokens that it is to predict. "
            f"Take a causal language model.{decoder}"
        )
    if not isolated:
        return
    changed = torch.arange(length, device=model.device).expand(2, length) < border
    positions = document_positions(np.arange(length) == border)
    positions = torch.from_numpy(positions).to(model.device).expand(2, length)
    try:
        apart = not logits_moved(model, ids, changed, position_ids=positions)
    except TypeError:  # the model's forward has no argument position_ids
        apart = False
    if not apart:
        raise InputError(
            f"--packing isolated: {name} lets documents of a row see each other (it does not read "
            "their borders from position ids). Use --packing cross."
        )


@torch.no_grad()
def logits_moved(model: PreTrainedModel, ids: torch.Tensor, changed: torch.Tensor, **inputs: torch.Tensor) -> bool:
    """Whether other logits than those of the ``changed`` tokens move when these get other ids: bool, (rows, tokens).

    Raises:
        InputError: the model cannot compute logits of these rows.
    """
    vocabulary = model.config.get_text_config().vocab_size
    others = torch.where(changed, (ids + ids.numel()) % vocabulary, ids)
    was_training = model.training
    model.eval()
    try:
        with torch_random_states_kept(model.device):
            one, other = (model(input_ids=row, use_cache=False, **inputs).logits.float() for row in (ids, others))
    except (RuntimeError, ValueError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{type(model).__name__} cannot compute a row; do its sizes fit? ({reason})") from None
    finally:
        model.train(was_training)
    moved = (one - other).abs().amax(-1)  # (rows, tokens)
    # Encoders with random weights moved other logits by 0.0015 of what the changed ones moved, or more; causal models
    # by nothing, or 2e-7 where experts get other batches. Half precision rounds more.
    share = 5e-4 if model.dtype == torch.float32 else 1e-2
    return moved[~changed].max().item() > share * moved[changed].max().item()


def set_attention(
    model: PreTrainedModel,
    wanted: str,
    isolated: bool,
    device: torch.device,
    context_parallel: bool = False,
    launch: Launch | None = None,
) -> None:
    """Decide which attention implementation ``model`` trains with, set it, and print which kernel that is.

    ``wanted`` "auto" takes the fastest one that is right:

        isolated rows   documents, where flex attention works; else what transformers chose, with a full mask
        other rows      causal, where every layer sees the whole row and the model's class allows it; else what
                        transformers chose

    Args:
        wanted: --attn_implementation: "auto", or a name of transformers.
        isolated: rows are those of --packing isolated.
        context_parallel: several processes share the tokens of a row, as ``launch`` says, too.
        launch: it says whether processes share the tokens of a row, and how; None: they do not.

    Raises:
        InputError: the model or this machine does not support ``wanted``, or the model sees its targets or, of
            isolated rows, other documents.
    """
    if wanted in OWN:
        raise InputError(f"--attn_implementation {wanted}: used automatically where it fits. Leave the flag out.")
    check_targets_hidden(model, isolated)
    if isolated and "flash" in wanted:
        raise InputError(
            f"--attn_implementation {wanted} with --packing isolated: transformers reads the borders of documents "
            "in batches of one row only, and would mix them up here. Leave the flag out."
        )
    if launch is not None and launch.sequence_parallel > 1:
        return set_ulysses(model, wanted, isolated, device, launch)
    context_parallel = context_parallel or (launch is not None and launch.context_parallel > 1)
    no_documents = why_not_documents(model, device)
    if wanted == "auto":
        wanted = fastest_attention(model, isolated, no_documents)
    whole_rows = sees_whole_rows(model)
    if context_parallel and (wanted not in (CAUSAL, "sdpa") or not whole_rows):
        raise InputError(
            f"context parallelism is for causal attention by torch's sdpa over whole rows; here {type(model).__name__} "
            f"has {wanted} attention{'' if whole_rows else ' with windows'}. Use fsdp2.yaml."
        )
    repeats = wanted == CAUSAL and repeats_heads(model, device)
    register_attention(model, wanted, repeats, device)
    try:
        model.set_attn_implementation(wanted)
    except (ValueError, ImportError) as error:
        raise InputError(f"--attn_implementation {wanted}: {error} Leave the flag out for the best one.") from None
    if model.config._attn_implementation != wanted:
        raise InputError(f"--attn_implementation {wanted}: {type(model).__name__} has no choice. Leave the flag out.")
    full_mask_because = no_documents if isolated else None
    say(f"attention: {attention_in_words(model, wanted, repeats, full_mask_because, device)}")


def attention_in_words(
    model: PreTrainedModel, name: str, repeats: bool, full_mask_because: str | None, device: torch.device
) -> str:
    """Return what attention ``name`` is, and which kernel computes it.

    Args:
        repeats: causal attention repeats keys and values for every query head.
        full_mask_because: why isolated rows have no flex attention; None if they have it, or rows are not isolated.
    """
    if name == CAUSAL:
        repeated = ", with keys and values repeated for every query head" if repeats else ""
        return f"causal, by torch's {sdpa_kernel_name(model, device, grouped=not repeats)} kernel{repeated}"
    if name == DOCUMENTS:
        return "causal within documents, by flex attention"
    if full_mask_because:
        return f"{name} with a full mask, exact but slow; no flex attention, because {full_mask_because}"
    return name


def set_ulysses(model: PreTrainedModel, wanted: str, isolated: bool, device: torch.device, launch: Launch) -> None:
    """Have ``model`` compute attention over whole rows, for a share of the heads, while it trains: ulysses.py.

    Raises:
        InputError: the heads cannot be divided, or the attention is not torch's over whole rows.
    """
    name = type(model).__name__
    default = model.config._attn_implementation if wanted == "auto" else wanted
    if default != "sdpa" or not sees_whole_rows(model) or not can_change_attention(model):
        raise InputError(
            f"parallelism_config_sp_size {launch.sequence_parallel}: for attention by torch's sdpa over whole rows, "
            f"that transformers can exchange; here {name} has {default} attention. Use fsdp2.yaml."
        )
    check_heads(model, launch)
    if isolated and device.type == "cuda":
        reason = why_not_documents(model, device)
        if reason is not None:
            raise InputError(f"--packing isolated with parallelism_config_sp_size: {reason}. Use --packing cross.")
    group = group_of_rows(launch)
    kind = ULYSSES_DOCUMENTS if isolated else ULYSSES_CAUSAL
    if not isolated:
        inner = causal_attention
    elif device.type == "cuda":
        inner = partial(document_attention, kernel_options=tiles_of(model, device))
    else:
        inner = masked_attention
    # Compiled layers leave out the exchange; flex attention is compiled by itself.
    AttentionInterface.register(kind, torch.compiler.disable(partial(ulysses_attention, inner, group)))
    model.set_attn_implementation(kind)
    within = " within documents" if isolated else ""
    say(f"attention: causal{within}, of {launch.sequence_parallel} processes each for its share of the heads (Ulysses)")


def fastest_attention(model: PreTrainedModel, isolated: bool, no_documents: str | None) -> str:
    """Return the name of the attention that --attn_implementation auto stands for: see ``set_attention``.

    Args:
        no_documents: the reason why ``model`` cannot train with flex attention, or None.
    """
    default = model.config._attn_implementation
    if isolated:
        return default if no_documents else DOCUMENTS
    return CAUSAL if default == "sdpa" and can_change_attention(model) and sees_whole_rows(model) else default


def register_attention(model: PreTrainedModel, wanted: str, repeats: bool, device: torch.device) -> None:
    """Make our own attention known to transformers, as ``model`` needs it on ``device``.

    Args:
        repeats: causal attention repeats keys and values for every query head.
    """
    AttentionInterface.register(CAUSAL, repeating_attention if repeats else causal_attention)
    documents = document_attention
    if wanted == DOCUMENTS:
        documents = partial(document_attention, kernel_options=tiles_of(model, device))
    AttentionInterface.register(DOCUMENTS, documents)


def tiles_of(model: PreTrainedModel, device: torch.device) -> dict | None:
    """Return the tiles of flex attention's kernels for this card; None: torch's default."""
    return TILES.get((torch.cuda.get_device_capability(device), head_size(model)))


def can_change_attention(model: PreTrainedModel) -> bool:
    """Whether transformers can change the attention of ``model``. Older classes (Falcon) have their own."""
    return model._can_set_attn_implementation()


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Give ``model`` an attention that understands caches and padding, and that is not compiled for each new length."""
    trained_with = model.config._attn_implementation
    if trained_with in OWN:
        model.set_attn_implementation("sdpa")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.set_attn_implementation(trained_with)


def why_not_documents(model: PreTrainedModel, device: torch.device) -> str | None:
    """Return the reason why ``model`` cannot train with flex attention on ``device``; None if it can."""
    if device.type != "cuda":
        return "it trains on CUDA devices only"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not model._supports_flex_attn or not sees_whole_rows(model):
        return f"{type(model).__name__} does not support it here"
    return None


def sees_whole_rows(model: PreTrainedModel) -> bool:
    """Whether the attention of every layer reaches back to the beginning of a row: no sliding windows, no chunks."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None and getattr(config, "attention_chunk_size", None) is None


def causal_attention(module, query, key, value, attention_mask=None, **kwargs):
    """Let each token attend to all tokens before it, in rows without padding, by transformers' sdpa.

    ``query``, ``key`` and ``value`` have the shape (rows, heads, tokens, head size).
    """
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


def repeating_attention(module, query, key, value, attention_mask=None, *, dropout=0.0, scaling=None, **kwargs):
    """Do the same with keys and values repeated for every query head, for kernels without grouped heads."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scaling, is_causal=query.shape[2] > 1
    )
    return output.transpose(1, 2).contiguous(), None


def document_attention(module, query, key, value, attention_mask=None, *, document_mask=None, **kwargs):
    """Let each token attend to those that ``document_mask`` of the batch leaves, by flex attention."""
    if document_mask is None:
        raise InputError("the model does not pass document_mask on to its attention: --attn_implementation sdpa.")
    return flex_attention_forward(module, query, key, value, document_mask, **kwargs)


def masked_attention(module, query, key, value, attention_mask=None, *, document_mask=None, **kwargs):
    """Do the same by transformers' sdpa and a mask of all pairs of tokens, where flex attention does not train."""
    if document_mask is None:
        raise InputError("the model does not pass document_mask on to its attention: --packing cross.")
    return sdpa_attention_forward(module, query, key, value, document_mask, **kwargs)


def ulysses_attention(inner, group, module, query, key, value, attention_mask=None, **kwargs):
    """Attend by ``inner`` over whole rows, for this process's share of the heads.

    Evaluation and samples do not divide rows: every process of a group sees whole ones there.
    """
    kwargs.pop("is_causal", None)  # of accelerate's hook for context parallelism
    if not module.training:
        return inner(module, query, key, value, **kwargs)
    query, key, value = (heads_of_rows(part, group) for part in (query, key, value))
    output, weights = inner(module, query, key, value, **kwargs)
    return pieces_of_heads(output, group), weights


def full_mask(positions: torch.Tensor) -> torch.Tensor:
    """Return which tokens each token sees, causally within documents: bool, (rows, 1, tokens, tokens).

    Args:
        positions: as of ``block_mask``.
    """
    documents = (positions == 0).cumsum(1)
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril().unsqueeze(1)


@compiled_late(dynamic=False)
def block_mask(positions: torch.Tensor) -> BlockMask:
    """Return the mask of causal attention within documents.

    Args:
        positions: (rows, tokens). A document begins where they are 0: [0, 1, 2, 0, 1] are two documents.
    """
    documents = (positions == 0).cumsum(1)

    def seen(row, head, query, key):
        return (query >= key) & (documents[row, query] == documents[row, key])

    rows, tokens = positions.shape
    return create_block_mask(seen, rows, None, tokens, tokens, device=positions.device)


def repeats_heads(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether torch has a fused kernel for ``model`` only if keys and values are repeated for every query head.

    This is so on GPUs older than Ampere. The only fused kernel there, "efficient", has no grouped heads; "math", which
    torch takes instead, holds all scores of a layer.
    """
    return sdpa_kernel_name(model, device) == "math" != sdpa_kernel_name(model, device, grouped=False)


def sdpa_kernel_name(model: PreTrainedModel, device: torch.device, grouped: bool = True) -> str:
    """Return the name of the kernel that scaled_dot_product_attention takes for causal rows of ``model``.

    Args:
        grouped: keys and values have as many heads as the model's config says; else, as many as the queries.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    key_heads = (getattr(config, "num_key_value_heads", None) or heads) if grouped else heads
    dtype = torch.bfloat16 if device.type == "cpu" or computes_in_bf16(device) else torch.float16
    query, key = (
        torch.empty(1, n, 128, head_size(model), dtype=dtype, device=device, requires_grad=True)
        for n in (heads, key_heads)
    )
    try:
        choice = torch._fused_sdp_choice(query, key, key, None, 0.0, True, enable_gqa=key_heads != heads)
    except NotImplementedError:  # on Apple's GPUs torch has no such question before pytorch #186528
        return "math"
    return SDPBackend(choice).name.split("_")[0].lower()
