"""The row at which a run with --init_from starts. tests/system/test_equivalence.py: weights under every strategy."""

import json

import pytest
from conftest import small_run

from common.arguments import SharedArguments
from common.console import InputError
from common.run.init_from import rows_before

IDENTITY = {"data": {"documents": ["a"]}, "training": {"seed": 1}}


@pytest.mark.parametrize(
    "state",
    [
        {"log_history": [{"loss": 2.0, "tokens_seen": 64}, {"tokens_seen": 128}, {"eval_loss": 2.0}]},
        {"global_step": 4, "loss": 2.0, "tokens_seen": 128},  # as explicit_loop.py writes it
    ],
)
def test_the_rows_trained_on_are_those_of_the_last_log(tmp_path, state):
    (tmp_path / "run.json").write_text(json.dumps(IDENTITY))
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    shared = SharedArguments(init_from=str(tmp_path), context_length=16)
    assert rows_before(IDENTITY, shared) == 8
    assert rows_before(IDENTITY | {"training": {"seed": 2}}, shared) == 0
    assert rows_before(IDENTITY, SharedArguments(context_length=16)) == 0, "without --init_from"


@pytest.mark.parametrize("fewer", ["0.05", "0.03"])
def test_a_run_whose_rows_are_all_trained_on_is_refused(wiki, cache_dir, tmp_path, fewer):
    flags = ["--num_train_epochs", "0.05", "--max_steps", "-1", "--eval_strategy", "no", "--save_strategy", "no"]
    wiki.main(small_run(cache_dir, tmp_path / "first", *flags))
    flags[1] = fewer
    with pytest.raises(InputError, match="trained on .* rows, and .* are asked for in all. .*--num_train_epochs"):
        wiki.main(small_run(cache_dir, tmp_path / "second", *flags, "--init_from", str(tmp_path / "first")))
