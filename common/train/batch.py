"""Tokens a step -> rows of a micro-batch and gradient accumulation.

The micro-batch, if the flags leave it open, is as many rows at once as fit the card, until more rows make it no faster.
Large micro-batches keep the card busy while the CPU prepares the next layers, above all where several cards exchange
something for each layer. The losses do not depend on the micro-batch: ``--tokens_per_step`` says what a step trains on.
"""

import math
from dataclasses import replace

from accelerate.utils import gather_object
from transformers import PreTrainedModel, TrainingArguments

from common.arguments import SharedArguments
from common.console import InputError, say
from common.distributed.accelerator import card_bytes
from common.distributed.launch import Launch
from common.model.memory import Setting, predict
from common.system import GIB

LARGEST_STEP_TOKENS = 2**31  # the largest batches of published runs have some 2**26
FASTEST_TOKENS = 65_536  # 123M on an H100: 490k tokens/s with 32,768 at once, 508k with these (benchmarks/README.md)
UNKNOWN_TOKENS = 8192  # where memory or model is not known
USED_SHARE = 0.85  # of the card. The prediction is within 5%; memory in pieces and other libraries want some


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
    rows, rest = divmod(tokens_per_step, processes * context_length)  # of each process
    micro_batch = largest_divisor(rows, most)
    if rest or micro_batch == 0 or 2 * micro_batch <= min(most, rows):
        unit = min(most, max(rows, 1)) * processes * context_length
        fewer = ", or another --per_device_train_batch_size" if rows else ""
        raise InputError(
            f"--tokens_per_step {tokens_per_step:,} cannot be divided among {processes} processes into micro-batches "
            f"of about {min(most, max(rows, 1))} rows of {context_length} tokens. Use --tokens_per_step "
            f"{max(1, round(tokens_per_step / unit)) * unit}{fewer}."
        )
    training.per_device_train_batch_size = micro_batch
    training.gradient_accumulation_steps = rows // micro_batch
    say(
        f"batch: {micro_batch} rows x {processes} processes x {context_length} tokens x {rows // micro_batch} "
        f"accumulated = {tokens_per_step:,} tokens a step"
    )
    return rows * processes


def _check_size(flag: str, value: int, tokens: int) -> None:
    """Raise InputError if ``value`` times ``tokens`` is more than a step can be."""
    if value * tokens > LARGEST_STEP_TOKENS:
        raise InputError(
            f"{flag} {value:,}: {value * tokens:,} tokens, and a step has at most {LARGEST_STEP_TOKENS:,}. Use at most "
            f"{LARGEST_STEP_TOKENS // tokens:,}."
        )


def derive_micro_batch(
    model: PreTrainedModel | None,
    setting: Setting,
    launch: Launch,
    training: TrainingArguments,
    shared: SharedArguments,
    limit_gib: float | None,
) -> None:
    """Set the rows of a micro-batch where they are 0: to what fits a card in training, to the same in evaluation.

    Args:
        model: on the meta device; None if it is not known yet.
        setting: of the run; its ``rows`` are not read.
        limit_gib: memory of a card; None: not known.
    """
    if training.per_device_train_batch_size == 0 and shared.context_length > 0:  # else refused by set_batch
        if training.gradient_accumulation_steps > 0:
            raise InputError(
                f"--gradient_accumulation_steps {training.gradient_accumulation_steps} with as many rows at once as "
                "fit: the tokens a step would depend on the card. Leave it out, --tokens_per_step decides; or give "
                "--per_device_train_batch_size, too."
            )
        if (model is None or limit_gib is None) and training.device.type != "cpu":
            unknown = "the model's size is" if model is None else "this card's memory is"
            say(f"note: few rows at once, as {unknown} not known here. More: --per_device_train_batch_size 16")
        rows_a_step = shared.tokens_per_step // (shared.context_length * launch.row_readers)
        rows = rows_that_fit(model, setting, rows_a_step, limit_gib)
        training.per_device_train_batch_size = min(gather_object([rows]))  # cards may differ, steps must not
    if training.per_device_eval_batch_size == 0:
        training.per_device_eval_batch_size = training.per_device_train_batch_size


def card_gib(training: TrainingArguments) -> float | None:
    """Return the memory of this card, None if it is not known."""
    size = card_bytes(training.device)
    return None if size is None else size / GIB


def rows_that_fit(model: PreTrainedModel | None, setting: Setting, rows_a_step: int, limit_gib: float | None) -> int:
    """Return how many rows ``setting`` should take at once; at least 1, whether that fits or not.

    Args:
        model: on any device, or on none; None: not known.
        setting: its ``rows`` are not read.
        rows_a_step: of each process.
        limit_gib: memory of a card; None: not known.
    """
    known = model is not None and limit_gib is not None
    tokens = FASTEST_TOKENS if known else UNKNOWN_TOKENS
    rows = max(1, min(tokens // setting.context_length, rows_a_step))
    while known and rows > 1:
        tried = replace(setting, rows=rows, accumulated=rows_a_step > rows)
        if predict(model, tried).total <= USED_SHARE * limit_gib * GIB:
            break
        rows = (rows + 1) // 2 if rows > 2 else 1
    return rows


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of ``number`` that is at most ``most``; 0 without one."""
    if number < 1:
        return 0
    divisors = [small for small in range(1, math.isqrt(number) + 1) if number % small == 0]
    divisors += [number // small for small in divisors]
    return max((divisor for divisor in divisors if divisor <= most), default=0)
