"""Every option of every recipe, once in each precision that the YAMLs have.

The options are the fields of the recipes' own arguments, of SharedArguments, and those of TrainingArguments that decide
what is trained. A new one fails the first test until it has a run, or a reason why it needs none. Each run is compared
with the same run in fp32. With a GPU, also in fp16 and fp8: TEST_GPU=0 python -m pytest -m heavy -k every_option
"""

import json
import math
from dataclasses import fields
from itertools import count
from pathlib import Path

import pytest
import test_low_memory_16gb
import test_openwebtext_continue
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from conftest import ROOT, load_recipe, small_run
from test_explicit_pipeline import launched
from transformers import TrainingArguments

from common.arguments import SharedArguments
from common.console import InputError
from common.trainer_fields import deciding_fields

slow_kernels = test_low_memory_16gb.slow_kernels  # the fixture: 4-bit products on CPUs
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: TEST_GPU=0")
YAMLS = {"no": "cpu.yaml", "bf16": "single_gpu.yaml", "fp16": "fp16.yaml", "fp8": "fp8.yaml"}
PRECISIONS = ["bf16", pytest.param("fp16", marks=GPU), pytest.param("fp8", marks=GPU)]
TOLERANCE = {"bf16": 0.02, "fp16": 0.02, "fp8": 0.1}  # of a loss; rounding moves it by some 1e-3
MAY_BE_REFUSED = ("fp16", "fp8")  # in one line: a scaler needs fp32 weights, adapters have no FP8

# Placeholders in the flags: files and folders that a fixture makes.
EXPERTS, RETAINED, CHECKPOINT = "<a mixture of experts>", "<other text>", "<a checkpoint of the run without options>"

# Options of SharedArguments that meet no number of the model -> why.
ROWS = "which text there is, and how it is cut into rows of token ids"
FILES = "what is written, where and when"
PLAN = "--plan computes no loss"
WITHOUT_RUN = {
    **dict.fromkeys(("data", "max_data_tokens", "data_weights", "text_field", "encoding", "keep_duplicates"), ROWS),
    **dict.fromkeys(("skip_malformed", "tokenizer", "vocabulary_size", "end_token", "context_length"), ROWS),
    **dict.fromkeys(("tokens_per_step", "held_out_fraction", "max_eval_rows"), ROWS),
    **dict.fromkeys(("cache_dir", "swanlab", "language", "save_minutes", "on_save_error"), FILES),
    **dict.fromkeys(("plan", "plan_config", "plan_processes", "plan_memory_gib", "plan_json"), PLAN),
    **dict.fromkeys(("max_bad_steps", "on_loss_spike"), "they judge a loss and a norm, which are fp32 always"),
    "allow_changes": "what a relaunch may change; the precision is not among it",
    "cuda_graph": "for GPUs: tests/train/test_cuda_graph.py",
    "eval_tasks_every": "when --eval_tasks are measured",
}
SHARED = {
    "packing": [["--packing", "isolated"], ["--packing", "best_fit"]],
    "attn_implementation": [["--attn_implementation", "eager"], ["--attn_implementation", "sdpa"]],
    "recompute": [["--recompute", what] for what in ("all", "2", "keep_products", "keep_attention")],
    "branch_from": [["--branch_from", CHECKPOINT, "--max_steps", "4"]],
    "split": [["--split", "80,10,10"]],
    "probe": [["--plan", "--probe"]],
    "eval_tasks": [["--eval_tasks", str(ROOT / "data" / "tasks" / "minimal_pairs_en.yaml")]],
}
FROM_SCRATCH = {  # not in the 16 GB recipe, which refuses them
    "optimizer": [["--optimizer", "muon"], ["--optimizer", "adamw"]],
    "init_from": [["--init_from", CHECKPOINT]],
}
RATE = "a number of the optimizer or the schedule, which compute in fp32"
TRAINERS = {
    **dict.fromkeys(("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"), RATE),
    **dict.fromkeys(("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args"), RATE),
    **dict.fromkeys(("seed", "data_seed"), "which random numbers"),
    **dict.fromkeys(("bf16", "fp16"), "the precision itself, which is the launcher's"),
    "tf32": "for GPUs, and another precision of fp32",
    "optim_target_modules": "for optimizers with packages of their own",
    "optim": [["--optimizer", "adamw", "--optim", name] for name in ("adamw_torch", "adafactor", "sgd")],
    "max_grad_norm": [["--max_grad_norm", "0"]],
    "neftune_noise_alpha": [["--neftune_noise_alpha", "5"]],
}
IN_BACKWARD = ["--step_in_backward", "--max_grad_norm", "0"]
LORA = ["--method", "lora", "--lora_rank", "4"]
QLORA = ["--method", "qlora", "--lora_rank", "4"]
LOOP = {name: SHARED[name] for name in ("packing", "attn_implementation", "split")} | {
    "optimizer": FROM_SCRATCH["optimizer"]
}
# Recipe -> option -> the flags of its runs, or why it needs none. The empty flags are the recipe as it is.
OPTIONS = {
    "wiki_zh_scratch": SHARED | FROM_SCRATCH | TRAINERS | {
        "sample": [[]],
        "model": [["--model", EXPERTS], ["--model", EXPERTS, "--optimizer", "muon", "--packing", "isolated"]],
        "target_parameters": [["--target_parameters", "3.7M"]],
        **dict.fromkeys(("ladder", "minutes", "plan_card"), "for --plan and its forecast"),
    },
    "openwebtext_continue": SHARED | FROM_SCRATCH | {
        "model": [[]],
        "retain": [["--retain", RETAINED]],
        "from_scratch": [["--from_scratch"]],
        "accept_weak_weights": [["--accept_weak_weights"]],
    },
    "low_memory_16gb": SHARED | {
        "model": [[]],
        "method": [LORA, QLORA],
        "weights": [["--weights", "bf16"], ["--weights", "fp32"]],
        "step_in_backward": [IN_BACKWARD, [*IN_BACKWARD, "--weights", "bf16"], [*LORA, *IN_BACKWARD]],
        "lora_rank": [[*LORA, "--lora_rank", "8"]],
        "lora_targets": [[*LORA, "--lora_targets", "q_proj", "v_proj"]],
        "train_embedding": [[*LORA, "--train_embedding"], [*QLORA, "--train_embedding"]],
        "accept_weak_weights": [["--accept_weak_weights"]],
        "merge_only": "every run of --method lora merges at its end",
        "optimizer": "AdamW only",
        "init_from": "refused: --model takes the checkpoint",
    },
    "explicit_loop": LOOP | {"sample": [[]]},
    "explicit_pipeline": LOOP | {
        "sample": [[]],
        "stages_per_process": [["--stages_per_process", "2"]],
        "pipeline_processes": [["--pipeline_processes", "2"]],
    },
}  # fmt: skip
RUNS = [
    pytest.param(name, flags, id=f"{name}: {' '.join(map(str, flags)).replace(str(ROOT), '') or 'as it is'}")
    for name, options in OPTIONS.items()
    for runs in options.values()
    if isinstance(runs, list)
    for flags in runs
]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_a_run_or_a_reason(name):
    """So has every choice of an option."""
    recipe = load_recipe(name)
    not_read = getattr(recipe, "NOT_READ", set())
    own = [each for each in fields(recipe.RecipeArguments) if each.init]
    shared = [each for each in fields(SharedArguments) if each.init and each.name not in not_read]
    decided = OPTIONS[name] | {each: why for each, why in WITHOUT_RUN.items() if each not in not_read}
    assert {each.name for each in own + shared} <= decided.keys()
    assert decided.keys() - TRAINERS.keys() <= {each.name for each in own + shared}
    for each in own + shared:
        runs = decided[each.name]
        for choice in set(each.metadata.get("choices", [])) - {each.default} if isinstance(runs, list) else ():
            assert any(choice in flags for flags in runs), f"--{each.name} {choice}"


def test_every_field_of_trainer_that_decides_has_a_run_or_a_reason():
    """Once is enough: the recipes hand them to the same Trainer. (The two loops read no others than the recipes'.)"""
    assert TRAINERS.keys() == set(deciding_fields()) and TRAINERS.keys() <= set(TrainingArguments.__dataclass_fields__)


def environment(precision: str) -> dict[str, str]:
    """Return what accelerate's launcher says to one process, by the YAML that has this precision; not compiled."""
    flags = ["--config_file", str(ROOT / "accelerate_configs" / YAMLS[precision]), "--dynamo_backend", "no", "x.py"]
    parsed = _validate_launch_command(launch_command_parser().parse_args(flags))[0]
    said = prepare_simple_launcher_cmd_env(parsed)[1]
    return {name: value for name, value in said.items() if name.startswith("ACCELERATE_")}


@pytest.fixture(scope="module")
def run(weights, cache_dir, tmp_path_factory):
    """Return a function that makes a run, once, and returns its output folder."""
    folder = tmp_path_factory.mktemp("precisions")
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    experts = dict(model_type="mixtral", num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **sizes)
    (folder / "experts").mkdir()
    (folder / "experts" / "config.json").write_text(json.dumps(experts))
    done, numbers = {}, count()

    def run(name: str, flags: list[str], precision: str) -> Path:
        key = (name, *flags, precision)
        if key in done:
            return done[key]
        places = {EXPERTS: folder / "experts", RETAINED: test_openwebtext_continue.CHINESE}
        if CHECKPOINT in flags:
            places[CHECKPOINT] = run(name, [], precision) / "checkpoint-2"
        output_dir = folder / f"run{next(numbers)}"
        flags = [str(places.get(flag, flag)) for flag in flags]
        flags = [*"--max_steps 3 --eval_steps 2 --save_steps 2 --save_total_limit 2".split(), *flags]
        if name == "explicit_pipeline":
            output_dir.mkdir()
            flags += ["--per_device_train_batch_size", "1"]
            done[key] = launched(cache_dir, output_dir, *flags, precision=precision)
            return done[key]
        if name == "openwebtext_continue":
            flags = test_openwebtext_continue.run(weights, cache_dir, output_dir, *flags)
        elif name == "low_memory_16gb":
            flags = test_low_memory_16gb.run(weights, cache_dir, output_dir, *flags)
        else:
            flags = small_run(cache_dir, output_dir, *flags)
        recipe = load_recipe(name)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in environment(precision).items():
                patch.setenv(variable, value)
            recipe.main(flags)
        done[key] = output_dir
        return output_dir

    return run


def logged(folder: Path) -> dict[int, float]:
    """Return the loss of every step, by the log of Trainer or by that of the recipes with a loop of their own."""
    log = folder / "log.jsonl"
    if log.exists():
        entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    else:
        entries = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


@pytest.mark.heavy
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "flags"), RUNS)
def test_every_option_in_every_precision(run, request, capsys, name, flags, precision):
    """It trains, evaluates, saves and samples; its losses are those of fp32 up to rounding, and not to the bit.

    Weights in bf16 are computed with in bf16 whatever the launcher says.
    """
    if name == "explicit_pipeline" and precision in MAY_BE_REFUSED:
        pytest.skip("refused: tests/distributed/test_pipeline.py")
    if "qlora" in flags:
        request.getfixturevalue("slow_kernels")
    whole = run(name, flags, "no")
    capsys.readouterr()
    try:
        found = run(name, flags, precision)
    except InputError as refusal:
        assert precision in MAY_BE_REFUSED, refusal
        pytest.skip(f"refused: {refusal}")
    if "--probe" in flags:
        assert "Nothing was kept" in capsys.readouterr().out
        return
    exact, losses = logged(whole), logged(found)
    assert losses.keys() <= exact.keys() and (losses.keys() == exact.keys() or precision == "fp16")  # its scaler skips
    for step, loss in losses.items():
        assert math.isfinite(loss) and loss == pytest.approx(exact[step], rel=TOLERANCE[precision]), step
    computed_in = "bf16" if flags[-2:] == ["--weights", "bf16"] else "no"
    assert (losses == exact) == (computed_in == precision), f"not computed in {precision}"
    results = [json.loads((folder / "all_results.json").read_text(encoding="utf-8")) for folder in (whole, found)]
    assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], rel=TOLERANCE[precision])
    assert not [task for task in results[1].get("tasks", []) if "failed" in task]
    assert ("--eval_tasks" in flags) == ("tasks" in results[1])
    if not name.startswith("explicit"):
        samples = (found / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        assert samples and all(json.loads(line)["text"] for line in samples)
    if "--method" in flags:
        assert (found / "merged" / "config.json").exists()
