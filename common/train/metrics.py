"""What a run measures: training time without evaluation and saving, throughput, passes over the rows, routers, held-out
loss.
"""

import math
import time
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from common.console import say
from common.dataset.mixture import TrainingOrder
from common.distributed.accelerator import memory_gib, reset_peak_memory, synchronize
from common.model.counts import experts_per_token, flops_per_token, parameter_report, peak_tflops
from common.model.experts import busiest_and_idlest


class RunClock(TrainerCallback):
    """Start the clocks when training starts, count passes over the rows, and log the last step, whatever its number.

    Attributes:
        interval: the time since the last log.
        first_step_seconds: of this session; None before there is one.
    """

    def __init__(self, model: PreTrainedModel, order: TrainingOrder, context_length: int, training: TrainingArguments):
        self.order, self.context_length, self.training = order, context_length, training
        self.interval, self.first_step_seconds = Stopwatch(), None
        self.flops_per_token = flops_per_token(model, context_length)
        self.parameters = parameter_report(model)
        # The products of FP8 have another peak than the rest of the model: no share of one peak would be honest.
        half_precision = training.bf16 or training.fp16
        self.peak_tflops = None
        if training.mixed_precision != "fp8":
            self.peak_tflops = peak_tflops(training.device, half_precision)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # Trainer has copied the tokenizer's padding token into the config. It must not be saved there: whoever loads
        # the model to train on would get an end-of-document embedding without gradient (see model_from_config).
        model.config.pad_token_id = None
        earlier = [entry["train_seconds"] for entry in state.log_history if "train_seconds" in entry]
        self.seconds_before = earlier[-1] if earlier else 0.0  # of earlier sessions, up to the checkpoint
        self.seen_at_last_log = self.tokens_seen(state.global_step)
        self.interval.lap()
        self.first_step_seconds, self.began = None, time.perf_counter()
        reset_peak_memory(args.device)  # the peak of training, not of loading, when the model was whole

    def on_step_end(self, args, state, control, **kwargs):
        if self.first_step_seconds is None:
            synchronize()
            evaluating = self.interval.paused_seconds  # before the first step, where a recipe does so
            self.first_step_seconds = time.perf_counter() - self.began - evaluating
            say(f"the first step took {self.first_step_seconds:.1f} s, compiling and warming up included")
        state.epoch = self.order.passes_at(self.order.position_after(state.global_step))
        # A checkpoint's log ends with its own step, so that nothing is lost between logs; a signal during an
        # evaluation makes one, too.
        if control.should_save or control.should_evaluate:
            control.should_log = True
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = False  # the recipe evaluates once, after training

    def tokens_seen(self, step: int) -> int:
        """Return how many targets the first ``step`` steps train on, over all processes and passes."""
        return self.order.position_after(step) * self.context_length

    def metrics(self, start_time: float, step: int) -> dict[str, float]:
        """Return counts, throughput and memory since the last log. ``start_time``: of training, by ``time.time``."""
        seen = self.tokens_seen(step)
        rate = (seen - self.seen_at_last_log) / self.interval.lap() / self.training.world_size
        self.seen_at_last_log = seen
        tflops = rate * self.flops_per_token / 1e12
        figures = {"tokens_seen": seen, "tokens_per_second_per_device": rate, "tflops_per_device": tflops}
        if self.peak_tflops:
            figures["mfu"] = tflops / self.peak_tflops
        figures |= memory_gib(self.training.device)
        return figures | {"train_seconds": self.seconds_before + time.time() - start_time}


class Stopwatch:
    """Seconds between laps, without the pauses. A pause first waits for the accelerator, which lags behind Python."""

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


class RouterMeter:
    """What the router of a mixture of experts adds to the loss, and where it sends tokens, from one log to the next.

    All figures stay on the device until they are logged.
    """

    def __init__(self, model: PreTrainedModel):
        self.has_loss = bool(getattr(model, "router_coefficient", 0.0))  # set by use_fused_loss
        self.chosen = experts_per_token(model.config)
        self.last: torch.Tensor | None = None  # what the router added to the loss of the last forward pass
        self.of_step: list[torch.Tensor] = []  # of the micro-batches of the step at hand
        self.of_steps_made: list[torch.Tensor] = []
        self.sent_tokens: torch.Tensor | None = None  # to each expert, (layers, experts)

    def note(self, outputs: dict, processes: int) -> None:
        """Note a forward pass. ``processes``: what Trainer multiplies the loss by, since gradients are averaged."""
        if self.has_loss:
            self.last = outputs["aux_loss"].detach() * processes
            sent = torch.stack(outputs["router_logits"])  # use_fused_loss has put them there
            self.sent_tokens = sent if self.sent_tokens is None else self.sent_tokens + sent

    def take_from(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the tokens' part of a micro-batch's loss, and keep the router's."""
        if not self.has_loss:
            return loss
        self.of_step.append(self.last)
        return loss - self.last

    def end_step(self, made: bool) -> None:
        """Keep what was noted in a step, if the step is made."""
        if made and self.of_step:
            self.of_steps_made.append(torch.stack(self.of_step).sum())
        self.of_step = []

    def figures(self, accelerator: Accelerator) -> dict[str, float]:
        """Return what the router did since the last log; {} if the model has none, or no step was made.

        ``router_loss`` is what it added to the loss, as a mean over the steps. ``busiest_expert`` and ``idlest_expert``
        are shares of a layer's tokens.
        """
        if not self.of_steps_made:
            return {}
        mean = torch.stack(self.of_steps_made).float().mean()
        sent = accelerator.reduce(self.sent_tokens, "sum")
        self.of_steps_made, self.sent_tokens = [], None
        busiest, idlest = busiest_and_idlest(sent, self.chosen)
        router_loss = accelerator.reduce(mean, "mean").item()
        return {"router_loss": router_loss, "busiest_expert": busiest, "idlest_expert": idlest}


def held_out_metrics(batches: list[tuple[float, int]], target_bytes: float, prefix: str) -> dict[str, float]:
    """Return loss, perplexity, bits per byte and targets of ``batches``, named ``{prefix}_loss`` and so on.

    Args:
        batches: (nats, targets) of each batch, nats being the sum over its targets.
        target_bytes: UTF-8 bytes of the text of all targets. Bits per byte compare different tokenizers.

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
