"""What asks a run to stop or to save: signals, a launcher that died, the clock of a notebook with a time limit.

A request is noticed at once. All processes act on it at the end of the same step. What launchers pass on:
``accelerate launch`` of one process dies of SIGTERM and leaves the recipe an orphan, which stops, too. torchrun passes
SIGTERM and SIGINT on, and kills after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (30). PET_SIGNALS_TO_HANDLE adds SIGUSR1.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from transformers import TrainerCallback

from common.console import InputError, after_ctrl_c, is_main_process, say, what_follows
from common.distributed.accelerator import pins_memory
from common.run.folder import Run
from common.train.step_guard import BAD_STEPS_FILE, StepGuard

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # Slurm's --signal sends the last; Windows lacks it
SHOWN = {"SIGINT": "Ctrl-C"}  # what people call it
ORPHANED = "its launcher died"
# A terminal and a launcher both pass Ctrl-C on: signals so soon after the first are the same request.
ECHO_SECONDS = 2


class EvaluationStopped(Exception):
    """A signal came during an evaluation."""


class Interruption(TrainerCallback):
    """End training after the current step, with a checkpoint, when any process was asked to; save when it is time.

    A second signal exits at once, and the run keeps what the last checkpoint holds.
    """

    def __init__(self, save_minutes: float | None = None, launched: bool = False):
        """``save_minutes``: save at least so often. ``launched``: this process has a launcher, which may die."""
        self.save_minutes = save_minutes
        self.received: str | None = None  # by this process
        self.agreed: str | None = None  # by all of them
        self.save_due = False
        self.save_failed = False  # that of a checkpoint written in the background, on any process
        self.before_leaving: Callable[[], None] | None = None  # set when training is over and in a checkpoint
        self._saved_at = time.monotonic()
        self._handlers: dict = {}
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

    def wishes(self, save_failed: bool = False) -> list[float]:
        """Return what this process was asked to do, for ``agree``: 1.0 for each of NAMES, an orphan, a save.

        ``save_failed``: a checkpoint could not be written in the background. It comes last.
        """
        if self._parent is not None and self.received is None and os.getppid() != self._parent:
            self.received = ORPHANED
        due = is_main_process() and self.save_minutes and time.monotonic() - self._saved_at > 60 * self.save_minutes
        return [float(self.received == name) for name in (*NAMES, ORPHANED)] + [float(bool(due)), float(save_failed)]

    def wishes_on(self, device: torch.device, save_failed: bool = False) -> torch.Tensor:
        """Return ``wishes`` on a device. Where memory can be pinned, the copy waits for nothing there."""
        pinned = pins_memory(device)
        return torch.tensor(self.wishes(save_failed), pin_memory=pinned).to(device, non_blocking=pinned)

    def check_evaluation(self, device: torch.device, processes: int) -> None:
        """Raise EvaluationStopped, on all processes, if one of them was asked to end."""
        wishes = self.wishes_on(device)
        if processes > 1:
            torch.distributed.all_reduce(wishes)
        self.agree(wishes.tolist())
        if self.agreed is not None:
            raise EvaluationStopped

    def agree(self, sums: list[float]) -> None:
        """Take over the ``wishes`` of all processes, summed."""
        *stops, save, failed = sums
        self.agreed = next((name for name, wished in zip((*NAMES, ORPHANED), stops, strict=True) if wished), None)
        self.save_due, self.save_failed = save > 0, failed > 0

    @property
    def exit_status(self) -> int:
        """128 + the number of the signal, as shells have it: 143 after SIGTERM and for an orphan, 130 after SIGINT."""
        return 128 + getattr(signal, self.agreed if self.agreed in NAMES else "SIGTERM")

    def on_train_begin(self, args, state, control, **kwargs):
        self._saved_at = time.monotonic()
        self.listen()

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed is not None:
            say(f"{SHOWN.get(self.agreed, self.agreed)}: saving step {state.global_step} and ending")
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # whoever sent the signal may not wait that long
        control.should_save |= self.save_due

    def on_save(self, args, state, control, **kwargs):
        self._saved_at = time.monotonic()


@contextmanager
def session(run: Run, interruption: Interruption, guard: StepGuard) -> Iterator[None]:
    """Around training: record in ``status.json`` how it ended, and leave the process as whoever stopped it expects.

    Raises:
        SystemExit: a signal ended the training; all is saved.
        InputError: the guard ended it; all is saved.
    """
    try:
        yield
    except EvaluationStopped:  # before the first step: there is nothing to save
        pass
    except BaseException as error:
        run.write_status("failed", f"{type(error).__name__}: {error}")
        interruption.release()
        raise
    if interruption.agreed is not None:
        run.write_status("interrupted", interruption.agreed)
        interruption.release()
        saved = "saved; the same command continues" if run.saved_step() == run.step else f"not saved; {run.way_back()}"
        after = after_ctrl_c() if interruption.agreed == "SIGINT" else what_follows()
        say(f"{SHOWN.get(interruption.agreed, interruption.agreed)}: step {run.step} is {saved}{after}")
        raise SystemExit(interruption.exit_status)
    if guard.stop is not None:
        run.write_status("failed", guard.stop)
        interruption.release()
        raise InputError(f"stopped at step {run.step}: {guard.stop}.\n{_advice(run, guard)}")
    interruption.before_leaving = partial(run.write_status, "interrupted", "a signal after the last step")


def _advice(run: Run, guard: StepGuard) -> str:
    """Return how to go on after the guard ended the run."""
    rows = f"{run.folder}/{BAD_STEPS_FILE} has the rows of the bad steps, and which were left out."
    change = "A lower --learning_rate, or other data, needs another --output_dir."
    if guard.not_saved is None:
        return f"All is saved; {rows} The same command continues after them. {change}"
    return (
        f"Nothing of it is saved. What was saved before is kept, and its weights are finite: {run.way_back()}. {rows} "
        f"If the same steps end it again, --max_bad_steps lets more of them be left out. {change}"
    )
