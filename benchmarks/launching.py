"""What the benchmarks share: workers launched on their cards and within their time, of which nothing stays behind."""

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

from common.run.record import PACKAGES, device_name, git_commit, installed

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS_TRACEBACK = r'Traceback \(most recent call last\):\n  File "[^"\n]*runpy'
SECONDS_TO_DIE = 10  # where nobody collects the dead, as in some containers, they would be waited for forever


def launcher(yaml: str) -> list[str]:
    """Return the beginning of a command that launches a script with accelerate_configs/``yaml``."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    return [*command, "--config_file", str(ROOT / "accelerate_configs" / yaml)]


def one_gpu(**more: str) -> dict[str, str]:
    """Return the environment in which only the first visible GPU is: of several Trainer takes all, the slow way."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0], **more}


def run(
    command: list[str], environment: dict[str, str], limit: float | None = None, cwd: Path | None = None
) -> tuple[str, str]:
    """Run ``command``; return what it printed and how it failed, "" if it did not.

    However this ends, after ``limit`` seconds, by Ctrl-C or SIGTERM, the whole tree of processes ends with it.
    """
    with tempfile.TemporaryFile() as output:  # a pipe would stay open as long as anyone who inherited it lives
        # Both raise KeyboardInterrupt here, whoever handled them before.
        before = {
            number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)
        }
        # In a session of its own, so that Ctrl-C comes here alone and finds the tree whole.
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
        return less_the_launchers(output.read().decode(errors="replace")), failure


def less_the_launchers(output: str) -> str:
    """Return ``output`` without the launcher's traceback, if there is more: that one says only that a worker failed."""
    own = re.split(LAUNCHERS_TRACEBACK, output)[0]
    return own if own.strip() else output


def end_tree(process: subprocess.Popen) -> None:
    """Kill ``process`` and all below it, if it still runs: torch's launcher has its workers in other sessions."""
    if process.poll() is not None:
        return
    tree = [psutil.Process(process.pid)]
    tree += tree[0].children(recursive=True)  # before the kill, after which they are nobody's children
    for member in tree:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(tree, SECONDS_TO_DIE)


def result_of(command: list[str], folder: str, environment: dict[str, str], limit: float | None = None) -> dict | str:
    """Run a worker that leaves result.json in ``folder``; return it, or in one line what went wrong."""
    output, failure = run(command, environment, limit)
    result = Path(folder, "result.json")
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    return failure if failure.startswith("not done") else error_in(output)


def error_in(output: str) -> str:
    """Return the last line that says what went wrong: of memory, else of an error, else any."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["nothing was printed"]
    memory = [line for line in lines if "out of memory" in line.lower()]
    errors = [line for line in lines if "Error" in line]
    return (memory or errors or lines)[-1][:200]


def compact(row: dict | str) -> str:
    """Return a row as JSON, numbers to four digits."""
    if isinstance(row, str):
        return json.dumps(row)
    return json.dumps(json.loads(json.dumps(row), parse_float=lambda number: float(f"{float(number):.4g}")))


def circumstances() -> dict:
    """Return what figures must share to be in one table: commit, versions, device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = {name: version for name in PACKAGES if (version := installed(name))}
    return {"commit": git_commit(), "versions": versions, "device": device_name(device)}


def load_recipe(name: str):
    """Import recipes/``name`` as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "recipes" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
