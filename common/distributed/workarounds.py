"""What works around a library: each function names the fault, the versions seen, and when it can go.

Locks of dead compilations. DeepSpeed compiles operations at its first launch through ``torch.utils.cpp_extension``,
which keeps a file named ``lock`` open in the operation's folder meanwhile and removes it at the end
(torch/utils/file_baton.py). A process that is killed in between leaves it, and every later launch hangs before its
first line.

Compiling under DeepSpeed. ``accelerate launch`` reads ``dynamo_config``, and its launcher for DeepSpeed
(prepare_deepspeed_cmd_env in accelerate/utils/launch.py, release 1.15) does not hand it on, where its other launchers
put it into the environment. Every DeepSpeed run would train uncompiled, whatever the YAML and --dynamo_backend say. The
launcher is this process's parent, and its command line says what it was told.
"""

import os
import time
from pathlib import Path

import psutil
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from common.console import say

FOREIGN_SECONDS = 180  # nothing in the folder has changed for so long: no other machine compiles there either


def remove_dead_locks() -> None:
    """Remove the locks of dead compilations, and say so, on every machine; wait for what may be another machine's."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true" or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted(root.rglob("lock")):
        said = False
        while lock.exists() and not held_here(lock):
            idle = time.time() - last_change(lock.parent)
            if idle >= FOREIGN_SECONDS:
                lock.unlink(missing_ok=True)
                print(
                    f"removed {lock}: its compilation was killed, DeepSpeed would wait for it without end", flush=True
                )
            elif not said:
                said = True
                wait = f"waiting up to {FOREIGN_SECONDS - idle:.0f} s for {lock}"
                print(f"{wait}: another machine may be compiling there", flush=True)
            else:
                time.sleep(0.5)


def held_here(lock: Path) -> bool:
    """Return whether a process of this machine has the file open."""
    path = os.path.realpath(lock)  # as psutil names it, whatever links lead there
    for process in psutil.process_iter():
        try:
            if path in (file.path for file in process.open_files()):
                return True
        except (psutil.Error, OSError):  # ended meanwhile, or somebody else's
            continue
    return False


def last_change(folder: Path) -> float:
    """Return when the newest file of ``folder`` was written, in seconds since 1970."""
    times = [folder.stat().st_mtime]
    for file in folder.iterdir():
        try:
            times.append(file.stat().st_mtime)
        except FileNotFoundError:  # ninja's own files come and go
            continue
    return max(times)


SETTINGS = "backend", "mode", "use_fullgraph", "use_dynamic", "use_regional_compilation"


def take_over_compile() -> None:
    """Put into the environment what the launcher of this DeepSpeed run was told about compiling."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true" or "ACCELERATE_DYNAMO_BACKEND" in os.environ:
        return
    flags = launcher_flags()
    if flags is None:
        say(
            "note: not compiled: no accelerate launch above this process says whether to. To have it: "
            "export ACCELERATE_DYNAMO_BACKEND=inductor ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=true"
        )
        return
    os.environ.update(compile_settings(flags))


def launcher_flags() -> list[str] | None:
    """Return what stands behind ``accelerate launch`` in the command that started this process, None if nothing did."""
    for process in psutil.Process().parents():
        try:
            words = process.cmdline()
        except psutil.Error:  # somebody else's
            continue
        for place, word in enumerate(words):
            behind = word == "launch" and any("accelerate" in before for before in words[:place])
            if behind or os.path.basename(word) in ("accelerate-launch", "accelerate.commands.launch"):
                return words[place + 1 :]
    return None


def compile_settings(flags: list[str]) -> dict[str, str]:
    """Return the environment that accelerate's other launchers make of ``flags``: they win over the YAML's section."""
    arguments = launch_command_parser().parse_args(flags)
    given = getattr(arguments, "nondefault", set())
    in_yaml = {}
    if arguments.config_file or os.path.isfile(default_config_file):
        in_yaml = load_config_from_file(arguments.config_file).dynamo_config or {}
    found = {}
    for name in SETTINGS:
        value = getattr(arguments, f"dynamo_{name}")
        value = value if f"dynamo_{name}" in given else in_yaml.get(f"dynamo_{name}", value)
        found[f"ACCELERATE_DYNAMO_{name.upper()}"] = "NO" if value is None else str(value)
    return found
