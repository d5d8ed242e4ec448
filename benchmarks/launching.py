"""What the benchmarks share: launch workers on given GPUs, with a time limit, and end all of their processes."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch

from common.distributed.accelerator import device_name
from common.run.record import PACKAGES, git_commit, installed

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS_TRACEBACK = r'Traceback \(most recent call last\):\n  File "[^"\n]*runpy'
SECONDS_TO_DIE = 10  # in some containers nobody collects dead processes; waiting for them would never end


def launcher(yaml: str) -> list[str]:
    """Return the start of a command that launches a script with accelerate_configs/``yaml``."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    return [*command, "--config_file", str(ROOT / "accelerate_configs" / yaml)]


def one_gpu(**more: str) -> dict[str, str]:
    """Return an environment with only the first visible GPU. With several, Trainer would use all of them, slowly."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0], **more}


def run(
    command: list[str], environment: dict[str, str], limit: float | None = None, cwd: Path | None = None
) -> tuple[str, str]:
    """Run ``command``; return its output and how it failed ("" if it did not).

    The whole tree of processes ends with this call, also after ``limit`` seconds, Ctrl-C or SIGTERM.
    """
    with tempfile.TemporaryFile() as output:  # a pipe would stay open as long as a process that inherited it
        # Here both signals raise KeyboardInterrupt, whatever handled them before.
        before = {
            number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)
        }
        # In a session of its own, so that only this process gets Ctrl-C, while the tree is still complete.
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            failure = "failed" if process.wait(limit) else ""
        except subprocess.TimeoutExpired:
            failure = f"not done after {limit:.0f} s"
        finally:
            end_tree(process)
            for number, handler in before.items():
                signal.signal(number, handler)
        output.seek(0)
        return without_launchers_traceback(output.read().decode(errors="replace")), failure


def without_launchers_traceback(output: str) -> str:
    """Return ``output`` without the launcher's traceback, which only says that a worker failed.

    If there is nothing but that traceback, return it.
    """
    own = re.split(LAUNCHERS_TRACEBACK, output)[0]
    return own if own.strip() else output


def end_tree(process: subprocess.Popen) -> None:
    """Kill ``process`` and all its descendants if it still runs. torch's launcher has its workers in other sessions."""
    if process.poll() is not None:
        return
    tree = [psutil.Process(process.pid)]
    tree += tree[0].children(recursive=True)  # listed before the kill, after which they have no parent
    for member in tree:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(tree, SECONDS_TO_DIE)


def result_of(command: list[str], folder: str, environment: dict[str, str], limit: float | None = None) -> dict | str:
    """Run a worker that writes result.json into ``folder``; return its content, or an error message of one line."""
    output, failure = run(command, environment, limit)
    result = Path(folder, "result.json")
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    return failure if failure.startswith("not done") else error_in(output)


def error_in(output: str) -> str:
    """Return the last line about memory; if there is none, the last one with an error; else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["nothing was printed"]
    memory = [line for line in lines if "out of memory" in line.lower()]
    errors = [line for line in lines if "Error" in line]
    return (memory or errors or lines)[-1][:200]


def compact(row: dict | str) -> str:
    """Return a row as JSON, with numbers rounded to four digits."""
    if isinstance(row, str):
        return json.dumps(row)
    return json.dumps(json.loads(json.dumps(row), parse_float=lambda number: float(f"{float(number):.4g}")))


def circumstances() -> dict:
    """Return what all figures of a table must have in common: commit, versions, device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = {name: version for name in PACKAGES if (version := installed(name))}
    return {"commit": git_commit(), "versions": versions, "device": device_name(device)}


def load_recipe(name: str):
    """Import recipes/``name`` as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "recipes" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
