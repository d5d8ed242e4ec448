"""One folder, one run."""

import contextlib
import json
import multiprocessing
import os
import socket
from dataclasses import fields
from types import SimpleNamespace

import pytest
from filelock import FileLock, Timeout
from transformers import TrainingArguments

from common.arguments import SharedArguments
from common.console import InputError
from common.run.checkpoints import finish_checkpoint, unfinished
from common.run.folder import Run, check_folder, open_run
from common.run.identity import DECIDING_ROWS, SHARED_NOT_DECIDING, deciding_training
from common.run.lock import read_status

RUN = {"recipe": "a.py", "model": {"hidden_size": 8}, "training": {"learning_rate": 1e-3}}


def claim(folder, identity, allow_changes=()) -> Run:
    """Claim ``folder``, and give it back, as a process does that ends."""
    run = Run(str(folder))
    try:
        run.claim(identity, allow_changes)
    finally:
        run.release()
    return run


def order_of(steps: int, rows: int) -> SimpleNamespace:
    """Stand in for the order of a run."""
    return SimpleNamespace(steps=steps, rows_in_run=rows, rows_elsewhere=0)


def checkpoint(folder, step):
    """A whole checkpoint."""
    path = unfinished(folder, step)
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    finish_checkpoint(folder, step, processes=1)
    return folder / f"checkpoint-{step}"


def test_the_same_run_may_come_back(tmp_path):
    claim(tmp_path / "run", RUN)
    claim(tmp_path / "run", RUN)


def test_another_run_is_refused_and_every_difference_named(tmp_path):
    claim(tmp_path, RUN)
    checkpoint(tmp_path, 5)
    other = {"recipe": "a.py", "model": {"hidden_size": 16}, "training": {"learning_rate": 1e-3, "seed": 1}}
    with pytest.raises(InputError) as error:
        claim(tmp_path, other)
    assert "model.hidden_size: 8 in the folder, 16 now" in str(error.value)
    assert "training.seed: 42 in the folder, 1 now" in str(error.value)
    assert "learning_rate" not in str(error.value)
    claim(tmp_path, RUN)  # what was there is unharmed


def test_a_folder_without_anything_to_lose_is_taken_over(tmp_path):
    claim(tmp_path, {"recipe": "other.py"})
    claim(tmp_path, RUN)
    assert json.loads((tmp_path / "run.json").read_text()) == RUN


def test_a_damaged_file_is_named(tmp_path):
    checkpoint(tmp_path, 5)
    (tmp_path / "run.json").write_text("")
    with pytest.raises(InputError, match="run.json: damaged"):
        claim(tmp_path, RUN)


def test_a_folder_of_something_else_is_refused(tmp_path):
    checkpoint(tmp_path, 5)
    with pytest.raises(InputError, match="not a run of these recipes"):
        claim(tmp_path, RUN)


def files_below(folder) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", ["unfinished/thesis/a.txt", "unfinished/checkpoint-3/a.txt", "checkpoint-3/a.txt", "model.safetensors",
             "config.json", "tokenizer_config.json", "README.md", "merged/a.gguf"],
)  # fmt: skip
def test_a_folder_of_somebody_else_is_refused_and_left_as_it_was(tmp_path, name):
    """By the preflight, before anything is tokenized, and when it is claimed."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    training = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    refused = (lambda: claim(tmp_path, RUN), lambda: check_folder(str(tmp_path), "a.py", SharedArguments(), training))
    for check in refused:
        with pytest.raises(
            InputError, match=r"but no run.json: not a run of these recipes.*Choose another --output_dir"
        ):
            check()
    kept = files_below(tmp_path)
    kept.pop(".lock", None)
    assert kept == {name: b"mine"}


def test_a_run_json_of_somebody_else_is_refused_and_left_as_it_was(tmp_path):
    for content in ('{"name": "mine"}', "[1]"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(InputError, match="not of a run of these recipes"):
            claim(tmp_path, RUN)
        assert (tmp_path / "run.json").read_text() == content


def test_only_half_written_checkpoints_are_removed(tmp_path):
    claim(tmp_path, RUN)
    for name in ("thesis/a.txt", "checkpoint-3/a.pt", "removed-checkpoint-1/a.pt", "checkpoint-model/a.safetensors"):
        (tmp_path / "unfinished" / name).parent.mkdir(parents=True)
        (tmp_path / "unfinished" / name).write_text("x")
    claim(tmp_path, RUN)
    assert [*files_below(tmp_path / "unfinished")] == [os.path.join("thesis", "a.txt")]


def test_a_refused_launch_removes_nothing(tmp_path):
    claim(tmp_path, RUN)
    checkpoint(tmp_path, 5)
    (tmp_path / "unfinished" / "checkpoint-9").mkdir(parents=True)
    with pytest.raises(InputError, match="holds another run"):
        claim(tmp_path, RUN | {"recipe": "b.py"})
    assert (tmp_path / "unfinished" / "checkpoint-9").exists()


def test_the_newest_whole_checkpoint_is_taken(tmp_path, capsys):
    assert Run(str(tmp_path)).last_checkpoint() is None
    checkpoint(tmp_path, 9)
    whole = checkpoint(tmp_path, 10)
    (checkpoint(tmp_path, 100) / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-200").mkdir()
    assert Run(str(tmp_path)).last_checkpoint() == str(whole)
    said = capsys.readouterr().out
    assert "checkpoint-100: 'trainer_state.json' has 2 bytes, not 20" in said
    assert "checkpoint-200: no manifest.json: half-written" in said
    assert f"continuing from {whole}" in said


def test_what_may_change_is_named_and_written_when_the_checkpoint_has_been_loaded(tmp_path, capsys):
    claim(tmp_path, RUN)
    checkpoint(tmp_path, 5)
    other = RUN | {"training": {"learning_rate": 2e-3, "seed": 1}}
    with pytest.raises(InputError, match="\n  --allow_changes training.learning_rate training.seed$"):
        claim(tmp_path, other)
    with pytest.raises(InputError, match="\n  --allow_changes training.learning_rate$"):
        claim(tmp_path, other, ["training.seed"])
    run = claim(tmp_path, other, ["training"])
    assert "training.learning_rate was 0.001, and is 0.002 from here on" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text()) == RUN, "not loaded yet: the old command still continues"
    claim(tmp_path, RUN)
    run.accept_changes()
    claim(tmp_path, other)  # from now on it is this run
    with pytest.raises(InputError, match="0.002 in the folder, 0.001 now"):
        claim(tmp_path, RUN | {"training": {"learning_rate": 1e-3, "seed": 1}})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model": {"hidden_size": 16}}, "weights of the other model"),
        ({"recipe": "b.py"}, "checkpoints of its own"),
        ({"training": {"learning_rate": 1e-3, "optim": "sgd"}}, "states of the other optimizer"),
        ({"training": {"learning_rate": 1e-3, "bf16": True}}, "--init_from the checkpoint"),
        ({"data": {"held_out_fraction": 0.1}}, "documents that were trained on would be held out"),
        ({"data": {"tokenizer": "b"}}, "other text"),
        ({"data": {"optimizer": "muon"}}, "states of the other optimizer"),
        ({"data": {"context_length": 64}}, "the model is made for it"),
    ],
)
def test_what_cannot_change_says_why_and_is_never_offered(tmp_path, change, why):
    was = RUN | {"data": {"held_out_fraction": 0.05}}
    claim(tmp_path, was)
    checkpoint(tmp_path, 5)
    everything = ["recipe", "model", "data", "training", *(f"training.{name}" for name in change.get("training", {}))]
    with pytest.raises(InputError, match=rf"\(cannot change: .*{why}") as stopped:
        claim(tmp_path, was | change, everything)
    assert "--allow_changes" not in str(stopped.value)
    mixed = was | change | {"training": {**change.get("training", {}), "learning_rate": 2e-3}}
    with pytest.raises(InputError, match="back, --allow_changes training.learning_rate takes the rest$"):
        claim(tmp_path, mixed)
    assert json.loads((tmp_path / "run.json").read_text()) == was


def test_the_rate_of_a_schedule_that_keeps_it_as_a_state_cannot_change(tmp_path):
    plateau = RUN | {"training": {"learning_rate": 1e-3, "lr_scheduler_type": "reduce_lr_on_plateau"}}
    claim(tmp_path, plateau)
    checkpoint(tmp_path, 5)
    other = RUN | {"training": {"learning_rate": 2e-3, "lr_scheduler_type": "reduce_lr_on_plateau"}}
    with pytest.raises(InputError, match="the rate that this schedule has come to"):
        claim(tmp_path, other, ["training.learning_rate"])


def test_other_documents_are_for_a_split_by_content_only(tmp_path, capsys):
    """By order, the ends of the shares would move over documents that were trained on."""
    for split, may in ((None, True), ("949,50,1", False)):
        folder = tmp_path / str(may)
        was, now = ({"recipe": "a.py", "data": {"split": split, "documents": [name]}} for name in "ab")
        claim(folder, was)
        checkpoint(folder, 5)
        if may:
            claim(folder, now, ["data.documents"])
            assert "rows are in another order from here on" in capsys.readouterr().out
        else:
            with pytest.raises(InputError, match="documents that were trained on would be held out"):
                claim(folder, now, ["data.documents"])


def test_a_run_of_before_a_field_was_recorded_continues_with_its_default(tmp_path):
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    now = json.loads(json.dumps(deciding_training(training)))
    before = {name: value for name, value in now.items() if name not in ("neftune_noise_alpha", "optim_args", "tf32")}
    assert before.keys() < now.keys()
    claim(tmp_path, RUN | {"training": before})
    checkpoint(tmp_path, 5)
    claim(tmp_path, RUN | {"training": now})
    with pytest.raises(InputError, match="training.neftune_noise_alpha: None in the folder, 5.0 now"):
        claim(tmp_path, RUN | {"training": now | {"neftune_noise_alpha": 5.0}})


def test_every_shared_flag_is_decided_on():
    """Does this fail? A new flag decides what is trained on (add it here), or stands in SHARED_NOT_DECIDING."""
    deciding = {"context_length", "packing", "held_out_fraction", "split", "keep_duplicates", "data_weights"}
    deciding |= {"branch_from", "max_data_tokens"}
    assert set(DECIDING_ROWS) == deciding
    assert {each.name for each in fields(SharedArguments) if each.init} == deciding | SHARED_NOT_DECIDING.keys()


def test_half_written_results_are_no_results(tmp_path, capsys):
    run = claim(tmp_path, RUN)
    (tmp_path / "all_results.json").write_text('{"steps": 10, "eval_lo')
    assert run.finished(order_of(10, 640)) is None
    assert not (tmp_path / "all_results.json").exists()
    assert "half-written when the run ended" in capsys.readouterr().out


def test_a_finished_run_says_that_tasks_are_not_measured(tmp_path, capsys):
    results = {"steps": 5, "eval_loss": 1.0, "tasks": [{"task": "blimp"}]}
    for kept, note in ((results, False), ({"steps": 5, "eval_loss": 1.0}, True)):
        run = Run(str(tmp_path), eval_tasks=["blimp", "own.yaml"])
        run.claim(RUN)
        (tmp_path / "all_results.json").write_text(json.dumps(kept))
        assert run.finished(order_of(5, 20)) == kept
        run.release()
        printed = capsys.readouterr().out
        assert (f"lm_eval --model hf --model_args pretrained={tmp_path} --tasks blimp,own.yaml" in printed) == note


def test_a_run_is_finished_at_its_last_step_only(tmp_path):
    run = claim(tmp_path, RUN)
    assert run.finished(order_of(10, 640)) is None
    results = {"steps": 10, "eval_loss": 1.0, "ledger": {"rows_trained": 640}}
    (tmp_path / "all_results.json").write_text(json.dumps(results))
    assert run.finished(order_of(10, 650)) == run.finished(order_of(11, 640)) == results
    assert run.finished(order_of(20, 650)) is None
    assert Run(str(tmp_path)).finished(order_of(10, 640)) is None, "a probe trains whatever the folder holds"


@pytest.mark.parametrize("ended_by", [None, KeyboardInterrupt, SystemExit(143)])
def test_the_folder_is_given_back_however_the_run_ends(tmp_path, ended_by):
    """Another process could lock it while this one lives on, as a notebook's does."""
    training = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True)

    def lock_of_another_process() -> FileLock:
        return FileLock(tmp_path / "run" / ".lock")  # not the singleton: as strange to the run's as another process's

    with contextlib.suppress(KeyboardInterrupt, SystemExit), open_run(RUN, SharedArguments(), training) as run:
        assert run.claimed
        with pytest.raises(Timeout):
            lock_of_another_process().acquire(timeout=0)
        if ended_by is not None:
            raise ended_by
    with lock_of_another_process().acquire(timeout=0):
        assert json.loads((tmp_path / "run" / "run.json").read_text()) == RUN


def test_a_run_that_is_refused_gives_the_folder_back(tmp_path):
    checkpoint(tmp_path, 5)
    run = Run(str(tmp_path))
    with pytest.raises(InputError, match="not a run of these recipes"):
        run.claim(RUN)
    assert not run.claimed
    FileLock(tmp_path / ".lock").acquire(timeout=0).lock.release()


def test_a_probe_claims_nothing_and_writes_nothing(tmp_path):
    training = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True)
    with open_run(RUN, SharedArguments(plan=True, probe=True), training) as run:
        run.write_status("running")
        assert not run.claimed
    assert not (tmp_path / "run").exists()


def test_only_the_main_process_of_a_claimed_run_writes_its_status(tmp_path, monkeypatch):
    run = claim(tmp_path, RUN)
    run.step, run.max_steps = 3, 9
    monkeypatch.setenv("RANK", "1")
    run.write_status("running")
    assert read_status(tmp_path) is None
    monkeypatch.setenv("RANK", "0")
    run.write_status("interrupted", "SIGTERM")
    wanted = {"state": "interrupted", "step": 3, "max_steps": 9, "reason": "SIGTERM"}
    assert read_status(tmp_path) | wanted == read_status(tmp_path)


def claim_as(rank: int, folder, others) -> None:
    """Be process ``rank`` of four, each the first of its machine, all at once behind the main one's barrier."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0"}
    socket.gethostname = lambda: f"machine{rank}"
    others.wait()
    claim(folder, RUN)


def test_all_processes_claim_a_new_folder_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    others = context.Barrier(4)
    processes = [context.Process(target=claim_as, args=(rank, tmp_path / "run", others)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == RUN
    assert not list((tmp_path / "run").glob("*.partial"))
