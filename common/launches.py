"""The record of every launch of a run: all arguments, the launcher's settings, versions, commit; and what changed.

``launches.jsonl`` in the output folder, one line a launch. What decides the losses is in ``run.json`` and refused when
it differs (common/run_folder.py); what stands here may differ, and is said.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
from transformers import TrainingArguments

from common.arguments import SharedArguments
from common.messages import say
from common.run_folder import differences
from common.run_status import append_lines

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
