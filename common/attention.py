"""Which attention kernel a model uses, and attention that stays within a document of rows that several share.

Rows whose documents are kept apart carry position ids that start again at 0 with every document. transformers reads
the borders off them, whenever no cache and no attention mask are given, for every kind of layer (sliding windows too),
and hands them to the kernel: to flex attention as a block mask, so that blocks without a common document cost nothing;
to torch's scaled_dot_product_attention as a full mask, which is slow next to plain causal attention, but right on any
device.
"""

import importlib.util

import numpy as np
import torch
from torch.nn.attention import SDPBackend
from transformers import PreTrainedModel

from common.messages import InputError, say


def document_positions(starts: np.ndarray) -> np.ndarray:
    """Return the place of every token in its document, from 0; the row's own beginning counts as a start.

    Args:
        starts: which tokens are the first of a document, bool, shape (tokens,).

    Returns:
        int64, shape (tokens,).
    """
    places = np.arange(len(starts))
    return places - np.maximum.accumulate(np.where(starts, places, 0))


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


def choose_attention(model: PreTrainedModel, wanted: str, isolated: bool, device: torch.device) -> None:
    """Set the attention of ``model`` to ``wanted`` and say which kernel that is.

    ``auto``: flex attention for ``isolated`` rows where it runs, else what transformers chose, which is torch's
    scaled_dot_product_attention wherever the model supports it.

    Raises:
        InputError: the model or this machine does not support ``wanted``.
    """
    reason = why_no_flex_attention(model, device)
    if wanted == "auto":
        wanted = "flex_attention" if isolated and reason is None else model.config._attn_implementation
    elif wanted == "flex_attention" and reason is not None:
        raise InputError(f"--attn_implementation flex_attention: {reason}. Leave the flag out.")
    try:
        model.set_attn_implementation(wanted)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"--attn_implementation {wanted}: {error} Leave the flag out to get the best there is."
        ) from None
    if model.config._attn_implementation != wanted:
        raise InputError(f"--attn_implementation {wanted}: {type(model).__name__} has no choice. Leave the flag out.")
    note = ""
    if wanted == "sdpa":
        note = f" ({sdpa_kernel_name(model, device)} kernel)"
        if isolated:
            note = f" with a full mask, exact but slow: no flex attention, because {reason}"
    say(f"attention: {wanted}{note}")


def why_no_flex_attention(model: PreTrainedModel, device: torch.device) -> str | None:
    """Return what keeps ``model`` from training with flex attention on ``device``, or None."""
    if device.type != "cuda":
        return "it trains on CUDA devices only"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not model._supports_flex_attn:
        return f"{type(model).__name__} does not support it"
    return None


def sdpa_kernel_name(model: PreTrainedModel, device: torch.device) -> str:
    """Return which of its kernels scaled_dot_product_attention takes for plain causal rows of ``model``."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    dtype = torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported(False) else torch.float16
    query = torch.empty(1, heads, 128, size, dtype=dtype, device=device, requires_grad=True)
    choice = torch._fused_sdp_choice(query, query, query, None, 0.0, True)
    return SDPBackend(choice).name.lower().removesuffix("_attention")
