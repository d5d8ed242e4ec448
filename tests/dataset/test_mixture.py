"""The order of training: every row once a pass, seeking, and mixtures exact to a row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.console import InputError
from common.dataset.mixture import CHUNK_POSITIONS, IGNORED_ROW, TrainingOrder, whole_parts


def order_of(rows, seed=1, weights=None, real=0, total=None):
    order = TrainingOrder(rows, seed, weights)
    order.rows_in_run = real
    order.positions_in_run = real if total is None else total
    return order


@settings(max_examples=200)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 70), st.integers(0, 20), st.data())
def test_the_order_visits_every_row_once_a_pass_and_seeks(sources, real, ignored, data):
    order, rows = order_of(sources, 3, real=real, total=real + ignored), sum(sources)
    positions = list(order)
    assert len(positions) == len(order) == real + ignored
    assert positions[real:] == [IGNORED_ROW] * ignored
    for first in range(0, real, rows):
        visited = positions[first : min(first + rows, real)]
        assert len(set(visited)) == len(visited)
        if len(visited) == rows:
            assert sorted(visited) == list(range(rows))
    order.first_position = data.draw(st.integers(0, real + ignored))
    assert list(order) == positions[order.first_position :]


def test_passes_and_seeds_are_shuffled_differently():
    first, second = np.split(np.array(list(order_of([50], real=100))), 2)
    assert first.tolist() != second.tolist()
    assert list(order_of([50], seed=2, real=50)) != first.tolist()


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=6),
    st.integers(1, 400),
    st.data(),
)
def test_a_mixture_is_exact_to_a_row_at_every_moment(sources, real, data):
    rows, weights = [row for row, _ in sources], [float(weight) for _, weight in sources]
    order = order_of(rows, 5, weights, real=real)
    positions = np.array(list(order))
    borders = np.cumsum([0, *rows])
    which = np.searchsorted(borders, positions, side="right") - 1
    for source, weight in enumerate(weights):
        so_far = np.cumsum(which == source)
        wanted = np.arange(1, real + 1) * weight / sum(weights)
        assert np.abs(so_far - wanted).max() < 1
        own = positions[which == source]
        for first in range(0, len(own), rows[source]):  # each source goes through its rows pass by pass
            visited = own[first : first + rows[source]]
            assert len(set(visited.tolist())) == len(visited)
    assert order.rows_by_source(real) == np.bincount(which, minlength=len(rows)).tolist()
    order.first_position = data.draw(st.integers(0, real))
    assert list(order) == positions[order.first_position :].tolist()


def test_sources_without_weights_are_counted_too():
    order = order_of([30, 12, 5], real=120)
    ends = np.cumsum([30, 12, 5])
    for position in (0, 1, 46, 47, 48, 120):
        taken = list(order)[:position]
        expected = np.bincount(np.searchsorted(ends, taken, side="right"), minlength=3).tolist() if taken else [0, 0, 0]
        assert order.rows_by_source(position) == expected


def test_a_long_order_crosses_its_chunks():
    real = 2 * CHUNK_POSITIONS + 10
    order = order_of([real], real=real)
    assert sorted(order) == list(range(real))


@pytest.mark.parametrize(
    ("weights", "parts"),
    [([0.7, 0.2, 0.1], [7, 2, 1]), ([1, 1, 1], [1, 1, 1]), ([3.0], [1]), ([333, 667], [333, 667])],
)
def test_weights_become_small_whole_numbers(weights, parts):
    assert whole_parts(weights, len(weights)) == parts


def test_weights_of_many_digits_are_rounded_aloud(capsys):
    assert whole_parts([1 / 3, 0.7], 2) == [32258, 67742]
    assert "are used as [32258, 67742]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([1.0], "gives 1 weights for 2 sources"),
        ([1.0, 0.0], "0.0: must be above 0"),
        ([1.0, -2.0], "-2.0: must be above 0"),
        ([1.0, float("nan")], "nan: must be above 0"),
        ([1.0, float("inf")], "inf: must be above 0"),
        ([1.0, 1e-9], "less than 1 in 100,000"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights, says):
    with pytest.raises(InputError, match=says):
        whole_parts(weights, 2)


def test_a_source_without_rows_cannot_be_mixed_in():
    with pytest.raises(InputError, match=r"\[5, 0\] training rows"):
        TrainingOrder([5, 0], 1, [0.5, 0.5])
