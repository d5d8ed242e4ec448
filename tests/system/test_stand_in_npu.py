"""A run on a device that is neither a CPU nor CUDA: a stand-in for an Ascend card, with the CPU's kernels.

transformers, accelerate and the recipes go the ways that they go for torch_npu. The numbers are those of the CPU, so a
run on it must be the run on the CPU. What real cards do is not tested: docs/platforms.md.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, losses, small_run

pytestmark = pytest.mark.heavy
STAND_IN = Path(__file__).parent / "stand_in_npu"
CONSTANT = "--lr_scheduler_type constant --lr_scheduler_kwargs {} --warmup_steps 0".split()
# Several runs in one process: each a recipe, the dropout of its attention, and its flags.
PROGRAM = """
import json, sys
from conftest import load_recipe
for name, dropout, flags in json.load(sys.stdin):
    recipe = load_recipe(name)
    recipe.SAMPLE_MODEL["attention_dropout"] = dropout
    recipe.main(flags)
"""


def output_of(command: list[str], given: str = "", **environment: str) -> str:
    paths = [str(STAND_IN), str(ROOT), str(ROOT / "tests")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment
    done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> str:
    """The folder with the compiled device."""
    if shutil.which("g++") is None or shutil.which("ninja") is None:
        pytest.fail("the stand-in is compiled: it needs g++ and ninja")
    folder = str(tmp_path_factory.mktemp("build"))
    output_of([sys.executable, "-c", "import torch_npu"], STAND_IN_FOLDER=folder)
    return folder


@pytest.fixture(scope="module")
def runs(build, wiki, cache_dir, tmp_path_factory) -> tuple[Path, str]:
    """The folder of several runs, and what those on the stand-in printed."""
    folder = tmp_path_factory.mktemp("runs")
    wiki.main(small_run(cache_dir, folder / "cpu"))
    on_npu = [("wiki_zh_scratch", 0.0, small_run(cache_dir, folder / "npu"))]
    for recipe in ("wiki_zh_scratch", "explicit_loop"):
        on_npu.append((recipe, 0.1, small_run(cache_dir, folder / recipe / "whole", *CONSTANT)))
        longer = ["--allow_changes", "data.rows"] if recipe == "explicit_loop" else []
        for steps in (["3"], ["6", *longer]):
            halves = small_run(cache_dir, folder / recipe / "halves", *CONSTANT, "--max_steps", *steps)
            on_npu.append((recipe, 0.1, halves))
    return folder, output_of([sys.executable, "-c", PROGRAM], json.dumps(on_npu), STAND_IN_FOLDER=build)


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def test_the_run_is_that_of_the_cpu(runs):
    folder, printed = runs
    assert "fp32 on Ascend910B2" in printed
    assert losses(folder / "npu") == pytest.approx(losses(folder / "cpu"), rel=1e-6)
    assert len(losses(folder / "npu")) == 6
    npu, cpu = (
        [entry["eval_loss"] for entry in history(folder / name) if "eval_loss" in entry] for name in ("npu", "cpu")
    )
    assert npu == pytest.approx(cpu, rel=1e-6) and npu


def test_memory_and_name_are_the_devices(runs):
    folder, _ = runs
    [entry, *_] = [entry for entry in history(folder / "npu") if "loss" in entry]
    parameters = json.loads((folder / "npu" / "all_results.json").read_text())["parameters"]["total"]
    weights_and_states = 3 * 4 * parameters / 2**30
    assert weights_and_states <= entry["memory_allocated_gib"] <= entry["memory_peak_gib"] < 1
    launch = json.loads((folder / "npu" / "launches.jsonl").read_text().splitlines()[0])
    assert launch["device"] == "Ascend910B2"


@pytest.mark.parametrize("recipe", ["wiki_zh_scratch", "explicit_loop"])
def test_a_continued_run_goes_on_with_the_devices_random_numbers(runs, recipe):
    """With dropout, drawn from the device's own state, of which the CPU knows nothing."""
    whole, halves = runs[0] / recipe / "whole", runs[0] / recipe / "halves"
    if recipe == "explicit_loop":
        assert (halves / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    else:
        assert losses(halves) == losses(whole) != losses(runs[0] / "npu")
    assert (whole / "model.safetensors").read_bytes() == (halves / "model.safetensors").read_bytes()


def test_a_yaml_as_it_is_trains_in_bf16_with_its_mfu(runs, build, cache_dir, tmp_path):
    flags = small_run(cache_dir, tmp_path, "--optimizer", "muon")
    printed = output_of(
        [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--dynamo_backend", "no"),
            *("--config_file", "accelerate_configs/single_gpu.yaml", "recipes/wiki_zh_scratch.py", *flags),
        ],
        STAND_IN_FOLDER=build,
    )
    assert "bf16 on Ascend910B2" in printed
    entries = [entry for entry in history(tmp_path) if "loss" in entry]
    assert len(entries) == 6
    for entry in entries:
        assert entry["mfu"] == pytest.approx(entry["tflops_per_device"] / 353.9)
    in_fp32 = losses(runs[0] / "npu")[1]
    assert losses(tmp_path)[1] == pytest.approx(in_fp32, rel=0.01) and losses(tmp_path)[1] != in_fp32
