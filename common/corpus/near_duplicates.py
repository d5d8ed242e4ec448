"""Drop near-duplicates: documents that share most of their text with an earlier one.

The method is the usual one (MinHash and locality-sensitive hashing). A document is the set of its shingles, and a
shingle is 5 words or characters in a row. A short signature of this set estimates the Jaccard similarity of two
documents. Only documents whose signatures agree on a whole band of numbers are compared.

Others chose: GPT-3 10 hashes (https://arxiv.org/abs/2005.14165, appendix A); The Pile 10 hashes
at 0.5 (https://arxiv.org/abs/2101.00027, appendix D.2); Lee et al. 5-grams, 9,000 hashes at 0.8
(https://arxiv.org/abs/2107.06499, appendix A); FineWeb 5-grams of words, 14 bands of 8 hashes, about 0.75
(https://arxiv.org/abs/2406.17557).

The signatures are made by datasketch, the index is our own. datasketch's ``MinHashLSH`` keeps a Python set for each
band of each document: it took 7.1 kB and 116 microseconds a document, ours 2.3 kB and 39 (18 bands, measured).
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
# The probability that a pair exactly at the threshold is compared at all. It is higher for a pair above the threshold.
CATCH_PROBABILITY = 0.95
GROUP_CHARACTERS = 1 << 18  # documents are hashed in groups of this size, each by one thread
PIECE_CHARACTERS = 1 << 20  # a longer document is cut into pieces; the 4 shingles across a cut are left out
PIECE_SHINGLES = 1024  # times PERMUTATIONS times 4 bytes is 512 KiB, which stays in a core's cache


@dataclass
class NearDuplicateCounts:
    """The counts of ``without_near_duplicates``, and its settings. ``removed_bytes`` is the size in UTF-8."""

    documents: int = 0
    removed: int = 0
    removed_bytes: int = 0
    threshold: float = 0.0
    permutations: int = 0
    bands: int = 0


def without_near_duplicates(
    documents: Iterable[str], threshold: float, report: Path, counts: NearDuplicateCounts | None = None
) -> Iterator[str]:
    """Yield ``documents`` in order, and drop each one whose similarity to an earlier yielded one reaches ``threshold``.

    A document without letters and digits is never a near-duplicate. Each yielded document takes 2.3 kB of memory at a
    threshold of 0.8 (1.5 kB at 0.9, 4.3 kB at 0.5; measured), so a million take 2.3 GB. For corpora that need more
    memory than the machine has, datatrove's MinHash works on disk and on many machines.

    Args:
        threshold: the estimated Jaccard similarity of the sets of shingles, from 0.5 to 1; 0.8 is usual.
        report: this file gets one JSON line for each dropped document, as it is dropped: its ``index`` and the
            ``kept_index`` of the most similar earlier one (positions in ``documents``, from 0), their ``similarity``,
            its size in UTF-8 ``bytes``, and its ``beginning``.
        counts: updated as documents are yielded.

    Raises:
        InputError: the threshold is out of range, or datasketch is not installed.
    """
    if not 0.5 <= threshold <= 1:
        raise InputError(f"near-duplicate threshold {threshold}: must lie between 0.5 and 1; 0.8 is usual.")
    if counts is None:
        counts = NearDuplicateCounts()
    signatures_of = _signatures_function()
    index = _SimilarityIndex(*bands_and_rows(threshold))
    counts.threshold = threshold
    counts.permutations = PERMUTATIONS
    counts.bands = index.bands
    return _without_near_duplicates(documents, threshold, Path(report), counts, signatures_of, index)


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """Return into how many bands a signature is cut, and how many numbers (rows) a band has.

    A pair of similarity t agrees on a band of r numbers with probability t^r, and on at least one of b bands with
    probability 1 - (1 - t^r)^b. r is the largest for which a pair at ``threshold`` reaches CATCH_PROBABILITY.

    Source: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4.2, http://www.mmds.org/
    """
    for rows in range(PERMUTATIONS // 2, 0, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= CATCH_PROBABILITY:
            return bands, rows
    raise ValueError(f"no bands for a threshold of {threshold}")


def _without_near_duplicates(documents, threshold, report, counts, signatures_of, index) -> Iterator[str]:
    """Hash the documents on all cores, and compare them one after the other."""
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
                entry = {
                    "index": position,
                    "kept_index": kept,
                    "similarity": round(similarity, 4),
                    "bytes": text_bytes,
                    "beginning": text[:80],
                }
                lines.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _groups(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yield lists of documents that have at least GROUP_CHARACTERS together; the last list may have fewer."""
    group = []
    characters = 0
    for text in documents:
        group.append(text)
        characters += len(text)
        if characters >= GROUP_CHARACTERS:
            yield group
            group = []
            characters = 0
    if group:
        yield group


class _SimilarityIndex:
    """The signatures of documents, which are found by any band that two of them share."""

    def __init__(self, bands: int, rows: int):
        self.bands = bands
        self.rows = rows
        self.signatures: dict[int, bytes] = {}  # position of a document -> its signature
        # Two dicts, because most bands occur in one document, and a list for each would take much more memory.
        self.first: dict[int, int] = {}  # hash of a band -> the first document that has it
        self.further: dict[int, list[int]] = defaultdict(list)  # hash of a band -> the documents after the first

    def most_similar(self, signature: np.ndarray | None) -> tuple[int | None, float]:
        """Return the most similar document and its similarity, or (None, 0.0) if no document shares a band.

        Of several equally similar documents, it is the earliest.
        """
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
    """Return a function from texts to their signatures, uint32 of shape (PERMUTATIONS,), or None without shingles."""
    try:
        from datasketch import MinHash
    except ImportError:
        raise InputError(
            "finding near-duplicates needs datasketch, which is not installed: pip install 'datasketch>=2,<3'"
        ) from None
    empty = MinHash(num_perm=PERMUTATIONS, hashfunc=lambda hashes: hashes)  # shingles are already hashes

    def signatures_of(texts: list[str]) -> list[np.ndarray | None]:
        signatures = [empty.copy() for _ in texts]
        for start in range(0, max(map(len, texts)), PIECE_CHARACTERS):
            pieces = [text[start : start + PIECE_CHARACTERS] for text in texts]
            for signature, hashes in zip(signatures, shingle_hashes(pieces), strict=True):
                for first in range(0, len(hashes), PIECE_SHINGLES):
                    signature.update_batch([hashes[first : first + PIECE_SHINGLES]])  # one array of hashes
        return [None if signature.is_empty() else signature.hashvalues for signature in signatures]

    return signatures_of


UNITS_PER_SHINGLE = 5
# Code points of scripts that are written without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han.
WITHOUT_SPACES = [
    (0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
]  # fmt: skip
# The kinds of characters: between words, in a word, or a unit of its own.
BETWEEN = 0
IN_WORD = 1
ALONE = 2


def shingle_hashes(texts: list[str]) -> list[np.ndarray]:
    """Return 32-bit hashes of the shingles of each text: uint32, shape (shingles,), with repetitions.

    A shingle is UNITS_PER_SHINGLE units in a row, or all units of a text that has fewer. A unit is a word in lower
    case. In scripts without spaces, where a whole clause would be one word, each character is a unit. This is decided
    for each character, so a text may mix scripts. White space and punctuation are ignored.
    """
    units, units_of = _unit_hashes(texts)
    padded = np.pad(units, (0, UNITS_PER_SHINGLE - 1))  # (all units + 4,)
    windows = _polynomial([padded[offset : offset + len(units)] for offset in range(UNITS_PER_SHINGLE)])
    hashes = []
    first = 0
    for count in units_of.tolist():
        if count >= UNITS_PER_SHINGLE:
            hashes.append(windows[first : first + count - UNITS_PER_SHINGLE + 1])
        else:  # a window would reach into the next text
            hashes.append(_polynomial([units[first + i : first + i + 1] for i in range(count)]))
        first += count
    return hashes


def _unit_hashes(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash of every unit of all texts, (units,) uint64, and the number of units of each text, (texts,).

    All texts are hashed together, because on a single short text NumPy's calls would take longer than its work.
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
    # The hash of a word is the sum of the hashes of its (position, character) pairs.
    pairs = codes[counted] | position_in_unit.astype(np.uint64) << np.uint64(32)
    return np.add.reduceat(_mixed(pairs), starts), units_of


@cache
def _character_kinds() -> np.ndarray:
    """Return BETWEEN, IN_WORD or ALONE for every code point, uint8. Words consist of letters, marks and digits."""
    kinds = [unicodedata.category(chr(code))[0] in "LMN" for code in range(0x110000)]
    kinds = np.array(kinds, dtype=np.uint8) * np.uint8(IN_WORD)
    for first, last in WITHOUT_SPACES:
        kinds[first : last + 1][kinds[first : last + 1] == IN_WORD] = ALONE
    return kinds


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Turn uint64 numbers into hashes, in place; return them. Source: https://prng.di.unimi.it/splitmix64.c"""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers ^= numbers >> np.uint64(shift)
        numbers *= np.uint64(factor)
    numbers ^= numbers >> np.uint64(31)
    return numbers


def _polynomial(hashes: list[np.ndarray]) -> np.ndarray:
    """Combine arrays of uint64 hashes element by element into one uint32 array; their order matters."""
    combined = np.zeros_like(hashes[0]) if hashes else np.zeros(0, dtype=np.uint64)
    for one in hashes:
        combined *= np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio; any large odd number will do
        combined += one
    return (combined >> np.uint64(32)).astype(np.uint32)  # the upper half depends on every bit
