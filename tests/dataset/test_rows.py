"""The ledger: every document and token of every source is accounted for, or the run does not start."""

import json
import unicodedata

import numpy as np
import pytest
from conftest import END, store_of_tokens
from hypothesis import assume, given
from hypothesis import strategies as st
from test_store import write_pair
from test_writer import SMALL, spelled

from common.arguments import SharedArguments
from common.console import InputError
from common.corpus.sources import resolve_sources
from common.corpus.splits import Split
from common.dataset.ledger import Ledger
from common.dataset.packing import JoinedRows, PackedRows
from common.dataset.rows import build_rows
from common.tokens.merge import merge_token_stores
from common.tokens.store import TokenStore
from common.tokens.train_tokenizer import train_tokenizer
from common.tokens.writer import tokenize
from common.train.forgetting import retained_rows

documents_of_tokens = st.lists(st.lists(st.integers(1, 5), max_size=9), min_size=2, max_size=12)


@given(
    st.lists(documents_of_tokens, min_size=1, max_size=3),
    st.floats(0.1, 0.9),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([None, "1,1", "2,1,1"]),
)
def test_the_ledgers_add_up(tmp_path_factory, sources, fraction, context_length, keep_duplicates, split):
    stores = {str(i): store_of_tokens(tmp_path_factory.mktemp("s"), documents) for i, documents in enumerate(sources)}
    arguments = SharedArguments(
        held_out_fraction=fraction, context_length=context_length, keep_duplicates=keep_duplicates, split=split
    )
    try:
        built = build_rows(stores, arguments)
    except InputError:
        assume(False)  # a split shorter than a row
    seen, read, duplicate_tokens = set(), 0, 0
    for documents in sources:
        for document in documents:
            read += len(document) + 1
            duplicate_tokens += len(document) + 1 if str(document) in seen and not keep_duplicates else 0
            seen.add(str(document))
    total = sum(built.ledgers.values(), Ledger())
    assert total.tokens_read == read
    assert total.tokens_duplicate == duplicate_tokens
    assert total.documents == sum(map(len, sources))
    # The rows themselves, token by token.
    for rows, tokens in (
        (built.train, total.tokens_train),
        (built.held_out, total.tokens_held_out),
        (built.test, total.tokens_test),
    ):
        laid = 0 if rows is None else sum(len(row["shift_labels"]) for row in map(rows.__getitem__, range(len(rows))))
        first_tokens = 0 if rows is None else sum(len(part) > 0 for part in rows.sources)
        assert laid + first_tokens == tokens
    splits = 2 if split is None else 3
    assert 0 <= total.tokens_dropped <= splits * len(sources) * context_length
    assert read == sum(
        (total.tokens_train, total.tokens_held_out, total.tokens_test, total.tokens_duplicate, total.tokens_dropped)
    )


def no_duplicates(train: list[bool]) -> Split:
    mask = np.array(train)
    return Split(mask, ~mask, np.zeros_like(mask), np.zeros_like(mask))


@pytest.mark.parametrize("lost", ["a token of a row", "a document", "a duplicate"])
def test_the_ledger_notices_what_is_lost(tmp_path, lost):
    store = store_of_tokens(tmp_path, [[1, 2, 3], [4, 5, 6], [7, 8]])
    split = no_duplicates([True, False, True])
    empty = PackedRows(store, split.test, 2)
    rows = {"train": PackedRows(store, split.train, 2), "held_out": PackedRows(store, split.held_out, 2), "test": empty}
    Ledger.of(store, split, rows)
    if lost == "a token of a row":
        rows["train"].stream_tokens -= 1
    elif lost == "a document":
        rows["train"] = PackedRows(store, np.array([True, False, False]), 2)
    else:
        split.duplicate[2] = True
    with pytest.raises(AssertionError, match="does not add up"):
        Ledger.of(store, split, rows)


def test_what_the_sidecar_counted_is_in_the_ledger(tmp_path):
    store = store_of_tokens(tmp_path, [[1, 2, 3], [4, 5, 6]])
    store.sidecar = {"text_bytes": 40, "empty": 2, "malformed": 1, "duplicates": 3, "duplicate_tokens": 30}
    ledger = build_rows({"it": store}, SharedArguments(held_out_fraction=0.5, context_length=2)).ledgers["it"]
    assert (ledger.documents, ledger.documents_duplicate, ledger.documents_empty) == (5, 3, 2)
    assert (ledger.tokens_read, ledger.tokens_duplicate, ledger.bytes_read) == (38, 30, 40)
    assert "3 duplicates left out, 2 empty, 1 malformed skipped" in str(ledger)


def test_a_copy_in_another_source_is_a_duplicate(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    stores = {
        "a": store_of_tokens(tmp_path / "a", [[1, 2, 3], [4, 5, 6]]),
        "b": store_of_tokens(tmp_path / "b", [[7, 8, 9], [1, 2, 3]]),
    }
    arguments = SharedArguments(split="1,1", context_length=2)
    ledgers = build_rows(stores, arguments).ledgers
    assert [ledger.documents_duplicate for ledger in ledgers.values()] == [0, 1]


def documents_of(rows: JoinedRows) -> set[str]:
    """Return the tokens of the documents of ``rows``, without end tokens."""
    return {
        str([token for token in part.tokens[part.document_starts[i] : part.document_starts[i + 1]].tolist() if token])
        for part in rows.sources
        for i in np.flatnonzero(part.chosen)
    }


@pytest.mark.parametrize("end", [[0], []])
@pytest.mark.parametrize("merged", [False, True])
def test_a_copy_in_another_writers_token_file_is_a_duplicate(tmp_path, merged, end):
    """With end tokens or without, in two sources or in one that was merged of them: the ids decide."""
    documents = [[number, number + 1] for number in range(1, 81)]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in spelled(documents)))
    write_pair(tmp_path / "b", [[*document, *end] for document in reversed(documents)], np.int32)
    arguments = SharedArguments(cache_dir=str(tmp_path / "cache"), held_out_fraction=0.5, context_length=2)
    sources = resolve_sources([str(tmp_path / "a.jsonl"), str(tmp_path / "b.bin")])
    stores = {source.name: tokenize(source, SMALL, arguments) for source in sources}
    if merged:
        merge_token_stores(list(stores.values()), tmp_path / "merged")
        [source] = resolve_sources([str(tmp_path / "merged.bin")])
        stores = {"merged": tokenize(source, SMALL, arguments)}
    built = build_rows(stores, arguments)
    assert sum(built.ledgers.values(), Ledger()).documents_duplicate == 80
    train, held_out = documents_of(built.train), documents_of(built.held_out)
    assert not train & held_out and len(train | held_out) == 80 and min(len(train), len(held_out)) > 20


@pytest.mark.parametrize("keep_duplicates", [False, True])
def test_copies_in_two_normalisations_are_on_the_same_side(tmp_path, keep_duplicates):
    """The tokenizer gives both the same ids, because it normalises (NFC)."""
    texts = [f"été numéro {number}, déjà vu à l'été" for number in range(41)]
    tokenizer = train_tokenizer(texts, 300)
    both = [*texts, *(unicodedata.normalize("NFD", text) for text in reversed(texts))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in both))
    arguments = SharedArguments(
        cache_dir=str(tmp_path), held_out_fraction=0.3, context_length=8, keep_duplicates=keep_duplicates
    )
    store = tokenize(resolve_sources([str(tmp_path / "a.jsonl")])[0], tokenizer, arguments)
    built = build_rows({"a": store}, arguments)
    assert built.ledgers["a"].documents_duplicate == (0 if keep_duplicates else 41)
    train, held_out = documents_of(built.train), documents_of(built.held_out)
    assert not train & held_out and len(train | held_out) == 41
    assert built.fingerprints != [store.fingerprint()]  # a run of an earlier version, split otherwise, is another one


def test_the_fingerprint_of_documents_without_such_copies_is_the_stores(tmp_path):
    store = store_of_tokens(tmp_path, [[number, 5, 7] for number in range(20)] + [[3, 5, 7]])
    arguments = SharedArguments(held_out_fraction=0.3, context_length=2)
    assert build_rows({"it": store}, arguments).fingerprints == [store.fingerprint()]


@pytest.mark.parametrize(("fraction", "tail"), [(0.25, 25), (0.001, 9)])
@pytest.mark.parametrize("copies", [1, 3])
def test_of_a_single_document_the_tail_is_held_out(tmp_path, capsys, fraction, tail, copies):
    """100 tokens, the last the end token; at least a row of 8 + 1 tokens is held out."""
    document = list(range(1, 100))
    (tmp_path / "empty").mkdir()
    stores = {"it": store_of_tokens(tmp_path, [document] * copies), "none": store_of_tokens(tmp_path / "empty", [])}
    built = build_rows(stores, SharedArguments(held_out_fraction=fraction, context_length=8))
    assert f"the last {tail} of its 100 tokens are held out" in capsys.readouterr().out
    stream = [*document, END]
    held_out = built.held_out.targets().tolist()
    assert held_out == stream[100 - tail + 1 :][: len(held_out)] and len(held_out) > tail - 1 - 8
    train = built.train.targets().tolist()
    assert train == stream[1 : len(train) + 1] and 100 - tail - 8 <= len(train) < 100 - tail
    ledger = built.ledgers["it"]
    assert (ledger.documents, ledger.documents_train, ledger.documents_held_out) == (copies, 1, 0)
    if copies > 1:
        with pytest.raises(InputError, match="--keep_duplicates: the corpus has only one distinct document"):
            build_rows(stores, SharedArguments(held_out_fraction=fraction, context_length=8, keep_duplicates=True))


@pytest.mark.parametrize("tokens", [0, 40, 128])
def test_a_single_document_shorter_than_two_rows_is_refused(tmp_path, tokens):
    with pytest.raises(
        InputError, match=f"only one distinct document, of {tokens + 1} tokens. Its tail cannot be held"
    ):
        build_rows({"it": store_of_tokens(tmp_path, [[1] * tokens])}, SharedArguments(context_length=64))


def test_an_empty_share_of_a_split_is_said(tmp_path, capsys):
    stores = {"it": store_of_tokens(tmp_path, [[number, 1, 2] for number in range(400)])}
    built = build_rows(stores, SharedArguments(split="949,50,1", context_length=2))
    assert built.test is None
    said = capsys.readouterr().out
    assert "note: --split 949,50,1 of the 400 documents of it leaves no document for test" in said
    build_rows(stores, SharedArguments(split="949,50", context_length=2))
    build_rows(stores, SharedArguments(split="9,1,1", context_length=2))
    assert "leaves no document" not in capsys.readouterr().out


def test_what_is_trained_on_is_known_in_a_retained_token_file(tmp_path):
    documents = [[number, number + 1, 0] for number in range(1, 81)]
    hashes = np.arange(80, dtype=np.uint64) * np.uint64(2**57)
    ours = TokenStore(write_pair(tmp_path / "a", documents, hashes=hashes))
    foreign = TokenStore(write_pair(tmp_path / "b", documents))
    arguments = SharedArguments(held_out_fraction=0.5, context_length=2)
    built = build_rows({"a": ours}, arguments)
    retained = retained_rows({"b": foreign}, {"a": ours}, built.train, arguments)
    assert retained.counts["retain_documents_trained_on"] == built.ledgers["a"].documents_train == 16


def test_a_corpus_shorter_than_a_row_is_refused(tmp_path):
    arguments = SharedArguments(held_out_fraction=0.5, context_length=64)
    with pytest.raises(InputError, match=r"hold \d+ tokens, less than one row of 64 \+ 1"):
        build_rows({"it": store_of_tokens(tmp_path, [[1, 2], [3, 4]])}, arguments)
