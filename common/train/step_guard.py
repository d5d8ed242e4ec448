"""Bad numbers: a step whose loss or gradient is not finite is left out, one whose loss jumps is noticed.

Judged on the host, before the optimizer's step, from the loss and gradient norm of all processes, which are read once
an optimizer step: the one wait for the device in the training loop.

Sources: leaving a step out, and 6 deviations over a window of 128 steps, of which 64 must be there: SkipStepOptimizer,
https://github.com/allenai/OLMo-core/blob/main/src/olmo_core/optim/skip_step_optimizer.py. Ours are robust, so that a
spike does not hide the next one: the modified z-score, 0.6745 (x - median) / MAD, of Iglewicz and Hoaglin, "How to
Detect and Handle Outliers", 1993, as in https://www.itl.nist.gov/div898/handbook/eda/section3/eda35h.htm
"""

import json
import math
import statistics
from collections import deque
from pathlib import Path

import numpy as np

from common.console import InputError
from common.dataset.mixture import IGNORED_ROW
from common.dataset.packing import JoinedRows

WINDOW_STEPS, LEAST_STEPS, SPIKE_DEVIATIONS = 128, 64, 6.0
ROWS_SHOWN = 3
FP16_HALVINGS = 16  # fp16's scaler starts at 2**16 and may leave out so many steps until it has come down


class StepGuard:
    """Judges one step after the other; the same on every process, because all are given the same numbers."""

    def __init__(self, on_loss_spike: str, max_bad_steps: int, scaled: bool = False):
        """
        Args:
            on_loss_spike: warn, skip or stop.
            max_bad_steps: left out in a row; one more ends the run.
            scaled: fp16's scaler is at work, which leaves out steps to find its scale.
        """
        self.on_loss_spike, self.scaled = on_loss_spike, scaled
        self.max_bad_steps = max_bad_steps + (FP16_HALVINGS if scaled else 0)
        self.losses: deque[float] = deque(maxlen=WINDOW_STEPS)  # finite ones, of the last steps
        self.left_out = self.in_a_row = self.spikes = 0
        self.since_log: list[float] = []  # losses of the steps that were made since the last log
        self.left_out_since_log = 0
        self.stop: str | None = None  # why the run must end

    def judge(self, loss: float, grad_norm: float, made: bool = False) -> tuple[bool, str | None]:
        """Return whether to make the step, and what is wrong with it, None if nothing is.

        Args:
            grad_norm: a negative one is DeepSpeed's way to say that it is not finite.
            made: the step has been made already, so that a spike can no longer be left out.
        """
        problem, make = None, True
        if not math.isfinite(loss) or not 0 <= grad_norm < math.inf:
            problem, make = f"loss {loss}, gradient norm {grad_norm}", False
        elif (deviations := robust_z_score(loss, self.losses)) > SPIKE_DEVIATIONS:
            problem = f"loss {loss:.4f} is {deviations:.1f} deviations above the median of {len(self.losses)} steps"
            make = made or self.on_loss_spike == "warn"
            self.spikes += 1
            if self.on_loss_spike == "stop":
                self.stop = problem
        if math.isfinite(loss):
            self.losses.append(loss)
        self.in_a_row = 0 if make else self.in_a_row + 1
        self.left_out += not make
        self.left_out_since_log += not make
        if make:
            self.since_log.append(loss)
        if self.in_a_row > self.max_bad_steps:
            self.stop = f"{self.in_a_row} bad steps in a row, the last: {problem}"
        return make, problem

    def logged(self) -> dict[str, float]:
        """Return what a log must say of steps left out since the last one: {} if there were none."""
        made, left_out = self.since_log, self.left_out_since_log
        self.since_log, self.left_out_since_log = [], 0
        if not left_out:
            return {"steps_left_out": self.left_out} if self.left_out else {}
        return {"loss": sum(made) / len(made) if made else math.nan, "steps_left_out": self.left_out}

    def state(self) -> dict:
        """Return what a checkpoint must hold, as JSON types."""
        return {"losses": [*self.losses], "left_out": self.left_out, "spikes": self.spikes, "in_a_row": self.in_a_row}

    def load(self, state: dict) -> None:
        """Go on from what ``state`` returned."""
        self.losses.extend(state["losses"])
        self.left_out, self.spikes, self.in_a_row = state["left_out"], state["spikes"], state["in_a_row"]


def robust_z_score(value: float, window: deque[float] | list[float]) -> float:
    """Return how many deviations ``value`` is above the median of ``window``; 0 for a window too short or constant."""
    if len(window) < LEAST_STEPS:
        return 0.0
    median = statistics.median(window)
    deviation = statistics.median(abs(known - median) for known in window) / 0.6745
    return (value - median) / deviation if deviation else 0.0


def read_guard(path: Path) -> dict:
    """Return what a checkpoint holds of the guard."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        counts = [state[name] for name in ("left_out", "spikes", "in_a_row")]
        if not all(type(count) is int for count in counts) or not all(type(loss) is float for loss in state["losses"]):
            raise ValueError("numbers that are none")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}). Remove its checkpoint, to continue from one before.") from None
    return state


def name_rows(rows: JoinedRows, indexes: list[int]) -> list[dict]:
    """Return source, row and documents (counted in that source from 0) of every row that is not an ignored one."""
    named = []
    for index in indexes:
        if index == IGNORED_ROW:
            continue
        source = int(np.searchsorted(rows.first_rows, index, side="right")) - 1
        row = index - int(rows.first_rows[source])
        packed = rows.sources[source]
        named.append({"source": packed.source, "row": row, "documents": packed.documents_of(row)})
    return named


def shown(named: list[dict]) -> str:
    """Return the first few of ``name_rows`` as text."""
    some = "; ".join(f"row {row['row']} of {row['source']}, documents {row['documents']}" for row in named[:ROWS_SHOWN])
    return f"Among {len(named)} rows: {some}" + (" ..." if len(named) > ROWS_SHOWN else "")
