"""What works around a library: each function names the fault, the versions seen, and when it can go.

All of it changes the environment, a global of torch, or an object of accelerate, DeepSpeed or transformers, before that
is used. ``remove_dead_locks`` and ``take_over_compile`` come before the launcher's decisions are read, others after.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import accelerate.utils.other
import psutil
import torch
import torch._functorch.config
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import is_deepspeed_available
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, TrainingArguments

from common.console import InputError, say
from common.distributed.strategy import Strategy

FOREIGN_SECONDS = 180  # if nothing in a folder has changed for so long, no other machine compiles there either
COMPILE_SETTINGS = "backend", "mode", "use_fullgraph", "use_dynamic", "use_regional_compilation"
RECOMPUTE_TAKEN_OVER = "FSDP_ACTIVATION_CHECKPOINTING_BY_TRANSFORMERS"  # our name: the YAML asked, we do it otherwise


def remove_dead_locks() -> None:
    """Remove the locks that killed compilations left, on every machine; wait if another machine may hold one.

    DeepSpeed compiles operations at its first launch through ``torch.utils.cpp_extension``. Meanwhile torch keeps a
    file named ``lock`` in the operation's folder (torch/utils/file_baton.py). A process that is killed in between
    leaves the file, and every later launch hangs before its first line. Seen with torch 2.11 to 2.13. It can go when
    torch locks with the operating system's locks, which die with their owner.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true" or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted(root.rglob("lock")):
        said, began, changed = False, time.monotonic(), last_change(lock.parent)
        idle_before = max(0.0, time.time() - changed)  # clocks of machines differ: a file may be of tomorrow
        while lock.exists() and not held_here(lock):
            if last_change(lock.parent) != changed:  # another machine compiles there now
                began, changed, idle_before = time.monotonic(), last_change(lock.parent), 0.0
            idle_seconds = idle_before + time.monotonic() - began
            if idle_seconds >= FOREIGN_SECONDS:
                lock.unlink(missing_ok=True)
                print(f"removed {lock}: its compilation was killed, DeepSpeed would wait for it for ever", flush=True)
            elif not said:
                said = True
                wait = f"waiting up to {FOREIGN_SECONDS - idle_seconds:.0f} s for {lock}"
                print(f"{wait}: another machine may be compiling there", flush=True)
            else:
                time.sleep(0.5)


def held_here(lock: Path) -> bool:
    """Return whether a process of this machine has the file open."""
    path = os.path.realpath(lock)  # the name that psutil uses, whatever links lead there
    for process in psutil.process_iter():
        try:
            if path in (file.path for file in process.open_files()):
                return True
        except (psutil.Error, OSError):  # the process has ended, or belongs to somebody else
            continue
    return False


def last_change(folder: Path) -> float:
    """Return when the newest file of ``folder`` was written, in seconds since 1970."""
    times = [folder.stat().st_mtime]
    for file in folder.iterdir():
        try:
            times.append(file.stat().st_mtime)
        except FileNotFoundError:  # ninja's own files come and go
            continue
    return max(times)


def leave_deepspeed_out(strategy: Strategy) -> None:
    """Have accelerate import DeepSpeed in DeepSpeed's runs only.

    Accelerate (1.15) imports it in every run to ask whether the model is DeepSpeed's engine: ``unwrap_model``, in
    accelerate/utils/other.py. It can go when accelerate asks under DeepSpeed only.
    """
    accelerate.utils.other.is_deepspeed_available = is_deepspeed_available if strategy.is_deepspeed else lambda: False


def take_over_compile() -> None:
    """Put into the environment what the launcher of this DeepSpeed run was told about compiling.

    ``accelerate launch`` reads ``dynamo_config``, but its launcher for DeepSpeed (prepare_deepspeed_cmd_env in
    accelerate/utils/launch.py, release 1.15) does not pass it on, as the other launchers do. Every DeepSpeed run would
    train uncompiled, whatever the YAML and --dynamo_backend say. The launcher is this process's parent, and its command
    line says what it was told. It can go when accelerate sets ACCELERATE_DYNAMO_BACKEND there.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true" or "ACCELERATE_DYNAMO_BACKEND" in os.environ:
        return
    flags = launcher_flags()
    if flags is None:
        say(
            "note: not compiled: no accelerate launch above this process says whether to compile. To compile: "
            "export ACCELERATE_DYNAMO_BACKEND=inductor ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=true"
        )
        return
    os.environ.update(compile_settings(flags))


def launcher_flags() -> list[str] | None:
    """Return the words after ``accelerate launch`` in the command that started this process, None without one."""
    for process in psutil.Process().parents():
        try:
            words = process.cmdline()
        except psutil.Error:  # a process of somebody else
            continue
        for place, word in enumerate(words):
            after_accelerate = word == "launch" and any("accelerate" in earlier for earlier in words[:place])
            if after_accelerate or os.path.basename(word) in ("accelerate-launch", "accelerate.commands.launch"):
                return words[place + 1 :]
    return None


def compile_settings(flags: list[str]) -> dict[str, str]:
    """Return the variables that accelerate's other launchers set for ``flags``, which win over the YAML's section."""
    arguments = launch_command_parser().parse_args(flags)
    given = getattr(arguments, "nondefault", set())
    in_yaml = {}
    if arguments.config_file or os.path.isfile(default_config_file):
        in_yaml = load_config_from_file(arguments.config_file).dynamo_config or {}
    variables = {}
    for name in COMPILE_SETTINGS:
        value = getattr(arguments, f"dynamo_{name}")
        if f"dynamo_{name}" not in given:
            value = in_yaml.get(f"dynamo_{name}", value)
        variables[f"ACCELERATE_DYNAMO_{name.upper()}"] = "NO" if value is None else str(value)
    return variables


def expert_parallel_size() -> int:
    """Return how many processes divide the experts of a layer among them, by the YAML's parallelism_config; 1 if none.

    accelerate (1.15) has no such size: its launcher reads ``parallelism_config_ep_size`` and hands it to nobody. The
    launcher is this process's parent, and its command line names the YAML. PARALLELISM_CONFIG_EP_SIZE, named as
    accelerate names the others, wins over the YAML. It can go when accelerate sets this variable.

    Raises:
        InputError: it is not a number above 0.
    """
    given = os.environ.get("PARALLELISM_CONFIG_EP_SIZE")
    if given is None:
        flags = launcher_flags()
        if flags is None:
            say("note: no accelerate launch above this process: a YAML's ep_size is PARALLELISM_CONFIG_EP_SIZE here")
            return 1
        path = launch_command_parser().parse_args(flags).config_file
        if path or os.path.isfile(default_config_file):
            given = load_config_from_file(path).parallelism_config.get("parallelism_config_ep_size")
    size = "1" if given is None else str(given)
    if not size.isdecimal() or int(size) < 1:
        raise InputError(f"parallelism_config_ep_size {size}: not a number of processes. Use 1 to divide no experts.")
    return int(size)


def take_over_recompute(launch, training: TrainingArguments) -> None:
    """Switch transformers' recompute on where the launcher's configuration asks for it, before an Accelerator is made.

    DeepSpeed only offers functions for recompute and leaves their use to the training script. Accelerate would wrap the
    layers of FSDP2, and torch.compile gives up at FSDP2's hooks inside that wrapper: no layer would be compiled (seen
    with accelerate 1.15, torch 2.11). It can go when accelerate wraps compiled layers.
    Source: https://www.deepspeed.ai/docs/config-json/#activation-checkpointing

    Args:
        launch: launch.Launch.

    Raises:
        InputError: the flag asks for recompute, too, or the configuration asks for more than transformers can do.
    """
    if launch.recompute is None:
        return
    if training.gradient_checkpointing:
        raise InputError(
            f"--gradient_checkpointing and {launch.recompute} both switch recompute on. The launcher's configuration "
            "owns it here: leave the flag out, or use the YAML without recompute."
        )
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "").lower() == "true":
        raise InputError(
            "fsdp_activation_checkpointing_offload: true in the YAML's fsdp_config: not tried here. Set it to false."
        )
    if launch.recompute_settings:
        raise InputError(
            f"{launch.recompute}: {', '.join(launch.recompute_settings)} would be ignored: transformers recomputes the "
            "layers, and always a whole layer. Set it to false."
        )
    for name in ("gradient_checkpointing", "activation_checkpointing"):  # transformers 5.23 reads the second
        if hasattr(training, name):
            setattr(training, name, True)
    if launch.strategy.is_fsdp:
        os.environ |= {"FSDP_ACTIVATION_CHECKPOINTING": "false", RECOMPUTE_TAKEN_OVER: "true"}


def shard_on_cpus(launch, training: TrainingArguments) -> None:
    """Have accelerate run FSDP2 in processes on CPUs, before an Accelerator is made.

    torch shards over gloo as it does over NCCL, but accelerate (1.15) takes up FSDP for kinds of devices only, and CPUs
    are not among them: AcceleratorState would fall back to DDP without a word. What it is told of the devices' kind
    here decides that branch alone; everything else asks ``device``, which stays the CPU. It can go when accelerate
    shards on CPUs.
    """
    if launch.strategy.is_fsdp and training.device.type == "cpu":
        training.distributed_state.distributed_type = DistributedType.MULTI_GPU


@contextmanager
def divided_by_transformers(launch, training: TrainingArguments) -> Iterator[None]:
    """Around making a Trainer: leave a model that transformers has divided while loading as it is.

    accelerate's launcher (1.15) allows a parallelism_config with FSDP2 only, and an Accelerator that knows of FSDP2
    would divide the model again. And a Trainer (transformers 5.24) refuses such a model unless ``save_only_model`` is
    set, because it cannot save the optimizer's states: PretrainingTrainer does. It can go when both know such a model.
    """
    if not launch.divided:
        yield
        return
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG")
    given = {name: os.environ.pop(name) for name in names if name in os.environ}
    training.save_only_model = True
    try:
        yield
    finally:
        training.save_only_model = False
        os.environ |= given


@contextmanager
def shares_rows(launch) -> Iterator[None]:
    """Around making a Trainer under Ulysses: have accelerate read the same rows in all processes of a group.

    For accelerate (1.15), sp_size means DeepSpeed's engine. The processes of a row are then told of as those of context
    parallelism, whose rows and gradients are divided likewise; our Trainer divides rows and attention itself. It can go
    when accelerate has a dimension without an engine.
    """
    if launch.sequence_parallel == 1:
        yield
        return
    names = {"PARALLELISM_CONFIG_CP_SIZE": str(launch.sequence_parallel), "PARALLELISM_CONFIG_SP_SIZE": "1"}
    given = {name: os.environ.get(name, "1") for name in names}
    os.environ |= names
    try:
        yield
    finally:
        os.environ |= given


@contextmanager
def deepspeed_loads_with(load: Callable[[object, str], None]) -> Iterator[None]:
    """Around ``Trainer.train``: ``load(engine, checkpoint)`` loads a checkpoint of DeepSpeed.

    Trainer (transformers 5.24) calls a function of its module, which knows DeepSpeed's own format only. It can go when
    there is a method to override.
    """
    import transformers.trainer  # takes seconds, and only this needs it

    given = transformers.trainer.deepspeed_load_checkpoint
    transformers.trainer.deepspeed_load_checkpoint = lambda engine, checkpoint, **_: load(engine, checkpoint)
    try:
        yield
    finally:
        transformers.trainer.deepspeed_load_checkpoint = given


@contextmanager
def saved_as_given(model: PreTrainedModel) -> Iterator[None]:
    """Around ``model.save_pretrained(state_dict=...)``: save the weights that it is given.

    transformers (5.24) would gather those of a divided model itself: under tensor parallelism in every process, for one
    of them to write; with FSDP2 a matrix that embedding and head share is written twice. It can go when it does not.
    """
    sizes, model.config.distributed_config = model.config.distributed_config, None
    try:
        yield
    finally:
        model.config.distributed_config = sizes


def add_up_in_fp32(launch, training: TrainingArguments) -> None:
    """Have the gradients of micro-batches added up in fp32, before a Trainer is made. DDP does so by itself.

    DeepSpeed adds up in the precision of the computation unless it is told otherwise (0.19).
    Source: https://github.com/deepspeedai/DeepSpeed/issues/1800
    Accelerate 1.15 keeps whole gradients between the micro-batches of FSDP2 unless each batch is synchronized: every
    card would hold 4 bytes a parameter.
    """
    if training.deepspeed_plugin is not None:
        training.deepspeed_plugin.deepspeed_config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    if launch.strategy.is_fsdp:
        training.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True}


def reduce_in_fp32(accelerator: Accelerator) -> None:
    """Have FSDP2 add up the gradients of all processes in fp32, before the model is sharded.

    Accelerate's own policy (1.15) adds up in bf16 or fp16; of layers in FP8, in bf16. It also returns the loss in that
    precision: three digits of it, or inf. It can go when accelerate takes the two dtypes apart.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    half_precisions = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
    if plugin is not None and accelerator.mixed_precision in half_precisions:
        computed = half_precisions[accelerator.mixed_precision]
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=torch.float32)


def read_whole_checkpoints(accelerator: Accelerator) -> None:
    """Have accelerate read FSDP2's checkpoints of one file, and gather the model of the run's end, whatever the YAML.

    Its plugin (1.15) reads and writes one format only, and Trainer saves no model under SHARDED_STATE_DICT. Here
    checkpoints in parts are read and written without it.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.state_dict_config = plugin.optim_state_dict_config = None  # those of the YAML's type
        plugin.set_state_dict_type("FULL_STATE_DICT")


def gather_layers_whole(plugin: DeepSpeedPlugin | None, model: PreTrainedModel, compiled: bool) -> None:
    """Have ZeRO-3 gather the parameters of a layer at once, and compile the layer, before ``model`` is prepared.

    DeepSpeed (0.19) would gather the parameters of each module when it is called: many small messages, with hooks in
    Python between them. Here a layer's forward is compiled without the hooks around it. What is not gathered so is not
    compiled. Under every other strategy nothing is done.
    Source: https://deepspeed.readthedocs.io/en/latest/zero3.html, "leaf modules"
    """
    if plugin is None or plugin.zero_stage != 3:
        return
    zero = plugin.deepspeed_config["zero_optimization"]
    layers = separate_layers(model)
    leaf_modules = {"classes": sorted({type(layer).__name__ for layer in layers})}
    if not layers or zero.setdefault("leaf_module", leaf_modules) != leaf_modules:
        if compiled:
            why = "the JSON has its own leaf_module" if layers else "the layers are not known, or share parameters"
            say(f"note: not compiled: {why}; ZeRO-3's hooks within layers are not tried with torch.compile here.")
            for module in model.modules():
                module.compile = lambda **settings: None
        return
    if not model.get_input_embeddings().weight.requires_grad:
        model.enable_input_require_grads()  # otherwise DeepSpeed releases the first layer before its backward is done
    if compiled:
        # torch 2.11 compiles DeepSpeed's own linear layer with wrong gradients. That layer keeps no views of parameters
        # for backward, because they would hold what forward gathered. Without it, such views are made again.
        zero["memory_efficient_linear"] = False
        torch._functorch.config.recompute_views = True
        for module in model.modules():
            module.compile = partial(compile_forward, module)
        model.compile = lambda **settings: [layer.compile(**settings) for layer in layers]  # not regional: the same


def separate_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the layers of ``model``, or none if one of them shares a parameter with anything else.

    DeepSpeed is done with a layer's gradients when the layer's backward ends. What came from elsewhere later would be
    lost.
    """
    names = model._no_split_modules or []
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = [layer for found in lists for layer in found if type(layer).__name__ in names]
    own = {id(parameter) for layer in layers for parameter in layer.parameters()}
    uses = sum(id(parameter) in own for _, parameter in model.named_parameters(remove_duplicate=False))
    return layers if uses == len(own) else []


def compile_forward(module: torch.nn.Module, **settings) -> None:
    """Compile the forward of ``module`` without its hooks. Replaces: Module.compile, which compiles the hooks, too."""
    module.forward = torch.compile(module.forward, **settings)


@contextmanager
def without_autocast(model: torch.nn.Module) -> Iterator[None]:
    """Call ``model`` as whoever loads it will, in the dtype of its weights.

    ``Accelerator.prepare`` replaces the ``forward`` of the model by one that computes in the YAML's precision, and has
    no way to leave that out for a while: unwrap_model(keep_fp32_wrapper=False) takes it away for good. Seen with
    accelerate 1.15. It can go when accelerate has one.
    """
    in_autocast = vars(model).get("forward")
    if "_original_forward" not in vars(model):  # the YAML says fp32
        yield
        return
    model.forward = model._original_forward
    try:
        yield
    finally:
        model.forward = in_autocast
