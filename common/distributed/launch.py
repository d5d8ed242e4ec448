"""Preflight: what the launcher's YAML decided, and combinations that would fail late or train the wrong thing."""

import os
import re
import sys

import torch
from transformers import TrainingArguments

from common.console import InputError, say
from common.distributed.hardware import check_compiler, check_cuda_device, check_fp8
from common.distributed.strategy import launched_precision, take_over_recompute
from common.distributed.workarounds import remove_dead_locks, take_over_compile


def launch_defaults() -> dict:
    """Return the TrainingArguments that the YAML owns: precision, and the CPU where there is no accelerator.

    This comes before any process group, so it also removes what would hang one, refuses what would break it, and takes
    over what DeepSpeed's launcher leaves out.
    """
    check_devices()
    remove_dead_locks()
    take_over_compile()
    precision = launched_precision()
    return {
        "bf16": precision in ("bf16", "fp8"),  # FP8 is for the products of layers; the rest is bf16
        "fp16": precision == "fp16",
        "use_cpu": os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available(),
    }


def check_devices() -> None:
    """Raise InputError if more processes were started here than there are devices: most would fail to find theirs."""
    visible, local = torch.accelerator.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < visible < local and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        raise InputError(
            f"{local} processes were started on this machine, and {visible} devices are visible. Use --num_processes "
            f"{visible} (times the number of machines), or let all be visible: CUDA_VISIBLE_DEVICES."
        )


def check_launch(training: TrainingArguments) -> None:
    """Refuse what would fail late or silently do something else; say what only wastes devices.

    Raises:
        InputError: with the command that works.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a Windows console without Chinese must not end a run at its first sample
        sys.stdout.reconfigure(errors="backslashreplace")
    for flag, value, why in (
        ("--label_smoothing_factor", training.label_smoothing_factor, "Trainer would shift the targets a second time"),
        (
            "--auto_find_batch_size",
            training.auto_find_batch_size,
            "it changes the tokens a step behind the ledger's back",
        ),
        ("--resume_from_checkpoint", training.resume_from_checkpoint, "the same command resumes by itself"),
        (
            "--train_sampling_strategy",
            getattr(training, "train_sampling_strategy", "random") != "random",
            "the order of rows is theirs",
        ),
        ("--save_only_model", training.save_only_model, "such a checkpoint cannot be resumed exactly"),
        ("--load_best_model_at_end", training.load_best_model_at_end, "a run ends with its last weights"),
        ("--bf16_full_eval", training.bf16_full_eval, "the model itself would be cast, and saved so"),
        ("--fp16_full_eval", training.fp16_full_eval, "the model itself would be cast, and saved so"),
        ("--hub_token", training.hub_token, "it would be saved in training_args.bin; export HF_TOKEN instead"),
        ("--report_to swanlab", "swanlab" in training.report_to, "SwanLab has its own flag, --swanlab"),
        ("--deepspeed", training.deepspeed, "the launcher's YAML owns the strategy: accelerate_configs/zero2.yaml"),
        ("--fsdp", training.fsdp, "the launcher's YAML owns the strategy: accelerate_configs/fsdp2.yaml"),
        ("--torch_compile", training.torch_compile, "the launcher's YAML owns it: dynamo_config, --dynamo_backend"),
        ("--accelerator_config split_batches", training.accelerator_config.split_batches, "it changes the batch"),
    ):
        if value:
            raise InputError(f"{flag}: not with these recipes, {why}. Leave it out.")
    if training.push_to_hub and training.hub_strategy != "end":
        raise InputError(
            f"--push_to_hub with --hub_strategy {training.hub_strategy.value}: checkpoints would be uploaded half "
            "written. Add --hub_strategy end, which uploads the model when it is trained."
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and training.world_size == 1:
        raise InputError(
            f"{launched} processes were launched, but each sees only itself: they would train {launched} independent "
            "models into one folder. On CPU: --config_file accelerate_configs/cpu_2proc.yaml"
        )
    if training.use_cpu and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise InputError("FSDP needs an accelerator, and there is none here. Use accelerate_configs/cpu.yaml.")
    if training.n_gpu > 1:
        raise InputError(
            f"one process sees {training.n_gpu} GPUs: Trainer would fall back to the slow nn.DataParallel. Use all:\n"
            f"  accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes {training.n_gpu} RECIPE\n"
            f"or one: CUDA_VISIBLE_DEVICES=0 in front of the same command."
        )
    asked = "bf16" if training.bf16 else "fp16" if training.fp16 else "no"
    owned = launched_precision() if "ACCELERATE_MIXED_PRECISION" in os.environ else asked
    if owned == "fp8" and asked == "bf16":
        check_fp8(training)
        training.mixed_precision = "fp8"  # Trainer hands it to Accelerator; TrainingArguments have no flag for it
    elif asked != owned:
        raise InputError(
            f"the launcher's configuration says mixed_precision {owned}, the recipe's flags say {asked}. The launcher "
            f"owns it: accelerate launch --mixed_precision {asked} ... RECIPE, without the recipe's --bf16/--fp16."
        )
    take_over_recompute(training)
    check_compiler(os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no"), training.device)
    if training.device.type == "cuda" and torch.version.hip is None:
        check_cuda_device(
            torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.cuda.get_arch_list(), asked
        )
    visible, local = torch.accelerator.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local < visible and not training.use_cpu:
        say(f"note: {visible} GPUs are visible, {local} used. All of them: --num_processes {visible}")


# What gloo, NCCL and torch say when a process at the other end is gone.
GONE = re.compile(
    r"(closed|reset) by peer|broken pipe|connection refused|timed out|timeout|remote process exited", re.IGNORECASE
)


def lost_process(error: RuntimeError) -> str | None:
    """Return what to do if ``error`` says that another process is gone or does not answer, else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not GONE.search(str(error)):
        return None
    return (
        f"process {os.environ.get('RANK')}: another process of this run is gone or does not answer "
        f"({str(error).splitlines()[0][:200]}). Its own output says why. The same command on every machine continues "
        "from the last checkpoint."
    )
