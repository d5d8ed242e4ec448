"""How the project talks: one line on the main process, one clear error, and libraries kept quiet.

Some libraries say things, often while they are imported, that are not the user's to fix. ``MESSAGES`` and ``WARNINGS``
name these, each with its reason. Errors still show, and so does every warning that is not named here. To see
everything: PRETRAINING_VERBOSE=1.
"""

import errno
import io
import logging
import os
import re
import sys
import warnings

from tqdm.auto import tqdm

# Characters that a terminal acts on or cannot show: control characters but for line break and tab (an escape sequence
# begins with one), marks that turn the direction of writing, two line breaks of Unicode's own, and lone surrogates.
NOT_PRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return ``text`` with each character of NOT_PRINTABLE as an escape such as ``\\x1b``.

    Documents, their fields and file names may hold any character. A terminal would take some for commands.
    """
    return NOT_PRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class InputError(SystemExit):
    """Stop with one message: the value seen, the limit, and the fix.

    A subclass of ``SystemExit``, so that Python prints the message to stderr and exits with status 1
    without a traceback of ours: these errors are for the person at the keyboard, not for debugging.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))
        self.code = f"{self}{what_follows()}"  # what Python prints; str() is the message alone


def is_main_process() -> bool:
    """Whether this is rank 0 of the launch (from the launcher's environment, so usable before any set-up)."""
    return int(os.environ.get("RANK", "0")) == 0


def is_local_main_process() -> bool:
    """Whether this is the first process of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def launched() -> bool:
    """Whether a launcher started this process."""
    return any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))


def what_follows() -> str:
    """Return what to add to the last message of a process, because its launcher prints a traceback after it."""
    text = "\n(The launcher's own traceback follows. It says no more than that this process ended.)"
    return text if launched() else ""


def after_ctrl_c() -> str:
    """Return what to add to the last message after Ctrl-C, at which a launcher prints a traceback, too."""
    return " (a traceback here is the launcher's own)" if launched() else ""


def say(message: str) -> None:
    """Print on the main process only, above a bar if there is one; the message may hold any characters."""
    if is_main_process():
        tqdm.write(printable(message))
        sys.stdout.flush()


def in_one_line(error: Exception) -> str:
    """Return the type and the beginning of the text of ``error``."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    # StrictDataclassFieldValidationError: Validation error for field 'hidden_size': TypeError: Field 'hidden_size' ...
    return re.sub(r"^StrictDataclass\w+: .*?(?=\w+Error: )", "", text)[:300]


def duration_in_words(seconds: float) -> str:
    """Return a time to wait, as a person says it: "40 seconds", "12 minutes", "an hour and 40 minutes", "3.2 days"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        count = max(1, round(seconds))
        return f"{count} second{'s' * (count != 1)}"
    if minutes < 60:
        return f"{minutes} minutes"
    if minutes >= 48 * 60:
        return f"{seconds / 86_400:.1f} days"
    hours, rest = divmod(minutes, 60)
    of_hours = "an hour" if hours == 1 else f"{hours} hours"
    return f"{of_hours} and {rest} minute{'s' * (rest != 1)}" if rest else of_hours


class OutlivingStream(io.FileIO):
    """A file descriptor whose text goes nowhere once nobody is there to read it."""

    NOBODY_READS = (errno.EIO, errno.EPIPE)  # a terminal that was closed; a pipe whose reader has ended

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self.NOBODY_READS:
                raise
            return len(data)


def outlive_terminal() -> None:
    """Let a run go on whose terminal was closed (``disown``, a lost ssh) or whose ``| tee`` has ended.

    Everything that prints, libraries included, would raise otherwise. Other streams, such as a notebook's, stay.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)  # python -u has no buffer between
        if type(raw) is io.FileIO and raw.fileno() in (1, 2):
            stream.flush()
            outliving = OutlivingStream(raw.fileno(), "w", closefd=False)
            text = io.TextIOWrapper(
                outliving if raw is buffer else io.BufferedWriter(outliving), stream.encoding, stream.errors,
                line_buffering=stream.line_buffering, write_through=stream.write_through,
            )  # fmt: skip
            setattr(sys, name, text)


MESSAGES = {  # logger -> beginnings of messages that are left out
    # Said while peft loads bitsandbytes on CPUs. It concerns 4-bit products on CPUs, which no recipe has.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # The first lines of a run say on what it runs. (DeepSpeed sets its own level when it is imported: a filter stays.)
    "DeepSpeed": ("Setting accelerator to CPU",),
    # When a run is continued: a head that is tied to the embedding is saved once, and there as the embedding.
    "transformers.trainer": ("There were missing keys in the checkpoint model loaded: ['lm_head.weight'].",),
    # About the launcher's way of starting processes on Windows and macOS.
    "torch.distributed.elastic.multiprocessing.redirects": ("NOTE: Redirects are currently not supported",),
}
WARNINGS = {  # beginnings of warnings that are left out
    # From inductor. Matrix products run in the YAML's bf16; what is left in fp32 is meant to be.
    "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled": UserWarning,
    # From barriers of accelerate and transformers: each process has chosen its device long before.
    r"barrier\(\): using the device under current context": UserWarning,
    # transformers 5.23 renamed them. The versions before, which are taken here, too, and peft know the old names only.
    "`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated": FutureWarning,
}


class LeftOut(logging.Filter):
    """Leaves out warnings with these beginnings."""

    def __init__(self, beginnings: tuple[str, ...]):
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING or not record.getMessage().startswith(self.beginnings)


def quiet_libraries() -> None:
    """Filter what MESSAGES and WARNINGS name out of logs and warnings, unless PRETRAINING_VERBOSE is set."""
    if os.environ.get("PRETRAINING_VERBOSE"):
        return
    for name, beginnings in MESSAGES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, LeftOut) for known in logger.filters):
            logger.addFilter(LeftOut(beginnings))
    for beginning, category in WARNINGS.items():
        warnings.filterwarnings("ignore", message=beginning, category=category)


def one_line_for_ctrl_c() -> None:
    """End a process that Ctrl-C stops outside training with one line, not with a traceback; training saves first."""
    if os.environ.get("PRETRAINING_VERBOSE"):
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            before(kind, error, traceback)
        elif is_main_process():
            stopped = "stopped by Ctrl-C: what was finished is saved, and the same command continues"
            print(f"{stopped}{after_ctrl_c()}", file=sys.stderr)

    sys.excepthook = hook


def no_bars_while_training() -> None:
    """Switch off transformers' bars, of which every checkpoint shows one; those of downloads stay as they are."""
    if os.environ.get("PRETRAINING_VERBOSE"):
        return
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    downloads = not are_progress_bars_disabled()
    disable_progress_bar()
    if downloads:
        enable_progress_bars()
