"""Signals reach the recipe; all processes stop at one step, with a checkpoint, and the same command goes on there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, losses
from tiny import ENVIRONMENT, recorded, start, tiny_run, wait_for

from common.run.checkpoints import newest_whole, problem_of
from common.run.lock import read_status
from common.train.interruption import Interruption

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has other signals")
LONG = ["--max_steps", "3000", "--logging_steps", "100", "--save_steps", "1000", "--eval_strategy", "no"]


def check_interrupted(folder: Path, reason: str) -> int:
    """Check that the run in ``folder`` stopped with a whole checkpoint of its last step; return that step."""
    status = read_status(folder)
    assert (status["state"], status["reason"]) == ("interrupted", reason)
    path = newest_whole(folder)
    assert path.name == f"checkpoint-{status['step']}"
    assert json.loads((path / "trainer_state.json").read_text())["global_step"] == status["step"] < 3000
    return status["step"]


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 128 + signal.SIGUSR1)])
def test_a_signal_ends_the_run_with_a_checkpoint(cache_dir, tmp_path, name, code):
    child = start(tiny_run(cache_dir, tmp_path / "run", *LONG), tmp_path)
    assert wait_for(tmp_path, "step", child, 5), (tmp_path / "log").read_text()[-2000:]
    os.kill(child.pid, getattr(signal, name))
    child.join(60)
    assert child.exitcode == code, (tmp_path / "log").read_text()[-2000:]
    step = check_interrupted(tmp_path / "run", name)
    assert max(recorded(tmp_path / "record")) == step
    log = (tmp_path / "log").read_text()
    shown = "Ctrl-C" if name == "SIGINT" else name
    assert f"{shown}: saving step {step} and ending" in log
    assert log.endswith(f"{shown}: step {step} is saved; the same command continues\n") and "Traceback" not in log


@pytest.mark.heavy
def test_interrupted_and_continued_is_the_run_left_alone(cache_dir, tmp_path):
    """To the bit, and the state goes running, interrupted, running, finished."""
    flags = ["--max_steps", "60", "--eval_strategy", "no", "--save_steps", "50"]
    for name in ("alone", "stopped"):
        (tmp_path / name).mkdir()
    child = start(tiny_run(cache_dir, tmp_path / "alone" / "run", *flags), tmp_path / "alone")
    child.join()
    assert child.exitcode == 0
    argv = tiny_run(cache_dir, tmp_path / "stopped" / "run", *flags)
    child = start(argv, tmp_path / "stopped")
    assert wait_for(tmp_path / "stopped", "step", child, 10)
    assert read_status(tmp_path / "stopped" / "run")["state"] == "running"
    os.kill(child.pid, signal.SIGTERM)
    child.join()
    step = check_interrupted(tmp_path / "stopped" / "run", "SIGTERM")
    child = start(argv, tmp_path / "stopped")
    child.join()
    assert read_status(tmp_path / "stopped" / "run")["state"] == "finished"
    assert losses(tmp_path / "stopped" / "run") == losses(tmp_path / "alone" / "run") and step < 60
    launches = (tmp_path / "stopped" / "run" / "launches.jsonl").read_text().splitlines()
    assert len(launches) == 2 and {"commit", "versions", "arguments", "launcher"} <= json.loads(launches[0]).keys()


@pytest.mark.heavy
def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(cache_dir, tmp_path):
    """A checkpoint of that step, from which the run goes on to the bit."""
    flags = "--max_steps 40 --logging_steps 7 --save_steps 1000 --held_out_fraction 0.5 --max_eval_rows 100000".split()
    flags += ["--per_device_eval_batch_size", "1"]
    logs = {}
    for name in ("alone", "stopped", "continued"):
        folder = tmp_path / name.replace("continued", "stopped")
        folder.mkdir(exist_ok=True)
        child = start(tiny_run(cache_dir, folder / "run", *flags), folder)
        if name == "stopped":
            assert wait_for(folder, "evaluate", child)
            os.kill(child.pid, signal.SIGTERM)
        child.join()
        logs[name] = (folder / "log").read_text()
        assert child.exitcode == (143 if name == "stopped" else 0), logs[name][-2000:]
        if name == "stopped":
            assert check_interrupted(folder / "run", "SIGTERM") == 25
    assert "held out   step 25" in logs["alone"] and "held out   step 25" not in logs["stopped"]
    assert losses(tmp_path / "stopped" / "run") == losses(tmp_path / "alone" / "run")


def test_a_signal_to_all_does_not_kill_the_loaders_first(cache_dir, tmp_path):
    """As a terminal sends Ctrl-C, and Slurm SIGTERM: to every process of the group."""
    flags = tiny_run(cache_dir, tmp_path / "run", *LONG, "--dataloader_num_workers", "2")
    command = [sys.executable, str(ROOT / "tests" / "tiny.py"), str(tmp_path / "record"), *flags]
    for name, code in (("SIGTERM", 143), ("SIGINT", 130)):
        process = subprocess.Popen(
            command,
            env=ENVIRONMENT,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        steps = max(recorded(tmp_path / "record"), default=0) if Path(f"{tmp_path / 'record'}.0").exists() else 0
        while not Path(f"{tmp_path / 'record'}.0").exists() or max(recorded(tmp_path / "record")) < steps + 5:
            assert process.poll() is None, process.stdout.read()[-2000:]
            time.sleep(0.02)
        os.killpg(process.pid, getattr(signal, name))
        output, _ = process.communicate(timeout=60)
        assert process.returncode == code, output[-2000:]
        assert "exited unexpectedly" not in output
        check_interrupted(tmp_path / "run", name)


def launched(config: str, record: Path, flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    command += [str(ROOT / "accelerate_configs" / config), "--mixed_precision", "no"]
    if config == "ddp.yaml":
        command += ["--dynamo_backend", "no", "--num_processes", "2"]
    command += [str(ROOT / "tests" / "tiny.py"), str(record), *flags]
    log = open(f"{record}.log", "ab")  # noqa: SIM115  (closed with the process)
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    while not Path(f"{record}.0").exists() or len(Path(f"{record}.0").read_text().splitlines()) < 5:
        assert process.poll() is None, Path(f"{record}.log").read_text()[-3000:]
        time.sleep(0.02)
    return process


def wait_until_interrupted(folder: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while read_status(folder)["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_orphan_saves_and_stops(cache_dir, tmp_path):
    process = launched("cpu.yaml", tmp_path / "record", tiny_run(cache_dir, tmp_path / "run", *LONG))
    process.send_signal(signal.SIGTERM)  # accelerate's launcher of one process dies of it, and tells nobody
    process.wait(30)
    wait_until_interrupted(tmp_path / "run")
    check_interrupted(tmp_path / "run", "its launcher died")


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.heavy)])
def test_two_processes_agree_on_the_step(cache_dir, tmp_path, name):
    flags = tiny_run(cache_dir, tmp_path / "run", *LONG, "--per_device_train_batch_size", "2")
    process = launched("ddp.yaml", tmp_path / "record", flags)
    process.send_signal(getattr(signal, name))
    assert process.wait(90) != 0  # the launcher has a status of its own
    step = check_interrupted(tmp_path / "run", name)
    assert max(recorded(tmp_path / "record", 0)) == max(recorded(tmp_path / "record", 1)) == step
    path = newest_whole(tmp_path / "run")
    assert problem_of(path) is None and {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in path.iterdir()}


def test_a_second_signal_ends_it_at_once_and_an_echo_does_not():
    """In a process that never comes to the end of its step."""
    code = (
        "import time\nfrom common.train.interruption import Interruption\n"
        "Interruption().listen(); print('listening', flush=True)\n"
        "end = time.monotonic() + 60\nwhile time.monotonic() < end: time.sleep(0.01)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "listening\n"
    for _ in range(3):  # a terminal and two launchers pass the same Ctrl-C on
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    time.sleep(2.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 143


def test_it_saves_when_it_is_time(wiki, cache_dir, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    flags = ["--save_minutes", "0.000001", "--save_strategy", "no", "--eval_strategy", "no", "--save_total_limit", "10"]
    wiki.main(tiny_run(cache_dir, tmp_path, *flags, "--max_steps", "3"))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (1, 2, 3)]
    assert signal.getsignal(signal.SIGTERM) is before  # given back at the end


def test_what_any_process_wants_all_agree_on():
    one, other = Interruption(), Interruption(save_minutes=1000)
    assert one.wishes() == other.wishes() == [0.0] * 6
    other.received = "SIGINT"
    sums = [sum(pair) for pair in zip(one.wishes(), other.wishes(), strict=True)]
    one.agree(sums)
    assert (one.agreed, one.exit_status, one.save_due) == ("SIGINT", 130, False)
    one.agree([0.0, 0.0, 0.0, 2.0, 1.0, 0.0])
    assert (one.agreed, one.exit_status, one.save_due) == ("its launcher died", 143, True)
    assert not one.save_failed and other.wishes(save_failed=True)[-1] == 1.0
    one.agree([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    assert one.save_failed and one.agreed is None
