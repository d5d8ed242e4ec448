"""Bad steps: one whose loss or gradient is not finite is left out, one whose loss jumps is noticed.

Steps are judged on the host, before the optimizer's step, by the loss and the gradient norm of all processes. These are
read once an optimizer step: the only wait for the device in the training loop.

Sources: leaving a step out, and 6 deviations over a window of 128 steps of which 64 must be there: SkipStepOptimizer,
https://github.com/allenai/OLMo-core/blob/main/src/olmo_core/optim/skip_step_optimizer.py. Our deviations are robust, so
that a spike does not hide the next one: the modified z-score, 0.6745 (x - median) / MAD, of Iglewicz and Hoaglin, "How
to Detect and Handle Outliers", 1993, as in https://www.itl.nist.gov/div898/handbook/eda/section3/eda35h.htm
"""

import json
import math
import statistics
from collections import deque
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

from common.console import InputError, is_main_process, say
from common.dataset.packing import IGNORED_ROW, JoinedRows
from common.distributed.strategy import whole
from common.io import append_lines
from common.run.folder import Run

GUARD_FILE, BAD_STEPS_FILE = "guard.json", "bad_steps.jsonl"
WINDOW_STEPS, LEAST_STEPS, SPIKE_DEVIATIONS = 128, 64, 6.0
ROWS_SHOWN = 3
FP16_HALVINGS = 16  # fp16's scaler starts at 2**16, and may leave out one step for each halving


class StepGuard:
    """Judge one step after the other: the same way on every process, because all are given the same numbers."""

    def __init__(self, on_loss_spike: str, max_bad_steps: int, scaled: bool = False):
        """
        Args:
            on_loss_spike: warn, skip or stop.
            max_bad_steps: steps that may be left out in a row; one more ends the run.
            scaled: fp16's scaler is at work, and leaves out steps to find its scale.
        """
        self.on_loss_spike, self.scaled = on_loss_spike, scaled
        self.max_bad_steps = max_bad_steps + (FP16_HALVINGS if scaled else 0)
        self.losses: deque[float] = deque(maxlen=WINDOW_STEPS)  # finite ones, of the last steps
        self.left_out = self.in_a_row = self.spikes = 0
        self.since_log: list[float] = []  # losses of the steps that were made since the last log
        self.stop: str | None = None  # why the run must end
        self.not_saved: str | None = None  # why the newest checkpoint that was due is not written

    def judge(self, loss: float, grad_norm: float, made: bool = False) -> tuple[bool, str | None]:
        """Return whether to make the step, and what is wrong with it, None if nothing is.

        Args:
            grad_norm: DeepSpeed gives a negative norm for one that is not finite.
            made: the step has been made already, so that a spike cannot be left out any more.
        """
        problem, make = None, True
        if not math.isfinite(loss) or not 0 <= grad_norm < math.inf:
            problem, make = f"loss {loss}, gradient norm {grad_norm}", False
        else:
            deviations = robust_z_score(loss, self.losses)
            if deviations > SPIKE_DEVIATIONS:
                problem = f"loss {loss:.4f} is {deviations:.1f} deviations above the median of {len(self.losses)} steps"
                make = made or self.on_loss_spike == "warn"
                self.spikes += 1
                if self.on_loss_spike == "stop":
                    self.stop = problem
        if math.isfinite(loss):
            self.losses.append(loss)
        one_spike = self.stop is not None  # ends the run, and is no streak: the weights are those of the step before it
        self.in_a_row = 0 if make or one_spike else self.in_a_row + 1
        self.left_out += not make
        if make:
            self.since_log.append(loss)
        if self.in_a_row > self.max_bad_steps:
            self.stop = f"{self.in_a_row} bad steps in a row, the last: {problem}"
        return make, problem

    def logged(self) -> dict[str, float]:
        """Return what a log must say once a step was left out: {} before that.

        Trainer's own mean has the steps that were left out in it. After a NaN it is NaN for ever: it is reset by
        subtracting it from itself.
        """
        made, self.since_log = self.since_log, []
        if not self.left_out:
            return {}
        return {"loss": sum(made) / len(made) if made else math.nan, "steps_left_out": self.left_out}

    def state(self) -> dict:
        """Return what a checkpoint must hold, as JSON types."""
        return {"losses": [*self.losses], "left_out": self.left_out, "spikes": self.spikes, "in_a_row": self.in_a_row}

    def load(self, state: dict) -> None:
        """Continue from what ``state`` returned."""
        self.losses.extend(state["losses"])
        self.left_out, self.spikes, self.in_a_row = state["left_out"], state["spikes"], state["in_a_row"]


def not_worth_saving(model: torch.nn.Module, guard: StepGuard) -> str | None:
    """Return why no checkpoint may be made of ``model`` now, None if one may; the same on every process.

    The steps of a bad streak were left out, but the last step that was made may be what spoilt the model.
    """
    if guard.in_a_row:
        return f"the last {guard.in_a_row} steps were left out as bad"
    problem = weights_not_finite(model)
    if problem is not None:  # no later step makes them finite again
        guard.stop = problem
    return problem


def weights_not_finite(model: torch.nn.Module) -> str | None:
    """Return which weight has values that are not finite, None if none has; the same on every process."""
    names = [name for name in gather_object([own_weight_not_finite(model)]) if name is not None]
    return f"the weight {names[0]} has values that are not finite" if names else None


def own_weight_not_finite(model: torch.nn.Module) -> str | None:
    """Return the first weight with values that are not finite, None without one.

    Of a weight that is sharded, this process looks at its own part.
    """
    names, largest = [], []
    for name, parameter in model.named_parameters():
        own = getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3 keeps the part there
        own = own.to_local() if isinstance(own, DTensor) else own
        if own.is_floating_point() and own.numel():
            names.append(name)
            largest.append(torch.linalg.vector_norm(own, math.inf).float())  # NaN if any is; needs no second tensor
    if not largest:
        return None
    finite = torch.stack([value.to(largest[0].device) for value in largest]).isfinite().tolist()
    return next((name for name, good in zip(names, finite, strict=True) if not good), None)


def robust_z_score(value: float, window: deque[float] | list[float]) -> float:
    """Return how many deviations ``value`` is above the median of ``window``; 0 for a window too short or constant."""
    if len(window) < LEAST_STEPS:
        return 0.0
    median = statistics.median(window)
    deviation = statistics.median(abs(known - median) for known in window) / 0.6745
    return (value - median) / deviation if deviation else 0.0


def read_guard(path: Path) -> dict:
    """Return the state of the guard that a checkpoint holds."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        counts = [state[name] for name in ("left_out", "spikes", "in_a_row")]
        if not all(type(count) is int for count in counts) or not all(type(loss) is float for loss in state["losses"]):
            raise ValueError("a count or a loss is not a number")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}). Remove its checkpoint to continue from an earlier one.") from None
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


def sums_over_processes(
    losses: list[torch.Tensor], grad_norm: torch.Tensor | float | None, wishes: torch.Tensor, processes: int
) -> tuple[float, float, list[float]]:
    """Return the loss of a step, its gradient norm and the summed ``wishes`` of all processes, the same on each.

    Args:
        losses: of this process's micro-batches, scalars on its device.
        grad_norm: None from DeepSpeed without clipping, which counts as 0.
        wishes: numbers on the device.
    """
    loss = torch.stack(losses).sum().float()
    norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, dtype=torch.float32, device=loss.device)
    numbers = torch.cat([torch.stack([loss, whole(norm)]) / processes, wishes])
    if processes > 1:
        torch.distributed.all_reduce(numbers)
    loss, norm, *wishes = numbers.tolist()
    return loss, norm, wishes


def rows_of_bad_losses(rows: np.ndarray, losses: list[torch.Tensor], row_readers: int) -> list[int]:
    """Return the rows of the micro-batches whose loss is not finite; all rows of the step if every loss is finite.

    Then only the gradient is bad, or the loss is a spike, and any row may be the cause. Called by all processes.

    Args:
        rows: of the step over all processes, (rows_per_step,).
        losses: of this process's micro-batches.
        row_readers: processes, or groups that share their rows, that read rows of their own.
    """
    own = [not math.isfinite(loss) for loss in torch.stack(losses).tolist()]
    of_all = np.array(gather_object([own]))  # (processes, micro-batches)
    bad = of_all.reshape(row_readers, -1, len(own)).any(axis=1).T  # (micro-batches, readers)
    in_micro_batches = rows.reshape(*bad.shape, -1)
    chosen = in_micro_batches[bad] if bad.any() else in_micro_batches
    return chosen.ravel().tolist()


def report_bad_step(
    run: Run, step: int, problem: str, made: bool, figures: dict[str, float], named: list[dict]
) -> None:
    """Print which rows a bad step had, and keep all of them in ``bad_steps.jsonl``.

    Args:
        figures: loss and gradient norm, by name.
        named: the rows, from ``name_rows``.
    """
    action = "made" if made else "left out"
    say(f"step {step} {action}: {problem}. {shown(named)}; all in {BAD_STEPS_FILE}")
    if is_main_process():
        entry = {"step": step, "problem": problem, **{name: repr(value) for name, value in figures.items()}}
        if not run.claimed:  # such as a probe
            Path(run.folder).mkdir(parents=True, exist_ok=True)
        with run.writing(BAD_STEPS_FILE):
            append_lines(Path(run.folder) / BAD_STEPS_FILE, [entry | {"action": action, "rows": named}])


def report_bad_batches(
    dataset: JoinedRows, batches: list[tuple[float, int]], row_readers: int, batch_rows: int, prefix: str
) -> int:
    """Print which rows of an evaluation have a loss that is not finite; return how many batches have.

    Args:
        batches: (nats, targets) of the batches of all readers of rows, one reader after the other.
        batch_rows: rows of a batch.
    """
    bad = np.array([not math.isfinite(nats) for nats, _ in batches]).reshape(row_readers, -1).T  # (batches, readers)
    if bad.any():
        rows = np.arange(bad.size * batch_rows).reshape(*bad.shape, batch_rows)[bad].ravel()
        named = name_rows(dataset, [row for row in rows.tolist() if row < len(dataset)])
        say(f"{prefix}: {bad.sum()} of {bad.size} batches have a loss that is not finite. {shown(named)}")
    return int(bad.sum())
