"""Which documents train, which are held out, and which repeat an earlier one: bool masks over documents."""

import hashlib
from dataclasses import dataclass

import numpy as np

from common.console import InputError


@dataclass
class Split:
    """One bool mask for each use of a document, each of shape (documents,); every document is in exactly one.

    ``test`` is empty unless the split is by order and has three shares.
    """

    train: np.ndarray
    held_out: np.ndarray
    test: np.ndarray
    duplicate: np.ndarray


def content_hash(content: bytes) -> int:
    """Return a uniform 64-bit hash. It decides which documents are held out and which are duplicates.

    The probability that any two different documents have the same hash is 3e-6 among 10 million documents, and 3% among
    a billion.
    """
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def held_out_below(fraction: float) -> int:
    """Return the limit of ``content_hash`` below which a document is held out, so that ``fraction`` of them are.

    The choice depends only on the text of a document. It stays the same when data is appended or another tokenizer is
    used, and two copies of a document are on the same side.

    Raises:
        InputError: ``fraction`` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise InputError(f"--held_out_fraction {fraction}: must lie between 0 and 1, for example 0.005.")
    return int(fraction * 2**64)


def split_by_hash(hashes: np.ndarray, fraction: float, keep_duplicates: bool = False) -> Split:
    """Hold out the documents whose hash is below ``held_out_below(fraction)``.

    At least one document is held out, and at least one is not. If there are so few documents that the rule holds out
    none, the one with the lowest hash is held out; if it holds out all, the one with the highest hash is not. If there
    is only one distinct document, it trains, and the caller holds out its tail.

    Args:
        hashes: uint64, shape (documents,), of all sources together, so that a text in two of them is a duplicate.
        keep_duplicates: do not mark any document as a duplicate.

    Raises:
        InputError: there is no document, or ``fraction`` is not between 0 and 1.
    """
    limit = np.uint64(held_out_below(fraction))
    if len(hashes) == 0:
        raise InputError("the corpus has no documents; give more.")
    held_out = hashes < limit
    if not held_out.any():
        held_out = hashes == hashes.min()
    if held_out.all():  # also if there is only one, which then trains
        held_out = hashes != hashes.max()
    duplicate = np.zeros_like(held_out) if keep_duplicates else repeated(hashes)
    return Split(~held_out & ~duplicate, held_out & ~duplicate, np.zeros_like(held_out), duplicate)


def splits_alone(hashes: np.ndarray, fraction: float) -> bool:
    """Whether ``split_by_hash`` splits these documents in the same way, whatever others are split with them.

    It does if the limit holds out some of them, and not all. Otherwise the lowest or highest hash of all decides.
    """
    held_out = hashes < np.uint64(held_out_below(fraction))
    return bool(held_out.any() and not held_out.all())


def split_in_order(documents: list[int], hashes: np.ndarray, shares: str, keep_duplicates: bool = False) -> Split:
    """Split each source by ``shares`` such as "949,50,1": training, held-out, and test documents, in this order.

    The ends of the shares are rounded as in Megatron and PaddleNLP, so that the splits are the same as theirs.
    Duplicates are taken out of their share, but do not move its ends. The copy that is kept may be in another share.

    Args:
        documents: the number of documents of each source.
        hashes: uint64, shape (all documents,), source after source.
        keep_duplicates: do not mark any document as a duplicate.

    Raises:
        InputError: ``shares`` are not two or three numbers, or one of the first two is 0.

    Source: ``get_train_valid_test_split_`` in
        https://github.com/PaddlePaddle/PaddleNLP/blob/develop/paddlenlp/data/causal_dataset.py
    """
    ends = [_ends_in_order(count, shares) for count in documents]
    # Each document's share: 0, 1 or 2. With ends at 3 and 5, seven documents: [0, 0, 0, 1, 1, 2, 2]
    shares_of_sources = [
        np.searchsorted(two_ends, np.arange(count), side="right")
        for two_ends, count in zip(ends, documents, strict=True)
    ]
    share = np.concatenate(shares_of_sources)  # (all documents,)
    duplicate = np.zeros(len(share), dtype=bool) if keep_duplicates else repeated(hashes)
    train, held_out, test = ((share == number) & ~duplicate for number in range(3))
    return Split(train, held_out, test, duplicate)


def training_documents(documents: int, shares: str) -> int:
    """Return how many documents of a source, from its first, train if it is split by ``shares`` in order."""
    return max(0, _ends_in_order(documents, shares)[0])


def _ends_in_order(documents: int, shares: str) -> tuple[int, int]:
    """Return where the training documents of a source end, and where its held-out documents end."""
    try:
        parts = [float(share) for share in shares.split(",")]
    except ValueError:
        parts = []
    if len(parts) not in (2, 3) or not all(0 <= part < np.inf for part in parts) or not parts[0] * parts[1]:
        raise InputError(f"--split {shares!r}: give two or three shares such as 949,50,1, with the first two above 0.")
    ends = [0]
    for part in [*parts, 0.0][:3]:
        ends.append(ends[-1] + int(round(part / sum(parts) * documents)))
    excess = ends[-1] - documents
    return ends[1] - excess, ends[2] - excess


def hashes_of_equals(hashes: np.ndarray, id_hashes: np.ndarray) -> np.ndarray:
    """Return ``hashes`` (uint64), in which all documents with the same ids have the lowest hash among them.

    So they are on the same side of a split, and all but the first are duplicates, whatever their texts look like: for
    example, the same article in two Unicode normalisations. ``id_hashes`` [5, 6, 5] and ``hashes`` [30, 20, 10] give
    [10, 20, 10].
    """
    if not repeated(id_hashes).any():
        return hashes
    order = np.argsort(id_hashes, kind="stable")
    firsts = np.flatnonzero(np.diff(id_hashes[order], prepend=id_hashes[order[:1]] + np.uint64(1)))
    lowest = np.minimum.reduceat(hashes[order], firsts)
    result = np.empty_like(hashes)
    result[order] = np.repeat(lowest, np.diff(firsts, append=len(order)))
    return result


def repeated(hashes: np.ndarray) -> np.ndarray:
    """Return a bool mask of the documents that have the hash of an earlier one, shape (documents,)."""
    mask = np.zeros(len(hashes), dtype=bool)
    ordered = np.sort(hashes)  # much faster than argsort, and enough for a corpus without duplicates
    if (ordered[1:] == ordered[:-1]).any():
        order = np.argsort(hashes, kind="stable")
        mask[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
    return mask


class SeenHashes:
    """A set of hashes that grows in batches and takes 8 bytes a hash (a Python set takes about 100).

    It consists of sorted arrays, each at least twice as long as the next, so that adding n hashes takes O(n log n).
    """

    def __init__(self):
        self.arrays: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add ``hashes`` (uint64); return a bool mask, of the same shape, of those that were not in the set before."""
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
