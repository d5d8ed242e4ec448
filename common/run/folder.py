"""One output folder, one run: what the run is, who trains into it, where it stopped, whether it is finished.

    with open_run(identity, shared, training) as run:
        if results := run.finished(order): ...
        run.last_checkpoint(), run.save_checkpoint(...), run.write_status(...)

The folder is locked and checked when the run is opened, and given back when it is closed, whatever ends it.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from common.arguments import SharedArguments
from common.console import InputError, is_local_main_process, is_main_process, say
from common.dataset.mixture import TrainingOrder
from common.distributed.strategy import Strategy
from common.io import write_json
from common.run.branch import BRANCH_FILE, Branch, check_whole
from common.run.checkpoints import (
    UNFINISHED,
    begin_checkpoint,
    checkpoints,
    end_checkpoint,
    move_into,
    newest_whole,
    problem_of,
    prune_checkpoints,
    remove_unfinished,
    unfinished,
    why_not_written,
)
from common.run.disk import check_disk_space
from common.run.identity import RUN_FILE, check_changes, has_other_order, known_early
from common.run.lock import STATUS_FILE, lock_folder, write_status

RESULTS_FILE = "all_results.json"
# What a run writes under names that other software uses, too.
WRITTEN = [
    f"{PREFIX_CHECKPOINT_DIR}-*", UNFINISHED, RESULTS_FILE, "merged", "*.safetensors", "*config.json", "tokenizer.json",
    "README.md", "report.html",
]  # fmt: skip


class Run:
    """An output folder while this process trains into it. Processes other than the main one write nothing.

    Attributes:
        folder: the output folder.
        claimed: it is this run's. A probe or a benchmark claims nothing, and then no status is written.
        branch: where it leaves another run, with --branch_from.
        step, max_steps: of the training; ``write_status`` reports them.
        parameters: how many the model has (``parameter_report``), once there is a Trainer.
        language: of the labels in its report, as in ``labels``.
        eval_tasks: what --eval_tasks names.
    """

    def __init__(
        self,
        folder: str,
        on_save_error: str = "stop",
        branch: Branch | None = None,
        language: str = "en",
        timeout_seconds: float = 1800,
        eval_tasks: Sequence[str] = (),
    ):
        """Prepare to train into ``folder``.

        Args:
            on_save_error: "stop" or "continue", when the disk is full.
            timeout_seconds: how long processes wait for each other at the end of a save.
        """
        self.folder, self.on_save_error, self.branch, self.language = folder, on_save_error, branch, language
        self.timeout_seconds, self.eval_tasks = timeout_seconds, eval_tasks
        self.parameters: dict[str, int] = {}
        self.claimed = False
        self.step = self.max_steps = 0
        self._lock: FileLock | None = None
        self._saving: Future[str | None] | None = None  # the checkpoint that a thread writes; why it cannot, or None
        self._changed_identity: dict | None = None  # to be written when the checkpoint has been loaded
        self._unwritten: set[str] = set()  # names of files that a full disk had no room for

    def claim(self, identity: dict, allow_changes: Sequence[str] = ()) -> None:
        """Lock the folder and make it this run's, or check that it already is.

        Args:
            allow_changes: names, as the refusal gives them, of what may differ: a note says so, and run.json keeps it
                from ``accept_changes`` on.

        Raises:
            InputError: another process trains into it now; or another run's checkpoints or results are in it: every
                difference is named.
        """
        self._lock = lock_folder(self.folder)
        try:
            self._identify(json.loads(json.dumps(identity)), allow_changes)
            if is_main_process():
                remove_unfinished(self.folder)
        except BaseException:
            self.release()
            raise
        self.claimed = True

    def _identify(self, identity: dict, allow_changes: Sequence[str]) -> None:
        path = Path(self.folder) / RUN_FILE
        check_ours(self.folder)
        if path.exists() and worth_keeping(self.folder):
            changes = check_changes(self.folder, _read_json(path), identity, allow_changes)
            for name, was, now in changes:
                say(f"--allow_changes: {name} was {was!r}, and is {now!r} from here on")
            if changes:
                self._changed_identity = identity
            if any(has_other_order(*change) for change in changes):
                say("note: the rows are in another order from here on: some are trained on a second time, others later")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            if is_local_main_process():  # the folder may be each machine's own
                _write_identity(path, identity)
                (path.parent / BRANCH_FILE).unlink(missing_ok=True)  # of a launch that kept nothing else
                if self.branch is not None:
                    _write_identity(path.parent / BRANCH_FILE, asdict(self.branch))

    def accept_changes(self) -> None:
        """Write to run.json what --allow_changes has changed. Call this when the checkpoint has been loaded with it."""
        if self._changed_identity is not None and is_local_main_process():
            _write_identity(Path(self.folder) / RUN_FILE, self._changed_identity)
        self._changed_identity = None

    @property
    def measured_from(self) -> int:
        """Step from which on evaluations are of this run's held-out documents. Above 0 in branches with other ones."""
        return 0 if self.branch is None else self.branch.measured_from

    def release(self) -> None:
        """Give the folder back, when the checkpoint that is being written, if there is one, has come to its end."""
        if self._saving is not None:
            wait([self._saving])
            if self.save_failed:  # something else ends the run already
                say(f"{self.folder}: {self._saving.exception() or self._saving.result()}")
            self._saving = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def finished(self, order: TrainingOrder) -> dict | None:
        """Return the results of a run that made its steps or trained on its rows, else None.

        A run that is killed while it writes them leaves half a file of results: it is removed, and written again.
        """
        if not self.claimed:
            return None
        path = Path(self.folder) / RESULTS_FILE
        results, ledger = {}, {}
        if is_main_process() and path.exists():
            try:
                results = dict(json.loads(path.read_text(encoding="utf-8")))
                ledger = dict(results.get("ledger", {}))
            except (ValueError, TypeError, RecursionError):
                say(f"removing {path}: half-written when the run ended")
                path.unlink()
                results = {}
        rows_trained = ledger.get("rows_trained")
        wanted = order.rows_in_run - order.rows_elsewhere
        reached = results.get("steps") == order.steps or rows_trained == wanted
        [results] = broadcast_object_list([results if reached and "eval_loss" in results else None])
        if results and self.eval_tasks and "tasks" not in results:
            say(
                "note: the run is finished, so --eval_tasks are not measured. Measure its model: lm_eval --model hf "
                f"--model_args pretrained={self.folder} --tasks {','.join(self.eval_tasks)}"
            )
        return results

    def check_disk_space(
        self,
        parameters: int,
        strategy: Strategy,
        training: TrainingArguments,
        weight_bytes: int = 4,
        state_bytes: int = 8,
        merged_bytes: int = 0,
    ) -> None:
        """Raise InputError if this run's checkpoints and model do not fit the disk: ``check_disk_space`` says when."""
        check_disk_space(self.folder, parameters, strategy, training, weight_bytes, state_bytes, merged_bytes)

    def last_checkpoint(self) -> str | None:
        """Return the newest whole checkpoint, or None, the same on every process. The ones passed over are named.

        A branch that has none of its own yet begins with the one that it leaves its other run at.

        Raises:
            InputError: the main process has a checkpoint that this one does not see; or the other run's is gone.
        """
        found = newest_whole(self.folder) if is_main_process() else None
        [checkpoint] = broadcast_object_list([None if found is None else str(found)])
        if checkpoint is None and self.branch is not None:
            check_whole(self.branch.checkpoint)
            checkpoint = self.branch.checkpoint
        if checkpoint is not None and not Path(checkpoint).exists():
            raise InputError(f"{checkpoint} is not on this machine: --output_dir must be shared by all machines.")
        if checkpoint is not None:
            say(f"continuing from {checkpoint}")
        return checkpoint

    def saved_step(self) -> int | None:
        """Return the step of the newest whole checkpoint, None without one."""
        return max((step for step, path in checkpoints(self.folder) if problem_of(path) is None), default=None)

    def way_back(self) -> str:
        """Return the end of a message: from where the same command continues."""
        step = self.saved_step()
        if not Path(self.folder).is_dir():
            return "the same command continues from what is in it"
        if step is None and self.branch is not None:
            return f"the same command continues from {self.branch.checkpoint}"
        if step is None:
            return "no checkpoint is written yet, and the same command begins at the first step"
        return f"the same command continues from {Path(self.folder) / f'{PREFIX_CHECKPOINT_DIR}-{step}'}"

    @cached_property
    def group(self) -> torch.distributed.ProcessGroup | None:
        """The processes of the run, as a thread may use them: on CPUs. None if there is one process.

        All processes must ask for it at the same time, at first.
        """
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return None
        return torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_seconds))

    def _gather_aside(self, values: list) -> list:
        """Return the lists of all processes end to end, to all of them. A thread may call this."""
        if self.group is None:
            return values
        lists = [None] * torch.distributed.get_world_size(self.group)
        torch.distributed.all_gather_object(lists, values, group=self.group)
        return [value for each in lists for value in each]

    def save_checkpoint(
        self,
        step: int,
        write: Callable[[], list | None],
        collective: bool,
        keep: int | None,
        in_background: bool = False,
    ) -> None:
        """Save a checkpoint, whole or not at all, then remove the oldest beyond ``keep``.

        On a full disk stop or continue, as ``--on_save_error`` says.

        Args:
            write: writes this process's files into ``unfinished(folder, step)``, or returns functions that do.
            collective: whether ``write`` waits for other processes after it has begun to write.
            in_background: call the functions that ``write`` returns in a thread. Then ``end_save`` says how it ended.
        """
        self.end_save()
        problem, left = begin_checkpoint(self.folder, step, write, gather_object, collective)
        if problem is not None:
            self._not_written(problem)
            return
        many = self.group is not None  # made by all processes, before their threads need it
        device = torch.accelerator.current_device_index() if many and torch.accelerator.is_available() else None
        self._saving = Future()
        work = partial(self._end_checkpoint, step, left, keep, device, self._saving)
        if in_background:
            threading.Thread(target=work, name=f"saving step {step}").start()
        else:
            work()
            self.end_save()

    def _end_checkpoint(
        self, step: int, left: list, keep: int | None, device: int | None, saving: Future[str | None]
    ) -> None:
        """Write what is left of a checkpoint, finish it and prune; ``saving`` gets why that failed, or None."""
        try:
            if device is not None:
                torch.accelerator.set_device_index(device)  # a thread begins with the first one
            problem = end_checkpoint(self.folder, step, left, self._gather_aside)
            if problem is None and is_main_process():
                prune_checkpoints(self.folder, keep)
            saving.set_result(problem)
        except BaseException as error:  # of a thread, which nobody else would hear of
            saving.set_exception(error)

    @property
    def save_failed(self) -> bool:
        """Whether the checkpoint that was written in the background has failed, and ``end_save`` would say so."""
        saving = self._saving
        return saving is not None and saving.done() and (saving.exception() or saving.result()) is not None

    def end_save(self) -> None:
        """Wait for the checkpoint that is being written, if there is one. All processes must call this together.

        Raises:
            InputError: it could not be written, and --on_save_error says to stop.
        """
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        problem = saving.result()
        if problem is not None:
            self._not_written(problem)

    def _not_written(self, problem: str, needed: bool = False) -> None:
        """End the run for ``problem``, from ``why_not_written``; or say it, if --on_save_error says to continue."""
        gone = not Path(self.folder).is_dir()  # and with it the lock; going on would make a folder that nobody knows
        if needed or gone or self.on_save_error == "stop":
            raise InputError(f"{self.folder}: {problem}; {self.way_back()}.")
        say(f"{self.folder}: {problem}. Training goes on, as --on_save_error says; {self.way_back()}.")

    def save_model(self, write: Callable[[str], None], wait_for_everyone: Callable[[], None]) -> None:
        """Save the model of the run's end with all processes: written aside, then moved, file by file."""
        aside = unfinished(self.folder, "model")
        try:
            with self.writing("the model", needed=True):
                write(str(aside))
        except InputError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        wait_for_everyone()
        if is_main_process():
            move_into(aside, Path(self.folder))
        wait_for_everyone()

    @contextmanager
    def writing(self, what: str, needed: bool = False) -> Iterator[None]:
        """Around writing ``what``: a disk that fails ends the run, or is noted once, by ``--on_save_error``.

        ``needed``: it belongs to the run's end, after which there is nothing to continue.
        """
        try:
            yield
        except Exception as error:  # any that is not about a file is raised again
            problem = why_not_written(error, self.folder, f"writing {what}")
            if problem is None:
                raise
            if needed or what not in self._unwritten or self.on_save_error == "stop":
                self._not_written(problem, needed)
            self._unwritten.add(what)

    def write_status(self, state: str, reason: str | None = None) -> None:
        """Write ``status.json``, if the folder is claimed: ``state`` as the function of this name has it."""
        if not (self.claimed and is_main_process()):
            return
        try:
            write_status(self.folder, state, self.step, self.max_steps, reason)
        except OSError as error:  # such as a full disk: what is being done about it matters more than this file
            if STATUS_FILE not in self._unwritten:
                say(f"note: {STATUS_FILE} cannot be written ({error})")
            self._unwritten.add(STATUS_FILE)


@contextmanager
def open_run(
    identity: dict, shared: SharedArguments, training: TrainingArguments, branch: Branch | None = None
) -> Iterator[Run]:
    """Open the run of ``training.output_dir``, and close it however the block ends. A probe claims nothing.

    Args:
        branch: where it leaves another run, from ``begin_branch``.

    Raises:
        InputError: the folder is another run's, or in use; ``Run.claim`` says when.
    """
    tasks = shared.eval_tasks or []
    run = Run(training.output_dir, shared.on_save_error, branch, shared.language, training.ddp_timeout, tasks)
    if not shared.probe:
        with training.main_process_first(desc="run folder"):
            run.claim(identity, shared.allow_changes)
    try:
        yield run
    finally:
        run.release()


def _write_identity(path: Path, identity: dict) -> None:
    try:
        write_json(path, identity, durable=True)
    except OSError as error:
        problem = why_not_written(error, path.parent, f"writing {path.name}")
        if problem is None:
            raise
        raise InputError(f"{path.parent}: {problem}, or choose another --output_dir.") from None


def check_folder(folder: str, recipe: str, shared: SharedArguments, training: TrainingArguments) -> str:
    """Return what ``folder`` holds of this run, judged by what is known before data and model are.

    Raises:
        InputError: another recipe's run, or one with other flags, is in it.
    """
    path = Path(folder) / RUN_FILE
    check_ours(folder)
    steps = [step for step, _ in checkpoints(folder)]
    if not path.exists() or not worth_keeping(folder):
        return f"{folder}, a new run"
    was, now = known_early(_read_json(path), recipe, shared, training)
    check_changes(folder, was, now, shared.allow_changes)
    return f"{folder}, " + (f"to be continued from step {steps[-1]}" if steps else "with results")


def worth_keeping(folder: str) -> bool:
    """Whether ``folder`` holds checkpoints or results of a run."""
    return bool(checkpoints(folder)) or (Path(folder) / RESULTS_FILE).exists()


def check_ours(folder: str) -> None:
    """Raise InputError if ``folder`` holds what a run would write over, and no run of these recipes wrote it.

    Every run writes its run.json before anything else.
    """
    path = Path(folder)
    if (path / RUN_FILE).exists():
        known = _read_json(path / RUN_FILE)
        if not isinstance(known, dict) or "recipe" not in known:
            raise InputError(f"{path / RUN_FILE}: not of a run of these recipes. Choose another --output_dir.")
        return
    found = sorted(file.name for pattern in WRITTEN for file in path.glob(pattern))
    if found:
        raise InputError(
            f"{folder} holds {', '.join(found[:5])} but no {RUN_FILE}: not a run of these recipes, which would write "
            "over such files. Choose another --output_dir."
        )


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}). Repair or remove it, or choose another --output_dir.") from None
