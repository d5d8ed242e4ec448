"""How far long work is, and the time left: a bar in a terminal or a notebook, a line now and then elsewhere."""

import os
import sys
import time

from tqdm.auto import tqdm  # in a notebook that has widgets, the notebook's own bar
from tqdm.notebook import tqdm_notebook

from common.console import is_main_process, printable

SILENT_SECONDS = 2  # shorter work shows nothing
LINE_SECONDS = 30  # between two lines in a file
NARROW = 70  # columns of a terminal; below, there is no room for a bar
WIDE_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt}{unit}, {remaining} left"
SHARE_BAR = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left"  # where only a share is known
NARROW_BAR = "{percentage:3.0f}%, {remaining} left, {desc}"  # what does not fit is cut off at the end
WITHOUT_TOTAL = "{desc}: {n_fmt}{unit}, {elapsed}"


def shows_bars() -> bool:
    """Whether a bar can be seen: in a notebook, or where stderr is a terminal that has a width."""
    return in_notebook() or terminal_columns() > 0


def in_notebook() -> bool:
    """Whether this process is a notebook's, and the notebook can show bars (ipywidgets)."""
    return issubclass(tqdm, tqdm_notebook)


def terminal_columns() -> int:
    """Return the width of the terminal that stderr is; 0 if it is none, or does not say."""
    return os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else 0


class Progress:
    """How far some work is, on the main process. A context manager::

    with Progress("tokenizing", total_bytes, "B") as progress:
        progress.update(len(chunk))
    """

    def __init__(self, what: str, total: float | None, unit: str, already: float = 0):
        """Begin the work.

        Args:
            total: in ``unit``; None or 0 if it is not known, and then the time left is not known.
            unit: "B", " tokens" ... "%" for shares, of a ``total`` of 100.
            already: how much of ``total`` was done before.
        """
        self.what, self.total, self.unit = printable(what), total if total else None, unit
        self.done, self.already, self.began = already, already, time.monotonic()
        self.next_line = self.began + LINE_SECONDS
        self.bar: tqdm | None = None
        if is_main_process() and shows_bars():
            wide = SHARE_BAR if unit == "%" else WIDE_BAR
            layout = NARROW_BAR if 0 < terminal_columns() < NARROW else wide
            self.bar = tqdm(
                desc=self.what, total=self.total, unit=unit, unit_scale=True, initial=already, delay=SILENT_SECONDS,
                mininterval=0.5, dynamic_ncols=True, bar_format=layout if self.total else WITHOUT_TOTAL,
            )  # fmt: skip

    def update(self, count: float) -> None:
        """Say that ``count`` more is done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif is_main_process() and time.monotonic() >= self.next_line:
            seconds = time.monotonic() - self.began
            line = progress_line(self.what, self.done, self.total, self.unit, seconds, self.already)
            print(line, file=sys.stderr, flush=True)
            self.next_line = time.monotonic() + max(LINE_SECONDS, seconds / 20)  # of a day, not thousands of lines

    def reach(self, done: float) -> None:
        """Say that ``done`` of the total is done. More than the total, of what is read twice, counts as the total."""
        if self.total is not None:
            done = min(done, self.total)
        self.update(done - self.done)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is None:
            return
        if not in_notebook():  # a line above it has drawn a bar that closing takes for one that was never seen
            self.bar.clear()
        self.bar.close()


def progress_line(what: str, done: float, total: float | None, unit: str, seconds: float, already: float = 0) -> str:
    """Return how far work is that began ``seconds`` ago: "tokenizing: 25%, 250M of 1.00GB, 01:30 left"."""
    if total is None:
        return f"{what}: {tqdm.format_sizeof(done)}{unit}, {tqdm.format_interval(seconds)}"
    sizes = "" if unit == "%" else f"{tqdm.format_sizeof(done)} of {tqdm.format_sizeof(total)}{unit}, "
    made = done - already
    left = tqdm.format_interval(round(seconds / made * (total - done))) if made else "?"
    return f"{what}: {done / total:.0%}, {sizes}{left} left"
