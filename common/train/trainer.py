"""The one Trainer subclass. Every override says which behaviour of ``transformers.Trainer`` it replaces."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import PrinterCallback, Trainer
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from common.arguments import SharedArguments
from common.console import InputError, say
from common.dataset.loader import check_shared_memory, keep_apart
from common.dataset.mixture import IGNORED_ROW, TrainingOrder, lay_out_steps, rows_asked_for
from common.dataset.packing import JoinedRows, collate_rows
from common.distributed.context_parallel import divided_rows, parallel_size, reads_first, row_readers
from common.distributed.launch import lost_process
from common.distributed.strategy import add_up_in_fp32, gather_layers_whole, reduce_in_fp32
from common.model.attention import DOCUMENTS, block_mask
from common.run.checkpoints import unfinished
from common.run.init_from import check_resumable
from common.run.record import mean_logged_loss
from common.run.tracking import trackers_may_fail
from common.train.callbacks import ScreenCallback
from common.train.interruption import EvaluationStopped
from common.train.low_memory_adamw import LowMemoryAdamW
from common.train.metrics import RunClock, held_out_metrics
from common.train.muon import MuonWithAdamW
from common.train.plan import out_of_memory
from common.train.safety import Safety
from common.train.schedule import schedule_settings

EVALUATED_BETWEEN_SIGNALS = 8  # batches; asking whether a signal came makes all processes wait for each other


class PretrainingTrainer(Trainer):
    """Train on packed rows, step by step through one long order of rows, with exact counts.

    Trainer sees the whole run, all passes over the data, as one epoch of ``max_steps`` steps: no pass ends with a
    partial step, and resuming is a seek. ``state.epoch`` still says how many passes over the rows are done.
    """

    def __init__(
        self,
        model,
        args,
        train_rows: JoinedRows,
        eval_rows: JoinedRows,
        rows_per_step: int,
        optimizer: str = "adamw",
        shared: SharedArguments | None = None,
        **kwargs,
    ):
        """Set ``args.max_steps`` from ``num_train_epochs`` where open. ``rows_per_step`` counts all processes.

        ``optimizer``: "muon" (common/train/muon.py), or "adamw": whatever ``args.optim`` names. ``shared``: its flags
        of saving and of bad steps.
        """
        self.optimizer_name = optimizer
        self.rows_per_step = rows_per_step
        asked = rows_asked_for(args, rows_per_step, len(train_rows))
        self.rows_wanted = None if args.max_steps > 0 else asked
        self.order = TrainingOrder(
            [len(rows) for rows in train_rows.sources],
            args.seed if args.data_seed is None else args.data_seed,
            train_rows.weights,
        )
        self._plan(args)
        args.remove_unused_columns = False  # Trainer would take shift_labels for a column the model does not know
        # Batches go to the accelerator while it computes. By default every copy first waits until its queue is empty.
        args.accelerator_config.non_blocking = args.dataloader_pin_memory
        if args.ddp_find_unused_parameters is None:  # Trainer would have DDP look for them in every step
            args.ddp_find_unused_parameters = False
        args.ignore_data_skip = True  # the order seeks; Trainer would read every batch up to the checkpoint
        add_up_in_fp32(args)
        gather_layers_whole(args.deepspeed_plugin, model)
        super().__init__(
            model, args, data_collator=collate_rows, train_dataset=train_rows, eval_dataset=eval_rows, **kwargs
        )
        reduce_in_fp32(self.accelerator)
        for printer in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):  # they print the whole dict of a log
            self.remove_callback(printer)
        self.folder_lock = None  # the recipe claims the output folder
        self.safety = Safety(self, shared or SharedArguments(), scaled=args.fp16)
        self.clock = RunClock(self)
        for callback in (ScreenCallback(), self.safety, self.safety.interruption, self.clock):  # the last one logs
            self.add_callback(callback)

    @property
    def tokens_seen(self) -> int:
        """Targets trained on so far, over all processes and passes; ignored rows of the last step do not count."""
        return self.position * self.train_dataset.context_length

    @property
    def position(self) -> int:
        """Rows trained on so far, over all processes and passes."""
        steps = self.state.global_step - self.first_step
        return min(self.order.start + steps * self.rows_per_step, self.order.real)

    def start_behind(self, rows: int) -> None:
        """Begin at row ``rows`` of the order: those before it were trained on by the run of --init_from."""
        if self.rows_wanted is not None and rows >= self.rows_wanted:
            raise InputError(
                f"--init_from: its run was trained on {rows:,} rows, and {self.rows_wanted:,} are asked for in all. "
                "Ask for more: --num_train_epochs, or --max_steps, which counts from here."
            )
        self._plan(self.args, position=rows)

    def _plan(self, args, step: int = 0, position: int = 0) -> None:
        lay_out_steps(self.order, args, self.rows_wanted, self.rows_per_step, step, position)
        self.first_step = step

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Seek to the checkpoint's row. Replaces: skipping batches by reading them."""
        if resume_from_checkpoint is not None:
            check_resumable(resume_from_checkpoint, self.args)
            state = json.loads((Path(resume_from_checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
            seen = [entry["tokens_seen"] for entry in state["log_history"] if "tokens_seen" in entry]
            self._plan(self.args, state["global_step"], seen[-1] // self.train_dataset.context_length)
            if state["max_steps"] != self.args.max_steps:
                planned = f"planned for {state['max_steps']} steps, now {self.args.max_steps}"
                say(f"note: {planned}: the learning-rate schedule moves with it")
            self.safety.resume(resume_from_checkpoint)
        self.batches_ahead = None
        self.callback_handler.callbacks = trackers_may_fail(self.callback_handler.callbacks)
        with self.safety.session():
            try:
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except torch.OutOfMemoryError as error:
                raise InputError(out_of_memory(self, error)) from None
            except RuntimeError as error:
                if (message := lost_process(error)) is None:
                    raise
                raise InputError(message) from None
            finally:  # a run that ends early leaves no loader, and so no worker, behind
                self.fetch_batches = self.batches_ahead = None

    def get_batch_samples(self, *args) -> tuple[list, torch.Tensor]:
        """Return a step's batches. Replaces: fetching them when the device has nothing left to do."""
        self.fetch_batches = partial(super().get_batch_samples, *args)
        batches, self.batches_ahead = self.batches_ahead or self.fetch_batches(), None
        return batches

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """Keep the loss of every micro-batch, on its device, until the step is checked."""
        loss = super().training_step(*args, **kwargs)
        self.safety.micro_losses.append(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None) -> torch.Tensor | float:
        """Check the step, for which all is known now. Replaces: making a step whatever its numbers are.

        The check waits for the device: the batches of the next step are fetched before.
        """
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate wraps it
        in_backward = isinstance(optimizer, LowMemoryAdamW) and optimizer.in_backward  # no gradient is left
        self.batches_ahead = self.fetch_batches()
        norm = optimizer.grad_norm if in_backward else super()._get_grad_norm(model, grad_norm)
        self.safety.check_step(model, norm, in_backward)
        return norm

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Replaces: one optimizer for all parameters, if it is to be Muon for the matrices."""
        if self.optimizer_name == "muon" and self.optimizer is None:
            model = self.model if model is None else model
            _, settings = self.get_optimizer_cls_and_kwargs(self.args, model)  # learning rate, betas, eps, fused
            decayed = self.get_decay_parameter_names(model)
            self.optimizer = MuonWithAdamW(model, decayed, weight_decay=self.args.weight_decay, **settings)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Replaces: settings in steps only, and a polynomial schedule that fails under DeepSpeed."""
        if self.is_deepspeed_enabled:
            zero = self.optimizer.optimizer  # Accelerate wraps it, and it wraps torch's, whose defaults are asked for
            zero.defaults = zero.optimizer.defaults
        given = self.args.lr_scheduler_kwargs
        self.args.lr_scheduler_kwargs = schedule_settings(self.args, num_training_steps)
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self.args.lr_scheduler_kwargs = given
        return scheduler

    def _get_dataloader(self, *args, **kwargs):
        """Replaces: loaders that draw from the training's random state, and whose workers die of any signal."""
        check_shared_memory(self.args, self.train_dataset.context_length)
        return keep_apart(super()._get_dataloader(*args, **kwargs))

    def _get_train_sampler(self, train_dataset=None) -> TrainingOrder:
        """Replaces: a random order per epoch."""
        return self.order

    def _get_eval_sampler(self, eval_dataset) -> list[int]:
        """Complete the last global batch with ignored rows. Replaces: repeating rows to complete it."""
        global_batch = self.args.eval_batch_size * row_readers(self.args)
        return [*range(len(eval_dataset)), *[IGNORED_ROW] * (-len(eval_dataset) % global_batch)]

    def _prepare_inputs(self, inputs: dict) -> dict:
        """Add the mask of a batch whose documents are kept apart by flex attention."""
        inputs = super()._prepare_inputs(inputs)
        if self.model.config._attn_implementation == DOCUMENTS:
            inputs["document_mask"] = block_mask(inputs["position_ids"])
        return inputs

    def _prepare_context_parallel_inputs(self, model, inputs: dict) -> tuple:
        """Replaces: asking for the attention named sdpa, and cutting up ``labels``, which nobody reads."""
        if parallel_size("cp") == 1:
            return nullcontext, inputs
        return divided_rows(self.accelerator, inputs), inputs

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Add up nats and targets of a batch. Replaces: a mean per batch, which is NaN for ignored rows."""
        if self.is_in_train and len(self.eval_sums) % EVALUATED_BETWEEN_SIGNALS == 0:
            self.safety.check_evaluation()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            nats = model(**inputs, num_items_in_batch=1).loss  # the sum over the targets, divided by 1
        # They stay on the device: reading them here would make it wait for the next batch.
        self.eval_sums.append((nats, inputs["shift_labels"].ne(-100).sum()))
        return None, None, None

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        """Return the exact mean over all targets of all processes. Replaces: the mean of gathered batch means."""
        self.eval_sums = []
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        mine = [(nats.item(), targets.item()) for nats, targets in self.eval_sums]
        batches = gather_object(mine if reads_first(self.args) else [])  # of all rows, once
        bad = self.safety.report_evaluation(dataloader.dataset, batches, metric_key_prefix)
        output.metrics.update({f"{metric_key_prefix}_bad_batches": bad} if bad else {})
        target_bytes = dataloader.dataset.target_bytes(self.processing_class)
        output.metrics.update(held_out_metrics(batches, target_bytes, metric_key_prefix))
        return output

    def _evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Save and end where a signal cuts the evaluation short. Replaces: going through all of it first."""
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationStopped:
            self.safety.interruption.on_step_end(self.args, self.state, self.control)
            return {}

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Keep evaluation out of the training throughput."""
        with self.clock.interval.paused():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        """Keep saving out of the training throughput. Replaces: pruning before the new checkpoint is whole."""
        with self.clock.interval.paused():
            self.safety.save(partial(super()._save_checkpoint, *args, **kwargs))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model of the run's end, each file whole or not at all. Replaces: half of one on a full disk."""
        if output_dir is not None or _internal_call:
            return super().save_model(output_dir, _internal_call)
        self.safety.save_model(partial(super().save_model, _internal_call=True))
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _get_output_dir(self, trial) -> str:
        """Return where a checkpoint is written until it is whole. Replaces: under its own name."""
        return str(unfinished(self.args.output_dir, self.state.global_step).parent)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add counts, throughput and memory to a training step's log, before it enters the state."""
        if "loss" in logs:
            logs.update(self.clock.metrics(start_time) | self.safety.guard.logged())
        if "train_loss" in logs:  # the mean over all steps; transformers 5.17 divides the steps since a resume by all
            logs["train_loss"] = mean_logged_loss(self.state.log_history)
        with self.safety.writing("what trackers keep"):
            super().log(logs, start_time)
