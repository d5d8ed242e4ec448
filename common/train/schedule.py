"""The schedule of the learning rate: what recipes say of it in shares, as steps."""

import torch
from transformers import TrainingArguments, get_scheduler

from common.console import InputError


def check_schedule(training: TrainingArguments) -> None:
    """Raise InputError if the schedule does not take its settings, as a recipe's own for another one."""
    steps = training.max_steps if training.max_steps > 0 else 10**9  # not known before the data are counted
    settings, warmup = schedule_settings(training, steps), training.get_warmup_steps(steps)
    optimizer = torch.optim.SGD([torch.zeros(1)], training.learning_rate)
    try:
        get_scheduler(training.lr_scheduler_type, optimizer, warmup, steps, settings)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"--lr_scheduler_type {training.lr_scheduler_type.value} with --lr_scheduler_kwargs {settings}: {error}. "
            "Give the schedule's own; none: --lr_scheduler_kwargs '{}'"
        ) from None


def schedule_settings(training: TrainingArguments, steps: int) -> dict:
    """Return ``training.lr_scheduler_kwargs`` for a run of ``steps``.

    ``num_decay_steps`` below 1, of warmup_stable_decay, is a share of all steps there, as ``warmup_steps`` is in
    transformers: the number of steps is not known before the data are counted.

    Raises:
        InputError: the schedule would fail, or decay from a learning rate that is never reached.
    """
    settings, warmup = dict(training.lr_scheduler_kwargs or {}), training.get_warmup_steps(steps)
    decay = settings.get("num_decay_steps", 0)
    if 0 < decay < 1:
        decay = settings["num_decay_steps"] = round(decay * steps)
    if training.lr_scheduler_type == "polynomial" and warmup >= steps:
        raise InputError(
            f"--warmup_steps {warmup}: nothing of the {steps} steps is left for --lr_scheduler_type polynomial. Use "
            "fewer, or a share such as 0.03."
        )
    if warmup + decay > steps:
        raise InputError(
            f"--warmup_steps {warmup} and num_decay_steps {decay} of --lr_scheduler_kwargs are more than the {steps} "
            "steps. Use fewer, or shares such as 0.03 and 0.3."
        )
    return settings
