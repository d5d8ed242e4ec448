"""What goes together: strategy, precision, optimizer and method. Decided or refused before anything is loaded."""

import copy
import importlib.util

from transformers import Trainer, TrainingArguments

from common.console import InputError, say
from common.distributed.launch import Launch, precision_of
from common.model.memory import optimizer_name, state_bits


def choose_optimizer(wanted: str, launch: Launch, training: TrainingArguments) -> str:
    """Return "muon" or "adamw" for ``--optimizer`` ``wanted``, and say why "auto" is not Muon.

    Raises:
        InputError: Muon is wanted where it cannot work.
    """
    reason = None
    if launch.strategy.is_deepspeed:
        reason = "DeepSpeed's ZeRO cuts up the matrices that Muon needs whole; fsdp2.yaml and ddp.yaml do not"
    elif launch.offloads:
        reason = "its matrix products would run on the CPU, where fsdp2_offload.yaml keeps the parameters"
    elif optimizer_name(training) not in ("adamw_torch", "adamw_torch_fused"):
        reason = f"--optim {optimizer_name(training)} names another one"
    if wanted == "muon" and reason is not None:
        raise InputError(f"--optimizer muon: {reason}. Use --optimizer adamw.")
    if wanted == "auto" and reason is not None:
        say(f"optimizer: what --optim names, AdamW by default, not Muon: {reason}.")
    return "muon" if wanted == "muon" or (wanted == "auto" and reason is None) else "adamw"


INSTEAD = "Always there: --optim adamw_torch_fused"
# Optimizers of --optim that step inside backward: a bad step could not be left out.
INSIDE_BACKWARD = ("lomo", "adalomo", "layerwise")
NEED_A_MODEL = {"galore": "galore_torch", "apollo": "apollo_torch"}  # to be made -> their package
READ_OPTIM_ARGS = (
    "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "ademamix_8bit", "paged_ademamix_32bit",
    "paged_ademamix_8bit", "sgd", "adagrad", "rmsprop", "galore", "apollo", "grokadamw", "schedule_free",
    "stable_adamw",
)  # fmt: skip


def check_optimizer(launch: Launch, training: TrainingArguments) -> None:
    """Refuse an --optim that cannot be made here, and settings that it does not read.

    Args:
        launch: its ``optimizer`` is decided. Muon reads rate, betas and weight decay only.

    Raises:
        InputError: with what works.
    """
    name = optimizer_name(training)
    if name.endswith(INSIDE_BACKWARD):
        raise InputError(
            f"--optim {name}: it steps inside backward, so that no bad step can be left out. Use another one, or "
            "recipes/low_memory_16gb.py --step_in_backward."
        )
    if training.optim_args and (launch.optimizer == "muon" or not name.startswith(READ_OPTIM_ARGS)):
        reader = "Muon" if launch.optimizer == "muon" else f"--optim {name}"
        raise InputError(f"--optim_args {training.optim_args}: {reader} does not read them. Leave them out.")
    family = name.split("_")[0]
    if training.optim_target_modules and family not in NEED_A_MODEL:
        raise InputError(
            f"--optim_target_modules: --optim {name} trains all modules alike. Leave it out; for adapters "
            "recipes/low_memory_16gb.py has --lora_targets."
        )
    if family in NEED_A_MODEL:
        if importlib.util.find_spec(NEED_A_MODEL[family]) is None:
            raise InputError(f"--optim {name}: its package {NEED_A_MODEL[family]} is not installed. {INSTEAD}")
        if not training.optim_target_modules:
            raise InputError(f"--optim {name}: it needs --optim_target_modules, such as all-linear.")
        return
    try:
        _, made = Trainer.get_optimizer_cls_and_kwargs(training)
        for argument in training.optim_args.split(",") if training.optim_args else []:
            others = [each for each in training.optim_args.split(",") if each != argument]
            _, without = Trainer.get_optimizer_cls_and_kwargs(replaced(training, optim_args=",".join(others)))
            if without == made:
                raise InputError(f"--optim_args {argument}: it changes nothing for --optim {name}. Leave it out.")
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        settings = f" --optim_args {training.optim_args}" if training.optim_args else ""
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"--optim {name}{settings}: {reason}. {INSTEAD}") from None


def replaced(training: TrainingArguments, **changes) -> TrainingArguments:
    """Return a copy with other values. (dataclasses.replace would set up the device anew.)"""
    changed = copy.copy(training)
    vars(changed).update(changes)
    return changed


def check_combinations(launch: Launch, training: TrainingArguments, method: str) -> None:
    """Refuse what is known to go wrong together.

    Args:
        launch: its ``optimizer`` is decided.
        method: "full", "lora" or "qlora".

    Raises:
        InputError: with the reason, and what works.
    """
    strategy = launch.strategy
    low_bit = launch.optimizer != "muon" and state_bits(optimizer_name(training)) < 32
    for wrong, what, where, why, works in (
        (
            low_bit and strategy.shards_states,
            "an 8-bit or 4-bit optimizer",
            strategy,
            # https://github.com/bitsandbytes-foundation/bitsandbytes/issues/89, /1403 (FSDP, FSDP2), /1732 (DeepSpeed),
            # https://github.com/huggingface/accelerate/issues/1362 (its states cannot be saved)
            "its states are packed numbers, which cannot be divided among processes nor saved from them",
            "single_gpu.yaml or ddp.yaml, or --optim adamw_torch_fused, whose states this YAML divides",
        ),
        (
            method == "qlora" and strategy.shards_parameters,
            "QLoRA",
            strategy,
            # https://github.com/huggingface/accelerate/issues/3983: a crash, or silently loss 0 and gradients of NaN
            "4-bit weights are packed bytes: divided among processes they are no longer those numbers",
            "ddp.yaml, which leaves the weights whole, or --method lora",
        ),
        (
            method != "full" and launch.optimizer == "muon",
            "Muon for LoRA's factors",
            strategy,
            # https://arxiv.org/abs/2502.16982: for the weight matrices themselves, in training of all of them
            "Muon evens out the update of a whole weight matrix; for two factors of one nothing is known",
            "--optimizer adamw",
        ),
        (
            method != "full" and launch.building_device is not None,
            "adapters",
            "a model that one process loads for all",
            "they are added to the whole matrices",
            "fsdp2.yaml or ddp.yaml",
        ),
        (
            method != "full" and precision_of(training) == "fp8",
            "adapters",
            "fp8",
            # https://github.com/huggingface/accelerate/blob/main/src/accelerate/utils/ao.py
            "accelerate exchanges every linear layer, also those inside adapters and packed ones",
            "--mixed_precision bf16",
        ),
        (
            training.fp16 and training.use_cpu,
            "fp16",
            "cpu",
            "fp16 needs the tensor cores of a GPU; CPUs compute in fp32 or bf16",
            "accelerate_configs/cpu.yaml",
        ),
    ):
        if wrong:
            raise InputError(f"{what} under {where}: {why}. What works: {works}")
