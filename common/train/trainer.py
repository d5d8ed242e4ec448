"""The one Trainer subclass. Every override says which behaviour of ``transformers.Trainer`` it replaces."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, SCHEDULER_NAME  # the first is another one in a notebook

from common.arguments import SharedArguments
from common.console import InputError, is_main_process, say
from common.dataset.loader import check_shared_memory, keep_apart
from common.dataset.mixture import TrainingOrder
from common.dataset.packing import IGNORED_ROW, collate_rows
from common.dataset.rows import Rows
from common.distributed.accelerator import pins_memory, ran_out_of_memory, random_state, set_random_state
from common.distributed.context_parallel import divided_rows
from common.distributed.launch import Launch, lost_process
from common.distributed.ulysses import pieces_of_rows
from common.distributed.workarounds import (
    add_up_in_fp32,
    deepspeed_loads_with,
    divided_by_transformers,
    gather_layers_whole,
    read_whole_checkpoints,
    reduce_in_fp32,
    saved_as_given,
    shares_rows,
)
from common.io import write_json
from common.model.attention import DOCUMENTS, ULYSSES, ULYSSES_DOCUMENTS, block_mask, full_mask
from common.model.recompute import keep_results
from common.run.checkpoints import named_as_in, reading, renamed_when_saved, saved_weights, unfinished
from common.run.divided_states import SHARDS, each_once, gathered_weights, load_states, load_weights
from common.run.folder import Run
from common.run.init_from import check_resumable, writer_of
from common.run.record import mean_logged_loss
from common.run.tracking import trackers_may_fail
from common.run.universal import load_on_other_processes
from common.train.callbacks import RunCallback, ScreenCallback
from common.train.cuda_graph import MicroBatchGraph, optimizer_graphs, use_graph
from common.train.interruption import EvaluationStopped, Interruption, session
from common.train.low_memory_adamw import LowMemoryAdamW
from common.train.metrics import RouterMeter, RunClock, held_out_metrics
from common.train.muon import MuonWithAdamW
from common.train.plan import out_of_memory
from common.train.saving import Saving
from common.train.schedule import keep_settings, schedule_settings, settings_of
from common.train.setting import setting_of_trainer
from common.train.step_guard import (
    GUARD_FILE,
    StepGuard,
    name_rows,
    not_worth_saving,
    read_guard,
    report_bad_batches,
    report_bad_step,
    rows_of_bad_losses,
    sums_over_processes,
    weights_not_finite,
)

STATES_LEFT_OUT = ("mps", "xpu")  # devices whose random states Trainer does not save
EVALUATED_BETWEEN_SIGNALS = 8  # batches; asking whether a signal came makes all processes wait for each other


class PretrainingTrainer(Trainer):
    """Train on packed rows, step by step through one long order of rows, with exact counts.

    Trainer sees the whole run, all passes over the data, as one epoch of ``max_steps`` steps: no pass ends with a
    partial step, and resuming is a seek. ``state.epoch`` still says how many passes over the rows are done.

    Attributes:
        guard: judges every step before it is made.
        interruption: knows whether a signal asks for the end, or the clock for a checkpoint.
        clock: measures throughput.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        training: TrainingArguments,
        shared: SharedArguments,
        rows: Rows,
        order: TrainingOrder,
        launch: Launch,
        run: Run,
        tokenizer: PreTrainedTokenizerBase | None,
        **kwargs,
    ):
        """Prepare to train ``model`` on ``rows.train`` in ``order``, and to evaluate it on ``rows.held_out``.

        Args:
            launch: its ``optimizer`` is "muon", or "adamw" for whatever ``training.optim`` names.
            run: where checkpoints, model and records go.
            kwargs: transformers.Trainer's own.

        Raises:
            InputError: --on_loss_spike skip under DeepSpeed; what --recompute is to keep cannot be kept.
        """
        self.router = RouterMeter(model)
        self._refuse(model, shared, launch)
        self.order, self.launch, self.run, self.cuda_graph = order, launch, run, shared.cuda_graph
        self.guard = StepGuard(shared.on_loss_spike, shared.max_bad_steps, scaled=training.fp16)
        self.interruption = Interruption(shared.save_minutes, launch.launched)
        self.saving = Saving(launch, training, run)
        self.micro_losses: list[torch.Tensor] = []  # of the step at hand, on the device: the tokens' loss of each
        training.remove_unused_columns = False  # Trainer would take shift_labels for a column that the model lacks
        # Batches go to the accelerator while it computes. By default every copy first waits until its queue is empty.
        training.dataloader_pin_memory &= pins_memory(training.device)
        training.accelerator_config.non_blocking = training.dataloader_pin_memory
        if training.ddp_find_unused_parameters is None:  # Trainer would have DDP look for them in every step
            training.ddp_find_unused_parameters = False
        training.ignore_data_skip = True  # the order seeks; Trainer would read every batch up to the checkpoint
        if launch.offloads:
            model.cpu()
        keep_results(model, launch.recomputed, launch.compiled)
        add_up_in_fp32(launch, training)
        gather_layers_whole(training.deepspeed_plugin, model, launch.compiled)
        with divided_by_transformers(launch, training), shares_rows(launch):
            super().__init__(
                model,
                training,
                data_collator=collate_rows,
                train_dataset=rows.train,
                eval_dataset=rows.held_out,
                processing_class=tokenizer,
                **kwargs,
            )
        reduce_in_fp32(self.accelerator)
        read_whole_checkpoints(self.accelerator)
        for printer in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):  # they print the whole dict of a log
            self.remove_callback(printer)
        self.clock = RunClock(self.model, order, rows.train.context_length, training)
        run.parameters = self.clock.parameters
        own = [ScreenCallback(launch.compiler), RunCallback(run, self.guard, shared), self.interruption, self.clock]
        for callback in own:  # the clock is the last: it decides what is logged
            self.add_callback(callback)

    def _refuse(self, model: PreTrainedModel, shared: SharedArguments, launch: Launch) -> None:
        """Raise InputError for what this launch cannot do with this model."""
        if launch.strategy.is_deepspeed and shared.on_loss_spike == "skip":
            raise InputError(
                "--on_loss_spike skip: DeepSpeed makes its step before it can be judged. Use stop, or another YAML."
            )
        if self.router.has_loss and launch.row_pieces > 1:
            raise InputError(
                "rows divided among cards: the router's loss is computed of whole rows. Use fsdp2.yaml, or write "
                '"output_router_logits": false in the model\'s config.'
            )
        if launch.sequence_parallel > 1 and model.config._attn_implementation not in ULYSSES:
            raise InputError(
                "parallelism_config_sp_size: this recipe does not hand launch.sequence_parallel on to set_attention. "
                "Use wiki_zh_scratch.py or openwebtext_continue.py."
            )

    @property
    def position(self) -> int:
        """Rows trained on so far, over all processes and passes; ignored rows of the last step do not count."""
        return self.order.position_after(self.state.global_step)

    @property
    def tokens_seen(self) -> int:
        """Targets trained on so far, over all processes and passes."""
        return self.position * self.train_dataset.context_length

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Seek to the checkpoint's row. Replaces: skipping batches by reading them."""
        loading = nullcontext()
        if resume_from_checkpoint is not None:
            self._seek(Path(resume_from_checkpoint))
            kind, writers = writer_of(resume_from_checkpoint)
            if kind == "zero" and writers != self.launch.processes:
                loading = deepspeed_loads_with(self._load_on_other_processes)
        self.batches_ahead = self.micro_batch = None
        self.callback_handler.callbacks = trackers_may_fail(self.callback_handler.callbacks)
        with loading, session(self.run, self.interruption, self.guard):
            try:
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
                self.run.end_save()
                if self.guard.stop is None:  # whatever --save_strategy says: there would be no use for such a model
                    self.guard.stop = self.guard.not_saved = weights_not_finite(self.model)
                return output
            except RuntimeError as error:
                if ran_out_of_memory(error):
                    raise InputError(out_of_memory(self, error)) from None
                message = lost_process(error, self.launch)
                if message is None:
                    raise
                raise InputError(message) from None
            finally:  # a run that ends early leaves no loader, and so no worker
                self.fetch_batches = self.batches_ahead = self.micro_batch = None

    def _load_on_other_processes(self, engine, checkpoint: str) -> None:
        load_on_other_processes(engine, checkpoint, self.run.folder, self.accelerator.wait_for_everyone)

    def _seek(self, checkpoint: Path) -> None:
        """Begin after ``checkpoint``, with what the guard knew there."""
        check_resumable(str(checkpoint), self.launch)
        with reading(checkpoint, "trainer_state.json"):
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            seen = [entry["tokens_seen"] for entry in state["log_history"] if "tokens_seen" in entry]
            self.order.begin_at(state["global_step"], seen[-1] // self.train_dataset.context_length, self.args)
        if state["max_steps"] != self.args.max_steps:
            planned = f"planned for {state['max_steps']} steps, now {self.args.max_steps}"
            say(f"note: {planned}: the learning-rate schedule moves with it")
        self.guard.load(read_guard(checkpoint / GUARD_FILE))
        if 0 < self.order.begins_at == self.order.first_position:  # a branch begins here: other text, other losses
            self.guard.losses.clear()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Replaces: the libraries' own texts where a file was replaced; whole weights where there are parts; experts
        that are not loaded, because they were saved under other names.
        """
        path = Path(resume_from_checkpoint)
        with reading(resume_from_checkpoint, "the weights"):
            if (path / SHARDS).exists():
                load_weights(self.model, path)
            elif not self.is_fsdp_enabled and renamed_when_saved(self.model, path):
                weights = named_as_in(self.model, saved_weights(path))
                self._issue_warnings_after_load(self.model.load_state_dict(weights, strict=False))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Replaces: a warning, and going on with weights that are not the checkpoint's."""
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        missing = sorted(trained.intersection(load_result.missing_keys))
        if missing:
            raise ValueError(f"{missing[0]} is not among them")
        super()._issue_warnings_after_load(load_result)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Check the weights, which are loaded now; keep this launch's rate, weight decay and betas.

        Replaces: those that the checkpoint was written with; the libraries' own texts where a file was replaced.
        """
        if checkpoint is None:
            return
        problem = weights_not_finite(self.model)
        if problem is not None:
            raise InputError(
                f"{checkpoint}: {problem}. Remove this checkpoint: the same command then continues from the one before."
            )
        with reading(checkpoint, "the states of optimizer and schedule"):
            if (Path(checkpoint) / SHARDS).exists():
                load_states(self.model, self.optimizer, Path(checkpoint))
                self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
            keep_settings(self.optimizer, self.lr_scheduler, self.settings_of_flags)

    def _save_rng_state(self, output_dir: str) -> None:
        """Replaces: leaving out the random states of Intel's and Apple's GPUs (seen with transformers 5.24)."""
        super()._save_rng_state(output_dir)
        if self.args.device.type in STATES_LEFT_OUT:
            torch.save(random_state(self.args.device), self._random_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Replaces: the libraries' own texts where a file was replaced; as above."""
        with reading(checkpoint, "the random state"):
            super()._load_rng_state(checkpoint)
            if checkpoint is not None and self._random_file(checkpoint).is_file():
                set_random_state(self.args.device, torch.load(self._random_file(checkpoint), weights_only=True))

    def _random_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"random_{self.args.device.type}_{self.args.process_index}.pt"

    def get_batch_samples(self, *args) -> tuple[list, torch.Tensor]:
        """Return a step's batches. Replaces: fetching them when the device has nothing left to do."""
        self.fetch_batches = partial(super().get_batch_samples, *args)
        batches = self.fetch_batches() if self.batches_ahead is None else self.batches_ahead
        self.batches_ahead = None
        return batches

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Keep the tokens' loss of every micro-batch, on its device, until the step is checked.

        Replaces: launching every kernel from Python, where a CUDA graph is faster; logging the sum of the tokens' and
        the router's losses; adding up the gradients of copies (HSDP) after each micro-batch.
        """
        if self.launch.replicas > 1:
            model.set_requires_all_reduce(self.accelerator.sync_gradients)  # in the last micro-batch of a step
        if self.micro_batch is None:
            self.micro_batch = super().training_step
            if use_graph(self.cuda_graph, self.model, setting_of_trainer(self), self.args.device):
                self.micro_batch = MicroBatchGraph(self.micro_batch)
        loss = self.router.take_from(self.micro_batch(model, inputs, num_items_in_batch))
        self.micro_losses.append(loss)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Note what the router of a mixture of experts adds to the loss."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        averaged = self.args.average_tokens_across_devices
        self.router.note(outputs, self.accelerator.num_processes if averaged else 1)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None) -> torch.Tensor | float:
        """Check the step, for which all is known now. Replaces: making a step whatever its numbers are.

        The check waits for the device: the batches of the next step are fetched before.
        """
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate wraps it
        in_backward = isinstance(optimizer, LowMemoryAdamW) and optimizer.in_backward  # no gradient is left
        self.batches_ahead = self.fetch_batches()
        norm = optimizer.grad_norm if in_backward else super()._get_grad_norm(model, grad_norm)
        self._check_step(model, norm, in_backward)
        return norm

    def _check_step(self, model: torch.nn.Module, grad_norm: torch.Tensor | float | None, made: bool) -> None:
        """Take the gradients away from a step that must not be made: optimizers pass over parameters without any.

        All processes see the same sums, and so decide the same. Reading them is the only wait for the device; what it
        costs is in docs/reliability.md. ``made``: the weights have moved already, inside backward.
        """
        wishes = self.interruption.wishes_on(self.args.device, self.run.save_failed)
        loss, norm, wishes = sums_over_processes(self.micro_losses, grad_norm, wishes, self.args.world_size)
        self.interruption.agree(wishes)
        if self.interruption.save_failed:
            self.run.end_save()
        if self.launch.strategy.is_deepspeed and self.model_wrapped.was_step_applied():
            made = True
        make, problem = self.guard.judge(loss, norm, made)
        if problem is not None:
            step = self.state.global_step + 1
            rows = rows_of_bad_losses(self.order.rows_of_step(step), self.micro_losses, self.launch.row_readers)
            figures = {"loss": loss, "grad_norm": norm}
            report_bad_step(self.run, step, problem, make, figures, name_rows(self.train_dataset, rows))
        if not make:
            model.zero_grad()
            if made:
                elsewhere = "in bf16 or fp16, or with ddp.yaml or fsdp2.yaml"
                instead = elsewhere if self.launch.strategy.is_deepspeed else "without --step_in_backward"
                raise InputError(
                    f"step {self.state.global_step + 1}: {problem}. That step has been made already: the weights are "
                    "spoilt, and not saved. The same command goes back to the last checkpoint; to have such steps left "
                    f"out instead, train {instead}."
                )
        self.router.end_step(make)
        self.micro_losses = []

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Replaces: one optimizer for all parameters, if it is to be Muon for the matrices."""
        if self.launch.optimizer == "muon" and self.optimizer is None:
            model = self.model if model is None else model
            _, settings = self.get_optimizer_cls_and_kwargs(self.args, model)  # learning rate, betas, eps, fused
            decayed = self.get_decay_parameter_names(model)
            graphs = optimizer_graphs(self.cuda_graph, model, self.launch, self.args.device)
            settings |= {"weight_decay": self.args.weight_decay, "graphs": graphs}
            self.optimizer = MuonWithAdamW(model, decayed, **settings)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Replaces: settings in steps only, and a polynomial schedule that fails under DeepSpeed."""
        if self.is_deepspeed_enabled:
            zero = self.optimizer.optimizer  # Accelerate wraps DeepSpeed's, and that wraps torch's, which has defaults
            zero.defaults = zero.optimizer.defaults
        given = self.args.lr_scheduler_kwargs
        self.args.lr_scheduler_kwargs = schedule_settings(self.args, num_training_steps)
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self.args.lr_scheduler_kwargs = given
        self.settings_of_flags = settings_of(self.optimizer)
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
        global_batch = self.args.eval_batch_size * self.launch.row_readers
        return [*range(len(eval_dataset)), *[IGNORED_ROW] * (-len(eval_dataset) % global_batch)]

    def _prepare_inputs(self, inputs: dict) -> dict:
        """Add the mask of a batch whose documents are kept apart by flex attention."""
        inputs = super()._prepare_inputs(inputs)
        kind = self.model.config._attn_implementation
        if kind in (DOCUMENTS, ULYSSES_DOCUMENTS) and "document_mask" not in inputs:
            whole = kind == ULYSSES_DOCUMENTS and self.args.device.type != "cuda"  # flex attention trains on CUDA only
            inputs["document_mask"] = (full_mask if whole else block_mask)(inputs["position_ids"])
        return inputs

    def _prepare_context_parallel_inputs(self, model, inputs: dict) -> tuple:
        """Replaces: asking for the attention named sdpa, and cutting up ``labels``, which nobody reads.

        Under Ulysses the mask of documents is made of whole rows, before they are cut: attention sees whole rows.
        """
        if self.launch.sequence_parallel > 1:
            return nullcontext, pieces_of_rows(self.launch, self._prepare_inputs(inputs))
        if self.launch.context_parallel == 1:
            return nullcontext, inputs
        return divided_rows(self.accelerator, inputs), inputs

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Add up nats and targets of a batch. Replaces: a mean per batch, which is NaN for ignored rows."""
        if self.is_in_train and len(self.eval_sums) % EVALUATED_BETWEEN_SIGNALS == 0:
            self.interruption.check_evaluation(self.args.device, self.args.world_size)
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
        batches = gather_object(mine if self.launch.reads_rows else [])  # of all rows, once
        readers, batch_rows = self.launch.row_readers, self.args.eval_batch_size
        bad = report_bad_batches(dataloader.dataset, batches, readers, batch_rows, metric_key_prefix)
        if bad:
            output.metrics[f"{metric_key_prefix}_bad_batches"] = bad
        target_bytes = dataloader.dataset.target_bytes(self.processing_class)
        output.metrics.update(held_out_metrics(batches, target_bytes, metric_key_prefix))
        return output

    def _evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Save and end where a signal cuts the evaluation short. Replaces: going through all of it first."""
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationStopped:
            self.interruption.on_step_end(self.args, self.state, self.control)
            return {}

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Keep evaluation out of the training throughput."""
        with self.clock.interval.paused():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        """Keep saving out of the training throughput, and bad weights out of checkpoints.

        Replaces: writing everything while training waits; pruning before the new checkpoint is whole; saving weights
        that are not finite.
        """
        step = self.state.global_step
        save = super()._save_checkpoint

        def write() -> list:
            save(*args, **kwargs)
            if is_main_process():
                write_json(unfinished(self.run.folder, step) / GUARD_FILE, self.guard.state())
            return self.saving.end()

        with self.clock.interval.paused():
            self.run.end_save()  # of the checkpoint before
            self.guard.not_saved = not_worth_saving(self.model, self.guard)
            if self.guard.not_saved is not None:
                say(f"step {step} is not saved: {self.guard.not_saved}")
                return
            in_background = self.saving.begin(self.model, self.optimizer)
            collective = self.launch.strategy.is_deepspeed
            try:
                self.run.save_checkpoint(step, write, collective, self.args.save_total_limit, in_background)
            finally:
                self.saving.end()  # also of a save that failed before it began
            self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Replaces: writing the optimizer's states at once, and those of all processes by one."""
        if self.saving.left is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        self.saving.leave_states(self.model, self.optimizer, output_dir)
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Replaces: a shared matrix written twice; the whole weights of a divided model in every process."""
        divided = self.launch.divided
        if divided:
            state_dict = gathered_weights(self.model)
        if state_dict is not None:
            state_dict = each_once(state_dict, self.model)
        with saved_as_given(self.model) if divided else nullcontext():
            super()._save(output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model of the run's end, each file whole or not at all; leave that of a checkpoint to be written.

        Replaces: half of a file on a full disk.
        """
        if self.saving.left is not None:
            return self.saving.leave_model(self.model, self.processing_class, output_dir)
        if output_dir is not None or _internal_call:
            return super().save_model(output_dir, _internal_call)
        write = partial(super().save_model, _internal_call=True)
        self.run.save_model(write, self.accelerator.wait_for_everyone)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _get_output_dir(self, trial) -> str:
        """Return where a checkpoint is written until it is whole. Replaces: under its own name."""
        return str(unfinished(self.args.output_dir, self.state.global_step).parent)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add counts, throughput and memory to a training step's log, before it enters the state."""
        if "loss" in logs:
            logs.update(self.clock.metrics(start_time, self.state.global_step) | self.guard.logged())
            logs.update(self.router.figures(self.accelerator))
        if "train_loss" in logs:  # the mean over all steps; transformers 5.17 divides the steps since a resume by all
            logs["train_loss"] = mean_logged_loss(self.state.log_history)
        with self.run.writing("what trackers keep"):
            super().log(logs, start_time)
