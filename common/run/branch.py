"""--branch_from: a run that leaves another one at a checkpoint, and goes on with other flags in a folder of its own.

The first launch of a branch continues from the other run's checkpoint, as a relaunch there would: weights, optimizer,
random states and log. Flags may differ, and ``branch.json`` keeps what does. Later launches continue from the branch's
own checkpoints, and need the other run no more.

What the order of rows does:

- Documents, --data_weights, --keep_duplicates and seeds are the same: training goes on at the next row.
- Sources or weights differ: sources that are the first of --data in both runs, in the same order, continue after the
  rows that the other run took of them. All others begin at their first row. This takes a --data of one source, or one
  with --data_weights, in both runs: otherwise the sources have no order of their own.
- In all other cases a new order begins at its first row, and text may be trained on a second time. So it does if the
  other sources decide which document of a source is held out, because it has too few for the limit to do so.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments

from common.arguments import SharedArguments
from common.console import InputError, say
from common.dataset.mixture import TrainingOrder
from common.run.checkpoints import checkpoints, problem_of
from common.run.identity import RUN_FILE, changes, has_other_order, known_early, why_fixed

BRANCH_FILE = "branch.json"
HOW_IT_STARTED = ("data.init_from", "data.branch_from")  # of no consequence after a checkpoint
SOURCES = {"data.documents", "data.data_weights"}
HELD_OUT = {"data.documents", "data.keep_duplicates"}  # with these differ the held-out documents


@dataclass
class Branch:
    """Where a run leaves another one, and what differs from there on.

    Attributes:
        checkpoint: of the other run.
        step, position: steps made and rows trained on at the checkpoint.
        tokens: trained on there.
        begins_at, taken: of the order of rows; ``TrainingOrder`` says what they are.
        measured_from: step from which on evaluations are of the branch's held-out documents; 0 if both runs hold out
            the same ones.
        changed: dotted name in run.json, or "max_steps" -> (the other run's value, this run's).
    """

    checkpoint: str
    step: int
    position: int
    tokens: int
    begins_at: int
    taken: list[int]
    measured_from: int
    changed: dict[str, list]


def check_branch(recipe: str, shared: SharedArguments, training: TrainingArguments) -> None:
    """Refuse a branch that cannot be, judged by what is known before data and model are.

    Raises:
        InputError: the checkpoint is not whole or not of a run, is in --output_dir, or is of another model or recipe.
    """
    if not shared.branch_from or branch_started(training.output_dir):
        return
    checkpoint = Path(shared.branch_from)
    check_whole(shared.branch_from)
    if checkpoint.resolve().parent == Path(training.output_dir).resolve():
        raise InputError(
            f"--branch_from {checkpoint}: is in --output_dir. A branch needs a folder of its own: another --output_dir."
        )
    was, now = known_early(_read(checkpoint.parent / RUN_FILE), recipe, shared, training)
    _differing(shared.branch_from, was, now)


def check_whole(checkpoint: str) -> None:
    """Raise InputError if ``checkpoint`` is not a whole checkpoint of a run of these recipes."""
    path = Path(checkpoint)
    problem = problem_of(path) if path.is_dir() else "there is no such folder"
    if problem is None and not (path.parent / RUN_FILE).exists():
        problem = f"{path.parent} has no {RUN_FILE}; keep a checkpoint with the {RUN_FILE} of its run beside it"
    if problem is None:
        return
    there = [str(found) for folder in (path, path.parent) for _, found in checkpoints(folder)]
    those = f" There are {', '.join(there)}." if there else ""
    raise InputError(f"--branch_from {checkpoint}: {problem}. Give a whole checkpoint-N of a run.{those}")


def begin_branch(
    order: TrainingOrder, identity: dict, shared: SharedArguments, training: TrainingArguments
) -> Branch | None:
    """Make ``order`` that of a branch, print what differs, and return the branch; None without --branch_from.

    Sets ``training.max_steps`` where it is open: --num_train_epochs counts the passes over this run's rows.

    Raises:
        InputError: as ``check_branch``; or less is asked for than the other run has done.
    """
    if not shared.branch_from:
        return None
    if branch_started(training.output_dir):
        branch = Branch(**_read(Path(training.output_dir) / BRANCH_FILE))
        _begin(order, branch, training)
        return branch
    check_whole(shared.branch_from)
    state = _read(Path(shared.branch_from) / "trainer_state.json")
    branch = _new_branch(order, json.loads(json.dumps(identity)), state, shared)
    _begin(order, branch, training)
    if state["max_steps"] != training.max_steps:
        branch.changed["max_steps"] = [state["max_steps"], training.max_steps]
    return branch


def _begin(order: TrainingOrder, branch: Branch, training: TrainingArguments) -> None:
    if len(branch.taken) != len(order.taken):
        raise InputError(
            f"{training.output_dir} is a branch with {len(branch.taken)} sources, and these are {len(order.taken)}. "
            f"Leave it by a branch of its own: --branch_from {training.output_dir}/checkpoint-N --output_dir ANOTHER"
        )
    order.begins_at, order.taken = branch.begins_at, branch.taken
    order.begin_at(branch.step, branch.position, training)


def branch_started(folder: str) -> bool:
    """Whether a branch in ``folder`` has checkpoints of its own, or results: it needs the other run no more."""
    path = Path(folder)
    return (path / BRANCH_FILE).exists() and bool([*checkpoints(path), *path.glob("all_results.json")])


def _new_branch(order: TrainingOrder, identity: dict, state: dict, shared: SharedArguments) -> Branch:
    """``state``: of Trainer at the checkpoint."""
    checkpoint = Path(shared.branch_from)
    was = _read(checkpoint.parent / RUN_FILE)
    differing = _differing(shared.branch_from, was, identity)
    names = {name for name, _, _ in differing}
    tokens = [entry["tokens_seen"] for entry in state["log_history"] if "tokens_seen" in entry][-1]
    position = tokens // shared.context_length
    own = checkpoint.parent / BRANCH_FILE  # the other run may be a branch itself
    before = _read(own) if own.exists() else {"begins_at": 0, "taken": order.taken}
    say(f"branch: from {checkpoint}, after {state['global_step']:,} steps, {tokens:,} tokens")
    for name, old, new in differing:
        say(f"branch: {name} was {old!r}, and is {new!r} from here on")
    reordered = {change[0] for change in differing if has_other_order(*change)}
    if not reordered:
        begins_at, taken = before["begins_at"], before["taken"]
        say("branch: the order of rows is the same, and continues at the next row")
    else:
        begins_at, taken = position, [0] * len(order.taken)
        if not _split_is_kept(order, was["data"]["documents"], identity["data"]["documents"]):
            say(
                "warning: branch: so few documents are in both runs that the other ones decide which of them is held "
                "out. One that was trained on may be held out from here on. More text, the same --data, or another run "
                "with a larger --held_out_fraction avoids it."
            )
        elif reordered <= SOURCES:
            taken = _taken(order, was["data"], identity["data"], before, position)
        say(f"branch: the order of rows is new. {_start_of_sources(taken)}")
    return Branch(
        checkpoint=str(checkpoint),
        step=state["global_step"],
        position=position,
        tokens=tokens,
        begins_at=begins_at,
        taken=taken,
        measured_from=state["global_step"] if names & HELD_OUT else 0,
        changed={name: [old, new] for name, old, new in differing},
    )


def _differing(branch_from: str, was: dict, now: dict) -> list[tuple[str, object, object]]:
    """Return what differs between the other run and the branch.

    Raises:
        InputError: a checkpoint cannot be continued with some of it.
    """
    found = [change for change in changes(was, now) if change[0] not in HOW_IT_STARTED]
    reasons = {name: why_fixed(name, was, now) for name, _, _ in found}
    lines = [
        f"  {name}: {old!r} there, {new!r} here ({reasons[name]})"
        for name, old, new in found
        if reasons[name] is not None
    ]
    if lines:
        own = f" (its tokenizer: --tokenizer {branch_from})" if reasons.get("data.tokenizer") else ""
        raise InputError(
            f"--branch_from {branch_from}: a branch cannot differ in\n" + "\n".join(lines) + "\nUse the other run's "
            f"values{own}. --init_from continues from weights alone."
        )
    return found


def _split_is_kept(order: TrainingOrder, was: list[str], now: list[str]) -> bool:
    """Whether the documents that are in both runs are held out in both or in none; the arguments: of each source.

    They are if some of them are held out by the limit of their hash, and some are not.
    """
    in_both = [alone for source, alone in zip(now, order.split_alone, strict=True) if source in was]
    return was == now or not in_both or any(in_both)


def _taken(order: TrainingOrder, was: dict, now: dict, before: dict, position: int) -> list[int]:
    """Return how many rows of each source of ``order`` the other run has taken, where the source can continue.

    Args:
        was, now: the "data" of the two runs.
        before: "begins_at" and "taken" of the other run's order.
    """
    taken = [0] * len(order.taken)
    sources = len(was["documents"])
    weights = was["data_weights"]
    in_one_order = weights is None and sources > 1
    if in_one_order or len(taken) != len(now["documents"]):  # sources that are shuffled together
        return taken
    turns = TrainingOrder([1] * sources, 0, weights)  # the counts do not depend on the number of rows
    turns.begins_at, turns.taken = before["begins_at"], before["taken"]
    counts = turns.rows_by_source(position)
    for source, (old, new) in enumerate(zip(was["documents"], now["documents"], strict=False)):
        if old != new:
            break
        taken[source] = counts[source]
    return taken


def _start_of_sources(taken: list[int]) -> str:
    if not any(taken):
        return "It begins at its first row: text that was trained on may come again."
    parts = [
        f"source {number} after the {rows:,} rows that were trained on" if rows else f"source {number} at its first row"
        for number, rows in enumerate(taken, start=1)
    ]
    return f"Of --data continues {', '.join(parts)}."


def _read(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}). --branch_from needs it.") from None
