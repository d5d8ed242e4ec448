"""Load or train a tokenizer, and make sure that it has an end-of-document token."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.arguments import SharedArguments
from common.corpus import CorpusCounts, read_documents, source_fingerprint
from common.held_out import content_hash, held_out_below
from common.hub import fetch_tokenizer
from common.messages import InputError, say

END_TOKEN = "<|endoftext|>"  # Qwen's and GPT-2's end-of-document token
# Qwen2's pre-tokenisation: one digit at a time, letters of any script together, white space apart.
# Source: pre_tokenizer of https://huggingface.co/Qwen/Qwen2-0.5B/blob/main/tokenizer.json
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(name: str, end_token: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer called ``name``: a local folder, or a ModelScope or Hugging Face id.

    Its ``eos_token`` is the end-of-document token; ``end_token`` names another one of its vocabulary.

    Raises:
        InputError: no such tokenizer, no end-of-document token, or ``end_token`` is not in the vocabulary.
    """
    folder = fetch_tokenizer(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever transformers or the Rust tokenizer stumbled over
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{folder}: no tokenizer that transformers can load ({reason}).") from None
    if not encode_batch(tokenizer, ["a 地 1"])[0]:  # what transformers makes of a folder with a config alone
        raise InputError(f"{folder}: no vocabulary in it, its tokenizer turns text into nothing.")
    if end_token is not None:
        if end_token not in tokenizer.get_vocab():
            raise InputError(f"--end_token {end_token!r} is not in the vocabulary of {name}.")
        tokenizer.eos_token = end_token
    if tokenizer.eos_token_id is None:
        candidates = [token for token in tokenizer.all_special_tokens if token]
        raise InputError(
            f"tokenizer {name} has no end-of-document token (eos_token), so documents would run into each other. "
            f"Name one of its tokens with --end_token; its special tokens are {candidates}."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with Qwen2's pre-tokenisation on ``texts``.

    Any text encodes to it and decodes back (after NFC normalisation): its base is the 256 bytes. END_TOKEN is
    id 0. The vocabulary may come out smaller than ``vocabulary_size`` on a small corpus.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if vocabulary_size < 257:
        raise InputError(f"--vocabulary_size {vocabulary_size}: a byte-level tokenizer needs at least 257.")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_TOKEN, pad_token=END_TOKEN)


def tokenizer_trained_on(source: str, arguments: SharedArguments) -> PreTrainedTokenizerBase:
    """Train a tokenizer on the documents of ``source`` that ``held_out_below`` leaves in, or find it in the cache."""
    if source.endswith(".bin"):
        raise InputError(f"--tokenizer train: {source} holds tokens, not text. Give the tokenizer that made them.")
    limit = held_out_below(arguments.held_out_fraction)
    decides = [source_fingerprint(source), arguments.text_field, arguments.vocabulary_size, limit]
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(arguments.cache_dir) / f"{Path(source).name.split('.')[0]}-tokenizer-{key}"
    if not folder.exists():
        say(f"training a tokenizer of {arguments.vocabulary_size:,} tokens on {source}")
        documents = read_documents(source, arguments.text_field, arguments.skip_malformed, CorpusCounts())
        texts = (text for text in documents if content_hash(text.encode()) >= limit)
        partial = folder.with_name(f"{folder.name}.partial-{uuid4().hex[:8]}")
        train_tokenizer(texts, arguments.vocabulary_size).save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:  # another launch was faster
            shutil.rmtree(partial)
    return load_tokenizer(str(folder))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 16 hex digits that change with anything that changes the ids of a text or of its end."""
    backend = _backend(tokenizer)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{content} {tokenizer.eos_token_id}".encode()).hexdigest()[:16]


def encode_batch(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of every text, without special tokens; in parallel over the processor's cores."""
    backend = _backend(tokenizer)
    if backend is not None:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _backend(tokenizer: PreTrainedTokenizerBase):
    """Return the Rust tokenizer, if there is one; without the truncation and padding that its file may ask for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return backend
