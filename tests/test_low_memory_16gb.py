"""The 16 GB recipe as a user runs it, on the CPU: a small model that knows the bundled English articles."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_recipe, losses
from peft import PeftModel
from test_openwebtext_continue import changed_weights, results_of, weights  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM

from common import low_memory
from common.checkpoints import checkpoints, problem_of, read_manifest
from common.messages import InputError
from common.trainer import PretrainingTrainer

ENGLISH = ROOT / "data" / "sample_en.jsonl"


@pytest.fixture(scope="module")
def recipe():
    module = load_recipe("low_memory_16gb")
    module.PROMPTS = module.PROMPTS[:1]  # generating takes longer than these runs' training
    return module


def run(weights: Path, cache_dir: Path, output_dir: Path, *flags: str) -> list[str]:  # noqa: F811
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


@pytest.fixture(scope="module", params=[*METHODS, *(pytest.param(name, marks=pytest.mark.heavy) for name in HEAVY)])
def finished(request, recipe, weights, cache_dir, tmp_path_factory):  # noqa: F811
    """A run left alone. bitsandbytes' slow kernels for the CPU stand in for the card's."""
    patch = pytest.MonkeyPatch()
    if request.param == "qlora" or "8 bits" in request.param:
        modules = pytest.importorskip("bitsandbytes.nn.modules")
        patch.setattr(
            modules, "has_avx512bf16", lambda: False
        )  # with it, one evaluation spoils the weights for training
    patch.setattr(low_memory, "check_bitsandbytes", lambda *_: None)
    folder = tmp_path_factory.mktemp("run") / "alone"
    recipe.main(run(weights, cache_dir, folder, *(METHODS | HEAVY)[request.param]))
    yield request.param, folder
    patch.undo()


def test_it_learns_and_interrupted_and_resumed_equals_uninterrupted(
    recipe,
    weights,  # noqa: F811
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
        with pytest.raises(InputError, match="no finished run of LoRA, only checkpoint-3"):
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


def test_the_checkpoint_loads_with_plain_transformers_and_merging_changes_nothing(finished, weights):  # noqa: F811
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


def test_merging_again_beside_other_weights_is_refused(recipe, finished, weights, cache_dir, tmp_path):  # noqa: F811
    name, folder = finished
    if name != "lora":
        pytest.skip("once is enough")
    (folder / "merged" / "model.safetensors").unlink()
    recipe.main(["--merge_only", "--model", str(weights), "--output_dir", str(folder)])
    assert (folder / "merged" / "model.safetensors").exists()
    other = changed_weights(weights, tmp_path / "other", lambda name, tensor: tensor * 1.01)
    with pytest.raises(InputError, match="not the weights that the adapter"):
        recipe.main(["--merge_only", "--model", str(other), "--output_dir", str(folder)])
