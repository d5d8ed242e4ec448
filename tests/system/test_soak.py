"""Killed again and again, at arbitrary moments, a run is the run that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, losses
from safetensors.torch import load_file
from tiny import ENVIRONMENT, recorded, start, tiny_run, wait_for

from common.dataset.mixture import TrainingOrder
from common.run.lock import read_status

STEPS = "--max_steps 150".split()
KILLS = int(os.environ.get("SOAK_KILLS", "60"))
MOMENTS = ["step", "save", "evaluate", "end"]


def finish(argv: list[str], folder: Path) -> None:
    """Run to the end, in a process of its own as the killed ones do."""
    child = start(argv, folder)
    child.join()
    assert child.exitcode == 0, (folder / "log").read_text()[-3000:]


@pytest.fixture(scope="module")
def alone(cache_dir, tmp_path_factory):
    """A run left alone; it makes the cache, too."""
    folder = tmp_path_factory.mktemp("alone")
    finish(tiny_run(cache_dir, folder / "run", *STEPS), folder)
    return folder


def kill_once(argv: list[str], folder: Path, drawn: random.Random) -> str | None:
    """Start the run, kill it at a moment drawn; return which, or None if it had ended by itself."""
    (folder / "moments").unlink(missing_ok=True)
    child = start(argv, folder)
    [moment] = drawn.choices([*MOMENTS, "start"], [6, 5, 4, 1, 1])
    if moment == "start":
        time.sleep(drawn.uniform(0, 1))
    else:
        wait_for(folder, moment, child, drawn.randint(1, 12) if moment == "step" else 1)
    time.sleep(drawn.expovariate(1 / 0.01))  # some 10 ms into it; saving takes about as long
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), (folder / "log").read_text()[-3000:]
    return moment if child.exitcode else None


@pytest.mark.heavy
@pytest.mark.timeout(3000)
def test_a_run_killed_again_and_again_is_the_run_left_alone(alone, cache_dir, tmp_path):
    """Bitwise: losses, batches, learning rates, random state, gradient norms and weights of every step."""
    drawn, argv, kills = random.Random(7), tiny_run(cache_dir, tmp_path / "run", *STEPS), Counter()
    for attempt in count():
        if sum(kills.values()) == KILLS:
            break
        assert attempt < 5 * KILLS, kills
        moment = kill_once(argv, tmp_path, drawn)
        if moment is None:  # it reached its end: a run of its own from now on
            compare(alone, tmp_path)
            (tmp_path / "run").rename(tmp_path / f"run-{attempt}")
            (tmp_path / "record.0").rename(tmp_path / f"record-{attempt}.0")
        else:
            kills[moment] += 1
    finish(argv, tmp_path)
    compare(alone, tmp_path)
    log = (tmp_path / "log").read_text()
    found = {
        "kills": dict(kills),
        "in the middle of a save": log.count("removing ") - log.count("all_results.json: half-written"),
        "results half-written": log.count("all_results.json: half-written"),
        "runs finished": log.count("model, results and loss_curve.png"),
        "steps made again": log.count("continuing from"),
    }
    print("soak:", json.dumps(found))
    if report := os.environ.get("SOAK_REPORT"):
        Path(report).write_text(json.dumps(found))
    assert found["in the middle of a save"] > 0, "no kill hit a save: aim better"


def compare(alone: Path, killed: Path) -> None:
    """Check every step of ``killed``, as often as it was made, and what is left at the end, against ``alone``."""
    expected, found = recorded(alone / "record"), recorded(killed / "record")
    assert [*expected] == [*range(1, 151)] and {*found} == {*expected}
    for step, entries in found.items():
        for entry in entries:
            assert entry == expected[step][0], step
    assert losses(killed / "run") == losses(alone / "run")
    for name in ("model.safetensors", "checkpoint-150/model.safetensors"):
        one, other = load_file(alone / "run" / name), load_file(killed / "run" / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    moving = {"train_seconds", "effective_tokens_per_second", "first_step_seconds"}
    one, other = (json.loads((folder / "run" / "all_results.json").read_text()) for folder in (alone, killed))
    moving |= {key for key in one if "runtime" in key or "per_second" in key or "preparation" in key}
    assert {key: one[key] for key in one if key not in moving} == {key: other[key] for key in one if key not in moving}
    assert read_status(killed / "run")["state"] == "finished"


def launch(processes: int, config: str, record: Path, flags: list[str]) -> subprocess.Popen:
    """Launch the recorded run; ``processes`` CPU processes."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    command += [str(ROOT / "accelerate_configs" / config), "--mixed_precision", "no"]
    if processes > 1 or config == "zero2.yaml":
        command += ["--dynamo_backend", "no", "--num_processes", str(processes)]
    command += [str(ROOT / "tests" / "tiny.py"), str(record), *flags]
    with open(f"{record}.log", "ab") as log:
        return subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def train_to_the_end(processes, config, record, flags):
    assert launch(processes, config, record, flags).wait(timeout=600) == 0, Path(f"{record}.log").read_text()[-3000:]


def killed_at(processes, config, record, flags, step):
    """Launch, and kill all processes of the launch as soon as rank 0 has made ``step``."""
    process = launch(processes, config, record, flags)
    deadline = time.time() + 300
    while not Path(f"{record}.0").exists() or max(recorded(record), default=0) < step:
        assert process.poll() is None and time.time() < deadline, Path(f"{record}.log").read_text()[-3000:]
        time.sleep(0.01)
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        member.kill()  # torchrun's processes are sessions of their own
    process.wait()


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("config", ["ddp.yaml", "zero2.yaml", "cpu_fsdp2.yaml"])
def test_two_processes_killed_three_times(wiki, cache_dir, tmp_path, config):
    flags = ["--max_steps", "40", "--per_device_train_batch_size", "2"]
    train_to_the_end(2, config, tmp_path / "alone", tiny_run(cache_dir, tmp_path / "one", *flags))
    killed = tiny_run(cache_dir, tmp_path / "two", *flags)
    for step in (7, 19, 33):
        killed_at(2, config, tmp_path / "killed", killed, step)
    train_to_the_end(2, config, tmp_path / "killed", killed)
    for process in (0, 1):
        expected, found = recorded(tmp_path / "alone", process), recorded(tmp_path / "killed", process)
        assert {*found} == {*expected} == {*range(1, 41)}
        for step, entries in found.items():
            for entry in entries:
                assert entry["batches"] == expected[step][0]["batches"] and entry["rate"] == expected[step][0]["rate"]
                assert entry["random"] == expected[step][0]["random"]
                assert entry["loss"] == pytest.approx(expected[step][0]["loss"], rel=1e-6), step
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weights in one.items():
        torch.testing.assert_close(other[name], weights, rtol=1e-5, atol=1e-7)
    bitwise = all(torch.equal(one[name], other[name]) for name in one)
    print(f"soak, 2 processes, {config}: 3 kills, final weights equal to the bit: {bitwise}")


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_another_number_of_processes_repeats_and_skips_no_row(wiki, cache_dir, tmp_path):
    """1, then 2, then 1 process, each killed in the middle: every step has its rows of the order, once."""
    flags = tiny_run(cache_dir, tmp_path / "run", "--max_steps", "40", "--per_device_train_batch_size", "2")
    record = tmp_path / "record"
    killed_at(1, "cpu.yaml", record, flags, 12)
    killed_at(2, "ddp.yaml", record, flags, 26)
    train_to_the_end(1, "cpu.yaml", record, flags)
    whole = tiny_run(cache_dir, tmp_path / "alone", "--max_steps", "40", "--per_device_train_batch_size", "2")
    train_to_the_end(1, "cpu.yaml", tmp_path / "one", whole)
    # A micro-batch is two rows, so a step has two: on one process one after the other, on two side by side.
    expected = {step: entries[0]["batches"] for step, entries in recorded(tmp_path / "one").items()}
    found = recorded(record)
    others = recorded(record, 1)
    assert {*found} == {*expected} and len(others) >= 10
    for step, entries in found.items():
        for entry in entries:
            batches = entry["batches"] + (others[step][0]["batches"] if len(entry["batches"]) == 1 else [])
            assert batches == expected[step], step
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["ledger"]["tokens_trained"] == 40 * 256


def test_finding_the_place_takes_less_than_a_second():
    """The last of 10 million rows, and a place in the third pass over them; no data is read, none is there."""
    for place in (9_999_000, 25_000_000):
        seconds = []
        for _ in range(3):  # a busy machine is not a failure
            order = TrainingOrder([10_000_000], 42)
            order.first_position = place
            order.rows_in_run = order.positions_in_run = place + 1000
            began = time.process_time()
            first = next(iter(order))
            seconds.append(time.process_time() - began)
        print(f"place {place:,}: {min(seconds):.2f} s")
        assert min(seconds) < 1
        expected = np.random.default_rng([42, place // 10_000_000]).permutation(10_000_000)[place % 10_000_000]
        assert first == expected
