"""Which documents are held out for evaluation: a rule on the hash of a document's text."""

import hashlib

import numpy as np

from common.messages import InputError


def content_hash(content: bytes) -> int:
    """Return a uniform 64-bit hash, by which documents are held out."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def held_out_below(fraction: float) -> int:
    """Return the limit of ``content_hash`` below which a document is held out, so that ``fraction`` of them are.

    The choice depends on a document's text alone: it survives appended data and another tokenizer, and two copies of
    a document are on the same side.
    """
    if not 0 < fraction < 1:
        raise InputError(f"--held_out_fraction {fraction}: must lie between 0 and 1, for example 0.005.")
    return int(fraction * 2**64)


def held_out_documents(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Choose the documents to hold out: those whose hash is below ``held_out_below(fraction)``.

    At least one document is held out, and at least one is not: where the rule says otherwise, on few documents,
    that with the lowest hash is, or that with the highest is not.

    Args:
        hashes: uint64, shape (documents,).

    Returns:
        bool mask, shape (documents,).
    """
    limit = np.uint64(held_out_below(fraction))
    if len(np.unique(hashes)) < 2:
        raise InputError(f"the corpus has {len(np.unique(hashes))} distinct documents; give more: one is held out.")
    chosen = hashes < limit
    if not chosen.any():
        chosen = hashes == hashes.min()
    if chosen.all():
        chosen = hashes != hashes.max()
    return chosen
