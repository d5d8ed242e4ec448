"""What decides the memory of a run: its launch, or the accelerate YAML that --plan is about, as a ``Setting``.

A YAML is read into the ``Launch`` that it would make. So everything that refuses a launch refuses its plan, too.
"""

import difflib
import json
from dataclasses import replace
from pathlib import Path

import yaml
from transformers import PreTrainedModel, TrainingArguments

from common.arguments import SharedArguments
from common.console import InputError, say
from common.distributed.accelerator import computes_in_bf16
from common.distributed.launch import Launch, precision_of
from common.distributed.strategy import DDP, FSDP2, SINGLE, Strategy
from common.model.fused_loss import DeferringHead
from common.model.memory import Setting, optimizer_name, state_bits
from common.train.cuda_graph import LARGEST, lacking

CONFIGS = Path(__file__).resolve().parents[2] / "accelerate_configs"
STRATEGIES = {"NO": SINGLE, "MULTI_GPU": DDP, "MULTI_CPU": DDP, "FSDP": FSDP2}
# A key of parallelism_config -> the attribute of Launch.
SIZES = {
    "dp_replicate": "replicas", "dp_shard": "shards", "tp": "tensor_parallel", "cp": "context_parallel",
    "sp": "sequence_parallel", "ep": "expert_parallel",
}  # fmt: skip


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


def launch_of_yaml(path: str, processes: int | None = None) -> Launch:
    """Return the launch that an accelerate configuration makes.

    Args:
        processes: instead of the YAML's ``num_processes``, on whose machines they are.

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
        sizes = {name: int(parallelism.get(f"parallelism_config_{name}_size", 1)) for name in SIZES}
        processes = processes or int(config.get("num_processes", 1))
        machines = int(config.get("num_machines", 1))
        compiler = str((config.get("dynamo_config") or {}).get("dynamo_backend", "no")).lower()
    except FileNotFoundError:
        near = difflib.get_close_matches(Path(path).stem, [known.stem for known in CONFIGS.glob("*.yaml")], n=1)
        meant = f"Did you mean accelerate_configs/{near[0]}.yaml?" if near else "Those here are in accelerate_configs/."
        raise InputError(f"--plan_config {path}: no such file. {meant}") from None
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise InputError(f"--plan_config {path}: not an accelerate configuration ({error!r}).") from None
    if kind not in (*STRATEGIES, "DEEPSPEED"):
        raise InputError(f"--plan_config {path}: distributed_type {kind} is not known to the planner.")
    if kind == "NO" and processes > 1:
        raise InputError(
            f"--plan_config {path}: distributed_type NO is for one process, and these are {processes}. Use "
            "accelerate_configs/ddp.yaml or fsdp2.yaml, or --plan_processes 1."
        )
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"--plan_config {path}: parallelism_config_{name}_size {size}: must be at least 1.")
    moved, offloads_all = ("cpu", "nvme"), bool(fsdp.get("fsdp_offload_params"))
    recompute = "fsdp_activation_checkpointing in the YAML's fsdp_config"
    recomputes = fsdp.get("fsdp_activation_checkpointing") or "recompute" in zero
    return Launch(
        strategy=Strategy(f"zero{zero.get('zero_stage', 2)}") if kind == "DEEPSPEED" else STRATEGIES[kind],
        processes=processes,
        local_processes=max(1, processes // machines),
        precision=str(config.get("mixed_precision", "no")),
        compiler=compiler,
        recompute=zero.get("recompute", recompute) if recomputes else None,
        offload_optimizer=zero.get("offload_optimizer_device") in moved or offloads_all,
        offload_parameters=zero.get("offload_param_device") in moved or offloads_all,
        state_dict_type=str(fsdp.get("fsdp_state_dict_type", "")),
        loaded_by_one=bool(fsdp.get("fsdp_cpu_ram_efficient_loading")),
        **{SIZES[name]: size for name, size in sizes.items()},
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
    zero |= {"recompute": f"activation_checkpointing in {path}"} if "activation_checkpointing" in found else {}
    precision = [name for name in ("bf16", "fp16") if found.get(name, {}).get("enabled") is True]
    return config | {"mixed_precision": (precision or ["no"])[0]}, zero


def planned_launch(path: str | None, launch: Launch, shared: SharedArguments) -> Launch:
    """Return the launch that --plan is about: that of the YAML at ``path``, or ``launch``, on the cards of the flags.

    If ``--plan_processes`` are other cards than the YAML's parallelism_config is for, dp_shard_size follows from them,
    and a note says so: the launch needs the same size by flag. Cards that no dp_shard_size fits are left to
    ``check_parallelism``.

    Raises:
        InputError: the YAML cannot be read, or it is not for so many processes.
    """
    if path is not None:
        launch = launch_of_yaml(path, shared.plan_processes)
    elif shared.plan_processes is not None:
        others = {DDP: SINGLE} if shared.plan_processes == 1 else {SINGLE: DDP}
        strategy = others.get(launch.strategy, launch.strategy)
        launch = replace(launch, strategy=strategy, processes=shared.plan_processes)
    sharing = launch.row_pieces * launch.tensor_parallel
    shards, rest = divmod(launch.processes, sharing * launch.replicas)
    divided = sharing * launch.replicas > 1 or launch.divided
    if shared.plan_processes is None or not divided or rest or shards == launch.shards:
        return launch
    say(
        f"note: planned with dp_shard_size {shards}, as {launch.processes} cards are {launch.replicas} x {shards} x "
        f"{sharing}. The YAML says {launch.shards}: launch with --parallelism_config_dp_shard_size {shards} before the "
        "recipe"
    )
    return replace(launch, shards=shards)


def take_precision_of_yaml(path: str, training: TrainingArguments) -> None:
    """Set the precision that the launcher would bring; --plan has none."""
    precision = launch_of_yaml(path).precision
    training.bf16, training.fp16 = precision in ("bf16", "fp8"), precision == "fp16"
    training.mixed_precision = precision


def setting_of_run(
    model: PreTrainedModel,
    launch: Launch,
    training: TrainingArguments,
    context_length: int,
    own_optimizer: tuple[type, dict] | None = None,
) -> Setting:
    """Return the setting of a run under ``launch``; ``own_optimizer``: from low_memory.py."""
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
