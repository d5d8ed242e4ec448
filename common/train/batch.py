"""Tokens a step -> rows of a micro-batch and gradient accumulation."""

from dataclasses import replace

from accelerate.utils import gather_object
from transformers import PreTrainedModel, TrainingArguments

from common.arguments import SharedArguments
from common.console import InputError, say
from common.distributed.accelerator import card_bytes
from common.distributed.launch import Launch
from common.model.memory import Setting
from common.system import GIB
from common.train.plan import rows_at_once, rows_that_fit, setting_of_run

LARGEST_STEP_TOKENS = 2**31  # the largest batches of published runs have some 2**26


def set_batch(launch: Launch, training: TrainingArguments, tokens_per_step: int, context_length: int) -> int:
    """Derive micro-batch and gradient accumulation from ``tokens_per_step``; return rows a step.

    ``training.per_device_train_batch_size`` is the most rows at once. If a process has fewer rows a step, or a number
    that does not divide by it, the micro-batch is made smaller, by less than half. An explicit
    ``training.gradient_accumulation_steps`` (not 0) wins, and changes the tokens a step.

    Raises:
        InputError: tokens_per_step cannot be divided so.
    """
    for flag, value in (
        ("--context_length", context_length),
        ("--per_device_train_batch_size", training.per_device_train_batch_size),
    ):
        if value < 1:
            raise InputError(f"{flag} {value}: must be at least 1.")
    most, processes = training.per_device_train_batch_size, launch.row_readers
    _check_size("--tokens_per_step", tokens_per_step, 1)
    _check_size("--per_device_train_batch_size", most, context_length)
    _check_size("--per_device_eval_batch_size", training.per_device_eval_batch_size, context_length)
    if training.gradient_accumulation_steps > 0:
        rows_per_step = most * processes * training.gradient_accumulation_steps
        _check_size("--gradient_accumulation_steps", training.gradient_accumulation_steps, most * context_length)
        say(
            f"batch: {most} rows x {processes} processes x {context_length} tokens x "
            f"{training.gradient_accumulation_steps} accumulated (your flag wins over --tokens_per_step) = "
            f"{rows_per_step * context_length:,} tokens a step"
        )
        return rows_per_step
    micro_batch = rows_at_once(tokens_per_step, processes, context_length, most)
    accumulated = tokens_per_step // (micro_batch * processes * context_length)
    training.per_device_train_batch_size = micro_batch
    training.gradient_accumulation_steps = accumulated
    say(
        f"batch: {micro_batch} rows x {processes} processes x {context_length} tokens x {accumulated} accumulated = "
        f"{tokens_per_step:,} tokens a step"
    )
    return micro_batch * accumulated * processes


def _check_size(flag: str, value: int, tokens: int) -> None:
    """Raise InputError if ``value`` times ``tokens`` is more than a step can be."""
    if value * tokens > LARGEST_STEP_TOKENS:
        raise InputError(
            f"{flag} {value:,}: {value * tokens:,} tokens, and a step has at most {LARGEST_STEP_TOKENS:,}. Use at most "
            f"{LARGEST_STEP_TOKENS // tokens:,}."
        )


def derive_micro_batch(
    model: PreTrainedModel | None, launch: Launch, training: TrainingArguments, shared: SharedArguments
) -> None:
    """Set the rows of a micro-batch where they are 0: to what fits this card in training, to the same in evaluation.

    ``model``: on the meta device; None if it is not known yet.
    """
    if training.per_device_train_batch_size == 0 and shared.context_length > 0:  # else refused by set_batch
        if training.gradient_accumulation_steps > 0:
            raise InputError(
                f"--gradient_accumulation_steps {training.gradient_accumulation_steps} with as many rows at once as "
                "fit: the tokens a step would depend on the card. Leave it out, --tokens_per_step decides; or give "
                "--per_device_train_batch_size, too."
            )
        setting, limit = Setting(rows=1, context_length=shared.context_length), card_gib(training)
        if model is not None:
            setting = replace(setting_of_run(model, launch, training, shared.context_length), fused_loss=True)
        if (model is None or limit is None) and training.device.type != "cpu":
            unknown = "the model's size is" if model is None else "this card's memory is"
            say(f"note: few rows at once, as {unknown} not known here. More: --per_device_train_batch_size 16")
        rows_a_step = shared.tokens_per_step // (shared.context_length * launch.row_readers)
        rows = rows_that_fit(model, setting, rows_a_step, limit)
        training.per_device_train_batch_size = min(gather_object([rows]))  # cards may differ, steps must not
    if training.per_device_eval_batch_size == 0:
        training.per_device_eval_batch_size = training.per_device_train_batch_size


def card_gib(training: TrainingArguments) -> float | None:
    """Return the memory of this card, None if it is not known."""
    size = card_bytes(training.device)
    return None if size is None else size / GIB
