"""What makes a run fit that needs more memory than there is, the cheapest first; and what else fits such a card."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.distributed.strategy import FSDP2, ZERO2
from common.model.from_config import planned_model
from common.model.memory import Setting, predict, state_bits
from common.model.presets import PRESETS, PUBLISHED
from common.system import GIB

BUSY_TOKENS = 8192  # at once keep a large GPU busy (assumed); with fewer, halving the micro-batch costs speed


def described(setting: Setting) -> str:
    """Return a setting in words."""
    extras = [word for word in ("compiled", "offload_optimizer", "offload_parameters") if getattr(setting, word)]
    if setting.recompute:
        extras.append("recompute" if setting.recomputed == "all" else f"recompute {setting.recomputed}")
    divided = f" ({setting.tensor} compute each layer together)" if setting.tensor > 1 else ""
    return (
        f"{setting.strategy} on {setting.processes} card(s){divided}, {setting.rows} rows of {setting.context_length} "
        f"tokens at once on each, {setting.optimizer}, mixed precision {setting.precision}, "
        f"{', '.join(extras) or 'not compiled'}"
    )


@dataclass(frozen=True)
class Switch:
    """Something that saves memory: its name for people, the setting with it, and what it changes in the command."""

    name: str
    setting: Setting
    flags: dict[str, object] = field(default_factory=dict)  # of the recipe
    launcher: str = ""  # flags of accelerate launch
    yaml: str | None = None


def advised(
    model: PreTrainedModel, setting: Setting, limit_gib: float, command: Callable[[list[Switch]], str] | None = None
) -> str:
    """Return, for people, what would make ``setting`` fit into ``limit_gib``.

    Args:
        command: makes the complete command of switches; None: it is left out.
    """
    found = switches_that_fit(model, setting, limit_gib)
    if not found:
        return "Nothing known here makes it fit: take more or larger cards, a smaller model, or shorter rows."
    named = "What makes it fit, the cheapest first:\n" + "\n".join(f"  {switch.name}" for switch in found)
    return named if command is None else f"{named}\nThe whole command:\n  {command(found)}"


def switches(setting: Setting) -> list[Switch]:
    """Return what saves memory, each on top of those before it, the cheapest first."""
    found, now = [], setting

    def switch(name: str, flags: dict | None = None, launcher: str = "", yaml: str | None = None, **changes) -> None:
        nonlocal now
        now = replace(now, **changes)
        found.append(Switch(name, now, flags or {}, launcher, yaml))

    def halve() -> None:
        rows = now.rows // 2
        switch(f"--per_device_train_batch_size {rows}", {"per_device_train_batch_size": rows}, rows=rows)

    if not now.fused_loss:
        switch("use_fused_loss: the logits are never held", fused_loss=True)
    if not now.compiled and now.tensor * now.expert == 1:  # beside a divided model, a launch refuses it
        inductor = "--dynamo_backend inductor"
        switch(f"{inductor}, before the recipe: compiled layers keep less", launcher=inductor, compiled=True)
    while now.rows > 1 and now.rows * now.context_length > BUSY_TOKENS:
        halve()
    if now.processes > 1 and now.method is None:
        for yaml, strategy, has in (
            ("accelerate_configs/zero2.yaml", ZERO2, now.strategy.shards_gradients),
            ("accelerate_configs/fsdp2.yaml", FSDP2, now.strategy.shards_parameters),
        ):
            if not has:
                switch(yaml, yaml=yaml, strategy=strategy)
    while now.rows > 1:
        halve()
    kinds = {"keep_products": "what costs little is computed twice", "2": "every second layer is computed twice"}
    kinds = {kind: why for kind, why in kinds.items() if not now.recompute and (now.compiled or kind == "2")}
    if not now.recompute or now.recomputed != "all":
        kinds["all"] = "activations are computed twice"
    for kind, why in kinds.items():
        switch(f"--recompute {kind}: {why}", {"recompute": kind}, recompute=True, recomputed=kind)
    if state_bits(now.optimizer) == 32 and not now.strategy.shards_states:
        optimizer = "rounding_8bit" if now.optimizer.startswith("rounding") else "adamw_8bit"
        flags = {"optimizer": "adamw", "optim": "adamw_8bit"}
        switch("--optimizer adamw --optim adamw_8bit", flags, optimizer=optimizer)
    if now.method is not None:
        found += switches_of_method(now)
    return found


def switches_of_method(setting: Setting) -> list[Switch]:
    """Return those that recipes/low_memory_16gb.py has beside; a ``--method`` goes without a step inside backward."""
    found = []
    optimizer = "8bit" if state_bits(setting.optimizer) == 8 else "32bit"
    if not setting.in_backward and setting.processes == 1 and setting.precision != "fp16":
        flags = in_backward_flags(setting)
        changed = dict(in_backward=True, accumulated=False, optimizer=f"rounding_{optimizer}")
        name = f"--step_in_backward --max_grad_norm 0 --tokens_per_step {flags['tokens_per_step']}"
        found.append(Switch(f"{name}: one micro-batch a step, no clipping", replace(setting, **changed), flags))
    if setting.precision == "fp8":  # adapters are not for it
        return found
    own = dict(in_backward=False, optimizer="adamw_8bit" if optimizer == "8bit" else "adamw")
    for method, why in (("lora", "adapters beside frozen weights"), ("qlora", "the frozen ones in 4 bits")):
        if setting.method == "full" or (setting.method, method) == ("lora", "qlora"):
            changed = replace(setting, method=method, **own)
            found.append(Switch(f"--method {method}: {why}", changed, {"method": method}))
    return found


def in_backward_flags(setting: Setting) -> dict[str, object]:
    """Return the flags of recipes/low_memory_16gb.py with which the optimizer steps inside backward."""
    tokens = setting.rows * setting.context_length
    return {"step_in_backward": True, "max_grad_norm": 0, "tokens_per_step": tokens}


def switches_that_fit(model: PreTrainedModel, setting: Setting, limit_gib: float) -> list[Switch]:
    """Return the switches that make ``setting`` fit into ``limit_gib``, the cheapest first; empty if none do.

    Of several micro-batches, of several YAMLs, and of what changes the method, only the last is among them.
    """
    tried: list[Switch] = []
    for switch in switches(setting):
        kind = switch.name.split()[0].split("/")[0]
        replaced = (kind, "--step_in_backward") if kind == "--method" else kind
        tried = [earlier for earlier in tried if not earlier.name.startswith(replaced)] + [switch]
        if predict(beside_adapters(model, switch.setting), switch.setting).total <= limit_gib * GIB:
            return tried
    return []


def advice(model: PreTrainedModel, setting: Setting, limit_gib: float) -> list[str]:
    """Return the names of ``switches_that_fit``."""
    return [switch.name for switch in switches_that_fit(model, setting, limit_gib)]


def beside_adapters(model: PreTrainedModel, setting: Setting) -> PreTrainedModel:
    """Return ``model``, or what ``--method lora`` makes of it, without memory, if the setting says so."""
    if setting.method not in ("lora", "qlora") or hasattr(model, "peft_config"):
        return model
    from peft import LoraConfig, get_peft_model  # imported where it is used only

    dtype = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}.get(setting.precision, torch.float32)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))


def published_that_fit(setting: Setting, limit_gib: float) -> list[tuple[str, dict[str, object], float]]:
    """Return the largest published models that recipes/low_memory_16gb.py trains on one such card, by method.

    Each with what is trained in words, the flags, and the planned GiB: one row at once, activations recomputed.
    """
    half = "fp16" if setting.precision == "fp16" else "bf16"
    common = Setting(1, setting.context_length, precision=half, recompute=True, method="full")
    kept = torch.float32 if half == "fp16" else torch.bfloat16  # the fp16 scaler needs weights in fp32
    whole = "adamw_8bit" if half == "fp16" else "rounding_8bit"
    in_backward = replace(common, optimizer="rounding_8bit", in_backward=True, accumulated=False)
    methods = [("all parameters", kept, replace(common, optimizer=whole), {})]
    if half == "bf16":
        name = "all parameters, the optimizer stepping inside backward"
        methods.append((name, kept, in_backward, in_backward_flags(common)))
    for method, name in (("lora", "adapters beside"), ("qlora", "adapters beside, in 4 bits,")):
        adapters = replace(common, optimizer="adamw_8bit", method=method)
        methods.append((name, torch.bfloat16, adapters, {"method": method}))
    found, largest = [], 0
    for name, dtype, changed, flags in methods:
        for model_id, (preset, rows) in reversed(PUBLISHED.items()):
            model = planned_model(PRESETS[preset], rows, setting.context_length).to(dtype)
            need = predict(beside_adapters(model, changed), changed).total / GIB
            if need <= limit_gib:
                if model.num_parameters() > largest:  # a cheaper method trains no larger one
                    of = "" if "beside" in name else " of"
                    found.append((f"{name}{of} {model_id}", {"model": model_id} | flags, need))
                    largest = model.num_parameters()
                break
    return found
