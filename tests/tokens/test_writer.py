"""Writing token stores: complete or absent, equal with any number of threads, found again, never written twice."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, store_of_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import common.tokens.writer as token_writer
from common.arguments import SharedArguments
from common.console import InputError
from common.corpus.documents import CorpusCounts
from common.corpus.sources import resolve_source, resolve_sources
from common.tokens import batches
from common.tokens.store import TokenStore
from common.tokens.writer import tokenize, write_token_store


def number_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer that turns "17 4" into [17, 4]; 0 is the end of a document."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({str(number): number for number in range(size)}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="0", unk_token="0")


SMALL, LARGE = number_tokenizer(65_499), number_tokenizer(65_500)


def spelled(documents: list[list[int]]) -> list[str]:
    return [" ".join(map(str, document)) for document in documents]


def write(prefix, documents, tokenizer=SMALL, **options) -> TokenStore:
    return write_token_store(spelled(documents), CorpusCounts(), tokenizer, prefix, {}, **options)


def read(store: TokenStore) -> list[list[int]]:
    starts = store.document_starts
    return [store.tokens[a:b].tolist() for a, b in zip(starts[:-1], starts[1:], strict=True)]


def test_the_bytes_are_those_of_the_format(tmp_path):
    write(tmp_path / "pair", [[1, 2], [4]])
    assert (tmp_path / "pair.bin").read_bytes() == np.array([1, 2, 0, 4, 0], "<u2").tobytes()
    # [[1, 2, 0], [4, 0]] as uint16, from the format's description.
    assert (tmp_path / "pair.idx").read_bytes() == bytes.fromhex(
        "4d4d49444944580000 0100000000000000 08 0200000000000000 0300000000000000 03000000 02000000"
        "0000000000000000 0600000000000000 0000000000000000 0100000000000000 0200000000000000"
    )


def test_ids_beyond_the_number_of_tokens_are_stored_whole(tmp_path):
    """The tokenizer has few tokens, and one has id 70,000, which would be 4,464 in 16 bits."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"0": 0, "1": 1, "70000": 70_000}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    gaps = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="0", unk_token="0")
    (tmp_path / "c.jsonl").write_text('{"text": "1 70000"}\n')
    store = tokenize(
        resolve_source(str(tmp_path / "c.jsonl")), gaps, SharedArguments(cache_dir=str(tmp_path / "cache"))
    )
    assert read(store) == [[1, 70_000, 0]] and store.tokens.dtype == np.int32
    assert "vocabulary_size" in store.sidecar["tokenizer"]  # so that a store of an earlier version is not found


def test_an_id_that_would_wrap_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "vocabulary_size", lambda _: 300)
    monkeypatch.setattr(token_writer, "token_dtype", lambda _: np.dtype(np.uint16))
    wide = number_tokenizer(70_000)
    write(tmp_path / "fits", [[65_535]], wide)
    with pytest.raises(InputError, match="gave id 65,536, but its largest is 299: it does not fit uint16"):
        write(tmp_path / "x", [[65_536]], wide)


def lossy_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words in lower case: it knows "one" and "two", and calls everything else [UNK]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"</s>": 0, "[UNK]": 1, "one": 2, "two": 3}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")  # it does not name its unknown token


def test_what_a_tokenizer_loses_is_counted_and_said(tmp_path, capsys):
    texts = ["one two", "One  two", "水水水 two"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "c.jsonl").write_text(lines, encoding="utf-8")
    for _ in range(2):  # also when the store is found again
        arguments = SharedArguments(cache_dir=str(tmp_path / "cache"))
        store = tokenize(resolve_source(str(tmp_path / "c.jsonl")), lossy_tokenizer(), arguments)
        assert store.text_bytes().tolist() == [7, 8, 13]
        said = capsys.readouterr().out
        assert "16.67% of the tokens of" in said and "are [UNK]" in said  # 1 of 6
        assert "2 of the first 3 documents of" in said and "do not come back" in said
    assert store.duplicates().tolist() == [1]  # another text, the same tokens
    foreign = store_of_tokens(tmp_path, [[2, 3]])
    tokenize(resolve_source(f"{foreign.prefix}.bin"), lossy_tokenizer(), arguments)
    assert "bits per byte count the bytes of the decoded tokens" in capsys.readouterr().out


def test_a_byte_level_tokenizer_loses_nothing(tmp_path, capsys):
    from common.tokens.train_tokenizer import train_tokenizer

    texts = [json.loads(line)["text"] for line in (ROOT / "data" / "sample_zh.jsonl").open(encoding="utf-8")]
    arguments = SharedArguments(cache_dir=str(tmp_path))
    store = tokenize(resolve_source(str(ROOT / "data" / "sample_zh.jsonl")), train_tokenizer(texts, 500), arguments)
    assert store.text_bytes().tolist() == [len(text.encode()) for text in texts]
    assert (store.sidecar["unknown_tokens"], store.sidecar["changed_documents"]) == (0, 0)
    assert store.sidecar["tried_documents"] == len(texts) and "note" not in capsys.readouterr().out


def test_datatrove_writes_the_same_bytes(tmp_path):
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile

    documents = [[1, 2, 3], [65_498], [], list(range(1, 1000))]
    for tokenizer, token_size in ((SMALL, 2), (LARGE, 4)):
        theirs = MegatronTokenizedFile(str(tmp_path), f"theirs{token_size}", token_size=token_size)
        for document in documents:
            theirs.write([*document, 0])
        theirs.close()
        write(tmp_path / f"ours{token_size}", documents, tokenizer)
        for suffix in (".bin", ".idx"):
            ours = (tmp_path / f"ours{token_size}{suffix}").read_bytes()
            assert ours == (tmp_path / f"theirs{token_size}{suffix}").read_bytes()


@settings(max_examples=10)  # each builds an encoder twice
@given(st.lists(st.lists(st.integers(1, 65_498), max_size=5), min_size=1, max_size=8))
def test_what_is_written_is_read(tmp_path_factory, documents):
    for tokenizer, dtype in ((SMALL, np.uint16), (LARGE, np.int32)):
        store = write(tmp_path_factory.mktemp("store") / "tokens", documents, tokenizer)
        assert read(store) == [[*document, 0] for document in documents]
        assert store.tokens.dtype == dtype
        counts = {name: store.sidecar[name] for name in ("documents", "tokens", "end_tokens")}
        tokens = sum(len(document) + 1 for document in documents)
        assert counts == {"documents": len(documents), "tokens": tokens, "end_tokens": len(documents)}


def test_the_store_does_not_depend_on_threads_or_batches(tmp_path, monkeypatch):
    documents = [[number % 60_000 + 1] * (number % 13) for number in range(2_000)]
    write(tmp_path / "one", documents, workers=1)
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 50)
    write(tmp_path / "many", documents, workers=7)
    for suffix in (".bin", ".idx", ".hashes.npy", ".id_hashes.npy", ".text_bytes.npy"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"many{suffix}").read_bytes()


def test_duplicates_are_dropped_on_request_only_and_counted(tmp_path, monkeypatch):
    documents = [[1, 2], [3], [1, 2], [4, 5, 6], [3], [1, 2]]
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 5)  # copies in the same batch and in later ones
    assert len(read(write(tmp_path / "all", documents))) == 6
    store = write(tmp_path / "first", documents, drop_duplicates=True)
    assert read(store) == [[1, 2, 0], [3, 0], [4, 5, 6, 0]]
    assert (store.sidecar["duplicates"], store.sidecar["duplicate_tokens"]) == (3, 8)
    assert store.sidecar["documents"] == len(store.document_hashes()) == 3


@pytest.mark.parametrize("batch_characters", [1, 5, 500_000])
@pytest.mark.parametrize(
    ("limit", "documents", "tokens"), [(3, 1, 3), (4, 1, 3), (5, 2, 5), (8, 2, 5), (9, 3, 9), (11, 4, 11), (99, 4, 11)]
)
def test_a_limit_takes_the_whole_documents_that_fit(tmp_path, monkeypatch, limit, documents, tokens, batch_characters):
    """Documents of 3, 2, 4 and 2 tokens. Once the one of 4 does not fit, the last one is not taken, though it would."""
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", batch_characters)
    whole = [[1, 2], [3], [4, 5, 6], [7]]
    store = write(tmp_path / "store", whole, max_tokens=limit)
    assert read(store) == [[*document, 0] for document in whole[:documents]]
    assert (store.sidecar["documents"], store.sidecar["tokens"]) == (documents, tokens)
    left_out = store.sidecar.get("documents_after_limit", 0)
    assert left_out == {1: int(documents < 4), 500_000: 4 - documents}.get(batch_characters, left_out)


def test_what_a_limit_counts_does_not_depend_on_threads(tmp_path, monkeypatch):
    """Reading runs ahead of tokenizing, further with more threads: what is read there is not counted."""
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 400)
    lines = []
    for number in range(3_000):
        lines.append(
            json.dumps({"text": f"{1_000 + number} " * 20}) + "\n" + '{"text": ""}\n{"text": 1}\n' * (number % 3 == 0)
        )
    (tmp_path / "c.jsonl").write_text("".join(lines), encoding="utf-8")
    found = []
    for cores in (1, 7):
        monkeypatch.setattr(token_writer, "usable_cores", lambda cores=cores: cores)
        arguments = SharedArguments(
            cache_dir=str(tmp_path / f"cache{cores}"), skip_malformed=True, max_data_tokens="2.1K"
        )
        store = tokenize(resolve_source(str(tmp_path / "c.jsonl")), SMALL, arguments)
        assert (store.documents, len(store.tokens)) == (100, 2_100)  # of 21 tokens each
        assert store.sidecar["text_bytes"] == 100 * 100
        found.append(store.sidecar)
    assert found[0] == found[1]
    after = found[0]["documents_after_limit"]
    # A text has 100 characters, so four make a batch, and the next one has the documents 100 to 103. An empty and a
    # malformed one follow the documents 0, 3, ... 102.
    assert after == 4 and found[0]["empty"] == found[0]["malformed"] == len(range(0, 104, 3))


def test_a_limit_below_the_first_document_is_refused(tmp_path):
    with pytest.raises(InputError, match="--max_data_tokens 2: the first document alone has 3 tokens"):
        write(tmp_path / "store" / "tokens", [[1, 2], [3]], max_tokens=2)
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["tokens.lock"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path, monkeypatch, code):
    def full(*_):
        raise OSError(code, "no space")

    monkeypatch.setattr(token_writer, "write_index", full)
    with pytest.raises(InputError, match="no space left while tokenizing.*--cache_dir"):
        write(tmp_path / "store" / "tokens", [[1, 2]])
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["tokens.lock"]


def test_a_bad_document_leaves_nothing(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "1 2"}\n{"text": 3}\n', encoding="utf-8")
    with pytest.raises(InputError, match="line 2: field 'text' holds int"):
        tokenize(resolve_source(str(path)), SMALL, SharedArguments(cache_dir=str(tmp_path / "cache")))
    left = [path.name for path in (tmp_path / "cache").glob("corpus-*/*")]
    assert sorted(left) == ["CACHEDIR.TAG", "tokens.lock"]


def corpus(path: Path, documents: int, length: int = 200) -> Path:
    lines = (json.dumps({"text": f"{number} " * length}) for number in range(1, documents + 1))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_text_is_tokenized_once_until_something_changes(tmp_path, capsys):
    path, arguments = corpus(tmp_path / "c.jsonl", 3), SharedArguments(cache_dir=str(tmp_path / "cache"))

    def said() -> str:
        tokenize(resolve_source(str(path)), SMALL, arguments)
        return capsys.readouterr().out

    assert "tokenizing into" in said()
    assert "tokenized before" in said()
    corpus(path, 4)
    assert "tokenizing into" in said()
    arguments.text_field = "{text}."
    assert "tokenizing into" in said()
    assert "tokenized before" in said()


def test_the_limit_is_in_the_key_of_the_cache(tmp_path, capsys):
    path = corpus(tmp_path / "c.jsonl", 30)  # documents of 201 tokens
    folders = set()
    for limit, documents in ((None, 30), ("1000", 4), ("1K", 4), ("2000", 9), ("1M", 30), (None, 30)):
        arguments = SharedArguments(cache_dir=str(tmp_path / "cache"), max_data_tokens=limit)
        capsys.readouterr()
        store = tokenize(resolve_source(str(path)), SMALL, arguments)
        said = capsys.readouterr().out
        assert ("tokenized before" in said) == (str(store.prefix) in folders)
        folders.add(str(store.prefix))
        assert store.documents == documents
        assert ("what follows was not read" in said) == (documents < 30)
        assert ("all of it was read" in said) == (limit == "1M")
    assert len(folders) == 4
    with pytest.raises(InputError, match="is a token store, which is read whole"):
        tokenize(resolve_source(f"{store.prefix}.bin"), SMALL, SharedArguments(max_data_tokens="1K"))


LAUNCH = """
import sys
from common.arguments import SharedArguments
from common.corpus.sources import resolve_source
from common.tokens.writer import tokenize
sys.path[:0] = {folders!r}
from test_writer import SMALL
store = tokenize(resolve_source({data!r}), SMALL, SharedArguments(cache_dir={cache!r}))
print("documents", store.documents)
"""


def launch(data: Path, cache: Path) -> subprocess.Popen:
    folders = [str(ROOT / "tests" / "tokens"), str(ROOT / "tests")]  # of test_writer and of conftest
    code = LAUNCH.format(folders=folders, data=str(data), cache=str(cache))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_and_run_again_the_store_is_the_same(tmp_path):
    data = corpus(tmp_path / "c.jsonl", 20_000)
    killed = launch(data, tmp_path / "cache")
    while not any(path.stat().st_size for path in tmp_path.glob("cache/*/tokens.partial.bin")):
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not list(tmp_path.glob("cache/*/tokens.json"))

    arguments = SharedArguments(cache_dir=str(tmp_path / "cache"))
    again = tokenize(resolve_source(str(data)), SMALL, arguments)
    arguments.cache_dir = str(tmp_path / "other")
    alone = tokenize(resolve_source(str(data)), SMALL, arguments)
    assert again.documents == 20_000 and again.fingerprint() == alone.fingerprint()
    assert Path(again.prefix + ".bin").read_bytes() == Path(alone.prefix + ".bin").read_bytes()
    assert not list(tmp_path.glob("cache/*/*.partial*"))


def test_a_cache_inside_of_the_corpus_hides_no_document(tmp_path, capsys):
    (tmp_path / "c" / "more").mkdir(parents=True)
    corpus(tmp_path / "c" / "a.jsonl", 3)
    corpus(tmp_path / "c" / "more" / "b.jsonl", 5)
    arguments = SharedArguments(cache_dir=str(tmp_path / "c" / "more"))
    for _ in range(2):
        store = tokenize(resolve_source(str(tmp_path / "c")), SMALL, arguments)
        assert store.documents == 8
    said = capsys.readouterr().out
    assert said.count("tokenizing into") == 1 and "not read" not in said
    (tmp_path / "c" / "more" / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55")
    resolve_source(str(tmp_path / "c"))
    assert "marked as a cache by CACHEDIR.TAG, so its files are not read: " in capsys.readouterr().out


def test_many_at_once_on_a_cold_cache_write_it_once(tmp_path):
    data = corpus(tmp_path / "c.jsonl", 5_000)
    processes = [launch(data, tmp_path / "cache") for _ in range(3)]
    outputs = [process.communicate() for process in processes]
    assert all("documents 5000" in out for out, _ in outputs), outputs
    assert sum("tokenizing into" in out for out, _ in outputs) == 1
    assert len(list(tmp_path.glob("cache/*/tokens.bin"))) == 1


def test_the_sidecar_says_where_the_tokens_come_from(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "1 2"}\n{"text": " "}\nbroken\n', encoding="utf-8")
    arguments = SharedArguments(cache_dir=str(tmp_path / "cache"), skip_malformed=True)
    sidecar = tokenize(resolve_source(str(path)), SMALL, arguments).sidecar
    assert sidecar["sources"][0]["files"][0]["file"] == "c.jsonl"
    assert (sidecar["documents"], sidecar["tokens"], sidecar["empty"], sidecar["malformed"]) == (1, 3, 1, 1)
    assert sidecar["text_bytes"] == 3 and sidecar["tokenizer"]["end_token"] == "0"
    assert set(asdict(CorpusCounts())) <= set(sidecar)


def test_a_token_store_is_used_as_it_is(tmp_path, capsys):
    write(tmp_path / "mine", [[1, 2], [70]])
    [source] = resolve_sources([str(tmp_path / "mine.bin")])
    store = tokenize(source, SMALL, SharedArguments(cache_dir=str(tmp_path / "cache")))
    assert read(store) == [[1, 2, 0], [70, 0]]
    assert "note" not in capsys.readouterr().out
    (tmp_path / "theirs").mkdir()
    store_of_tokens(tmp_path / "theirs", [[1, 2], [3]], end=[])
    [theirs] = resolve_sources([str(tmp_path / "theirs" / "tokens.bin")])
    tokenize(theirs, SMALL, SharedArguments(cache_dir=str(tmp_path / "cache")))
    assert "only 0% of the first documents" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds token 70"):
        tokenize(source, number_tokenizer(50), SharedArguments(cache_dir=str(tmp_path / "cache")))
