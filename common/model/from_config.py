"""A config dict -> a randomly initialised causal language model, and a report of its parameters."""

import torch
from accelerate.utils import gather_object
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.integrations import unset_hf_deepspeed_config

from common.console import InputError
from common.tokens.tokenizer import padded_vocabulary

BUILT_SHARE = 1 / 3  # of a card: a whole model up to this size is built there, before it is divided


def planned_model(shape: dict, vocabulary_size: int, context_length: int) -> PreTrainedModel:
    """Build what model_from_config would, without memory (on torch's meta device) and without a tokenizer."""
    settings = {"vocab_size": padded_vocabulary(vocabulary_size), "max_position_embeddings": context_length, **shape}
    build_whole()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)


def model_from_config(
    shape: dict,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    training: TrainingArguments | None = None,
) -> PreTrainedModel:
    """Build a model of ``shape`` in float32, for the vocabulary of ``tokenizer``.

    The embedding gets the next multiple of VOCABULARY_MULTIPLE rows; the rows beyond the tokenizer's are never a
    target, so training only teaches the model not to predict them.

    Args:
        shape: ``model_type`` (any causal model of transformers) and arguments of its config class.
        training: builds on its device, see device_to_build_on; None: on the CPU.

    Raises:
        InputError: transformers refuses the shape.
    """
    settings = {
        "vocab_size": padded_vocabulary(len(tokenizer)),
        "max_position_embeddings": context_length,
        **shape,
    }
    # No padding token while the model is built: transformers starts its embedding at zero and gives it no gradient.
    # Qwen's is the end-of-document token, and a zero vector at the start of a row stays zero through every norm: a
    # gradient norm of 1.9e26 was measured.
    settings |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    build_whole()
    try:
        config = AutoConfig.for_model(**settings)
        with device_to_build_on(config, training) if training else torch.device("cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"MODEL {shape}: transformers cannot build it ({error}).") from None
    # Samples of a base model are drawn, not searched for; kept with the checkpoint for whoever generates from it.
    sampling = dict(do_sample=True, temperature=0.8, top_p=0.95, max_new_tokens=100)
    model.generation_config.update(**sampling, pad_token_id=tokenizer.pad_token_id)
    model.config.pad_token_id = tokenizer.pad_token_id  # Trainer copies it here anyway; PretrainingTrainer removes it
    return model


def keep_residual_in_bf16(model: PreTrainedModel) -> None:
    """Make what ``model``'s layers hand on to each other bf16 wherever autocast computes in it.

    Autocast leaves the embedding's result in fp32, and so all sums that layers add to it: twice the memory and twice
    the traffic of what FSDP2 and DeepSpeed, which cast the parameters, train with. Parameters stay as they are, and
    models that hands_on_bf16 is false of as a whole. Once, before anything wraps them. Measured: benchmarks/README.md.
    """
    if not hands_on_bf16(model):
        return

    def cast(embedding, inputs, embedded: torch.Tensor) -> torch.Tensor:
        device = embedded.device.type
        in_bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        return embedded.to(torch.bfloat16) if in_bf16 else embedded

    model.get_input_embeddings().register_forward_hook(cast)


def hands_on_bf16(model: PreTrainedModel) -> bool:
    """Whether an embedding's result in bf16 would stay so through the layers, under autocast.

    It would not where positions are embedded, too, and added in fp32 (GPT-2, OPT), nor where what experts or the last
    norm of a layer give to the sum is in fp32 (Mixtral, Qwen2-MoE, GLM-4).
    """
    config = model.config.get_text_config()
    embeddings = sum(isinstance(module, torch.nn.Embedding) for module in model.modules())
    return embeddings == 1 and not getattr(config, "num_experts_per_tok", None) and config.model_type != "glm4"


def device_to_build_on(config: PretrainedConfig, training: TrainingArguments) -> torch.device:
    """Return where a model of ``config`` is to get its random weights: on ``training``'s device, if it is small there.

    Drawing the numbers of 7B parameters takes a CPU minutes, and a GPU seconds. All processes decide alike, and as they
    would under any other YAML, because the two draw other numbers from the same seed.
    """
    with torch.device("meta"):
        size = 4 * AutoModelForCausalLM.from_config(config).num_parameters()  # bytes in float32
    there = card_bytes(training.device) or 0
    fits = gather_object([size <= BUILT_SHARE * there])
    return training.device if all(fits) else torch.device("cpu")


def card_bytes(device: torch.device) -> int | None:
    """Return the memory of a card, None where it cannot be asked for."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def build_whole() -> None:
    """Make models that are built from here on have all their weights on every process, under ZeRO-3 too.

    transformers would divide each layer as it is made: drawing its random numbers in another order (other losses than
    under any other YAML), and leaving parameters that count as empty (no FLOPs, no fingerprint). DeepSpeed divides
    them all the same when training starts; Trainer tells transformers of ZeRO-3 again when it is made.
    """
    unset_hf_deepspeed_config()
