"""The token store against golden bytes, and against damaged and foreign pairs."""

import errno
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import common.token_index as token_index
import common.token_store as token_store
from common.messages import InputError
from common.token_store import TokenStore, write_token_store

# [[1, 2, 3], [4, 5]] as uint16, from the format's description, not from our writer.
GOLDEN_IDX = bytes.fromhex(
    "4d4d49444944580000 0100000000000000 08 0200000000000000 0300000000000000 03000000 02000000"
    "0000000000000000 0600000000000000 0000000000000000 0100000000000000 0200000000000000"
)
GOLDEN_BIN = bytes.fromhex("0100 0200 0300 0400 0500")


def write(prefix, documents, vocabulary_size=1000, end_token_id=0):
    """Write documents given as lists of token ids, each spelled as text."""
    texts = [" ".join(map(str, document)) for document in documents]
    encode = lambda batch: [[int(word) for word in text.split()] for text in batch]  # noqa: E731
    return write_token_store(texts, encode, end_token_id, vocabulary_size, prefix, lambda: {})


def test_the_bytes_are_the_ecosystems(tmp_path):
    write(tmp_path / "pair", [[1, 2], [4]], end_token_id=3)
    index = (tmp_path / "pair.idx").read_bytes()
    assert len(index) == 82
    assert index == GOLDEN_IDX
    assert (tmp_path / "pair.bin").read_bytes() == np.array([1, 2, 3, 4, 3], "<u2").tobytes()


def test_a_golden_pair_is_read(tmp_path):
    (tmp_path / "pair.idx").write_bytes(GOLDEN_IDX)
    (tmp_path / "pair.bin").write_bytes(GOLDEN_BIN)
    store = TokenStore(tmp_path / "pair.bin")
    assert store.tokens.tolist() == [1, 2, 3, 4, 5]
    assert store.document_starts.tolist() == [0, 3, 5]
    assert len(set(store.document_hashes().tolist())) == 2


@given(st.lists(st.lists(st.integers(0, 70_000), max_size=5), min_size=1, max_size=8))
def test_what_is_written_is_read(tmp_path_factory, documents):
    prefix = tmp_path_factory.mktemp("store") / "tokens"
    largest = max((token for document in documents for token in document), default=0)
    store = write(prefix, documents, vocabulary_size=largest + 1)
    starts = store.document_starts
    read = [store.tokens[a:b].tolist() for a, b in zip(starts[:-1], starts[1:], strict=True)]
    assert read == [[*document, 0] for document in documents]
    assert store.tokens.dtype == (np.uint16 if largest + 1 < 65_500 else np.int32)
    assert store.sidecar["documents"] == len(documents)
    assert store.sidecar["tokens"] == sum(len(document) + 1 for document in documents)


def test_a_document_of_several_sequences_is_one_document(tmp_path):
    """[[1, 2], [3]] and [[4, 5]]: two documents, of two sequences and one."""
    sizes, pointers, documents = [2, 1, 2], [0, 4, 6], [0, 2, 3]
    header = token_index.HEADER.pack(token_index.MAGIC, 1, 8, 3, 3)
    body = np.array(sizes, "<i4").tobytes() + np.array(pointers, "<i8").tobytes() + np.array(documents, "<i8").tobytes()
    (tmp_path / "pair.idx").write_bytes(header + body)
    (tmp_path / "pair.bin").write_bytes(GOLDEN_BIN)
    assert TokenStore(tmp_path / "pair").document_starts.tolist() == [0, 3, 5]


@pytest.mark.parametrize(
    ("index", "tokens", "reason"),
    [
        (GOLDEN_IDX[:-1], GOLDEN_BIN, "cut off"),
        (GOLDEN_IDX[:20], GOLDEN_BIN, "does not begin with MMIDIDX"),
        (b"X" + GOLDEN_IDX[1:], GOLDEN_BIN, "does not begin with MMIDIDX"),
        (GOLDEN_IDX, GOLDEN_BIN[:-2], "8 bytes, but .* describes 10"),
        (GOLDEN_IDX, GOLDEN_BIN * 2, "20 bytes, but .* describes 10"),
        (GOLDEN_IDX[:17] + b"\x0b" + GOLDEN_IDX[18:], GOLDEN_BIN, "dtype code 11"),
        (GOLDEN_IDX[:34] + b"\xff\xff\xff\xff" + GOLDEN_IDX[38:], GOLDEN_BIN, "negative sizes"),
        (GOLDEN_IDX[:50] + b"\x02" + GOLDEN_IDX[51:], GOLDEN_BIN, "overlap or leave gaps"),
        (GOLDEN_IDX[:-8] + b"\x01" + GOLDEN_IDX[-7:], GOLDEN_BIN, "do not rise"),
    ],
)
def test_a_damaged_pair_is_refused(tmp_path, index, tokens, reason):
    (tmp_path / "pair.idx").write_bytes(index)
    (tmp_path / "pair.bin").write_bytes(tokens)
    with pytest.raises(InputError, match=reason):
        TokenStore(tmp_path / "pair")


def test_half_a_pair_is_refused(tmp_path):
    (tmp_path / "pair.bin").write_bytes(GOLDEN_BIN)
    with pytest.raises(InputError, match=r"pair\.idx: no such file"):
        TokenStore(tmp_path / "pair.bin")


def test_another_tokenizer_is_refused(tmp_path):
    (tmp_path / "pair.idx").write_bytes(GOLDEN_IDX)
    (tmp_path / "pair.bin").write_bytes(GOLDEN_BIN)
    foreign = TokenStore(tmp_path / "pair")
    foreign.check_tokenizer("anything", vocabulary_size=6)
    with pytest.raises(InputError, match="holds token 5, but the tokenizer at hand has 5"):
        foreign.check_tokenizer("anything", vocabulary_size=5)
    (tmp_path / "pair.json").write_text(json.dumps({"tokenizer": {"fingerprint": "abc"}}))
    TokenStore(tmp_path / "pair").check_tokenizer("abc", 6)
    with pytest.raises(InputError, match="made with another tokenizer"):
        TokenStore(tmp_path / "pair").check_tokenizer("abd", 6)


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(token_store.os, "fsync", full)
    with pytest.raises(InputError, match="no space left while tokenizing .* after 2 documents"):
        write(tmp_path / "pair", [[1], [2]])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_no_store(tmp_path):
    def documents():
        yield "1 2"
        raise InputError("malformed")

    with pytest.raises(InputError, match="malformed"):
        write_token_store(documents(), lambda batch: [[1]] * len(batch), 0, 10, tmp_path / "pair", lambda: {})
    assert list(tmp_path.iterdir()) == []
