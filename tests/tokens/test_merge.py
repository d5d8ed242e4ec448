"""Merging stores, compared with lists in memory and with megatron-core's merge; and what must not be merged."""

import errno
import json
import os
import threading

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_megatron import index_bytes
from test_store import read_all, write_legacy_pair, write_pair

import common.tokens.merge as token_merge
from common.console import InputError
from common.tokens.merge import merge_token_stores
from common.tokens.store import TokenStore

MADE = {"tokenizer": {"fingerprint": "abc", "end_token": "</s>"}}


@given(
    st.lists(
        st.tuples(
            st.lists(st.lists(st.integers(0, 127), max_size=5), max_size=4),
            st.sampled_from([np.uint8, np.int8, np.uint16, np.int32, np.uint32]),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_a_merge_holds_all_documents_in_order(tmp_path_factory, stores, legacy):
    folder = tmp_path_factory.mktemp("merge")
    inputs = [
        TokenStore((write_legacy_pair if old else write_pair)(folder / f"{place}", documents, dtype))
        for place, (documents, dtype, old) in enumerate(stores)
    ]
    merged = merge_token_stores(inputs, folder / "merged", legacy)
    assert read_all(merged) == [document for documents, _, _ in stores for document in documents]
    assert merged.id_hashes().tolist() == [h for store in inputs for h in store.id_hashes().tolist()]
    assert all(np.can_cast(store.tokens.dtype, merged.tokens.dtype) for store in inputs if len(store.tokens))
    suffixes = ("_ids.npy", "_idx.npz") if legacy else (".bin", ".idx")
    names = {path.name for path in folder.iterdir() if path.name.startswith("merged")}
    assert names == {f"merged{suffix}" for suffix in (*suffixes, ".json", ".lock")}


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["uint16", "uint16"], "uint16"),
        (["uint16", "int32"], "int32"),
        (["uint8", "uint16"], "uint16"),
        (["uint16", "int16"], "int32"),
        (["int32", "uint32"], "int64"),
        (["float32", "float32"], "float32"),
    ],
)
def test_the_narrowest_dtype_that_holds_all(tmp_path, dtypes, expected):
    inputs = [TokenStore(write_pair(tmp_path / str(place), [[9]], dtype)) for place, dtype in enumerate(dtypes)]
    assert merge_token_stores(inputs, tmp_path / "merged").tokens.dtype == expected


def test_sequences_stay_what_they_are(tmp_path):
    """Two pairs of documents [[1, 2], [3]] and [[4]], each a list of sequences. The merged index is packed by hand."""
    for name in "ab":
        (tmp_path / f"{name}.idx").write_bytes(index_bytes([2, 1, 1], [0, 4, 6], [0, 2, 3]))
        (tmp_path / f"{name}.bin").write_bytes(np.array([1, 2, 3, 4], "<u2").tobytes())
    inputs = [TokenStore(tmp_path / name) for name in "ab"]
    merge_token_stores(inputs, tmp_path / "c" / "merged")
    by_hand = index_bytes([2, 1, 1, 2, 1, 1], [0, 4, 6, 8, 12, 14], [0, 2, 3, 5, 6])
    assert (tmp_path / "c" / "merged.idx").read_bytes() == by_hand
    assert (tmp_path / "c" / "merged.bin").read_bytes() == np.array([1, 2, 3, 4] * 2, "<u2").tobytes()


@pytest.mark.heavy
def test_the_merge_is_megatrons_byte_for_byte(tmp_path):
    """Heavy: the import of megatron-core takes 10 s."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefixes = [write_pair(tmp_path / name, [[1, 2], [], [place]]) for place, name in enumerate("abc")]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(str(tmp_path / "theirs.idx"))
    merge_token_stores([TokenStore(prefix) for prefix in prefixes], tmp_path / "ours")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_a_merge_of_one_store_converts_it_and_back(tmp_path):
    hashes = np.array([7, 8], np.uint64)
    first = TokenStore(write_pair(tmp_path / "a", [[1, 2], [3]], sidecar={"empty": 3, **MADE}, hashes=hashes))
    legacy = merge_token_stores([first], tmp_path / "b", legacy=True)
    ids = np.load(tmp_path / "b_ids.npy", allow_pickle=False)
    assert ids.tolist() == [1, 2, 3] and ids.dtype == np.uint16
    with np.load(tmp_path / "b_idx.npz", allow_pickle=False) as archive:  # as PaddleNLP reads it
        assert {name: archive[name].dtype for name in archive.files} == {"lens": np.int32, "docs": np.int64}
        assert archive["lens"].tolist() == [2, 1] and archive["docs"].tolist() == [0, 1, 2]
    back = merge_token_stores([legacy], tmp_path / "c")
    for suffix in (".bin", ".idx", ".hashes.npy"):
        assert (tmp_path / f"c{suffix}").read_bytes() == (tmp_path / f"a{suffix}").read_bytes()
    assert back.sidecar["tokenizer"] == MADE["tokenizer"] and back.sidecar["empty"] == 3
    assert back.fingerprint() == first.fingerprint()


def test_the_sidecar_sums_counts_and_lists_the_inputs(tmp_path):
    write_pair(tmp_path / "a" / "0", [[1]], sidecar={"empty": 1, "text_bytes": 10, "source": "x", **MADE})
    write_pair(tmp_path / "a" / "1", [[2], [3]], sidecar={"empty": 2, "text_bytes": 20, **MADE})
    foreign = TokenStore(write_pair(tmp_path / "b", [[4, 5]]))
    known = merge_token_stores([TokenStore(tmp_path / "a")], tmp_path / "known")
    assert {key: value for key, value in known.sidecar.items() if key != "inputs"} == {
        "documents": 3, "tokens": 3, "empty": 3, "text_bytes": 30, **MADE
    }  # fmt: skip
    assert [entry["documents"] for entry in known.sidecar["inputs"]] == [1, 2]
    half_known = merge_token_stores([known, foreign], tmp_path / "half")
    assert "empty" not in half_known.sidecar  # the foreign pair does not say it
    assert (half_known.sidecar["documents"], half_known.sidecar["tokens"]) == (4, 5)
    half_known.check_tokenizer("abc", 6)
    with pytest.raises(InputError, match="document 3 holds token 5"):
        half_known.check_tokenizer("abc", 5)
    with pytest.raises(InputError, match="made with another tokenizer"):
        half_known.check_tokenizer("abd", 6)
    json.loads((tmp_path / "half.json").read_text(encoding="utf-8"))


def test_what_must_not_be_merged(tmp_path):
    first = TokenStore(write_pair(tmp_path / "a", [[1]], sidecar=MADE))
    other = TokenStore(write_pair(tmp_path / "b", [[1]], sidecar={"tokenizer": {"fingerprint": "abd"}}))
    signed, floating = (
        TokenStore(write_pair(tmp_path / str(place), [[1]], dtype)) for place, dtype in enumerate(["int64", "float32"])
    )
    unsigned = TokenStore(write_pair(tmp_path / "u", [[1]], "uint64"))
    for inputs, reason in (
        ([], "nothing to merge"),
        ([first, other], r"different tokenizers: .*a \(abc\), .*b \(abd\)"),
        ([first, TokenStore(tmp_path / "a.bin")], r"a\.bin: given 2 times"),
        ([signed, unsigned], "no dtype holds tokens of int64 and uint64"),
        ([signed, floating], "no dtype holds tokens of float32 and int64"),
    ):
        with pytest.raises(InputError, match=reason):
            merge_token_stores(inputs, tmp_path / "out")
    before = (tmp_path / "a.bin").read_bytes()
    for legacy in (False, True):
        with pytest.raises(InputError, match=r"a\.bin exists already"):
            merge_token_stores([first], tmp_path / "a", legacy)
    assert (tmp_path / "a.bin").read_bytes() == before and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_failed_merge_leaves_no_file(tmp_path, monkeypatch, error, legacy):
    def fail(_):
        raise error

    store = TokenStore(write_pair(tmp_path / "a", [[1]]))
    monkeypatch.setattr(token_merge.os, "fsync", fail)
    expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="no space left" if isinstance(error, OSError) else None):
        merge_token_stores([store], tmp_path / "out" / "merged", legacy)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged.lock"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing is tidied up."""


@pytest.mark.parametrize("legacy", [False, True])
def test_a_merge_that_is_killed_at_any_place_can_be_repeated(tmp_path, monkeypatch, legacy):
    """Before each call that moves a file, and again at the same place of the second attempt."""
    columns = {".id_hashes.npy": np.array([5, 6], np.uint64), ".text_bytes.npy": np.array([2, 3], np.int64)}
    prefix = write_pair(tmp_path / "a", [[1], [2, 3]], sidecar=MADE, hashes=np.array([7, 8], np.uint64))
    for suffix, column in columns.items():
        np.save(prefix + suffix, column)
    replace, moves = os.replace, 0

    def killed(*names):
        nonlocal moves
        moves += 1
        if moves == place:
            raise Killed
        replace(*names)

    for place in range(1, 8):  # the sidecar is moved twice
        output = tmp_path / f"out{place}" / "merged"
        for _ in range(2):
            moves = 0
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(token_merge.os, "replace", killed)
                patch.setattr(token_merge.Path, "unlink", lambda *_, **__: None)
                merge_token_stores([TokenStore(prefix)], output, legacy)
        merged = merge_token_stores([TokenStore(prefix)], output, legacy)
        assert read_all(merged) == [[1], [2, 3]] and merged.text_bytes().tolist() == [2, 3]
        assert merged.id_hashes().tolist() == [5, 6] and not list(output.parent.glob("*partial*.npy"))
        with pytest.raises(InputError, match="exists already"):
            merge_token_stores([TokenStore(prefix)], output, legacy)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the device that is always full is Linux's")
def test_a_full_disk_is_noticed_while_tokens_are_written(tmp_path):
    store = TokenStore(write_pair(tmp_path / "a", [[1] * 100_000]))
    with pytest.raises(OSError) as caught, open("/dev/full", "wb") as full:
        token_merge._copy_tokens([store], np.dtype(np.uint16), full, 100_000)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.heavy
def test_a_merge_past_2_gib_takes_little_memory(tmp_path):
    """Two sparse inputs of 1.6 GB: the last sequence begins past 2 GiB, and only chunks are in memory at a time."""
    for name in "ab":
        token_merge.write_index(str(tmp_path / f"{name}.idx"), np.array([800_000_000, 2]), np.dtype(np.uint16))
        with open(tmp_path / f"{name}.bin", "wb") as file:
            file.seek(1_600_000_000)
            file.write(np.array([ord(name), 7], "<u2").tobytes())
        (tmp_path / f"{name}.json").write_text('{"documents": 2}')
        np.save(tmp_path / f"{name}.hashes.npy", np.arange(2, dtype=np.uint64))  # hashing zeros is not the matter
    inputs = [TokenStore(tmp_path / name) for name in "ab"]
    before = psutil.Process().memory_info().rss
    peak = 0

    def watch():
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, psutil.Process().memory_info().rss)

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        merged = merge_token_stores(inputs, tmp_path / "merged")
    finally:
        done.set()
        watcher.join()
    assert peak - before < 100e6
    assert merged.document_starts.tolist() == [0, 800_000_000, 800_000_002, 1_600_000_002, 1_600_000_004]
    assert merged.tokens[800_000_000:800_000_003].tolist() == [ord("a"), 7, 0]
    assert merged.tokens[1_600_000_002:].tolist() == [ord("b"), 7]
