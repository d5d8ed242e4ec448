"""What is known of a run, read from its output folder: for reports, comparisons, and whoever wants to plot."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.launches import LAUNCHES_FILE
from common.run_status import read_status
from common.svg import Line


@dataclass
class Run:
    """What is known of a run."""

    name: str
    history: list[dict]  # Trainer's log
    results: dict = field(default_factory=dict)  # all_results.json, or its ledger alone while the run goes on
    identity: dict = field(default_factory=dict)  # run.json
    launches: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    status: dict = field(default_factory=dict)

    @classmethod
    def of(cls, folder: str | Path, history: list[dict] | None = None, results: dict | None = None) -> "Run":
        """Read the run in ``folder``; ``history`` and ``results``: newer than those in its files.

        Without them, the log is that of the finished run or of its newest checkpoint.
        """
        folder = Path(folder)
        states = [folder / "trainer_state.json"]
        states += sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: -_step(path))
        if history is None:
            history = next((_json(path).get("log_history", []) for path in states if path.exists()), [])
        known = _json(folder / "all_results.json") if results is None else results
        identity, status = _json(folder / "run.json"), read_status(folder) or {}
        launches, samples = read_lines(folder / LAUNCHES_FILE), read_lines(folder / "samples.jsonl")
        return cls(folder.resolve().name, history, known, identity, launches, samples, status)

    def series(self, name: str, against: str) -> tuple[list[float], list[float]]:
        """Return ``name`` against "tokens_seen", "train_seconds" or "step".

        An evaluation logs only its step; its tokens and seconds are read off the training's logs around it.
        """
        logged = [entry for entry in self.history if "tokens_seen" in entry and "step" in entry]
        steps = [0.0, *(entry["step"] for entry in logged)]
        known = [0.0, *(entry[against] for entry in logged)] if against != "step" else steps
        found = [entry for entry in self.history if name in entry and "step" in entry]
        return [float(np.interp(entry["step"], steps, known)) for entry in found], [entry[name] for entry in found]

    def line(self, label: str, name: str, against: str = "tokens_seen", dots: bool = False) -> Line:
        xs, ys = self.series(name, against)
        return Line(label, xs, ys, dots)


def _step(path: Path) -> int:
    number = path.parent.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _json(path: Path) -> dict:
    """Return what a file holds, {} if it is not there or was cut off: a report of part of it is better than none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def read_lines(path: Path) -> list[dict]:
    """Return the whole lines of a .jsonl file; a kill may have cut one off."""
    found = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):  # not splitlines: JSON holds U+0085, U+2028 and U+2029 as they are
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found
