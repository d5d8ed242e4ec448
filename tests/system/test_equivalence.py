"""Same seed and tokens a step: the same run under every strategy, and a checkpoint of one goes on under another.

One, two and four CPU processes in fp32, so that only the order of additions differs.
"""

import json
import os
import subprocess

import pytest
from conftest import losses, small_run
from test_distributed import RECIPE, launch

from common.console import InputError
from common.distributed.launch import Launch
from common.distributed.strategy import DDP, FSDP2, Strategy
from common.run.checkpoints import finish_checkpoint, unfinished
from common.run.init_from import check_resumable, writer_of
from common.train.batch import set_batch

# 117 of 1,314 rows: 29 steps of 4 rows, and one of a single row.
RUN = "--max_steps -1 --num_train_epochs 0.089 --eval_strategy no --max_eval_rows 2 --save_strategy no".split()
STEPS, ROWS = 30, 117


def logs(folder) -> dict[int, dict]:
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {entry["step"]: entry for entry in history if "loss" in entry}


@pytest.fixture(scope="module")
def alone(wiki, cache_dir, tmp_path_factory):
    """The run of one process, four rows at once."""
    folder = tmp_path_factory.mktemp("alone")
    wiki.main(small_run(cache_dir, folder, *RUN))
    assert len(logs(folder)) == STEPS and logs(folder)[STEPS]["tokens_seen"] == ROWS * 64
    return folder


def launched(
    config: str, folder, cache_dir, *flags: str, processes: int = 2, compiler: str = "no", launcher_flags: tuple = ()
) -> subprocess.CompletedProcess:
    done = launch(
        config, "--mixed_precision", "no", "--dynamo_backend", compiler, "--num_processes", str(processes),
        *launcher_flags, RECIPE, *small_run(cache_dir, folder, *flags),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def assert_same_run(found, expected) -> None:
    found, expected = logs(found), logs(expected)
    assert found.keys() == expected.keys()
    for step, entry in found.items():
        assert entry["loss"] == pytest.approx(expected[step]["loss"], rel=2e-5), step
        assert entry["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-3), step
        assert entry["learning_rate"] == pytest.approx(expected[step]["learning_rate"], rel=1e-12), step
        assert entry["tokens_seen"] == expected[step]["tokens_seen"], step


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("processes", "rows"),
    [(1, "4"), (2, "1"), (2, "2"), (4, "1")],
    ids=["one process", "accumulated", "at once", "four processes"],
)
@pytest.mark.parametrize("config", ["cpu_2proc.yaml", "cpu_fsdp2.yaml", "zero1.yaml", "zero2.yaml", "zero3.yaml"])
def test_every_strategy_is_the_run_of_one_process(alone, cache_dir, tmp_path, config, processes, rows):
    if (config, processes) != ("cpu_2proc.yaml", 1):  # it asks for the launcher of several, and that refuses one
        launched(config, tmp_path, cache_dir, *RUN, "--per_device_train_batch_size", rows, processes=processes)
        assert_same_run(tmp_path, alone)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("config", "processes", "rows"),
    [("hsdp.yaml", 4, "1"), ("tensor_parallel.yaml", 2, "2"), ("fsdp2_tensor_parallel.yaml", 4, "1")],
)
def test_copies_and_divided_matrices_are_the_run_of_one_process(alone, cache_dir, tmp_path, config, processes, rows):
    launched(config, tmp_path, cache_dir, *RUN, "--per_device_train_batch_size", rows, processes=processes)
    assert_same_run(tmp_path, alone)


@pytest.mark.heavy
def test_experts_divided_by_the_yaml_are_the_run_of_one_process(wiki, cache_dir, tmp_path):
    """The launcher drops the size that the YAML gives; the recipe finds it all the same."""
    shape = dict(model_type="mixtral", hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    shape |= dict(output_router_logits=True, router_aux_loss_coef=0.05)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(shape))
    flags = ["--model", str(tmp_path / "model"), "--max_steps", "6"]
    wiki.main(small_run(cache_dir, tmp_path / "alone", *flags))
    rows = ["--per_device_train_batch_size", "2"]
    done = launched("expert_parallel.yaml", tmp_path / "two", cache_dir, *flags, *rows)
    assert "strategy: fsdp2, 2 shards, experts divided among 2" in done.stdout
    assert_same_run(tmp_path / "two", tmp_path / "alone")


@pytest.mark.heavy
def test_fsdp2_with_recompute_is_the_run_of_one_process(alone, cache_dir, tmp_path):
    done = launched(
        "cpu_fsdp2.yaml", tmp_path, cache_dir, *RUN, "--per_device_train_batch_size", "2",
        launcher_flags=["--fsdp_activation_checkpointing", "true"],
    )  # fmt: skip
    assert "recompute: yes (fsdp_activation_checkpointing" in done.stdout
    assert_same_run(tmp_path, alone)


@pytest.mark.heavy
@pytest.mark.parametrize("recompute", ["false", "true"])
def test_zero3_compiled_is_the_run_of_one_process(alone, cache_dir, tmp_path, recompute):
    """DeepSpeed's hooks around layers that are compiled whole, and recomputed."""
    flags = ["--per_device_train_batch_size", "1", "--gradient_checkpointing", recompute]
    launched("zero3.yaml", tmp_path, cache_dir, *RUN, *flags, compiler="aot_eager")
    assert_same_run(tmp_path, alone)


@pytest.mark.heavy
@pytest.mark.parametrize("rows", ["1", "2", "3"])
def test_every_split_of_a_step_is_the_same_run(wiki, alone, cache_dir, tmp_path, rows):
    wiki.main(small_run(cache_dir, tmp_path, *RUN, "--per_device_train_batch_size", rows))
    assert_same_run(tmp_path, alone)


def test_any_number_of_processes_takes_as_many_steps(tmp_path):
    from types import SimpleNamespace

    rows_a_step = {
        set_batch(
            Launch(processes=processes),
            SimpleNamespace(
                per_device_train_batch_size=8, per_device_eval_batch_size=8, gradient_accumulation_steps=0
            ),
            131_072, 512,
        )
        for processes in (1, 2, 4, 8, 32, 256)
    }  # fmt: skip
    assert rows_a_step == {256}


CONSTANT = "--lr_scheduler_type constant --lr_scheduler_kwargs {} --warmup_steps 0 --save_steps 4 --eval_strategy no"
HALVES = [*CONSTANT.split(), "--learning_rate", "1e-4", "--max_eval_rows", "2", "--per_device_train_batch_size", "2"]


@pytest.mark.heavy
def test_a_checkpoint_goes_on_under_another_strategy_and_back(wiki, cache_dir, tmp_path):
    """1 process, then ZeRO-2 on 2, then DDP on 2: the rows go on, and so does the loss; no optimizer's state does."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    wiki.main(small_run(cache_dir, first, *HALVES, "--max_steps", "4"))
    assert writer_of(str(first / "checkpoint-4")) == ("plain", None)
    done = launched(
        "zero2.yaml", second, cache_dir, *HALVES, "--max_steps", "4", "--init_from", str(first / "checkpoint-4")
    )
    assert "training starts after the 16 rows" in done.stdout and "optimizer and schedule start anew" in done.stdout
    assert writer_of(str(second / "checkpoint-4")) == ("zero", 2)
    launched(
        "cpu_2proc.yaml", third, cache_dir, *HALVES, "--max_steps", "4", "--init_from", str(second / "checkpoint-4")
    )
    assert [logs(folder)[4]["tokens_seen"] for folder in (first, second, third)] == [16 * 64, 32 * 64, 48 * 64]

    # The independent truth: one process that does the same, each with a new optimizer.
    for name, source in (("b", first), ("c", tmp_path / "b")):
        more = ["--max_steps", "4", "--init_from", str(source / "checkpoint-4")]
        wiki.main(small_run(cache_dir, tmp_path / name, *HALVES, *more))
    for name, other in (("b", second), ("c", third)):
        assert losses(other) == pytest.approx(losses(tmp_path / name), rel=2e-5)
    assert losses(third)[1] < losses(first)[1]

    with pytest.raises(InputError, match="written under DeepSpeed; .*--init_from .*checkpoint-4"):
        wiki.main(small_run(cache_dir, second, *HALVES, "--max_steps", "6", "--init_from", str(first / "checkpoint-4")))


@pytest.mark.heavy
def test_a_run_of_one_process_is_continued_exactly_by_two(wiki, cache_dir, tmp_path):
    """The same folder: optimizer, schedule and rows go on."""
    wiki.main(small_run(cache_dir, tmp_path / "whole", *HALVES, "--max_steps", "8"))
    wiki.main(small_run(cache_dir, tmp_path / "halves", *HALVES, "--max_steps", "4"))
    launched("cpu_2proc.yaml", tmp_path / "halves", cache_dir, *HALVES, "--max_steps", "8")
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), rel=2e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fsdp2_continues_exactly_on_any_number_of_processes(wiki, cache_dir, tmp_path, optimizer):
    """On four, then two, then one: shards are joined and divided again."""
    flags = [*HALVES, "--optimizer", optimizer, "--per_device_train_batch_size", "1"]
    wiki.main(small_run(cache_dir, tmp_path / "whole", *flags, "--max_steps", "12"))
    for processes, steps in ((4, "4"), (2, "8"), (1, "12")):
        launched("cpu_fsdp2.yaml", tmp_path / "parts", cache_dir, *flags, "--max_steps", steps, processes=processes)
    assert writer_of(str(tmp_path / "parts" / "checkpoint-12")) == ("fsdp2", None)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=2e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("config", ["zero1.yaml", "zero2.yaml"])
def test_zero_continues_exactly_on_any_number_of_processes(wiki, cache_dir, tmp_path, config):
    """On two, then one, then two: DeepSpeed's states are converted, and nothing of that is left."""
    flags = [*HALVES, "--optimizer", "adamw", "--per_device_train_batch_size", "1"]
    wiki.main(small_run(cache_dir, tmp_path / "whole", *flags, "--max_steps", "12"))
    for processes, steps in ((2, "4"), (1, "8"), (2, "12")):
        done = launched(config, tmp_path / "parts", cache_dir, *flags, "--max_steps", steps, processes=processes)
        assert ("converting DeepSpeed's states" in done.stdout) == (steps != "4")
        assert not (tmp_path / "parts" / "unfinished").exists()
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=2e-5)


def test_who_wrote_a_checkpoint_is_seen_and_others_are_refused(tmp_path):

    def training(stage=None, processes=1):
        strategy = DDP if stage is None else Strategy(f"zero{stage}")
        return Launch(strategy=strategy, processes=processes)

    (tmp_path / "plain").mkdir()
    check_resumable(str(tmp_path / "plain"), training(processes=8))
    with pytest.raises(InputError, match="written under one process or DDP; zero2 on 2 processes cannot"):
        check_resumable(str(tmp_path / "plain"), training(2, 2))
    for rank in range(4):
        file = tmp_path / "zero" / "global_step4" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert writer_of(str(tmp_path / "zero")) == ("zero", 4)
    for processes in (4, 2):  # with another number, DeepSpeed's states are converted
        check_resumable(str(tmp_path / "zero"), training(2, processes))
    check_resumable(str(tmp_path / "zero"), training(3, 4))
    with pytest.raises(InputError, match="written under DeepSpeed on 4 processes; zero3 on 2 processes cannot"):
        check_resumable(str(tmp_path / "zero"), training(3, 2))
    with pytest.raises(InputError, match="written under DeepSpeed; ddp on 4 processes cannot"):
        check_resumable(str(tmp_path / "zero"), training(processes=4))
    (tmp_path / "parts" / "shards").mkdir(parents=True)
    for readable in (Launch(strategy=FSDP2), Launch(strategy=FSDP2, tensor_parallel=2)):
        check_resumable(str(tmp_path / "parts"), readable)
    (tmp_path / "parts" / "shards").rmdir()
    (tmp_path / "parts" / "optimizer.bin").touch()
    check_resumable(str(tmp_path / "parts"), Launch(strategy=FSDP2))
    with pytest.raises(InputError, match="written under FSDP2; fsdp2 on 1 processes cannot"):
        check_resumable(str(tmp_path / "parts"), Launch(strategy=FSDP2, tensor_parallel=2))


def test_weights_of_another_model_are_refused(wiki, cache_dir, tmp_path):
    from common.model.from_config import planned_model
    from common.run.init_from import load_start

    shape = dict(model_type="qwen2", hidden_size=64, intermediate_size=128, num_attention_heads=2)
    shape |= dict(tie_word_embeddings=True, num_key_value_heads=2)
    from transformers import AutoModelForCausalLM

    def built(layers):
        config = planned_model(shape | dict(num_hidden_layers=layers), 1000, 64).config
        return AutoModelForCausalLM.from_config(config)

    built(2).save_pretrained(tmp_path)
    load_start(built(2), str(tmp_path))
    with pytest.raises(InputError, match="another model. Missing tensors: .*layers.2"):
        load_start(built(3), str(tmp_path))
    with pytest.raises(InputError, match="no model.*safetensors"):
        load_start(built(2), str(tmp_path / "nowhere"))

    # A checkpoint is whole, or refused; and so are weights that were cut off.
    built(2).save_pretrained(unfinished(tmp_path, 3))
    finish_checkpoint(tmp_path, 3, processes=1)
    whole = tmp_path / "checkpoint-3"
    load_start(built(2), str(whole))
    os.truncate(whole / "model.safetensors", 5000)
    with pytest.raises(InputError, match="'model.safetensors' has 5,000 bytes, not .*Give a whole checkpoint"):
        load_start(built(2), str(whole))
    whole.rename(tmp_path / "other")
    with pytest.raises(InputError, match="its weights cannot be read"):
        load_start(built(2), str(tmp_path / "other"))
