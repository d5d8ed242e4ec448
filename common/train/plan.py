"""--plan: the memory that a run needs, and what would make it fit, before anything is loaded.

The plan goes the same way as a launch: the same checks refuse it, and the same code divides a step into micro-batches.
"""

import json
from dataclasses import replace
from functools import partial

from transformers import PreTrainedModel, TrainingArguments

from common.arguments import SharedArguments
from common.command_line import launch_command
from common.console import InputError, say
from common.distributed.accelerator import card_bytes
from common.distributed.context_parallel import check_parallelism
from common.distributed.launch import Launch
from common.distributed.ulysses import check_heads
from common.model.counts import parameter_report
from common.model.memory import Setting, main_memory_bytes, predict
from common.model.placement import check_expert_plan, check_plan
from common.model.recompute import choose_recompute
from common.system import GIB
from common.train.advice import Switch, advised, described, published_that_fit
from common.train.batch import card_gib, derive_micro_batch, set_batch
from common.train.combinations import check_combinations, choose_optimizer, replaced
from common.train.setting import (
    planned_launch,
    setting_of_run,
    setting_of_trainer,
    take_precision_of_yaml,
    with_graphs,
    yaml_to_plan,
)


def print_plan(
    recipe: str,
    model: PreTrainedModel,
    launch: Launch,
    shared: SharedArguments,
    training: TrainingArguments,
    own_optimizer: tuple[type, dict] | None = None,
    method: str | None = None,
    continues: bool = False,
) -> None:
    """Print what training ``model`` (on the meta device) needs on each card, whether it fits, and if not what does.

    Args:
        recipe: file name.
        own_optimizer, method: those of recipes/low_memory_16gb.py.
        continues: the run continues published weights, so other published ones are an alternative.

    Raises:
        InputError: the launch that is planned would be refused.
    """
    path, training = yaml_to_plan(shared, launch, training), replaced(training)
    if path is not None:
        take_precision_of_yaml(path, training)
        training.use_cpu = False  # a YAML that is planned for is that of a card, whatever is here
    launch = planned_launch(path, launch, shared)
    launch = checked_launch(path, model, launch, shared, training, method)
    setting = setting_of_run(model, launch, training, shared.context_length, own_optimizer)
    setting = with_graphs(model, replace(setting, method=method))
    limit = card_gib(training) if shared.plan_memory_gib is None else shared.plan_memory_gib
    setting = with_micro_batch(model, setting, launch, shared, training, limit)
    counts = parameter_report(model)
    active = "" if counts["active"] == counts["total"] else f", of which a token meets {counts['active']:,}"
    vocabulary = model.get_output_embeddings().weight.shape[0]
    say(f"planned for {path or 'the YAML of this launch'}: {described(setting)}")
    if launch.row_pieces > 1:
        say(f"  ({launch.row_pieces} cards share each row of {shared.context_length:,} tokens)")
    say(f"{counts['total']:,} parameters{active}, vocabulary of {vocabulary:,} rows. Each card, in GiB:")
    need, moved = predict(model, setting), main_memory_bytes(model, setting)
    figures = need.as_json(limit)
    for name, value in vars(need).items():
        say(f"  {name:12}{value / GIB:8.2f}")
    say(f"  {'total':12}{need.total / GIB:8.2f}")
    if moved:
        say(f"  main memory{moved / GIB:9.2f}, of all cards together, for what is offloaded")
        figures["main_memory_gib"] = round(moved / GIB, 3)
    say(verdict(need.total / GIB, limit))
    if figures["fits"] is False:
        say(advised(model, setting, limit, partial(planned_command, recipe, path, shared, launcher_flags(launch))))
        if continues and setting.processes == 1:
            say(others_that_fit(setting, limit, shared))
    if shared.plan_json:
        say(json.dumps(figures))


def checked_launch(
    path: str | None,
    model: PreTrainedModel,
    launch: Launch,
    shared: SharedArguments,
    training: TrainingArguments,
    method: str | None,
) -> Launch:
    """Return the launch that is planned with its optimizer and recompute, as ``preflight`` decides them.

    Raises:
        InputError: ``preflight`` would refuse it, with the same words.
    """
    try:
        check_parallelism(launch, shared.context_length, shared.packing == "isolated")
        check_plan(model, launch.tensor_parallel)
        check_expert_plan(model, launch.expert_parallel)
        check_heads(model, launch)
    except InputError as error:
        of_plan = path is not None and "--num_processes" in str(error)
        meant = " In a plan, --plan_processes stands for --num_processes." if of_plan else ""
        raise InputError(f"{path or 'this launch'} would be refused: {error}{meant}") from None
    launch = replace(launch, optimizer=choose_optimizer(shared.optimizer, launch, training))
    launch = choose_recompute(shared.recompute, launch, training)
    check_combinations(launch, training, method or "full")
    return launch


def with_micro_batch(
    model: PreTrainedModel,
    setting: Setting,
    launch: Launch,
    shared: SharedArguments,
    training: TrainingArguments,
    limit_gib: float | None,
) -> Setting:
    """Return ``setting`` with the micro-batch of the run, which is printed.

    Raises:
        InputError: the tokens of a step cannot be divided among the cards.
    """
    derive_micro_batch(model, setting, launch, training, shared, limit_gib)
    set_batch(launch, training, shared.tokens_per_step, shared.context_length)
    rows, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps > 1
    return replace(setting, rows=rows, accumulated=accumulated)


def verdict(need_gib: float, limit_gib: float | None) -> str:
    """Return in a sentence whether a run fits a card."""
    if limit_gib is None:
        return (
            f"It needs {need_gib:.2f} GiB on each card. --plan_memory_gib 16 says whether a card of 16 GiB is enough."
        )
    if need_gib > limit_gib:
        return f"It does not fit {limit_gib:.4g} GiB: {need_gib - limit_gib:.2f} GiB are missing on each card."
    return f"It fits {limit_gib:.4g} GiB with {limit_gib - need_gib:.2f} to spare. How long it takes: --plan --probe."


NOT_OF_THE_RUN = {"plan", "probe", "plan_json", "plan_config", "plan_processes", "plan_memory_gib"}
OF_THE_TEXT = ("data", "text_field", "encoding")


def launcher_flags(launch: Launch) -> list[str]:
    """Return the flags of accelerate launch for the cards of ``launch``."""
    if launch.processes == 1:
        return []
    flags = [f"--num_processes {launch.processes}"]
    if launch.row_pieces * launch.replicas > 1 or launch.divided:  # the YAML's own size may be for other cards
        flags.append(f"--parallelism_config_dp_shard_size {launch.shards}")
    return flags


def planned_command(
    recipe: str, yaml: str | None, shared: SharedArguments, launcher: list[str], found: list[Switch]
) -> str:
    """Return the command of the run that was planned, with the switches that make it fit.

    Args:
        launcher: flags of accelerate launch.
    """
    flags = {name: value for name, value in shared.given.items() if name not in NOT_OF_THE_RUN}
    for switch in found:
        flags |= switch.flags
        launcher = [*launcher, switch.launcher] if switch.launcher else launcher
        yaml = switch.yaml or yaml
    return launch_command(yaml or "YAML_OF_THIS_LAUNCH", recipe, flags, " ".join(launcher))


def others_that_fit(setting: Setting, limit_gib: float, shared: SharedArguments) -> str:
    """Return in words which published models recipes/low_memory_16gb.py trains on such a card, with their commands."""
    found = published_that_fit(setting, limit_gib)
    if not found:
        return f"No published model of those known here can be trained in {limit_gib:.4g} GiB."
    yaml = "accelerate_configs/fp16.yaml" if setting.precision == "fp16" else "accelerate_configs/single_gpu.yaml"
    text = {"context_length": shared.context_length, "data": ["my-text.jsonl"]}
    text |= {name: shared.given[name] for name in OF_THE_TEXT if name in shared.given}
    lines = [f"Other weights that fit {limit_gib:.4g} GiB, with one row of {setting.context_length:,} tokens at once:"]
    for name, flags, need_gib in found:
        lines += [f"  {name} ({need_gib:.2f} GiB):", f"    {launch_command(yaml, 'low_memory_16gb.py', flags | text)}"]
    return "\n".join(lines)


def out_of_memory(trainer, error: RuntimeError) -> str:
    """Return what ran out in the run of a PretrainingTrainer, and what would make it fit."""
    device, model = trainer.args.device, trainer.accelerator.unwrap_model(trainer.model)
    size = card_bytes(device)
    setting = setting_of_trainer(trainer)
    need = predict(model, setting).total / GIB
    # What does not fit although it was predicted to is memory in pieces, or somebody else's: leave more room.
    limit = 0.9 * (need if size is None else min(size / GIB, need))
    return (
        f"out of memory: {str(error).splitlines()[0]}\nPlanned: {need:.2f} GiB for {described(setting)}.\n"
        f"{advised(model, setting, limit)}\nCheckpoints are kept: the same command with such a switch continues."
    )
