"""The record of every launch: all arguments, the launcher's settings, versions, commit; and reading a run's records.

``launches.jsonl`` in the output folder has one line a launch. What decides the losses is in ``run.json``, and refused
when it differs (common/run/folder.py). What stands here may differ; the difference is printed.
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
import torch
from transformers import TrainingArguments

from common.arguments import SharedArguments
from common.console import say
from common.io import append_lines, read_lines
from common.run.folder import differences, read_status
from common.run.plots import Line

LAUNCHES_FILE = "launches.jsonl"
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "torchao", "numpy", "tokenizers")
LAUNCHER = ("ACCELERATE_", "FSDP_", "OMP_NUM_THREADS", "WORLD_SIZE")  # what the YAML leaves in the environment
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")
NO_SECRET = "end_token"  # of a document
ALWAYS_DIFFERENT = {"time", "commit", "python", "command"}


def describe_launch(shared: SharedArguments, training: TrainingArguments) -> dict:
    """Return all that this launch was given, as JSON types; no secrets."""
    plugin = training.deepspeed_plugin
    launcher = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(LAUNCHER) and not any(word in name for word in SECRET)
    }
    arguments = {"shared": asdict(shared), "training": training.to_dict()}  # to_dict leaves the values of tokens out
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": git_commit(),
        "command": command_line(),
        "device": device_name(training.device),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
        "processes": training.world_size,
        "launcher": launcher,
        "deepspeed": None if plugin is None else plugin.deepspeed_config,
        "arguments": json.loads(json.dumps(arguments, default=str)),
    }


def record_launch(folder: str | Path, launch: dict) -> None:
    """Say what differs from the launch before, and add this one; on the main process."""
    path = Path(folder) / LAUNCHES_FILE
    launch = json.loads(json.dumps(launch, default=str))
    before = _last(path)
    changed = [change for change in differences(before, launch) if change[0] not in ALWAYS_DIFFERENT] if before else []
    for name, was, now in changed:
        say(f"note: {name} was {was!r} at the last launch, and is {now!r} now")
    append_lines(path, [launch])


def _last(path: Path) -> dict:
    """Return the last whole line; a run that is killed may leave half of one behind."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in reversed(text.split("\n")):  # not splitlines: JSON holds other line breaks as they are
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError):
            continue
    return {}


def command_line() -> str:
    """Return the command of this process, or of the launcher that started it; the YAML is named nowhere else.

    Without secrets: reports and model cards show it, and are published.
    """
    own = [Path(sys.argv[0]).name, *sys.argv[1:]] if len(sys.argv) > 1 else sys.argv
    try:
        started_by = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # not allowed, or gone
        started_by = []
    names = [Path(word).name for word in started_by]
    if "launch" in names and any(name.startswith("accelerate") for name in names[: names.index("launch")]):
        words = ["accelerate", *started_by[names.index("launch") :]]
    else:
        words = ["python", *sys.argv] if sys.argv[0].endswith(".py") else own
    return shlex.join(without_secrets(words))


def without_secrets(words: list[str]) -> list[str]:
    """Return the words of a command with HIDDEN for the value of every flag that has a word of SECRET in its name."""
    shown, hide = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        secret = names_secret(flag)
        if secret and equals:
            word = f"{flag}=HIDDEN"
        elif hide and not word.startswith("--"):
            word = "HIDDEN"
        shown.append(word)
        hide = secret and not equals
    return shown


def names_secret(flag: str) -> bool:
    """Whether the value of ``flag`` is one: of --hub_token, not of --tokenizer, nor of --tokens_per_step."""
    name = flag.lstrip("-").replace("-", "_")
    return flag.startswith("-") and name != NO_SECRET and any(word in SECRET for word in name.upper().split("_"))


def device_name(device: torch.device) -> str:
    """Return what the device is called, such as "NVIDIA H100 80GB HBM3"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"


def installed(package: str) -> str | None:
    """Return the version of ``package``, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit that this package is of, with "-dirty" behind it if files were changed; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def mean_logged_loss(log_history: list[dict]) -> float:
    """Return the mean training loss over all steps: each logged loss is the mean since the log before.

    A log all of whose steps were left out has none.
    """
    total, last_step, steps = 0.0, 0, 0
    for entry in log_history:
        if "loss" in entry:
            if math.isfinite(entry["loss"]):
                total += entry["loss"] * (entry["step"] - last_step)
                steps += entry["step"] - last_step
            last_step = entry["step"]
    return total / steps if steps else math.nan


@dataclass
class RunRecord:
    """What is known of a run."""

    name: str
    history: list[dict]  # Trainer's log
    results: dict = field(default_factory=dict)  # all_results.json, or its ledger alone while the run goes on
    identity: dict = field(default_factory=dict)  # run.json
    launches: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    status: dict = field(default_factory=dict)

    @classmethod
    def of(cls, folder: str | Path, history: list[dict] | None = None, results: dict | None = None) -> "RunRecord":
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
        # One call for all entries: np.interp converts both lists to arrays each time it is called.
        xs = np.interp([entry["step"] for entry in found], steps, known).tolist()
        return xs, [entry[name] for entry in found]

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
