"""DeepSpeed's states that cannot be converted for another number of processes: one error, and nothing is left.

tests/system/test_equivalence.py continues such runs.
"""

import shutil
from types import SimpleNamespace

import pytest

from common.console import InputError
from common.run.universal import load_on_other_processes

ENGINE = SimpleNamespace(_config=SimpleNamespace(load_universal_checkpoint=False))


@pytest.fixture
def checkpoint(tmp_path):
    parts = tmp_path / "run" / "checkpoint-4" / "global_step4"
    parts.mkdir(parents=True)
    (parts / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"no states")
    return parts.parent


def test_zero_states_that_cannot_be_converted_are_one_error(checkpoint, capsys):
    with pytest.raises(
        InputError, match=r"checkpoint-4: DeepSpeed's states cannot be converted \(.+\). Launch as many"
    ):
        load_on_other_processes(ENGINE, str(checkpoint), str(checkpoint.parent), pytest.fail)
    assert "another number of processes wrote it" in capsys.readouterr().out
    assert not (checkpoint.parent / "unfinished").exists()


def test_zero_states_without_room_are_not_converted(checkpoint, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(
        InputError, match="DeepSpeed's states are copied, and 0.00 GiB are free .* Make room, or launch"
    ):
        load_on_other_processes(ENGINE, str(checkpoint), str(checkpoint.parent), pytest.fail)
