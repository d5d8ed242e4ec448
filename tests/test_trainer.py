"""Clocks, samples, and a disk that fills up while saving."""

import errno

import pytest
import torch
from conftest import small_run
from transformers import Trainer

import common.trainer as trainer
from common.callbacks import generate_samples
from common.messages import InputError
from common.model import model_from_config
from common.run_status import read_status
from common.tokenizer_training import train_tokenizer


def test_a_lap_leaves_pauses_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: now[0])
    watch = trainer.Stopwatch()
    now[0] = 5
    with watch.paused():
        now[0] = 8
    now[0] = 10
    assert watch.lap() == 7
    now[0] = 11
    assert watch.lap() == 1


def test_the_mean_weighs_every_step_once():
    history = [{"loss": 4.0, "step": 1}, {"eval_loss": 9.0, "step": 3}, {"loss": 2.0, "step": 4}]
    assert trainer.mean_logged_loss(history) == pytest.approx((4 + 3 * 2) / 4)
    left_out = {"loss": float("nan"), "step": 6}
    assert trainer.mean_logged_loss([*history, left_out]) == pytest.approx((4 + 3 * 2) / 4)


def test_samples_leave_the_training_as_it_was():
    """Random state and mode; and the same seed draws the same text."""
    tokenizer = train_tokenizer(["地球是太阳系中的一颗行星。"], 300)
    shape = dict(model_type="qwen2", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = model_from_config({**shape, "num_key_value_heads": 1}, tokenizer, context_length=16).train()
    before = torch.get_rng_state()
    first = generate_samples(model, tokenizer, ["地球", "太阳"], 1, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert first == generate_samples(model, tokenizer, ["地球", "太阳"], 1, torch.device("cpu"))
    assert first != generate_samples(model, tokenizer, ["地球", "太阳"], 2, torch.device("cpu"))


def test_a_full_disk_while_saving_keeps_the_checkpoint_before(wiki, cache_dir, tmp_path, monkeypatch):
    """The second checkpoint is cut off; the first goes on to the end once there is room."""
    save = Trainer._save_checkpoint

    def full_at_step_4(self, *args):
        if self.state.global_step == 4:
            (tmp_path / "unfinished" / "checkpoint-4").mkdir(parents=True)
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, *args)

    flags = small_run(cache_dir, tmp_path, "--save_steps", "2", "--eval_strategy", "no")
    monkeypatch.setattr(Trainer, "_save_checkpoint", full_at_step_4)
    with pytest.raises(InputError, match="no space left while saving step 4"):
        wiki.main(flags)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not [*(tmp_path / "unfinished").iterdir()]  # its space is given back
    assert read_status(tmp_path)["state"] == "failed"
    monkeypatch.setattr(Trainer, "_save_checkpoint", save)
    wiki.main(flags)
    assert (tmp_path / "all_results.json").exists()
    assert read_status(tmp_path) | {"state": "finished", "step": 6} == read_status(tmp_path)


def test_with_continue_a_full_disk_does_not_end_the_run(wiki, cache_dir, tmp_path, monkeypatch, capsys):
    save = Trainer._save_checkpoint

    def full_at_step_4(self, *args):
        save(self, *args)
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Trainer, "_save_checkpoint", full_at_step_4)
    flags = ["--save_steps", "2", "--eval_strategy", "no", "--on_save_error", "continue"]
    wiki.main(small_run(cache_dir, tmp_path, *flags))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    assert "no space left while saving step 4" in capsys.readouterr().out
