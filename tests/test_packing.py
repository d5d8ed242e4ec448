"""Packing against a reference of plain lists, written from the definition and not from the code."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.held_out import held_out_documents
from common.messages import InputError
from common.packing import (
    IGNORED_ROW,
    IGNORED_TARGET,
    Ledger,
    PackedRows,
    TrainingOrder,
    collate_rows,
    split_rows,
)
from common.token_store import TokenStore, write_token_store

END = 0
documents_of_tokens = st.lists(st.lists(st.integers(1, 900), max_size=9), min_size=2, max_size=12)


def store_of(folder, documents) -> TokenStore:
    texts = [" ".join(map(str, document)) for document in documents]
    encode = lambda batch: [[int(word) for word in text.split()] for text in batch]  # noqa: E731
    return write_token_store(texts, encode, END, 1000, folder / "tokens", lambda: {})


def reference_rows(documents: list[list[int]], context_length: int) -> list[tuple[list[int], list[int]]]:
    stream = [token for document in documents for token in [*document, END]]
    rows = []
    while len(stream) > context_length:
        rows.append((stream[:context_length], stream[1 : context_length + 1]))
        stream = stream[context_length:]
    return rows


@given(documents_of_tokens, st.data())
def test_rows_are_the_reference_rows(tmp_path_factory, documents, data):
    chosen = data.draw(st.lists(st.booleans(), min_size=len(documents), max_size=len(documents)))
    context_length = data.draw(st.integers(1, 7))
    rows = PackedRows(store_of(tmp_path_factory.mktemp("s"), documents), np.array(chosen), context_length)
    expected = reference_rows([d for d, keep in zip(documents, chosen, strict=True) if keep], context_length)
    assert [
        (row["input_ids"].tolist(), row["shift_labels"].tolist()) for row in map(rows.__getitem__, range(len(rows)))
    ] == (expected)
    stream_tokens = sum(len(d) + 1 for d, keep in zip(documents, chosen, strict=True) if keep)
    assert rows.row_tokens == (len(expected) * context_length + 1 if expected else 0)
    assert rows.row_tokens + rows.dropped_tokens == stream_tokens
    assert rows.dropped_tokens <= context_length


@given(documents_of_tokens, st.floats(0.01, 0.99), st.integers(1, 4))
def test_the_ledger_adds_up(tmp_path_factory, documents, fraction, context_length):
    store = store_of(tmp_path_factory.mktemp("s"), documents)
    try:
        train, held_out, ledger = split_rows(store, fraction, context_length)
    except InputError:
        assume(False)  # a split shorter than a row
    read = sum(len(document) + 1 for document in documents)
    assert ledger.tokens_read == read
    assert ledger.tokens_read == ledger.tokens_train + ledger.tokens_held_out + ledger.tokens_dropped
    assert ledger.tokens_dropped <= 2 * context_length
    assert ledger.documents == len(documents) == train.documents + held_out.documents


def test_the_ledger_notices_a_lost_token(tmp_path):
    store = store_of(tmp_path, [[1, 2, 3], [4, 5, 6]])
    mask = np.array([True, False])
    train, held_out = PackedRows(store, mask, 2), PackedRows(store, ~mask, 2)
    train.stream_tokens -= 1
    with pytest.raises(AssertionError, match="does not add up"):
        Ledger.of(store, train, held_out)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=50), st.floats(0.001, 0.999))
def test_copies_of_a_document_are_on_the_same_side(hashes, fraction):
    hashes = np.array(hashes, dtype=np.uint64)
    if len(np.unique(hashes)) < 2:
        with pytest.raises(InputError, match="give more: one is held out"):
            held_out_documents(hashes, fraction)
        return
    mask = held_out_documents(hashes, fraction)
    assert mask.any() and not mask.all()
    assert not set(hashes[mask].tolist()) & set(hashes[~mask].tolist())


def test_the_held_out_share_and_its_stability():
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    mask = held_out_documents(hashes, 0.05)
    assert abs(mask.mean() - 0.05) < 0.003  # four standard deviations
    assert (held_out_documents(hashes[:50_000], 0.05) == mask[:50_000]).all()  # appended data changes nothing


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_an_impossible_held_out_fraction_is_refused(fraction):
    with pytest.raises(InputError, match="must lie between 0 and 1"):
        held_out_documents(np.array([1, 2], np.uint64), fraction)


def test_a_corpus_shorter_than_a_row_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"hold \d+ tokens, less than one row of 64 \+ 1"):
        split_rows(store_of(tmp_path, [[1, 2], [3, 4]]), 0.5, 64)


@settings(max_examples=200)
@given(st.integers(1, 20), st.integers(0, 70), st.integers(0, 20), st.data())
def test_the_order_visits_every_row_once_a_pass_and_seeks(rows, real, ignored, data):
    order = TrainingOrder(rows, seed=3, real=real, total=real + ignored)
    positions = list(order)
    assert len(positions) == len(order) == real + ignored
    assert positions[real:] == [IGNORED_ROW] * ignored
    for first in range(0, real, rows):
        visited = positions[first : min(first + rows, real)]
        assert len(set(visited)) == len(visited)
        if len(visited) == rows:
            assert sorted(visited) == list(range(rows))
    order.start = data.draw(st.integers(0, real + ignored))
    assert list(order) == positions[order.start :]


def test_passes_and_seeds_are_shuffled_differently():
    first, second = np.split(np.array(list(TrainingOrder(50, seed=1, real=100, total=100))), 2)
    assert first.tolist() != second.tolist()
    assert list(TrainingOrder(50, seed=2, real=50, total=50)) != first.tolist()


def test_a_batch_is_contiguous_and_an_ignored_row_has_no_target(tmp_path):
    rows = PackedRows(store_of(tmp_path, [[1, 2, 3, 4], [5, 6]]), np.array([True, True]), 3)
    batch = collate_rows([rows[0], rows[IGNORED_ROW]])
    assert batch["input_ids"].shape == batch["shift_labels"].shape == (2, 3)
    assert all(tensor.is_contiguous() and tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["shift_labels"][0].tolist() == [2, 3, 4]
    assert (batch["shift_labels"][1] == IGNORED_TARGET).all()
    with pytest.raises(IndexError):
        rows[len(rows)]
