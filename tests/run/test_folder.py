"""One folder, one run."""

import json
import multiprocessing
import os
import shutil
import socket
from types import SimpleNamespace

import pytest

from common.console import InputError
from common.run.checkpoints import finish_checkpoint, unfinished
from common.run.folder import check_disk_space, claim_output_folder, finished_results, last_checkpoint

RUN = {"recipe": "a.py", "model": {"hidden_size": 8}, "training": {"learning_rate": 1e-3}}


def checkpoint(folder, step):
    """A whole checkpoint."""
    path = unfinished(folder, step)
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    finish_checkpoint(folder, step, processes=1)
    return folder / f"checkpoint-{step}"


def test_the_same_run_may_come_back(tmp_path):
    claim_output_folder(tmp_path / "run", RUN)
    claim_output_folder(tmp_path / "run", RUN)


def test_another_run_is_refused_and_every_difference_named(tmp_path):
    claim_output_folder(tmp_path, RUN)
    checkpoint(tmp_path, 5)
    other = {"recipe": "a.py", "model": {"hidden_size": 16}, "training": {"learning_rate": 1e-3, "seed": 1}}
    with pytest.raises(InputError) as error:
        claim_output_folder(tmp_path, other)
    assert "model.hidden_size: 8 in the folder, 16 now" in str(error.value)
    assert "training.seed: None in the folder, 1 now" in str(error.value)
    assert "learning_rate" not in str(error.value)
    claim_output_folder(tmp_path, RUN)  # what was there is unharmed


def test_a_folder_without_anything_to_lose_is_taken_over(tmp_path):
    claim_output_folder(tmp_path, {"recipe": "other.py"})
    claim_output_folder(tmp_path, RUN)
    assert json.loads((tmp_path / "run.json").read_text()) == RUN


def test_a_damaged_file_is_named(tmp_path):
    checkpoint(tmp_path, 5)
    (tmp_path / "run.json").write_text("")
    with pytest.raises(InputError, match="run.json: damaged"):
        claim_output_folder(tmp_path, RUN)


def test_a_folder_of_something_else_is_refused(tmp_path):
    checkpoint(tmp_path, 5)
    with pytest.raises(InputError, match="not a run of these recipes"):
        claim_output_folder(tmp_path, RUN)


def test_the_newest_whole_checkpoint_is_taken(tmp_path, capsys):
    assert last_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 9)
    whole = checkpoint(tmp_path, 10)
    (checkpoint(tmp_path, 100) / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-200").mkdir()
    assert last_checkpoint(tmp_path) == str(whole)
    said = capsys.readouterr().out
    assert "checkpoint-100: 'trainer_state.json' has 2 bytes, not 20" in said
    assert "checkpoint-200: no manifest.json: half-written" in said
    assert f"continuing from {whole}" in said


def test_what_may_change_is_named(tmp_path, capsys):
    claim_output_folder(tmp_path, RUN)
    checkpoint(tmp_path, 5)
    other = {"recipe": "a.py", "model": {"hidden_size": 16}, "training": {"learning_rate": 2e-3}}
    with pytest.raises(InputError, match=r"--allow_changes model.hidden_size training.learning_rate"):
        claim_output_folder(tmp_path, other)
    with pytest.raises(InputError, match=r"--allow_changes model.hidden_size$"):
        claim_output_folder(tmp_path, other, ["training.learning_rate"])
    assert json.loads((tmp_path / "run.json").read_text()) == RUN  # a refusal changes nothing
    claim_output_folder(tmp_path, other, ["training.learning_rate", "model"])
    assert "training.learning_rate was 0.001, and is 0.002 from here on" in capsys.readouterr().out
    claim_output_folder(tmp_path, other)  # from now on it is this run
    with pytest.raises(InputError, match="0.002 in the folder, 0.001 now"):
        claim_output_folder(tmp_path, RUN)


def test_half_written_results_are_no_results(tmp_path, capsys):
    (tmp_path / "all_results.json").write_text('{"steps": 10, "eval_lo')
    assert finished_results(tmp_path, 10, 640) is None
    assert not (tmp_path / "all_results.json").exists()
    assert "half-written when the run ended" in capsys.readouterr().out


def test_a_run_is_finished_at_its_last_step_only(tmp_path):
    assert finished_results(tmp_path, 10, 640) is None
    results = {"steps": 10, "eval_loss": 1.0, "ledger": {"tokens_trained": 640}}
    (tmp_path / "all_results.json").write_text(json.dumps(results))
    assert finished_results(tmp_path, 10, 650) == finished_results(tmp_path, 11, 640) == results
    assert finished_results(tmp_path, 20, 650) is None


ONE_PROCESS = dict(deepspeed_plugin=None, world_size=1, bf16=True, fp16=False)


@pytest.mark.parametrize(("stage", "bf16", "a_parameter"), [(None, True, 16), (2, True, 16), (2, False, 20)])
def test_what_fsdp2_and_deepspeed_write_twice_is_counted(tmp_path, monkeypatch, stage, bf16, a_parameter):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    training = SimpleNamespace(**ONE_PROCESS | dict(deepspeed_plugin=plugin, bf16=bf16))
    training.save_strategy, training.save_total_limit = "steps", 1
    free = 1000 * (2 * a_parameter + 4)  # two checkpoints and the model
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    check_disk_space(tmp_path, 1000, training)
    with pytest.raises(InputError, match="needed for 2 checkpoints"):
        check_disk_space(tmp_path, 1001, training)


@pytest.mark.parametrize(("limit", "strategy", "checkpoints"), [(2, "steps", 3), (None, "steps", 10), (None, "no", 0)])
def test_checkpoints_that_will_not_fit_are_refused(tmp_path, monkeypatch, limit, strategy, checkpoints):
    saving = dict(save_strategy=strategy, save_total_limit=limit, save_steps=10, max_steps=100)
    training = SimpleNamespace(**saving, **ONE_PROCESS)
    needed = 1000 * (12 * checkpoints + 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    check_disk_space(tmp_path, 1000, training)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(InputError, match=f"needed for {checkpoints} checkpoints"):
        check_disk_space(tmp_path, 1000, training)


def test_room_for_merged_weights_is_asked_for_before_the_run(tmp_path, monkeypatch):
    """Of 1,000 trained parameters: no checkpoint, 4 bytes each at the end, and 2 GiB of the base."""
    training = SimpleNamespace(save_strategy="no", save_total_limit=None, max_steps=10, **ONE_PROCESS)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4000 + 2 * 2**30))
    check_disk_space(tmp_path, 1000, training, merged=2 * 2**30)
    with pytest.raises(InputError, match="and the model, merged 2.00. Make room"):
        check_disk_space(tmp_path, 1000, training, merged=2 * 2**30 + 1)


def claim_as(rank: int, folder, others) -> None:
    """Be process ``rank`` of four, each the first of its machine, all at once behind the main one's barrier."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0"}
    socket.gethostname = lambda: f"machine{rank}"
    others.wait()
    claim_output_folder(folder, RUN)


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
