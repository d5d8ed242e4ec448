"""A name -> a causal language model, with its weights or, from its config alone, with random ones.

Refused, each with what to do instead: a checkpoint in which weights are missing, quantized weights, a tokenizer with
more ids than the embedding has rows, rows longer than the model's positions, and weights that predict the text no
better than the frequency of its tokens, unless the user accepts that.
"""

import hashlib
import math
import os
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_gguf_available

from common.console import InputError, in_one_line, say
from common.distributed.strategy import whole
from common.hub import fetch_model
from common.model.from_config import build_whole, check_config, model_on
from common.model.refused_config import unknown_name
from common.model_folder import custom_code, object_in
from common.tokens.tokenizer import vocabulary_size

# Weights are doubted if their loss is above this share of ln(vocabulary), the loss of predicting all tokens alike, and
# not below the loss by token frequency alone either. Both are needed: a small model that was just trained is above the
# first and below the second; a good one on unusual text, such as random letters, may be the other way round.
# Measured on SmolLM2-135M (CPU, 6,156 tokens, 2026-11-22):
#     English, Chinese and Python                                             0.22 to 0.27
#     letters drawn at random                                                 0.51
#     ids of five other tokenizers                                            0.80 to 1.16
#     embedding, body or both replaced by random numbers, or shuffled         1.03 to 3.65
# Partial damage is not noticed: one layer of random numbers gave 0.29, permuted queries and keys 0.52.
NEAR_RANDOM = 0.7
NUMBERS_HASHED = 1024  # of each tensor, for a fingerprint
GGUF_BYTES_HASHED = 16 * 2**20


def find_model(name: str, weights: bool) -> str:
    """Return the place of the model called ``name``: a folder or a .gguf file. An id of a hub is fetched.

    Args:
        weights: fetch the weights, too; else config and tokenizer only.

    Raises:
        InputError: there is no such file or folder, the package that reads .gguf files is missing, or see
            ``fetch_model``.
    """
    if not name.endswith(".gguf"):
        return fetch_model(name, weights)
    if not Path(name).is_file():
        raise InputError(f"--model {name}: no such file.")
    if not is_gguf_available():
        raise InputError(f"--model {name}: reading .gguf files needs a package: pip install 'gguf>=0.17,<1'")
    return name


def check_fit(place: str, tokenizer: PreTrainedTokenizerBase, context_length: int) -> None:
    """Raise InputError if tokenizer or row length do not fit the model's config, before text is tokenized in vain."""
    _config_for(place, tokenizer, context_length)


def pretrained_model(
    place: str,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """Load the model at ``place``, which ``find_model`` returned, in ``dtype``.

    On the meta device nothing is loaded: another process has the weights.

    The weights of a .gguf file are dequantized, but what they lost when they were quantized stays lost.

    Args:
        device: load to it tensor by tensor, without a copy in the CPU's memory (except from a .gguf file).
        quantization: quantize the matrices of the layers, for adapters that are trained beside them.

    Raises:
        InputError: see this module; or transformers cannot load the model.
    """
    if device is not None and device.type == "meta":
        return random_model(place, tokenizer, context_length, dtype, device)
    config = _config_for(place, tokenizer, context_length)
    folder, in_file = _as_transformers_asks(place)
    where = {} if device is None or in_file else {"device_map": {"": device}}
    if quantization is not None:
        where["quantization_config"] = quantization
    build_whole()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,  # None, the default, would ask at the terminal
            **in_file,
            **where,
        )
    except Exception as error:  # each of safetensors, gguf, torch and transformers raises its own
        raise _cannot_load(place, error) from None
    if found["missing_keys"]:
        raise InputError(
            f"{place}: {len(found['missing_keys'])} tensors of {type(model).__name__} are not in it and would start at "
            f"random: {_some(found['missing_keys'])}. Download it again, or give the whole checkpoint."
        )
    if found["unexpected_keys"]:
        names = _some(found["unexpected_keys"])
        say(f"note: {place} has tensors that {type(model).__name__} has no place for, left out: {names}")
    if in_file:
        model = _plain(model, config)
        say(f"note: {place}: dequantized to {str(dtype).removeprefix('torch.')}")
    return _with_tokens_of(model, tokenizer)


def random_model(
    place: str,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Build the model whose config is at ``place`` with random weights in ``dtype``, on ``device`` or on the CPU.

    Raises:
        InputError: see this module; or transformers cannot build the model.
    """
    config = _config_for(place, tokenizer, context_length)
    build_whole()
    try:
        model = model_on(torch.device("cpu") if device is None else device, config, dtype)
    except ValueError as error:
        raise _cannot_load(place, error) from None
    # As in model_from_config: text is sampled, not searched for.
    model.generation_config.update(do_sample=True, temperature=0.8, top_p=0.95, max_new_tokens=100)
    return _with_tokens_of(model, tokenizer)


def model_without_memory(place: str) -> PreTrainedModel:
    """Build the model whose config is at ``place`` on torch's meta device, where it takes no memory.

    Raises:
        InputError: transformers cannot build the model.
    """
    folder, in_file = _as_transformers_asks(place)
    try:
        build_whole()
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **in_file)
        check_config(config)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise _cannot_load(place, error) from None


def check_start(loss: float, by_frequency: float, vocabulary_rows: int, accepted: bool) -> None:
    """Refuse pretrained weights that know next to nothing of the text; say a warning if the user accepts them.

    Args:
        loss: of the weights on the held-out documents, nats a token.
        by_frequency: the loss of predicting every token by its frequency in the training documents.
        vocabulary_rows: of the embedding.
        accepted: --accept_weak_weights.

    Raises:
        InputError: the weights are refused. A loss that is not finite is always refused.
    """
    chance = math.log(vocabulary_rows)
    if loss < by_frequency or loss <= NEAR_RANDOM * chance:  # both are false for NaN
        return
    found = (
        f"the loaded weights start at {loss:.2f} nats a token on the held-out documents. Token frequency alone gives "
        f"{by_frequency:.2f} on this text, and to predict all tokens alike costs ln({vocabulary_rows:,}) = {chance:.2f}"
    )
    if accepted and math.isfinite(loss):
        say(f"warning: {found}. The weights know next to nothing of this text; training goes on, as you asked.")
        return
    accept = "If you expect this, such as for a model trained briefly or on other text: --accept_weak_weights. "
    raise InputError(
        f"{found}: the weights know next to nothing of this text. {accept if math.isfinite(loss) else ''}Otherwise "
        "its ids are from another tokenizer: give the one that the weights were trained with, and tokenize the text "
        "with it. Or the checkpoint is damaged: download it again. To start at random on purpose: "
        "recipes/openwebtext_continue.py --from_scratch"
    )


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Return 16 hex digits of the names, shapes and first NUMBERS_HASHED numbers of all parameters.

    Of the first process, which has the weights, or its part of them, in any case. All processes call this.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(whole(parameter.detach()).flatten()[:NUMBERS_HASHED].float().cpu().numpy().tobytes())
    [fingerprint] = broadcast_object_list([digest.hexdigest()])
    return fingerprint


def files_fingerprint(place: str) -> str:
    """Return 16 hex digits of the files at ``place``, a folder of safetensors or a .gguf file, without loading them.

    As ``weights_fingerprint``, of what is in the files: names, shapes and the first numbers of all tensors. Of a .gguf
    file its size, and the bytes at its beginning and its end.
    """
    digest = hashlib.blake2b(digest_size=8)
    if place.endswith(".gguf"):
        with open(place, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for position in (0, max(0, size - GGUF_BYTES_HASHED)):
                file.seek(position)
                digest.update(file.read(GGUF_BYTES_HASHED))
        return digest.hexdigest()
    tensors = {}  # name -> its file's number
    files = [safe_open(path, framework="pt") for path in sorted(Path(place).glob("*.safetensors"))]
    for number, file in enumerate(files):
        tensors |= dict.fromkeys(file.keys(), number)
    for name in sorted(tensors):
        file = files[tensors[name]]
        shape = file.get_slice(name).get_shape()
        first = file.get_slice(name)[:1] if len(shape) > 1 else file.get_tensor(name)  # a row, of a matrix
        digest.update(f"{name} {tuple(shape)} ".encode())
        digest.update(first.flatten()[:NUMBERS_HASHED].float().numpy().tobytes())
    return digest.hexdigest()


def _config_for(place: str, tokenizer: PreTrainedTokenizerBase, context_length: int):
    """Return the config at ``place``; raise InputError unless tokenizer and ``context_length`` fit it."""
    folder, in_file = _as_transformers_asks(place)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **in_file)
    except Exception as error:  # a damaged file may raise anything
        raise _cannot_load(place, error) from None
    check_config(config)
    method = getattr(config, "quantization_config", None)
    if method is not None:
        raise InputError(f"{place}: its weights are quantized and cannot be trained. Give the original. ({method})")
    text = config.get_text_config()
    ids = vocabulary_size(tokenizer)
    if ids > text.vocab_size:
        raise InputError(
            f"{place}: its embedding has {text.vocab_size:,} rows, the tokenizer {ids:,} ids. Give the "
            "tokenizer that it was trained with, or none, to take its own. To add tokens of your own, grow it first: "
            f"model.resize_token_embeddings({ids}), model.save_pretrained(FOLDER), --model FOLDER"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and context_length > positions:
        raise InputError(
            f"--context_length {context_length:,}: the model knows {positions:,} positions. Use at most that."
        )
    # As in model_from_config: the embedding of a padding token gets no gradient, and the end token often is one.
    config.pad_token_id = text.pad_token_id = None
    return config


def _plain(model: PreTrainedModel, config) -> PreTrainedModel:
    """Return the same model without transformers' note of its quantization, with which it could not be saved."""
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    return plain


def _with_tokens_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Give ``model`` the end and padding tokens of ``tokenizer``, and a generation config that can be saved."""
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:  # else transformers would raise it when it writes the first checkpoint
        say(f"note: the model's generation config contradicts itself and is replaced by the default ({error})")
        model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def _as_transformers_asks(place: str) -> tuple[str, dict[str, str]]:
    """Return the folder of ``place`` for from_pretrained, and its argument that names a .gguf file, if it is one."""
    path = Path(place)
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (place, {})


def _cannot_load(place: str, error: Exception) -> InputError:
    code = custom_code(place)
    if code is not None:
        return InputError(f"--model {place}: {code}")
    unknown = unknown_name(error, object_in(Path(place) / "config.json"))
    reason = f"not a causal language model that transformers can load ({in_one_line(error)})."
    return InputError(f"{place}: {unknown or reason}")


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
