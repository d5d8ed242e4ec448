"""--plan: the memory a run needs, and what would make it fit, before anything is loaded; --probe: by three steps.

The micro-batch, if the flags leave it open, is as many rows at once as fit the card, until more rows make it no faster.
Large micro-batches keep the card busy while the CPU prepares the next layers, above all where several cards exchange
something for each layer. The losses do not depend on the micro-batch: ``--tokens_per_step`` says what a step trains on.
"""

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainingArguments

from common.accelerator import card_bytes, memory_gib, synchronize
from common.arguments import SharedArguments
from common.console import InputError, say
from common.dataset.ledger import Ledger
from common.distributed.launch import Launch, precision_of
from common.distributed.strategy import DDP, FSDP2, SINGLE, ZERO2, Strategy
from common.model.counts import parameter_report
from common.model.fused_loss import DeferringHead
from common.model.memory import CONTEXT_BYTES, Setting, main_memory_bytes, optimizer_name, predict, state_bits
from common.model.recompute import choose_recompute
from common.model.scaling import LossLaw
from common.system import GIB
from common.train.combinations import check_combinations, choose_optimizer
from common.train.cuda_graph import LARGEST, lacking


def print_plan(
    model: PreTrainedModel,
    launch: Launch,
    shared: SharedArguments,
    training: TrainingArguments,
    own_optimizer: tuple[type, dict] | None = None,
    method: str | None = None,
) -> None:
    """Print what training ``model`` (on the meta device) needs on each card; the last line is JSON.

    The strategy is that of ``--plan_config``, an accelerate YAML; without it, one card as the environment describes it.
    ``own_optimizer`` and ``method`` are those of recipes/low_memory_16gb.py.
    """
    processes, limit = shared.plan_processes, shared.plan_memory_gib
    launch = replace(launch, optimizer=choose_optimizer(shared.optimizer, launch, training))
    launch = choose_recompute(shared.recompute, launch, training)
    check_combinations(launch, training, method or "full")
    if limit is None and torch.accelerator.is_available():
        size = card_bytes(torch.device(torch.accelerator.current_accelerator().type, 0))
        limit = None if size is None else size / GIB
    setting = setting_of_run(model, launch, training, shared.context_length, own_optimizer)
    setting = replace(setting, method=method)
    if shared.plan_config is not None:
        setting = setting_of_yaml(shared.plan_config, setting, processes)
    elif processes is not None:
        setting = replace(setting, strategy=DDP if processes > 1 else SINGLE, processes=processes)
    rows_a_step = shared.tokens_per_step // (setting.context_length * setting.processes)
    if rows_a_step < 1:
        raise InputError(
            f"--tokens_per_step {shared.tokens_per_step:,}: less than one row of {setting.context_length} tokens for "
            f"each of {setting.processes} cards. Use at least {setting.context_length * setting.processes:,}."
        )
    rows = setting.rows
    if rows == 0:
        rows = rows_that_fit(model, setting, rows_a_step, limit)
    rows = max(1, min(rows, rows_a_step))
    setting = replace(setting, rows=rows, accumulated=rows_a_step > rows)
    need = predict(model, setting)
    counts = parameter_report(model)
    active = "" if counts["active"] == counts["total"] else f", of which a token meets {counts['active']:,}"
    vocabulary = model.get_output_embeddings().weight.shape[0]
    about = f"vocabulary of {vocabulary:,} rows, {described(setting)}"
    say(f"{counts['total']:,} parameters{active}, {about}. Each card, in GiB:")
    sharing = shared.context_length // setting.context_length
    if sharing > 1:
        say(f"  ({sharing} cards share each row of {shared.context_length:,} tokens)")
    for name, value in vars(need).items():
        say(f"  {name:12}{value / GIB:8.2f}")
    say(f"  {'total':12}{need.total / GIB:8.2f}" + (f" of {limit:.2f}" if limit is not None else ""))
    moved = main_memory_bytes(model, setting)
    figures = need.as_json(limit)
    if moved:
        say(f"  main memory{moved / GIB:9.2f}, of all cards together, for what is offloaded")
        figures["main_memory_gib"] = round(moved / GIB, 3)
    if limit is not None and need.total > limit * GIB:
        say("It does not fit. " + advised(model, setting, limit))
    say(json.dumps(figures))


def probe(trainer, ledgers: dict[str, Ledger] | None = None, law: LossLaw | None = None) -> None:
    """Train three steps of a PretrainingTrainer's run, keep nothing, and print what the whole run will take.

    The last line is JSON: ``peak_gib`` (measured), ``predicted_gib``, ``tokens_per_second`` over all processes,
    ``hours`` and ``passes`` over the rows to the end of the run; with ``law``, also ``forecast``, the bits per byte to
    expect. ``ledgers`` know the bytes of the text.
    """
    arguments, steps = trainer.args, trainer.args.max_steps
    arguments.save_strategy = arguments.eval_strategy = "no"
    timer = StepTimer(stop_after=3)
    trainer.add_callback(timer)
    trainer.train()
    trainer.interruption.release()
    seconds = timer.seconds[-1] if len(timer.seconds) == 1 else statistics.mean(timer.seconds[1:])  # the first compiles
    context_length = trainer.train_dataset.context_length
    setting = setting_of_trainer(trainer)
    predicted = predict(trainer.accelerator.unwrap_model(trainer.model), setting).total - CONTEXT_BYTES
    found = {
        "peak_gib": round(memory_gib(arguments.device)["memory_peak_gib"], 3),
        "predicted_gib": round(predicted / GIB, 3),
        "tokens_per_second": round(trainer.launch.rows_per_step * context_length / seconds, 1),
        "hours": round(steps * seconds / 3600, 4),
        "passes": round(trainer.order.passes_at(trainer.order.rows_in_run), 4),
    }
    say(
        "probe: {peak_gib} GiB at the peak ({predicted_gib} predicted), {tokens_per_second:,} tokens/s, ".format(
            **found
        )
        + "{hours} hours and {passes} passes over the rows to the end. Nothing was kept.".format(**found)
    )
    if law is not None:
        body = parameter_report(trainer.accelerator.unwrap_model(trainer.model))["rest"]
        found["forecast"] = law.forecast(body, bytes_of_training_rows(ledgers), found["passes"])
        say(forecast_in_words(found["forecast"], law))
    say(json.dumps(found))


def bytes_of_training_rows(ledgers: dict[str, Ledger]) -> float:
    """Return the bytes of the text in the training rows, by their share of each source's tokens.

    Raises:
        InputError: a token store does not say how many bytes its text had.
    """
    found = 0.0
    for name, ledger in ledgers.items():
        if ledger.bytes_read == 0:
            raise InputError(f"--ladder: {name} does not say how many bytes its text had. Leave --ladder out.")
        found += ledger.bytes_read * ledger.tokens_train / ledger.tokens_read
    return found


def forecast_in_words(forecast: dict, law: LossLaw) -> str:
    """Return a forecast of a LossLaw in two sentences."""
    doubtful = " This run is outside of what the ladder measured: the law is extrapolated." * forecast["extrapolated"]
    return (
        "expected at the end: {bits_per_byte:.3f} bits per byte; with twice the parameters {twice_the_parameters:.3f}, "
        "twice the text {twice_the_text:.3f}, twice the passes {twice_the_passes:.3f}".format(**forecast)
        + f". The law was fitted on {law.text}; it missed runs that it had not seen by {law.error:.1%} on average."
        + doubtful
    )


class StepTimer(TrainerCallback):
    """Note the seconds from the end of each step to that of the next, in which a batch is fetched, too."""

    def __init__(self, stop_after: int | None = None):
        """``stop_after``: steps, of which nothing is saved."""
        self.stop_after, self.seconds = stop_after, []

    def on_train_begin(self, *_, **__):
        synchronize()
        self.ended = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.ended)
        self.ended = now
        control.should_training_stop |= len(self.seconds) == self.stop_after
        control.should_save = False  # not even when a signal asks for it: nothing is kept


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
        processes = processes or int(config.get("num_processes", 1))
        compiled = str((config.get("dynamo_config") or {}).get("dynamo_backend", "no")).lower() != "no"
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
    if processes % sharing:
        raise InputError(
            f"--plan_config {path}: {sharing} cards share each row, and {processes} cards are no multiple of it. Use "
            f"--plan_processes {max(1, processes // sharing) * sharing}."
        )
    moved = ("cpu", "nvme")
    offload_optimizer = zero.get("offload_optimizer_device") in moved or bool(fsdp.get("fsdp_offload_params"))
    no_muon = kind == "DEEPSPEED" or offload_optimizer  # choose_optimizer says why
    return replace(
        setting,
        context_length=setting.context_length // sharing,
        strategy=strategies[kind],
        processes=processes,
        copies=int(parallelism.get("parallelism_config_dp_replicate_size", 1)),
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
        raise InputError(f"deepspeed_config_file {path}: cannot be read ({error}).") from None
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
        f"out of memory: {str(error).splitlines()[0]}\nPredicted: {need:.1f} GiB for {described(setting)}. "
        f"{advised(model, setting, limit)}\nCheckpoints are kept: the same command with such a switch continues."
    )


BUSY_TOKENS = 8192  # at once keep a large GPU busy (assumed); with fewer, halving the micro-batch costs speed


def described(setting: Setting) -> str:
    """Return a setting in words."""
    extras = [word for word in ("compiled", "offload_optimizer", "offload_parameters") if getattr(setting, word)]
    if setting.recompute:
        extras.append("recompute" if setting.recomputed == "all" else f"recompute {setting.recomputed}")
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
        if not now.strategy.shards_gradients:
            switch("accelerate_configs/zero2.yaml", strategy=ZERO2)
        if not now.strategy.shards_parameters:
            switch("accelerate_configs/fsdp2.yaml", strategy=FSDP2)
    while now.rows > 1:
        switch(f"--per_device_train_batch_size {now.rows // 2}", rows=now.rows // 2)
    if not now.recompute:
        if now.compiled:
            changes = dict(recompute=True, recomputed="keep_products")
            switch("--recompute keep_products: what costs little is computed twice", **changes)
        switch("--recompute 2: every second layer is computed twice", recompute=True, recomputed="2")
    if not now.recompute or now.recomputed != "all":
        switch("--recompute all: activations are computed twice", recompute=True, recomputed="all")
    if state_bits(now.optimizer) == 32 and not now.strategy.shards_states:
        optimizer = "rounding_8bit" if now.optimizer.startswith("rounding") else "adamw_8bit"
        switch("--optimizer adamw --optim adamw_8bit", optimizer=optimizer)
    if now.method is not None:
        found += switches_of_method(now)
    return found


def switches_of_method(setting: Setting) -> list[tuple[str, Setting]]:
    """Return those that recipes/low_memory_16gb.py has beside; a ``--method`` goes without a step inside backward."""
    found = []
    optimizer = "8bit" if state_bits(setting.optimizer) == 8 else "32bit"
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
