"""Best-fit packing: against rows written by hand, and a packing and rows made the slow way."""

import json
import re
import tracemalloc
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import END, losses, small_run, store_of_tokens
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.arguments import SharedArguments
from common.dataset.best_fit import BestFitRows, best_fit
from common.dataset.packing import IGNORED_TARGET
from common.dataset.rows import build_rows

NOTHING = IGNORED_TARGET


def store_of(folder, documents):
    store = store_of_tokens(folder, documents)
    store.end_token_id = END
    return store


def rows_of(store, chosen, context_length) -> list[tuple[list[int], list[int]]]:
    rows = BestFitRows(store, np.array(chosen, bool), context_length)
    return [(row["input_ids"].tolist(), row["shift_labels"].tolist()) for row in rows.__getitems__(range(len(rows)))]


def test_the_rows_of_the_example(tmp_path):
    store = store_of(tmp_path, [[5, 6], [7, 8, 9, 4, 3], [1]])
    assert rows_of(store, [1, 1, 1], 4) == [
        ([0, 7, 8, 9], [7, 8, 9, 4]),
        ([0, 5, 6, 0], [5, 6, 0, NOTHING]),
        ([4, 3, 0, 1], [3, 0, 1, 0]),
    ]
    rows = BestFitRows(store, np.ones(3, bool), 4)
    assert [rows.documents_of(row) for row in range(3)] == [[1], [0], [1, 2]]
    assert (rows.documents, rows.row_tokens, rows.dropped_tokens) == (3, 11, 0)
    assert rows[2]["input_ids"].tolist() == [4, 3, 0, 1]
    with pytest.raises(IndexError):
        rows[3]
    assert rows.targets().tolist() == [7, 8, 9, 4, 5, 6, 0, 3, 0, 1, 0]
    assert [rows.tokens_in(count) for count in (0, 1, 3, 6)] == [0, 4, 11, 22], "11 tokens and 1 empty place a pass"
    store.text_bytes = lambda: np.array([20, 50, 10])
    bytes_of = BestFitRows(store, np.array([True, True, False]), 4).target_bytes(
        SimpleNamespace(eos_token_id=END, decode=lambda *_, **__: "")
    )
    assert bytes_of == 70, "of whole documents, also of those that are cut into rows"


def test_documents_that_are_not_chosen_are_in_no_row(tmp_path):
    store = store_of(tmp_path, [[5, 6], [7, 8, 9, 4, 3], [1]])
    assert rows_of(store, [1, 0, 1], 4) == [
        ([0, 5, 6, 0], [5, 6, 0, NOTHING]),
        ([0, 1, 0, 0], [1, 0, NOTHING, NOTHING]),
    ]
    assert rows_of(store, [0, 0, 0], 4) == []


def slow_best_fit(sizes: list[int], room: int) -> list[int]:
    """Return the rooms that are left, ascending: one size at a time, looking at every bin."""
    left = []
    for size in sorted(sizes, reverse=True):
        fitting = [place for place, room_left in enumerate(left) if room_left >= size]
        if fitting:
            left[min(fitting, key=left.__getitem__)] -= size
        else:
            left.append(room - size)
    return sorted(left)


@settings(max_examples=200)
@example([4] * 6 + [3] * 5, 20)  # five of 4 fill a bin; three in each of two bins would leave no room for one of 3
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 30))
def test_the_bins_of_one_size_at_a_time(sizes, room):
    bins = best_fit(np.array(sizes, np.int64), room)
    held = np.bincount(bins, sizes) if sizes else np.zeros(0)
    assert (held <= room).all() and (held > 0).all()
    assert sorted((room - held).tolist()) == slow_best_fit(sizes, room)


def test_many_documents_of_one_size_are_packed_in_little_memory():
    """20,000 bins with the same room, of which each of 1,000 other sizes takes one."""
    sizes = np.concatenate([np.full(20_000, 2_500), np.arange(500, 1_500)])
    tracemalloc.start()
    bins = best_fit(sizes, 4_096)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bins.max() == 19_999 and np.bincount(bins, sizes).max() <= 4_096
    assert peak < 50 * 8 * len(sizes)


@settings(max_examples=100)
@given(st.data())
def test_every_token_is_a_target_once_and_no_short_document_is_cut(tmp_path_factory, data):
    """Tokens are all different here, so that each can be found."""
    lengths = data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=20))
    context_length = data.draw(st.integers(2, 8))
    tokens = iter(range(1, 1000))
    documents = [[next(tokens) for _ in range(length)] for length in lengths]
    store = store_of(tmp_path_factory.mktemp("store"), documents)
    chosen = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    after = {}  # token -> the one that stands before it in its document
    for document in documents:
        after |= dict(zip(document, [END, *document], strict=False))
    seen = []
    for inputs, targets in rows_of(store, chosen, context_length):
        real = [target for target in targets if target != NOTHING]
        assert targets[len(real) :] == [NOTHING] * (context_length - len(real)), "room is left at the end only"
        assert inputs[1 : len(real)] == real[:-1]
        begins = [place for place in range(len(real)) if place == 0 or real[place - 1] == END]
        assert all(after.get(real[place], None) == inputs[place] for place in begins[:1] if real[place] != END)
        seen += real
    wanted = [[*document, END] for document, is_chosen in zip(documents, chosen, strict=True) if is_chosen]
    assert sorted(seen) == sorted(token for document in wanted for token in document)
    held = [targets for _, targets in rows_of(store, chosen, context_length)]
    for document in wanted:
        if len(document) <= context_length:
            cut = " ".join(map(str, document))
            assert any(f" {cut} " in f" {' '.join(map(str, targets))} " for targets in held)


@pytest.mark.parametrize(("size", "said"), [(3, r"^best_fit: 0\.00% of"), (4, r"^warning: .*: 37\.50% of")])
def test_what_stays_empty_is_said(tmp_path, capsys, size, said):
    """Rows of 8: two documents of 3 tokens and an end token fill one, and of one of 4 and an end token 3 are left."""
    store = store_of(tmp_path, [[each + 1] * size for each in range(40)])
    build_rows({"a": store}, SharedArguments(packing="best_fit", context_length=8, split="30,10"))
    assert re.search(f"{said} the training rows of a stay empty", capsys.readouterr().out, re.MULTILINE)


def test_the_ledger_drops_nothing_of_the_training_documents_and_held_out_rows_are_windows(tmp_path):
    documents = [[token] * (1 + token % 9) for token in range(1, 200)]
    arguments = dict(context_length=8, held_out_fraction=0.2)
    found, windows = (
        build_rows({"text": store_of(tmp_path / packing, documents)}, SharedArguments(packing=packing, **arguments))
        for packing in ("best_fit", "cross")
        if (tmp_path / packing).mkdir() is None
    )
    ledger = asdict(found.ledgers["text"])
    of_windows = asdict(windows.ledgers["text"])
    in_training = ledger["tokens_read"] - windows.held_out.stream_tokens
    assert ledger["tokens_train"] == in_training and ledger["tokens_dropped"] < 8
    assert of_windows["tokens_train"] < in_training
    assert found.held_out[0]["input_ids"].equal(windows.held_out[0]["input_ids"])
    assert len(found.held_out) == len(windows.held_out)


def test_interrupted_and_continued_is_the_run_left_alone(wiki, cache_dir, tmp_path, monkeypatch):
    flags = ["--packing", "best_fit", "--save_steps", "2"]
    wiki.main(small_run(cache_dir, tmp_path / "whole", *flags))
    gather, read = BestFitRows.__getitems__, []

    def until_interrupted(rows, numbers):
        read.extend(numbers)
        if len(read) > 16:  # four steps
            raise KeyboardInterrupt
        return gather(rows, numbers)

    with monkeypatch.context() as patch:
        patch.setattr(BestFitRows, "__getitems__", until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            wiki.main(small_run(cache_dir, tmp_path / "halves", *flags))
    assert (tmp_path / "halves" / "checkpoint-2").exists() and not (tmp_path / "halves" / "checkpoint-6").exists()
    wiki.main(small_run(cache_dir, tmp_path / "halves", *flags))
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 6
    ledger = json.loads((tmp_path / "whole" / "all_results.json").read_text())["ledger"]
    assert ledger["rows_trained"] == 24 and ledger["tokens_trained"] == round(
        24 * ledger["tokens_train"] / ledger["rows_train"]
    )
    assert ledger["tokens_trained"] < 24 * 64, "the empty places of rows are not counted"
