"""Reading token stores: pairs, legacy pairs and folders of them, compared with lists in memory and others' files."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
from hypothesis import given
from hypothesis import strategies as st
from test_megatron import GOLDEN_BIN, GOLDEN_IDX, index_bytes

import common.tokens.store as token_store
from common.console import InputError
from common.corpus.splits import content_hash
from common.tokens.store import TokenStore
from common.tokens.token_index import write_index


def write_pair(prefix, documents, dtype=np.uint16, sidecar=None, hashes=None):
    """Write documents, lists of ids, as another program does, or as we do: with a sidecar and hashes."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    flat = [token for document in documents for token in document]
    (prefix.parent / f"{prefix.name}.bin").write_bytes(np.array(flat, dtype).tobytes())
    write_index(f"{prefix}.idx", np.array([len(document) for document in documents], np.int64), np.dtype(dtype))
    if sidecar is not None:
        (prefix.parent / f"{prefix.name}.json").write_text(json.dumps(sidecar))
    if hashes is not None:
        np.save(f"{prefix}.hashes.npy", hashes)
    return str(prefix)


def write_legacy_pair(prefix, documents, dtype=np.uint16):
    flat = [token for document in documents for token in document]
    np.save(f"{prefix}_ids.npy", np.array(flat, dtype))
    docs = np.arange(len(documents) + 1)
    np.savez(f"{prefix}_idx.npz", lens=np.array([len(document) for document in documents], np.int32), docs=docs)
    return str(prefix)


def read_all(store):
    starts = store.document_starts.tolist()
    return [store.tokens[start:end].tolist() for start, end in zip(starts, starts[1:], strict=False)]


def test_a_golden_pair_is_read_by_any_of_its_names(tmp_path):
    (tmp_path / "pair.idx").write_bytes(GOLDEN_IDX)
    (tmp_path / "pair.bin").write_bytes(GOLDEN_BIN)
    for name in ("pair", "pair.bin", "pair.idx", ""):
        store = TokenStore(tmp_path / name)
        assert store.tokens[:].tolist() == [1, 2, 3, 4, 5] and store.tokens.dtype == np.uint16
        assert store.document_starts.tolist() == [0, 3, 5] and store.documents == 2
        assert store.sidecar == {} and store.prefix == str(tmp_path / "pair")
        assert len(set(store.document_hashes().tolist())) == 2


def test_datatroves_pair_is_ours_byte_for_byte(tmp_path):
    documents = [[1, 2, 3], [65_499], list(range(1000))]
    for token_size, dtype in ((2, np.uint16), (4, np.int32)):
        theirs = MegatronTokenizedFile(str(tmp_path), f"theirs-{token_size}", token_size=token_size)
        for document in documents:
            theirs.write(document)
        theirs.close()
        write_pair(tmp_path / f"ours-{token_size}", documents, dtype)
        for suffix in (".bin", ".idx"):
            ours = (tmp_path / f"ours-{token_size}{suffix}").read_bytes()
            assert ours == (tmp_path / f"theirs-{token_size}{suffix}").read_bytes()
        store = TokenStore(tmp_path / f"theirs-{token_size}")
        assert read_all(store) == documents and store.tokens.dtype == dtype


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatrons_pair_is_ours_byte_for_byte(tmp_path, dtype):
    """Documents of several sequences, of no sequence, and of an empty sequence. Heavy: the import takes 10 s."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    documents = [[[1, 2], [3]], [], [list(range(500))], [[], [60_000]]]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    sequences = [sequence for document in documents for sequence in document]
    sizes, marks = [len(sequence) for sequence in sequences], np.cumsum([0, *map(len, documents)])
    write_index(str(tmp_path / "ours.idx"), np.array(sizes), np.dtype(dtype), marks)
    (tmp_path / "ours.bin").write_bytes(np.concatenate(sequences).astype(dtype).tobytes())
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    assert read_all(TokenStore(tmp_path / "theirs")) == [sum(document, []) for document in documents]
    read = IndexedDataset(str(tmp_path / "ours"))
    assert [read[place].tolist() for place in range(len(read))] == sequences
    assert read.document_indices.tolist() == marks.tolist()


@pytest.mark.heavy
def test_ten_million_documents_open_in_little_memory(tmp_path):
    """The benchmark's own figure of memory. Its time is not compared, because other machines are slower."""
    script = [sys.executable, str(ROOT / "benchmarks" / "token_store.py")]
    for step in ("make", "measure"):
        output = subprocess.run([*script, step, str(tmp_path), "10000000"], check=True, stdout=subprocess.PIPE).stdout
    figures = json.loads(output)
    assert figures["added_bytes"] < 300e6


@given(
    st.lists(st.lists(st.lists(st.integers(0, 255), max_size=5), max_size=4), min_size=1, max_size=5),
    st.sampled_from([np.uint8, np.uint16, np.int32, np.uint32, np.int64]),
    st.data(),
)
def test_a_folder_is_one_store(tmp_path_factory, shards, dtype, data):
    """Any window, also across the border of two shards, equals that of the joined lists."""
    folder = tmp_path_factory.mktemp("shards")
    for place, documents in enumerate(shards):
        (write_legacy_pair if place % 2 else write_pair)(folder / f"{place:05d}", documents, dtype)
    store = TokenStore(folder)
    documents = [document for shard in shards for document in shard]
    assert read_all(store) == documents
    flat = sum(documents, [])
    assert len(store.tokens) == len(flat)
    start, stop = data.draw(st.integers(0, len(flat))), data.draw(st.integers(0, len(flat) + 2))
    for window in (store.tokens[start:stop], store.tokens.read(start, stop)):
        assert window.tolist() == flat[start:stop] and window.dtype == store.tokens.dtype
    again = pickle.loads(pickle.dumps(store.tokens))
    assert again[:].tolist() == flat


def test_tokens_travel_to_worker_processes_by_name(tmp_path):
    store = TokenStore(write_pair(tmp_path / "pair", [[7] * 100_000]))
    travelling = pickle.dumps(store.tokens)
    assert len(travelling) < 1000 and pickle.loads(travelling)[99_998:].tolist() == [7, 7]


def test_folders_that_are_not_one_store_are_refused(tmp_path, capsys):
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="a folder without token stores"):
        TokenStore(tmp_path / "none")
    for place, dtype in enumerate([np.uint16, np.int32]):
        write_pair(tmp_path / "widths" / f"{place}", [[1]], dtype)
    with pytest.raises(InputError, match="uint16 in .*0, int32 in .*1.*prepare.py merge"):
        TokenStore(tmp_path / "widths")
    write_pair(tmp_path / "half" / "0", [[1]])
    (tmp_path / "half" / "1.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"1\.idx: no such file"):
        TokenStore(tmp_path / "half")
    write_pair(tmp_path / "both" / "0", [[1]])
    write_legacy_pair(tmp_path / "both" / "0", [[1]])
    with pytest.raises(InputError, match="would count twice"):
        TokenStore(tmp_path / "both")
    for place, fingerprint in enumerate(["abc", "abd"]):
        write_pair(tmp_path / "made" / f"{place}", [[1]], sidecar={"tokenizer": {"fingerprint": fingerprint}})
    with pytest.raises(InputError, match=r"different tokenizers: .*0 \(abc\), .*1 \(abd\)"):
        TokenStore(tmp_path / "made")
    write_pair(tmp_path / "partial" / "0", [[1]])
    (tmp_path / "partial" / "1.partial.bin").write_bytes(b"")
    assert TokenStore(tmp_path / "partial").documents == 1
    assert "1.partial.bin is not read" in capsys.readouterr().out


def test_missing_files_are_named(tmp_path):
    (tmp_path / "pair.bin").write_bytes(GOLDEN_BIN)
    with pytest.raises(InputError, match=r"pair\.idx: no such file"):
        TokenStore(tmp_path / "pair.bin")
    with pytest.raises(InputError, match=r"nothing\.bin: no such file"):
        TokenStore(tmp_path / "nothing")
    write_legacy_pair(tmp_path / "old", [[1]])
    (tmp_path / "old_idx.npz").unlink()
    with pytest.raises(InputError, match=r"old_idx\.npz: no such file"):
        TokenStore(tmp_path / "old")


def test_a_legacy_pair_is_read_by_any_of_its_names(tmp_path):
    documents = [[5, 6], [], [7]]
    write_legacy_pair(tmp_path / "old", documents, np.int32)
    for name in ("old", "old_ids.npy", "old_idx.npz", ""):
        store = TokenStore(tmp_path / name)
        assert read_all(store) == documents and store.tokens.dtype == np.int32


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (np.zeros((5, 1), np.uint16), r"of shape \(5, 1\)"),
        (np.zeros(5, np.bool_), "holds bool"),
        (np.array([None] * 5), "not an array that can be mapped"),
        (np.zeros(4, np.uint16), "describes 5 tokens, but the _ids.npy beside it holds 4"),
    ],
)
def test_damaged_legacy_tokens_are_refused(tmp_path, ids, reason):
    write_legacy_pair(tmp_path / "old", [[1, 2, 3], [4, 5]])
    np.save(tmp_path / "old_ids.npy", ids)
    with pytest.raises(InputError, match=reason):
        TokenStore(tmp_path / "old")
    (tmp_path / "old_ids.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(InputError, match="not an array that can be mapped"):
        TokenStore(tmp_path / "old")


def test_sidecars_of_shards_are_summed(tmp_path):
    made = {"tokenizer": {"fingerprint": "abc", "end_token": "</s>"}}
    write_pair(tmp_path / "0", [[1], [2, 3]], sidecar={"documents": 2, "tokens": 3, "empty": 4, "odd": 1, **made})
    write_pair(tmp_path / "1", [[4]], sidecar={"empty": 5, "skip_malformed": True, "source": "x", **made})
    assert TokenStore(tmp_path).sidecar == {"documents": 3, "tokens": 4, "empty": 9, **made}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"documents": 2', "not the sidecar"),
        (b"\xff\xfe", "not the sidecar"),
        (b'[{"text": "an article"}]', "not the sidecar.*a text of yours, move it"),
        (b'{"tokenizer": "abc"}', "not the sidecar"),
        (b'{"documents": 3, "tokens": 5}', "3 documents and 5 tokens, but the pair beside it holds 2 and 5"),
        (b'{"documents": 2, "tokens": 6}', "of another pair"),
        (b'{"documents": "2"}', "of another pair"),
        (b"[" * 100_000, "not the sidecar"),
    ],
)
def test_a_damaged_sidecar_is_refused(tmp_path, content, reason):
    write_pair(tmp_path / "pair", [[1, 2, 3], [4, 5]])
    (tmp_path / "pair.json").write_bytes(content)
    with pytest.raises(InputError, match=reason):
        TokenStore(tmp_path / "pair")


@pytest.mark.parametrize("hashes", [np.zeros(3, np.uint64), np.zeros(2, np.int64), np.zeros((2, 1), np.uint64)])
def test_damaged_hashes_are_refused(tmp_path, hashes):
    store = TokenStore(write_pair(tmp_path / "pair", [[1], [2]], hashes=hashes))
    with pytest.raises(InputError, match=r"pair\.hashes\.npy"):
        store.document_hashes()
    (tmp_path / "pair.hashes.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"pair\.hashes\.npy"):
        store.document_hashes()


def hashes_by_hand(documents):
    return [content_hash(np.array(document, "<i4").tobytes()) for document in documents]


def test_hashes_are_those_of_the_text_or_of_the_ids(tmp_path):
    ours = write_pair(tmp_path / "a", [[1], [2]], hashes=np.array([9, 8], np.uint64))
    assert TokenStore(ours).document_hashes().tolist() == [9, 8]
    assert TokenStore(ours).id_hashes().tolist() == hashes_by_hand([[1], [2]])
    documents = [[1, 2], [], [3], [1, 2], [70_000]]
    for dtype in (np.int32, np.uint32, np.int64, np.float64):
        store = TokenStore(write_pair(tmp_path / "b" / "x", documents, dtype))
        assert store.document_hashes().tolist() == store.id_hashes().tolist() == hashes_by_hand(documents)
    shards = TokenStore(write_legacy_pair(tmp_path / "b" / "y", [[3]], np.float64).removesuffix("/y"))
    assert shards.document_hashes().tolist() == hashes_by_hand([*documents, [3]])
    assert shards.duplicates().tolist() == [3, 5] and shards.duplicates().dtype == np.int64


@pytest.mark.parametrize("chunk", [1, 2, 4_000_000])
def test_hashes_of_ids_leave_end_tokens_out(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(token_store, "CHUNK_TOKENS", chunk)
    documents = [[5, 6], [7], [], [5, 6]]
    for name, closed in (("with", [[*d, 0] for d in documents]), ("before", [[0, *d] for d in documents])):
        store = TokenStore(write_pair(tmp_path / name, closed), tmp_path / "cache", end_token_id=0)
        assert store.id_hashes().tolist() == hashes_by_hand(documents)
        again = TokenStore(tmp_path / name, tmp_path / "cache", end_token_id=7)  # not what was kept for the other
        assert again.id_hashes().tolist() == hashes_by_hand([[t for t in d if t != 7] for d in closed])


def test_sizes_of_texts_are_known_of_some_documents(tmp_path):
    write_pair(tmp_path / "shards" / "a", [[1], [2]])
    np.save(tmp_path / "shards" / "a.text_bytes.npy", np.array([3, 40], np.int64))
    assert TokenStore(tmp_path / "shards").text_bytes().tolist() == [3, 40]
    write_pair(tmp_path / "shards" / "b", [[3]])
    assert TokenStore(tmp_path / "shards").text_bytes().tolist() == [3, 40, -1]
    assert TokenStore(tmp_path / "shards" / "b").text_bytes() is None


def test_documents_are_hashed_alike_in_chunks_of_any_size(tmp_path, monkeypatch):
    documents = [[1, 2], [], [], [3] * 50, [4], []]
    prefix = write_pair(tmp_path / "x", documents)
    whole = TokenStore(prefix).document_hashes().tolist()
    for size in (1, 2, 3, 50, 51):
        monkeypatch.setattr("common.tokens.store.CHUNK_TOKENS", size)
        assert TokenStore(prefix).document_hashes().tolist() == whole


def test_hashes_are_kept_and_never_those_of_a_replaced_file(tmp_path, monkeypatch):
    prefix, cache = write_pair(tmp_path / "x", [[1], [2]]), tmp_path / "cache"
    first = TokenStore(prefix, cache).document_hashes().tolist()
    with monkeypatch.context() as patch:
        patch.setattr(token_store, "hash_documents", None)  # so that hashing fails
        assert TokenStore(prefix, cache).document_hashes().tolist() == first
        with pytest.raises(TypeError):
            TokenStore(prefix).document_hashes()
    times = os.stat(f"{prefix}.bin").st_mtime_ns
    (tmp_path / "x.bin").write_bytes(np.array([1, 3], np.uint16).tobytes())  # of the same size
    second = TokenStore(prefix, cache).document_hashes().tolist()
    assert second[0] == first[0] and second[1] != first[1]
    os.utime(tmp_path / "x.bin", ns=(times, times))
    assert TokenStore(prefix, cache).document_hashes().tolist() == second
    write_pair(tmp_path / "x", [[1, 3]])  # the same tokens, another index
    assert len(TokenStore(prefix, cache).document_hashes()) == 1
    (tmp_path / "blocked").write_text("a file where the folder should be")
    assert len(TokenStore(prefix, tmp_path / "blocked").document_hashes()) == 1


@given(st.lists(st.integers(0, 6), max_size=40))
def test_duplicates_are_documents_seen_before(tmp_path_factory, tokens):
    store = TokenStore(write_pair(tmp_path_factory.mktemp("x") / "x", [[token] for token in tokens]))
    expected = [place for place, token in enumerate(tokens) if token in tokens[:place]]
    assert store.duplicates().tolist() == expected


def test_the_fingerprint_is_of_the_documents(tmp_path):
    prints = [
        TokenStore(write_pair(tmp_path / str(place), documents)).fingerprint()
        for place, documents in enumerate([[[1], [2]], [[2], [1]], [[1, 2]], [[1], [2]], []])
    ]
    assert prints[0] == prints[3] and len(set(prints)) == 4
    for place in (0, 1):
        write_pair(tmp_path / "shards" / str(place), [[place + 1]])
    assert TokenStore(tmp_path / "shards").fingerprint() == prints[0]


def test_another_tokenizer_is_refused(tmp_path):
    sidecar = {"tokenizer": {"fingerprint": "abc"}}
    made = TokenStore(write_pair(tmp_path / "shards" / "a", [[1], [4, 5]], sidecar=sidecar))
    made.check_tokenizer("abc", 6)
    with pytest.raises(InputError, match="made with another tokenizer .fingerprint abc, the given one has abd"):
        made.check_tokenizer("abd", 6)
    write_pair(tmp_path / "shards" / "b", [[9]])
    half_known = TokenStore(tmp_path / "shards")
    half_known.check_tokenizer("abc", 10)
    with pytest.raises(InputError, match="document 2 holds token 9"):
        half_known.check_tokenizer("abc", 9)
    with pytest.raises(InputError, match="made with another tokenizer"):
        half_known.check_tokenizer("abd", 10)


@pytest.mark.parametrize("chunk", [1, 2, 4_000_000])
def test_ids_beyond_the_vocabulary_are_refused(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(token_store, "CHUNK_TOKENS", chunk)
    store = TokenStore(write_pair(tmp_path / "x", [[1], [], [4, 5], [6]]))
    store.check_tokenizer("anything", vocabulary_size=7)
    with pytest.raises(InputError, match="document 2 holds token 5, but the given tokenizer has ids 0 to 4: it was pr"):
        store.check_tokenizer("anything", vocabulary_size=5)
    for dtype, token, said in ((np.int32, -1, "-1"), (np.float32, 1.5, "1.5"), (np.float64, np.nan, "nan")):
        with pytest.raises(InputError, match=f"document 1 holds token {said}"):
            TokenStore(write_pair(tmp_path / "y", [[3], [2, token]], dtype)).check_tokenizer("anything", 7)
    TokenStore(write_pair(tmp_path / "y", [[3.0]], np.float32)).check_tokenizer("anything", 7)
    with pytest.raises(InputError, match=r"18,446,744,073,709,551,615"):
        TokenStore(write_pair(tmp_path / "y", [[2**64 - 1]], np.uint64)).check_tokenizer("anything", 7)


def test_ids_beyond_the_vocabulary_are_refused_in_our_own_store_too(tmp_path, monkeypatch):
    """A sidecar says which tokenizer made the store, and nothing of what happened to it since."""
    prefix = write_pair(tmp_path / "x", [[1], [4, 5]], sidecar={"tokenizer": {"fingerprint": "abc"}})
    with monkeypatch.context() as patch:
        TokenStore(prefix, tmp_path / "cache").check_tokenizer("abc", 6)
        patch.setattr(token_store.TokenStore, "_check_ids", None)  # the next check must not read the tokens again
        TokenStore(prefix, tmp_path / "cache").check_tokenizer("abc", 6)
    (tmp_path / "x.bin").write_bytes(np.array([1, 4, 6], np.uint16).tobytes())
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(
            InputError, match="document 1 holds token 6.*its sidecar names this tokenizer, so it is dam"
        ):
            TokenStore(prefix, cache).check_tokenizer("abc", 6)


def test_the_share_of_documents_that_end_with_the_end_token(tmp_path):
    store = TokenStore(write_pair(tmp_path / "x", [[1, 0], [0], [], [0, 1]]))
    assert store.end_token_share(0) == 0.5 and store.end_token_share(7) == 0
    assert TokenStore(write_pair(tmp_path / "none", [])).end_token_share(0) == 0
    many = TokenStore(write_pair(tmp_path / "many", [[1, 0]] * 1000 + [[1]] * 1000))
    assert many.end_token_share(0) == 1


def test_a_store_of_no_documents_is_read(tmp_path):
    store = TokenStore(write_pair(tmp_path / "x", []))
    assert store.documents == 0 and len(store.tokens) == 0 and store.tokens[:].tolist() == []
    assert store.document_hashes().tolist() == [] and len(store.fingerprint()) == 16
    store.check_tokenizer("anything", 5)


def test_a_loss_mask_is_not_ignored_silently(tmp_path, capsys):
    prefix = write_pair(tmp_path / "x", [[1]])
    (tmp_path / "x.lsm").write_bytes(b"\1")
    TokenStore(prefix)
    assert "loss mask, is not used" in capsys.readouterr().out


def test_a_file_that_is_cut_off_while_read_is_one_clear_error(tmp_path):
    store = TokenStore(write_pair(tmp_path / "x", [[1] * 5000]))
    os.truncate(tmp_path / "x.bin", 100)
    with pytest.raises(InputError, match="became shorter"):
        store.check_tokenizer("anything", 5)


@given(st.data())
def test_random_damage_to_a_pair_is_refused_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    (folder / "pair.idx").write_bytes(index_bytes([2, 1, 2, 0], [0, 4, 6, 10], [0, 2, 2, 4]))
    (folder / "pair.bin").write_bytes(GOLDEN_BIN)
    victim = folder / data.draw(st.sampled_from(["pair.idx", "pair.bin"]))
    content = bytearray(victim.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    victim.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        store = TokenStore(folder / "pair")
    except InputError:
        return
    assert sum(read_all(store), []) == store.tokens[:].tolist() and len(store.document_hashes()) == store.documents
