"""Streaming data sets: what is read, from which hub, and what happens when a hub fails."""

import gzip
import io
import json
import os
import re
import socket
import subprocess
import sys
import time

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from conftest import ROOT
from stand_in import be_impatient, running, use_hubs

from common.arguments import SharedArguments
from common.console import InputError
from common.corpus.hub_dataset import find_files, hub_records
from common.corpus.sources import resolve_sources
from common.corpus.transfer import ATTEMPTS
from common.tokens.train_tokenizer import tokenizer_trained_on
from common.tokens.writer import tokenize

TEXTS = [f"第 {i} 篇：" + "水" * (i % 700) for i in range(3000)]
CARD = b"""---
configs:
- config_name: zh
  data_files:
  - split: train
    path: zh/*
- config_name: en
  data_files:
  - split: train
    path: en/*.jsonl
---
"""


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": i, "text": t}, ensure_ascii=False).encode() + b"\n" for i, t in enumerate(texts))


def array(texts: list[str]) -> bytes:
    return json.dumps([{"title": "x", "text": text} for text in texts], ensure_ascii=False).encode()


def parquet(texts: list[str]) -> bytes:
    stream = io.BytesIO()
    table = pyarrow.table({"id": [str(i) for i in range(len(texts))], "text": texts})
    pyarrow.parquet.write_table(table, stream, row_group_size=500)
    return stream.getvalue()


def csv(texts: list[str]) -> bytes:
    return b"text\n" + b"".join(f'"{text}"\n'.encode() for text in texts)


FORMATS = {
    "a.jsonl": jsonl,
    "a.json": array,
    "a.parquet": parquet,
    "a.csv": csv,
    "a.jsonl.gz": lambda texts: gzip.compress(jsonl(texts)),
    "a.jsonl.zst": lambda texts: zstandard.compress(jsonl(texts)),
    "a.txt": lambda texts: "\n\n".join(texts).encode(),
}
SHARDS = {
    "README.md": b"# A data set\n",
    "data/train-00000-of-00002.parquet": parquet(TEXTS[:1000]),
    "data/train-00001-of-00002.parquet": parquet(TEXTS[1000:]),
    "data/validation-00000-of-00001.parquet": parquet(["never"]),
    ".gitattributes": b"* text",
}
SUBSETS = {
    "README.md": CARD,
    "zh/b.jsonl": jsonl(TEXTS[2:4]),
    "zh/a.jsonl": jsonl(TEXTS[:2]),
    "en/a.jsonl": jsonl(["one"]),
}


@pytest.fixture(params=["ModelScope", "Hugging Face"])
def hub(request, monkeypatch):
    """One hub, whose files a test sets; every other is closed."""
    be_impatient(monkeypatch)
    with running(request.param, {}) as server:
        use_hubs(monkeypatch, **{request.param.lower().replace(" ", "_"): server.url})
        yield server


def texts_of(identifier: str = "owner/name") -> list[str]:
    return [record["text"] for _, record in hub_records(identifier)]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_streamed(hub, name):
    hub.files = {name: FORMATS[name](TEXTS)}
    assert texts_of() == TEXTS


@pytest.mark.parametrize("name", FORMATS)
def test_a_stream_that_breaks_is_continued(hub, name):
    hub.files = {name: FORMATS[name](TEXTS)}
    hub.faults[name].extend(["cut 1000", 429, "cut 100", 500, "silent"])
    assert texts_of() == TEXTS
    assert not hub.faults[name]


@pytest.mark.parametrize("name", FORMATS)
def test_a_stream_that_ends_early_is_an_error_and_not_the_end(hub, name):
    """The first half may be yielded, but the end must be an error."""
    hub.files = {name: FORMATS[name](TEXTS)}
    hub.faults[name].extend([f"cut {len(hub.files[name]) // 2}"] + ["cut 0"] * 99)
    begin, found = time.monotonic(), []
    with pytest.raises(InputError, match=f"after {ATTEMPTS} attempts"):
        for _, record in hub_records("owner/name"):
            found.append(record["text"])
    assert found == TEXTS[: len(found)] and len(found) < len(TEXTS)
    assert time.monotonic() - begin < 40


@pytest.mark.parametrize(
    ("files", "identifier", "subset"),
    [
        (SHARDS, "owner/name", None),
        (SUBSETS, "owner/name:zh", "zh"),
        (SUBSETS, "owner/name:en", "en"),
        ({"train.jsonl": jsonl(["a"]), "dev.jsonl": jsonl(["b"]), "test.jsonl": jsonl(["c"])}, "owner/name", None),
        ({"one.jsonl": jsonl(["a"]), "two.jsonl": jsonl(["b"]), "x.txt": b"left out"}, "owner/name", None),
        ({"中文 数据+1.jsonl": jsonl(["a"]), "sub dir/b#2.jsonl": jsonl(["b"])}, "owner/name", None),
    ],
)
def test_the_records_are_those_that_datasets_loads(hub, tmp_path, files, identifier, subset):
    """`datasets` reads the same repository from disk: an independent reader, and an independent choice of files."""
    hub.files = files
    for name, content in files.items():
        (tmp_path / "r" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "r" / name).write_bytes(content)
    folder, cache = str(tmp_path / "r"), str(tmp_path / "cache")
    expected = datasets.load_dataset(folder, name=subset, split="train", cache_dir=cache)["text"]
    assert texts_of(identifier) == list(expected)


def test_one_file_can_be_named(hub, capsys):
    hub.files = {"2024.json": array(TEXTS[:5]), "2023.json": array(TEXTS[5:9])}
    assert texts_of("owner/name:2023.json") == TEXTS[5:9]
    hub.files = SHARDS
    assert texts_of() == TEXTS
    assert "not read: data/validation-00000-of-00001.parquet\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "identifier", "reason"),
    [
        (SUBSETS, "owner/name", r"pick one among the available configs: \['zh', 'en'\]"),
        (SUBSETS, "owner/name:fr", r"'fr' not found. Available: \['zh', 'en'\]"),
        ({"test.jsonl": jsonl(["a"])}, "owner/name", "no train split, only test"),
        ({"README.md": b"", "a.bin": b"x"}, "owner/name", "none of its files can be streamed .README.md, a.bin"),
        (SHARDS, "owner/other", "404|not found|not exist"),
    ],
)
def test_what_a_hub_does_not_have(hub, files, identifier, reason):
    hub.files = files
    with pytest.raises(InputError) as caught:
        texts_of(identifier)
    message = str(caught.value)
    assert re.search(rf"{hub.kind}[^\n]*({reason})", message), message
    assert message.count("does not answer") == 2 and "Three ways to continue" in message
    assert "/tmp" not in message  # not our temporary folder, which means nothing to the user


def test_modelscope_comes_first_and_the_next_hub_follows(monkeypatch):
    be_impatient(monkeypatch)
    files = {"a.jsonl": jsonl(["from here"])}
    with running("ModelScope", dict(files)) as first, running("Hugging Face", dict(files)) as second:
        use_hubs(monkeypatch, first.url, second.url)
        assert texts_of() == ["from here"] and first.asked and not second.asked
        first.files.clear()
        assert texts_of() == ["from here"] and second.asked
        first.answer = lambda path, query: None  # it answers, but has no such data set
        assert texts_of() == ["from here"]


def test_a_token_goes_to_the_chosen_hub_only(monkeypatch):
    from common.corpus import hub_dataset as hub_data

    be_impatient(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with running("Hugging Face", {"a.jsonl": jsonl(["x"])}) as server:
        use_hubs(monkeypatch, hugging_face=server.url)
        _, (file,) = find_files("owner/name")
        assert file.headers["authorization"] == "Bearer hf_secret" and "hf_secret" not in repr(file)
        monkeypatch.setattr(hub_data, "hub_endpoints", lambda: {"mirror": server.url})  # as the chosen one failed
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        _, (file,) = find_files("owner/name")
        assert "authorization" not in file.headers


def test_hubs_that_do_not_answer(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_hubs(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(InputError, match=r"(?s)cannot find data set owner/name:.*Three ways to continue") as caught:
            texts_of()
        assert time.monotonic() - begin < 30
    assert str(caught.value).count("does not answer") == 3


def test_a_hub_that_stalls_at_the_question(hub, monkeypatch):
    monkeypatch.setattr("common.corpus.transfer.LIST_SECONDS", 0.5)
    answer = hub.answer
    hub.answer = lambda path, query: answer(path, query) if path == "/" else hub.stopped.wait()
    begin = time.monotonic()
    with pytest.raises(InputError, match="(TimeoutError: no answer within 0.5 seconds|ReadTimeout)"):
        texts_of()
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("identifier", ["name", "a/b/c", "../x", "owner/", "owner/name:"])
def test_an_invalid_identifier(identifier):
    with pytest.raises(InputError, match="not a hub id like owner/name"):
        texts_of(identifier)


def test_a_note_names_the_files_of_a_cache_and_a_hub_is_asked_first(hub, tmp_path, monkeypatch, capsys):
    """If the files have no numbers, ModelScope's cache cannot show that others are missing."""
    from common.corpus import hub_dataset as hub_data

    monkeypatch.setattr(hub_data, "modelscope_snapshot", lambda _: str(tmp_path))
    (tmp_path / "part1.jsonl").write_bytes(jsonl(["one"]))
    hub.files = {"part1.jsonl": jsonl(["one"]), "part2.jsonl": jsonl(["two"])}
    assert texts_of() == ["one", "two"] and "note:" not in capsys.readouterr().out
    hub.answer = lambda path, query: None  # it answers, but has no such data set
    assert texts_of() == ["one"]
    said = capsys.readouterr().out
    assert "ModelScope's cache may be incomplete; it has 1 file: part1.jsonl\n" in said and f"  {hub.kind}" in said
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert texts_of() == ["one"] and "may be incomplete" in capsys.readouterr().out
    assert texts_of("owner/name:part1.jsonl") == ["one"] and "note:" not in capsys.readouterr().out
    (tmp_path / "part2.jsonl.incomplete").write_bytes(b"{")
    with pytest.raises(InputError, match="ModelScope's cache: ValueError: part2.jsonl.incomplete was left unfinished"):
        texts_of()


def test_what_was_made_of_half_a_cache_is_not_taken_for_the_whole(hub, tmp_path, monkeypatch):
    """A launch that finds half of the data set in a cache, and later ones that find more, or a hub."""
    from common.corpus import hub_dataset as hub_data

    arguments = SharedArguments(tokenizer="train", vocabulary_size=300, cache_dir=str(tmp_path / "made"))

    def documents() -> int:
        [source] = resolve_sources(["owner/name"])
        return tokenize(source, tokenizer_trained_on([source], arguments), arguments).documents

    answer, hub.answer = hub.answer, lambda path, query: None
    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr(hub_data, "modelscope_snapshot", lambda _: str(tmp_path / "snapshot"))
    (tmp_path / "snapshot" / "part1.jsonl").write_bytes(jsonl(TEXTS[:20]))
    assert documents() == documents() == 20
    (tmp_path / "snapshot" / "part2.jsonl").write_bytes(jsonl(TEXTS[20:50]))
    assert documents() == documents() == 50
    hub.answer = answer
    hub.files = {f"part{number}.jsonl": jsonl(TEXTS[30 * number : 30 * number + 30]) for number in range(3)}
    assert documents() == 90
    hub.answer = lambda path, query: None  # what a hub gave is whole, and is kept
    hub.asked.clear()
    assert documents() == 90 and not hub.asked
    assert len(list((tmp_path / "made").glob("owner-name-tokenizer-*"))) == 3


def in_process(code: str, home, **environment) -> subprocess.CompletedProcess:
    """Run in another process, because the libraries read at import where their caches are."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MODELSCOPE_", "RANK"))}
    caches = {"HF_HOME": str(home / "hf"), "MODELSCOPE_CACHE": str(home / "modelscope"), "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=clean | caches | environment, cwd=ROOT, capture_output=True, text=True, timeout=90,
    )  # fmt: skip


READ = "from common.corpus.hub_dataset import hub_records; print(len([r for _, r in hub_records('owner/name')]))"
FETCH = {
    "ModelScope": "import modelscope; modelscope.snapshot_download('owner/name', repo_type='dataset'{})",
    "Hugging Face": "import huggingface_hub as h; h.snapshot_download('owner/name', repo_type='dataset'{})",
}


@pytest.mark.parametrize(
    ("kind", "offline"), [("ModelScope", "HF_DATASETS_OFFLINE"), ("Hugging Face", "HF_HUB_OFFLINE")]
)
def test_offline_a_cache_is_read_but_not_if_it_is_incomplete(kind, offline, tmp_path):
    """The hub's own library fills its cache; then there is no network."""
    with running(kind, dict(SHARDS)) as server:
        hubs = {"HF_ENDPOINT": server.url, "MODELSCOPE_ENDPOINT": server.url}
        whole, part = FETCH[kind].format(""), FETCH[kind].format(", allow_patterns=['*00000-of*']")
        for code, home in ((whole, tmp_path / "whole"), (part, tmp_path / "part")):
            fetched = in_process(code, home, **hubs)
            assert fetched.returncode == 0, fetched.stderr
    result = in_process(READ, tmp_path / "whole", **hubs, **{offline: "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "3000" and f"from {kind}'s cache" in result.stdout
    result = in_process(READ, tmp_path / "part", **hubs, **{offline: "1"})
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(rf"{kind}'s cache: [^\n]*(1 of 2 shards|incomplete)", result.stderr), result.stderr
