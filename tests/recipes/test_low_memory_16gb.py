"""The 16 GB recipe as a user runs it, on the CPU: a small model that knows the bundled English articles."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_recipe, losses, texts_of
from peft import PeftModel
from test_openwebtext_continue import changed_weights, results_of
from test_pretrained import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.console import InputError
from common.run import merge_adapters
from common.run.checkpoints import checkpoints, problem_of, read_manifest
from common.tokens.train_tokenizer import train_tokenizer
from common.train import low_memory
from common.train.trainer import PretrainingTrainer

ENGLISH = ROOT / "data" / "sample_en.jsonl"
CHECK_BITSANDBYTES = low_memory.check_bitsandbytes  # of which slow_kernels takes the place
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def recipe():
    module = load_recipe("low_memory_16gb")
    module.PROMPTS = ["The meaning of life is"]  # generating takes longer than these runs' training
    return module


def run(weights: Path, cache_dir: Path, output_dir: Path, *flags: str) -> list[str]:
    """Return the flags of a run of a few seconds: 6 steps of 4 rows of 64 tokens."""
    return [
        *("--model", str(weights), "--data", str(ENGLISH), "--held_out_fraction", "0.1", "--max_steps", "6"),
        *"--context_length 64 --tokens_per_step 256 --per_device_train_batch_size 4 --learning_rate 1e-3".split(),
        *"--logging_steps 1 --eval_steps 3 --save_steps 3 --swanlab off --disable_tqdm true".split(),
        *("--optim", "adamw_torch", "--cache_dir", str(cache_dir), "--output_dir", str(output_dir), *flags),
    ]


IN_BACKWARD = ["--step_in_backward", "--max_grad_norm", "0"]
METHODS = {
    "bf16, in backward": ["--weights", "bf16", *IN_BACKWARD],
    "lora": ["--method", "lora", "--lora_rank", "4"],
    "lora, embedding": ["--method", "lora", "--lora_rank", "4", "--train_embedding"],
    "qlora": ["--method", "qlora", "--lora_rank", "4"],
}
HEAVY = {
    "full": [],
    "bf16": ["--weights", "bf16"],
    "fp32, in backward": IN_BACKWARD,
    "lora, in backward": ["--method", "lora", "--lora_rank", "4", *IN_BACKWARD],
    "bf16, 8 bits": ["--weights", "bf16", "--optim", "adamw_8bit", *IN_BACKWARD],
    "lora, 8 bits": ["--method", "lora", "--lora_rank", "32", "--optim", "adamw_8bit"],
}


@pytest.fixture(scope="module")
def slow_kernels():
    """bitsandbytes' for the CPU, in place of the card's."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    with pytest.MonkeyPatch.context() as patch:
        # With it, one evaluation spoils the weights for training.
        patch.setattr(modules, "has_avx512bf16", lambda: False)
        patch.setattr(low_memory, "check_bitsandbytes", lambda *_: None)
        yield


@pytest.fixture(scope="module", params=[*METHODS, *(pytest.param(name, marks=pytest.mark.heavy) for name in HEAVY)])
def finished(request, recipe, weights, cache_dir, tmp_path_factory):
    """A run left alone."""
    if request.param == "qlora" or "8 bits" in request.param:
        request.getfixturevalue("slow_kernels")
    folder = tmp_path_factory.mktemp("run") / "alone"
    recipe.main(run(weights, cache_dir, folder, *(METHODS | HEAVY)[request.param]))
    return request.param, folder


@pytest.mark.heavy
def test_a_branch_with_nothing_changed_equals_the_run(recipe, weights, cache_dir, tmp_path):
    flags = METHODS["lora"]
    recipe.main(run(weights, cache_dir, tmp_path / "run", *flags, "--save_total_limit", "2"))
    flags = [*flags, "--branch_from", str(tmp_path / "run" / "checkpoint-3")]
    recipe.main(run(weights, cache_dir, tmp_path / "branch", *flags))
    assert losses(tmp_path / "branch") == losses(tmp_path / "run")
    assert results_of(tmp_path / "branch")["eval_loss"] == results_of(tmp_path / "run")["eval_loss"]


def test_it_learns_and_interrupted_and_resumed_equals_uninterrupted(
    recipe,
    weights,
    cache_dir,
    finished,
    tmp_path,
    monkeypatch,
):
    name, alone = finished
    assert results_of(alone)["eval_loss"] < results_of(alone)["before_eval_loss"]
    step = PretrainingTrainer.training_step

    def until_step_5(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    flags = run(weights, cache_dir, tmp_path, *(METHODS | HEAVY)[name])
    monkeypatch.setattr(PretrainingTrainer, "training_step", until_step_5)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(flags)
    monkeypatch.setattr(PretrainingTrainer, "training_step", step)
    if "lora" in name:
        with pytest.raises(InputError, match="no finished run of LoRA, its newest checkpoint is of step 3"):
            recipe.main([*flags, "--merge_only"])
        assert "adapter_model.safetensors" in read_manifest(tmp_path / "checkpoint-3")["files"]
    recipe.main(flags)
    assert all(problem_of(path) is None for _, path in checkpoints(tmp_path)) and len(checkpoints(tmp_path)) == 1
    assert not (tmp_path / "unfinished").exists()
    assert losses(tmp_path) == losses(alone)
    assert results_of(tmp_path)["eval_loss"] == results_of(alone)["eval_loss"]
    history = [
        [entry for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
        for folder in (alone, tmp_path)
    ]
    for key in ("grad_norm", "learning_rate"):
        values = [[entry[key] for entry in entries] for entries in history]
        assert values[0] == values[1] and all(value > 0 for value in values[0][1:])  # the rate starts at 0


def logits_of(model) -> torch.Tensor:
    ids = torch.arange(3, 3 + 48).view(2, 24)
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def test_the_checkpoint_loads_with_plain_transformers_and_merging_changes_nothing(finished, weights):
    name, folder = finished
    if "lora" not in name:
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == (torch.bfloat16 if "bf16" in name else torch.float32)
        assert not torch.equal(logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(weights)))
        return
    base = AutoModelForCausalLM.from_pretrained(weights)
    plain = logits_of(base)
    adapted = logits_of(PeftModel.from_pretrained(base, folder))
    merged, loading = AutoModelForCausalLM.from_pretrained(folder / "merged", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert not any("lora" in key for key in merged.state_dict())
    torch.testing.assert_close(logits_of(merged), adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 0.01


def test_merging_again_beside_other_weights_is_refused(recipe, finished, weights, cache_dir, tmp_path):
    name, folder = finished
    if name != "lora":
        pytest.skip("once is enough")
    (folder / "merged" / "model.safetensors").unlink()
    recipe.main(["--merge_only", "--model", str(weights), "--output_dir", str(folder)])
    assert (folder / "merged" / "model.safetensors").exists()
    good = (folder / "merged" / "model.safetensors").read_bytes()

    def layers(name, tensor):
        return tensor * 1.01 if "layers.1.self_attn.q_proj" in name else tensor

    # The embedding of all of these is the run's.
    others = [changed_weights(weights, tmp_path / "other", layers), folder / "merged"]
    for other in others:
        with pytest.raises(InputError, match="was trained with other weights than these"):
            recipe.main(["--merge_only", "--model", str(other), "--output_dir", str(folder)])
    assert (folder / "merged" / "model.safetensors").read_bytes() == good


def test_qlora_compares_the_files_that_it_was_trained_with(finished, weights, tmp_path):
    name, folder = finished
    if name != "qlora":
        pytest.skip("the others compare the weights as they are loaded")
    base = AutoModelForCausalLM.from_pretrained(weights)
    described = json.loads((folder / "run.json").read_text())["model"]
    other = changed_weights(
        weights, tmp_path / "other", lambda name, tensor: tensor * 1.01 if "1.mlp" in name else tensor
    )
    for place, expected in ((weights, True), (other, False), (folder / "merged", False)):
        assert merge_adapters._trained_with(base, str(place), described) is expected


def test_a_run_that_ended_while_merging_is_merged_by_the_same_command(recipe, finished, weights, cache_dir, capsys):
    name, folder = finished
    if name != "lora":
        pytest.skip("once is enough")
    merged = folder / "merged"
    before = {path.name: path.read_bytes() for path in merged.iterdir()}
    for path in merged.iterdir():
        if path.name != "model.safetensors":  # the move was cut off: config.json is the last
            path.unlink()
    (folder / "unfinished" / "checkpoint-merged").mkdir(parents=True)
    flags = run(weights, cache_dir, folder, *METHODS[name])
    recipe.main(flags)
    assert {path.name: path.read_bytes() for path in merged.iterdir()} == before
    assert "nothing to train" in capsys.readouterr().out and not (folder / "unfinished").exists()
    written = (merged / "config.json").stat().st_mtime_ns
    recipe.main(flags)
    assert (merged / "config.json").stat().st_mtime_ns == written  # nothing is missing now


def test_a_run_that_was_continued_and_stopped_is_not_merged(recipe, finished, weights, cache_dir, monkeypatch):
    name, folder = finished
    if name != "lora, embedding":
        pytest.skip("the last test that needs its run")
    step = PretrainingTrainer.training_step

    def until_step_9(self, *args, **kwargs):
        if self.state.global_step == 8:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PretrainingTrainer, "training_step", until_step_9)
    good = (folder / "merged" / "model.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        recipe.main(run(weights, cache_dir, folder, *METHODS[name], "--max_steps", "12", "--save_steps", "1"))
    with pytest.raises(InputError, match="no finished run of LoRA, its newest checkpoint is of step 8"):
        recipe.main(["--merge_only", "--model", str(weights), "--output_dir", str(folder)])
    (folder / "status.json").unlink()  # then the checkpoints say it
    with pytest.raises(InputError, match="no finished run of LoRA, its newest checkpoint is of step 8"):
        recipe.main(["--merge_only", "--model", str(weights), "--output_dir", str(folder)])
    assert (folder / "merged" / "model.safetensors").read_bytes() == good


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(["--optim", "adamw_8bit"], "bitsandbytes needs a GPU.* --optim adamw_torch", marks=NO_GPU),
        pytest.param(
            ["--method", "qlora"], "bitsandbytes needs a GPU.* --method lora --optim adamw_torch", marks=NO_GPU
        ),
        (["--method", "lora", "--lora_targets", "query"], "no linear layers query beside its head. It has: down_proj"),
        (["--method", "lora", "--weights", "bf16"], "--weights bf16: with --method lora"),
        (["--context_length", "256"], "the model knows 128 positions"),
        (["--tokenizer", "LARGER"], r"512 rows, the tokenizer 513 ids.*resize_token_embeddings\(513\)"),
        (["--tokenizer", "train"], "--tokenizer train: the weights only know the ids"),
        (["--init_from", "outputs/run"], "--init_from: not in this recipe"),
        (["--step_in_backward"], "--step_in_backward: .* --max_grad_norm 1 comes too late"),
        ([*IN_BACKWARD, "--tokens_per_step", "512"], "--step_in_backward: .*2 micro-batches.* --tokens_per_step 256"),
        (["--merge_only"], "no finished run of LoRA, it has no whole checkpoint"),
    ],
)
def test_it_is_refused_before_any_text_is_tokenized(recipe, weights, tmp_path, flags, message, monkeypatch):
    monkeypatch.setattr(low_memory, "check_bitsandbytes", CHECK_BITSANDBYTES)
    larger = train_tokenizer(texts_of(ENGLISH), 513)
    larger.save_pretrained(tmp_path / "larger")
    flags = [str(tmp_path / "larger") if flag == "LARGER" else flag for flag in flags]
    with pytest.raises(InputError, match=message):
        recipe.main(run(weights, tmp_path / "cache", tmp_path / "run", *flags))
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


def test_qlora_on_a_gguf_file(recipe, weights, cache_dir, tmp_path, slow_kernels):
    """Its weights in float32: the run, and what is merged, are those of the folder's."""
    gguf = pytest.importorskip("gguf")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(weights), AutoTokenizer.from_pretrained(weights)
    write_gguf(gguf, tmp_path / "small.gguf", model, tokenizer)
    flags = run(tmp_path / "small.gguf", cache_dir, tmp_path / "run", *METHODS["qlora"], "--max_steps", "3")
    recipe.main(flags)
    results = results_of(tmp_path / "run")
    assert results["eval_loss"] < results["before_eval_loss"]
    merged = tmp_path / "run" / "merged" / "model.safetensors"
    adapted = PeftModel.from_pretrained(model, tmp_path / "run")
    found = AutoModelForCausalLM.from_pretrained(merged.parent)
    torch.testing.assert_close(logits_of(found), logits_of(adapted), rtol=1e-4, atol=1e-4)
    content = merged.read_bytes()
    merged.unlink()
    recipe.main([*flags, "--merge_only"])
    assert merged.read_bytes() == content


LORA, QLORA = ["--method", "lora", "--lora_rank", "4"], ["--method", "qlora", "--lora_rank", "4"]
IN_BF16 = {
    "lora, embedding": [*LORA, "--train_embedding"],
    "lora": LORA,
    "lora, some layers": [*LORA, "--lora_targets", "q_proj", "v_proj"],
    "qlora": QLORA,
    "qlora, embedding": [*QLORA, "--train_embedding"],
    "full": [],
    "full, fp32 weights": ["--weights", "fp32"],
    "full, in backward": IN_BACKWARD,
}


@pytest.mark.parametrize(
    "name", [name if "embedding" in name else pytest.param(name, marks=pytest.mark.heavy) for name in IN_BF16]
)
def test_every_option_in_bf16(recipe, weights, cache_dir, tmp_path, request, name):
    """As the YAMLs have it. It trains, writes samples, and what is merged is the adapter's model, by plain peft."""
    if "qlora" in name:
        request.getfixturevalue("slow_kernels")
    flags = [*IN_BF16[name], "--bf16", "true", "--max_steps", "3"]
    if find_spec("lm_eval"):
        flags += ["--eval_tasks", str(ROOT / "data" / "tasks" / "minimal_pairs_en.yaml")]
    recipe.main(run(weights, cache_dir, tmp_path, *flags))
    assert not [task for task in results_of(tmp_path).get("tasks", []) if "failed" in task]
    assert [*losses(tmp_path)] == [1, 2, 3] and all(map(math.isfinite, losses(tmp_path).values()))
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert samples and all(sample["text"] for sample in samples)
    if "lora" in name:
        base = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.bfloat16)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert merged.dtype == torch.bfloat16
        adapted = PeftModel.from_pretrained(base, tmp_path).float()
        difference = (logits_of(merged.float()) - logits_of(adapted)).abs().max()
        assert difference < 0.05 * logits_of(adapted).std(), "bf16 has 8 bits"


def test_help_fits_a_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        load_recipe("low_memory_16gb").main(["--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 40


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_in_fp8_are_refused_by_the_plan_as_by_the_run(method):
    flags = ["--plan", "--plan_config", str(ROOT / "accelerate_configs" / "fp8.yaml"), "--method", method]
    with pytest.raises(InputError, match="adapters under fp8: .*_precision bf16"):
        load_recipe("low_memory_16gb").main(flags)
