"""How far long work is: a bar that fits its terminal, a notebook's own bar, lines in a file; the time left in each."""

import json
import os
import re
import sys

import pytest
from conftest import ROOT, small_run
from terminal import said_in_terminal
from tqdm.notebook import tqdm_notebook

from common import progress
from common.progress import Progress, progress_line

WORK = """
import time
from common import progress
progress.SILENT_SECONDS = 0
with progress.Progress("tokenizing a corpus with a rather long name", 4_000_000, "B") as bar:
    for _ in range(4):
        time.sleep(0.6)
        bar.update(1_000_000)
"""


def test_a_line_says_how_much_is_done_and_what_is_left():
    """By hand: a quarter in 30 s leaves 90 s; what an earlier session has done took no time of this one."""
    assert progress_line("tokenizing", 250e6, 1e9, "B", 30) == "tokenizing: 25%, 250M of 1.00GB, 01:30 left"
    assert progress_line("downloading", 75, 100, "B", 60, already=50) == "downloading: 75%, 75.0 of 100B, 01:00 left"
    assert progress_line("training", 20, 100, "%", 3600) == "training: 20%, 4:00:00 left"
    assert progress_line("reading", 5e6, None, "B", 61) == "reading: 5.00MB, 01:01"
    assert progress_line("reading", 0, 100, "B", 30) == "reading: 0%, 0.00 of 100B, ? left"


def test_more_than_the_total_is_the_total():
    """Of a file some parts may be read twice; the time left is never below zero."""
    with Progress("reading", 100, "B") as progress:
        progress.reach(259)
        assert progress.done == 100
    with Progress("reading", None, "B") as progress:
        progress.reach(259)
        assert progress.done == 259


def test_a_file_gets_a_line_now_and_then_and_only_from_the_main_process(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("hashing", 1000, " documents") as bar:
        for _ in range(100):  # of a second each
            now[0] += 1
            bar.update(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "hashing: 30%, 300 of 1.00k documents, 01:10 left",
        "hashing: 60%, 600 of 1.00k documents, 00:40 left",
        "hashing: 90%, 900 of 1.00k documents, 00:10 left",
    ]
    monkeypatch.setenv("RANK", "1")
    with Progress("hashing", 1000, " documents") as bar:
        now[0] += 100
        bar.reach(500)
    assert capsys.readouterr().err == ""


def test_a_day_of_work_does_not_fill_a_file(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("downloading", 86_400, "B") as bar:
        for _ in range(8640):
            now[0] += 10
            bar.update(10)
    assert 50 < len(capsys.readouterr().err.splitlines()) < 250


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("columns", [40, 100])
def test_a_bar_fits_its_terminal(columns):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    text = said_in_terminal([sys.executable, "-c", WORK], columns, environment)
    shown = [part for part in re.split(r"[\r\n]", text.replace("\x1b[A", "")) if part.strip()]
    assert all(len(part) <= columns for part in shown), shown
    halves = [part for part in shown if " 50%" in part]
    assert halves and all(re.search(r"00:0\d left", part) for part in halves)
    assert all(("█" in part) == (columns == 100) for part in halves)


SHORT = """
from common.console import say
from common.progress import Progress
with Progress("tokenizing", 100, "B") as bar:
    say("a line while it works")
    bar.update(100)
say("the next line")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("columns", [40, 100])
def test_nothing_is_left_of_work_that_was_too_short_for_a_bar(columns):
    """A line that is printed meanwhile draws the bar below it."""
    pyte = pytest.importorskip("pyte")
    screen = pyte.Screen(columns, 10)
    pyte.Stream(screen).feed(
        said_in_terminal([sys.executable, "-c", SHORT], columns, os.environ | {"PYTHONPATH": str(ROOT)})
    )
    assert [line.rstrip() for line in screen.display if line.strip()] == ["a line while it works", "the next line"]


def test_a_notebook_gets_its_own_bar(monkeypatch):
    """tqdm.auto is tqdm's bar of widgets there: every bar is made by it, with a layout that it can show."""

    class Widgets(tqdm_notebook):
        made: list[dict] = []

        def __init__(self, **settings):
            self.made.append(settings)
            self.shown = 0

        def update(self, count):
            self.shown += count

        def close(self):
            pass

    monkeypatch.setattr(progress, "tqdm", Widgets)
    with Progress("tokenizing", 10, "B") as bar:
        bar.update(4)
        bar.reach(7)
    assert progress.shows_bars() and bar.bar.shown == 7
    assert [settings["total"] for settings in Widgets.made] == [10]


@pytest.mark.heavy
def test_a_recipe_in_a_notebook_shows_widgets(cache_dir, tmp_path):
    """A real kernel: its output is widgets, and no step line."""
    import nbclient
    import nbformat

    pytest.importorskip("ipywidgets")
    flags = [flag for flag in small_run(cache_dir, tmp_path / "run") if flag not in ("--disable_tqdm", "true")]
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'recipes')]!r}; import wiki_zh_scratch\n"
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(f"{code}wiki_zh_scratch.main({flags!r})")]
    nbclient.NotebookClient(notebook, timeout=600).execute()
    outputs = notebook.cells[0].outputs
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)
    text = json.dumps(outputs, ensure_ascii=False)
    assert "held out   step 3" in text and "step 1/6" not in text and "FutureWarning" not in text
