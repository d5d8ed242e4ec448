"""How many cores a process may use, by its affinity and its quota."""

import os

import pytest
import torch

from common import system


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 192),
        ({"cpu.max": "max 100000"}, 192),
        ({"cpu.max": "1600000 100000"}, 16),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 192),
        ({"cpu/cpu.cfs_quota_us": "800000", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_cores_are_limited_by_the_quota(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(192)), raising=False)
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert system.usable_cores(tmp_path) == expected


def test_the_processes_of_a_machine_share_its_cores(monkeypatch):
    before, threads = torch.get_num_threads(), []
    monkeypatch.setattr(system, "usable_cores", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert system.take_cores(3) == before and threads == [5]
