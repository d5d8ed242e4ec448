"""The order of training: which row stands at every position of the whole run, over all passes and sources."""

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from torch.utils.data import Sampler
from transformers import TrainingArguments

from common.console import InputError, say
from common.dataset.packing import IGNORED_ROW, JoinedRows

CHUNK_POSITIONS = 1 << 16  # computed at once
FEW_STEPS = 100  # a run with fewer gets a warning
LONGEST_PERIOD = 100_000  # positions after which a mixture repeats its turns


class TrainingOrder(Sampler):
    """The row at every position of the whole run. Resuming is a seek: set ``first_position`` and iterate.

    Without weights, all rows are one set: pass after pass, each shuffled by (seed, pass); a step may span two passes.
    With weights, each source is such a set of its own, and they take turns: a small source begins its next pass while
    a large one is still in its first.

    Attributes:
        rows_per_pass: rows of all sources.
        first_step, first_position: steps and rows that are done when iteration begins.
        rows_in_run: rows of the whole run, all passes: positions below it hold rows.
        begins_at: position at which this order begins. Above 0 in a branch whose order is not that of the run it
            leaves: the positions before it had that run's rows.
        taken: rows of each shuffled set that were trained on before ``begins_at``; the set continues after them.
        split_alone: as of JoinedRows.
        positions_in_run: ``rows_in_run``, and the ignored rows that complete the last step.
    """

    def __init__(self, rows: list[int], seed: int, weights: list[float] | None = None):
        """``rows`` of each source; a row's index counts through all of them."""
        self.source_rows, self.source_ends, self.weighted = rows, np.cumsum(rows), weights is not None
        self.set_rows = rows if self.weighted else [sum(rows)]  # each shuffled by itself
        if not all(self.set_rows):
            raise InputError(f"the sources have {self.set_rows} training rows: one without any cannot be mixed in.")
        self.rows_per_pass = sum(rows)
        self.seed = seed
        self.first_rows = np.cumsum([0, *self.set_rows])
        self.parts = np.array(whole_parts(weights, len(rows)) if self.weighted else [1])  # of a period
        self.turns = np.array(turns_of(self.parts.tolist()))  # (period,)
        # Of each turn in the period, how many turns of the same source come before it: shape (period,).
        earlier = (self.turns[:, None] == np.arange(len(self.parts))).cumsum(axis=0)
        self.earlier = earlier[np.arange(len(self.turns)), self.turns] - 1
        self.rows_per_step = 1
        self.first_step = self.first_position = self.rows_in_run = self.positions_in_run = 0
        self.begins_at, self.taken = 0, [0] * len(self.set_rows)
        self.split_alone = [True] * len(rows)
        self.rows_asked: int | None = None  # in all; None: whole steps, up to --max_steps
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def rows_elsewhere(self) -> int:
        """Rows of the run that are not counted as rows of these sources: those of the run that a branch has left."""
        return self.begins_at - sum(self.taken)

    def passes_at(self, position: int) -> float:
        """Return how many passes over the rows are done at ``position``."""
        return (position - self.rows_elsewhere) / self.rows_per_pass

    def begin_at(self, step: int, position: int, training: TrainingArguments) -> None:
        """Begin iteration at ``position``, with which the step after ``step`` begins, and set ``training.max_steps``.

        The two belong together as step x rows_per_step, unless a run that ended with a partial step is continued.

        Raises:
            InputError: more has been done than is asked for.
        """
        if self.rows_asked is None:
            rows = position + (training.max_steps - step) * self.rows_per_step
        else:
            rows = self.rows_asked + self.rows_elsewhere
            training.max_steps = step + math.ceil((rows - position) / self.rows_per_step)
        if training.max_steps < step or rows < position:
            raise InputError(
                f"the run that {training.output_dir} continues has made {step} steps = {position} rows, more than "
                "is asked for now. Ask for at least as many, choose another --output_dir, or leave the run earlier: "
                "--branch_from one of its checkpoints."
            )
        self.first_step, self.first_position, self.rows_in_run = step, position, rows
        self.positions_in_run = position + (training.max_steps - step) * self.rows_per_step

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.first_step + (self.positions_in_run - self.first_position) // self.rows_per_step

    def position_after(self, step: int) -> int:
        """Return how many rows are trained on when ``step`` steps are made, over all processes and passes."""
        return min(self.first_position + (step - self.first_step) * self.rows_per_step, self.rows_in_run)

    def rows_of_step(self, step: int) -> np.ndarray:
        """Return the rows of the step with the number ``step``, from 1; ignored ones complete it: (rows_per_step,)."""
        positions = np.arange(self.position_after(step - 1), self.position_after(step))
        ignored = np.full(self.rows_per_step - len(positions), IGNORED_ROW)
        return np.concatenate([self.rows_at(positions), ignored])

    def __len__(self) -> int:
        """The whole run, steps before ``first_position`` included: Trainer counts so."""
        return self.steps * self.rows_per_step

    def __iter__(self) -> Iterator[int]:
        for first in range(self.first_position, self.rows_in_run, CHUNK_POSITIONS):
            yield from self.rows_at(np.arange(first, min(first + CHUNK_POSITIONS, self.rows_in_run))).tolist()
        yield from [IGNORED_ROW] * (self.positions_in_run - max(self.first_position, self.rows_in_run))

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows at ``positions`` (rising, from ``begins_at`` on), shape (positions,)."""
        period, turn = np.divmod(positions - self.begins_at, len(self.turns))
        sources = self.turns[turn]
        of_source = np.array(self.taken)[sources] + period * self.parts[sources] + self.earlier[turn]
        passes, places = np.divmod(of_source, np.array(self.set_rows)[sources])
        rows = np.empty_like(positions)
        for source in np.unique(sources):
            for epoch in np.unique(passes[sources == source]):
                here = (sources == source) & (passes == epoch)
                rows[here] = self.first_rows[source] + self._permutation(int(source), int(epoch))[places[here]]
        return rows

    def rows_by_source(self, position: int) -> list[int]:
        """Return how many of the rows before ``position`` are of each source, without ``rows_elsewhere``."""
        if self.weighted:
            period, turn = divmod(position - self.begins_at, len(self.turns))
            turns = period * self.parts + np.bincount(self.turns[:turn], minlength=len(self.parts))
            return (self.taken + turns).tolist()
        passes, rest = divmod(position - self.rows_elsewhere, self.rows_per_pass)
        pass_rows = self._permutation(0, passes)[:rest]
        begun = np.searchsorted(self.source_ends, pass_rows, side="right")
        return (passes * np.array(self.source_rows) + np.bincount(begun, minlength=len(self.source_rows))).tolist()

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        known, permutation = self._permutations.get(source, (None, None))
        if known != epoch:
            key = [self.seed, epoch, source] if source else [self.seed, epoch]
            permutation = np.random.default_rng(key).permutation(self.set_rows[source])
            self._permutations[source] = epoch, permutation
        return permutation


def training_order(
    rows: JoinedRows, training: TrainingArguments, rows_per_step: int, rows_before: int = 0
) -> TrainingOrder:
    """Return the order of a run from its first step, and set ``training.max_steps`` where it is open.

    Args:
        rows_before: rows at the beginning of the order that the run of --init_from was trained on.

    Raises:
        InputError: the flags ask for no row, or for none after ``rows_before``.
    """
    seed = training.seed if training.data_seed is None else training.data_seed
    order = TrainingOrder([len(source) for source in rows.sources], seed, rows.weights)
    order.rows_per_step, order.split_alone = rows_per_step, rows.split_alone
    asked = rows_asked_for(training, rows_per_step, len(rows))
    if training.max_steps <= 0:
        order.rows_asked = asked
        if rows_before >= asked:
            raise InputError(
                f"--init_from: its run was trained on {rows_before:,} rows, and {asked:,} are asked for in all. "
                "Ask for more: --num_train_epochs, or --max_steps, which counts from here."
            )
    order.begin_at(0, rows_before, training)
    if rows_before == 0 and training.max_steps < FEW_STEPS:
        say(_few_steps(order, training, rows.context_length))
    return order


def _few_steps(order: TrainingOrder, training: TrainingArguments, context_length: int) -> str:
    """Return how few steps the run has, and the flags that give FEW_STEPS. Asked for in steps, it is only a note."""
    if order.rows_asked is None:
        return (
            f"note: --max_steps {training.max_steps}: {order.rows_in_run:,} rows, "
            f"{order.passes_at(order.rows_in_run):.2g} passes over the text. In fewer than {FEW_STEPS} steps little is "
            "learnt. For a whole pass: --max_steps -1 --num_train_epochs 1."
        )
    passes = math.ceil(training.num_train_epochs * FEW_STEPS / training.max_steps)
    ways = [f"--num_train_epochs {passes}", "more text"]
    rows_per_step = order.rows_in_run // FEW_STEPS
    if rows_per_step > 0:
        rows_per_step = 2 ** int(math.log2(rows_per_step))  # a power of two can be divided among processes
        ways.insert(0, f"--tokens_per_step {rows_per_step * context_length}")
    steps = f"{training.max_steps} step{'s' * (training.max_steps > 1)}"
    return (
        f"warning: the run has only {steps} of {order.rows_per_step:,} rows: {order.rows_in_run:,} rows of "
        f"{context_length:,} tokens in {training.num_train_epochs:g} passes. With so few, the learning rate hardly "
        f"leaves its warmup, and little is learnt. {FEW_STEPS} steps or more: {', or '.join(ways)}."
    )


def rows_asked_for(training: TrainingArguments, rows_per_step: int, rows: int) -> int:
    """Return how many rows ``--max_steps`` or, without it, ``--num_train_epochs`` passes over ``rows`` are.

    Raises:
        InputError: the flags ask for no row.
    """
    asked = training.max_steps * rows_per_step
    if training.max_steps < 0:
        asked = round(training.num_train_epochs * rows)
    if asked < 1:
        raise InputError(
            f"--max_steps {training.max_steps} with --num_train_epochs {training.num_train_epochs} trains on no row of "
            f"{rows:,}. Ask for at least one."
        )
    return asked


def whole_parts(weights: list[float], sources: int) -> list[int]:
    """Return ``weights`` as the smallest whole numbers of the same proportions: [0.7, 0.2, 0.1] as [7, 2, 1].

    If these add up to more than LONGEST_PERIOD, they are rounded to that period, and a note says so.
    """
    if len(weights) != sources:
        raise InputError(f"--data_weights gives {len(weights)} weights for {sources} sources. Give one for each.")
    for weight in weights:
        if not 0 < weight < math.inf:
            raise InputError(f"--data_weights {weight}: must be above 0. To leave a source out, do not name it.")
    exact = [Fraction(str(weight)) for weight in weights]  # 0.7 is meant as 7/10, not as its binary neighbour
    parts = [int(weight * math.lcm(*(weight.denominator for weight in exact))) for weight in exact]
    parts = [part // math.gcd(*parts) for part in parts]
    if sum(parts) > LONGEST_PERIOD:
        parts = [round(weight / sum(exact) * LONGEST_PERIOD) for weight in exact]
        if not all(parts):
            raise InputError(f"--data_weights {weights}: the smallest is less than 1 in {LONGEST_PERIOD:,}. Raise it.")
        say(f"note: --data_weights are used as {parts}")
    return parts


def turns_of(parts: list[int]) -> list[int]:
    """Return whose turn it is at each of ``sum(parts)`` positions, after which the turns repeat.

    Example: [2, 1] gives [0, 1, 0]. Among the first n positions, for every n, no source is a whole row away from its
    share of n. Among the sources with less than their share, the one whose next row is due first has the turn.

    Source: Baruah et al., "Proportionate progress: a notion of fairness in resource allocation", 1996,
        https://doi.org/10.1007/BF01940883 (on one processor, where the earliest deadline suffices)
    """
    period, counts, turns = sum(parts), [0] * len(parts), []
    for position in range(1, period + 1):
        late = [source for source, part in enumerate(parts) if counts[source] * period < position * part]
        turn = min(late, key=lambda source: -(-(counts[source] + 1) * period // parts[source]))
        turns.append(turn)
        counts[turn] += 1
    return turns
