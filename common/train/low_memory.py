"""Check what recipes/low_memory_16gb.py can do on this machine, before anything is loaded."""

import importlib.util

import torch
from transformers import TrainingArguments

from common.arguments import SharedArguments
from common.console import InputError, say
from common.distributed.launch import Launch
from common.model.memory import optimizer_name, state_bits
from common.train.low_memory_adamw import LowMemoryAdamW

OLDEST_GPU = 6  # compute capability. Source: https://huggingface.co/docs/bitsandbytes/installation
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


def compute_dtype(training: TrainingArguments) -> torch.dtype:
    """Return the dtype in which a run computes under the YAML's mixed_precision."""
    return PRECISIONS["bf16" if training.bf16 else "fp16" if training.fp16 else "no"]


def trained_dtype(wanted: str, training: TrainingArguments) -> torch.dtype:
    """Return the dtype of the weights for --method full.

    Args:
        wanted: --weights: "bf16", "fp32", or "auto": bf16 where the YAML says bf16, else fp32.

    Raises:
        InputError: bf16 under the fp16 scaler.
    """
    if wanted == "bf16" and training.fp16:
        raise InputError("--weights bf16: with mixed_precision fp16 the masters are fp32. Use --weights auto.")
    return torch.bfloat16 if wanted == "bf16" or (wanted == "auto" and training.bf16) else torch.float32


def check_method(
    method: str, weights: str, launch: Launch, shared: SharedArguments, training: TrainingArguments
) -> None:
    """Refuse combinations of ``--method`` that cannot work, cannot be saved, or cannot be merged.

    Raises:
        InputError: with the switch that works.
    """
    optimizer = optimizer_name(training)
    if shared.tokenizer == "train":
        raise InputError("--tokenizer train: the weights only know the ids of their own tokenizer. Leave it out.")
    if shared.init_from:
        raise InputError("--init_from: not in this recipe. Give the checkpoint or the output folder as --model.")
    if shared.optimizer != "adamw":
        raise InputError(f"--optimizer {shared.optimizer}: here it is AdamW, as --optim says. Leave the flag out.")
    if method != "full" and weights != "auto":
        raise InputError(
            f"--weights {weights}: with --method {method} the weights are frozen, and in the dtype of mixed_precision; "
            "the adapters are in fp32. Leave it out."
        )
    if launch.strategy.shards_states:
        why = "this recipe keeps all of the model on one card"
        if state_bits(optimizer) == 8:
            why = "8-bit states are not saved rightly (bitsandbytes #1403)"
        if method == "qlora":
            why = "weights in 4 bits cannot be gathered and saved"
        raise InputError(
            f"--method {method} --optim {optimizer} under FSDP or DeepSpeed (ZeRO): {why}. Use "
            "accelerate_configs/single_gpu.yaml, several cards with ddp.yaml, or recipes/openwebtext_continue.py, "
            "whose weights and states can be sharded."
        )
    if method == "qlora":
        check_bitsandbytes("--method qlora", "--method lora --optim adamw_torch", training.device)
    if state_bits(optimizer) == 8:
        check_bitsandbytes(f"--optim {optimizer}", "--optim adamw_torch", training.device)


def check_bitsandbytes(flag: str, instead: str, device: torch.device) -> None:
    """Raise InputError unless bitsandbytes is installed and can quantize a block of numbers on ``device``.

    Args:
        flag: the flag that needs bitsandbytes.
        instead: flags that work without it.
    """
    without = f"Without bitsandbytes: {instead}"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"{flag} needs a package: pip install 'bitsandbytes>=0.50,<0.51'. {without}")
    if device.type not in ("cuda", "xpu"):
        needed = "a GPU, one of NVIDIA, AMD or Intel"
        raise InputError(f"{flag}: bitsandbytes needs {needed}, and this runs on {device.type}. {without}")
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < OLDEST_GPU:
            raise InputError(
                f"{flag}: bitsandbytes has no code for {torch.cuda.get_device_name(device)} (compute capability "
                f"{major}.{minor}, at least {OLDEST_GPU}.0 is needed). {without}"
            )
    try:
        from bitsandbytes.functional import quantize_blockwise

        quantize_blockwise(torch.zeros(256, device=device))[0].cpu()
    except Exception as error:  # its library is missing for this CUDA version or this card, or cannot be loaded
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        found = f"{flag}: bitsandbytes does not work here ({reason}). What it needs: python -m bitsandbytes"
        raise InputError(f"{found}. {without}") from None


def check_step_in_backward(training: TrainingArguments, shared: SharedArguments) -> None:
    """Refuse everything that needs all gradients at once: several processes or micro-batches, clipping, fp16's scaler.

    Raises:
        InputError: naming the flags.
    """
    rows, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    tokens = rows * shared.context_length
    if accumulated == 0:  # not derived yet, for --plan
        accumulated = max(1, shared.tokens_per_step // tokens)
    flag = "--step_in_backward: each gradient is used and dropped at once, so"
    if training.world_size > 1 or training.deepspeed_plugin is not None:
        raise InputError(f"{flag} it cannot be averaged over processes. Use one process, or leave the flag out.")
    if accumulated > 1:
        raise InputError(
            f"{flag} {accumulated} micro-batches cannot be added up. Use --tokens_per_step {tokens} and "
            "no --gradient_accumulation_steps (one micro-batch a step), or leave the flag out."
        )
    if training.max_grad_norm:
        raise InputError(
            f"{flag} --max_grad_norm {training.max_grad_norm:g} comes too late. Use --max_grad_norm 0, or leave the "
            "flag out."
        )
    if shared.on_loss_spike == "skip":
        raise InputError(f"{flag} a step cannot be left out (--on_loss_spike skip). Use --on_loss_spike stop or warn.")
    if training.fp16:
        raise InputError(
            f"{flag} the fp16 scaler, which skips steps with infinite gradients, cannot work. Use "
            "--mixed_precision bf16 before the recipe (a card since Ampere), or leave the flag out."
        )


def optimizer_for(
    dtype: torch.dtype | None, step_in_backward: bool, training: TrainingArguments
) -> tuple[type[LowMemoryAdamW], dict] | None:
    """Return LowMemoryAdamW and its arguments, for Trainer's ``optimizer_cls_and_kwargs``.

    None if Trainer's own optimizer will do, the one that --optim names: for weights in fp32 and steps after backward.

    Args:
        dtype: of the trained parameters; None: adapters, which are in fp32.

    Raises:
        InputError: --optim names another optimizer than AdamW, or a variant that LowMemoryAdamW does not have.
    """
    if dtype != torch.bfloat16 and not step_in_backward:
        return None
    name = optimizer_name(training)
    if name not in ("adamw_8bit", "adamw_bnb_8bit", "adamw_torch", "adamw_torch_fused"):
        raise InputError(
            f"--optim {name}: weights in bf16 and steps inside backward need an AdamW of their own. Use --optim "
            "adamw_8bit (or adamw_torch: states in fp32), or --weights fp32 without --step_in_backward."
        )
    weights = "weights rounded stochastically to bf16" if dtype == torch.bfloat16 else "weights in fp32"
    when = "inside backward" if step_in_backward else "after backward"
    say(f"optimizer: AdamW with states in {state_bits(name)} bits, {weights}, stepping {when}")
    return LowMemoryAdamW, dict(
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        state_bits=state_bits(name),
        in_backward=step_in_backward,
        seed=training.seed,
    )
