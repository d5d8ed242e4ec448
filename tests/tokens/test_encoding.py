"""The encoder gives exactly the ids of the Rust tokenizer, whichever engine it uses."""

import dataclasses
import functools
import itertools
import json
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from common.console import InputError
from common.tokens.encoding import AWKWARD_TEXTS, encoder_of, try_awkward_texts
from common.tokens.tiktoken_engine import (
    COMMON_SYNTAX,
    GPT2_PATTERN,
    SAFE_CUT,
    TiktokenEngine,
    Unsupported,
    disputed_characters,
    segments,
    tiktoken_engine,
)

END = "<|endoftext|>"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"qwen2": QWEN2, "llama3": LLAMA3, "o200k": O200K, "gpt2": GPT2_PATTERN}


def documents(language: str) -> list[str]:
    lines = (ROOT / "data" / f"sample_{language}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior=behavior, invert=invert),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@functools.cache
def trained(kind: str) -> Tokenizer:
    """Train a byte-level BPE of 2,000 tokens on the Chinese sample and awkward texts; the end token is id 0."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC() if kind in ("qwen2", "gpt2") else None
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = gpt2 if kind == "gpt2" else split(PATTERNS[kind])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*documents("zh"), *documents("en")[:20], *AWKWARD_TEXTS * 3], trainer=trainer)
    return edited(backend, model={"ignore_merges": kind == "llama3"})


def edited(backend: Tokenizer, model: dict | None = None, **changes) -> Tokenizer:
    """Return a copy of ``backend`` with entries of its JSON, and of its model's, replaced."""
    content = json.loads(backend.to_str())
    return Tokenizer.from_str(json.dumps(content | changes | {"model": content["model"] | (model or {})}))


def wrapped(backend: Tokenizer, end_token: str = END) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end_token)


def without_special_tokens(backend: Tokenizer) -> Tokenizer:
    """Return the reference: a copy that treats special tokens as ordinary text."""
    backend = Tokenizer.from_str(backend.to_str())
    backend.encode_special_tokens = True
    return backend


def reference(backend: Tokenizer, *texts: str) -> list[list[int]]:
    """Return tokenizers' own ids, by another method than the one that the encoder calls."""
    strict = without_special_tokens(backend)
    return [strict.encode(text, add_special_tokens=False).ids for text in texts]


def assert_exact(backend: Tokenizer, texts: list[str], name: str = "tiktoken") -> None:
    encoder = encoder_of(wrapped(backend))
    assert encoder.name == name, encoder.note
    for ids, expected in zip(encoder.encode(texts), reference(backend, *texts), strict=True):
        assert ids.ndim == 1 and ids.dtype == np.uint32
        assert ids.tolist() == expected


@functools.cache
def encoder_and_reference(kind: str):
    return encoder_of(wrapped(trained(kind))), without_special_tokens(trained(kind))


def engine_of(backend: Tokenizer, reference_ids=lambda text: pytest.fail("went to tokenizers")) -> TiktokenEngine:
    return tiktoken_engine(json.loads(backend.to_str()), backend, reference_ids)


@pytest.mark.parametrize("kind", PATTERNS)
def test_documents_and_awkward_texts(kind):
    texts = [*documents("zh"), *documents("en"), *AWKWARD_TEXTS, "", " ", "\n", f"{END} in {END}text"]
    assert_exact(trained(kind), texts)


@pytest.mark.parametrize("kind", PATTERNS)
@settings(deadline=None, max_examples=300)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]))
    | st.text(st.sampled_from("aB'sLl 1²\n\r\t\u3000\u00a0中。.é\u0301\u0323\u0345ᄒ\u1161🙂ſK\u0958\U0001fae8\x00<|>"))
    | st.lists(st.sampled_from(["'ll", "'Re", END, "  ", "\n\n", "12", "a", "今天", "\u0301", "q", "-."])).map("".join)
)
def test_any_text(kind, text):
    encoder, strict = encoder_and_reference(kind)
    assert encoder.encode([text])[0].tolist() == strict.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", ["qwen2", *(pytest.param(kind, marks=pytest.mark.heavy) for kind in [*PATTERNS][1:])])
def test_every_code_point(kind):
    """Every undisputed code point, which never reaches tokenizers, between letters, digits, spaces and apostrophes."""
    normalized = trained(kind).normalizer is not None
    disputed = disputed_characters(PATTERNS[kind], normalized)
    agreed = [chr(code) for code in np.flatnonzero(~disputed) if not 0xD800 <= code < 0xE000]
    assert len(agreed) > (80_000 if normalized else 120_000)
    engine = engine_of(trained(kind))
    strict = encoder_and_reference(kind)[1]
    texts = ["".join(f"'{c}a{c} {c}1\n" for c in agreed[i : i + 2000]) for i in range(0, len(agreed), 2000)]
    for text, expected in zip(texts, strict.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        assert np.array_equal(engine.encode(text), expected.ids)


def test_python_never_calls_normalized_what_tokenizers_would_change():
    """For every undisputed character, alone and next to marks that reorder or compose with it."""
    agreed = [chr(code) for code in np.flatnonzero(~disputed_characters(QWEN2, True)) if not 0xD800 <= code < 0xE000]
    for form in ("{}", "e{}", "{}\u0301", "\u0345{}", "q\u0323{}\u0301", "ᄒ{}", "{}\u0338\u0323"):
        normal = [text for text in map(form.format, agreed) if unicodedata.is_normalized("NFC", text)]
        assert len(normal) > 80_000
        joined = "\n".join(normal)
        assert normalizers.NFC().normalize_str(joined) == joined


def test_the_disputed_characters():
    disputed = disputed_characters(QWEN2, normalized=True)
    assert disputed.shape == (0x110000,)
    assert disputed[ord("ſ")]  # (?i:s)
    assert disputed[0x0378] and disputed[0xE0067] and disputed[0x10FFFD]  # unassigned, tag, private use
    common = "".join(["abcXYZ019 .,'\r\n\t", *AWKWARD_TEXTS[3:5], *documents("zh"), "ßéЖ👍🏽€—\u00a0"])
    assert not disputed[[ord(character) for character in common]].any()
    assert not disputed_characters(GPT2_PATTERN, normalized=False)[:0x20000].any()


def test_texts_that_only_tokenizers_may_encode():
    """Every kind of text that goes to tokenizers, and similar texts that do not."""
    backend = Tokenizer.from_str(trained("qwen2").to_str())
    backend.add_tokens([AddedToken("caf\u00e9", normalized=True), AddedToken("<tool>", normalized=False)])
    seen = []
    engine = engine_of(backend, lambda text: seen.append(text) or np.array([7], dtype=np.uint32))
    engine = dataclasses.replace(engine, disputed=engine.disputed | (np.arange(0x110000) == ord("天")))
    theirs = [f"a{END}", "a<tool>b", "café", "cafe\u0301", "今天", "a\u0378", "\U0010fffd"]
    ours = ["a<|b|>", "<tool", "cafe", "今", "e\u0301 é", "\x00\ufffd", ""]
    assert [engine.encode(text).tolist() for text in theirs] == [[7]] * len(theirs)
    assert seen == theirs
    for text in ours:
        engine.encode(text)
    assert seen == theirs


def test_special_tokens_are_ordinary_text_and_other_added_tokens_are_not():
    backend = Tokenizer.from_str(trained("qwen2").to_str())
    backend.add_tokens(["<tool_call>"])
    tokenizer = wrapped(backend)
    before = tokenizer.backend_tokenizer.to_str()
    (ids,) = encoder_of(tokenizer).encode([f"a{END}b<tool_call>c"])
    assert tokenizer.eos_token_id == 0 and 0 not in ids
    assert backend.token_to_id("<tool_call>") in ids
    assert tokenizer.decode(ids) == f"a{END}b<tool_call>c"
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer(f"a{END}")["input_ids"][-1] == 0


@pytest.mark.parametrize("fast", [True, False])
def test_no_text_forges_an_end_token_that_was_added_as_ordinary(fast):
    """--end_token may name such a token, for example <|file_sep|> of Qwen2.5."""
    backend = Tokenizer.from_str(trained("qwen2").to_str())
    backend.add_tokens(["<|file_sep|>"])
    tokenizer = wrapped(backend if fast else edited(backend, normalizer={"type": "NFKC"}))
    tokenizer.eos_token = "<|file_sep|>"
    encoder = encoder_of(tokenizer)
    assert encoder.name == ("tiktoken" if fast else "tokenizers")
    assert tokenizer.eos_token_id not in encoder.encode(["a <|file_sep|> b"])[0]


def unigram() -> Tokenizer:
    pieces = [(piece, -3.0) for piece in ["<unk>", "</s>", "▁", "<", "/", "s", ">", "a", "b", "ab", "▁a"]]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    return backend


def word_level() -> Tokenizer:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<unk>", "</s>"])
    return backend


def word_piece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "</s>": 1, "a": 2, "##b": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[UNK]", "</s>"])
    return backend


@pytest.mark.parametrize("make", [unigram, word_level, word_piece])
def test_other_models_fall_to_tokenizers_and_cannot_forge_an_end_either(make):
    backend = make()
    encoder = encoder_of(wrapped(backend, "</s>"))
    assert (encoder.name, encoder.note.split(",")[0]) == (
        "tokenizers",
        f"not tiktoken: its model is {json.loads(backend.to_str())['model']['type']}",
    )
    texts = ["a ab b", "a", "", "sab a/<"]
    assert [ids.tolist() for ids in encoder.encode(texts)] == reference(backend, *texts)
    assert 1 in reference(backend, "a </s> a")[0]
    forged = encoder.encode(["a </s> a", "</s>"])
    assert not any(1 in ids for ids in forged) and all(len(ids) for ids in forged)


REFUSED = {
    "its normaliser is NFKC": lambda: edited(trained("qwen2"), normalizer={"type": "NFKC"}),
    "does not end in a plain ByteLevel": lambda: edited(
        trained("gpt2"),
        pre_tokenizer=dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True),
    ),
    "splits in another way": lambda: with_pre_tokenizer(split(QWEN2, behavior="merged_with_next")),
    "not one regular expression": lambda: with_pre_tokenizer(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ),
    "syntax that the two": lambda: with_pre_tokenizer(split(r"\w+|\W+")),
    "leaves some characters out": lambda: with_pre_tokenizer(split(r"\p{L}+|\s+")),
    "uses dropout": lambda: edited(trained("qwen2"), model={"dropout": 0.1}),
}


def with_pre_tokenizer(pre_tokenizer) -> Tokenizer:
    backend = Tokenizer.from_str(trained("qwen2").to_str())
    backend.pre_tokenizer = pre_tokenizer
    return backend


@pytest.mark.parametrize("reason", REFUSED)
def test_what_tiktoken_cannot_do_falls_to_tokenizers(reason):
    backend = REFUSED[reason]()
    encoder = encoder_of(wrapped(backend))
    assert encoder.name == "tokenizers"
    assert encoder.note.startswith("not tiktoken: ") and reason in encoder.note
    if reason != "uses dropout":  # whose ids are random
        texts = [*AWKWARD_TEXTS, ""]
        assert [ids.tolist() for ids in encoder.encode(texts)] == reference(backend, *texts)


def test_python_tokenizers_are_the_last_resort():
    tokenizer = ByT5Tokenizer()
    encoder = encoder_of(tokenizer)
    assert encoder.name == "transformers (Python)" and "tokenizer.json" in encoder.note
    ids = encoder.encode(["ab</s>", "", "中"])
    assert [row.tolist() for row in ids] == [[b + 3 for b in text.encode()] for text in ("ab</s>", "", "中")]
    assert all(row.dtype == np.uint32 and row.ndim == 1 for row in ids)


@pytest.mark.parametrize(
    "syntax", [r".", r"\w", r"\b", "a$", r"\p{N}{1,3}+", r"a{2}?", r"[a-z&&[^b]]", r"(?<=a)", r"\u4e00"]
)
def test_syntax_that_engines_read_differently_is_not_common(syntax):
    assert not COMMON_SYNTAX.fullmatch(re.sub(r"\\[pP]\{\w+\}|\\[sSd]", "", syntax))


def test_a_wrong_engine_is_found_out():
    backend = trained("qwen2")
    engine = engine_of(backend)
    strict = encoder_and_reference("qwen2")[1]
    fallback = dataclasses.replace(engine, reference=lambda text: np.array(strict.encode(text).ids, dtype=np.uint32))
    assert try_awkward_texts(fallback, strict) > 5_000
    shifted = dataclasses.replace(fallback, id_of_rank=np.roll(engine.id_of_rank, 1))
    with pytest.raises(Unsupported, match="other ids"):
        try_awkward_texts(shifted, strict)
    plain = dataclasses.replace(fallback, encoding=engine_of(trained("llama3")).encoding)
    with pytest.raises(Unsupported, match="other ids"):
        try_awkward_texts(plain, strict)


def hand_made(merges: list[tuple[str, str]], ignore_merges: bool, reverse_ids: bool = False) -> Tokenizer:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *dict.fromkeys(left + right for left, right in merges)]
    ids = range(5000, 5000 + len(tokens)) if not reverse_ids else range(len(tokens) - 1, -1, -1)
    model = models.BPE(vocab=dict(zip(tokens, ids, strict=True)), merges=merges, ignore_merges=ignore_merges)
    backend = Tokenizer(model)
    backend.pre_tokenizer = split(QWEN2)
    backend.add_special_tokens([END])
    return backend


@pytest.mark.parametrize("reverse_ids", [True, False])
@pytest.mark.parametrize("ignore_merges", [True, False])
@pytest.mark.parametrize(
    ("merges", "fast_when_merges_are_ignored"),
    [
        ([("a", "b"), ("c", "d"), ("ab", "cd"), ("b", "c")], True),
        ([("b", "c"), ("a", "b"), ("ab", "c")], False),  # abc ends as a, bc
        ([("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")], True),  # as Llama 3 lists them
        ([("a", "a"), ("aa", "a"), ("aa", "aa")], True),
        ([("c", "d"), ("b", "c"), ("a", "bc"), ("abc", "d")], True),  # abcd is left as a, b, cd
    ],
)
def test_merges_and_ids_in_any_order(merges, fast_when_merges_are_ignored, ignore_merges, reverse_ids):
    """Compared on all 1,364 words of up to five letters. The merges cannot reach some of the tokens in them."""
    backend = hand_made(merges, ignore_merges, reverse_ids)
    words = ["".join(word) for length in range(1, 6) for word in itertools.product("abcd", repeat=length)]
    encoder = encoder_of(wrapped(backend))
    assert encoder.name == ("tiktoken" if fast_when_merges_are_ignored or not ignore_merges else "tokenizers")
    expected = backend.encode_batch(words, add_special_tokens=False)
    assert [row.tolist() for row in encoder.encode(words)] == [encoding.ids for encoding in expected]


def test_two_merges_of_one_token_must_be_neighbours():
    backend = hand_made([("a", "b"), ("b", "c"), ("ab", "c"), ("d", "d"), ("a", "bc")], False)
    encoder = encoder_of(wrapped(backend))
    assert encoder.name == "tokenizers" and "merges far apart make the same token, 'abc'" in encoder.note


def test_pieces_by_removing_what_does_not_match():
    assert_exact(with_pre_tokenizer(split(QWEN2, "removed", invert=True)), [*AWKWARD_TEXTS, *documents("zh")[:20]])


def test_truncation_padding_and_template_do_not_apply():
    backend = Tokenizer.from_str(trained("qwen2").to_str())
    (plain,) = reference(backend, AWKWARD_TEXTS[2])
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    for normalizer in ({"type": "NFC"}, {"type": "NFKC"}):
        ids = encoder_of(wrapped(edited(backend, normalizer=normalizer))).encode([AWKWARD_TEXTS[2], "a"])
        assert ids[0].tolist() == plain and len(ids[1]) == 1


def test_cuts_lose_nothing_and_change_nothing():
    backend = trained("qwen2")
    strict = encoder_and_reference("qwen2")[1]
    text = "\n".join([*documents("en")[:30], *documents("zh")[:30]])
    engine = engine_of(backend)
    for length in (1, 1000, len(text)):
        parts = [*segments(text, length)]
        assert "".join(parts) == text
        assert length == len(text) or len(parts) > len(text) / (40 * length)
        assert all(SAFE_CUT.search(part[-1] + following[0]) for part, following in itertools.pairwise(parts))
        assert np.array_equal(engine.encode(text, length), strict.encode(text, add_special_tokens=False).ids)
    assert [*segments("中" * 50, 3)] == ["中" * 50]


@pytest.mark.parametrize(
    "token", [AddedToken("of the"), AddedToken("EOT", rstrip=True), AddedToken("x", single_word=True)]
)
def test_no_cut_where_an_added_token_could_span_it(token):
    backend = Tokenizer.from_str(trained("qwen2").to_str())
    backend.add_tokens([token])
    text = "one of the x, EOT  and x.x of the x " * 3
    engine = engine_of(backend, lambda part: np.array(reference(backend, part)[0], dtype=np.uint32))
    assert engine.encode(text, 1).tolist() == reference(backend, text)[0]


@pytest.mark.parametrize(
    "unit", ["a", " ", "\n", "\r\n", "a b ", "中", "今天天气很好", "-", "1", " \n", "\u0301", "\t", "'s"]
)
def test_long_runs(unit):
    """Runs three times as long as a segment, with and without text after the run."""
    encoder, strict = encoder_and_reference("qwen2")
    for text in (unit * (800_000 // len(unit)), "x" + unit * (300_000 // len(unit)) + "y"):
        assert np.array_equal(encoder.encode([text])[0], strict.encode(text, add_special_tokens=False).ids)


def test_a_million_spaces_go_to_tokenizers():
    encoder, strict = encoder_and_reference("gpt2")
    text = "a" + " " * 1_200_000 + "b"
    assert np.array_equal(encoder.encode([text])[0], strict.encode(text, add_special_tokens=False).ids)


@pytest.mark.heavy
def test_more_spaces_than_either_engine_takes_is_one_clear_error():
    with pytest.raises(InputError, match="failed on one of 1 documents .*12,000,001 characters and starts"):
        encoder_and_reference("qwen2")[0].encode(["a" + " " * 12_000_000])


def test_a_long_document_with_tokens_inside():
    backend = Tokenizer.from_str(trained("qwen2").to_str())
    backend.add_tokens(["<tool_call>"])
    text = ("some words and 今天, " * 2000 + f"<tool_call> {END} \u0378 e\u0301 ") * 12
    assert len(text) > 2**18
    assert_exact(backend, [text])


def test_threads_share_an_encoder():
    encoder, _ = encoder_and_reference("qwen2")
    batches = [documents("zh")[i : i + 8] + AWKWARD_TEXTS + [END] for i in range(0, 80, 8)] * 3
    alone = [encoder.encode(batch) for batch in batches]
    with ThreadPoolExecutor(8) as threads:
        together = [*threads.map(encoder.encode, batches)]
    assert all(np.array_equal(a, b) for x, y in zip(alone, together, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("text", ["\ud800", "今\udfff天"])
def test_a_lone_surrogate_is_an_error_and_no_other_text(text):
    with pytest.raises(UnicodeEncodeError):
        encoder_and_reference("qwen2")[0].encode([text])
