"""Packing, compared with a reference of plain lists that is written from the definition, not from the code."""

import math

import numpy as np
import pytest
import torch
from conftest import END, ROOT, store_of_tokens, texts_of
from hypothesis import given
from hypothesis import strategies as st
from test_writer import lossy_tokenizer

from common.arguments import SharedArguments
from common.corpus.documents import CorpusCounts
from common.corpus.sources import resolve_sources
from common.dataset.mixture import IGNORED_ROW
from common.dataset.packing import IGNORED_TARGET, JoinedRows, PackedRows, collate_rows
from common.dataset.rows import unigram_loss
from common.tokens.train_tokenizer import train_tokenizer
from common.tokens.writer import tokenize, write_token_store

documents_of_tokens = st.lists(st.lists(st.integers(1, 900), max_size=9), min_size=2, max_size=12)


def reference_rows(documents: list[list[int]], context_length: int, isolated: bool) -> list[dict[str, list[int]]]:
    stream = [(token, place) for document in documents for place, token in enumerate([*document, END])]
    rows = []
    while len(stream) > context_length:
        inputs, targets = stream[:context_length], stream[1 : context_length + 1]
        row = {"input_ids": [token for token, _ in inputs], "shift_labels": [token for token, _ in targets]}
        if isolated:
            row["shift_labels"] = [IGNORED_TARGET if place == 0 else token for token, place in targets]
            begun = inputs[0][1]  # the row shows its first document from this token on
            whole_documents = [index for index, (_, place) in enumerate(inputs) if place == 0]
            row["position_ids"] = [
                place if any(start <= index for start in whole_documents) else place - begun
                for index, (_, place) in enumerate(inputs)
            ]
        rows.append(row)
        stream = stream[context_length:]
    return rows


def test_the_example_of_the_docstring(tmp_path):
    store = store_of_tokens(tmp_path, [[5, 6], [7, 8, 9], [1]])
    inputs = [[5, 6, 0, 7], [8, 9, 0, 1]]
    labels = {False: [[6, 0, 7, 8], [9, 0, 1, 0]], True: [[6, 0, -100, 8], [9, 0, -100, 0]]}
    for isolated, expected in labels.items():
        rows = as_lists(PackedRows(store, np.ones(3, bool), 4, isolated))
        assert [row["input_ids"] for row in rows] == inputs and [row["shift_labels"] for row in rows] == expected
    assert [row["position_ids"] for row in rows] == [[0, 1, 2, 0], [0, 1, 2, 0]]


def as_lists(rows) -> list[dict[str, list[int]]]:
    return [{name: tensor.tolist() for name, tensor in rows[row].items()} for row in range(len(rows))]


@given(documents_of_tokens, st.booleans(), st.data())
def test_rows_are_the_reference_rows(tmp_path_factory, documents, isolated, data):
    chosen = data.draw(st.lists(st.booleans(), min_size=len(documents), max_size=len(documents)))
    context_length = data.draw(st.integers(1, 7))
    store = store_of_tokens(tmp_path_factory.mktemp("s"), documents)
    rows = PackedRows(store, np.array(chosen), context_length, isolated)
    kept = [document for document, keep in zip(documents, chosen, strict=True) if keep]
    expected = reference_rows(kept, context_length, isolated)
    assert as_lists(rows) == expected
    stream_tokens = sum(len(document) + 1 for document in kept)
    assert rows.row_tokens == (len(expected) * context_length + 1 if expected else 0)
    assert rows.row_tokens + rows.dropped_tokens == stream_tokens
    assert rows.dropped_tokens <= context_length
    targets = [target for row in expected for target in row["shift_labels"] if target != IGNORED_TARGET]
    assert rows.targets().tolist() == targets


@given(documents_of_tokens, documents_of_tokens, st.integers(1, 5))
def test_joined_rows_are_those_of_the_sources_in_order(tmp_path_factory, first, second, length):
    parts = [
        PackedRows(store_of_tokens(tmp_path_factory.mktemp("s"), documents), np.array([True] * len(documents)), length)
        for documents in (first, second)
    ]
    joined = JoinedRows(parts)
    assert as_lists(joined) == as_lists(parts[0]) + as_lists(parts[1])
    for row in (len(joined), -2):
        with pytest.raises(IndexError):
            joined[row]


@given(documents_of_tokens, documents_of_tokens, st.integers(1, 5), st.booleans(), st.data())
def test_several_rows_at_once_are_the_same_rows(tmp_path_factory, first, second, length, isolated, data):
    stores = [store_of_tokens(tmp_path_factory.mktemp("s"), documents) for documents in (first, second)]
    joined = JoinedRows([PackedRows(store, np.ones(store.documents, bool), length, isolated) for store in stores])
    wanted = data.draw(st.lists(st.integers(-1, len(joined) - 1), max_size=9))  # -1: an ignored one
    found = joined.__getitems__(wanted)
    assert len(found) == len(wanted)
    for row, index in zip(found, wanted, strict=True):
        assert {name: tensor.tolist() for name, tensor in row.items()} == {
            name: tensor.tolist() for name, tensor in joined[index].items()
        }
    with pytest.raises(IndexError):
        joined.__getitems__([*wanted, len(joined)])


def test_documents_without_tokens_leave_no_trace(tmp_path):
    store = store_of_tokens(tmp_path, [[], [1, 2], [], [], [3, 4, 5], []], end=[])
    rows = PackedRows(store, np.array([True, True, True, False, True, True]), 2, isolated=True)
    assert [row["input_ids"] for row in as_lists(rows)] == [[1, 2], [3, 4]]
    assert [row["shift_labels"] for row in as_lists(rows)] == [[2, IGNORED_TARGET], [4, 5]]


def test_a_batch_is_contiguous_and_an_ignored_row_has_no_target(tmp_path):
    for isolated in (False, True):
        rows = PackedRows(store_of_tokens(tmp_path, [[1, 2, 3, 4], [5, 6]]), np.array([True, True]), 3, isolated)
        joined = JoinedRows([rows])
        batch = collate_rows([joined[0], joined[IGNORED_ROW]])
        assert ("position_ids" in batch) == isolated
        assert all(tensor.shape == (2, 3) and tensor.dtype == torch.int64 for tensor in batch.values())
        assert all(tensor.is_contiguous() for tensor in batch.values())
        assert batch["shift_labels"][0].tolist() == [2, 3, 4]
        assert (batch["shift_labels"][1] == IGNORED_TARGET).all()


def test_the_unigram_loss_by_hand(tmp_path):
    store = store_of_tokens(tmp_path, [[1, 1, 1], [2, 1]])  # 1 1 1 0 | 2 1 0
    train = JoinedRows([PackedRows(store, np.array([True, False]), 2)])
    held_out = JoinedRows([PackedRows(store, np.array([False, True]), 2)])
    # One added to each of 4 counts: token 1 has 4 of 8, token 0 has 2 of 8. Held-out targets: 1, 0.
    expected = pytest.approx((math.log(2) + math.log(4)) / 2)
    assert unigram_loss(train, held_out, 4) == expected
    # A second source of which every document is held out, or a copy, has no row to train on, and changes nothing.
    train.sources.append(PackedRows(store, np.array([False, False]), 2))
    assert unigram_loss(train, held_out, 4) == expected


CASES = [("cross", None), ("isolated", None), ("cross", 3), ("isolated", 2)]


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """The bundled articles, their texts, and a byte-level tokenizer of 500 tokens."""
    path = ROOT / "data" / "sample_zh.jsonl"
    texts = texts_of(path)
    tokenizer = train_tokenizer(texts, 500)
    arguments = SharedArguments(cache_dir=str(tmp_path_factory.mktemp("cache")))
    return texts, tokenizer, tokenize(resolve_sources([str(path)])[0], tokenizer, arguments)


@pytest.mark.parametrize(("packing", "most"), CASES)
def test_the_bytes_of_byte_level_targets_are_those_of_their_text(bundled, packing, most):
    """Of such a tokenizer, the decoded targets are the text; so they were counted before the store had sizes."""
    _, tokenizer, store = bundled
    chosen = np.arange(store.documents) % 20 == 3
    rows = JoinedRows([PackedRows(store, chosen, 128, packing == "isolated", most)])
    targets = rows.targets()
    by_decoding = tokenizer.decode(targets[targets != tokenizer.eos_token_id], clean_up_tokenization_spaces=False)
    assert rows.target_bytes(tokenizer) == len(by_decoding.encode())


def test_the_bytes_of_a_lossy_tokenizers_targets_are_the_sources(tmp_path):
    """By hand: "One" is known, 水 is not, and every document but the last is whole."""
    texts = ["One", "水水水 one", "one  one", "水 水 水 水"]
    store = write_token_store(texts, CorpusCounts(), lossy_tokenizer(), tmp_path / "t", {})
    sizes = [3, 13, 8, 15]
    assert store.text_bytes().tolist() == sizes and len(store.tokens) == 2 + 3 + 3 + 5
    everything = np.ones(4, bool)
    # 12 targets: all tokens but the first. Decoded, the first document is "one", and its part in the targets is "".
    assert PackedRows(store, everything, 12).target_bytes(lossy_tokenizer()) == sum(sizes[1:])
    # 8 targets are of the first three documents, and the first token of the fourth: [UNK] of [UNK] [UNK] [UNK] [UNK].
    cut = PackedRows(store, everything, 8).target_bytes(lossy_tokenizer())
    assert cut == pytest.approx(sizes[1] + sizes[2] + sizes[3] * len("[UNK]") / len("[UNK] [UNK] [UNK] [UNK]"))
    # Isolated, the first token of a document is no target: of "[UNK] one", "one" is left, and of "one one" also.
    isolated = PackedRows(store, np.array([False, True, True, False]), 5, isolated=True).target_bytes(lossy_tokenizer())
    assert isolated == pytest.approx(sizes[1] * len("one") / len("[UNK] one") + sizes[2] * len("one") / len("one one"))
