"""The schedule of the learning rate: what recipes say of it in shares, as steps."""

from transformers import TrainingArguments

from common.messages import InputError


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
