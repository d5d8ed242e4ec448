"""Two CPU processes through the real launcher, compiled as the YAMLs ask: the losses are those of one process."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, losses, small_run


def launch(config: str, *flags: str) -> subprocess.CompletedProcess:
    """Run accelerate launch; ``flags`` are the launcher's, the recipe and the recipe's."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    config_file = ["--config_file", str(ROOT / "accelerate_configs" / config)]
    config_file += ["--main_process_port", "0"]  # a free one: launches at the same time must not meet each other
    return subprocess.run([*command, *config_file, *flags], env=environment, capture_output=True, text=True, cwd=ROOT)


RECIPE = "recipes/wiki_zh_scratch.py"
# 0.02 passes end in a partial step, and 5 held-out rows do not divide by 2 processes x 4 rows.
LINE = ["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"lr_end": 1e-6, "power": 1.0}']
ODD = ["--max_steps", "-1", "--num_train_epochs", "0.02", *LINE]


@pytest.fixture(scope="module")
def one_process(wiki, cache_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    wiki.main(small_run(cache_dir, folder, *ODD))
    return folder


# aot_eager compiles as the YAMLs' inductor does, up to the last step, which takes a C++ compiler and a minute.
@pytest.mark.parametrize(
    ("config", "compiler"),
    [
        ("ddp.yaml", "aot_eager"),
        pytest.param("cpu_fsdp2.yaml", "no", marks=pytest.mark.heavy),
        pytest.param("cpu_fsdp2.yaml", "aot_eager", marks=pytest.mark.heavy),
        ("zero2.yaml", "no"),
        pytest.param("zero2.yaml", "aot_eager", marks=pytest.mark.heavy),
    ],
)
def test_two_processes_give_the_losses_of_one(one_process, cache_dir, tmp_path, config, compiler):
    flags = small_run(cache_dir, tmp_path, *ODD, "--per_device_train_batch_size", "2")
    done = launch(
        config, "--mixed_precision", "no", "--dynamo_backend", compiler, "--num_processes", "2", RECIPE, *flags
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rows x 2 processes" in done.stdout
    assert f"compile: {compiler} " in done.stdout  # accelerate's DeepSpeed launcher would drop it
    expected = losses(one_process)
    found = losses(tmp_path)
    assert found.keys() == expected.keys() and len(found) > 5
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-4), step
    results, expected = (json.loads((folder / "all_results.json").read_text()) for folder in (tmp_path, one_process))
    assert results["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    assert results["eval_tokens"] == expected["eval_tokens"] == 5 * 64  # no row twice
    assert results["ledger"] == expected["ledger"]


@pytest.mark.heavy
@pytest.mark.parametrize("config", ["cpu_fsdp2.yaml", "zero2.yaml"])
def test_a_rate_and_a_decay_that_change_are_applied_where_states_are_sharded(wiki, cache_dir, tmp_path, config):
    """Half a run, and the rest with another rate and weight decay: on two processes as on one."""
    first = "--optimizer adamw --eval_strategy no --lr_scheduler_type constant --lr_scheduler_kwargs {}".split()
    first += ["--warmup_steps", "0", "--per_device_train_batch_size", "2"]
    then = "--learning_rate 3e-4 --weight_decay 0.3 --allow_changes training.learning_rate training.weight_decay"
    for flags in (["--max_steps", "3"], then.split()):
        wiki.main([*small_run(cache_dir, tmp_path / "one", *first), *flags])
        two = [*small_run(cache_dir, tmp_path / "two", *first), *flags]
        done = launch(config, *"--mixed_precision no --dynamo_backend no --num_processes 2".split(), RECIPE, *two)
        assert done.returncode == 0, done.stdout + done.stderr
    histories = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("one", "two")
    ]
    one, two = ([(e["learning_rate"], e["loss"]) for e in history if "loss" in e] for history in histories)
    assert [rate for rate, _ in two] == [1e-3] * 3 + [3e-4] * 3
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4)
