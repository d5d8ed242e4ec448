"""How many rows at once, where it is left open: by the planner's own prediction, on cards of several sizes."""

import time
from dataclasses import replace

import pytest
from test_memory import model_of
from transformers import TrainingArguments

from common.console import InputError
from common.distributed.launch import Launch
from common.model.memory import Setting, predict
from common.system import GIB
from common.train.batch import FASTEST_TOKENS, UNKNOWN_TOKENS, USED_SHARE, largest_divisor, rows_that_fit, set_batch

SETTING = Setting(rows=0, context_length=2048)


@pytest.mark.parametrize("limit", [16, 24, 40, 80])
@pytest.mark.parametrize("name", ["123M", "0.5B"])
def test_the_rows_fit_and_twice_as_many_would_not_or_gain_nothing(name, limit):
    model = model_of(name)
    rows = rows_that_fit(model, SETTING, 1024, limit)

    def total(rows: int) -> float:
        return predict(model, replace(SETTING, rows=rows)).total / GIB

    assert rows == 1 or total(rows) <= USED_SHARE * limit
    assert 2 * rows * 2048 > FASTEST_TOKENS or total(2 * rows) > USED_SHARE * limit


def test_a_small_step_bounds_the_rows_and_a_card_that_is_too_small_gets_one():
    model = model_of("123M")
    assert rows_that_fit(model, SETTING, 3, 80) == 3
    assert rows_that_fit(model, SETTING, 1024, 1) == 1
    assert rows_that_fit(model, SETTING, 0, 80) == 1


@pytest.mark.parametrize(("model", "limit"), [(None, 80), ("123M", None)])
def test_where_something_is_not_known_there_are_few(model, limit):
    assert rows_that_fit(model and model_of(model), SETTING, 1024, limit) * 2048 == UNKNOWN_TOKENS


def test_the_largest_divisor_is_the_one_that_trying_all_of_them_finds():
    for number in (1, 2, 12, 49, 97, 360, 1024):
        for most in (1, 2, 7, 48, 5000):
            tried = max((size for size in range(1, min(most, number) + 1) if number % size == 0), default=0)
            assert largest_divisor(number, most) == tried
    assert largest_divisor(0, 4) == 0
    began = time.monotonic()
    assert largest_divisor(2_147_483_629, 2**30) == 1, "a prime"
    assert largest_divisor(10**9, 10**9 - 1) == 5 * 10**8 and time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("flag", "value"),
    [("per_device_train_batch_size", 10**9), ("per_device_eval_batch_size", 10**9),
     ("gradient_accumulation_steps", 10**9), ("tokens_per_step", 10**12)],
)  # fmt: skip
def test_a_step_that_nobody_can_make_is_refused_at_once(tmp_path, flag, value):
    numbers = dict(per_device_train_batch_size=4, per_device_eval_batch_size=4, gradient_accumulation_steps=0)
    numbers |= {} if flag == "tokens_per_step" else {flag: value}
    training = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **numbers)
    tokens_per_step = value if flag == "tokens_per_step" else 4096
    began = time.monotonic()
    with pytest.raises(InputError, match=f"--{flag} {value:,}: .* at most 2,147,483,648. Use at most"):
        set_batch(Launch(processes=1), training, tokens_per_step, 512)
    assert time.monotonic() - began < 2
