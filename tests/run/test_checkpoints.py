"""Checkpoints are whole or absent."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, losses, small_run
from hypothesis import given, settings
from hypothesis import strategies as st

from common.console import InputError
from common.run import checkpoints as module
from common.run.checkpoints import (
    checkpoints,
    finish_checkpoint,
    newest_whole,
    problem_of,
    prune_checkpoints,
    unfinished,
    write_checkpoint,
)


def files_of(folder, step, content=b"weights"):
    path = unfinished(folder, step)
    (path / "inner").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(content)
    (path / "inner" / "optimizer.bin").write_bytes(content * 2)


def whole(folder, step):
    files_of(folder, step)
    finish_checkpoint(folder, step, processes=2)
    return folder / f"checkpoint-{step}"


def write_manifest(path, files, step=9):
    (path / "manifest.json").write_text(json.dumps({"files": files, "step": step, "processes": 1}))


def names(folder):
    return [path.name for _, path in checkpoints(folder)]


def test_a_finished_checkpoint_is_whole_and_lists_its_files(tmp_path):
    path = whole(tmp_path, 7)
    assert problem_of(path) is None and newest_whole(tmp_path) == path
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest == {"step": 7, "processes": 2, "files": {"inner/optimizer.bin": 14, "model.safetensors": 7}}
    assert not unfinished(tmp_path, 7).exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "'model.safetensors' is missing"),
        (lambda path: os.truncate(path / "inner" / "optimizer.bin", 3), "'inner/optimizer.bin' has 3 bytes, not 14"),
        (lambda path: (path / "manifest.json").unlink(), "no manifest.json"),
        (lambda path: os.truncate(path / "manifest.json", 9), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_bytes(b"\xff"), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_text("[" * 100_000), "manifest.json is damaged"),
        (lambda path: write_manifest(path, {}), "manifest.json is damaged"),
        (lambda path: write_manifest(path, {"a": -1}), "a count is not a whole number"),
        (lambda path: write_manifest(path, {"../a": 1}), "is outside the checkpoint"),
        (lambda path: write_manifest(path, {"/a": 1}), "is outside the checkpoint"),
        (lambda path: write_manifest(path, {"a" * 5000: 1}), "cannot be examined"),
        (lambda path: write_manifest(path, {"\ud800": 1}), "is missing"),
        (lambda path: write_manifest(path, {"a": 1}, step=8), "is of step 8"),
    ],
)
def test_a_damaged_one_is_passed_over_and_said(tmp_path, capsys, damage, says):
    before, newest = whole(tmp_path, 3), whole(tmp_path, 9)
    damage(newest)
    assert newest_whole(tmp_path) == before
    said = capsys.readouterr().out
    assert f"passing over {newest}: " in said and says in said


@settings(max_examples=100)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(0, 4))
def test_pruning_never_removes_the_newest_whole_one(tmp_path_factory, are_whole, keep):
    folder = tmp_path_factory.mktemp("run")
    for step, is_whole in enumerate(are_whole):
        path = whole(folder, step)
        if not is_whole:
            (path / "manifest.json").unlink()
    wholes = [f"checkpoint-{step}" for step, is_whole in enumerate(are_whole) if is_whole]
    broken = [f"checkpoint-{step}" for step, is_whole in enumerate(are_whole) if not is_whole]
    prune_checkpoints(folder, keep)
    assert set(names(folder)) == {*broken, *(wholes[-keep:] if keep else wholes)}


def test_steps_are_numbers_not_names(tmp_path):
    for step in (9, 10, 100):
        whole(tmp_path, step)
    prune_checkpoints(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100"]


@pytest.mark.parametrize("call", range(60))
def test_a_crash_at_any_moment_leaves_the_old_or_the_new_one(tmp_path, monkeypatch, call):
    """Every call of the operating system, one after the other, is the last before the crash."""

    class Crash(BaseException):
        pass

    left = [call]

    def dying(real):
        def may_die(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Crash
            return real(*args, **kwargs)

        return may_die

    before = whole(tmp_path, 1)
    files_of(tmp_path, 2)
    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "open"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    try:
        finish_checkpoint(tmp_path, 2, processes=1)
        prune_checkpoints(tmp_path, 1)
        crashed = False
    except Crash:
        crashed = True
    monkeypatch.undo()
    new = tmp_path / "checkpoint-2"
    assert newest_whole(tmp_path) in (before, new)
    assert all(problem_of(path) is None for _, path in checkpoints(tmp_path)), "a half one has the name of a whole one"
    if not crashed:
        assert names(tmp_path) == ["checkpoint-2"]
    if call == 59:
        assert not crashed, "the range must reach beyond the last call"


def full(_=None):
    raise OSError(errno.ENOSPC, "No space left on device")


def one_process(values):
    return values


def test_a_full_disk_leaves_nothing_of_the_new_one(tmp_path, monkeypatch):
    before = whole(tmp_path, 1)

    def half():
        files_of(tmp_path, 2)
        full()

    assert "No space left" in write_checkpoint(tmp_path, 2, half, one_process, False)
    assert newest_whole(tmp_path) == before and not unfinished(tmp_path, 2).exists()
    monkeypatch.setattr(module, "finish_checkpoint", lambda *_: full())
    assert "No space left" in write_checkpoint(tmp_path, 2, lambda: files_of(tmp_path, 2), one_process, False)
    assert newest_whole(tmp_path) == before and not unfinished(tmp_path, 2).exists()


def test_a_disk_that_is_too_full_is_not_written_to(tmp_path, monkeypatch):
    whole(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 20}))
    assert "0.0 MB free" in write_checkpoint(tmp_path, 2, pytest.fail, one_process, False)


def test_another_error_than_a_full_disk_is_not_taken_for_one(tmp_path):
    def broken():
        raise ValueError("no disk")

    with pytest.raises(ValueError, match="no disk"):
        write_checkpoint(tmp_path, 2, broken, one_process, False)


def test_a_process_that_cannot_tell_the_others_ends(tmp_path):
    with pytest.raises(InputError, match="in the middle of saving"):
        write_checkpoint(tmp_path, 2, full, lambda values: values * 2, collective=True)


FILL = """
import os, pathlib, runpy, shutil, sys, threading, time
moment, other, left = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def fill():
    while not moment.exists(): time.sleep(0.0002)
    file = os.open(other, os.O_CREAT | os.O_WRONLY)
    try:
        while (free := shutil.disk_usage(other).free - left) > 0: os.write(file, bytes(min(free, 1 << 20)))
    except OSError: pass  # the save and this one have filled it together
    os.close(file)
threading.Thread(target=fill, daemon=True).start()
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("on_save_error", "moment", "left", "swanlab"),
    [
        ("stop", "unfinished/checkpoint-4", 0, "off"),
        ("stop", "checkpoint-2", 0, "off"),
        ("continue", "checkpoint-2", 30_000_000, "offline"),  # room for the model and small files, not for a checkpoint
        ("continue", "checkpoint-2", 0, "off"),
        ("continue", "checkpoint-2", 0, "offline"),
    ],
)
def test_a_small_disk(cache_dir, tmp_path, on_save_error, moment, left, swanlab):
    """A tmpfs for two checkpoints of 51 MB and the model; somebody fills it in the middle of a save, or before one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=130m", "tmpfs", disk], capture_output=True, text=True)
    assert mounted.returncode == 0, f"this test mounts a tmpfs, as root: {mounted.stderr}"
    try:
        flags = small_run(cache_dir, disk / "run", "--save_steps", "2", "--eval_strategy", "no")
        flags += ["--save_total_limit", "1", "--on_save_error", on_save_error, "--swanlab", swanlab]
        recipe = [str(ROOT / "recipes" / "wiki_zh_scratch.py"), *flags]
        filling = [sys.executable, "-c", FILL, str(disk / "run" / moment), str(disk / "other"), str(left)]
        done = subprocess.run([*filling, *recipe], capture_output=True, text=True, cwd=ROOT)
        assert "no space left while saving step 4" in done.stdout + done.stderr, done.stdout + done.stderr
        assert names(disk / "run") == ["checkpoint-2"] and problem_of(disk / "run" / "checkpoint-2") is None
        assert not unfinished(disk / "run", 4).exists()
        (disk / "other").unlink()
        if on_save_error == "continue":  # all steps were made, and only the end may find no room
            assert "step 6/6" in done.stdout and done.stdout.count("no space left while saving step") == 2
            assert ("note: SwanLab failed (" in done.stdout) == (left == 0 and swanlab == "offline")
        if left > 0:
            assert done.returncode == 0 and [*losses(disk / "run")] == [1, 2, 3, 4, 5, 6]
            return
        assert not (disk / "run" / "model.safetensors").exists() and not (disk / "run" / "all_results.json").exists()
        assert done.returncode == 1 and "no space left" in done.stderr, done.stderr
        if swanlab == "off":  # SwanLab's threads show tracebacks of their own
            assert "Traceback" not in done.stderr, done.stderr
        again = subprocess.run([sys.executable, *recipe], capture_output=True, text=True, cwd=ROOT)
        assert again.returncode == 0, again.stdout + again.stderr
        assert [*losses(disk / "run")] == [1, 2, 3, 4, 5, 6]
        assert names(disk / "run") == ["checkpoint-6"] and problem_of(disk / "run" / "checkpoint-6") is None
    finally:
        subprocess.run(["umount", disk], check=True)
