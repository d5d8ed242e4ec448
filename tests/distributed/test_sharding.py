"""A model that processes share: what each of them holds, and that the run is the one of a single process.

The YAMLs themselves are in tests/system/test_equivalence.py.
"""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers.distributed.mixin as loaded_divided
from conftest import load_recipe, losses, small_run, trained_weights
from launched_processes import FSDP2, in_launched_processes, meet_again
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import DTensor

from common.distributed.strategy import local
from common.run.checkpoints import checkpoints
from common.run.divided_states import write_parts
from common.run.init_from import weights_of, writer_of

SHAPE = dict(model_type="qwen2", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, vocab_size=4096, attention_dropout=0.0)
BY_ONE = FSDP2 | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


def parallel(tensor: int, shards: int = 1) -> dict[str, str]:
    """Return what the launcher says of the YAML's parallelism_config."""
    sizes = {"PARALLELISM_CONFIG_TP_SIZE": str(tensor), "PARALLELISM_CONFIG_DP_SHARD_SIZE": str(shards)}
    return FSDP2 | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"} | sizes


# Constant rate, so that a run of three steps can be continued to six.
CONSTANT = "--lr_scheduler_type constant --lr_scheduler_kwargs {} --warmup_steps 0 --eval_strategy no".split()
MUON = [*CONSTANT, "--optimizer", "muon", "--learning_rate", "1e-3", "--gradient_checkpointing", "true"]


def runs(folder: Path) -> dict[str, list[str]]:
    """Return the flags of runs by name. They end with evaluation and a saved model."""
    tied, untied = (["--model", str(folder / name)] for name in ("tied", "untied"))
    return {
        "adamw, tied": [*tied, *CONSTANT, "--learning_rate", "1e-3"],
        "muon, recompute": [*untied, *MUON],
        "isolated, clipped": [*untied, "--packing", "isolated", "--max_grad_norm", "0.5"],
    }


@pytest.fixture(scope="module")
def alone(wiki, cache_dir, tmp_path_factory) -> Path:
    """A folder with the runs of one process, a cache of tokens, and models to begin with."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "cache").symlink_to(cache_dir)
    for name in ("tied", "untied"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(SHAPE | {"tie_word_embeddings": name == "tied"}))
    for name, flags in runs(folder).items():
        wiki.main(small_run(cache_dir, folder / name, *flags))
    return folder


def watched_recipe(name: str = "wiki_zh_scratch"):
    """Return the recipe, a list that gets its Trainer, and one that gets the device of the model before it is divided.

    The Trainer keeps what it trains on.
    """
    recipe, trainers, devices = load_recipe(name), [], []

    class Watched(recipe.PretrainingTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.seen = []
            trainers.append(self)

        def training_step(self, model, inputs, *args, **kwargs):
            self.seen.append(inputs["input_ids"].tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    def place_model(model, *args):
        devices.append(model.device.type)
        return placed(model, *args)

    placed, recipe.place_model, recipe.PretrainingTrainer = recipe.place_model, place_model, Watched
    return recipe, trainers, devices


def numbers(model) -> tuple[int, int]:
    """Return how many numbers the parameters of ``model`` have, and how many of them this process holds."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    return whole, sum(local(parameter).numel() for parameter in model.parameters())


def check_fsdp2(rank: int, folder: Path) -> None:
    recipe, trainers, devices = watched_recipe()
    recipe.main(small_run(folder / "cache", folder / "run", "--per_device_train_batch_size", "2"))
    [trainer] = trainers
    assert str(trainer.accelerator.distributed_type) == "DistributedType.FSDP" and devices == ["cpu"]
    whole, here = numbers(trainer.model)
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()) and here == whole / 2
    states = [state for states in trainer.optimizer.state.values() for name, state in states.items() if name != "step"]
    assert sum(local(state).numel() for state in states) == 2 * here


def test_fsdp2_really_shards_on_cpus(wiki, cache_dir, tmp_path):
    """accelerate would train under DDP instead, without a word, or train alone in each process."""
    (tmp_path / "cache").symlink_to(cache_dir)
    wiki.main(small_run(cache_dir, tmp_path / "alone"))
    in_launched_processes(2, check_fsdp2, tmp_path, **FSDP2)
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def results(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))


def assert_same_run(found: Path, expected: Path) -> None:
    """Losses, evaluation, and the model at the end: an ordinary folder."""
    assert losses(found) == pytest.approx(losses(expected), rel=2e-5)
    assert results(found)["eval_loss"] == pytest.approx(results(expected)["eval_loss"], rel=2e-5)
    assert results(found)["eval_tokens"] == results(expected)["eval_tokens"]
    one, other = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert one.keys() == other.keys()
    for name, weights in other.items():
        torch.testing.assert_close(one[name], weights, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (found, expected)]
    assert configs[0] == configs[1]


def in_shares(folder: Path, alone: Path, processes: int, check, **environment: str) -> None:
    for name in ("cache", "tied", "untied", "adamw, tied"):
        (folder / name).symlink_to(alone / name)
    in_launched_processes(processes, check, folder, **environment)


def check_divided(rank: int, folder: Path) -> None:
    """Every run of ``runs``; the one with Muon in two halves, and one that begins with another's weights."""
    loaded_divided.gather_state_dict_for_save = no_whole_weights
    processes, tensor = int(os.environ["WORLD_SIZE"]), int(os.environ["PARALLELISM_CONFIG_TP_SIZE"])
    started = [*runs(folder)["adamw, tied"], "--init_from", str(folder / "adamw, tied" / "checkpoint-3")]
    halves = [[*runs(folder)["muon, recompute"], "--max_steps", "3"]]
    for name, flags in [("muon, recompute", *halves), *runs(folder).items(), ("started", started)]:
        recipe, trainers, devices = watched_recipe()
        name = f"divided {name}"
        recipe.main(small_run(folder / "cache", folder / name, *flags, "--per_device_train_batch_size", "2"))
        meet_again()
        assert devices == ["cpu" if rank == 0 else "meta"]
        [trainer] = trainers
        whole, here = numbers(trainer.model)
        assert here < 1.02 * whole / processes  # the norms are in each process
        assert trainer.model.get_input_embeddings().padding_idx is None
        (folder / f"{name} {rank}.json").write_text(json.dumps(trainer.seen))
    if rank % tensor == 0:
        assert not list((folder / "cache").resolve().glob("whole-model-*"))


def no_whole_weights(state_dict: dict, *_) -> dict:
    """Instead of transformers' function, which gathers the whole weights in every process, for one to save."""
    assert not any(isinstance(tensor, DTensor) for tensor in state_dict.values())
    return state_dict


@pytest.mark.parametrize(
    ("processes", "shards"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.heavy)], ids=["tensor", "tensor x FSDP2"]
)
def test_divided_matrices_train_as_whole_ones(wiki, alone, cache_dir, tmp_path, processes, shards):
    in_shares(tmp_path, alone, processes, check_divided, **parallel(2, shards))
    for name in runs(alone):
        assert_same_run(tmp_path / f"divided {name}", alone / name)
        seen = [json.loads((tmp_path / f"divided {name} {rank}.json").read_text()) for rank in range(processes)]
        assert all(seen[rank] == seen[rank // 2 * 2] for rank in range(processes))  # a group has the same rows
        assert shards == 1 or seen[0] != seen[2]
    text = (tmp_path / "output.0").read_text()
    assert f"continuing from {tmp_path}/divided muon, recompute/checkpoint-3" in text and "sample" in text

    # Weights go over in both directions; the truth is one process that does the same.
    again = [*runs(alone)["adamw, tied"], "--init_from", str(alone / "adamw, tied" / "checkpoint-3")]
    wiki.main(small_run(cache_dir, tmp_path / "started", *again))
    assert_same_run(tmp_path / "divided started", tmp_path / "started")
    back = tmp_path / "divided muon, recompute" / "checkpoint-6"
    for start, folder in ((back, "back"), (alone / "muon, recompute" / "checkpoint-6", "stayed")):
        flags = [*runs(alone)["muon, recompute"], "--init_from", str(start)]
        wiki.main(small_run(cache_dir, tmp_path / folder, *flags, "--max_steps", "2"))
    assert losses(tmp_path / "back") == pytest.approx(losses(tmp_path / "stayed"), rel=2e-5)


def check_other_sizes(rank: int, folder: Path) -> None:
    recipe, _, _ = watched_recipe()
    steps = os.environ["STEPS"]
    flags = [*runs(folder)["muon, recompute"], "--max_steps", steps, "--per_device_train_batch_size", "1"]
    recipe.main(small_run(folder / "cache", folder / "sizes", *flags, "--save_steps", "2"))


@pytest.mark.heavy
def test_a_divided_run_continues_exactly_on_other_sizes(alone, tmp_path):
    """2 shards x 2, then 2, then 2 x 2: a dimension that is divided twice lies in several pieces."""
    for name in ("cache", "tied", "untied"):
        (tmp_path / name).symlink_to(alone / name)
    for processes, shards, steps in ((4, 2, "2"), (2, 1, "4"), (4, 2, "6")):
        in_launched_processes(processes, check_other_sizes, tmp_path, STEPS=steps, **parallel(2, shards))
    assert losses(tmp_path / "sizes") == pytest.approx(losses(alone / "muon, recompute"), rel=2e-5)


IN_PARTS = FSDP2 | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}


def check_parts(rank: int, folder: Path) -> None:
    """Train in parts; in the second process the disk is full at the first save."""
    recipe, _, _ = watched_recipe()
    steps, full = os.environ["STEPS"], [os.environ["STEPS"] == "4" and rank == 1]
    write_data = FileSystemWriter.write_data

    def write(self, plan, planner):
        if full.pop() if full else False:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_data(self, plan, planner)

    FileSystemWriter.write_data = write
    flags = [*runs(folder)["muon, recompute"], "--max_steps", steps, "--per_device_train_batch_size", "1"]
    flags += ["--save_steps", "2", "--on_save_error", "continue"]
    recipe.main(small_run(folder / "cache", folder / "parts", *flags))


def test_each_process_writes_its_part_and_any_number_reads_them(wiki, alone, cache_dir, tmp_path):
    """FSDP2 on two, then on one. A full disk of one process is said by all, and passed over."""
    for name in ("cache", "tied", "untied"):
        (tmp_path / name).symlink_to(alone / name)
    for processes, environment, steps in ((2, IN_PARTS, "4"), (1, IN_PARTS, "6")):
        in_launched_processes(processes, check_parts, tmp_path, STEPS=steps, **environment)
    text = (tmp_path / "output.0").read_text()
    assert "no space left while saving step 2" in text and f"continuing from {tmp_path}/parts/checkpoint-4" in text
    last = tmp_path / "parts" / "checkpoint-6"
    assert [step for step, _ in checkpoints(tmp_path / "parts")] == [4, 6] and writer_of(str(last)) == ("parts", None)
    assert not (last / "model.safetensors").exists() and [file.name for file in last.glob("*.bin")] == [
        "training_args.bin"
    ]
    assert losses(tmp_path / "parts") == pytest.approx(losses(alone / "muon, recompute"), rel=2e-5)

    # The parts put together are the model of the run's end, which is an ordinary folder.
    weights, model = weights_of(str(last)), load_file(tmp_path / "parts" / "model.safetensors")
    assert weights.keys() == model.keys() and all(torch.equal(weights[name], model[name]) for name in model)


def check_kinds(rank: int, folder: Path) -> None:
    recipe, _, _ = watched_recipe()
    flags = [*runs(folder)["muon, recompute"], "--max_steps", os.environ["STEPS"], "--save_steps", "1"]
    recipe.main(small_run(folder / "cache", folder / "kinds", *flags, "--per_device_train_batch_size", "2"))


@pytest.mark.heavy
def test_a_run_continues_exactly_after_a_change_of_how_it_saves(alone, tmp_path):
    """One file, parts, parts of divided matrices on two processes, one file again."""
    for name in ("cache", "tied", "untied"):
        (tmp_path / name).symlink_to(alone / name)
    in_parts = {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    kinds = ((1, FSDP2, "1"), (1, IN_PARTS, "2"), (2, parallel(2) | in_parts, "4"), (1, FSDP2, "6"))
    for processes, environment, steps in kinds:
        in_launched_processes(processes, check_kinds, tmp_path, STEPS=steps, **environment)
        whole = (tmp_path / "kinds" / f"checkpoint-{steps}" / "model.safetensors").exists()
        assert whole == ("SHARDED" not in environment["FSDP_STATE_DICT_TYPE"])
    assert losses(tmp_path / "kinds") == pytest.approx(losses(alone / "muon, recompute"), rel=2e-5)


COPIES = FSDP2 | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}
COPIES |= {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}


def check_copies(rank: int, folder: Path) -> None:
    """Note how many numbers the copies exchange in each micro-batch."""
    recipe, trainers, _ = watched_recipe()
    exchanged, all_reduce = [], torch.distributed.all_reduce

    def counted(tensor, *args, **kwargs):
        exchanged[-1:] = [count + tensor.numel() for count in exchanged[-1:]]
        return all_reduce(tensor, *args, **kwargs)

    class Counted(recipe.PretrainingTrainer):
        def training_step(self, *args, **kwargs):
            exchanged.append(0)
            loss = super().training_step(*args, **kwargs)
            exchanged.append(0)  # what follows is no micro-batch
            return loss

    recipe.PretrainingTrainer = Counted
    torch.distributed.all_reduce = counted
    flags = [*runs(folder)["isolated, clipped"], "--tokens_per_step", "512", "--per_device_train_batch_size", "1"]
    recipe.main(small_run(folder / "cache", folder / "copies", *flags))
    first, last = exchanged[0:24:4], exchanged[2:24:4]
    whole, _ = numbers(trainers[0].model)
    assert first == [0] * 6 and all(whole / 2 <= count < 0.6 * whole for count in last)


@pytest.mark.heavy
def test_copies_add_up_their_gradients_once_a_step(wiki, alone, cache_dir, tmp_path):
    """Steps of 8 rows on four processes: the shards of a copy are summed in both micro-batches, copies in the last."""
    for name in ("cache", "tied", "untied"):
        (tmp_path / name).symlink_to(alone / name)
    wiki.main(small_run(cache_dir, tmp_path / "one", *runs(alone)["isolated, clipped"], "--tokens_per_step", "512"))
    in_launched_processes(4, check_copies, tmp_path, **COPIES)
    assert_same_run(tmp_path / "copies", tmp_path / "one")


CONTINUED = "--max_steps 3 --context_length 64 --tokens_per_step 256 --logging_steps 1 --eval_strategy no".split()
CONTINUED += "--max_eval_rows 5 --swanlab off --disable_tqdm true --held_out_fraction 0.1".split()


def check_continued(rank: int, folder: Path) -> None:
    recipe, trainers, devices = watched_recipe("openwebtext_continue")
    recipe.main(continued(folder, folder / "run", "--per_device_train_batch_size", "1"))
    assert devices == ["cpu" if rank == 0 else "meta"]
    whole, here = numbers(trainers[0].model)
    assert here < 1.02 * whole / 2


def continued(folder: Path, output: Path, *flags: str) -> list[str]:
    data = ["--data", str(Path(__file__).parents[2] / "data" / "sample_en.jsonl"), "--model", str(folder / "weights")]
    return [*CONTINUED, *data, "--cache_dir", str(folder / "cache"), "--output_dir", str(output), *flags]


@pytest.mark.heavy
@pytest.mark.parametrize("environment", [BY_ONE, parallel(2)], ids=["FSDP2, loaded by one", "tensor"])
def test_weights_of_a_checkpoint_are_loaded_by_one_process(cache_dir, tmp_path, environment):
    """The others have no memory for them. The run is the same, and so is the fingerprint that says whose run it is."""
    (tmp_path / "cache").symlink_to(cache_dir)
    trained_weights(tmp_path / "weights", key_value_heads=2)
    load_recipe("openwebtext_continue").main(continued(tmp_path, tmp_path / "alone"))
    in_launched_processes(2, check_continued, tmp_path, **environment)
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    one, other = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "alone"))
    assert one == other


def check_dropout(rank: int, folder: Path) -> None:
    """Processes of one row draw the same numbers, though only one of them drew the weights."""
    recipe, trainers, _ = watched_recipe()
    config = SHAPE | {"model_type": "phi", "resid_pdrop": 0.2, "tie_word_embeddings": False}
    place = folder / f"dropout-{rank}"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    recipe.main(
        small_run(folder / "cache", folder / "run", "--model", str(place), "--per_device_train_batch_size", "4")
    )
    norm = trainers[0].model.model.final_layernorm.weight
    torch.save(local(norm).detach(), folder / f"norm-{rank}.pt")


@pytest.mark.heavy
def test_processes_that_share_rows_drop_the_same_numbers(cache_dir, tmp_path):
    (tmp_path / "cache").symlink_to(cache_dir)
    in_launched_processes(2, check_dropout, tmp_path, **parallel(2))
    assert torch.equal(*(torch.load(tmp_path / f"norm-{rank}.pt") for rank in range(2)))


def test_parts_are_never_written_into_an_older_save(tmp_path):
    """torch would mix the two, and load the mixture."""
    (tmp_path / "shards").mkdir()
    with pytest.raises(FileExistsError):
        write_parts({}, tmp_path, None)
    shutil.rmtree(tmp_path / "shards")
