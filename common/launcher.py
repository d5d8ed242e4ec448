"""Compiling under DeepSpeed: accelerate launch reads ``dynamo_config`` there, and then does not hand it on.

Its other launchers put it into the environment; that for DeepSpeed (prepare_deepspeed_cmd_env in
accelerate/utils/launch.py, release 1.15) does not, so that every DeepSpeed run would train uncompiled, whatever the
YAML and --dynamo_backend say. The launcher is this process's parent, and its command line says what it was told.
"""

import os

import psutil
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from common.messages import say

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
