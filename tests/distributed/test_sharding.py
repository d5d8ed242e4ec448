"""A model that processes share: what each of them holds, and that the run is the one of a single process."""

import json
from pathlib import Path

import pytest
import torch
from conftest import load_recipe, losses, small_run
from launched_processes import FSDP2, in_launched_processes
from torch.distributed.tensor import DTensor


def watched_recipe(name: str = "wiki_zh_scratch"):
    """Return the recipe, and a list that gets its Trainer."""
    recipe, trainers = load_recipe(name), []

    class Watched(recipe.PretrainingTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    recipe.PretrainingTrainer = Watched
    return recipe, trainers


def numbers(model) -> tuple[int, int]:
    """Return how many numbers the parameters of ``model`` have, and how many of them this process holds."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    return whole, sum(local(parameter).numel() for parameter in model.parameters())


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_fsdp2(rank: int, folder: Path) -> None:
    recipe, trainers = watched_recipe()
    recipe.main(small_run(folder / "cache", folder / "run", "--per_device_train_batch_size", "2"))
    [trainer] = trainers
    assert str(trainer.accelerator.distributed_type) == "DistributedType.FSDP"
    whole, here = numbers(trainer.model)
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()) and here == whole / 2
    states = [state for states in trainer.optimizer.state.values() for name, state in states.items() if name != "step"]
    assert sum(local(state).numel() for state in states) == 2 * here


def test_fsdp2_really_shards_on_cpus(wiki, cache_dir, tmp_path):
    """accelerate would train under DDP instead, without a word, or train alone in each process."""
    (tmp_path / "cache").symlink_to(cache_dir)
    wiki.main(small_run(cache_dir, tmp_path / "alone"))
    in_launched_processes(2, check_fsdp2, tmp_path, **FSDP2)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=2e-5)
    assert results(tmp_path / "run")["eval_loss"] == pytest.approx(results(tmp_path / "alone")["eval_loss"], rel=2e-5)


def results(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
