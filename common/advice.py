"""What would make a run fit into the memory of its card, the cheapest first."""

from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.memory import GIB, Setting, predict

BUSY_TOKENS = 8192  # at once keep a large GPU busy (assumed); with fewer, halving the micro-batch costs speed


def described(setting: Setting) -> str:
    """Return a setting in words."""
    extras = [
        word for word in ("compiled", "recompute", "offload_optimizer", "offload_parameters") if getattr(setting, word)
    ]
    return (
        f"{setting.strategy} on {setting.processes} card(s), {setting.rows} rows of {setting.context_length} tokens at "
        f"once on each, {setting.optimizer}, mixed precision {setting.precision}, {', '.join(extras) or 'not compiled'}"
    )


def advised(model: PreTrainedModel, setting: Setting, limit_gib: float) -> str:
    """Return, for people, what would make ``setting`` fit into ``limit_gib``."""
    switches = advice(model, setting, limit_gib)
    if not switches:
        return "Nothing known here makes it fit: take more or larger cards, a smaller model, or shorter rows."
    return "What makes it fit, the cheapest first:\n" + "\n".join(f"  {switch}" for switch in switches)


def switches(setting: Setting) -> list[tuple[str, Setting]]:
    """Return what saves memory, each on top of those before it, the cheapest first."""
    found, now = [], setting

    def switch(name: str, **changes) -> None:
        nonlocal now
        now = replace(now, **changes)
        found.append((name, now))

    if not now.fused_loss:
        switch("use_fused_loss: the logits are never held", fused_loss=True)
    if not now.compiled:
        switch("a YAML with dynamo_config: compiled layers keep less", compiled=True)
    while now.rows > 1 and now.rows * now.context_length > BUSY_TOKENS:
        switch(f"--per_device_train_batch_size {now.rows // 2}", rows=now.rows // 2)
    if now.processes > 1 and now.method is None:
        if now.strategy in ("single", "ddp", "zero1"):
            switch("accelerate_configs/zero2.yaml", strategy="zero2")
        if now.strategy not in ("fsdp2", "zero3"):
            switch("accelerate_configs/fsdp2.yaml", strategy="fsdp2")
    while now.rows > 1:
        switch(f"--per_device_train_batch_size {now.rows // 2}", rows=now.rows // 2)
    if not now.recompute:
        switch("--gradient_checkpointing true: activations are computed twice", recompute=True)
    if "8bit" not in now.optimizer and now.strategy in ("single", "ddp"):
        optimizer = "rounding_8bit" if now.optimizer.startswith("rounding") else "adamw_8bit"
        switch("--optimizer adamw --optim adamw_8bit", optimizer=optimizer)
    if now.method is not None:
        found += switches_of_method(now)
    return found


def switches_of_method(setting: Setting) -> list[tuple[str, Setting]]:
    """Return those that recipes/low_memory_16gb.py has beside; a ``--method`` goes without a step inside backward."""
    found, optimizer = [], "8bit" if "8bit" in setting.optimizer else "32bit"
    if not setting.in_backward and setting.processes == 1 and setting.precision != "fp16":
        name = f"--step_in_backward --max_grad_norm 0 --tokens_per_step {setting.context_length}"
        changed = dict(in_backward=True, accumulated=False, optimizer=f"rounding_{optimizer}")
        found.append((f"{name}: one micro-batch a step, no clipping", replace(setting, **changed)))
    if setting.precision == "fp8":  # adapters are not for it
        return found
    own = dict(in_backward=False, optimizer="adamw_8bit" if optimizer == "8bit" else "adamw")
    for method, why in (("lora", "adapters beside frozen weights"), ("qlora", "the frozen ones in 4 bits")):
        if setting.method == "full" or (setting.method, method) == ("lora", "qlora"):
            found.append((f"--method {method}: {why}", replace(setting, method=method, **own)))
    return found


def advice(model: PreTrainedModel, setting: Setting, limit_gib: float) -> list[str]:
    """Return the switches that make ``setting`` fit into ``limit_gib``, the cheapest first; empty if none do.

    Of several micro-batches, of several YAMLs, and of what changes the method, only the last is named.
    """
    tried: list[str] = []
    for name, changed in switches(setting):
        kind = name.split()[0].split("/")[0]
        replaced = (kind, "--step_in_backward") if kind == "--method" else kind
        tried = [earlier for earlier in tried if not earlier.startswith(replaced)] + [name]
        if predict(beside_adapters(model, changed), changed).total <= limit_gib * GIB:
            return tried
    return []


def beside_adapters(model: PreTrainedModel, setting: Setting) -> PreTrainedModel:
    """Return ``model``, or what ``--method lora`` makes of it, without memory, if the setting says so."""
    if setting.method not in ("lora", "qlora") or hasattr(model, "peft_config"):
        return model
    from peft import LoraConfig, get_peft_model  # imported where it is used only

    dtype = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}.get(setting.precision, torch.float32)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
