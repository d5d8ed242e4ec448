"""What the launcher's YAML decided, read once into one object; and launches that would fail late or train wrongly.

``accelerate launch`` puts its YAML into the environment of the processes that it starts. Nothing else in the project
reads those variables.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments

from common.console import InputError, launched, say
from common.distributed.accelerator import VISIBLE_DEVICES
from common.distributed.hardware import check_bf16, check_compiler, check_cuda_device, check_fp8
from common.distributed.strategy import DDP, SINGLE, Strategy
from common.distributed.workarounds import (
    RECOMPUTE_TAKEN_OVER,
    expert_parallel_size,
    leave_deepspeed_out,
    remove_dead_locks,
    take_over_compile,
)

RECOMPUTE_SECTION = "activation_checkpointing"  # of a DeepSpeed JSON
MAIN_MEMORY = ("cpu", "nvme")  # DeepSpeed's names for the devices that it offloads to


@dataclass(frozen=True)
class Launch:
    """The decisions of the launcher's configuration, and two more that preflight makes from them.

    Attributes:
        launched: a launcher started this process.
        processes, local_processes: over all machines, and on this one.
        precision: no, fp16, bf16 or fp8; None without a launcher: then the recipe's flags decide.
        compiler: torch.compile's backend, or "no".
        recompute: the key of the configuration that switches recompute on, or None.
        recomputed: what of it: a value of --recompute; decided by preflight.
        recompute_settings: what else the configuration says of recompute.
        offload_optimizer, offload_parameters: kept in main memory.
        loaded_by_one: FSDP2 sends out the weights of the first process, the only one that builds or loads the model.
        replicas, shards: of the model, over all processes (data parallelism).
        tensor_parallel, context_parallel, sequence_parallel: processes that share the same rows; the last by Ulysses.
        expert_parallel: processes that divide the experts of each layer, and send each other the tokens for them.
        pipeline_parallel: processes that share the layers, and so the same rows; decided by explicit_pipeline.py.
        optimizer: "muon" or "adamw"; decided by preflight.
        rows_per_step: over all processes; decided by preflight.
    """

    launched: bool = False
    strategy: Strategy = SINGLE
    processes: int = 1
    local_processes: int = 1
    process: int = 0
    use_cpu: bool = False
    precision: str | None = None
    compiler: str = "no"
    recompute: str | None = None
    recomputed: str = "all"
    recompute_settings: tuple[str, ...] = ()
    offload_optimizer: bool = False
    offload_parameters: bool = False
    state_dict_type: str = ""
    loaded_by_one: bool = False
    replicas: int = 1
    shards: int = 1
    tensor_parallel: int = 1
    context_parallel: int = 1
    sequence_parallel: int = 1
    expert_parallel: int = 1
    pipeline_parallel: int = 1
    optimizer: str = ""
    rows_per_step: int = 0

    @property
    def compiled(self) -> bool:
        return self.compiler != "no"

    @property
    def offloads(self) -> bool:
        return self.offload_optimizer or self.offload_parameters

    @property
    def machines(self) -> int:
        return max(1, self.processes // self.local_processes)

    @property
    def row_readers(self) -> int:
        """How many processes, or groups of processes that share their rows, read rows of their own."""
        sharing = self.row_pieces * self.tensor_parallel * self.pipeline_parallel
        return max(1, self.processes // sharing)

    @property
    def row_pieces(self) -> int:
        """Among how many processes the tokens of a row are divided, by context parallelism or by Ulysses."""
        return self.context_parallel * self.sequence_parallel

    @property
    def reads_rows(self) -> bool:
        """Whether this process is the first of those that share its rows."""
        return self.process % (self.row_pieces * self.tensor_parallel) == 0

    @property
    def divided(self) -> bool:
        """Whether transformers divides the model among the processes while it is loaded."""
        return self.tensor_parallel > 1 or self.expert_parallel > 1

    @property
    def saves_parts(self) -> bool:
        """Whether every process writes its own part of a checkpoint."""
        return self.divided or (self.strategy.is_fsdp and "SHARDED" in self.state_dict_type)

    @property
    def saves_whole_weights(self) -> bool:
        """Whether a checkpoint has ordinary safetensors. Under FSDP2 they are gathered from all processes for it."""
        return not (self.strategy.is_fsdp and "SHARDED" in self.state_dict_type)

    @property
    def building_device(self) -> torch.device | None:
        """Where this process builds or loads the whole model, if the launch decides it.

        A model that is divided while it is loaded is built by one process of each machine, in main memory. All other
        processes have it on the meta device, where it takes no memory. None: every process has the whole model.
        """
        if self.divided:
            return torch.device("meta" if self.process % self.local_processes else "cpu")
        if self.loaded_by_one:
            return torch.device("meta" if self.process else "cpu")
        return None

    @property
    def dimensions(self) -> str:
        """How processes share model and rows, in words; empty if the strategy's name says it all."""
        sizes = {"copies": self.replicas, "shards": self.shards, "tensor parallel": self.tensor_parallel}
        sizes |= {"context parallel": self.context_parallel, "sequence parallel": self.sequence_parallel}
        experts = f", experts divided among {self.expert_parallel}" if self.expert_parallel > 1 else ""
        return " x ".join(f"{size} {name}" for name, size in sizes.items() if size > 1) + experts

    def defaults(self) -> dict:
        """Return the TrainingArguments that the launcher decides: precision, and the CPU where nothing else is."""
        return {
            "bf16": self.precision in ("bf16", "fp8"),  # FP8 is for the products of layers; the rest is bf16
            "fp16": self.precision == "fp16",
            "use_cpu": self.use_cpu,
        }


def read_launch() -> Launch:
    """Read what the launcher decided, before any process group exists.

    First removes what would hang a process group, and restores what DeepSpeed's launcher leaves out.

    Raises:
        InputError: more processes than devices, or a deepspeed_config_file that cannot be read.
    """
    use_cpu = _says_true("ACCELERATE_USE_CPU")
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not use_cpu:
        check_devices(local_processes)
    remove_dead_locks()
    take_over_compile()
    path, deepspeed = deepspeed_file()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    strategy = _strategy(deepspeed, processes)
    leave_deepspeed_out(strategy)
    offload_optimizer, offload_parameters = _offloading(deepspeed, strategy)
    return Launch(
        launched=launched(),
        strategy=strategy,
        processes=processes,
        local_processes=local_processes,
        process=int(os.environ.get("RANK", "0")),
        use_cpu=use_cpu or not torch.accelerator.is_available(),
        precision=_precision(deepspeed),
        compiler=os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower(),
        recompute=_recompute(path, deepspeed, strategy),
        recompute_settings=tuple(name for name, value in deepspeed.get(RECOMPUTE_SECTION, {}).items() if value),
        offload_optimizer=offload_optimizer,
        offload_parameters=offload_parameters,
        state_dict_type=os.environ.get("FSDP_STATE_DICT_TYPE", ""),
        loaded_by_one=strategy.is_fsdp and _says_true("FSDP_CPU_RAM_EFFICIENT_LOADING"),
        replicas=_parallel_size("dp_replicate"),
        shards=_parallel_size("dp_shard"),
        tensor_parallel=_parallel_size("tp"),
        context_parallel=_parallel_size("cp"),
        sequence_parallel=_parallel_size("sp"),
        expert_parallel=expert_parallel_size() if _says_true("ACCELERATE_USE_PARALLELISM_CONFIG") else 1,
    )


def deepspeed_file() -> tuple[str, dict]:
    """Return the ``deepspeed_config_file`` of the launcher's YAML, path and content; ("", {}) if it names none.

    Raises:
        InputError: it cannot be read.
    """
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":
        return "", {}
    try:
        return path, json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"deepspeed_config_file {path}: {error.strerror}. A relative path starts at the folder of the launch: "
            "launch from the repository's folder, or give the full path: --deepspeed_config_file PATH"
        ) from None
    except ValueError as error:
        raise InputError(f"deepspeed_config_file {path}: not JSON ({error}).") from None


def _says_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"


def _strategy(deepspeed: dict, processes: int) -> Strategy:
    if _says_true("ACCELERATE_USE_DEEPSPEED"):
        in_environment = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return Strategy(f"zero{deepspeed.get('zero_optimization', {}).get('stage', in_environment)}")
    if _says_true("ACCELERATE_USE_FSDP"):
        return Strategy(f"fsdp{os.environ.get('FSDP_VERSION', '1')}")
    return DDP if processes > 1 else SINGLE


def _precision(deepspeed: dict) -> str | None:
    """Accelerate refuses ``mixed_precision`` in a YAML that names a deepspeed_config_file: there the JSON decides."""
    for precision in ("bf16", "fp16"):
        if deepspeed.get(precision, {}).get("enabled") is True:
            return precision
    return os.environ.get("ACCELERATE_MIXED_PRECISION")


def _recompute(path: str, deepspeed: dict, strategy: Strategy) -> str | None:
    if RECOMPUTE_SECTION in deepspeed:
        return f"{RECOMPUTE_SECTION} in {path}"
    if strategy.is_fsdp and (_says_true("FSDP_ACTIVATION_CHECKPOINTING") or _says_true(RECOMPUTE_TAKEN_OVER)):
        return "fsdp_activation_checkpointing in the YAML's fsdp_config"
    return None


def _offloading(deepspeed: dict, strategy: Strategy) -> tuple[bool, bool]:
    """Return whether optimizer states, and whether parameters, are kept in main memory."""
    if strategy.is_fsdp:
        offloaded = _says_true("FSDP_OFFLOAD_PARAMS")
        return offloaded, offloaded
    if not strategy.is_deepspeed:
        return False, False
    zero = deepspeed.get("zero_optimization", {})
    devices = []
    for name in ("optimizer", "param"):
        in_environment = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name.upper()}_DEVICE", "none")
        in_json = zero.get(f"offload_{name}") or {}
        devices.append(in_json.get("device", in_environment))
    return devices[0] in MAIN_MEMORY, devices[1] in MAIN_MEMORY


def _parallel_size(kind: str) -> int:
    if not _says_true("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return 1
    return int(os.environ.get(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", "1"))


def precision_of(training: TrainingArguments) -> str:
    """Return what this process trains in: "no", "fp16", "bf16", or "fp8", which TrainingArguments call bf16."""
    if training.mixed_precision == "fp8":
        return "fp8"
    if training.bf16:
        return "bf16"
    return "fp16" if training.fp16 else "no"


def check_devices(local_processes: int) -> None:
    """Raise InputError if more processes were started here than there are devices: most would not find theirs."""
    visible = torch.accelerator.device_count()
    if 0 < visible < local_processes:
        raise InputError(
            f"{local_processes} processes were started on this machine, and {visible} devices are visible. Use "
            f"--num_processes {visible} (times the number of machines), or make all visible: {visibility()}."
        )


def visibility() -> str:
    """Return the variable that chooses which devices a process may see."""
    accelerator = torch.accelerator.current_accelerator()
    return VISIBLE_DEVICES.get("cuda" if accelerator is None else accelerator.type, "the device's own variable")


def check_launch(launch: Launch, training: TrainingArguments) -> None:
    """Refuse flags and launches that would fail late or silently do something else; note devices left unused.

    Raises:
        InputError: with the command that works.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a Windows console without Chinese must not end a run at its first sample
        sys.stdout.reconfigure(errors="backslashreplace")
    if launch.processes > 1 and training.world_size == 1:
        raise InputError(
            f"{launch.processes} processes were launched, but each sees only itself: they would train "
            f"{launch.processes} independent models into one folder. On CPU: --config_file "
            "accelerate_configs/cpu_2proc.yaml"
        )
    if training.n_gpu > 1:
        raise InputError(
            f"one process sees {training.n_gpu} GPUs: Trainer would fall back to the slow nn.DataParallel. Use all:\n"
            f"  accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes {training.n_gpu} RECIPE\n"
            f"or one: {visibility()}=0 in front of the same command."
        )
    if launch.context_parallel > 1 and training.device.type == "cpu":
        raise InputError(
            f"parallelism_config_cp_size {launch.context_parallel} on CPUs: torch (2.13) divides attention on GPUs "
            "only. On CPUs, accelerate_configs/fsdp2_ulysses.yaml divides rows, too."
        )
    check_precision(launch, training)
    check_compiler(launch.compiler, training.device)
    visible = torch.accelerator.device_count()
    if launch.local_processes < visible and not training.use_cpu:
        say(f"note: {visible} GPUs are visible, {launch.local_processes} used. All of them: --num_processes {visible}")


def check_precision(launch: Launch, training: TrainingArguments) -> None:
    """Refuse a precision that launcher and flags disagree about, or that this card does not have."""
    asked = precision_of(training)
    decided = asked if launch.precision is None else launch.precision
    if decided == "fp8" and asked == "bf16":
        check_fp8(launch.strategy, training)
        check_fp8_alone(launch)
        training.mixed_precision = "fp8"  # Trainer hands it to Accelerator; TrainingArguments have no flag for it
    elif asked != decided:
        raise InputError(
            f"the launcher's configuration says mixed_precision {decided}, the recipe's flags say {asked}. The "
            f"launcher owns it: accelerate launch --mixed_precision {asked} ... RECIPE, without the recipe's --bf16 or "
            "--fp16."
        )
    if training.device.type == "cuda" and torch.version.hip is None:
        check_cuda_device(
            torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.cuda.get_arch_list(), asked
        )
    check_bf16(training.device, asked)


def check_fp8_alone(launch: Launch) -> None:
    """Refuse FP8 beside what divides or moves the parameters in another way than DDP and FSDP2 do."""
    beside = launch.dimensions
    if launch.loaded_by_one:  # accelerate refuses it
        beside = "fsdp_cpu_ram_efficient_loading"
    elif launch.offloads:
        beside = "parameters in main memory"
    if beside:
        raise InputError(f"mixed_precision fp8 with {beside}: not tried here. Use ddp.yaml or fsdp2.yaml, or bf16.")


# What gloo, NCCL and torch say when a process at the other end is gone.
GONE = re.compile(
    r"(closed|reset) by peer|broken pipe|connection refused|timed out|timeout|remote process exited", re.IGNORECASE
)


def lost_process(error: RuntimeError, launch: Launch) -> str | None:
    """Return what to do if ``error`` says that another process is gone or does not answer, else None."""
    if launch.processes == 1 or not GONE.search(str(error)):
        return None
    return (
        f"process {launch.process}: another process of this run is gone or does not answer "
        f"({str(error).splitlines()[0][:200]}). Its own output says why. The same command on every machine continues "
        "from the last checkpoint."
    )
