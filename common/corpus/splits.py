"""Which documents train, which are held out, which repeat an earlier one: bool masks over the documents of stores."""

import hashlib
from dataclasses import dataclass

import numpy as np

from common.console import InputError


@dataclass
class Split:
    """One mask for each use of a document, shape (documents,) each; every document is in exactly one.

    ``test`` is empty unless the split was asked for as three shares in order.
    """

    train: np.ndarray
    held_out: np.ndarray
    test: np.ndarray
    duplicate: np.ndarray


def content_hash(content: bytes) -> int:
    """Return a uniform 64-bit hash, by which documents are held out and duplicates found.

    Two different documents share a hash with a probability of 3e-6 among 10 million documents, 3% among a billion.
    """
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def held_out_below(fraction: float) -> int:
    """Return the limit of ``content_hash`` below which a document is held out, so that ``fraction`` of them are.

    The choice depends on a document's text alone: it survives appended data and another tokenizer, and two copies of
    a document are on the same side.
    """
    if not 0 < fraction < 1:
        raise InputError(f"--held_out_fraction {fraction}: must lie between 0 and 1, for example 0.005.")
    return int(fraction * 2**64)


def split_by_hash(hashes: np.ndarray, fraction: float, keep_duplicates: bool = False) -> Split:
    """Hold out the documents whose hash is below ``held_out_below(fraction)``.

    At least one document is held out, and at least one is not: where the rule says otherwise, on few documents,
    that with the lowest hash is, or that with the highest is not.

    Args:
        hashes: uint64, shape (documents,), of all sources together: a text that stands in two of them is one document.
    """
    limit = np.uint64(held_out_below(fraction))
    if len(hashes) == 0 or hashes.min() == hashes.max():
        raise InputError(f"the corpus has {min(len(hashes), 1)} distinct documents; give more: one is held out.")
    held_out = hashes < limit
    if not held_out.any():
        held_out = hashes == hashes.min()
    if held_out.all():
        held_out = hashes != hashes.max()
    duplicate = np.zeros_like(held_out) if keep_duplicates else repeated(hashes)
    return Split(~held_out & ~duplicate, held_out & ~duplicate, np.zeros_like(held_out), duplicate)


def split_in_order(documents: list[int], hashes: np.ndarray, shares: str, keep_duplicates: bool = False) -> Split:
    """Split each source by ``shares`` such as "949,50,1": the first documents train, the next are held out, the
    last are for a test after training.

    Where a share ends is rounded as Megatron and PaddleNLP do, so that their splits are had again; duplicates leave
    their share, but do not move its ends. A copy that is kept may lie on the other side.

    Args:
        documents: of each source, in the order of ``hashes``, shape (all documents,).

    Source: ``get_train_valid_test_split_`` in
        https://github.com/PaddlePaddle/PaddleNLP/blob/develop/paddlenlp/data/causal_dataset.py
    """
    ends = [_ends_in_order(count, shares) for count in documents]
    # 0, 1 or 2: the share a document falls into.
    which = [np.searchsorted(two, np.arange(count), side="right") for two, count in zip(ends, documents, strict=True)]
    which = np.concatenate(which)
    duplicate = np.zeros(len(which), dtype=bool) if keep_duplicates else repeated(hashes)
    return Split(*((which == part) & ~duplicate for part in range(3)), duplicate)


def training_documents(documents: int, shares: str) -> int:
    """Return how many documents of a source, the first ones, train where it is split by ``shares`` in order."""
    return max(0, _ends_in_order(documents, shares)[0])


def _ends_in_order(documents: int, shares: str) -> tuple[int, int]:
    """Return where the documents for training and the held-out ones of a source end."""
    try:
        parts = [float(share) for share in shares.split(",")]
    except ValueError:
        parts = []
    if len(parts) not in (2, 3) or not all(0 <= part < np.inf for part in parts) or not parts[0] * parts[1]:
        raise InputError(f"--split {shares!r}: give two or three shares such as 949,50,1; the first two above 0.")
    ends = [0]
    for part in [*parts, 0.0][:3]:
        ends.append(ends[-1] + int(round(part / sum(parts) * documents)))
    excess = ends[-1] - documents
    return ends[1] - excess, ends[2] - excess


def repeated(hashes: np.ndarray) -> np.ndarray:
    """Return a bool mask of the documents whose hash an earlier document has, shape (documents,)."""
    mask = np.zeros(len(hashes), dtype=bool)
    ordered = np.sort(hashes)  # much faster than argsort, and most corpora end here
    if (ordered[1:] == ordered[:-1]).any():
        order = np.argsort(hashes, kind="stable")
        mask[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
    return mask


class SeenHashes:
    """A set of hashes that grows by batches, at 8 bytes a hash (a Python set takes about 100).

    Sorted arrays, each at least twice as long as the next, so that adding n hashes takes O(n log n) in all.
    """

    def __init__(self):
        self.arrays: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add ``hashes`` (uint64) and return which of them were not there before: bool mask of the same shape."""
        new = ~repeated(hashes)
        for array in self.arrays:
            places = np.minimum(np.searchsorted(array, hashes), len(array) - 1)
            new &= array[places] != hashes
        latest = np.sort(hashes[new])
        while self.arrays and len(self.arrays[-1]) < 2 * len(latest):
            latest = np.sort(np.concatenate([self.arrays.pop(), latest]), kind="stable")
        if len(latest):
            self.arrays.append(latest)
        return new
