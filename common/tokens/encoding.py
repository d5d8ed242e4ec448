"""Text -> token ids, by the fastest engine that gives exactly the tokenizer's own ids.

The engines, fastest first:

- tiktoken: byte-level BPE, as of GPT-2, Qwen, Llama 3 and the tokenizers trained here;
- the Rust library tokenizers: every other tokenizer.json;
- transformers' Python tokenizers: the rest.

The reference is the Rust tokenizer with ``encode_special_tokens``. With it, a special token that is written out in a
text is ordinary text: a web page about language models may contain ``<|endoftext|>``, and must not end its document
there. Added tokens that are not special, such as ``<tool_call>`` in Qwen2.5, stay tokens.
"""

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from common.console import InputError
from common.tokens.proofs import Proof, place_of_proof, read_proof, write_proof
from common.tokens.tiktoken_engine import SAFE_CUT, TiktokenEngine, Unsupported, find_facts, tiktoken_engine

# One character of each kind that patterns distinguish. All strings of three of them are tried at start.
KINDS = "aSél中\u0301'1² \n\r\t\u3000.。🙂\u200d"
AWKWARD_TEXTS = [
    "I'll WE'RE don't 'Tis it'S o'clock ''s 'ſ they'VE I'M I'd",
    "in 1999, 12345678901 x2y½ ⅷ ٣٤٥ 1,000.50 0x1F 3²",
    "def f(x):\n    return  x\n\n\n\tif a == b:\r\n\r\n  \t # no   \n ",
    "今天天气很好，今天天气不好。「第一条」　为了①\n\n　　第二条",
    "한국어 \u1112\u1161\u11ab ひらがなカタカナ がぱ ﾊﾟ ไทยภาษา हिन्दी ক্ষ עברית العربيّة Ελληνικά кириллица",
    "e\u0301 A\u030a \u212b \u2126 \ufb01 q\u0307\u0323 q\u0323\u0307 \u0958 \u1e9b\u0323 a\u0345\u0301 \uf900 \u2f800",
    "👩\u200d👩\u200d👧 🇨🇳 👍🏽 🫨 \U000e0067 \U0010fffd \ufeff\ufffd \u200b\u00ad\x00\x01\x1b\x7f\x85\u2028",
    "    \t\t\t\n\n\n\n    \r\n\r\n  a  b   c    d\u00a0\u00a0e\u2003f\u3000\u3000g\x0b\x0ch ",
    "http://a.b/c?d=e&f=%20#g <p class='x'>&amp;</p> a_b __init__ --- ... !!!??? $$$ {[()]} \\n </s> <|im_end|>",
    "antidisestablishmentarianism " * 3 + "z" * 300 + "中" * 300 + " " * 300 + "=" * 300,
]


@dataclass(frozen=True)
class Encoder:
    """One engine for one tokenizer. Threads may share it.

    Attributes:
        name: which engine it is.
        note: why it is this one.
        encode: texts -> the ids of each text, 1-D uint32, without special tokens. It raises InputError if the engine
            fails on a text, and UnicodeEncodeError or TypeError if a text has a lone surrogate, which
            common/corpus/documents.py rejects before.
    """

    name: str
    note: str
    encode: Callable[[list[str]], list[np.ndarray]]


def encoder_of(tokenizer: PreTrainedTokenizerBase, cache_dir: str | Path | None = None) -> Encoder:
    """Return the fastest engine that gives exactly the ids of ``tokenizer``, without its truncation and padding.

    The engine works on a copy and does not change ``tokenizer``. Building it takes seconds for a vocabulary of 150,000,
    and less than one if the proof that it gives the same ids is in ``cache_dir``, from an earlier time.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        python_tokenizer = copy.deepcopy(tokenizer)
        note = "the faster engines need a tokenizer that has a tokenizer.json"
        return Encoder("transformers (Python)", note, lambda texts: python_ids(python_tokenizer, texts))

    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    content = with_ordinary_special_tokens(json.loads(tokenizer_json), tokenizer.eos_token)
    backend = twin_of(tokenizer.backend_tokenizer, content)
    if backend is None:
        backend = Tokenizer.from_str(json.dumps(content))
    backend.encode_special_tokens = True
    place = None if cache_dir is None else place_of_proof(cache_dir, tokenizer_json, tokenizer.eos_token)
    proof = None if place is None else read_proof(place)
    when = "before"
    if proof is None:
        proof = prove(content, backend)
        when = "at start"
        if place is not None:
            write_proof(place, proof)
    if proof.reason:
        return Encoder("tokenizers", f"not tiktoken: {proof.reason}", lambda texts: backend_ids(backend, texts))
    engine = tiktoken_engine(content, backend, lambda text: backend_ids(backend, [text])[0], proof.facts)
    note = f"same ids as tokenizers on {proof.tried:,} awkward texts tried {when}"
    return Encoder("tiktoken", note, engine.encode_batch)


def prove(content: dict, backend: Tokenizer) -> Proof:
    """Find out whether tiktoken gives the ids of ``backend``, whose tokenizer.json is ``content``."""
    try:
        facts = find_facts(content, backend)
        engine = tiktoken_engine(content, backend, lambda text: backend_ids(backend, [text])[0], facts)
        return Proof("", facts, try_awkward_texts(engine, backend))
    except Unsupported as reason:
        return Proof(str(reason))


def with_ordinary_special_tokens(content: dict, end_token: str | None) -> dict:
    """Return the tokenizer.json ``content``, changed so that no text has the id of a special token or ``end_token``.

    ``encode_special_tokens`` leaves special tokens in a text to the model. A BPE model cannot reach them by its merges.
    Unigram, WordPiece and WordLevel models would find ``</s>`` as a word of their vocabulary. In these, it is renamed
    to a string that no text contains. An ``end_token`` that is not an added token is an ordinary word and stays one.
    Truncation, padding and the post-processor are removed.
    """
    added = [
        token | {"special": token["special"] or token["content"] == end_token} for token in content["added_tokens"]
    ]
    content = content | {"added_tokens": added, "truncation": None, "padding": None, "post_processor": None}
    model = content["model"]
    if model["type"] == "BPE":
        return content
    special = {token["content"] for token in added if token["special"]} - {model.get("unk_token")}
    words = [word for word, _ in model["vocab"]] if model["type"] == "Unigram" else [*model["vocab"]]
    names = [f"\U0010ffff{word}" if word in special else word for word in words]
    if model["type"] == "Unigram":
        vocabulary = [[name, score] for name, (_, score) in zip(names, model["vocab"], strict=True)]
    else:
        vocabulary = dict(zip(names, model["vocab"].values(), strict=True))
    left = [token for token in added if token["content"] not in special.intersection(words)]
    return content | {"model": model | {"vocab": vocabulary}, "added_tokens": left}


def twin_of(backend: Tokenizer, content: dict) -> Tokenizer | None:
    """Return ``content`` as a tokenizer that shares the model of ``backend``, or None if it must have its own.

    Sharing saves the seconds that loading a large model takes.
    """
    # A model with ignore_merges is not shared, because ``merged_token_counts`` changes that setting for a while.
    if content["model"]["type"] != "BPE" or content["model"]["ignore_merges"]:
        return None
    twin = Tokenizer(backend.model)
    if backend.normalizer is not None:
        twin.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        twin.pre_tokenizer = backend.pre_tokenizer
    for token in sorted(content["added_tokens"], key=lambda token: token["id"]):
        options = {name: value for name, value in token.items() if name not in ("id", "content")}
        twin.add_tokens([AddedToken(token["content"], **options)])
        if twin.token_to_id(token["content"]) != token["id"]:
            return None
    return twin


def backend_ids(backend: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Return the ids of each text by the Rust tokenizer, which uses all cores and releases the GIL.

    Raises:
        InputError: the Rust library panicked on a text.
    """
    try:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Rust's: not an Exception, and not importable
            raise
        longest = max(texts, key=len)
        raise InputError(
            f"the tokenizer failed on one of {len(texts)} documents ({error}). The longest of them has "
            f"{len(longest):,} characters and starts {longest[:40]!r}. For example, 10 million white space characters "
            "in a row are too many for it: shorten or remove that document."
        ) from None
    return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


def python_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """Return the ids of each text by one of transformers' Python tokenizers, which hold the GIL."""
    options = dict(add_special_tokens=False, split_special_tokens=True, padding=False, truncation=False, verbose=False)
    return [np.array(ids, dtype=np.uint32) for ids in tokenizer(texts, **options)["input_ids"]]


def try_awkward_texts(engine: TiktokenEngine, backend: Tokenizer) -> int:
    """Check that ``engine`` gives the ids of ``backend`` on awkward texts; return the number of texts.

    Each text is encoded whole, and again cut at every place where a long text may be cut.

    Raises:
        Unsupported: the ids of a text differ.
    """
    texts = ["".join(kinds) for kinds in itertools.product(KINDS, repeat=3)]
    texts += [*AWKWARD_TEXTS, "".join(AWKWARD_TEXTS), ""]
    for text, expected in zip(texts, backend_ids(backend, texts), strict=True):
        lengths = (len(text), 1) if SAFE_CUT.search(text) else (len(text),)
        for segment_characters in lengths:
            if not np.array_equal(engine.encode(text, segment_characters), expected):
                raise Unsupported(f"it gives other ids for {text[:40]!r}")
    return len(texts)
