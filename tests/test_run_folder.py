"""One folder, one run."""

import json

import pytest

from common.messages import InputError
from common.run_folder import claim_output_folder, finished_results, last_checkpoint

RUN = {"recipe": "a.py", "model": {"hidden_size": 8}, "training": {"learning_rate": 1e-3}}


def checkpoint(folder, step, content=None):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}) if content is None else content)
    return path


def test_the_same_run_may_come_back(tmp_path):
    claim_output_folder(tmp_path / "run", RUN)
    claim_output_folder(tmp_path / "run", RUN)


def test_another_run_is_refused_and_every_difference_named(tmp_path):
    claim_output_folder(tmp_path, RUN)
    other = {"recipe": "a.py", "model": {"hidden_size": 16}, "training": {"learning_rate": 1e-3, "seed": 1}}
    with pytest.raises(InputError) as error:
        claim_output_folder(tmp_path, other)
    assert "model.hidden_size: 8 in the folder, 16 now" in str(error.value)
    assert "training.seed: None in the folder, 1 now" in str(error.value)
    assert "learning_rate" not in str(error.value)
    claim_output_folder(tmp_path, RUN)  # what was there is unharmed


def test_a_folder_of_something_else_is_refused(tmp_path):
    checkpoint(tmp_path, 5)
    with pytest.raises(InputError, match="not a run of these recipes"):
        claim_output_folder(tmp_path, RUN)


def test_the_newest_whole_checkpoint_is_taken(tmp_path, capsys):
    assert last_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 9)
    whole = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 100, content='{"global_step": 1')
    (tmp_path / "checkpoint-200").mkdir()
    assert last_checkpoint(tmp_path) == str(whole)
    said = capsys.readouterr().out
    assert "passing over" in said and "checkpoint-100" in said and "checkpoint-200" in said


def test_a_run_is_finished_at_its_last_step_only(tmp_path):
    assert finished_results(tmp_path, 10) is None
    (tmp_path / "all_results.json").write_text(json.dumps({"steps": 10, "eval_loss": 1.0}))
    assert finished_results(tmp_path, 10)["eval_loss"] == 1.0
    assert finished_results(tmp_path, 20) is None
