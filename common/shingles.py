"""Texts -> hashes of their shingles, 5 units in a row, by which near-duplicates are recognised."""

import unicodedata
from functools import cache

import numpy as np

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
