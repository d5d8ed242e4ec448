"""Checkpoints that are written while training goes on: of their step, whole or absent, and waited for at the end."""

import errno
import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from conftest import load_recipe, losses, small_run
from safetensors.torch import load_file
from transformers import TrainerCallback

import common.run.copies as copies
import common.run.folder as folder
import common.train.saving as saving
from common.console import InputError
from common.run.checkpoints import checkpoints, end_checkpoint, newest_whole, unfinished
from common.run.lock import read_status

CONSTANT = "--lr_scheduler_type constant --lr_scheduler_kwargs {} --warmup_steps 0 --eval_strategy no".split()
EVERY_SECOND = [*CONSTANT, *"--save_steps 2 --save_total_limit 10".split()]


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


class Watch(TrainerCallback):
    """Notes weights and states after every step, and which checkpoints are there; lets writers wait for a step."""

    def __init__(self, output_dir: Path):
        self.output_dir, self.steps, self.there = output_dir, {}, {}
        self.ended = threading.Condition()

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        weights = {name: copy_of(tensor) for name, tensor in model.state_dict().items()}
        states = {n: {key: copy_of(v) for key, v in s.items()} for n, s in optimizer.state_dict()["state"].items()}
        with self.ended:
            self.steps[state.global_step] = weights, states
            self.there[state.global_step] = [step for step, _ in checkpoints(self.output_dir)]
            self.ended.notify_all()

    def wait_for(self, step: int) -> None:
        with self.ended:
            assert self.ended.wait_for(lambda: step in self.steps, timeout=600)


def watched(output_dir: Path, callback: TrainerCallback | None = None):
    """Return the recipe and the callback that its Trainer gets."""
    recipe = load_recipe("wiki_zh_scratch")
    watch = Watch(output_dir) if callback is None else callback

    class Watched(recipe.PretrainingTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(watch)
            watch.trainer = self

    recipe.PretrainingTrainer = Watched
    return recipe, watch


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_is_of_its_step_though_training_goes_on(cache_dir, tmp_path, monkeypatch, optimizer):
    """Each is written only when the next step is made, or at the run's end. It equals one for which training waits."""
    recipe, watch = watched(tmp_path / "run")

    def late(run_folder, step, *args):
        if step < 6:
            watch.wait_for(step + 1)
        return end_checkpoint(run_folder, step, *args)

    flags = [*EVERY_SECOND, "--optimizer", optimizer, "--learning_rate", "1e-3"]
    with monkeypatch.context() as patch:
        patch.setattr(folder, "end_checkpoint", late)
        recipe.main(small_run(cache_dir, tmp_path / "run", *flags))
    assert watch.there[3] == [] and watch.there[5] == [2], "training did not go on"
    with monkeypatch.context() as patch:
        patch.setattr(copies, "available_memory", lambda: 0)
        waiting, watch_waiting = watched(tmp_path / "waited")
        waiting.main(small_run(cache_dir, tmp_path / "waited", *flags))
    assert watch_waiting.there[3] == [2] and watch_waiting.there[5] == [2, 4]
    for step in (2, 4, 6):
        assert_of_its_step(tmp_path / "run" / f"checkpoint-{step}", watch)
        assert_of_its_step(tmp_path / "waited" / f"checkpoint-{step}", watch_waiting)
        one, other = (
            {file.name: file for file in (tmp_path / run / f"checkpoint-{step}").iterdir()} for run in ("run", "waited")
        )
        assert one.keys() == other.keys()
        for name in ("config.json", "tokenizer.json", "generation_config.json", "scheduler.pt"):
            assert one[name].read_bytes() == other[name].read_bytes(), name


def assert_of_its_step(checkpoint: Path, watch: Watch) -> None:
    """Weights and states are, to the bit, those that the training had after that step."""
    weights, states = watch.steps[int(checkpoint.name.rpartition("-")[2])]
    read = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(tensor, weights[key]) for key, tensor in read.items()) and len(read) == len(weights) - 1
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu")["state"]
    assert sum(len(state) for state in saved.values()) == sum(len(state) for state in states.values()) > 0
    for number, state in states.items():
        assert all(torch.equal(saved[number][key], value) for key, value in state.items())


def test_memory_without_room_for_a_copy_is_said_once(wiki, cache_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(copies, "available_memory", lambda: 2 * 2**30)
    wiki.main(small_run(cache_dir, tmp_path, *EVERY_SECOND))
    assert capsys.readouterr().out.count("note: training stops while a checkpoint is written: a copy of it") == 1
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 4, 6]


def no_space(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_at(step: int, monkeypatch) -> None:
    """Let the thread that writes the model of ``step`` find a full disk."""
    write_model = saving.write_model

    def write(model, weights, tokenizer, training, path):
        if path.endswith(f"-{step}"):
            assert threading.current_thread() is not threading.main_thread()
            no_space()
        write_model(model, weights, tokenizer, training, path)

    monkeypatch.setattr(saving, "write_model", write)


def test_a_disk_that_is_full_in_the_background_ends_the_run(wiki, cache_dir, tmp_path, monkeypatch):
    full_at(4, monkeypatch)
    with pytest.raises(InputError, match="no space left while saving step 4 .*make room; .* continues from .*-2"):
        wiki.main(small_run(cache_dir, tmp_path, *EVERY_SECOND, "--max_steps", "40"))
    status = read_status(tmp_path)
    assert status["state"] == "failed" and status["step"] < 8, "it is noticed at a step, not at the next save"
    assert newest_whole(tmp_path).name == "checkpoint-2" and not unfinished(tmp_path, 4).exists()


def test_a_disk_that_is_full_in_the_background_can_be_passed_over(wiki, cache_dir, tmp_path, monkeypatch, capsys):
    full_at(6, monkeypatch)  # the last: the run's end waits for it
    wiki.main(small_run(cache_dir, tmp_path, *EVERY_SECOND, "--on_save_error", "continue"))
    assert "no space left while saving step 6" in capsys.readouterr().out
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 4] and not unfinished(tmp_path, 6).exists()
    assert (tmp_path / "all_results.json").exists()


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def slow(run_folder, step, *args):
    threading.Event().wait(1.0)
    return end_checkpoint(run_folder, step, *args)


@pytest.mark.skipif(os.name != "posix", reason="Windows has other signals")
def test_a_signal_waits_for_its_checkpoint(cache_dir, tmp_path, monkeypatch, capsys):
    """And so does an error of somebody else."""
    monkeypatch.setattr(folder, "end_checkpoint", slow)
    recipe, _ = watched(tmp_path / "a", At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(SystemExit) as ended:
        recipe.main(small_run(cache_dir, tmp_path / "a", *CONSTANT, "--save_steps", "50", "--max_steps", "50"))
    assert ended.value.code == 143 and "is saved; the same command continues" in capsys.readouterr().out
    assert newest_whole(tmp_path / "a").name == f"checkpoint-{read_status(tmp_path / 'a')['step']}"

    recipe, _ = watched(tmp_path / "b", At(3, no_space))
    with pytest.raises(OSError, match="No space left"):
        recipe.main(small_run(cache_dir, tmp_path / "b", *CONSTANT, "--save_steps", "2"))
    assert newest_whole(tmp_path / "b").name == "checkpoint-2"


def killed(cache_dir: Path, output_dir: Path) -> None:
    """Train until the checkpoint of step 4 is half written and step 5 is made, and die."""

    def half(run_folder, step, left, gather):
        if step < 4:
            return end_checkpoint(run_folder, step, left, gather)
        left[0]()
        threading.Event().wait(1500)

    folder.end_checkpoint = half
    recipe, _ = watched(output_dir, At(5, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    recipe.main(small_run(cache_dir, output_dir, *EVERY_SECOND, "--save_total_limit", "1"))


def test_a_kill_in_the_middle_leaves_the_last_good_one(wiki, cache_dir, tmp_path, capsys):
    """And the same command continues from it, to the bit."""
    wiki.main(small_run(cache_dir, tmp_path / "alone", *EVERY_SECOND))
    child = multiprocessing.get_context("spawn").Process(target=killed, args=(cache_dir, tmp_path / "run"))
    child.start()
    child.join(1500)
    assert child.exitcode == -signal.SIGKILL
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [2] and unfinished(tmp_path / "run", 4).exists()
    wiki.main(small_run(cache_dir, tmp_path / "run", *EVERY_SECOND))
    assert "half-written when the run ended" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "alone"))
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert json.loads((tmp_path / "run" / "checkpoint-6" / "manifest.json").read_text())["step"] == 6
