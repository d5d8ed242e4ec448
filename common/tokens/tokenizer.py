"""Load a tokenizer, and make sure that it has an end-of-document token."""

import hashlib
import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from common.console import InputError
from common.hub import fetch_tokenizer


def load_tokenizer(name: str, end_token: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer called ``name``: a local folder, a ModelScope or Hugging Face id, or a .gguf file.

    Its ``eos_token`` is the end-of-document token; ``end_token`` names another one of its vocabulary.

    Raises:
        InputError: no such tokenizer, no end-of-document token, or ``end_token`` is not in the vocabulary.
    """
    if name.endswith(".gguf"):
        folder, in_file = str(Path(name).parent), {"gguf_file": Path(name).name}
    else:
        folder, in_file = fetch_tokenizer(name), {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **in_file)
    except Exception as error:  # whatever transformers or the Rust tokenizer stumbled over
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{folder}: no tokenizer that transformers can load ({reason}).") from None
    # What transformers makes of a folder with a config alone:
    if not tokenizer("a 地 1", add_special_tokens=False)["input_ids"]:
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


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 16 hex digits that change with anything that changes the ids of a text or of its end."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:
        if backend.truncation or backend.padding:  # the encoders use neither
            backend = Tokenizer.from_str(backend.to_str())
            backend.no_truncation()
            backend.no_padding()
        content = backend.to_str()
    return hashlib.sha256(f"{content} {tokenizer.eos_token_id}".encode()).hexdigest()[:16]


# Tensor cores are fed best by such sizes.
# Source: https://docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication/index.html
VOCABULARY_MULTIPLE = 128


def padded_vocabulary(vocabulary_size: int) -> int:
    """Return the next multiple of VOCABULARY_MULTIPLE."""
    return -(-vocabulary_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
