"""A config dict -> a causal language model with random weights; the residual stream in bf16."""

import torch
from accelerate import init_empty_weights
from accelerate.utils import gather_object
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.integrations import unset_hf_deepspeed_config

from common.console import InputError, in_one_line
from common.distributed.accelerator import card_bytes
from common.model.counts import experts_per_token
from common.model.experts import has_grouped_experts, use_grouped_experts
from common.model.refused_config import unknown_name
from common.tokens.tokenizer import padded_vocabulary, vocabulary_size

# A whole model is built on the card, before it is sharded, if it takes up to this share of the card's memory.
BUILT_SHARE = 1 / 3


def planned_model(shape: dict, vocabulary_size: int, context_length: int) -> PreTrainedModel:
    """Build the model that ``model_from_config`` would build, on torch's meta device: it takes no memory.

    Raises:
        InputError: transformers refuses the shape, or see ``check_config``.
    """
    settings = {"vocab_size": padded_vocabulary(vocabulary_size), "max_position_embeddings": context_length, **shape}
    # A family's own (GLM: 151,329, GPT-2: 50,256) may be beyond this vocabulary.
    settings = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")) | settings
    build_whole()
    try:
        config = AutoConfig.for_model(**settings)
        check_config(config)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # a shape may be wrong in any way
        raise cannot_build(shape, error) from None


def check_config(config: PretrainedConfig) -> None:
    """Raise InputError unless ``config`` is that of a causal language model with attention, and its sizes can be.

    Whatever else does not fit is noticed by transformers when it builds the model, or by ``check_targets_hidden``.
    """
    name, text = config.model_type, config.get_text_config()
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"model_type {name}: transformers has no causal language model of this family. Take another.")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if text is not config and model_class.config_class is type(config):
        raise InputError(
            f"model_type {name} is more than a language model, which alone is trained here. Give the shape of its text "
            f"model: model_type {text.model_type}, with the sizes in {name}'s text_config; --model FOLDER of "
            "wiki_zh_scratch.py takes them from there."
        )
    heads, key_heads = (getattr(text, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
    if not heads:
        raise InputError(
            f"model_type {name} has no attention heads: state-space and recurrent models (Mamba, RWKV, xLSTM) are not "
            "trained here, because their FLOPs and memory are not known. Take one with attention, or a hybrid (Jamba)."
        )
    layers = getattr(text, "num_hidden_layers", 1)
    if isinstance(layers, int) and layers < 1:
        raise InputError(f"model_type {name}: {layers} layers. Write 1 or more as num_hidden_layers in its config.")
    for field, value in text.to_dict().items():
        if "drop" in field and type(value) in (int, float) and not 0 <= value < 1:
            raise InputError(f"model_type {name}: {field} {value}: must be at least 0, and below 1.")
    if isinstance(heads, int) and isinstance(key_heads, int) and key_heads and heads % key_heads:
        raise InputError(
            f"model_type {name}: {heads} attention heads are not a multiple of {key_heads} key-value heads. Change "
            "num_attention_heads or num_key_value_heads in its config."
        )


def cannot_build(shape: dict, error: Exception) -> InputError:
    """Return why transformers cannot build a model of ``shape``."""
    unknown = unknown_name(error, shape)
    return InputError(unknown or f"MODEL {shape}: transformers cannot build it ({in_one_line(error)}).")


def model_from_config(
    shape: dict,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    training: TrainingArguments | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Build a model of ``shape`` in float32 with random weights, for the vocabulary of ``tokenizer``.

    The embedding has as many rows as the tokenizer has ids, rounded up to a multiple of VOCABULARY_MULTIPLE. The rows
    beyond the tokenizer's ids are never a target, so training only teaches the model not to predict them.

    Args:
        shape: ``model_type`` (any causal model of transformers) and arguments of its config class.
        training: decides the device to build on, see ``device_to_build_on``. None: the CPU.
        device: build there, whatever ``training`` says. On the meta device the weights take no memory.

    Raises:
        InputError: transformers refuses the shape.
    """
    settings = {
        "vocab_size": padded_vocabulary(vocabulary_size(tokenizer)),
        "max_position_embeddings": context_length,
        **shape,
    }
    # No padding token while the model is built: transformers sets its embedding to zero and gives it no gradient. For
    # Qwen it is the end-of-document token. A zero vector at the start of a row stays zero through every norm, and a
    # gradient norm of 1.9e26 was measured.
    settings |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    build_whole()
    try:
        config = AutoConfig.for_model(**settings)
        check_config(config)
        if device is None:
            device = device_to_build_on(config, training) if training else torch.device("cpu")
        model = model_on(device, config, torch.float32)
    except Exception as error:  # a shape may be wrong in any way
        raise cannot_build(shape, error) from None
    # Text of a base model is sampled, not searched for. The settings are saved with the checkpoint, for everybody who
    # generates text with it.
    sampling = dict(do_sample=True, temperature=0.8, top_p=0.95, max_new_tokens=100)
    model.generation_config.update(**sampling, pad_token_id=tokenizer.pad_token_id)
    model.config.pad_token_id = tokenizer.pad_token_id  # Trainer copies it here anyway; PretrainingTrainer removes it
    return model


def model_on(device: torch.device, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model with random weights on ``device``. On the meta device it still has its buffers in memory.

    Buffers such as the frequencies of rotary embeddings are not saved, so no other process can send them.
    """
    if device.type != "meta":
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # init_empty_weights makes two parameters of a shared one
    return model


def keep_residual_in_bf16(model: PreTrainedModel) -> None:
    """Keep the residual stream of ``model`` in bf16 wherever autocast computes in bf16.

    Autocast leaves the embedding's result in fp32, and so the sums that every layer adds to it. They take twice the
    memory and twice the traffic of those under FSDP2 and DeepSpeed, which cast the parameters. (What this gains:
    benchmarks/README.md.)

    Call it once, before anything wraps the model. Parameters do not change. A model of which ``hands_on_bf16`` is false
    stays as it is. Experts, which autocast does not know, are computed in its precision from now on: see experts.py.
    """
    use_grouped_experts(model)
    if not hands_on_bf16(model):
        return

    def cast(embedding, inputs, embedded: torch.Tensor) -> torch.Tensor:
        device = embedded.device.type
        in_bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        return embedded.to(torch.bfloat16) if in_bf16 else embedded

    model.get_input_embeddings().register_forward_hook(cast)


def residual_dtype(model: PreTrainedModel, mixed_precision: str) -> torch.dtype:
    """Return the dtype of the residual stream of ``model`` under autocast, after ``keep_residual_in_bf16``."""
    return torch.bfloat16 if mixed_precision == "bf16" and hands_on_bf16(model) else torch.float32


def hands_on_bf16(model: PreTrainedModel) -> bool:
    """Whether a residual stream that begins in bf16 stays in bf16 through the layers of ``model``, under autocast.

    It does not if embedded positions are added in fp32 (GPT-2, OPT), or if the last norm of a layer (GLM-4) or experts
    with code of their own add something in fp32.
    """
    config = model.config.get_text_config()
    embeddings = sum(isinstance(module, torch.nn.Embedding) for module in model.modules())
    experts_do = not experts_per_token(config) or has_grouped_experts(model)
    return embeddings == 1 and experts_do and config.model_type != "glm4"


def device_to_build_on(config: PretrainedConfig, training: TrainingArguments) -> torch.device:
    """Return the device on which a model of ``config`` gets its random weights: ``training``'s, if it is small there.

    To draw the numbers of 7B parameters takes a CPU minutes and a GPU seconds. CPU and GPU draw different numbers from
    the same seed, so all processes take the same one, and they take the same one under every YAML.
    """
    with torch.device("meta"):
        size = 4 * AutoModelForCausalLM.from_config(config).num_parameters()  # bytes in float32
    there = card_bytes(training.device) or 0
    fits = gather_object([size <= BUILT_SHARE * there])
    return training.device if all(fits) else torch.device("cpu")


def build_whole() -> None:
    """Build all models after this call whole on every process, under ZeRO-3, too.

    Under ZeRO-3, transformers would shard each layer as it builds it. The random numbers would then be drawn in another
    order (other losses than under every other YAML), and the parameters would look empty (no FLOPs, no fingerprint).
    DeepSpeed still shards the model when training starts: Trainer tells transformers about ZeRO-3 again.
    """
    unset_hf_deepspeed_config()
