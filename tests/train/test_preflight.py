"""The preflight: its table, and wrong combinations refused with the YAML or flag that works."""

import json
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, small_run
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

import common.train.preflight as preflight_module
from common.arguments import SharedArguments
from common.console import InputError
from common.distributed.launch import Launch, read_launch
from common.model.from_config import planned_model
from common.model.memory import Setting
from common.run.lock import lock_folder
from common.train.batch import derive_micro_batch
from common.train.preflight import preflight

SHAPE = dict(
    model_type="qwen2", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2,
)  # fmt: skip
ZERO = {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True}}


# What a launcher brings is written as a dict: "environment" is its variables, the rest what TrainingArguments then say.
def fsdp(**environment) -> dict:
    """Return a launch by an FSDP YAML."""
    defaults = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT")
    return dict(environment=defaults | environment)


def zero(stage: int, **config) -> dict:
    """Return a launch by a DeepSpeed YAML."""
    environment = dict(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage))
    environment |= dict(ACCELERATE_DYNAMO_BACKEND="no", LOCAL_RANK="1")  # not the process that looks after locks
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=ZERO | config)
    return dict(deepspeed_plugin=plugin, environment=environment)


def size_of(model, guessed: bool = False) -> SimpleNamespace:
    """Stand in for the size of a model that is known before it is made."""
    return SimpleNamespace(guessed=guessed, planned=lambda context_length: model)


def training_of(folder, **changes):
    """Return TrainingArguments of one CPU process, as a recipe makes them, with changes a launcher would make."""
    real = TrainingArguments(output_dir=str(folder), use_cpu=True, gradient_accumulation_steps=1, max_steps=5)
    names = [name for name in dir(real) if not name.startswith("_")]
    plain = {name: getattr(real, name) for name in names if not callable(getattr(real, name))}
    plain |= dict(gradient_accumulation_steps=0, per_device_train_batch_size=4)
    plain |= dict(to_dict=real.to_dict, get_warmup_steps=real.get_warmup_steps)
    return SimpleNamespace(**plain | changes)


def run(monkeypatch, folder, launched: dict, shared: dict | None = None, model=None, **more) -> Launch:
    """Return what the preflight makes of a launch; ``model``: without memory, or None if it is not known."""
    arguments = SharedArguments(**dict(context_length=64, tokens_per_step=512, optimizer="adamw") | (shared or {}))
    training = training_of(folder, **{name: value for name, value in launched.items() if name != "environment"})
    for name, value in launched.get("environment", {}).items():
        monkeypatch.setenv(name, value)
    return preflight("a.py", read_launch(), size_of(model), arguments, training, **more)


LOW_BIT = dict(optim=OptimizerNames("adamw_8bit"))
WRONG = {
    "8-bit AdamW under ZeRO-2": (zero(2) | LOW_BIT, {}, {}, r"8-bit.*under zero2: .*ddp.yaml, or --optim adamw_torch"),
    "8-bit AdamW under FSDP2": (fsdp() | LOW_BIT, {}, {}, "8-bit.*under fsdp2: .*single_gpu.yaml"),
    "QLoRA under FSDP2": (fsdp(), {}, dict(method="qlora"), "QLoRA under fsdp2: .*ddp.yaml"),
    "QLoRA under ZeRO-3": (zero(3), {}, dict(method="qlora"), "QLoRA under zero3: .*ddp.yaml"),
    "Muon under ZeRO": (zero(1), dict(optimizer="muon"), {}, "cuts up the matrices.*Use --optimizer adamw"),
    "Muon, offloaded": (fsdp(FSDP_OFFLOAD_PARAMS="true"), dict(optimizer="muon"), {}, "on the CPU.*--optimizer adamw"),
    "Muon on LoRA": ({}, dict(optimizer="muon"), dict(method="lora"), "Muon for LoRA's factors.*--optimizer adamw"),
    "FSDP1": (fsdp(FSDP_VERSION="1"), {}, {}, "Write fsdp_version: 2"),
    "FSDP2 in local shards": (
        fsdp(FSDP_STATE_DICT_TYPE="LOCAL_STATE_DICT"), {}, {}, "Write one of FULL_STATE_DICT, SHARDED_STATE_DICT"
    ),
    "ZeRO-3 without whole weights": (zero(3, zero_optimization={}), {}, {}, "zero3_save_16bit_model: true"),
    "recompute twice": (
        fsdp(FSDP_ACTIVATION_CHECKPOINTING="true") | dict(gradient_checkpointing=True), {}, {},
        "--gradient_checkpointing and fsdp_activation_checkpointing.*leave the flag out",
    ),
    "recompute that a family has not": (
        dict(gradient_checkpointing=True), {}, dict(model=planned_model({"model_type": "openai-gpt"}, 100, 64)),
        r"recompute \(--gradient_checkpointing\): transformers has none for OpenAIGPT.*Leave it out",
    ),
    "accumulation twice": (zero(2, gradient_accumulation_steps=16), {}, {}, "gradient_accumulation_steps: auto"),
    "clipping twice": (zero(2, gradient_clipping=0.3), {}, {}, "gradient_clipping: auto"),
    "DeepSpeed's own optimizer": (zero(2, optimizer={"type": "Adam"}), {}, {}, "optimizer in the deepspeed_config"),
    "fp16 on a CPU": (dict(fp16=True), {}, {}, "fp16 under cpu: .*accelerate_configs/cpu.yaml"),
    "precision twice": (
        dict(bf16=True, environment={"ACCELERATE_MIXED_PRECISION": "fp16"}), {}, {}, "says mixed_precision fp16"
    ),
    "FP8 on a CPU": (dict(bf16=True, environment={"ACCELERATE_MIXED_PRECISION": "fp8"}), {}, {}, "CPU has none. Use"),
    "FP8 without bf16": (dict(environment={"ACCELERATE_MIXED_PRECISION": "fp8"}), {}, {}, "flags say no. The launcher"),
    "processes alone": (dict(environment={"WORLD_SIZE": "2"}), {}, {}, "2 independent models.*cpu_2proc.yaml"),
    "a batch in pieces": ({}, dict(tokens_per_step=500), {}, "Use --tokens_per_step 512"),
    "a batch by the card": (
        dict(per_device_train_batch_size=0, gradient_accumulation_steps=4), {}, {}, "would depend on the card"
    ),
    "another schedule's settings": (
        dict(lr_scheduler_kwargs={"num_decay_steps": 0.3}), {}, {},
        "--lr_scheduler_type linear.*unexpected keyword argument 'num_decay_steps'.*none: --lr_scheduler_kwargs '{}'",
    ),
    "a schedule without its settings": (
        dict(lr_scheduler_type=SchedulerType("warmup_stable_decay")), {}, {},
        "missing .* 'num_decay_steps'. Give settings of this schedule",
    ),
    "a schedule whose settings are no numbers": (
        dict(lr_scheduler_type=SchedulerType("cosine"), lr_scheduler_kwargs={"num_cycles": "x"}), {}, {},
        "--lr_scheduler_type cosine with --lr_scheduler_kwargs {'num_cycles': 'x'}: could not convert",
    ),
    "a schedule that ends in a division by zero": (
        dict(lr_scheduler_type=SchedulerType("polynomial"), lr_scheduler_kwargs={"power": -1}), {}, {},
        "--lr_scheduler_type polynomial .*negative power",
    ),
    "an optimizer without its package": (dict(optim="schedule_free_adamw"), {}, {}, "need to install `schedulefree`"),
    "a low-rank optimizer without its package": (
        dict(optim="galore_adamw", optim_target_modules="all-linear"), {}, {}, "package galore_torch is not installed"
    ),
    "an optimizer inside backward": (dict(optim="adalomo"), {}, {}, "no bad step can be left out"),
    "settings that AdamW does not read": (dict(optim_args="momentum=0.9"), {}, {}, "does not read them. Leave them"),
    "settings that Muon does not read": (
        dict(optim_args="momentum=0.9"), dict(optimizer="muon"), {}, "Muon does not read them"
    ),
    "a setting of SGD with a typo": (
        dict(optim="sgd", optim_args="momentu=0.9"), {}, {}, "--optim_args momentu=0.9: it changes nothing"
    ),
    "a setting of SGD without a value": (dict(optim="sgd", optim_args="momentum"), {}, {}, "--optim_args momentum: "),
    "modules of an optimizer that has none": (
        dict(optim_target_modules="all-linear"), {}, {}, "trains all modules alike.*--lora_targets"
    ),
    "a tracker without its package": (dict(report_to=["comet_ml"]), {}, {}, "--report_to comet_ml: .*pip install"),
    "a tracker that nobody knows": (dict(report_to=["nonsense"]), {}, {}, "--report_to: nonsense is not supported"),
    "SwanLab by the other flag": (dict(report_to=["swanlab"]), {}, {}, "its own flag, --swanlab"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_combinations_are_refused_with_what_works(monkeypatch, tmp_path, case):
    launched, shared, more, message = WRONG[case]
    with pytest.raises(InputError, match=f"(?s){message}"):
        run(monkeypatch, tmp_path / "run", launched, shared, **more)
    assert not (tmp_path / "run").exists(), "refused before anything is written"


def test_a_folder_that_cannot_be_one_is_refused_before_anything_is_read(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder, problem in (
        (tmp_path / "file", "file is a file. Choose another folder"),
        (tmp_path / "file" / "run", "file is a file"),
        (tmp_path / "link", "link is a link to .*nowhere, which is not there"),
        (tmp_path / ("x" * 300), "(File name too long|300 bytes, and 255 is the limit)"),
    ):
        with pytest.raises(InputError, match=f"--output_dir .*: .*{problem}"):
            run(monkeypatch, folder, {})
    with pytest.raises(InputError, match="--cache_dir .*: .*file is a file"):
        run(monkeypatch, tmp_path / "run", {}, dict(cache_dir=str(tmp_path / "file" / "cache")))
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nowhere").exists()
    run(monkeypatch, tmp_path / ("x" * 255), {})


@pytest.mark.parametrize(("gib", "rows"), [(0.7, 1), (80, 8)])
def test_rows_left_open_are_those_that_fit_this_card(monkeypatch, tmp_path, capsys, gib, rows):
    monkeypatch.setattr("common.train.preflight.card_gib", lambda training: gib)
    model = planned_model(SHAPE, 1000, 64)
    left_open = dict(per_device_train_batch_size=0, per_device_eval_batch_size=0)
    assert run(monkeypatch, tmp_path, left_open, model=model).rows_per_step == 8, "the step stays what it is"
    assert f"batch: {rows} rows x 1 processes x 64 tokens x {8 // rows} accumulated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("known", "card", "unknown"), [(False, 80, "the model's size is not known"), (True, None, "memory is not known")]
)
def test_few_rows_on_a_card_are_said_aloud(capsys, known, card, unknown):
    training = SimpleNamespace(per_device_train_batch_size=0, per_device_eval_batch_size=0)
    training.gradient_accumulation_steps = 0
    training.device = torch.device("meta")  # stands in for a card
    shared = SharedArguments(context_length=64, tokens_per_step=1 << 20)
    model, setting = planned_model(SHAPE, 1000, 64) if known else None, Setting(rows=1, context_length=64)
    derive_micro_batch(model, setting, Launch(optimizer="adamw"), training, shared, card)
    assert training.per_device_train_batch_size == training.per_device_eval_batch_size == 8192 // 64
    assert f"{unknown} here. More: --per_device_train_batch_size" in capsys.readouterr().out


TWO = dict(world_size=2, environment={"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("launched", "strategy"),
    [({}, "single"), (TWO, "ddp"), (zero(1), "zero1"), (zero(3), "zero3"), (fsdp(), "fsdp2")],
)
def test_right_ones_pass_and_the_table_says_what_they_are(monkeypatch, tmp_path, capsys, launched, strategy):
    launch = run(monkeypatch, tmp_path, launched, model=planned_model(SHAPE, 1000, 64))
    assert (launch.rows_per_step, launch.optimizer, launch.strategy) == (8, "adamw", strategy)
    table = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if not line.startswith("note"))
    names = "processes strategy precision compile batch optimizer memory disk folder"
    assert list(table) == names.split()
    assert table["strategy"] == f"{strategy}; trained: full"
    assert "= 512 tokens a step" in table["batch"]
    processes = launched.get("world_size", 1)
    assert table["processes"].startswith(f"{processes} on 1 machine, {processes} here on ")


def test_offloading_is_seen_by_every_way(monkeypatch, tmp_path):
    """In DeepSpeed's JSON, in the YAML's deepspeed_config, and in its fsdp_config."""
    assert not read_launch().offloads
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    monkeypatch.setenv("LOCAL_RANK", "1")
    path = tmp_path / "zero.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    for optimizer, parameters in (("cpu", "none"), ("none", "nvme"), ("none", "none")):
        offload = {"offload_optimizer": {"device": optimizer}, "offload_param": {"device": parameters}}
        path.write_text(json.dumps({"zero_optimization": {"stage": 3, **offload}}))
        launch = read_launch()
        assert (launch.offload_optimizer, launch.offload_parameters) == (optimizer != "none", parameters != "none")
        assert launch.offloads == (launch.offload_optimizer or launch.offload_parameters)
        assert launch.strategy == "zero3"
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    launch = read_launch()
    assert (launch.strategy, launch.offload_optimizer, launch.offload_parameters) == ("zero2", True, False)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    for name, value in fsdp(FSDP_OFFLOAD_PARAMS="true")["environment"].items():
        monkeypatch.setenv(name, value)
    launch = read_launch()
    assert launch.offloads and launch.strategy == "fsdp2"


def test_more_processes_than_devices_are_refused_before_they_look_for_theirs(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(InputError, match="8 processes.*2 devices.*--num_processes 2"):
        read_launch()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert read_launch().local_processes == 2


def test_a_full_disk_is_found_before_the_run(monkeypatch, tmp_path):
    model = planned_model(SHAPE, 1000, 64)
    small = SimpleNamespace(free=12 * model.num_parameters())
    monkeypatch.setattr(preflight_module.check_disk_space.__globals__["shutil"], "disk_usage", lambda _: small)
    with pytest.raises(InputError, match="--save_total_limit 1"):
        run(monkeypatch, tmp_path / "not" / "there", {}, model=model)


def test_another_run_in_the_folder_is_found_before_data_and_weights(wiki, cache_dir, tmp_path, monkeypatch):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"recipe": "mine.py", "training": {}, "data": {}}))
    monkeypatch.setattr(wiki, "resolve_sources", None)  # would be called for the data
    with pytest.raises(InputError, match="recipe: 'mine.py' in the folder, 'wiki_zh_scratch.py' now"):
        wiki.main(small_run(cache_dir, tmp_path))


def test_a_folder_in_which_a_run_goes_on_is_refused(tmp_path, monkeypatch):
    code = f"from common.run.lock import lock_folder; kept = lock_folder({str(tmp_path)!r}); print('locked'); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert other.stdout.readline() == "locked\n"
    monkeypatch.setattr(preflight_module, "lock_folder", partial(lock_folder, seconds=0.1))  # it waits 15 s
    with pytest.raises(InputError, match="is being trained into by another process"):
        run(monkeypatch, tmp_path, {})
    other.kill()  # as kill -9: nothing is left to clean up
    other.wait()
    run(monkeypatch, tmp_path, {})
    assert run(monkeypatch, tmp_path, {}).rows_per_step == 8  # the same process, as in a notebook


@pytest.mark.parametrize(("wanted", "given", "expected"), [("muon", 0, 4), ("adamw", 0, 1), ("muon", 0.5, 0.5)])
def test_the_learning_rate_is_that_of_the_optimizer_unless_one_is_given(
    monkeypatch, tmp_path, capsys, wanted, given, expected
):
    """As for zero2.yaml, under which the recipe's optimizer is AdamW."""
    training = training_of(tmp_path, learning_rate=given)
    shared = SharedArguments(context_length=64, tokens_per_step=512, optimizer=wanted)
    launch = preflight("a.py", Launch(), None, shared, training, learning_rates={"muon": 4, "adamw": 1})
    assert launch.optimizer == wanted
    assert training.learning_rate == expected
    assert f"learning rate: {expected}" in capsys.readouterr().out


def test_a_guessed_size_refuses_nothing(monkeypatch, tmp_path, capsys):
    """The tokenizer, and so the number of parameters, is not known yet: neither memory nor disk is said to fit."""
    monkeypatch.setattr(preflight_module.check_disk_space.__globals__["shutil"], "disk_usage", None)  # would be called
    shared = SharedArguments(context_length=64, tokens_per_step=512)
    size = size_of(planned_model(SHAPE, 1000, 64), guessed=True)
    assert preflight("a.py", Launch(), size, shared, training_of(tmp_path)).rows_per_step == 8
    printed = capsys.readouterr().out
    assert "memory: " not in printed and "disk: " not in printed and "folder: " in printed


@pytest.mark.parametrize("given", [{}, {"bf16": True}])
def test_the_precision_names_what_decides_it(given, monkeypatch, tmp_path, capsys):
    training = training_of(tmp_path, bf16=bool(given))
    shared = SharedArguments(context_length=64, tokens_per_step=512, optimizer="adamw")
    shared.given = given
    preflight("a.py", read_launch(), size_of(None), shared, training)
    wanted = "bf16 on CPU (--bf16)" if given else "fp32 on CPU (the YAML's mixed_precision)"
    assert f"precision: {wanted}\n" in capsys.readouterr().out


@pytest.mark.parametrize("given", [["lr_scheduler_type"], ["lr_scheduler_type", "lr_scheduler_kwargs"]])
def test_another_schedule_needs_no_settings_of_its_own(given, monkeypatch, tmp_path):
    """A flag names it: the recipe's settings are for its own schedule. Those of the command line are refused."""
    settings = dict(lr_scheduler_type=SchedulerType("cosine"), lr_scheduler_kwargs={"num_decay_steps": 0.3})
    shared = SharedArguments(context_length=64, tokens_per_step=512, optimizer="adamw")
    shared.given = dict.fromkeys(given)
    training = training_of(tmp_path, **settings)
    if len(given) == 1:
        preflight("a.py", read_launch(), size_of(None), shared, training)
        assert training.lr_scheduler_kwargs == {}
    else:
        with pytest.raises(InputError, match="unexpected keyword argument 'num_decay_steps'"):
            preflight("a.py", read_launch(), size_of(None), shared, training)
