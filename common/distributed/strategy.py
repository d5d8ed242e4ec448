"""What the launcher's configuration decided: strategy, precision, recompute. DeepSpeed's JSON is read for them."""

import json
import os
from functools import partial
from pathlib import Path

import torch
import torch._functorch.config
from accelerate import Accelerator, DeepSpeedPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, TrainingArguments

from common.console import InputError, say

SECTION = "activation_checkpointing"
TAKEN_OVER = "FSDP_ACTIVATION_CHECKPOINTING_BY_TRANSFORMERS"  # ours: what the YAML said, once it is done otherwise


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
            f"deepspeed_config_file {path}: {error.strerror}. It is looked for from the folder of the launch: launch "
            "from the repository's folder, or give its full path: --deepspeed_config_file PATH"
        ) from None
    except ValueError as error:
        raise InputError(f"deepspeed_config_file {path}: not JSON ({error}).") from None


def launched_precision() -> str:
    """Return the precision that the launcher decided: "no", "fp16", "bf16" or "fp8".

    Accelerate refuses ``mixed_precision`` in a YAML that names a deepspeed_config_file: there the JSON decides.
    """
    config = deepspeed_file()[1]
    for precision in ("bf16", "fp16"):
        if config.get(precision, {}).get("enabled") is True:
            return precision
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def precision_of(training: TrainingArguments) -> str:
    """Return what this process trains in: "no", "fp16", "bf16" or "fp8", which TrainingArguments call bf16."""
    if training.mixed_precision == "fp8":
        return "fp8"
    return "bf16" if training.bf16 else "fp16" if training.fp16 else "no"


def recompute_owner() -> str | None:
    """Return the key of the launcher's configuration that switches recompute on, or None."""
    path, config = deepspeed_file()
    if SECTION in config:
        return f"{SECTION} in {path}"
    asked = ("FSDP_ACTIVATION_CHECKPOINTING", TAKEN_OVER)
    if under_fsdp() and any(os.environ.get(name, "").lower() == "true" for name in asked):
        return "fsdp_activation_checkpointing in the YAML's fsdp_config"
    return None


def take_over_recompute(training: TrainingArguments) -> None:
    """Switch transformers' recompute on where the launcher's configuration asks for it, before an Accelerator is made.

    DeepSpeed itself only offers functions for it. Accelerate would wrap the layers of FSDP2, and torch.compile give up
    at FSDP2's hooks, inside that wrapper: no layer would be compiled.
    Source: https://www.deepspeed.ai/docs/config-json/#activation-checkpointing

    Raises:
        InputError: the flag says so, too, or more is asked for than transformers' recompute does.
    """
    owner = recompute_owner()
    if owner is None:
        return
    if training.gradient_checkpointing:
        raise InputError(
            f"--gradient_checkpointing and {owner} both switch recompute on. The launcher's configuration owns it "
            "here: leave the flag out, or take the YAML without recompute."
        )
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "").lower() == "true":
        raise InputError(
            "fsdp_activation_checkpointing_offload: true in the YAML's fsdp_config: not tried here. Set it to false."
        )
    section = deepspeed_file()[1].get(SECTION, {})
    if unknown := [name for name, value in section.items() if value]:
        raise InputError(
            f"{owner}: {', '.join(unknown)} would be ignored: the layers are recomputed by transformers, which only "
            "knows all of a layer. Set it to false."
        )
    for name in ("gradient_checkpointing", "activation_checkpointing"):  # transformers 5.23 reads the second
        if hasattr(training, name):
            setattr(training, name, True)
    if under_fsdp():
        os.environ |= {"FSDP_ACTIVATION_CHECKPOINTING": "false", TAKEN_OVER: "true"}


def under_fsdp() -> bool:
    """Whether the YAML says FSDP. Until a Trainer is made, accelerate's state calls that MULTI_GPU, as it does DDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def add_up_in_fp32(training: TrainingArguments) -> None:
    """Have the gradients of micro-batches added up in fp32, before a Trainer is made. DDP does so by itself.

    Source: https://github.com/deepspeedai/DeepSpeed/issues/1800, why DeepSpeed does not.
    """
    if training.deepspeed_plugin is not None:
        training.deepspeed_plugin.deepspeed_config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    if under_fsdp():  # without this a step would hold the gradients of all layers whole, not sharded
        training.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True}


def gather_layers_whole(plugin: DeepSpeedPlugin | None, model: PreTrainedModel) -> None:
    """Have ZeRO-3 gather the parameters of a layer at once, and compile the layer, before ``model`` is prepared.

    DeepSpeed would gather those of each module when that is called: many small messages, and hooks in Python between
    them. Compiled is a layer's forward without the hooks around it; what is not gathered so is not compiled.
    Source: https://deepspeed.readthedocs.io/en/latest/zero3.html, "leaf modules"
    """
    if plugin is None or plugin.zero_stage != 3:
        return
    zero, layers = plugin.deepspeed_config["zero_optimization"], separate_layers(model)
    compiled = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"
    whole = {"classes": sorted({type(layer).__name__ for layer in layers})}
    if not layers or zero.setdefault("leaf_module", whole) != whole:
        if compiled:
            why = "the JSON has its own leaf_module" if layers else "the layers are not known, or share parameters"
            say(f"note: not compiled: {why}; ZeRO-3's hooks within layers are not tried with torch.compile here.")
            for module in model.modules():
                module.compile = lambda **settings: None
        return
    if not model.get_input_embeddings().weight.requires_grad:
        model.enable_input_require_grads()  # without it DeepSpeed releases the first layer before its backward is done
    if compiled:
        # DeepSpeed's own linear layer has wrong gradients when torch 2.11 compiles it. It keeps no views of parameters
        # for backward, which would hold what forward gathered; without it, such views are taken anew.
        zero["memory_efficient_linear"] = False
        torch._functorch.config.recompute_views = True
        for module in model.modules():
            module.compile = partial(compile_forward, module)
        model.compile = lambda **settings: [layer.compile(**settings) for layer in layers]  # not regional: the same


def separate_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the layers that ``model`` is a list of, if none shares a parameter with anything else; else none.

    DeepSpeed is done with a layer's gradients when its backward is: what came from elsewhere later would be lost.
    """
    names = model._no_split_modules or []
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = [layer for found in lists for layer in found if type(layer).__name__ in names]
    theirs = {id(parameter) for layer in layers for parameter in layer.parameters()}
    uses = sum(id(parameter) in theirs for _, parameter in model.named_parameters(remove_duplicate=False))
    return layers if uses == len(theirs) else []


def compile_forward(module: torch.nn.Module, **settings) -> None:
    """Replaces: Module.compile, which compiles the module's hooks with it. A copy would call the original's forward."""
    module.forward = torch.compile(module.forward, **settings)


def reduce_in_fp32(accelerator: Accelerator) -> None:
    """Have FSDP2 add up the gradients of all processes in fp32, before the model is sharded.

    Accelerate's own policy does that in bf16 or fp16, and returns the loss in that, too: three digits of it, or inf.
    """
    plugin, half = getattr(accelerator.state, "fsdp_plugin", None), {"bf16": torch.bfloat16, "fp16": torch.float16}
    if plugin is not None and accelerator.mixed_precision in half:
        computed = half[accelerator.mixed_precision]
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=torch.float32)


def strategy_of(training: TrainingArguments) -> str:
    """Return how this launch divides the work: single, ddp, zero1, zero2, zero3, fsdp1 or fsdp2."""
    if training.deepspeed_plugin is not None:
        return f"zero{training.deepspeed_plugin.zero_stage}"
    if under_fsdp():
        return f"fsdp{os.environ.get('FSDP_VERSION', '1')}"
    return "ddp" if training.world_size > 1 else "single"


def offloads(training: TrainingArguments) -> bool:
    """Whether parameters or optimizer states live in main memory."""
    if training.deepspeed_plugin is not None:
        zero = training.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        devices = {(zero.get(name) or {}).get("device") for name in ("offload_optimizer", "offload_param")}
        return bool(devices & {"cpu", "nvme"})
    return strategy_of(training) == "fsdp2" and os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true"
