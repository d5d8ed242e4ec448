"""What asks a run to stop or to save: signals, a launcher that died, the clock of a time-limited notebook.

It is noticed at once and acted on at the end of the step, by all processes at the same one. What launchers pass on:
``accelerate launch`` of one process dies of SIGTERM and leaves the recipe an orphan, which stops, too; torchrun passes
SIGTERM and SIGINT on and kills after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (30); PET_SIGNALS_TO_HANDLE adds SIGUSR1.
"""

import os
import signal
import threading
import time
from collections.abc import Callable

from transformers import TrainerCallback

from common.console import is_main_process, say

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # Slurm's --signal sends the last; Windows lacks it
ORPHANED = "its launcher died"
# A terminal and a launcher both pass Ctrl-C on: signals so soon after the first are the same request.
ECHO_SECONDS = 2


class EvaluationStopped(Exception):
    """A signal came during an evaluation."""


class Interruption(TrainerCallback):
    """Ends training after the current step, with a checkpoint, when any process was asked to; saves when it is time.

    A second signal exits at once, with what the last checkpoint holds.
    """

    def __init__(self, save_minutes: float | None = None):
        """``save_minutes``: save at least so often."""
        self.save_minutes = save_minutes
        self.received: str | None = None  # by this process
        self.agreed: str | None = None  # by all of them
        self.save_due = False
        self.before_leaving: Callable[[], None] | None = None  # set when training is over and in a checkpoint
        self._saved_at = time.monotonic()
        self._handlers: dict = {}
        launched = any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))
        self._parent = os.getppid() if launched and os.name == "posix" else None

    def listen(self) -> None:
        """Handle the signals from now on."""
        if threading.current_thread() is threading.main_thread() and not self._handlers:
            numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
            self._handlers = {number: signal.signal(number, self._receive) for number in numbers}

    def release(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _receive(self, number: int, frame) -> None:
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, time.monotonic()
            if self.before_leaving is not None:  # nothing is lost by leaving here
                self.before_leaving()
                raise SystemExit(128 + number)
        elif time.monotonic() - self._received_at > ECHO_SECONDS:
            os._exit(128 + number)

    def wishes(self) -> list[float]:
        """Return what this process was asked to do, for ``agree``: 1.0 for each of NAMES, an orphan, a save."""
        if self._parent is not None and self.received is None and os.getppid() != self._parent:
            self.received = ORPHANED
        due = is_main_process() and self.save_minutes and time.monotonic() - self._saved_at > 60 * self.save_minutes
        return [float(self.received == name) for name in (*NAMES, ORPHANED)] + [float(bool(due))]

    def agree(self, sums: list[float]) -> None:
        """Take over the ``wishes`` of all processes, summed."""
        *stops, save = sums
        self.agreed = next((name for name, wished in zip((*NAMES, ORPHANED), stops, strict=True) if wished), None)
        self.save_due = save > 0

    @property
    def exit_status(self) -> int:
        """128 + the number of the signal, as shells have it: 143 after SIGTERM and for an orphan, 130 after SIGINT."""
        return 128 + getattr(signal, self.agreed if self.agreed in NAMES else "SIGTERM")

    def on_train_begin(self, args, state, control, **kwargs):
        self._saved_at = time.monotonic()
        self.listen()

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed is not None:
            say(f"{self.agreed}: saving step {state.global_step} and ending; the same command continues there")
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # whoever sent the signal may not wait that long
        control.should_save |= self.save_due

    def on_save(self, args, state, control, **kwargs):
        self._saved_at = time.monotonic()
