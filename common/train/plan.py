"""--plan: the memory that a run needs, and what would make it fit, before anything is loaded.

The micro-batch, if the flags leave it open, is as many rows at once as fit the card, until more rows make it no faster.
Large micro-batches keep the card busy while the CPU prepares the next layers, above all where several cards exchange
something for each layer. The losses do not depend on the micro-batch: ``--tokens_per_step`` says what a step trains on.
"""

import difflib
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import yaml
from transformers import PreTrainedModel, TrainingArguments

from common.arguments import SharedArguments
from common.command_line import launch_command
from common.console import InputError, say
from common.distributed.accelerator import card_bytes, computes_in_bf16
from common.distributed.launch import Launch, precision_of
from common.distributed.strategy import DDP, FSDP2, SINGLE, Strategy
from common.model.counts import parameter_report
from common.model.fused_loss import DeferringHead
from common.model.memory import Setting, main_memory_bytes, optimizer_name, predict, state_bits
from common.model.placement import check_expert_plan, check_plan
from common.model.recompute import choose_recompute
from common.system import GIB
from common.train.advice import Switch, advised, described, published_that_fit
from common.train.combinations import check_combinations, choose_optimizer, replaced
from common.train.cuda_graph import LARGEST, lacking

CONFIGS = Path(__file__).resolve().parents[2] / "accelerate_configs"


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
    """
    launch = replace(launch, optimizer=choose_optimizer(shared.optimizer, launch, training))
    launch = choose_recompute(shared.recompute, launch, training)
    setting = setting_of_run(model, launch, training, shared.context_length, own_optimizer)
    setting = replace(setting, method=method)
    path = yaml_to_plan(shared, launch, training)
    if path is not None:
        setting = setting_of_yaml(path, setting, shared.plan_processes)
    elif shared.plan_processes is not None:
        strategy = DDP if shared.plan_processes > 1 else SINGLE
        setting = replace(setting, strategy=strategy, processes=shared.plan_processes)
    # A YAML that is planned for is that of a card, whatever is here.
    planned_training = training if path is None else replaced(training, use_cpu=False)
    check_combinations(replace(launch, strategy=setting.strategy), planned_training, method or "full")
    check_plan(model, setting.tensor)
    check_expert_plan(model, setting.expert)
    setting = with_graphs(model, setting)
    limit = shared.plan_memory_gib
    if limit is None and card_bytes(training.device) is not None:
        limit = card_bytes(training.device) / GIB
    setting = with_micro_batch(model, setting, shared, training, limit)
    counts = parameter_report(model)
    active = "" if counts["active"] == counts["total"] else f", of which a token meets {counts['active']:,}"
    vocabulary = model.get_output_embeddings().weight.shape[0]
    say(f"planned for {path or 'the YAML of this launch'}: {described(setting)}")
    sharing = shared.context_length // setting.context_length
    if sharing > 1:
        say(f"  ({sharing} cards share each row of {shared.context_length:,} tokens)")
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
        flags = launcher_flags(setting, sharing)
        say(advised(model, setting, limit, partial(planned_command, recipe, path, shared, flags)))
        if continues and setting.processes == 1:
            say(others_that_fit(setting, limit, shared))
    if shared.plan_json:
        say(json.dumps(figures))


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


def launcher_flags(setting: Setting, sharing: int) -> list[str]:
    """Return the flags of accelerate launch for the cards of ``setting``, of which ``sharing`` share each row."""
    if setting.processes == 1:
        return []
    flags = [f"--num_processes {setting.processes}"]
    divisor = sharing * setting.tensor * setting.copies
    if divisor > 1 or setting.expert > 1:  # the YAML's own size may be for another number of cards
        flags.append(f"--parallelism_config_dp_shard_size {setting.processes // divisor}")
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


def yaml_to_plan(shared: SharedArguments, launch: Launch, training: TrainingArguments) -> str | None:
    """Return the YAML that --plan is about; None: that of this launch.

    Without a launch, it is the one that README.md names for such cards: ``--plan_config`` names another.
    """
    if shared.plan_config is not None or launch.launched:
        return shared.plan_config
    if (shared.plan_processes or 1) > 1:
        name = "ddp.yaml"
    else:
        here = training.device  # a card without bf16, or any other
        name = "fp16.yaml" if here.type != "cpu" and not computes_in_bf16(here) else "single_gpu.yaml"
    path = CONFIGS / name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def with_micro_batch(
    model: PreTrainedModel,
    setting: Setting,
    shared: SharedArguments,
    training: TrainingArguments,
    limit_gib: float | None,
) -> Setting:
    """Return ``setting`` with the micro-batch that a run would take, as ``set_batch`` derives it.

    Raises:
        InputError: a step has less than a row for each card.
    """
    if training.gradient_accumulation_steps > 0:
        return replace(setting, rows=max(1, setting.rows), accumulated=training.gradient_accumulation_steps > 1)
    readers = setting.processes // setting.tensor  # each reads rows of its own
    rows_a_step = shared.tokens_per_step // (setting.context_length * readers)
    if rows_a_step < 1:
        raise InputError(
            f"--tokens_per_step {shared.tokens_per_step:,}: less than one row of {setting.context_length} tokens for "
            f"each of {readers} cards. Use at least {setting.context_length * readers:,}."
        )
    most = setting.rows if setting.rows > 0 else rows_that_fit(model, setting, rows_a_step, limit_gib)
    rows = rows_at_once(shared.tokens_per_step, readers, setting.context_length, most)
    return replace(setting, rows=rows, accumulated=rows_a_step > rows)


def rows_at_once(tokens_per_step: int, processes: int, context_length: int, most: int) -> int:
    """Return the rows of a micro-batch: at most ``most``, and more than half of that.

    Raises:
        InputError: the tokens of a step cannot be divided so among ``processes``.
    """
    rows, rest = divmod(tokens_per_step, processes * context_length)  # of each process
    micro_batch = largest_divisor(rows, most)
    if rest or micro_batch == 0 or 2 * micro_batch <= min(most, rows):
        unit = min(most, max(rows, 1)) * processes * context_length
        raise InputError(
            f"--tokens_per_step {tokens_per_step:,} cannot be divided among {processes} processes into micro-batches "
            f"of about {min(most, max(rows, 1))} rows of {context_length} tokens. Use --tokens_per_step "
            f"{max(1, round(tokens_per_step / unit)) * unit}, or another --per_device_train_batch_size."
        )
    return micro_batch


def setting_of_yaml(path: str, setting: Setting, processes: int | None = None) -> Setting:
    """Return ``setting`` under the strategy, precision and compile of an accelerate configuration.

    Raises:
        InputError: it cannot be read, its strategy is not known here, or it is not for so many processes.
    """
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        kind = str(config["distributed_type"])
        zero, fsdp = config.get("deepspeed_config") or {}, config.get("fsdp_config") or {}
        if "deepspeed_config_file" in zero:
            config, zero = joined_with_json(config, zero["deepspeed_config_file"])
        parallelism = config.get("parallelism_config") or {}
        sharing = int(parallelism.get("parallelism_config_cp_size", 1))
        sharing *= int(parallelism.get("parallelism_config_sp_size", 1))
        tensor = int(parallelism.get("parallelism_config_tp_size", 1))
        copies = int(parallelism.get("parallelism_config_dp_replicate_size", 1))
        expert = int(parallelism.get("parallelism_config_ep_size", 1))
        processes = processes or int(config.get("num_processes", 1))
        compiled = str((config.get("dynamo_config") or {}).get("dynamo_backend", "no")).lower() != "no"
    except FileNotFoundError:
        near = difflib.get_close_matches(Path(path).stem, [known.stem for known in CONFIGS.glob("*.yaml")], n=1)
        meant = f"Did you mean accelerate_configs/{near[0]}.yaml?" if near else "Those here are in accelerate_configs/."
        raise InputError(f"--plan_config {path}: no such file. {meant}") from None
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise InputError(f"--plan_config {path}: not an accelerate configuration ({error!r}).") from None
    strategies = {"NO": SINGLE, "MULTI_GPU": DDP, "MULTI_CPU": DDP, "FSDP": FSDP2}
    strategies["DEEPSPEED"] = Strategy(f"zero{zero.get('zero_stage', 2)}")
    if kind not in strategies:
        raise InputError(f"--plan_config {path}: distributed_type {kind} is not known to the planner.")
    if kind == "NO" and processes > 1:
        raise InputError(
            f"--plan_config {path}: distributed_type NO is for one process, and these are {processes}. Use "
            "accelerate_configs/ddp.yaml or fsdp2.yaml, or --plan_processes 1."
        )
    sizes = ((sharing, "share each row"), (tensor, "compute each layer together"), (expert, "divide the experts"))
    sizes += ((copies, "hold the same part of the model"), (sharing * tensor * copies, "do all of that together"))
    for together, what in sizes:
        if together < 1:
            raise InputError(f"--plan_config {path}: {together} cards {what}. Use 1 if none of them do.")
        if processes % together:
            raise InputError(
                f"--plan_config {path}: {together} cards {what}, and {processes} cards are no multiple of it. Use "
                f"--plan_processes {max(1, processes // together) * together}."
            )
    moved = ("cpu", "nvme")
    offload_optimizer = zero.get("offload_optimizer_device") in moved or bool(fsdp.get("fsdp_offload_params"))
    no_muon = kind == "DEEPSPEED" or offload_optimizer  # choose_optimizer says why
    return replace(
        setting,
        context_length=setting.context_length // sharing,
        strategy=strategies[kind],
        processes=processes,
        copies=copies,
        tensor=tensor,
        expert=expert,
        precision=str(config.get("mixed_precision", "no")),
        compiled=compiled,
        recompute=setting.recompute or bool(fsdp.get("fsdp_activation_checkpointing") or "recompute" in zero),
        optimizer="adamw" if no_muon and setting.optimizer == "muon" else setting.optimizer,
        offload_optimizer=offload_optimizer,
        offload_parameters=zero.get("offload_param_device") in moved or bool(fsdp.get("fsdp_offload_params")),
    )


def joined_with_json(config: dict, path: str) -> tuple[dict, dict]:
    """Return an accelerate configuration with what DeepSpeed's JSON at ``path`` says, and its DeepSpeed section."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"deepspeed_config_file {path}: cannot be read ({error}). The path begins in the folder that you launch in."
        ) from None
    optimization = found.get("zero_optimization", {})
    zero = {
        "zero_stage": optimization.get("stage", 2),
        "offload_optimizer_device": optimization.get("offload_optimizer", {}).get("device"),
        "offload_param_device": optimization.get("offload_param", {}).get("device"),
    }
    zero |= {"recompute": True} if "activation_checkpointing" in found else {}
    precision = [name for name in ("bf16", "fp16") if found.get(name, {}).get("enabled") is True]
    return config | {"mixed_precision": (precision or ["no"])[0]}, zero


def take_precision_of_yaml(path: str, training: TrainingArguments) -> None:
    """Set the precision that the launcher would bring; --plan has none."""
    precision = setting_of_yaml(path, Setting(rows=1, context_length=1)).precision
    training.bf16, training.fp16 = precision in ("bf16", "fp8"), precision == "fp16"
    training.mixed_precision = precision


def setting_of_run(
    model: PreTrainedModel,
    launch: Launch,
    training: TrainingArguments,
    context_length: int,
    own_optimizer: tuple[type, dict] | None = None,
) -> Setting:
    """Return the setting of the run that this process is part of; ``own_optimizer``: from low_memory.py."""
    optimizer = launch.optimizer
    if own_optimizer is not None:
        optimizer = f"rounding_{own_optimizer[1]['state_bits']}bit"
    elif state_bits(optimizer_name(training)) == 8 and optimizer != "muon":
        optimizer = "adamw_8bit"
    head = model.get_output_embeddings()
    setting = Setting(
        rows=training.per_device_train_batch_size,
        context_length=context_length // launch.row_pieces,
        strategy=launch.strategy,
        processes=launch.processes,
        copies=launch.replicas,
        tensor=launch.tensor_parallel,
        expert=launch.expert_parallel,
        precision=precision_of(training),
        compiled=launch.compiled,
        recompute=training.gradient_checkpointing or launch.recompute is not None,
        recomputed=launch.recomputed,
        fused_loss=isinstance(head, DeferringHead) or head.weight.device.type == "meta",
        optimizer=optimizer,
        offload_optimizer=launch.offload_optimizer,
        offload_parameters=launch.offload_parameters,
        in_backward=own_optimizer is not None and own_optimizer[1]["in_backward"],
        accumulated=training.gradient_accumulation_steps != 1,
        method=method_of(model, own_optimizer),
    )
    return with_graphs(model, setting)


def with_graphs(model: PreTrainedModel, setting: Setting) -> Setting:
    """Return ``setting`` with CUDA graphs where they are possible and the model is not large."""
    return replace(setting, graphs=not lacking(model, setting) and model.num_parameters() <= LARGEST)


def method_of(model: PreTrainedModel, own_optimizer: tuple[type, dict] | None) -> str | None:
    """Return the ``--method`` of recipes/low_memory_16gb.py, as a model shows it; None: it shows none."""
    if hasattr(model, "peft_config"):
        packed = any(hasattr(parameter, "quant_state") for parameter in model.parameters())
        return "qlora" if packed else "lora"
    return "full" if own_optimizer is not None else None


def setting_of_trainer(trainer) -> Setting:
    """Return the setting that a PretrainingTrainer trains in."""
    model, length = trainer.accelerator.unwrap_model(trainer.model), trainer.train_dataset.context_length
    return setting_of_run(model, trainer.launch, trainer.args, length, trainer.optimizer_cls_and_kwargs)


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


FASTEST_TOKENS = 65_536  # 123M on an H100: 490k tokens/s with 32,768 at once, 508k with these (benchmarks/README.md)
UNKNOWN_TOKENS = 8192  # where memory or model is not known
USED_SHARE = 0.85  # of the card. The prediction is within 5%; memory in pieces and other libraries want some


def rows_that_fit(model: PreTrainedModel | None, setting: Setting, rows_a_step: int, limit_gib: float | None) -> int:
    """Return how many rows ``setting`` should take at once; at least 1, whether that fits or not.

    Args:
        model: on any device, or on none; None: not known.
        setting: its ``rows`` are not read.
        rows_a_step: of each process.
        limit_gib: memory of a card; None: not known.
    """
    known = model is not None and limit_gib is not None
    tokens = FASTEST_TOKENS if known else UNKNOWN_TOKENS
    rows = max(1, min(tokens // setting.context_length, rows_a_step))
    while known and rows > 1:
        tried = replace(setting, rows=rows, accumulated=rows_a_step > rows)
        if predict(model, tried).total <= USED_SHARE * limit_gib * GIB:
            break
        rows = (rows + 1) // 2 if rows > 2 else 1
    return rows


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of ``number`` that is at most ``most``; 0 without one."""
    if number < 1:
        return 0
    divisors = [small for small in range(1, math.isqrt(number) + 1) if number % small == 0]
    divisors += [number // small for small in divisors]
    return max((divisor for divisor in divisors if divisor <= most), default=0)
