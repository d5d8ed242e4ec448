"""Bad numbers: left out, counted, named; and the end of a run that has nothing else."""

import json
import math
import random
import statistics

import numpy as np
import pytest
import torch
from conftest import losses, small_run, store_of_tokens
from safetensors.torch import load_file, save_file

from common.console import InputError
from common.dataset.mixture import TrainingOrder
from common.dataset.packing import JoinedRows, PackedRows
from common.run.lock import read_status
from common.train import step_guard
from common.train.step_guard import (
    LEAST_STEPS,
    WINDOW_STEPS,
    StepGuard,
    name_rows,
    own_weight_not_finite,
    report_bad_batches,
    robust_z_score,
    rows_of_bad_losses,
    sums_over_processes,
)

NAN, INF = math.nan, math.inf


def quiet(guard, steps=WINDOW_STEPS, seed=0):
    """Feed losses of about 5 +- 0.1."""
    drawn = random.Random(seed)
    for _ in range(steps):
        assert guard.judge(5 + drawn.gauss(0, 0.1), 1.0) == (True, None)


@pytest.mark.parametrize("numbers", [(NAN, 1.0), (INF, 1.0), (-INF, 1.0), (5.0, NAN), (5.0, INF), (5.0, -1.0)])
def test_what_is_not_finite_is_left_out_and_counted(numbers):
    guard = StepGuard("warn", max_bad_steps=2)
    quiet(guard, 3)
    make, problem = guard.judge(*numbers)
    assert not make and f"loss {numbers[0]}, gradient norm {numbers[1]}" in problem
    assert (guard.left_out, guard.in_a_row, guard.stop) == (1, 1, None)
    assert guard.judge(5.0, 1.0) == (True, None) and guard.in_a_row == 0


def test_more_than_the_limit_in_a_row_stops():
    guard = StepGuard("warn", max_bad_steps=2)
    for expected in (None, None, "3 bad steps in a row, the last: loss nan"):
        guard.judge(NAN, 1.0)
        assert (guard.stop or "").startswith(expected or "") and (guard.stop is None) == (expected is None)


def test_fp16_may_look_for_its_scale():
    guard = StepGuard("warn", max_bad_steps=2, scaled=True)
    for _ in range(18):
        guard.judge(5.0, INF)
        assert guard.stop is None
    guard.judge(5.0, INF)
    assert guard.stop


@pytest.mark.parametrize(
    ("policy", "make", "stops"), [("warn", True, False), ("skip", False, False), ("stop", False, True)]
)
def test_a_spike_is_met_as_asked(policy, make, stops):
    guard = StepGuard(policy, max_bad_steps=2)
    quiet(guard)
    made, problem = guard.judge(7.0, 1.0)
    assert made is make and "deviations above the median of 128 steps" in problem
    assert (guard.stop is not None) == stops and guard.spikes == 1 and guard.left_out == (not make)
    # A streak is open after a step that was skipped. The one that stops the run is no streak: it is saved.
    assert guard.in_a_row == (policy == "skip")


def test_a_spike_whose_step_was_made_stops_the_run_and_is_not_counted_as_left_out():
    guard = StepGuard("stop", max_bad_steps=2)
    quiet(guard)
    make, _ = guard.judge(7.0, 1.0, made=True)
    assert make and guard.stop and guard.left_out == 0
    assert guard.judge(NAN, 1.0, made=True)[0] is False, "weights that are spoilt are no better for having been made"


def test_what_is_no_spike():
    """A fall, a slow rise, a constant loss, and the first steps, whose losses differ anyway."""
    guard = StepGuard("stop", max_bad_steps=0)
    for step in range(LEAST_STEPS):
        assert guard.judge(11 - 0.1 * step + (5 if step % 7 == 0 else 0), 1.0)[0]
    guard = StepGuard("stop", max_bad_steps=0)
    quiet(guard)
    assert guard.judge(2.0, 1.0) == (True, None)
    for step in range(300):
        assert guard.judge(5 + step * 0.002, 1.0)[0]
    constant = StepGuard("stop", max_bad_steps=0)
    for _ in range(200):
        assert constant.judge(5.0, 1.0)[0]


def test_a_spike_does_not_hide_the_next_one():
    """Twenty of them: mean and standard deviation would have taken them for usual."""
    guard, seen = StepGuard("warn", max_bad_steps=2), []
    quiet(guard)
    for _ in range(20):
        guard.judge(50.0, 1.0)
        seen.append(50.0)
    assert guard.spikes == 20
    window = list(guard.losses)
    assert (50 - np.mean(window)) / np.std(window) < 6


def test_the_score_is_that_of_iglewicz_and_hoaglin():
    window = np.random.default_rng(1).normal(3, 2, 100).tolist()
    median_deviation = np.median(np.abs(np.array(window) - np.median(window)))
    deviation = median_deviation / statistics.NormalDist().inv_cdf(0.75)  # that of a normal distribution
    assert robust_z_score(9.0, window) == pytest.approx((9 - np.median(window)) / deviation, rel=1e-4)


def test_a_resumed_guard_judges_as_one_left_alone():
    whole, first = StepGuard("skip", 2), StepGuard("skip", 2)
    drawn = random.Random(3)
    numbers = [5 + drawn.gauss(0, 0.1) + (3 if drawn.random() < 0.05 else 0) for _ in range(400)]
    numbers[200] = NAN
    expected = [whole.judge(number, 1.0) for number in numbers]
    found = [first.judge(number, 1.0) for number in numbers[:201]]
    second = StepGuard("skip", 2)
    second.load(json.loads(json.dumps(first.state())))
    assert found + [second.judge(number, 1.0) for number in numbers[201:]] == expected
    assert second.state() == whole.state() and whole.left_out > 5


def test_the_log_is_the_mean_of_the_steps_that_were_made():
    guard = StepGuard("warn", max_bad_steps=5)
    guard.judge(4.0, 1.0)
    assert guard.logged() == {}
    for loss in (2.0, NAN, 4.0):
        guard.judge(loss, 1.0)
    assert guard.logged() == {"loss": 3.0, "steps_left_out": 1}
    guard.judge(2.0, 1.0)
    assert guard.logged() == {"loss": 2.0, "steps_left_out": 1}  # Trainer's would still be NaN
    guard.judge(NAN, 1.0)
    assert math.isnan(guard.logged()["loss"])


def test_rows_are_named_by_source_and_document(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    store = store_of_tokens(tmp_path / "a", [[1] * 6, [2] * 2, [3] * 9])
    other = store_of_tokens(tmp_path / "b", [[4] * 20])
    rows = JoinedRows([PackedRows(store, np.array([True, False, True]), 4), PackedRows(other, np.array([True]), 4)])
    # The first stream is 1 1 1 1 1 1 0 3 3 3 3 3 3 3 3 3 0: rows of 4 + 1 tokens begin at 0, 4, 8, 12.
    named = name_rows(rows, [0, 1, 2, -1, 4])
    assert [(row["row"], row["documents"]) for row in named] == [(0, [0]), (1, [0, 2]), (2, [2]), (0, [0])]
    assert [row["source"] for row in named] == [str(store.prefix)] * 3 + [str(other.prefix)]


def test_one_process_sums_up_its_own_micro_batches():
    losses, wishes = [torch.tensor(1.5), torch.tensor(2.25)], torch.tensor([0.0, 1.0])
    assert sums_over_processes(losses, torch.tensor(0.5), wishes, 1) == (3.75, 0.5, [0.0, 1.0])
    assert sums_over_processes(losses, None, wishes, 1)[1] == 0.0, "DeepSpeed without clipping has no norm"
    loss, norm, _ = sums_over_processes([torch.tensor(NAN)], INF, wishes, 1)
    assert math.isnan(loss) and norm == INF


@pytest.mark.parametrize(
    ("of_all", "row_readers", "expected"),
    [  # (processes, micro-batches): which losses are bad. A step of 8 rows, numbered as they are read.
        ([[False, True]], 1, [4, 5, 6, 7]),
        ([[False, True], [False, False]], 2, [4, 5]),  # first both processes' first micro-batch, two rows each
        ([[True, False], [False, True]], 2, [0, 1, 6, 7]),
        ([[False, False], [False, False]], 2, [*range(8)]),  # only the gradient is bad: any row may be the cause
        ([[False, False], [False, True]], 1, [4, 5, 6, 7]),  # the two share their rows
    ],
)
def test_the_rows_of_a_bad_loss_are_those_that_its_micro_batch_read(monkeypatch, of_all, row_readers, expected):
    monkeypatch.setattr(step_guard, "gather_object", lambda own: of_all)
    losses = [torch.tensor(NAN if bad else 1.0) for bad in of_all[0]]
    assert rows_of_bad_losses(np.arange(8), losses, row_readers) == expected


def test_the_rows_of_a_bad_batch_of_two_processes_are_named(tmp_path, capsys):
    """Batches of two rows: one reader has rows 0, 1 and 4, 5, the other one 2, 3 and 6, which is the last."""
    rows = JoinedRows([PackedRows(store_of_tokens(tmp_path, [[1] * 28]), np.array([True]), 4)])
    assert len(rows) == 7
    assert report_bad_batches(rows, [(1.0, 8), (1.0, 8), (1.0, 8), (NAN, 4)], 2, 2, "eval") == 1
    assert "eval: 1 of 4 batches have a loss that is not finite. Among 1 rows: row 6 of" in capsys.readouterr().out
    assert report_bad_batches(rows, [(1.0, 8), (INF, 8), (1.0, 8), (1.0, 4)], 2, 2, "eval") == 1
    printed = capsys.readouterr().out
    assert "Among 2 rows: row 4 of" in printed and "row 5 of" in printed
    assert report_bad_batches(rows, [(1.0, 8)] * 4, 2, 2, "eval") == 0
    assert not capsys.readouterr().out


@pytest.fixture
def poisoned(wiki, monkeypatch):
    """Make the loss of given (step, micro-batch) pairs NaN, as a broken row would; counted from 1 and 0."""

    def poison(wanted):
        compute, seen = wiki.PretrainingTrainer.compute_loss, {"step": None, "micro": 0}

        def poisoned_loss(self, model, inputs, *args, **kwargs):
            step = self.state.global_step + 1
            seen["micro"] = seen["micro"] + 1 if seen["step"] == step else 0
            seen["step"] = step
            loss = compute(self, model, inputs, *args, **kwargs)
            return loss * NAN if (step, seen["micro"]) in wanted else loss

        monkeypatch.setattr(wiki.PretrainingTrainer, "compute_loss", poisoned_loss)

    return poison


def test_a_bad_step_changes_nothing_but_the_count(wiki, cache_dir, tmp_path, poisoned, capsys, monkeypatch):
    """Weights and optimizer after step 3 are, to the bit, those after step 2; its micro-batch's rows are named."""
    states = {}
    check = wiki.PretrainingTrainer._save_checkpoint

    def remember(self, *args):
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        moments = [value.clone() for state in self.optimizer.state.values() for value in state.values()]
        states[self.state.global_step] = weights, moments
        check(self, *args)

    monkeypatch.setattr(wiki.PretrainingTrainer, "_save_checkpoint", remember)
    poisoned({(3, 1)})
    flags = ["--per_device_train_batch_size", "2", "--save_steps", "1", "--eval_strategy", "no"]
    wiki.main(small_run(cache_dir, tmp_path, *flags))
    for before, after in zip(states[2], states[3], strict=True):
        before, after = (list(part.values()) if isinstance(part, dict) else part for part in (before, after))
        assert len(before) > 5 and all(map(torch.equal, before, after))
    assert not all(map(torch.equal, states[3][0].values(), states[4][0].values()))
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    logged = {entry["step"]: entry for entry in history if "loss" in entry}
    assert math.isnan(logged[3]["loss"]) and [logged[step].get("steps_left_out") for step in (2, 3, 4)] == [None, 1, 1]
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["steps_left_out"] == 1 and math.isfinite(results["eval_loss"])
    [entry] = map(json.loads, (tmp_path / "bad_steps.jsonl").read_text().splitlines())
    rows = (results["ledger"]["tokens_train"] - 1) // 64
    expected = TrainingOrder([rows], 42).rows_at(np.arange(10, 12)).tolist()  # step 3 is positions 8 to 11
    assert (entry["step"], entry["action"], [row["row"] for row in entry["rows"]]) == (3, "left out", expected)
    assert "step 3 left out: loss nan" in capsys.readouterr().out


def checkpoints_in(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_too_many_in_a_row_end_without_a_checkpoint_and_keep_the_one_before(wiki, cache_dir, tmp_path, poisoned):
    poisoned({(step, 0) for step in (4, 5)})
    flags = ["--save_steps", "2", "--save_total_limit", "1", "--eval_strategy", "no"]
    flags = small_run(cache_dir, tmp_path, *flags)
    for _ in range(2):  # the same command goes back to the checkpoint, and meets the same rows
        with pytest.raises(InputError, match="stopped at step 5: 2 bad steps in a row") as caught:
            wiki.main([*flags, "--max_bad_steps", "1"])
        assert f"the same command continues from {tmp_path / 'checkpoint-2'}" in str(caught.value)
        assert "--max_bad_steps lets more of them" in str(caught.value)
        assert checkpoints_in(tmp_path) == ["checkpoint-2"]
        assert read_status(tmp_path) | {"state": "failed", "step": 5} == read_status(tmp_path)
    wiki.main([*flags, "--max_bad_steps", "2"])
    assert [step for step, loss in losses(tmp_path).items() if math.isfinite(loss)] == [1, 2, 3, 6]


def test_a_checkpoint_that_was_due_in_a_bad_streak_is_written_after_it(wiki, cache_dir, tmp_path, poisoned, capsys):
    poisoned({(step, 0) for step in (2, 3)})
    flags = ["--save_steps", "2", "--save_total_limit", "9", "--eval_strategy", "no"]
    wiki.main(small_run(cache_dir, tmp_path, *flags))
    assert checkpoints_in(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert "step 2 is not saved: the last 1 steps were left out as bad" in capsys.readouterr().out


@pytest.mark.parametrize("save_steps", ["2", "100"])
def test_a_weight_that_turns_nan_is_in_no_checkpoint_and_in_no_model(
    wiki, cache_dir, tmp_path, monkeypatch, save_steps
):
    """After step 3. Without a save at step 4, the steps after it are bad ones, and nothing but the end is left."""
    step = wiki.PretrainingTrainer.training_step

    def spoil(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 3:
            with torch.no_grad():
                self.model.model.layers[1].mlp.down_proj.weight[2, 3] = NAN
        return loss

    monkeypatch.setattr(wiki.PretrainingTrainer, "training_step", spoil)
    flags = ["--save_steps", save_steps, "--save_total_limit", "1", "--eval_strategy", "no"]
    with pytest.raises(InputError, match="the weight model.layers.1.mlp.down_proj.weight has values that are not fin"):
        wiki.main(small_run(cache_dir, tmp_path, *flags))
    assert checkpoints_in(tmp_path) == (["checkpoint-2"] if save_steps == "2" else [])
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "all_results.json").exists()


def test_a_checkpoint_of_nan_is_not_continued_from(wiki, cache_dir, tmp_path, monkeypatch):
    """One that was written by something else, such as an earlier version of this project."""
    flags = small_run(cache_dir, tmp_path, "--save_steps", "1", "--eval_strategy", "no", "--save_total_limit", "9")
    wiki.main([*flags, "--max_steps", "2"])
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = NAN
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match="checkpoint-2: the weight model.norm.weight has values .*Remove this checkp"):
        wiki.main(flags)


def test_weights_that_are_not_finite_are_found_in_every_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = torch.nn.Linear(3, 4, dtype=dtype)
        layer.bias.data.fill_(torch.finfo(dtype).max)
        assert own_weight_not_finite(layer) is None, "the largest number is finite"
        for bad in (NAN, INF, -INF):
            layer.weight.data[1, 2] = bad
            assert own_weight_not_finite(layer) == "weight"
    empty = torch.nn.Embedding(0, 3)
    assert own_weight_not_finite(empty) is None


def test_evaluation_names_what_is_not_finite(wiki, cache_dir, tmp_path, monkeypatch, capsys):
    step = wiki.PretrainingTrainer.prediction_step

    def poisoned_step(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        if len(self.eval_sums) == 2:
            self.eval_sums[1] = (self.eval_sums[1][0] * NAN, self.eval_sums[1][1])
        return result

    monkeypatch.setattr(wiki.PretrainingTrainer, "prediction_step", poisoned_step)
    wiki.main(small_run(cache_dir, tmp_path, "--max_steps", "1", "--per_device_eval_batch_size", "2"))
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert math.isnan(results["eval_loss"]) and results["eval_bad_batches"] == 1
    said = capsys.readouterr().out
    assert "eval: 1 of 3 batches have a loss that is not finite" in said and "row 2 of " in said and "row 3 of " in said
    assert losses(tmp_path)
