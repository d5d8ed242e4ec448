"""The learning-rate schedule: a recipe gives shares of the run, and transformers needs steps. What is due when."""

import inspect
import math

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainingArguments, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from common.console import InputError, say

# What a checkpoint's optimizer brings along, and the flags of this launch decide: initial_lr is --learning_rate.
SETTINGS = ("initial_lr", "weight_decay", "betas", "eps")


def leave_out_settings_of_another(training: TrainingArguments) -> None:
    """Leave out of --lr_scheduler_kwargs what the schedule does not take, and print it.

    Call this if the command line names the schedule and no settings: these are then the recipe's, for its own schedule.
    """
    takes = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[training.lr_scheduler_type]).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):  # it says itself what it takes
        return
    given = training.lr_scheduler_kwargs or {}
    foreign = {name: value for name, value in given.items() if name not in takes}
    if foreign:
        training.lr_scheduler_kwargs = {name: value for name, value in given.items() if name in takes}
        kind = training.lr_scheduler_type.value
        say(f"note: --lr_scheduler_type {kind}: without {foreign}, which this recipe has for its own schedule")


def check_schedule(training: TrainingArguments) -> None:
    """Raise InputError if --lr_scheduler_kwargs has settings that the schedule does not know or cannot compute with.

    This happens if --lr_scheduler_type names another schedule than the recipe, and the settings are the recipe's.
    """
    steps = training.max_steps if training.max_steps > 0 else 10**9  # not known before the data are counted
    given = training.lr_scheduler_kwargs
    try:
        settings = schedule_settings(training, steps)
        warmup = training.get_warmup_steps(steps)
        optimizer = torch.optim.SGD([torch.zeros(1)], training.learning_rate)
        schedule = get_scheduler(training.lr_scheduler_type, optimizer, warmup, steps, settings)
        for step in {0, warmup, (warmup + steps) // 2, steps - 1, steps}:
            share = schedule.lr_lambdas[0](step) if isinstance(schedule, LambdaLR) else 0.0
            if not 0 <= share < math.inf:
                raise ValueError(f"at step {step} the rate would be {training.learning_rate * share}")
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"--lr_scheduler_type {training.lr_scheduler_type.value} with --lr_scheduler_kwargs {given}: {error}. "
            "Give settings of this schedule, or none: --lr_scheduler_kwargs '{}'"
        ) from None


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict]:
    """Return what this launch's flags have set in each parameter group. Call it before a checkpoint is loaded."""
    return [{name: group[name] for name in SETTINGS if name in group} for group in optimizer.param_groups]


def keep_settings(optimizer: torch.optim.Optimizer, schedule: LRScheduler, settings: list[dict]) -> None:
    """Put ``settings``, from ``settings_of``, back into an optimizer and a schedule after a checkpoint was loaded.

    A checkpoint brings the rate, weight decay and betas that it was written with. If the flags are still the same,
    nothing changes, to the bit. A schedule that keeps the rate as its state (reduce_lr_on_plateau) keeps it.
    """
    rates_there = [group["lr"] for group in optimizer.param_groups]
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    if isinstance(schedule, LambdaLR):
        schedule.base_lrs = [own["initial_lr"] for own in settings]
        shares = [share_at(schedule.last_epoch) for share_at in schedule.lr_lambdas]
        rates = [base * share for base, share in zip(schedule.base_lrs, shares, strict=True)]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates  # what get_last_lr returns, and the log shows
        if rates != rates_there:
            step = schedule.last_epoch + 1
            say(f"note: the learning rate of step {step} is {rates[0]:g}; by the checkpoint's flags {rates_there[0]:g}")


def make_schedule(training: TrainingArguments, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Return the learning-rate schedule of a run of ``steps``; warn if most of them are its warmup."""
    warmup, settings = training.get_warmup_steps(steps), schedule_settings(training, steps)
    if warmup > max(1, steps / 2):
        say(
            f"warning: --warmup_steps {warmup}: the learning rate rises in more than half of the {steps} steps. Use "
            "fewer, or a share such as 0.03."
        )
    return get_scheduler(training.lr_scheduler_type, optimizer, warmup, steps, settings)


def schedule_settings(training: TrainingArguments, steps: int) -> dict:
    """Return ``training.lr_scheduler_kwargs`` for a run of ``steps``.

    ``num_decay_steps`` of warmup_stable_decay may be below 1: then it is a share of all steps, because the number of
    steps is not known before the data are counted. (transformers reads ``warmup_steps`` in the same way.) 0.3 of 1,000
    steps becomes 300.

    Raises:
        InputError: the schedule would fail, or its decay would begin before the end of the warmup.
    """
    settings = {} if training.lr_scheduler_kwargs is None else dict(training.lr_scheduler_kwargs)
    warmup = training.get_warmup_steps(steps)
    decay = settings.get("num_decay_steps", 0)
    if 0 < decay < 1:
        decay = round(decay * steps)
        settings["num_decay_steps"] = decay
    if training.lr_scheduler_type == "polynomial" and warmup >= steps:
        raise InputError(
            f"--warmup_steps {warmup}: none of the {steps} steps is left for --lr_scheduler_type polynomial. Use "
            "fewer, or a share such as 0.03."
        )
    if warmup + decay > steps:
        raise InputError(
            f"--warmup_steps {warmup} and num_decay_steps {decay} of --lr_scheduler_kwargs are more than the {steps} "
            "steps. Use fewer, or shares such as 0.03 and 0.3."
        )
    return settings


def is_due(interval: float, step: int, steps: int) -> bool:
    """Return whether what is done every ``interval`` steps is due after ``step`` of ``steps``; at the end it always is.

    An interval below 1 is a share of all steps, rounded up. 0 is never, until the end.
    """
    every = math.ceil(interval if interval >= 1 else interval * steps)
    return step == steps or (every > 0 and step % every == 0)
