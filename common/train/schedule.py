"""The learning-rate schedule: a recipe gives shares of the run, and transformers needs steps."""

import torch
from transformers import TrainingArguments, get_scheduler

from common.console import InputError


def check_schedule(training: TrainingArguments) -> None:
    """Raise InputError if --lr_scheduler_kwargs has settings that the schedule does not know.

    This happens if --lr_scheduler_type names another schedule than the recipe, and the settings are the recipe's.
    """
    steps = training.max_steps if training.max_steps > 0 else 10**9  # not known before the data are counted
    settings = schedule_settings(training, steps)
    warmup = training.get_warmup_steps(steps)
    optimizer = torch.optim.SGD([torch.zeros(1)], training.learning_rate)
    try:
        get_scheduler(training.lr_scheduler_type, optimizer, warmup, steps, settings)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"--lr_scheduler_type {training.lr_scheduler_type.value} with --lr_scheduler_kwargs {settings}: {error}. "
            "Give settings of this schedule, or none: --lr_scheduler_kwargs '{}'"
        ) from None


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
