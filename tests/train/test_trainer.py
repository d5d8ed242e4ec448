"""Clocks, samples, and a disk that fills up while saving."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import losses, small_run
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, Trainer

import common.train.metrics as clock
import common.train.trainer as trainer
from common.console import InputError
from common.model.from_config import model_from_config
from common.run.lock import read_status
from common.tokens.train_tokenizer import train_tokenizer
from common.train.callbacks import generate_samples


def test_a_lap_leaves_pauses_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    watch = clock.Stopwatch()
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


def test_random_numbers_of_a_device_that_trainer_leaves_out_are_continued(wiki, cache_dir, tmp_path, monkeypatch):
    """The CPU stands for an Apple or Intel GPU."""
    monkeypatch.setattr(trainer, "STATES_LEFT_OUT", ("cpu",))
    monkeypatch.setattr(trainer, "random_state", lambda device: torch.tensor([41]))
    continued = []
    monkeypatch.setattr(
        trainer, "set_random_state", lambda device, state: continued.append((device.type, state.item()))
    )
    wiki.main(small_run(cache_dir, tmp_path, "--max_steps", "3"))
    assert (tmp_path / "checkpoint-3" / "random_cpu_0.pt").is_file() and continued == []
    monkeypatch.setattr(trainer, "random_state", lambda device: torch.tensor([42]))
    wiki.main(small_run(cache_dir, tmp_path))
    assert continued == [("cpu", 41)]


def test_sampling_that_fails_is_said_once_and_the_run_goes_on(wiki, cache_dir, tmp_path, monkeypatch, capsys):
    def fail(self, *args, **kwargs):
        raise RuntimeError("no cache for this layer")

    monkeypatch.setattr(GenerationMixin, "generate", fail)
    wiki.main(small_run(cache_dir, tmp_path))
    said = capsys.readouterr().out
    assert said.count("note: no samples, training continues: RuntimeError: no cache for this layer") == 1
    assert [*losses(tmp_path)] == [1, 2, 3, 4, 5, 6] and not (tmp_path / "samples.jsonl").exists()


def test_a_model_without_a_longest_row_is_sampled():
    tokenizer = train_tokenizer(["地球是太阳系中的一颗行星。"], 300)
    config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, n_head=2, vocab_size=300)
    assert getattr(config, "max_position_embeddings", None) is None
    model = AutoModelForCausalLM.from_config(config)
    [text] = generate_samples(model, tokenizer, ["地球"], 1, torch.device("cpu"))
    assert isinstance(text, str)


def test_the_next_batches_are_fetched_before_the_check_waits_for_the_device(wiki, cache_dir, tmp_path, monkeypatch):
    events = []
    fetch, check = Trainer.get_batch_samples, trainer.PretrainingTrainer._check_step

    def note(name, function):
        def noted(*args, **kwargs):
            events.append(name)
            return function(*args, **kwargs)

        return noted

    monkeypatch.setattr(Trainer, "get_batch_samples", note("fetch", fetch))
    monkeypatch.setattr(trainer.PretrainingTrainer, "_check_step", note("check", check))
    wiki.main(small_run(cache_dir, tmp_path))
    assert events == ["fetch", *["fetch", "check"] * 6]  # the last one finds nothing left


def test_a_run_that_ends_early_leaves_no_loaders_worker_behind(wiki, cache_dir, tmp_path):
    wiki.main([*small_run(cache_dir, tmp_path), "--probe", "--dataloader_num_workers", "1"])
    assert not torch.multiprocessing.active_children()


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


needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file for which there is no room")


def test_small_files_that_do_not_fit_are_said_once(wiki, cache_dir, tmp_path, monkeypatch, capsys):
    """By default the run stops, without losing what is written; or it goes on and says so once."""

    def full(path, entries):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("common.train.callbacks.append_lines", full)
    flags = small_run(cache_dir, tmp_path)
    with pytest.raises(InputError, match="no space left while writing samples.jsonl .*make room"):
        wiki.main(flags)
    assert read_status(tmp_path)["state"] == "failed"
    wiki.main([*flags, "--on_save_error", "continue"])
    assert capsys.readouterr().out.count("no space left while writing samples.jsonl") == 1
    assert [*losses(tmp_path)] == [1, 2, 3, 4, 5, 6] and read_status(tmp_path)["state"] == "finished"


@needs_dev_full
def test_results_that_do_not_fit_are_written_by_the_same_command(wiki, cache_dir, tmp_path):
    (tmp_path / "loss_curve.png").symlink_to("/dev/full")
    flags = small_run(cache_dir, tmp_path, "--on_save_error", "continue")
    with pytest.raises(InputError, match="no space left while writing the results"):
        wiki.main(flags)
    assert not (tmp_path / "all_results.json").exists() and (tmp_path / "checkpoint-6").exists()
    (tmp_path / "loss_curve.png").unlink()
    wiki.main(flags)
    assert (tmp_path / "all_results.json").exists() and [*losses(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_model_that_does_not_fit_is_not_left_half_written(wiki, cache_dir, tmp_path, monkeypatch):
    """One that was there before stays as it was, too."""
    save, flags = Trainer._save, small_run(cache_dir, tmp_path)
    wiki.main(flags)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full_at_the_end(self, output_dir=None, state_dict=None):
        save(self, output_dir, state_dict)
        if not Path(output_dir).name.rpartition("-")[2].isdecimal():
            os.truncate(Path(output_dir) / "model.safetensors", 1000)
            raise OSError(errno.ENOSPC, "No space left on device")

    longer = [*flags, "--max_steps", "8"]
    monkeypatch.setattr(Trainer, "_save", full_at_the_end)
    with pytest.raises(InputError, match="no space left while writing the model"):
        wiki.main(longer)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not [*(tmp_path / "unfinished").iterdir()]
    monkeypatch.setattr(Trainer, "_save", save)
    wiki.main(longer)
    assert (tmp_path / "model.safetensors").read_bytes() != before and [*losses(tmp_path)] == [*range(1, 9)]


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


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_folder_that_is_gone_is_no_full_disk(wiki, cache_dir, tmp_path, monkeypatch, policy):
    """And nothing is written where it was, whatever --on_save_error says: nobody would know it for a run."""
    step = wiki.PretrainingTrainer.training_step

    def gone_at_step_4(self, *args, **kwargs):
        if self.state.global_step == 3:
            self.run.end_save()  # a thread writes step 2: it must not write while the folder goes
            shutil.rmtree(tmp_path / "run")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(wiki.PretrainingTrainer, "training_step", gone_at_step_4)
    flags = ["--save_steps", "2", "--eval_strategy", "no", "--on_save_error", policy]
    with pytest.raises(InputError, match="run: the folder is gone while saving step 4 .*bring it back") as caught:
        wiki.main(small_run(cache_dir, tmp_path / "run", *flags))
    assert "no space" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_disk_that_refuses_says_why(wiki, cache_dir, tmp_path, monkeypatch):
    def failing(self, *args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Trainer, "_save_checkpoint", failing)
    with pytest.raises(InputError, match="the disk refused while saving step 3 .*Input/output error") as caught:
        wiki.main(small_run(cache_dir, tmp_path))
    assert "no space" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("optimizer.pt", b"", "the states of optimizer and schedule"),
        ("scheduler.pt", {}, "the states of optimizer and schedule"),
        ("rng_state.pth", {}, "the random state"),
        ("rng_state.pth", b"", "the random state"),
        ("model.safetensors", b"", "the weights"),
        ("model.safetensors", {"other": torch.zeros(3)}, "the weights"),
        ("trainer_state.json", b"{}", "trainer_state.json"),
    ],
)
def test_a_replaced_file_of_a_checkpoint_is_one_error_of_ours(
    wiki, cache_dir, three_steps, tmp_path, name, content, what
):
    """Of the same size, as the manifest knows it; without the checkpoint, the one before it is continued."""
    folder = tmp_path / "run"
    shutil.copytree(three_steps, folder)
    file = folder / "checkpoint-3" / name
    size = file.stat().st_size
    if name == "model.safetensors" and content:
        save_file(content, file)
    elif isinstance(content, dict):
        torch.save(content, file)
    else:
        file.write_bytes(content)
    manifest = json.loads((file.parent / "manifest.json").read_text())
    assert manifest["files"][name] == size
    manifest["files"][name] = file.stat().st_size
    (file.parent / "manifest.json").write_text(json.dumps(manifest))
    flags = small_run(cache_dir, folder, "--save_steps", "1", "--eval_strategy", "no", "--max_steps", "4")
    with pytest.raises(InputError, match=f"checkpoint-3: {what} cannot be read") as caught:
        wiki.main(flags)
    assert "remove this checkpoint" in str(caught.value) and "weights_only" not in str(caught.value)
    shutil.rmtree(file.parent)
    wiki.main(flags)
    assert [*losses(folder)] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def three_steps(wiki, cache_dir, tmp_path_factory):
    """A run of 3 steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("three") / "run"
    wiki.main(small_run(cache_dir, folder, "--save_steps", "1", "--eval_strategy", "no", "--max_steps", "3",
                        "--save_total_limit", "5"))  # fmt: skip
    (folder / "all_results.json").unlink()
    return folder
