"""The order of training: every row once a pass, seeking, and mixtures exact to a row."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.console import InputError
from common.dataset.mixture import CHUNK_POSITIONS, IGNORED_ROW, TrainingOrder, training_order, whole_parts


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


class TwoSources:
    """Stands in for joined rows: 20 of one source and 13 of another."""

    sources, weights, context_length = (range(20), range(13)), None, 512
    split_alone = (True, True)

    def __len__(self) -> int:
        return 33


def run_of(rows_per_step, max_steps=-1, epochs=1.0, rows_before=0, seed=7, data_seed=None):
    """Return order and arguments of a run over the rows of TwoSources."""
    training = SimpleNamespace(
        seed=seed, data_seed=data_seed, max_steps=max_steps, num_train_epochs=epochs, output_dir="out"
    )
    return training_order(TwoSources(), training, rows_per_step, rows_before), training


def test_epochs_end_with_their_last_row_and_ignored_ones_complete_the_step():
    """Two passes over 33 rows, 8 at a time: nine steps, the last of two rows."""
    order, training = run_of(8, epochs=2.0)
    assert (training.max_steps, order.steps, order.rows_in_run, order.positions_in_run) == (9, 9, 66, 72)
    positions = list(order)
    assert len(positions) == len(order) == 72 and positions[66:] == [IGNORED_ROW] * 6
    assert [order.position_after(step) for step in (0, 1, 8, 9)] == [0, 8, 64, 66]
    for step in range(1, 10):
        assert order.rows_of_step(step).tolist() == positions[(step - 1) * 8 : step * 8]


def test_max_steps_are_whole_steps_whatever_the_epochs_say():
    order, training = run_of(8, max_steps=5, epochs=2.0)
    assert (training.max_steps, order.steps, order.rows_in_run, order.positions_in_run) == (5, 5, 40, 40)
    assert len(list(order)) == 40


@settings(max_examples=50)
@given(st.integers(1, 9), st.integers(0, 66), st.data())
def test_a_continued_run_takes_the_rows_that_are_left(rows_per_step, position, data):
    """As an uninterrupted one has them; the batch may be another one from there on."""
    alone, _ = run_of(3, epochs=2.0)
    order, training = run_of(rows_per_step, epochs=2.0)
    step = data.draw(st.integers(0, 40))
    order.begin_at(step, position, training)
    rest = list(order)
    assert [row for row in rest if row != IGNORED_ROW] == list(alone)[position:66]
    assert training.max_steps == order.steps == step + -(-(66 - position) // rows_per_step)
    assert len(order) == order.steps * rows_per_step and len(rest) == (order.steps - step) * rows_per_step
    assert order.position_after(step) == position and order.position_after(order.steps) == 66
    taken = [row for later in range(step + 1, order.steps + 1) for row in order.rows_of_step(later).tolist()]
    assert taken == rest


def test_less_than_what_is_done_is_refused():
    order, training = run_of(8, max_steps=5)
    with pytest.raises(InputError, match="has made 6 steps = 48 rows, more than is asked for"):
        order.begin_at(6, 48, training)
    with pytest.raises(InputError, match="--init_from: its run was trained on 66 rows, and 66 are asked for in all"):
        run_of(8, epochs=2.0, rows_before=66)
    with pytest.raises(InputError, match="trains on no row of 33"):
        run_of(8, epochs=0.0)


def test_weights_of_another_run_go_on_after_its_rows():
    order, training = run_of(8, epochs=2.0, rows_before=30)
    assert list(order)[:36] == list(run_of(8, epochs=2.0)[0])[30:66] and training.max_steps == 5
    order, training = run_of(8, max_steps=2, rows_before=30)  # steps count from there
    assert (order.rows_in_run, training.max_steps) == (46, 2)


def test_the_data_has_a_seed_of_its_own_if_wanted():
    assert list(run_of(8, seed=1, data_seed=7)[0]) == list(run_of(8, seed=7)[0]) != list(run_of(8, seed=1)[0])


def test_a_run_of_few_steps_is_a_warning_with_the_flags_that_give_more(capsys):
    """33 rows, 8 a step, are 5 steps; 100 steps take 20 passes. In 7 passes, 100 steps have 2 rows each."""
    run_of(8)
    said = capsys.readouterr().out
    assert "warning: the run has only 5 steps of 8 rows: 33 rows of 512 tokens in 1 passes" in said
    assert "100 steps or more: --num_train_epochs 20, or more text." in said and "--tokens_per_step" not in said
    run_of(8, epochs=7)
    said = capsys.readouterr().out
    assert "only 29 steps" in said and "--tokens_per_step 1024, or --num_train_epochs 25, or more text." in said


@pytest.mark.parametrize("enough", [dict(rows_per_step=8, epochs=25.0), dict(rows_per_step=2, epochs=7.0)])
def test_a_run_of_100_steps_has_no_warning(capsys, enough):
    _, training = run_of(**enough)
    assert training.max_steps >= 100 and "warning" not in capsys.readouterr().out
    run_of(8, max_steps=100)  # asked for in steps
    assert not capsys.readouterr().out


def test_few_steps_that_were_asked_for_are_a_note(capsys):
    """3 steps of 8 rows are 24 of the 33 rows."""
    run_of(8, max_steps=3)
    said = capsys.readouterr().out
    assert said.startswith("note: --max_steps 3: 24 rows, 0.73 passes over the text.") and len(said.splitlines()) == 1
    assert "--max_steps -1 --num_train_epochs 1" in said
    run_of(8, max_steps=3, rows_before=8)  # the run of --init_from had more
    assert not capsys.readouterr().out


@settings(max_examples=100)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=6, max_size=6),
    st.integers(0, 100),
    st.integers(0, 100),
)
def test_sources_continue_after_their_rows_in_another_mixture(rows, parts, before, after):
    """Each source goes through the same rows in the same order, whoever mixes them, and all are counted."""
    first = order_of(rows, 5, [float(part) for part in parts[: len(rows)]], real=before)
    second = order_of(rows, 5, [float(part) for part in parts[3 : 3 + len(rows)]], real=before + after)
    second.begins_at, second.taken, second.first_position = before, first.rows_by_source(before), before
    visited = np.array([*first, *second], dtype=int)
    assert second.rows_by_source(before + after) == np.histogram(visited, np.cumsum([0, *rows]))[0].tolist()
    assert second.rows_elsewhere == 0 and second.passes_at(before + after) == (before + after) / sum(rows)
    for source in range(len(rows)):
        border = sum(rows[:source])
        own = [row for row in visited.tolist() if border <= row < border + rows[source]]
        alone = order_of(rows, 5, [1000.0 if other == source else 1.0 for other in range(len(rows))], real=1000)
        wanted = [row for row in alone if border <= row < border + rows[source]]
        assert own == wanted[: len(own)]


def test_an_order_that_begins_anew_counts_the_rows_before_it_apart():
    order, training = run_of(8, epochs=2.0)
    order.begins_at = 40
    order.begin_at(5, 40, training)
    alone, _ = run_of(8, epochs=2.0)
    assert [row for row in order if row != IGNORED_ROW] == [row for row in alone if row != IGNORED_ROW]
    assert order.rows_elsewhere == 40 and order.rows_in_run == 40 + 66 and order.steps == 5 + 9
    assert order.passes_at(40 + 66) == 2.0
    assert order.rows_by_source(40 + 50) == alone.rows_by_source(50)
