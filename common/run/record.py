"""The record of every launch, and ``RunRecord``, which reads all records of a run.

``launches.jsonl`` in the output folder has one line for each launch: arguments, launcher settings, versions, commit.
These may differ from launch to launch, and each difference is printed. The settings that decide the losses are in
``run.json``; a launch in which they differ is refused (common/run/folder.py).
"""

import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import psutil
from transformers import TrainingArguments

from common.arguments import SharedArguments
from common.console import say
from common.distributed.accelerator import device_name
from common.io import append_lines, read_lines
from common.run.branch import BRANCH_FILE
from common.run.identity import differences
from common.run.lock import read_status
from common.run.plots import Line

LAUNCHES_FILE = "launches.jsonl"
TASKS_FILE = "eval_tasks.jsonl"
# What the report reads of a score. What is not known is None.
SCORE = {"task": str, "metric": str, "score": int | float, "step": int, "seconds": int | float}
SCORE |= dict.fromkeys(("stderr", "chance"), int | float | None) | dict.fromkeys(("documents", "shots"), int | None)
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "torchao", "numpy", "tokenizers")
# Beginnings of the environment variables that the launcher sets from its YAML.
LAUNCHER = ("ACCELERATE_", "FSDP_", "OMP_NUM_THREADS", "WORLD_SIZE")
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")
NO_SECRET = "end_token"  # the flag for the end-of-document token, which is no credential
# Of the last: as a whole it differs only where an older launch has none.
ALWAYS_DIFFERENT = {"time", "commit", "python", "command", "arguments.recipe"}


def describe_launch(shared: SharedArguments, training: TrainingArguments) -> dict:
    """Return arguments, launcher settings, versions and commit of this launch as JSON types, without secrets."""
    plugin = training.deepspeed_plugin
    launcher = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(LAUNCHER) and not any(word in name for word in SECRET)
    }
    # to_dict replaces the values of tokens.
    arguments = {"shared": asdict(shared), "training": training.to_dict()}
    del arguments["shared"]["given"]  # the command has them
    own = arguments["shared"].pop("own")
    arguments["recipe"] = {name: own[name] for name in own if not any(word in name.upper() for word in SECRET)}
    versions = {name: installed(name) for name in PACKAGES}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": git_commit(),
        "command": command_line(),
        "device": device_name(training.device),
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version is not None},
        "processes": training.world_size,
        "launcher": launcher,
        "deepspeed": None if plugin is None else plugin.deepspeed_config,
        "arguments": json.loads(json.dumps(arguments, default=str)),
    }


def record_launch(folder: str | Path, launch: dict) -> None:
    """Print what differs from the last launch, and add this launch to the file. Call it on the main process only."""
    path = Path(folder) / LAUNCHES_FILE
    launch = json.loads(json.dumps(launch, default=str))
    before = _last(path)
    changed = [change for change in differences(before, launch) if change[0] not in ALWAYS_DIFFERENT] if before else []
    for name, was, now in changed:
        say(f"note: {name} was {was!r} at the last launch, and is {now!r} now")
    append_lines(path, [launch])


def _last(path: Path) -> dict:
    """Return the last whole line of ``path``, {} if there is none. A killed run may leave half a line after it."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in reversed(text.split("\n")):  # not splitlines(): JSON text may contain other line breaks
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError):
            continue
    return {}


def command_line() -> str:
    """Return the command of the launcher that started this process, or of this process if there was no launcher.

    Only the launcher's command names the YAML. Secrets are hidden, because reports and model cards are published.
    """
    try:
        started_by = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # access denied, or the parent has ended
        started_by = []
    names = [Path(word).name for word in started_by]
    if "launch" in names and any(name.startswith("accelerate") for name in names[: names.index("launch")]):
        words = ["accelerate", *started_by[names.index("launch") :]]
    elif sys.argv[0].endswith(".py"):
        words = ["python", *sys.argv]
    elif len(sys.argv) > 1:
        words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    else:
        words = sys.argv
    return shlex.join(without_secrets(words))


def without_secrets(words: list[str]) -> list[str]:
    """Return ``words``, a command, with HIDDEN in place of the value of every flag that ``names_secret``."""
    shown = []
    value_follows = False  # the last word was the name of a secret, without its value
    for word in words:
        flag, equals, _ = word.partition("=")
        secret = names_secret(flag)
        if secret and equals:
            word = f"{flag}=HIDDEN"
        elif value_follows and not word.startswith("--"):
            word = "HIDDEN"
        shown.append(word)
        value_follows = secret and not equals
    return shown


def names_secret(flag: str) -> bool:
    """Whether the value of ``flag`` is a secret: true for --hub_token, false for --tokenizer and --tokens_per_step."""
    name = flag.lstrip("-").replace("-", "_")
    return flag.startswith("-") and name != NO_SECRET and any(word in SECRET for word in name.upper().split("_"))


def installed(package: str) -> str | None:
    """Return the version of ``package``, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit of this code, followed by "-dirty" if tracked files were changed; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def mean_logged_loss(log_history: list[dict]) -> float:
    """Return the mean training loss of all steps that were made; NaN if there are none.

    Each logged loss is the mean of the steps since the log before it. It is not finite if all of them were left out as
    bad steps; these are not counted.
    """
    total = 0.0
    last_step = 0
    steps = 0
    for entry in log_history:
        if "loss" in entry:
            if math.isfinite(entry["loss"]):
                total += entry["loss"] * (entry["step"] - last_step)
                steps += entry["step"] - last_step
            last_step = entry["step"]
    return total / steps if steps else math.nan


def task_key(score: dict) -> str:
    """Return the name that the ``score`` of a task (common/train/eval_tasks.py) has in the log."""
    return f"eval_{score['task']}_{score['metric']}"


def score_text(score: dict) -> str:
    """Return the ``score`` of a task, with its standard error and its chance level, on one line."""
    text = f"{score['task']} {score['metric']} {score['score']:.4f}"
    if score["stderr"] is not None:
        text += f" ± {score['stderr']:.4f}"
    if score["chance"] is None:
        return text
    noise = 2 * score["stderr"] if score["stderr"] is not None else 0.0
    verdict = "" if score["score"] > score["chance"] + noise else ": not above it"
    return f"{text} (chance {score['chance']:.4f}{verdict})"


@dataclass
class RunRecord:
    """All records of one run."""

    name: str
    history: list[dict]  # Trainer's log: one dict for each log line
    results: dict = field(default_factory=dict)  # all_results.json; during the run, only its "sources"
    identity: dict = field(default_factory=dict)  # run.json
    branch: dict = field(default_factory=dict)  # branch.json, if it has left another run
    launches: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    tasks: list[dict] = field(default_factory=list)  # scores of --eval_tasks, those of parts of a group included
    status: dict = field(default_factory=dict)

    @classmethod
    def of(cls, folder: str | Path, history: list[dict] | None = None, results: dict | None = None) -> "RunRecord":
        """Read the run in ``folder``.

        Args:
            history: a newer log than the one in the folder. The folder's is that of the finished run, or of its newest
                checkpoint.
            results: newer results than those in the folder.
        """
        folder = Path(folder)
        if history is None:
            states = [folder / "trainer_state.json"]
            states += sorted(folder.glob("checkpoint-*/trainer_state.json"), key=_step, reverse=True)
            history = next((_json(path).get("log_history", []) for path in states if path.exists()), [])
        if results is None:
            results = _json(folder / "all_results.json")
        status = read_status(folder)
        return cls(
            name=folder.resolve().name,
            history=history,
            results=results,
            identity=_json(folder / "run.json"),
            branch=_json(folder / BRANCH_FILE),
            launches=read_lines(folder / LAUNCHES_FILE),
            samples=read_samples(folder),
            tasks=_whole_entries(folder / TASKS_FILE, SCORE),
            status={} if status is None else status,
        )

    def series(self, name: str, against: str) -> tuple[list[float], list[float]]:
        """Return the xs and ys of a curve: the logged values of ``name`` over ``against``.

        An evaluation logs only its step. Its tokens and seconds are interpolated between the training logs around it.

        Args:
            name: a key of the log.
            against: "tokens_seen", "train_seconds" or "step".
        """
        logged = [entry for entry in self.history if "tokens_seen" in entry and "step" in entry]
        steps = [0.0, *(entry["step"] for entry in logged)]
        known = [0.0, *(entry[against] for entry in logged)] if against != "step" else steps
        found = [entry for entry in self.history if name in entry and "step" in entry]
        # One call for all entries: np.interp converts both lists to arrays each time it is called.
        xs = np.interp([entry["step"] for entry in found], steps, known).tolist()
        return xs, [entry[name] for entry in found]

    def line(self, label: str, name: str, against: str = "tokens_seen", dots: bool = False) -> Line:
        """Return the curve of ``series`` under the name ``label``, ready to be drawn."""
        xs, ys = self.series(name, against)
        return Line(label, xs, ys, dots)


def read_samples(folder: str | Path) -> list[dict]:
    """Return the whole entries of ``samples.jsonl`` in ``folder``: "step", "prompt" and "text"; [] without a file."""
    return _whole_entries(Path(folder) / "samples.jsonl", {"step": int, "prompt": str, "text": str})


def _whole_entries(path: Path, kinds: dict) -> list[dict]:
    """Return the entries of ``path`` that have all names of ``kinds``, with values of these kinds."""
    entries = read_lines(path)
    return [entry for entry in entries if all(isinstance(entry.get(name, ...), kind) for name, kind in kinds.items())]


def _step(path: Path) -> int:
    """Return N for checkpoint-N/trainer_state.json, -1 if N is not a number."""
    number = path.parent.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _json(path: Path) -> dict:
    """Return the content of a .json file, {} if it is missing or cut off. The report then shows the other files."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
