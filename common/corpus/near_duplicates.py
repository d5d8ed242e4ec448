"""Drop near-duplicates: documents that share most of their text with an earlier one.

The usual way (MinHash and locality-sensitive hashing): a document is the set of its shingles, 5 units in a row; a
short signature of that set estimates the Jaccard similarity of two documents; only documents whose signatures agree
on a whole band of numbers are compared.

What others chose, for comparison: GPT-3 10 hashes (https://arxiv.org/abs/2005.14165, appendix A); The Pile 10 hashes
at 0.5 (https://arxiv.org/abs/2101.00027, appendix D.2); Lee et al. 5-grams, 9,000 hashes at 0.8
(https://arxiv.org/abs/2107.06499, appendix A); FineWeb 5-grams of words, 14 bands of 8 hashes, about 0.75
(https://arxiv.org/abs/2406.17557).

The signatures are datasketch's, the index is not: its ``MinHashLSH`` keeps a Python set for each band of each
document, and took 7.1 kB and 116 microseconds a document where this one takes 2.3 kB and 39 (18 bands, measured).
"""

import json
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np

from common.console import InputError
from common.system import usable_cores

PERMUTATIONS = 128  # the standard error of a similarity of 0.8 is sqrt(0.8 * 0.2 / 128) = 0.035
CATCH_PROBABILITY = 0.95  # of a pair exactly at the threshold to be compared at all; pairs above it have a higher one
GROUP_CHARACTERS = 1 << 18  # of documents hashed together, by one thread
PIECE_CHARACTERS = 1 << 20  # of a longer document; the 4 shingles across two of its pieces are left out
PIECE_SHINGLES = 1024  # times PERMUTATIONS 4-byte numbers: stays in a core's cache


@dataclass
class NearDuplicateCounts:
    """What ``without_near_duplicates`` met, and its settings. ``removed_bytes`` are UTF-8."""

    documents: int = 0
    removed: int = 0
    removed_bytes: int = 0
    threshold: float = 0.0
    permutations: int = 0
    bands: int = 0


def without_near_duplicates(
    documents: Iterable[str], threshold: float, report: Path, counts: NearDuplicateCounts | None = None
) -> Iterator[str]:
    """Yield ``documents`` in order, less those whose similarity to an earlier yielded one reaches ``threshold``.

    A document without a letter or digit is never a near-duplicate. Memory grows by 2.3 kB with each document yielded
    at a threshold of 0.8 (1.5 kB at 0.9, 4.3 kB at 0.5; measured): 2.3 GB for a million. For more than memory takes,
    datatrove's MinHash works on disk and on many machines.

    Args:
        threshold: Jaccard similarity of the sets of shingles, as estimated, from 0.5 to 1. 0.8 is usual.
        report: gets one JSON line for each document dropped, as it is dropped: its ``index`` and the ``kept_index``
            of the most similar earlier one (positions in ``documents``, from 0), their ``similarity``, its UTF-8
            ``bytes`` and its ``beginning``.
        counts: filled in as documents are yielded, for who wants them.

    Raises:
        InputError: a threshold out of range, datasketch is not installed.
    """
    if not 0.5 <= threshold <= 1:
        raise InputError(f"near-duplicate threshold {threshold}: must lie between 0.5 and 1; 0.8 is usual.")
    counts = NearDuplicateCounts() if counts is None else counts
    signatures_of = _signatures_function()
    index = _SimilarityIndex(*bands_and_rows(threshold))
    counts.threshold, counts.permutations, counts.bands = threshold, PERMUTATIONS, index.bands
    return _without_near_duplicates(documents, threshold, Path(report), counts, signatures_of, index)


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """Return how many bands a signature is cut into, and the numbers in each.

    As many numbers as leave a pair of similarity ``threshold`` (t) its CATCH_PROBABILITY: it agrees on one band of
    r numbers with t^r, on at least one of b bands with 1 - (1 - t^r)^b.

    Source: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4.2, http://www.mmds.org/
    """
    for rows in range(PERMUTATIONS // 2, 0, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= CATCH_PROBABILITY:
            return bands, rows
    raise ValueError(f"no bands for a threshold of {threshold}")


def _without_near_duplicates(documents, threshold, report, counts, signatures_of, index) -> Iterator[str]:
    groups = _groups(documents)
    workers = usable_cores()
    report.parent.mkdir(parents=True, exist_ok=True)
    with report.open("w", encoding="utf-8", buffering=1) as lines, ThreadPoolExecutor(workers) as pool:
        while wave := list(islice(groups, 2 * workers)):
            signatures = chain.from_iterable(pool.map(signatures_of, wave))
            for text, signature in zip(chain.from_iterable(wave), signatures, strict=True):
                position = counts.documents
                counts.documents += 1
                kept, similarity = index.most_similar(signature)
                if similarity < threshold:
                    index.add(position, signature)
                    yield text
                    continue
                text_bytes = len(text.encode())
                counts.removed += 1
                counts.removed_bytes += text_bytes
                entry = {"index": position, "kept_index": kept, "similarity": round(similarity, 4)}
                entry |= {"bytes": text_bytes, "beginning": text[:80]}
                lines.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _groups(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yield lists of documents of GROUP_CHARACTERS or a little more in all."""
    group, characters = [], 0
    for text in documents:
        group.append(text)
        characters += len(text)
        if characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


class _SimilarityIndex:
    """The signatures of documents, found again by any band that they share."""

    def __init__(self, bands: int, rows: int):
        self.bands, self.rows = bands, rows
        self.signatures: dict[int, bytes] = {}  # position of a document -> its signature
        self.first: dict[int, int] = {}  # hash of a band -> the first document that has it
        self.further: dict[int, list[int]] = defaultdict(list)  # and those after it, which few bands have

    def most_similar(self, signature: np.ndarray | None) -> tuple[int | None, float]:
        """Return the document with the highest similarity, the earliest of several, among those sharing a band."""
        if signature is None:
            return None, 0.0
        candidates = set()
        for key in self._keys(signature):
            if key in self.first:
                candidates.add(self.first[key])
                candidates.update(self.further.get(key, ()))
        if not candidates:
            return None, 0.0
        candidates = sorted(candidates)
        others = np.frombuffer(b"".join(self.signatures[candidate] for candidate in candidates), dtype=np.uint32)
        similarities = (others.reshape(-1, PERMUTATIONS) == signature).mean(axis=1)  # (candidates,)
        best = int(similarities.argmax())
        return candidates[best], float(similarities[best])

    def add(self, position: int, signature: np.ndarray | None) -> None:
        if signature is None:
            return
        self.signatures[position] = signature.tobytes()
        for key in self._keys(signature):
            if self.first.setdefault(key, position) != position:
                self.further[key].append(position)

    def _keys(self, signature: np.ndarray) -> list[int]:
        bands = signature[: self.bands * self.rows].reshape(self.bands, self.rows)
        return [hash((number, band.tobytes())) for number, band in enumerate(bands)]


def _signatures_function() -> Callable[[list[str]], list[np.ndarray | None]]:
    """Return a function from texts to their signatures, (PERMUTATIONS,) uint32; None for one without a shingle."""
    try:
        from datasketch import MinHash
    except ImportError:
        raise InputError(
            "near-duplicates are found with datasketch, which is not installed: pip install 'datasketch>=2,<3'"
        ) from None
    empty = MinHash(num_perm=PERMUTATIONS, hashfunc=lambda hashes: hashes)  # they are hashed already

    def signatures_of(texts: list[str]) -> list[np.ndarray | None]:
        signatures = [empty.copy() for _ in texts]
        for start in range(0, max(map(len, texts)), PIECE_CHARACTERS):
            pieces = [text[start : start + PIECE_CHARACTERS] for text in texts]
            for signature, hashes in zip(signatures, shingle_hashes(pieces), strict=True):
                for first in range(0, len(hashes), PIECE_SHINGLES):
                    signature.update_batch([hashes[first : first + PIECE_SHINGLES]])  # one array is a list of hashes
        return [None if signature.is_empty() else signature.hashvalues for signature in signatures]

    return signatures_of


UNITS_PER_SHINGLE = 5
# Scripts written without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han.
WITHOUT_SPACES = [
    (0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
]  # fmt: skip
BETWEEN, IN_WORD, ALONE = 0, 1, 2  # what a character is


def shingle_hashes(texts: list[str]) -> list[np.ndarray]:
    """Return 32-bit hashes of the shingles of each text: uint32, shape (shingles,), with repetitions.

    A shingle is UNITS_PER_SHINGLE units in a row, or all there are. A unit is a word in lower case; in scripts
    written without spaces, where a clause would be one word, each character is one. This goes character by
    character, so that a text of two scripts needs no decision. White space and punctuation do not count.
    """
    units, units_of = _unit_hashes(texts)
    padded = np.pad(units, (0, UNITS_PER_SHINGLE - 1))
    windows = _polynomial([padded[offset : offset + len(units)] for offset in range(UNITS_PER_SHINGLE)])
    hashes, first = [], 0
    for count in units_of.tolist():
        if count >= UNITS_PER_SHINGLE:
            hashes.append(windows[first : first + count - UNITS_PER_SHINGLE + 1])
        else:  # a window would reach into the next text
            hashes.append(_polynomial([units[first + i : first + i + 1] for i in range(count)]))
        first += count
    return hashes


def _unit_hashes(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash of every unit of all texts, (units,) uint64, and how many are of each text, (texts,).

    All texts at once: on short ones NumPy's calls would take longer than its work.
    """
    texts = [text.lower() for text in texts]
    codes = np.frombuffer("\n".join(texts).encode("utf-32-le"), dtype="<u4")  # (characters,)
    kinds = _character_kinds()[codes]
    begins = kinds != BETWEEN
    begins[1:] &= (kinds[1:] == ALONE) | (kinds[:-1] != IN_WORD)
    text_ends = np.cumsum([len(text) + 1 for text in texts])
    units_of = np.bincount(np.searchsorted(text_ends, np.flatnonzero(begins), side="right"), minlength=len(texts))
    counted = np.flatnonzero(kinds != BETWEEN)
    starts = np.flatnonzero(begins[counted])  # (units,)
    if len(starts) == 0:
        return np.zeros(0, dtype=np.uint64), units_of
    position_in_unit = np.arange(len(counted)) - np.repeat(starts, np.diff(starts, append=len(counted)))
    # A word's hash is the sum of those of its (position, character) pairs.
    pairs = codes[counted] | position_in_unit.astype(np.uint64) << np.uint64(32)
    return np.add.reduceat(_mixed(pairs), starts), units_of


@cache
def _character_kinds() -> np.ndarray:
    """Return BETWEEN, IN_WORD or ALONE for every code point. Letters, marks and digits make words."""
    kinds = [unicodedata.category(chr(code))[0] in "LMN" for code in range(0x110000)]
    kinds = np.array(kinds, dtype=np.uint8) * np.uint8(IN_WORD)
    for first, last in WITHOUT_SPACES:
        kinds[first : last + 1][kinds[first : last + 1] == IN_WORD] = ALONE
    return kinds


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Turn uint64 numbers into hashes, in place. Source: https://prng.di.unimi.it/splitmix64.c"""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers ^= numbers >> np.uint64(shift)
        numbers *= np.uint64(factor)
    numbers ^= numbers >> np.uint64(31)
    return numbers


def _polynomial(hashes: list[np.ndarray]) -> np.ndarray:
    """Combine uint64 hashes in their order, element by element, into uint32."""
    combined = np.zeros_like(hashes[0]) if hashes else np.zeros(0, dtype=np.uint64)
    for one in hashes:
        combined *= np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: any large odd number will do
        combined += one
    return (combined >> np.uint64(32)).astype(np.uint32)  # the upper half depends on every bit
