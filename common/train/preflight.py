"""Preflight: what this launch is going to do, in one table with reasons, before data and weights are touched.

Whatever would fail late, or would train something else than was asked for, is refused here, with the YAML or flag that
works.
"""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainingArguments

from common.arguments import SharedArguments
from common.console import InputError, duration_in_words, say
from common.distributed.accelerator import device_name
from common.distributed.context_parallel import check_parallelism
from common.distributed.hardware import compiled_code_folder
from common.distributed.launch import Launch, check_launch, precision_of
from common.distributed.strategy import FSDP2, ZERO3
from common.distributed.ulysses import check_heads
from common.distributed.workarounds import shard_on_cpus, take_over_recompute
from common.model.counts import cpu_flops
from common.model.memory import Setting, optimizer_name, predict
from common.model.placement import check_expert_plan, check_plan
from common.model.presets import ModelSize, PretrainedSize
from common.model.recompute import choose_recompute
from common.run.branch import branch_started, check_branch
from common.run.disk import check_disk_space, check_path
from common.run.folder import check_folder
from common.run.init_from import check_resumable
from common.run.lock import lock_folder
from common.run.tracking import prepare_trackers
from common.system import GIB, take_cores, usable_cores
from common.train.batch import card_gib, derive_micro_batch, set_batch
from common.train.combinations import check_combinations, check_optimizer, choose_optimizer
from common.train.eval_tasks import check_eval_tasks
from common.train.schedule import check_schedule, leave_out_settings_of_another
from common.train.setting import setting_of_run

LONG_STEP_SECONDS = 60  # on a CPU: a thousand steps would take a day
STATE_DICT_TYPES = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")


def preflight(
    recipe: str,
    launch: Launch,
    size: ModelSize | PretrainedSize | None,
    shared: SharedArguments,
    training: TrainingArguments,
    learning_rates: dict[str, float] | None = None,
    method: str = "full",
) -> Launch:
    """Print what is going to happen, refuse what cannot; return the launch with its optimizer and rows a step.

    Args:
        recipe: file name, as in run.json.
        size: of the model to come. None, or a size that needs a tokenizer: neither memory nor disk is checked. With a
            guessed vocabulary it decides the micro-batch, and nothing is refused.
        learning_rates: of "muon" and of "adamw"; ``training`` gets one of them if its own is 0.
        method: "full", "lora" or "qlora".

    Raises:
        InputError: with what works.
    """
    check_path(training.output_dir)
    check_path(shared.cache_dir, "--cache_dir")
    prepare_trackers(training, shared.swanlab)
    check_launch(launch, training)
    take_over_recompute(launch, training)
    shard_on_cpus(launch, training)
    launch = choose_recompute(shared.recompute, launch, training)
    model = None if size is None else size.planned(shared.context_length)
    check_checkpoints(launch, training)
    check_deepspeed(training)
    say_launch(model, launch, shared, training, method)
    check_parallelism(launch, shared.context_length, shared.packing == "isolated")
    if model is not None:
        check_plan(model, launch.tensor_parallel)
        check_expert_plan(model, launch.expert_parallel)
        check_heads(model, launch)
    launch = replace(launch, optimizer=choose_optimizer(shared.optimizer, launch, training))
    setting = planned_setting(model, launch, training, shared.context_length)
    derive_micro_batch(model, setting, launch, training, shared, card_gib(training))
    launch = replace(launch, rows_per_step=set_batch(launch, training, shared.tokens_per_step, shared.context_length))
    check_accumulation(training)
    say_time_on_cpu(model, size, training, launch.rows_per_step * shared.context_length)
    if learning_rates is not None and training.learning_rate == 0:
        training.learning_rate = learning_rates[launch.optimizer]
    check_rate(launch, shared, training)
    check_combinations(launch, training, method)
    check_eval_tasks(launch, shared, training)
    if model is not None and not size.guessed:
        say(f"memory: {memory(model, launch, training, shared.context_length)}")
        check_disk_space(training.output_dir, model.num_parameters(), launch.strategy, training)
        say(f"disk: checkpoints of {model.num_parameters():,} parameters fit {training.output_dir}")
    check_branch(recipe, shared, training)
    if shared.branch_from and not branch_started(training.output_dir):
        check_resumable(shared.branch_from, launch)  # the same again when it is loaded, but by then there is a folder
    say(f"folder: {check_folder(training.output_dir, recipe, shared, training)}")
    if not shared.probe and Path(training.output_dir).exists():
        lock = lock_folder(training.output_dir)
        if lock is not None:
            lock.release()  # it is taken for good when the run is opened
    return launch


def check_rate(launch: Launch, shared: SharedArguments, training: TrainingArguments) -> None:
    """Refuse a schedule or an optimizer that cannot be, and print the optimizer and its learning rate.

    Raises:
        InputError: with what works.
    """
    if "lr_scheduler_type" in shared.given and "lr_scheduler_kwargs" not in shared.given:
        leave_out_settings_of_another(training)
    check_schedule(training)
    check_optimizer(launch, training)
    name = optimizer_name(training)
    if launch.optimizer == "muon":
        name = "Muon for the layers' matrices, AdamW for the rest"
    say(f"optimizer: {name}; learning rate: {training.learning_rate:g}")


def say_launch(
    model: PreTrainedModel | None, launch: Launch, shared: SharedArguments, training: TrainingArguments, method: str
) -> None:
    """Print what computes, in which precision, compiled and recomputed or not.

    Raises:
        InputError: the model's family has no recompute.
    """
    say(f"processes: {processes(launch, training)}")
    threads = take_cores(launch.local_processes) if launch.offloads else 0
    moved = f", offloading to main memory, with {threads} threads there" if launch.offloads else ""
    shared_out = f", {launch.dimensions}" if launch.dimensions else ""
    say(f"strategy: {launch.strategy}{shared_out}{moved}; trained: {method}")
    say(f"precision: {precision(training, shared)}")
    if launch.recompute and not getattr(model, "supports_gradient_checkpointing", True):
        name = type(model).__name__
        raise InputError(f"recompute ({launch.recompute}): transformers has none for {name}. Leave it out.")
    recompute = f"yes ({launch.recompute})" if launch.recompute else "no"
    folder = compiled_code_folder(launch.compiler, launch.machines, shared.cache_dir)
    kept = "" if folder is None else f", compiled code in {folder}"
    say(f"compile: {launch.compiler} (the YAML's dynamo_config){kept}; recompute: {recompute}")


def processes(launch: Launch, training: TrainingArguments) -> str:
    """Return how many processes there are, on how many machines, and what they run on."""
    devices = "CPU" if training.use_cpu else f"{torch.accelerator.device_count()} visible devices"
    machines = f"{launch.machines} machine{'s' * (launch.machines > 1)}"
    return f"{launch.processes} on {machines}, {launch.local_processes} here on {devices}"


def precision(training: TrainingArguments, shared: SharedArguments) -> str:
    """Return what is computed in, on which device, and what says so."""
    asked = precision_of(training)
    kind = {"no": "fp32", "fp8": "fp8 in the layers, bf16 elsewhere,"}.get(asked, asked)
    where = "CPU" if training.device.type == "cpu" else device_name(training.device)
    scaled = ", with a loss scaler" if training.fp16 else ""
    flags = [f"--{name}" for name in ("bf16", "fp16") if name in shared.given]
    decided_by = " ".join(flags) if flags else "the YAML's mixed_precision"
    return f"{kind} on {where}{scaled} ({decided_by})"


def planned_setting(
    model: PreTrainedModel | None, launch: Launch, training: TrainingArguments, context_length: int
) -> Setting:
    """Return the setting of this run; of a model that is not known yet, no more than the length of its rows."""
    if model is None:
        return Setting(rows=1, context_length=context_length)
    return replace(setting_of_run(model, launch, training, context_length), fused_loss=True)


def memory(model: PreTrainedModel, launch: Launch, training: TrainingArguments, context_length: int) -> str:
    """Return what a card needs: the total of --plan. A run that needs more than there is may still be tried."""
    need = predict(model, planned_setting(model, launch, training, context_length)).total / GIB
    there = card_gib(training)
    if there is None:
        return f"{need:.2f} GiB a process planned, as on a GPU"
    verdict = "" if need <= there else ". It will hardly fit: --plan names the switches that help"
    return f"{need:.2f} of {there:.4g} GiB a card planned{verdict}"


def say_time_on_cpu(
    model: PreTrainedModel | None, size: ModelSize | PretrainedSize | None, training: TrainingArguments, tokens: int
) -> None:
    """Print how long a step of so many tokens takes on a CPU, where that is long, and what fits a CPU."""
    if model is None or training.device.type != "cpu":
        return
    seconds = 6 * model.num_parameters() * tokens / cpu_flops(usable_cores())
    if seconds > LONG_STEP_SECONDS:
        fitting = "a size that fits your text and this machine: --data FILES --target_parameters auto"
        fitting = f"; {fitting}" if isinstance(size, ModelSize) else ""
        say(
            f"note: {model.num_parameters() / 1e6:.0f}M parameters on a CPU, {tokens:,} tokens a step: about "
            f"{duration_in_words(seconds)} a step{fitting}"
        )


def check_checkpoints(launch: Launch, training: TrainingArguments) -> None:
    """Refuse settings of FSDP and ZeRO-3 with which a run trains, but does not save its model."""
    if launch.strategy.is_fsdp and launch.strategy != FSDP2:
        raise InputError("the YAML has FSDP of version 1, accelerate's default. Write fsdp_version: 2 in fsdp_config.")
    if launch.strategy == FSDP2 and launch.state_dict_type not in STATE_DICT_TYPES:
        raise InputError(
            f"fsdp_state_dict_type {launch.state_dict_type or '(none)'}: checkpoints are not written so. Write one of "
            f"{', '.join(STATE_DICT_TYPES)} in fsdp_config."
        )
    if launch.strategy == ZERO3:
        zero = training.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise InputError(
                "ZeRO-3 would not save the model as safetensors. Write zero3_save_16bit_model: true in the YAML's "
                "deepspeed_config, or stage3_gather_16bit_weights_on_model_save in its JSON."
            )


def check_deepspeed(training: TrainingArguments) -> None:
    """Refuse DeepSpeed's own optimizer and schedule: the recipe's would be ignored."""
    if training.deepspeed_plugin is None:
        return
    config = training.deepspeed_plugin.deepspeed_config
    own = [section for section in ("optimizer", "scheduler") if section in config]
    if own:
        raise InputError(f"{' and '.join(own)} in the deepspeed_config_file: the recipe has its own. Take it out.")


def check_accumulation(training: TrainingArguments) -> None:
    """Refuse numbers in DeepSpeed's configuration that the recipe decides. Trainer would refuse them later."""
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
