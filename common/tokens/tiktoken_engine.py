"""Byte-level BPE by tiktoken, with the merges and the pattern of a tokenizer.json: the same ids, faster.

The ids are the same for four reasons, each checked when the engine is built:

- Merges: tokenizers merges pairs in the order of its list of merges, tiktoken in the order of the merged tokens.
  ``byte_level_ranks`` says when both give the same tokens.
- Pattern: it uses only syntax that both regex engines, Oniguruma (tokenizers) and fancy-regex (tiktoken), read in the
  same way: COMMON_SYNTAX.
- Unicode: the regex engines, the normaliser and Python may follow different versions of Unicode. A text with one of
  the ``disputed_characters`` goes to tokenizers.
- Added tokens, such as ``<tool_call>``, are not merges. A text that contains one goes to tokenizers.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import tiktoken
from tokenizers import Regex, Tokenizer, pre_tokenizers

# The pattern of ByteLevel(use_regex=True). Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The engines differ on ``.``, ``$``, ``\w``, ``&&``, and on the meaning of ``+`` and ``?`` after ``{1,3}``.
COMMON_SYNTAX = re.compile(r"(?:\(\?(?:i:|:|!)|\\[rn]|\{\d+(?:,\d*)?\}(?![+?])|[()|?*+^\[\]' /A-Za-z0-9-])*")
CHARACTER_CLASS = re.compile(r"\\[pP]\{\w+\}|\\[sSd]")
# Longer texts are cut, because tokenizers needs 200 bytes of memory for a byte of text. The ids do not change.
SEGMENT_CHARACTERS = 2**18
GROUP_CHARACTERS = 2**10  # of short texts that are checked together
SEPARATOR = "\U0010ffff\U0010fffe"  # in no plain text, because its characters are not examined, and so disputed
# Text may be cut between a letter and one of these characters: the letter ends a piece there, and no pattern looks back
# across it. ``try_awkward_texts`` tries this at start on the pattern of each tokenizer.
SAFE_CUT = re.compile(r"[A-Za-z\u4e00-\u9fff](?=[ \n,.，。])")
CODE_POINTS = 0x110000
# Planes 0 and 1 of Unicode. One more plane would take half a second more at every start. Texts with characters beyond
# them, such as rare Chinese ones in plane 2, go to tokenizers.
EXAMINED_CODE_POINTS = 0x20000
NOTHING = r"(?!)"  # a pattern that never matches


class Unsupported(Exception):
    """tiktoken may not give this tokenizer's ids. The message says why, as the end of a sentence."""


@dataclass(frozen=True)
class Facts:
    """What takes seconds to find out about a tokenizer.

    Attributes:
        ranks: token -> rank, in the order of the ranks.
        id_of_rank: the id of each rank: uint32, (ranks,).
        disputed: code points on which the engines could disagree: bool, (CODE_POINTS,).
    """

    ranks: dict[bytes, int]
    id_of_rank: np.ndarray
    disputed: np.ndarray


@dataclass(frozen=True)
class TiktokenEngine:
    """Text -> ids for one tokenizer. Threads may share it: tiktoken releases the GIL."""

    encoding: tiktoken.Encoding
    id_of_rank: np.ndarray  # the id of each of tiktoken's ranks: uint32, (ranks,)
    rank_is_id: bool  # every rank equals its id, so that nothing has to be looked up
    disputed: np.ndarray  # code points on which the engines could disagree: bool, (CODE_POINTS,)
    added_tokens: re.Pattern
    may_cut: bool  # whether no added token spans a SAFE_CUT
    normalize: Callable[[str], str] | None  # tokenizers' NFC, if the tokenizer normalises
    reference: Callable[[str], np.ndarray]  # text -> ids by tokenizers

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each of ``texts``, 1-D uint32.

        All plain texts go through tiktoken in one call, with SEPARATOR between them. Threads that called it for every
        short text would wait for each other longer than they work.
        """
        plain = [text for group in groups(texts, GROUP_CHARACTERS) for text in self._plain_of(group)]
        try:
            ranks = self.encoding.encode_to_numpy(
                SEPARATOR.join(plain), allowed_special={SEPARATOR}, disallowed_special=()
            )
        except ValueError:  # see _encode_segment
            return [self.encode(text) for text in texts]
        ends = np.append(np.flatnonzero(ranks == len(self.id_of_rank)), len(ranks)).tolist()
        ids = ranks if self.rank_is_id else np.append(self.id_of_rank, np.uint32(0))[ranks]
        parts = iter([ids[begin:end] for begin, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)])
        taken = iter(plain)
        following = next(taken, None)
        result = []
        for text in texts:
            if text is following:
                result.append(next(parts))
                following = next(taken, None)
            else:
                result.append(self.encode(text))
        return result

    def _plain_of(self, group: list[str]) -> list[str]:
        """Return those texts of ``group`` that tiktoken may encode as they are."""
        joined = "\n".join(group)  # a line break composes with no character: if all together are plain, each is
        if len(joined) <= SEGMENT_CHARACTERS and self._is_plain(joined):
            return group
        return [text for text in group if len(text) <= SEGMENT_CHARACTERS and self._is_plain(text)]

    def encode(self, text: str, segment_characters: int = SEGMENT_CHARACTERS) -> np.ndarray:
        """Return the ids of ``text``, 1-D uint32. A text longer than ``segment_characters`` is encoded in pieces."""
        if len(text) <= segment_characters or not self.may_cut:
            return self._encode_segment(text)
        return np.concatenate([self._encode_segment(part) for part in segments(text, segment_characters)])

    def _encode_segment(self, text: str) -> np.ndarray:
        """Return the ids of ``text`` by tiktoken, or by tokenizers where tiktoken could differ."""
        if self._needs_reference(text):
            return self.reference(text)
        normal = text
        if self.normalize is not None and not unicodedata.is_normalized("NFC", text):
            normal = self.normalize(text)
            if self.added_tokens.search(normal):
                return self.reference(text)
        try:
            return self._ids(normal)
        except ValueError:  # fancy-regex runs out of memory on a million white space characters in a row
            return self.reference(text)

    def _is_plain(self, text: str) -> bool:
        """Whether tiktoken may encode ``text`` as it is."""
        if self._needs_reference(text):
            return False
        return self.normalize is None or unicodedata.is_normalized("NFC", text)

    def _needs_reference(self, text: str) -> bool:
        """Whether ``text`` has an added token or a disputed character, so that only tokenizers may encode it."""
        if self.added_tokens.search(text):
            return True
        return not text.isascii() and bool(self.disputed[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")].any())

    def _ids(self, text: str) -> np.ndarray:
        ranks = self.encoding.encode_to_numpy(text, disallowed_special=())
        return ranks if self.rank_is_id else self.id_of_rank[ranks]


def groups(texts: list[str], characters: int) -> Iterator[list[str]]:
    """Yield ``texts`` in order, in groups of at most ``characters``; a longer text is a group of its own."""
    group = []
    size = 0
    for text in texts:
        if group and size + len(text) > characters:
            yield group
            group = []
            size = 0
        group.append(text)
        size += len(text)
    if group:
        yield group


def segments(text: str, segment_characters: int) -> Iterator[str]:
    """Yield the pieces of ``text``, each cut at the first SAFE_CUT after ``segment_characters``, if there is one."""
    begin = 0
    cut = SAFE_CUT.search(text, segment_characters - 1)
    while cut is not None:
        yield text[begin : cut.end()]
        begin = cut.end()
        cut = SAFE_CUT.search(text, begin + segment_characters - 1)
    yield text[begin:]


def find_facts(content: dict, backend: Tokenizer) -> Facts:
    """Find out what the engine for the tokenizer.json ``content`` of ``backend`` is built from.

    Raises:
        Unsupported: its ids could differ from those of ``backend``.
    """
    if content["model"]["type"] != "BPE":
        raise Unsupported(f"its model is {content['model']['type']}, not byte-level BPE")
    if content["normalizer"] not in (None, {"type": "NFC"}):
        raise Unsupported(f"its normaliser is {content['normalizer']['type']}, not NFC or none")
    pattern = split_pattern(content["pre_tokenizer"])
    ranks, id_of_rank = byte_level_ranks(content["model"], backend)
    encoding_of(pattern, ranks)  # raises if it cannot be
    return Facts(ranks, id_of_rank, disputed_characters(pattern, content["normalizer"] is not None))


def encoding_of(pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """Build tiktoken's own object.

    Raises:
        Unsupported: tiktoken refuses the pattern, or would drop text that no match of it covers and tokenizers keeps.
    """
    try:
        special = {SEPARATOR: len(ranks)}
        encoding = tiktoken.Encoding("tokenizer.json", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        covered = encoding.decode_bytes(encoding.encode_ordinary(examined_characters()))
    except ValueError as error:
        raise Unsupported(f"tiktoken refuses it ({error})") from None
    if covered != examined_characters().encode():
        raise Unsupported("its pattern leaves some characters out")
    return encoding


def tiktoken_engine(
    content: dict, backend: Tokenizer, reference: Callable[[str], np.ndarray], facts: Facts | None = None
) -> TiktokenEngine:
    """Build the engine for the tokenizer.json ``content`` of ``backend``; ``facts``: if they are known already.

    Raises:
        Unsupported: its ids could differ from those of ``backend``.
    """
    if facts is None:
        facts = find_facts(content, backend)
    encoding = encoding_of(split_pattern(content["pre_tokenizer"]), facts.ranks)
    normalize = backend.normalizer.normalize_str if content["normalizer"] else None
    added = content["added_tokens"]
    # tokenizers looks for some added tokens in the text as it is, and for the normalised form of others in the
    # normalised text. Both forms are looked for here.
    names = {form for token in added for form in (token["content"], unicodedata.normalize("NFC", token["content"]))}
    alternatives = "|".join(map(re.escape, sorted(names)))
    take_neighbours = any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
    return TiktokenEngine(
        encoding=encoding,
        id_of_rank=facts.id_of_rank,
        rank_is_id=np.array_equal(facts.id_of_rank, np.arange(len(facts.id_of_rank))),
        disputed=facts.disputed,
        added_tokens=re.compile(alternatives if alternatives else NOTHING),
        may_cut=not take_neighbours and not any(re.search("[ \n,.，。]", name) for name in names),
        normalize=normalize,
        reference=reference,
    )


def split_pattern(pre_tokenizer: dict | None) -> str:
    """Return the regular expression whose matches are the pieces of ``pre_tokenizer``.

    Raises:
        Unsupported: there is none, or the two regex engines may read it differently.
    """
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    byte_level = steps[-1] if steps else None
    if byte_level is None or byte_level["type"] != "ByteLevel" or byte_level["add_prefix_space"]:
        raise Unsupported("its pre-tokenizer does not end in a plain ByteLevel")
    if len(steps) == 1 and byte_level["use_regex"]:
        return GPT2_PATTERN
    if len(steps) != 2 or byte_level["use_regex"] or steps[0]["type"] != "Split":
        raise Unsupported("its pre-tokenizer is not one regular expression and ByteLevel")
    split = steps[0]
    pattern = split["pattern"].get("Regex")
    # The two give the same pieces if the matches cover all text, which encoding_of checks.
    if pattern is None or (split["behavior"], split["invert"]) not in (("Isolated", False), ("Removed", True)):
        raise Unsupported("its pre-tokenizer splits in another way than into the matches of a regular expression")
    if not COMMON_SYNTAX.fullmatch(CHARACTER_CLASS.sub("", pattern)):
        raise Unsupported("its pattern uses syntax that the two regex engines may read differently")
    return pattern


def byte_level_ranks(model: dict, backend: Tokenizer) -> tuple[dict[bytes, int], np.ndarray]:
    """Return tiktoken's ranks (token -> rank) and the id of every rank, uint32, (ranks,).

    The ranks are the 256 bytes in order, then the merged tokens in the order of the merges. The libraries then give
    the same ids, for this reason: as long as a stretch of text is two tokens X and Y, both libraries have merged inside
    it exactly what they would merge if the stretch were alone. So they can differ only at a pair X, Y that is not a
    merge although the token XY has a rank. In that case tokenizers leaves the text XY, encoded alone, as two tokens.
    Therefore every token's text is encoded alone by the merges:

    - A text that comes out as one token is safe.
    - A text that does not is a token that the merges cannot reach. It gets no rank.
    - With ``ignore_merges``, tokenizers first looks up a whole piece in the vocabulary. Unreachable tokens then keep
      their rank, but none may come out as two tokens.

    Raises:
        Unsupported: not a byte-level BPE, or the argument above does not hold.
    """
    if model["dropout"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise Unsupported("its BPE uses dropout, a prefix or a suffix")
    vocabulary = model["vocab"]
    byte_of_character = byte_level_alphabet()
    if not vocabulary.keys() >= byte_of_character.keys():
        raise Unsupported("its vocabulary lacks some of the 256 bytes")
    order = dict.fromkeys(sorted(byte_of_character, key=byte_of_character.get))
    latest = None
    for left, right in model["merges"]:
        merged = left + right
        if merged in order and merged != latest:
            raise Unsupported(f"merges far apart make the same token, {merged!r}")
        order[merged] = None
        latest = merged

    alphabet = set(byte_of_character)
    others = [token for token in vocabulary if token not in order and alphabet.issuperset(token)]
    tokens = [*order, *others] if model["ignore_merges"] else [*order]
    token_counts = merged_token_counts(tokens, backend)
    if model["ignore_merges"] and (token_counts == 2).any():
        raise Unsupported("some of its tokens cannot be reached by its merges")
    kept = [token for token, count in zip(tokens, token_counts, strict=True) if count == 1 or model["ignore_merges"]]
    to_bytes = str.maketrans(byte_of_character)
    ranks = {token.translate(to_bytes).encode("latin-1"): rank for rank, token in enumerate(kept)}
    return ranks, np.array([vocabulary[token] for token in kept], dtype=np.uint32)


def merged_token_counts(tokens: list[str], backend: Tokenizer) -> np.ndarray:
    """Return into how many tokens the merges alone turn the text of each of ``tokens``: int, (tokens,)."""
    bare = Tokenizer(backend.model)  # shares the model
    ignores_merges = bare.model.ignore_merges
    bare.model.ignore_merges = False
    counts = np.array([len(encoding) for encoding in bare.encode_batch_fast(tokens, add_special_tokens=False)])
    bare.model.ignore_merges = ignores_merges
    return counts


def byte_level_alphabet() -> dict[str, int]:
    """Return the character that ByteLevel writes for each byte, as character -> byte.

    Source: bytes_to_unicode of https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def examined_characters() -> str:
    """Return every character below EXAMINED_CODE_POINTS, as one string. Surrogates are not characters."""
    codes = np.arange(EXAMINED_CODE_POINTS, dtype="<u4")
    return codes[(codes < 0xD800) | (codes >= 0xE000)].tobytes().decode("utf-32-le")


@functools.lru_cache(maxsize=4)  # takes a second
def disputed_characters(pattern: str, normalized: bool) -> np.ndarray:
    """Return for every code point whether the engines could disagree on it: bool, (CODE_POINTS,).

    That is the case for

    - code points that are not examined;
    - those that a character class of ``pattern`` contains in one regex engine and not in the other;
    - those that ``(?i:`` could take for an ASCII letter of the pattern, such as the long s, U+017F;
    - if the text is ``normalized``, those that Python's unicodedata does not know yet. The normalisation of a
      character that it knows never changes.

    Source: https://www.unicode.org/policies/stability_policy.html
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
    """Return those of ``characters`` that are in ``character_class`` for tokenizers' regex engine."""
    splitter = pre_tokenizers.Split(Regex(character_class + "+"), behavior="removed", invert=True)
    return set("".join(piece for piece, _ in splitter.pre_tokenize_str(characters)))


def matches_in_fancy_regex(character_class: str, characters: str) -> set[str]:
    """Return those of ``characters`` that are in ``character_class`` for tiktoken's regex engine.

    With the 256 single bytes as ranks, the ids of a text are the bytes of all its matches.
    """
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    pattern = character_class + "{1,16}"
    encoding = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={})
    return set(encoding.encode_to_numpy(characters).astype(np.uint8).tobytes().decode())
