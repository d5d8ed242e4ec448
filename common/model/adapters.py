"""LoRA and QLoRA: small trained matrices beside frozen ones.

Sources: https://arxiv.org/abs/2106.09685 (LoRA), https://arxiv.org/abs/2305.14314 (QLoRA: the frozen ones in 4 bits).
"""

import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from common.console import InputError, say
from common.corpus.sources import mark_as_cache
from common.model.pretrained import pretrained_model

ALL_LINEAR = "all-linear"  # peft's name for every linear layer but the head: what learns best, by the QLoRA paper
MERGED = "merged"  # folder of the plain checkpoint, inside the run's folder


def four_bits(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return QLoRA's quantization: NF4 with quantized scales, 4.13 bits a number; products in ``compute_dtype``."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def check_adapters(model: PreTrainedModel, rank: int, targets: list[str]) -> list[str]:
    """Return the last parts of the names of the layers that ``targets`` means: q_proj, up_proj.

    Args:
        model: may be on the meta device.
        targets: last parts of layers' names, or just ALL_LINEAR.

    Raises:
        InputError: a target is not a linear layer of the model, or it is the head, or the rank is below 1.
    """
    if rank < 1:
        raise InputError(f"--lora_rank {rank}: must be at least 1.")
    kinds = (torch.nn.Linear, Conv1D)  # GPT-2's linear layers are Conv1D
    linear = {name.rpartition(".")[2]: module for name, module in model.named_modules() if isinstance(module, kinds)}
    known = sorted(name for name, module in linear.items() if module is not model.get_output_embeddings())
    wanted = known if targets == [ALL_LINEAR] else targets
    unknown = sorted(set(wanted) - set(known))
    if unknown or not known:
        raise InputError(
            f"--lora_targets: {type(model).__name__} has no linear layers {' '.join(unknown)} beside its head. It has: "
            f"{' '.join(known)}. Or leave the flag out for all of them."
        )
    return wanted


def add_adapters(model: PreTrainedModel, rank: int, targets: list[str], train_embedding: bool) -> PeftModel:
    """Freeze ``model`` and add trained matrices of ``rank``, in fp32, beside its linear layers ``targets``.

    Args:
        targets: last parts of the layers' names, or just ALL_LINEAR.
        train_embedding: also train the whole input embedding, in fp32. A tied head keeps the embedding's old weights.

    Raises:
        InputError: see ``check_adapters``.
    """
    wanted = check_adapters(model, rank, targets)
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,  # the product of the two matrices is scaled by alpha / rank
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        modules_to_save=[embedding.rpartition(".")[2]] if train_embedding else None,
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            # The embedding may be in bf16, for which the optimizer's steps are too small.
            parameter.data = parameter.data.float()
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    say(f"LoRA: {trained:,} parameters are trained, rank {rank} beside {', '.join(wanted)}")
    return adapted


def unpacked_gguf(
    place: str, tokenizer: PreTrainedTokenizerBase, context_length: int, dtype: torch.dtype, folder: str
) -> str:
    """Return a folder with the weights of the .gguf file ``place`` in ``dtype``; make it in ``folder`` if needed.

    QLoRA needs this, because transformers cannot quantize weights while it reads a .gguf file. The folder's name has
    the file's size and time, so another file of the same name gets another folder.
    """
    file = Path(place).resolve().stat()
    precision = str(dtype).removeprefix("torch.")
    unpacked = Path(folder) / f"{Path(place).stem}-{file.st_size}-{file.st_mtime_ns}-{precision}"
    if not unpacked.exists():
        say(f"{place}: its weights are unpacked into {unpacked}")
        model = pretrained_model(place, tokenizer, context_length, dtype)
        # After an interruption, half of the weights must not be taken for all of them.
        partial = unpacked.with_name(f"{unpacked.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(mark_as_cache(partial))
        tokenizer.save_pretrained(partial)
        partial.rename(unpacked)
    return str(unpacked)
