"""What a run measures: training time without evaluation and saving, throughput, passes over the rows, held-out loss."""

import math
import time
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

from common.console import say
from common.model.counts import flops_per_token, peak_tflops
from common.system import memory_gib


class RunClock(TrainerCallback):
    """Start the clocks when training starts, count passes over the rows, and log the last step, whatever its number.

    Attributes:
        interval: the time since the last log.
        first_step_seconds: of this session; None before there is one.
    """

    def __init__(self, trainer):
        """``trainer``: the PretrainingTrainer whose clocks these are."""
        self.trainer, args = trainer, trainer.args
        self.interval, self.first_step_seconds = Stopwatch(), None
        self.flops_per_token = flops_per_token(trainer.model, trainer.train_dataset.context_length)
        # Of FP8, whose products have another peak than the rest of the model, no share of a peak would be honest.
        self.peak_tflops = peak_tflops(args.device, args.bf16 or args.fp16) if args.mixed_precision != "fp8" else None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # Trainer has copied the tokenizer's padding token into the config; see model_from_config why it must not be
        # saved: whoever loads the model to train on would get an end-of-document embedding without gradient.
        model.config.pad_token_id = None
        earlier = [entry["train_seconds"] for entry in state.log_history if "train_seconds" in entry]
        self.seconds_before = earlier[-1] if earlier else 0.0  # of earlier sessions, up to the checkpoint
        self.seen_at_last_log = self.trainer.tokens_seen
        self.interval.lap()
        self.first_step_seconds, self.began = None, time.perf_counter()
        if args.device.type != "cpu":  # what follows is training: the model was whole before
            torch.accelerator.reset_peak_memory_stats(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        if self.first_step_seconds is None:
            synchronize()
            evaluating = self.interval.paused_seconds  # before the first step, where a recipe does so
            self.first_step_seconds = time.perf_counter() - self.began - evaluating
            say(f"the first step took {self.first_step_seconds:.1f} s, compiling and warming up included")
        state.epoch = self.trainer.position / self.trainer.order.rows
        # A checkpoint's log ends with its own step, so that nothing is lost between logs; a signal during an
        # evaluation makes one, too.
        if control.should_save or control.should_evaluate:
            control.should_log = True
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = False  # the recipe evaluates once, after training

    def metrics(self, start_time: float) -> dict[str, float]:
        """Return counts, throughput and memory since the last log. ``start_time``: of training, by ``time.time``."""
        seen = self.trainer.tokens_seen
        rate = (seen - self.seen_at_last_log) / self.interval.lap() / self.trainer.args.world_size
        self.seen_at_last_log = seen
        tflops = rate * self.flops_per_token / 1e12
        return {
            "tokens_seen": seen,
            "tokens_per_second_per_device": rate,
            "tflops_per_device": tflops,
            **({"mfu": tflops / self.peak_tflops} if self.peak_tflops else {}),
            **memory_gib(self.trainer.args.device),
            "train_seconds": self.seconds_before + time.time() - start_time,
        }


class Stopwatch:
    """Seconds between laps, without the pauses. A pause first waits for the accelerator, whose queue runs ahead."""

    def __init__(self):
        self.started, self.paused_seconds = time.perf_counter(), 0.0

    def lap(self) -> float:
        now = time.perf_counter()
        seconds = now - self.started - self.paused_seconds
        self.started, self.paused_seconds = now, 0.0
        return seconds

    @contextmanager
    def paused(self):
        synchronize()
        began = time.perf_counter()
        yield
        self.paused_seconds += time.perf_counter() - began


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def held_out_metrics(batches: list[tuple[float, int]], target_bytes: float, prefix: str) -> dict[str, float]:
    """Return loss, perplexity, bits per byte and targets of ``batches``, named ``{prefix}_loss`` and so on.

    Args:
        batches: (nats, targets) of each batch, nats being the sum over its targets.
        target_bytes: of UTF-8 text that all targets are. Bits per byte compare different tokenizers.

    Source: The Pile, section 3.1, https://arxiv.org/abs/2101.00027
    """
    nats, targets = (sum(column) for column in zip(*batches, strict=True))
    loss = nats / targets
    return {
        f"{prefix}_loss": loss,
        f"{prefix}_perplexity": math.exp(loss) if loss < 709 else math.inf,  # what a float holds
        f"{prefix}_bits_per_byte": nats / target_bytes / math.log(2),
        f"{prefix}_tokens": targets,
    }
