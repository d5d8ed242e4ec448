"""Load a tokenizer that has an end-of-document token; its fingerprint, and the padded size of its vocabulary."""

import hashlib
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.console import InputError
from common.hub import fetch_tokenizer
from common.model_folder import custom_code

# Tensor cores are fastest when the sizes of a matrix are multiples of this.
# Source: https://docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication/index.html
VOCABULARY_MULTIPLE = 128


def load_tokenizer(name: str, end_token: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer called ``name``: a local folder, a ModelScope or Hugging Face id, or a .gguf file.

    The end-of-document token is its ``eos_token``. A tokenizer without a padding token pads with the same token.

    Args:
        end_token: a token of its vocabulary that is to be the end-of-document token instead.

    Raises:
        InputError: no such tokenizer, no end-of-document token, or ``end_token`` is not in the vocabulary.
    """
    if name.endswith(".gguf"):
        folder, options = str(Path(name).parent), {"gguf_file": Path(name).name}
    else:
        folder, options = fetch_tokenizer(name), {}
    try:
        # Beside the config of a Qwen2, transformers (5.24) loads a tokenizer that was trained here as Qwen2's class. It
        # has the same ids but another fingerprint: a run's folder would not have the run's tokenizer.
        kind = PreTrainedTokenizerFast if _has_no_class_of_its_own(folder) else AutoTokenizer
        tokenizer = kind.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # transformers and the Rust tokenizer raise many types
        code = custom_code(folder)
        if code is not None:
            raise InputError(f"--tokenizer {name}: {code}") from None
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{folder}: no tokenizer that transformers can load ({reason}). Give another.") from None
    # From a folder with a config alone, transformers makes a tokenizer with an empty vocabulary.
    if not tokenizer("a 地 1", add_special_tokens=False)["input_ids"]:
        raise InputError(f"{folder}: its tokenizer has no vocabulary and turns text into nothing. Give another.")
    if end_token is not None:
        if end_token not in tokenizer.get_vocab():
            raise InputError(f"--end_token {end_token!r} is not in the vocabulary of {name}. Give a token that is.")
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


def _has_no_class_of_its_own(folder: str) -> bool:
    """Whether the tokenizer in ``folder`` is all in its tokenizer.json, as its tokenizer_config.json says."""
    try:
        config = json.loads(Path(folder, "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("tokenizer_class") == PreTrainedTokenizerFast.__name__


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 16 hex digits that change with anything that changes a text's ids or the end-of-document id.

    Truncation and padding do not count: the encoders use neither. The digits are part of the names of cached token
    stores: any change here makes every user tokenize again.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:
        if backend.truncation or backend.padding:
            backend = Tokenizer.from_str(backend.to_str())
            backend.no_truncation()
            backend.no_padding()
        content = backend.to_str()
    return hashlib.sha256(f"{content} {tokenizer.eos_token_id}".encode()).hexdigest()[:16]


def decoded(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of ``ids``, exactly as the tokenizer's decoder gives it."""
    return tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest id + 1: how many ids may occur. It is above ``len(tokenizer)`` if ids between are not used."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id for text that the tokenizer does not know; None if it has none, as byte-level tokenizers."""
    if tokenizer.unk_token_id is not None:
        return tokenizer.unk_token_id
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    unknown = getattr(model, "unk_token", None)  # a tokenizer.json may have one that no tokenizer_config.json names
    return None if unknown is None else tokenizer.get_vocab().get(unknown)


def padded_vocabulary(vocabulary_size: int) -> int:
    """Return the rows of the embedding for so many tokens: the next multiple of VOCABULARY_MULTIPLE.

    For example, 151,665 tokens get 151,680 rows. The surplus rows are never an input or a target.
    """
    return -(-vocabulary_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
