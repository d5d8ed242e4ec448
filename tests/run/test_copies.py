"""Copies in main memory: what they hold, whether there is room, and how much memory a container has left."""

import torch

import common.run.copies as module
from common.run.copies import Copies
from common.system import GIB, available_memory


def test_copies_stay_as_they_were_and_take_the_same_memory_again():
    shared = torch.arange(4.0)
    state = {"a": shared, "state": [{"b": shared, "step": torch.tensor(3.0)}], "rate": 0.5}
    copies = Copies()
    taken = copies.take("a", state)
    shared += 10
    assert taken["a"].tolist() == [0, 1, 2, 3] and taken["rate"] == 0.5
    inner = taken["state"][0]["b"]
    assert inner.tolist() == [0, 1, 2, 3] and inner.data_ptr() == taken["a"].data_ptr() != shared.data_ptr()
    again = copies.take("a", state)
    assert again["a"].tolist() == [10, 11, 12, 13] and again["a"].data_ptr() == taken["a"].data_ptr()
    state["a"] = torch.ones(3, 2).T  # another tensor at the same place, of another shape
    other = copies.take("a", state)
    assert other["a"].tolist() == [[1, 1, 1], [1, 1, 1]] and other["state"][0]["b"].tolist() == [10, 11, 12, 13]
    assert copies.take("b", state)["a"].data_ptr() != other["a"].data_ptr()
    for number in range(20):  # tensors that are made anew for each save
        assert copies.take("c", {"made": torch.full((1000,), float(number))})["made"].tolist() == [number] * 1000


def test_room_is_for_all_processes_of_the_machine_and_something_else(monkeypatch, capsys):
    monkeypatch.setattr(module, "available_memory", lambda: 10 * GIB)
    copies = Copies()
    assert copies.have_room(8 * GIB, 1, again=False) and not capsys.readouterr().out
    assert not copies.have_room(8 * GIB + 1, 1, again=True)
    assert "a copy of it would take 8.0 GiB of main memory, of which 10.0 are free" in capsys.readouterr().out
    assert not copies.have_room(5 * GIB, 2, again=True) and not capsys.readouterr().out, "said once"
    assert copies.have_room(4 * GIB, 2, again=True)
    monkeypatch.setattr(module, "available_memory", lambda: 2 * GIB)  # they are taken now
    assert copies.have_room(4 * GIB, 2, again=True) and not copies.have_room(5 * GIB, 2, again=True)
    assert copies.have_room(0, 1, again=True), "a process that copies nothing needs no room"


def test_memory_is_that_of_the_container(tmp_path):
    free = available_memory(tmp_path)
    assert free > 0, "no container: the machine's"
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 150\n")
    assert available_memory(tmp_path) > 1000
    (tmp_path / "memory.max").write_text("1000\n")
    assert available_memory(tmp_path) == 1000 - 700 + 150
    (tmp_path / "memory.current").write_text("2000\n")
    assert available_memory(tmp_path) == 0
