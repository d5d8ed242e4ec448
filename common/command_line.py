"""The command line as people see it: --help on one screen, an error on one line, and commands to copy."""

import argparse
import json
import shlex
import shutil
import textwrap
from typing import NoReturn

from common.console import is_main_process, what_follows

LAUNCHERS = ("bf16", "fp16", "use_cpu")  # defaults that come with the YAML, and not from a recipe's dicts


class OneLineErrors(argparse.ArgumentParser):
    """A parser whose errors are one line of the main process. Replaces: all flags, some 600 lines, before the error."""

    def error(self, message: str) -> NoReturn:
        line = f"{self.prog}: error: {message}{what_follows()}\n"
        self.exit(2, line if is_main_process() else None)


class ShowHelp(argparse.Action):
    """``--help``: the recipe's own flags and the values of its dicts; ``--help all``: every flag.

    The parser has the short text in its attribute ``one_screen``.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        if values not in (None, "all"):
            parser.error(f"--help {values}: --help shows this recipe's own flags, --help all shows all")
        if is_main_process():
            print(parser.format_help() if values == "all" else parser.one_screen, end="")
        parser.exit()


def help_on_one_screen(own: argparse.ArgumentParser, values: dict, others: int, has_plan: bool) -> str:
    """Return the text of ``--help``.

    Args:
        own: a parser of the flags that only this recipe has; it is changed for display.
        values: the defaults that the recipe's dicts give to other flags.
        others: how many flags there are beside all of these.
        has_plan: whether the recipe reads ``--plan``.
    """
    own.usage = f"accelerate launch --config_file accelerate_configs/YAML recipes/{own.prog} [flags]"
    for action in own._actions:  # as one would write it: not the second spelling with dashes, no value for a switch
        action.option_strings = action.option_strings[:1]
        action.nargs = 0 if action.nargs == "?" else action.nargs
    pairs = [f"--{name} {as_word(value)}" for name, value in values.items() if name not in LAUNCHERS]
    width = shutil.get_terminal_size().columns - 2
    # Only ASCII white space separates words for textwrap, so a no-break space keeps a flag beside its value.
    flowing = textwrap.fill(
        "   ".join(pair.replace(" ", "\xa0") for pair in pairs),
        width,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    ).replace("\xa0", " ")
    parts = [own.format_help().rstrip(), f"values of its dicts, each of which is a flag, too:\n{flowing}"]
    if has_plan:
        parts.append("Does it fit, and how long does it take? --plan, --plan --probe")
    parts.append(f"All flags with explanations, {others} more: --help all")
    return "\n\n".join(parts) + "\n"


def as_word(value: object) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, list | tuple):
        return " ".join(as_word(each) for each in value)
    if isinstance(value, dict):
        return shlex.quote(json.dumps(value))
    if isinstance(value, bool):
        return str(value).lower()
    return shlex.quote(str(value))


def launch_command(yaml: str, recipe: str, flags: dict[str, object], launcher_flags: str = "") -> str:
    """Return the command that launches ``recipes/{recipe}`` under an accelerate YAML.

    Args:
        flags: name -> value of the recipe's flags, such as ``SharedArguments.given``. A flag that is true has no value.
        launcher_flags: those of ``accelerate launch`` itself.
    """
    words = [f"accelerate launch --config_file {as_word(yaml)}", launcher_flags, f"recipes/{recipe}"]
    words += [f"--{name}" if value is True else f"--{name} {as_word(value)}" for name, value in flags.items()]
    return " ".join(word for word in words if word)
