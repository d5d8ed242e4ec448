"""--probe: three steps of a run, and what the whole run will take."""

import json
import statistics
import time

import torch
from transformers import TrainerCallback

from common.arguments import SharedArguments
from common.console import InputError, duration_in_words, say
from common.dataset.ledger import Ledger
from common.distributed.accelerator import card_bytes, device_name, memory_gib, synchronize
from common.model.counts import flops_per_token, parameter_report
from common.model.memory import CONTEXT_BYTES, predict
from common.model.scaling import LossLaw
from common.system import GIB
from common.train.setting import setting_of_trainer
from common.train.time_budget import Speed


def probe(
    trainer, shared: SharedArguments, ledgers: dict[str, Ledger] | None = None, law: LossLaw | None = None
) -> Speed:
    """Train three steps of a PretrainingTrainer's run, keep nothing, print what the whole run takes; return its speed.

    With ``--plan_json`` the last line is JSON: ``memory_peak_gib`` is measured, and the log's; ``total_gib`` is what
    --plan says; ``tokens_per_second`` is over all processes, ``hours`` and ``passes`` over the rows to the end of the
    run; with ``law`` there is also ``forecast``, the bits per byte to expect. ``ledgers`` know the bytes of the text.
    """
    arguments, steps = trainer.args, trainer.args.max_steps
    arguments.save_strategy = arguments.eval_strategy = "no"
    timer = StepTimer(stop_after=3)
    trainer.add_callback(timer)
    trainer.train()
    trainer.interruption.release()
    seconds = timer.seconds[-1] if len(timer.seconds) == 1 else statistics.mean(timer.seconds[1:])  # the first compiles
    context_length = trainer.train_dataset.context_length
    planned = predict(trainer.accelerator.unwrap_model(trainer.model), setting_of_trainer(trainer)).total
    found = {
        "memory_peak_gib": round(memory_gib(arguments.device)["memory_peak_gib"], 3),
        "total_gib": round(planned / GIB, 3),
        "tokens_per_second": round(trainer.launch.rows_per_step * context_length / seconds, 1),
        "hours": round(steps * seconds / 3600, 4),
        "passes": round(trainer.order.passes_at(trainer.order.rows_in_run), 4),
    }
    if law is not None:
        parameters = parameter_report(trainer.accelerator.unwrap_model(trainer.model))["total"]
        found["forecast"] = law.forecast(parameters, bytes_of_training_rows(ledgers), found["passes"], steps)
        say(forecast_in_words(found["forecast"], law))
    say(probe_in_words(found, arguments.device))
    if shared.plan_json:
        say(json.dumps(found))
    flops = flops_per_token(trainer.accelerator.unwrap_model(trainer.model), context_length)
    return Speed(found["tokens_per_second"] * flops, 0.0, f"{device_name(arguments.device)}, measured by the probe")


def probe_in_words(found: dict, device: torch.device) -> str:
    """Return what a probe measured in sentences."""
    peak, there = found["memory_peak_gib"], card_bytes(device)
    if device.type == "cpu":
        memory, where = f"three steps took {peak:.2f} GiB of main memory at the peak", "this CPU"
    else:
        where = device_name(device)
        outside = CONTEXT_BYTES / GIB
        memory = f"three steps took {peak:.2f} GiB at the peak, and some {outside:.1f} outside of torch"
        memory += f" (--plan: {found['total_gib']:.2f} in all)"
        if there is not None:
            spare, size = there / GIB - outside - peak, f"{there / GIB:.4g} GiB"
            over = f", {-spare:.2f} GiB more than the card's {size}"
            memory += over if spare < 0 else f", which fits {size} with {spare:.2f} to spare"
    passes = f"{found['passes']:.3g} pass{'es' * (found['passes'] != 1)} over the rows"
    time = f"the whole run takes {duration_in_words(found['hours'] * 3600)} for {passes} on {where}"
    speed = f"{found['tokens_per_second']:,.0f} tokens/s, evaluations not counted"
    return f"probe: {memory}; {time}, at {speed}. Nothing was kept."


def bytes_of_training_rows(ledgers: dict[str, Ledger]) -> float:
    """Return the bytes of the text in the training rows, by their share of each source's tokens.

    Raises:
        InputError: a token store does not say how many bytes its text had.
    """
    found = 0.0
    for name, ledger in ledgers.items():
        if ledger.bytes_read == 0:
            raise InputError(f"--ladder: {name} does not say how many bytes its text had. Leave --ladder out.")
        found += ledger.bytes_read * ledger.tokens_train / ledger.tokens_read
    return found


def forecast_in_words(forecast: dict, law: LossLaw) -> str:
    """Return a forecast of a LossLaw in two sentences."""
    measured = forecast["measured"]
    doubtful = f" This run is outside of what the ladder measured ({measured}): the law is extrapolated."
    return (
        "expected at the end: {bits_per_byte:.3f} bits per byte; with twice the parameters {twice_the_parameters:.3f}, "
        "twice the text {twice_the_text:.3f}, twice the passes {twice_the_passes:.3f}".format(**forecast)
        + f". The law was fitted on {law.text}; it missed runs that it had not seen by {law.error:.1%} on average."
        + doubtful * forecast["extrapolated"]
    )


class StepTimer(TrainerCallback):
    """Note the seconds from the end of each step to that of the next, in which a batch is fetched, too."""

    def __init__(self, stop_after: int | None = None):
        """``stop_after``: steps, of which nothing is saved."""
        self.stop_after, self.seconds = stop_after, []

    def on_train_begin(self, *_, **__):
        synchronize()
        self.ended = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.ended)
        self.ended = now
        control.should_training_stop |= len(self.seconds) == self.stop_after
        control.should_save = False  # not even when a signal asks for it: nothing is kept
