"""How many rows at once, where it is left open: by the planner's own prediction, on cards of several sizes."""

from dataclasses import replace

import pytest
from test_memory import model_of

from common.model.memory import Setting, predict
from common.system import GIB
from common.train.plan import FASTEST_TOKENS, UNKNOWN_TOKENS, USED_SHARE, rows_that_fit

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
