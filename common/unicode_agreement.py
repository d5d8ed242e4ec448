"""On which characters two regex engines, a normaliser and Python could disagree: each may follow another Unicode."""

import functools
import re
import unicodedata

import numpy as np
import tiktoken
from tokenizers import Regex, pre_tokenizers

CHARACTER_CLASS = re.compile(r"\\[pP]\{\w+\}|\\[sSd]")
CODE_POINTS = 0x110000
# Planes 0 and 1: looking at one plane more takes half a second at every start. Texts with rarer characters, such as the
# Chinese ones of plane 2, go to tokenizers.
EXAMINED_CODE_POINTS = 0x20000


def examined_characters() -> str:
    """Return every character below EXAMINED_CODE_POINTS; surrogates are none."""
    codes = np.arange(EXAMINED_CODE_POINTS, dtype="<u4")
    return codes[(codes < 0xD800) | (codes >= 0xE000)].tobytes().decode("utf-32-le")


@functools.lru_cache(maxsize=4)  # takes a second
def disputed_characters(pattern: str, normalized: bool) -> np.ndarray:
    """Return the code points on which the engines could disagree, as a boolean table of all.

    They are: all that were not examined; those in one engine's character class and not in the other's; those that
    ``(?i:`` could take for an ASCII letter of the pattern; and, where NFC matters, those that Python's unicodedata
    does not know yet (what it knows it knows for good: an assigned character's normalisation never changes,
    https://www.unicode.org/policies/stability_policy.html).
    """
    characters = examined_characters()
    disputed = set()
    for character_class in {found[:2].lower() + found[2:] for found in CHARACTER_CLASS.findall(pattern)}:
        outside = f"[^{character_class}]"
        disputed |= matches_in_oniguruma(outside, characters) ^ matches_in_fancy_regex(outside, characters)
    if "(?i:" in pattern:
        disputed |= {
            character for character in characters if not character.isascii() and character.casefold() in pattern
        }
    if normalized:
        disputed |= {character for character in characters if unicodedata.category(character) == "Cn"}
    table = np.ones(CODE_POINTS, dtype=bool)
    table[:EXAMINED_CODE_POINTS] = False
    table[[ord(character) for character in disputed]] = True
    table.flags.writeable = False
    return table


def matches_in_oniguruma(character_class: str, characters: str) -> set[str]:
    """Return those of ``characters`` that tokenizers' regex engine finds in ``character_class``."""
    splitter = pre_tokenizers.Split(Regex(character_class + "+"), behavior="removed", invert=True)
    return set("".join(piece for piece, _ in splitter.pre_tokenize_str(characters)))


def matches_in_fancy_regex(character_class: str, characters: str) -> set[str]:
    """Return those that tiktoken's regex engine finds: with the bytes as ranks, tiktoken gives back what matches."""
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    pattern = character_class + "{1,16}"
    encoding = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={})
    return set(encoding.encode_to_numpy(characters).astype(np.uint8).tobytes().decode())
