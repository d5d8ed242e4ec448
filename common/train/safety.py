"""What PretrainingTrainer does so that nothing is lost: steps are checked, saves whole, and every end accounted for."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import DistributedType, gather_object
from transformers import TrainerCallback

from common.arguments import SharedArguments
from common.console import InputError, say
from common.dataset.mixture import IGNORED_ROW
from common.dataset.packing import JoinedRows
from common.distributed.context_parallel import row_readers
from common.io import append_lines, write_json
from common.run.checkpoints import UNFINISHED, move_into, no_space_left, prune_checkpoints, unfinished, write_checkpoint
from common.run.folder import STATUS_FILE, write_status
from common.run.record import LAUNCHES_FILE, describe_launch, record_launch
from common.train.interruption import EvaluationStopped, Interruption
from common.train.muon import whole
from common.train.step_guard import StepGuard, name_rows, read_guard, shown

GUARD_FILE, BAD_STEPS_FILE = "guard.json", "bad_steps.jsonl"


class Safety(TrainerCallback):
    """The guard, the signals and the saves of one PretrainingTrainer."""

    def __init__(self, trainer, arguments: SharedArguments, scaled: bool):
        """``scaled``: fp16's gradient scaler is at work."""
        self.trainer, self.arguments = trainer, arguments
        self.deepspeed = trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.deepspeed and arguments.on_loss_spike == "skip":
            raise InputError(
                "--on_loss_spike skip: DeepSpeed makes its step before it can be judged. Use stop, or another YAML."
            )
        self.guard = StepGuard(arguments.on_loss_spike, arguments.max_bad_steps, scaled)
        self.interruption = Interruption(arguments.save_minutes)
        self.micro_losses: list[torch.Tensor] = []  # of the step at hand, on the device
        self.failed_saves, self.unwritten = 0, set()  # names of files that a full disk had no room for

    def _wishes(self) -> torch.Tensor:
        """Return what this process was asked to do, on its device; the copy waits for nothing there."""
        device = self.trainer.args.device
        wishes = torch.tensor(self.interruption.wishes(), pin_memory=device.type == "cuda")
        return wishes.to(device, non_blocking=True)

    def check_evaluation(self) -> None:
        """Raise EvaluationStopped, on all processes, if one of them was asked to end."""
        wishes = self._wishes()
        if self.trainer.args.world_size > 1:
            torch.distributed.all_reduce(wishes)
        self.interruption.agree(wishes.tolist())
        if self.interruption.agreed is not None:
            raise EvaluationStopped

    def check_step(self, model: torch.nn.Module, grad_norm: torch.Tensor | float, made: bool = False) -> None:
        """Take the gradients away from a step that must not be made: optimizers pass over parameters without any.

        All processes see the same sums, and so decide the same. Reading them is the only wait for the device; what it
        costs is in docs/reliability.md. ``made``: the weights have moved already, inside backward.
        """
        world, device = self.trainer.args.world_size, self.trainer.args.device
        # DeepSpeed without clipping has no norm.
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, dtype=torch.float32, device=device)
        loss = torch.stack(self.micro_losses).sum().float()
        numbers = torch.cat([torch.stack([loss, whole(norm)]) / world, self._wishes()])
        if world > 1:
            torch.distributed.all_reduce(numbers)
        loss, norm, *wishes = numbers.tolist()
        self.interruption.agree(wishes)
        made |= self.deepspeed and self.trainer.model_wrapped.was_step_applied()
        make, problem = self.guard.judge(loss, norm, made)
        if problem is not None:
            self._report(loss, norm, make, problem)
        if not make:
            model.zero_grad()
            if made:
                elsewhere = "in bf16 or fp16, or with ddp.yaml or fsdp2.yaml"
                instead = elsewhere if self.deepspeed else "without --step_in_backward"
                raise InputError(
                    f"step {self.trainer.state.global_step + 1}: {problem}. That step has been made already: the "
                    "weights are spoilt, and not saved. The same command goes back to the last checkpoint; to have "
                    f"such steps left out instead, train {instead}."
                )
        self.micro_losses = []

    def _report(self, loss: float, norm: float, make: bool, problem: str) -> None:
        """Say which rows a bad step had, and keep all of them in ``bad_steps.jsonl``; called by all processes."""
        trainer, step = self.trainer, self.trainer.state.global_step + 1
        own = [not math.isfinite(micro) for micro in torch.stack(self.micro_losses).tolist()]
        of_all = np.array(gather_object([own]))  # (processes, micro-batches)
        bad = of_all.reshape(row_readers(trainer.args), -1, len(own)).any(axis=1).T  # (micro-batches, readers)
        first = trainer.order.start + (step - 1 - trainer.first_step) * trainer.rows_per_step
        rows = trainer.order.rows_at(np.arange(first, min(first + trainer.rows_per_step, trainer.order.real)))
        ignored = np.full(trainer.rows_per_step - len(rows), IGNORED_ROW)
        rows = np.concatenate([rows, ignored]).reshape(*bad.shape, -1)
        chosen = rows[bad] if bad.any() else rows  # only the gradient is bad, or it is a spike: any may be the cause
        named = name_rows(trainer.train_dataset, chosen.ravel().tolist())
        action = "made" if make else "left out"
        say(f"step {step} {action}: {problem}. {shown(named)}; all in {BAD_STEPS_FILE}")
        if trainer.is_world_process_zero():
            entry = {"step": step, "problem": problem, "loss": repr(loss), "grad_norm": repr(norm), "action": action}
            Path(trainer.args.output_dir).mkdir(parents=True, exist_ok=True)
            with self.writing(BAD_STEPS_FILE):
                append_lines(Path(trainer.args.output_dir) / BAD_STEPS_FILE, [entry | {"rows": named}])

    def report_evaluation(self, dataset: JoinedRows, batches: list[tuple[float, int]], prefix: str) -> int:
        """Say which rows of an evaluation have a loss that is not finite; return how many batches have.

        Args:
            batches: (nats, targets) of the batches of all readers of rows, one after the other.
        """
        world, size = row_readers(self.trainer.args), self.trainer.args.eval_batch_size
        bad = np.array([not math.isfinite(nats) for nats, _ in batches]).reshape(world, -1).T  # (batches, processes)
        if bad.any():
            rows = np.arange(bad.size * size).reshape(*bad.shape, size)[bad].ravel()
            named = name_rows(dataset, [row for row in rows.tolist() if row < len(dataset)])
            say(f"{prefix}: {bad.sum()} of {bad.size} batches have a loss that is not finite. {shown(named)}")
        return int(bad.sum())

    def save(self, write: Callable[[], None]) -> None:
        """Save a checkpoint, whole or not at all; on a full disk stop or go on, as ``--on_save_error`` says."""
        trainer, step, folder = self.trainer, self.trainer.state.global_step, self.trainer.args.output_dir
        collective = self.deepspeed or trainer.is_fsdp_enabled
        problem = write_checkpoint(folder, step, partial(self._write, write), gather_object, collective)
        if problem is None:
            if trainer.is_world_process_zero():
                prune_checkpoints(folder, trainer.args.save_total_limit)
            trainer.accelerator.wait_for_everyone()
            return
        self.failed_saves += 1
        message = f"{folder}: no space left while saving step {step} ({problem}). The checkpoints before it are whole"
        if self.arguments.on_save_error == "stop":
            raise InputError(f"{message}: make room, and the same command continues from the last of them.")
        say(f"{message}. Training goes on, as --on_save_error says; make room before the next save.")

    def _write(self, write: Callable[[], None]) -> None:
        write()
        if self.trainer.is_world_process_zero():
            write_json(
                unfinished(self.trainer.args.output_dir, self.trainer.state.global_step) / GUARD_FILE,
                self.guard.state(),
            )

    @contextmanager
    def writing(self, what: str, needed: bool = False) -> Iterator[None]:
        """Around writing ``what``: a full disk ends the run, or is said once and passed over, by ``--on_save_error``.

        ``needed``: it is of the run's end, behind which there is nothing to go on with.
        """
        folder = self.trainer.args.output_dir
        try:
            yield
        except Exception as error:  # any other than a full disk goes on up
            if not no_space_left(error, folder):
                raise
            message = f"{folder}: no space left while writing {what} ({error}). The checkpoints before it are whole"
            if needed or self.arguments.on_save_error == "stop":
                raise InputError(
                    f"{message}: make room, and the same command continues from the last of them."
                ) from None
            if what not in self.unwritten:
                say(f"{message}. Training goes on without it, as --on_save_error says; make room before the next save.")
            self.unwritten.add(what)

    def save_model(self, write: Callable[[str], None]) -> None:
        """Save the model of the run's end with all processes: written aside, then moved, file by file."""
        folder = Path(self.trainer.args.output_dir)
        aside = folder / UNFINISHED / "model"
        try:
            with self.writing("the model", needed=True):
                write(str(aside))
        except InputError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self.trainer.accelerator.wait_for_everyone()
        if self.trainer.is_world_process_zero():
            move_into(aside, folder)
        self.trainer.accelerator.wait_for_everyone()

    def resume(self, checkpoint: str) -> None:
        """Take over what the guard knew at ``checkpoint``."""
        self.guard.load(read_guard(Path(checkpoint) / GUARD_FILE))

    @contextmanager
    def session(self) -> Iterator[None]:
        """Around training: leave the process as whoever stopped it expects, and the state in ``status.json``."""
        try:
            yield
        except EvaluationStopped:  # before the first step: there is nothing to save
            pass
        except BaseException as error:
            self.status("failed", f"{type(error).__name__}: {error}")
            self.release()
            raise
        if self.interruption.agreed is not None:
            self.status("interrupted", self.interruption.agreed)
            self.release()
            raise SystemExit(self.interruption.exit_status)
        if self.guard.stop is not None:
            self.status("failed", self.guard.stop)
            self.release()
            raise InputError(
                f"stopped at step {self.trainer.state.global_step}: {self.guard.stop}.\nAll is saved; "
                f"{self.trainer.args.output_dir}/{BAD_STEPS_FILE} has the rows of the bad steps, and which were left "
                "out. The same command goes on behind them; a lower --learning_rate, or other data, needs another "
                "--output_dir."
            )
        self.interruption.before_leaving = partial(self.status, "interrupted", "a signal after the last step")

    def finish(self) -> None:
        """Say that the run has all its results."""
        self.status("finished")
        self.interruption.release()

    def release(self) -> None:
        """Give back the signals and the folder: the process may live on, as a notebook's does."""
        self.interruption.release()
        if self.trainer.folder_lock is not None:
            self.trainer.folder_lock.release()

    def status(self, state: str, reason: str | None = None) -> None:
        if self.trainer.folder_lock is None:  # not the main process, or a probe or benchmark, which claims no folder
            return
        progress, folder = self.trainer.state, self.trainer.args.output_dir
        try:
            write_status(folder, state, progress.global_step, progress.max_steps, reason)
        except OSError as error:  # a full disk: what is being done about it matters more than this file
            if STATUS_FILE not in self.unwritten:
                say(f"note: {STATUS_FILE} cannot be written ({error})")
            self.unwritten.add(STATUS_FILE)

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # of logs, saves, evaluations: now, not as the checkpoint has them
        self.status("running")
        if self.trainer.folder_lock is not None:
            with self.writing(LAUNCHES_FILE):
                record_launch(args.output_dir, describe_launch(self.arguments, args))

    def on_log(self, args, state, control, **kwargs):
        if self.trainer.is_in_train:
            self.status("running")

    def on_step_end(self, args, state, control, **kwargs):
        if self.guard.stop is not None:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
