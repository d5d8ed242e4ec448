"""How the recipes talk: one line on the main process, one clear error without a traceback."""

import os
import sys

from tqdm.auto import tqdm


class InputError(SystemExit):
    """Stop with one message: the value seen, the limit, and the fix.

    A subclass of ``SystemExit``, so that Python prints the message to stderr and exits with status 1
    without a traceback of ours: these errors are for the person at the keyboard, not for debugging.
    """


def is_main_process() -> bool:
    """Whether this is rank 0 of the launch (from the launcher's environment, so usable before any set-up)."""
    return int(os.environ.get("RANK", "0")) == 0


def is_local_main_process() -> bool:
    """Whether this is the first process of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def say(message: str) -> None:
    """Print on the main process only, above a bar if there is one."""
    if is_main_process():
        tqdm.write(message)
        sys.stdout.flush()
