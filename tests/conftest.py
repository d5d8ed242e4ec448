"""Tests run offline, on the CPU, and leave the checkout as it was."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
ROOT = Path(__file__).resolve().parent.parent


def load_recipe(name: str):
    """Import recipes/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def wiki():
    return load_recipe("wiki_zh_scratch")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """One cache of tokenizers and tokens for all tests."""
    return tmp_path_factory.mktemp("cache")


def small_run(cache_dir: Path, output_dir: Path, *flags: str) -> list[str]:
    """Return the flags of a run of a few seconds: 6 steps of 4 rows of 64 tokens."""
    return [
        *"--sample --max_steps 6 --context_length 64 --tokens_per_step 256 --per_device_train_batch_size 4".split(),
        *"--logging_steps 1 --eval_steps 3 --save_steps 3 --max_eval_rows 5 --swanlab off --disable_tqdm true".split(),
        *("--cache_dir", str(cache_dir), "--output_dir", str(output_dir)),
        *flags,
    ]


def losses(folder: Path) -> dict[int, float]:
    """Return the logged training loss of every step of a finished run."""
    history = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
