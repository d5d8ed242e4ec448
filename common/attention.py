"""Attention that stays within a document, for rows that several documents share.

Rows carry position ids that start again at 0 with every document. transformers reads the documents' borders off
them, whenever no cache and no attention mask are given, and builds an exact block-diagonal causal mask for every
kind of layer (sliding windows too): slow next to plain causal attention, but right on any device.
"""

import numpy as np
import torch
from transformers import PreTrainedModel

from common.messages import InputError


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
