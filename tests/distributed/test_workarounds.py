"""A lock that a killed compilation left does not hang the next launch; one that is held is left alone."""

import os
import re
import time

import accelerate.utils.other as other
import pytest
from accelerate.utils import is_deepspeed_available

import common.distributed.workarounds as dead_locks
from common.distributed.strategy import SINGLE, ZERO2
from common.distributed.workarounds import leave_deepspeed_out, remove_dead_locks


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    path = tmp_path / "operation" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def made_ago(lock, seconds):
    for path in (lock, lock.parent):
        before = path.stat().st_mtime - seconds
        os.utime(path, (before, before))


def test_the_lock_of_a_killed_compilation_is_removed(lock, capsys):
    made_ago(lock, 1000)
    remove_dead_locks()
    assert not lock.exists()
    assert f"removed {lock}" in capsys.readouterr().out


def test_one_that_is_held_is_left(lock, capsys):
    made_ago(lock, 1000)
    with open(lock, "rb"):
        remove_dead_locks()
    assert lock.exists() and not capsys.readouterr().out


def test_one_that_is_held_is_left_behind_a_link_too(lock, monkeypatch, tmp_path_factory, capsys):
    link = tmp_path_factory.mktemp("link") / "extensions"
    link.symlink_to(lock.parent.parent)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(link))
    test_one_that_is_held_is_left(lock, capsys)


def test_a_young_one_may_be_of_another_machine(lock, monkeypatch, capsys):
    monkeypatch.setattr(dead_locks, "FOREIGN_SECONDS", 1.5)
    remove_dead_locks()
    assert not lock.exists()
    assert "waiting up to" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value"), [("LOCAL_RANK", "1"), ("ACCELERATE_USE_DEEPSPEED", "false")])
def test_other_processes_and_strategies_leave_it_alone(lock, monkeypatch, name, value):
    made_ago(lock, 1000)
    monkeypatch.setenv(name, value)
    remove_dead_locks()
    assert lock.exists()


def test_one_that_is_dated_tomorrow_is_not_waited_for_until_then(lock, monkeypatch, capsys):
    monkeypatch.setattr(dead_locks, "FOREIGN_SECONDS", 1.5)
    made_ago(lock, -86_400)
    began = time.monotonic()
    remove_dead_locks()
    assert not lock.exists() and time.monotonic() - began < 10
    assert re.search("waiting up to [12] s", capsys.readouterr().out)


def test_accelerate_imports_deepspeed_in_deepspeeds_runs_only(monkeypatch):
    monkeypatch.setattr(other, "is_deepspeed_available", None)  # given back at the end
    leave_deepspeed_out(SINGLE)
    assert other.is_deepspeed_available() is False
    leave_deepspeed_out(ZERO2)
    assert other.is_deepspeed_available is is_deepspeed_available
