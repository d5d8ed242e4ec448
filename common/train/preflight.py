"""Preflight: what this launch is going to do, in one table with reasons, before data and weights are touched.

Whatever would fail late, or train something else than asked, is refused here with the YAML or flag that works.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainingArguments

from common.arguments import SharedArguments
from common.console import InputError, say
from common.distributed.context_parallel import check_parallelism
from common.distributed.launch import check_launch
from common.distributed.strategy import offloads, precision_of, recompute_owner, strategy_of
from common.model.memory import predict
from common.run.folder import check_disk_space, check_folder, lock_folder
from common.system import GIB, take_cores
from common.train.batch import card_gib, derive_micro_batch, set_batch
from common.train.plan import setting_of_run
from common.train.schedule import check_schedule

SHARDED = ("zero1", "zero2", "zero3", "fsdp2")
LOW_BIT = ("8bit", "4bit")  # in the names of --optim

# What is asked, the strategies under which it goes wrong, why, and what works.
KNOWN_BAD = [
    (
        "an 8-bit or 4-bit optimizer",
        SHARDED,
        # https://github.com/bitsandbytes-foundation/bitsandbytes/issues/89 and /1403 (FSDP, FSDP2), /1732 (DeepSpeed),
        # https://github.com/huggingface/accelerate/issues/1362 (its states cannot be saved)
        "its states are packed numbers, which cannot be divided among processes nor saved from them",
        "single_gpu.yaml or ddp.yaml, or --optim adamw_torch_fused, whose states this YAML divides",
    ),
    (
        "QLoRA",
        ("zero3", "fsdp2"),
        # https://github.com/huggingface/accelerate/issues/3983: a crash, or loss 0 and gradients of NaN, without a word
        "4-bit weights are packed bytes: divided among processes they are no longer those numbers",
        "ddp.yaml, which leaves the weights whole, or --method lora",
    ),
    (
        "Muon for LoRA's factors",
        ("single", "ddp", *SHARDED),
        # https://arxiv.org/abs/2502.16982: for the weight matrices themselves, in training of all of them
        "Muon evens out the update of a whole weight matrix; for two factors of one nothing is known",
        "--optimizer adamw",
    ),
    (
        "adapters",
        ("fp8",),
        # https://github.com/huggingface/accelerate/blob/main/src/accelerate/utils/ao.py
        "accelerate exchanges every linear layer, those inside adapters and packed ones, too",
        "--mixed_precision bf16",
    ),
    (
        "fp16",
        ("cpu",),
        "fp16 needs the tensor cores of a GPU; CPUs compute in fp32 or bf16",
        "accelerate_configs/cpu.yaml",
    ),
]


def preflight(
    recipe: str,
    shared: SharedArguments,
    training: TrainingArguments,
    model: PreTrainedModel | None = None,
    method: str = "full",
    learning_rates: dict[str, float] | None = None,
    guessed: bool = False,
) -> tuple[int, str]:
    """Say what is going to happen, refuse what cannot; return rows a step over all processes, and the optimizer.

    Args:
        recipe: file name, as in run.json.
        model: of the size to come, on the meta device; None if it is not known yet: then neither memory nor disk is
            looked at here.
        method: "full", "lora" or "qlora".
        guessed: ``model`` is about that size only: it decides the micro-batch then, and nothing is refused for it.
        learning_rates: of "muon" and of "adamw", one of which ``training`` gets if its own is 0.

    Raises:
        InputError: with what works.
    """
    check_launch(training)
    strategy, compiled = strategy_of(training), os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    check_checkpoints(training, strategy)
    if training.deepspeed_plugin is not None:
        check_deepspeed(training)
    say(f"processes: {processes(training)}")
    moved = f", offloading to main memory, with {take_cores()} threads there" if offloads(training) else ""
    say(f"strategy: {strategy}{moved}; trained: {method}")
    say(f"precision: {precision(training)}")
    owner = recompute_owner() or ("--gradient_checkpointing" if training.gradient_checkpointing else None)
    if owner and not getattr(model, "supports_gradient_checkpointing", True):
        raise InputError(f"recompute ({owner}): transformers has none for {type(model).__name__}. Leave it out.")
    say(f"compile: {compiled} (the YAML's dynamo_config); recompute: {f'yes ({owner})' if owner else 'no'}")
    check_parallelism(training, shared.context_length, shared.packing == "isolated")
    optimizer = choose_optimizer(shared.optimizer, training)
    derive_micro_batch(model, training, shared, optimizer)
    rows_per_step = set_batch(training, shared.tokens_per_step, shared.context_length)
    check_accumulation(training)
    low_bit = optimizer != "muon" and any(bits in optimizer_name(training) for bits in LOW_BIT)
    by_muon = "Muon for the layers' matrices, AdamW for the rest"
    if learning_rates is not None and training.learning_rate == 0:
        training.learning_rate = learning_rates[optimizer]
    check_schedule(training)
    name = by_muon if optimizer == "muon" else optimizer_name(training)
    say(f"optimizer: {name}; learning rate: {training.learning_rate:g}")
    check_pairs(
        strategy,
        {
            "an 8-bit or 4-bit optimizer": low_bit,
            "QLoRA": method == "qlora",
            "Muon for LoRA's factors": optimizer == "muon" and method != "full",
        },
    )
    if training.use_cpu:
        check_pairs("cpu", {"fp16": training.fp16})
    if model is not None and not guessed:
        say(f"memory: {memory(model, training, shared.context_length, optimizer)}")
        check_disk_space(training.output_dir, model.num_parameters(), training)
        say(f"disk: checkpoints of {model.num_parameters():,} parameters fit {training.output_dir}")
    say(f"folder: {check_folder(training.output_dir, recipe, shared, training)}")
    if not shared.probe and Path(training.output_dir).exists() and (lock := lock_folder(training.output_dir)):
        lock.release()  # taken for good when the folder is claimed
    return rows_per_step, optimizer


def check_pairs(strategy: str, asked: dict[str, bool]) -> None:
    """Refuse what is asked and known to go wrong under ``strategy``."""
    for what, strategies, why, works in KNOWN_BAD:
        if asked.get(what) and strategy in strategies:
            raise InputError(f"{what} under {strategy}: {why}. What works: {works}")


def optimizer_name(training: TrainingArguments) -> str:
    return getattr(training.optim, "value", training.optim)


def processes(training: TrainingArguments) -> str:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    devices = "CPU" if training.use_cpu else f"{torch.accelerator.device_count()} visible devices"
    machines = max(1, training.world_size // local)
    return f"{training.world_size} on {machines} machine{'s' * (machines > 1)}, {local} here on {devices}"


def precision(training: TrainingArguments) -> str:
    kind = {"no": "fp32", "fp8": "fp8 in the layers, bf16 elsewhere,"}.get(asked := precision_of(training), asked)
    names = torch.get_device_module(training.device)
    where = names.get_device_name() if hasattr(names, "get_device_name") else training.device.type.upper()
    scaled = ", with a loss scaler" if training.fp16 else ""
    return f"{kind} on {where}{scaled} (the YAML's mixed_precision)"


def memory(model: PreTrainedModel, training: TrainingArguments, context_length: int, optimizer: str) -> str:
    """Return what a card needs, as --plan predicts it; more than there is may still be tried."""
    setting = replace(setting_of_run(model, training, context_length, optimizer), fused_loss=True)
    need = predict(model, setting).total / GIB
    if (there := card_gib(training)) is None:
        return f"{need:.1f} GiB a process predicted, as on a GPU"
    verdict = "" if need <= there else ". It will hardly fit: --plan has the switches that help"
    return f"{need:.1f} of {there:.1f} GiB a card predicted{verdict}"


def check_checkpoints(training: TrainingArguments, strategy: str) -> None:
    """Refuse settings of FSDP and ZeRO-3 that train, and then leave no model behind, or an unknown strategy."""
    if strategy == "fsdp1":
        raise InputError("the YAML has FSDP of version 1, accelerate's default. Write fsdp_version: 2 in fsdp_config.")
    if strategy == "fsdp2" and "FULL" not in os.environ.get("FSDP_STATE_DICT_TYPE", ""):
        raise InputError(
            "fsdp_state_dict_type: the model would not be saved as safetensors. Write FULL_STATE_DICT in fsdp_config."
        )
    if strategy == "zero3":
        zero = training.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise InputError(
                "ZeRO-3 would not save the model as safetensors. Write zero3_save_16bit_model: true in the YAML's "
                "deepspeed_config, or stage3_gather_16bit_weights_on_model_save in its JSON."
            )


def check_deepspeed(training: TrainingArguments) -> None:
    """Refuse DeepSpeed's own optimizer and schedule: the recipe's would be left out."""
    config = training.deepspeed_plugin.deepspeed_config
    if own := [section for section in ("optimizer", "scheduler") if section in config]:
        raise InputError(f"{' and '.join(own)} in the deepspeed_config_file: the recipe has its own. Take it out.")


def check_accumulation(training: TrainingArguments) -> None:
    """Refuse numbers in DeepSpeed's configuration that the recipe decides, before Trainer does at the start."""
    if training.deepspeed_plugin is None:
        return
    config = training.deepspeed_plugin.deepspeed_config
    for key, value, flag in (
        ("gradient_accumulation_steps", training.gradient_accumulation_steps, "--tokens_per_step"),
        ("gradient_clipping", training.max_grad_norm, "--max_grad_norm"),
        ("train_micro_batch_size_per_gpu", training.per_device_train_batch_size, "--per_device_train_batch_size"),
    ):
        if config.get(key, "auto") not in ("auto", value):
            raise InputError(
                f"{key}: {config[key]} in DeepSpeed's configuration, {value} by the recipe's {flag}. The recipe owns "
                f"it: write {key}: auto."
            )


def choose_optimizer(wanted: str, training: TrainingArguments) -> str:
    """Return "muon" or "adamw" for ``--optimizer`` ``wanted``, and say why "auto" is not Muon.

    Raises:
        InputError: Muon is wanted where it cannot be had.
    """
    reason, named = None, getattr(training.optim, "value", training.optim)
    if training.deepspeed_plugin is not None:
        reason = "DeepSpeed's ZeRO cuts up the matrices that Muon needs whole; fsdp2.yaml and ddp.yaml do not"
    elif offloads(training):
        reason = "its matrix products would be the CPU's, where fsdp2_offload.yaml keeps the parameters"
    elif named not in ("adamw_torch", "adamw_torch_fused"):
        reason = f"--optim {named} names another one"
    if wanted == "muon" and reason is not None:
        raise InputError(f"--optimizer muon: {reason}. Use --optimizer adamw.")
    if wanted == "auto" and reason is not None:
        say(f"optimizer: what --optim names, AdamW by default, not Muon: {reason}.")
    return "muon" if wanted == "muon" or (wanted == "auto" and reason is None) else "adamw"
