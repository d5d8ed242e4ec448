"""One folder, one run at a time; and what it says of itself."""

import json
import os
import signal
import subprocess
import sys
import time
from threading import Timer
from types import SimpleNamespace

import pytest
from conftest import ROOT
from transformers import TrainingArguments

from common.arguments import SharedArguments
from common.console import InputError
from common.io import append_lines, read_lines, write_json
from common.run import folder as run_status
from common.run.folder import Run
from common.run.lock import lock_folder, read_status, write_status
from common.run.record import command_line, describe_launch, record_launch

OWNER = (
    "import sys, time\nfrom common.run.lock import lock_folder, write_status\n"
    "lock = lock_folder(sys.argv[1]); write_status(sys.argv[1], 'running', 7, 9)\n"
    "print('locked', flush=True)\ntime.sleep(60)\n"
)


@pytest.fixture
def owner(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_two_runs_in_a_folder_are_refused_with_the_owners_name(owner, tmp_path):
    began = time.monotonic()
    with pytest.raises(InputError, match=f"process {owner.pid} on .*, at step 7"):
        lock_folder(tmp_path, seconds=0.5)
    assert time.monotonic() - began < 5


def test_the_lock_dies_with_its_owner(owner, tmp_path):
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert lock_folder(tmp_path, seconds=0).is_locked
    assert read_status(tmp_path)["state"] == "running"  # it could not say more


def test_it_waits_for_an_owner_that_is_ending(owner, tmp_path, capsys):
    Timer(0.5, owner.kill).start()
    assert lock_folder(tmp_path, seconds=30).is_locked
    assert "is in use; waiting up to 30 s" in capsys.readouterr().out


def test_a_notebook_may_call_it_again(tmp_path):
    """While the first run's lock is still held, as after a cell that was stopped."""
    first = lock_folder(tmp_path)
    assert lock_folder(tmp_path, seconds=0) is first
    runs = [Run(str(tmp_path)), Run(str(tmp_path))]
    for run in runs:
        run.claim({"recipe": "a"})
        assert run.claimed


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def acquire(self, **_):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(run_status.FileLock, "acquire", acquire)
    lock_folder(tmp_path / "other")
    assert "cannot be locked here (no flock here)" in capsys.readouterr().out


def test_only_the_main_process_locks_and_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert lock_folder(tmp_path) is None
    write_status(tmp_path, "running", 1, 2)
    assert not [*tmp_path.iterdir()]


def test_the_status_says_state_step_and_owner(tmp_path):
    assert read_status(tmp_path) is None
    write_status(tmp_path, "interrupted", 3, 9, "SIGTERM")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["pid"] == os.getpid() and status["host"] and status["time"]
    assert (status["state"], status["step"], status["max_steps"], status["reason"]) == ("interrupted", 3, 9, "SIGTERM")
    (tmp_path / "status.json").write_text('{"state": ')
    assert read_status(tmp_path) is None


def test_what_is_left_half_written_is_removed_by_the_owner_only(owner, tmp_path, capsys):
    (tmp_path / "unfinished" / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(InputError), pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.run.folder.lock_folder", lambda folder: lock_folder(folder, 0.1))
        Run(str(tmp_path)).claim({"recipe": "a"})
    assert (tmp_path / "unfinished" / "checkpoint-5").exists()
    owner.kill()
    owner.wait()
    (tmp_path / "run.json").write_text('{"recipe": "a"}')  # a run's folder, as it is since its first moment
    Run(str(tmp_path)).claim({"recipe": "a"})
    assert not (tmp_path / "unfinished").exists() and "half-written when the run ended" in capsys.readouterr().out


def test_json_is_the_old_or_the_new(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"a": 1})
    monkeypatch.setattr(json, "dumps", lambda *_, **__: "cut off" + 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": 2})
    assert (tmp_path / "a.json").read_text() == '{\n "a": 1\n}\n'


def test_lines_are_added_wholly_or_not_at_all(tmp_path):
    resource = pytest.importorskip("resource")  # a limit on the size of files stands in for the full disk
    path, limits = tmp_path / "a.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    append_lines(path, [{"a": 1}, {"b": "地球\ud800"}])
    before = path.read_bytes()
    assert [json.loads(line) for line in before.splitlines()] == [{"a": 1}, {"b": "地球\ud800"}]
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_lines(path, [{"c": 1}, {"d": "x" * 100}])
        assert path.read_bytes() == before
        with pytest.raises(OSError, match="File too large"):
            write_json(tmp_path / "b.json", {"b": "x" * 1000})
        assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    path.write_bytes(before + b'{"half')
    append_lines(path, [{"e": 2}])
    assert path.read_bytes() == before + b'{"half\n{"e": 2}\n'


def test_lines_are_read_back_whatever_line_breaks_their_texts_have(tmp_path, capsys):
    entries = [{"text": text} for text in ("a\u2028b", "a\u2029b", "a\x85b", "a\r\nb\rc\x0b\x0c\x1c\x1d\x1e")]
    append_lines(tmp_path / "samples.jsonl", entries)
    assert read_lines(tmp_path / "samples.jsonl") == entries
    record_launch(tmp_path, {"command": "x.py --prompts 'a\u2028b'", "processes": 1})
    record_launch(tmp_path, {"command": "x.py", "processes": 2})
    assert capsys.readouterr().out == "note: processes was 1 at the last launch, and is 2 now\n"


def test_every_launch_is_recorded_and_what_changed_is_said(tmp_path, capsys):
    launch = {
        "time": "1",
        "commit": "a",
        "versions": {"torch": "2.11"},
        "arguments": {"training": {"logging_steps": 1}},  # of before the recipe's own flags were recorded
    }
    record_launch(tmp_path, launch)
    assert capsys.readouterr().out == ""
    with open(tmp_path / "launches.jsonl", "a") as file:
        file.write('{"time": "cut o')
    arguments = {"training": {"logging_steps": 1}, "recipe": {"z_loss": 0.1}}
    later = launch | {"time": "2", "commit": "b", "versions": {"torch": "2.13"}, "arguments": arguments}
    record_launch(tmp_path, later)
    said = capsys.readouterr().out
    assert said == "note: versions.torch was '2.11' at the last launch, and is '2.13' now\n"
    record_launch(tmp_path, later | {"arguments": arguments | {"recipe": {"z_loss": 0.2}}})
    assert capsys.readouterr().out == "note: arguments.recipe.z_loss was 0.1 at the last launch, and is 0.2 now\n"


def test_no_secret_reaches_the_record(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_API_KEY", "hunter2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    training = TrainingArguments(output_dir=str(tmp_path), hub_token="hunter2", use_cpu=True, report_to="none")
    shared = SharedArguments()
    shared.own = {"api_key": "hunter2", "z_loss": 0.1}  # flags of a copied recipe
    launch = json.dumps(describe_launch(shared, training))
    assert "hunter2" not in launch
    found = json.loads(launch)
    assert found["arguments"]["recipe"] == {"z_loss": 0.1}
    assert found["launcher"]["ACCELERATE_MIXED_PRECISION"] == "no" and found["versions"]["torch"]
    assert found["arguments"]["training"]["learning_rate"] == training.learning_rate


@pytest.mark.parametrize("launcher", [None, "/x/bin/python /x/bin/accelerate launch --aws_secret_access_key hunter2"])
def test_no_secret_is_in_the_command(monkeypatch, launcher):
    flags = "--hub_token hunter2 --hub-token=hunter2 --my_password hunter2 --api_key --end_token <end> --tokenizer t"
    parent = launcher.split() + ["x.py", *flags.split()] if launcher else ["bash"]
    monkeypatch.setattr("common.run.record.psutil.Process.parent", lambda self: SimpleNamespace(cmdline=lambda: parent))
    monkeypatch.setattr("sys.argv", ["x.py", *flags.split()])
    command = command_line()
    started = "accelerate launch --aws_secret_access_key HIDDEN" if launcher else "python"
    assert command == (
        f"{started} x.py --hub_token HIDDEN --hub-token=HIDDEN --my_password HIDDEN --api_key --end_token '<end>' "
        "--tokenizer t"
    )
