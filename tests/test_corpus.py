"""Reading documents: every format gives the same ones, and whatever is wrong with a file is one clear error."""

import bz2
import gzip
import json
import lzma
import os
import re
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from common.corpus import CorpusCounts, read_documents
from common.held_out import content_hash, held_out_below
from common.messages import InputError

DOCUMENTS = ["one\ntwo", "今天天气很好。", 'naïve café 😀 \\ "quoted"']
JSONL = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(DOCUMENTS)).encode()
ARRAY = json.dumps([{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)], indent=1, ensure_ascii=False).encode()
TEXT = "\n\n".join(DOCUMENTS).encode()
MARK = b"\xef\xbb\xbf"
COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda content: lzma.compress(content, preset=0),
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,  # as the zstd command does
}


def parquet(**columns) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def read(tmp_path, name: str, content: bytes, text_field="text", skip_malformed=False):
    """Return the documents of a file with this content, and what was counted."""
    (tmp_path / name).write_bytes(content)
    counts = CorpusCounts()
    return list(read_documents(str(tmp_path / name), text_field, skip_malformed, counts)), counts


def refused(tmp_path, name: str, content: bytes, reason: str, **how):
    """Assert that such a file ends in an error that begins with the file's name, and matches ``reason``."""
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path / name))}.*{reason}"):
        read(tmp_path, name, content, **how)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", ARRAY),
        ("mark.json", MARK + ARRAY),
        ("lines.json", JSONL),
        ("a.jsonl", JSONL),
        ("a.ndjson", JSONL),
        ("array.jsonl", b"\n " + ARRAY),
        ("mark.jsonl", MARK + JSONL),
        ("windows.jsonl", JSONL.replace(b"\n", b"\r\n")),
        ("blank_lines.jsonl", b"\n \t\n" + JSONL.replace(b"\n", b"\n\n  \n")),
        ("no_last_newline.jsonl", JSONL.rstrip()),
        ("a.b.jsonl", JSONL),
        *((f"a.jsonl{suffix}", compress(JSONL)) for suffix, compress in COMPRESS.items()),
        *((f"a.json{suffix}", compress(ARRAY)) for suffix, compress in COMPRESS.items()),
        *((f"a.txt{suffix}", compress(TEXT)) for suffix, compress in COMPRESS.items()),
        # Split inside a document, and inside a character.
        ("members.jsonl.gz", gzip.compress(JSONL[:30]) + gzip.compress(JSONL[30:])),
        ("frames.jsonl.zst", b"".join(zstandard.compress(JSONL[i : i + 7]) for i in range(0, len(JSONL), 7))),
        ("frames.txt.zst", b"".join(zstandard.compress(TEXT[i : i + 7]) for i in range(0, len(TEXT), 7))),
        ("a.txt", TEXT),
        ("mark.txt", MARK + TEXT),
        ("windows.txt", TEXT.replace(b"\n", b"\r\n")),
        ("blank_lines.txt", b"\n\n" + TEXT.replace(b"\n\n", b"\n \n\t\n\n") + b"\n\n \n"),
        ("a.parquet", parquet(id=range(3), text=DOCUMENTS)),
    ],
)
def test_every_format_gives_the_same_documents(tmp_path, name, content):
    documents, counts = read(tmp_path, name, content)
    assert documents == DOCUMENTS
    assert counts == CorpusCounts(documents=3, text_bytes=sum(len(text.encode()) for text in DOCUMENTS))


def test_another_text_field(tmp_path):
    assert read(tmp_path, "a.jsonl", b'{"text": 1, "body": "one"}', text_field="body")[0] == ["one"]
    assert read(tmp_path, "a.parquet", parquet(text=[1], body=["one"]), text_field="body")[0] == ["one"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "malformed line"),
        (b"not json", "malformed line"),
        (b'{"text": "\xff\xfe"}', "malformed line .*utf-8"),
        (b"[" * 100_000, "malformed line"),
        (b'{"text": "\\ud800"}', "field 'text' is not valid Unicode"),
        (b'{"txt": "one", "id": 2}', r"no field 'text'; the fields are \['id', 'txt'\]"),
        (b'{"text": ["one"]}', "field 'text' holds list, not text"),
        (b'{"text": null}', "field 'text' holds NoneType, not text"),
        (b'"one"', "expected an object with a field 'text', found str"),
    ],
)
def test_a_malformed_line_is_named_or_skipped_and_counted(tmp_path, line, reason):
    content = b'{"text": "one"}\n\n' + line + b'\n{"text": " "}\n{"text": "four"}\n'
    refused(tmp_path, "a.jsonl", content, f", line 3: {reason}.*--skip_malformed")
    documents, counts = read(tmp_path, "a.jsonl", content, skip_malformed=True)
    assert documents == ["one", "four"]
    assert counts == CorpusCounts(documents=2, text_bytes=7, empty=1, malformed=1)


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.json", b'[{"text": "one"}, {"text": 2}, {"text": "three"}]', "item 2"),
        ("a.txt", b"one\n\ntwo\n\xff\n\nthree", "line 3"),
        ("a.parquet", parquet(text=["one", None, "three"]), "document 2"),
    ],
)
def test_a_malformed_document_of_another_format(tmp_path, name, content, where):
    refused(tmp_path, name, content, f", {where}: .*--skip_malformed")
    documents, counts = read(tmp_path, name, content, skip_malformed=True)
    assert documents == ["one", "three"]
    assert counts == CorpusCounts(documents=2, text_bytes=8, malformed=1)


@pytest.mark.parametrize(
    ("content", "after"),
    [
        (b'[{"text": "one"}, {"text": "two"}, {"text" "three"}]', 2),
        (b'[{"text": "one"}, {"text": "two"}', 2),
        (b'[{"text": "one"}, {"text": "\xff"}]', 1),
        (b'[{"text": "one"}] and more', 1),
        (b"[", 0),
    ],
)
@pytest.mark.parametrize("skip_malformed", [False, True])
def test_a_malformed_array_is_never_skipped(tmp_path, content, after, skip_malformed):
    reason = f": the array is malformed after item {after} "
    refused(tmp_path, "a.json", content, reason, skip_malformed=skip_malformed)


@pytest.mark.parametrize("kind", ["jsonl", "json", "txt"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_that_is_damaged(tmp_path, kind, suffix):
    """Cut off anywhere, even after the last document or where a line ends: never a shorter file."""
    content = {"jsonl": JSONL, "json": ARRAY, "txt": TEXT}[kind] * (1 if kind == "json" else 3)
    whole = COMPRESS[suffix](content)
    for end in (3, 10, len(whole) // 2, len(whole) - 1):
        refused(tmp_path, f"a.{kind}{suffix}", whole[:end], "(damaged or cut off|cannot be read)", skip_malformed=True)
    refused(tmp_path, f"a.{kind}{suffix}", content, "(damaged or cut off|cannot be read)")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_long_compressed_file_that_is_damaged(tmp_path, suffix):
    """Damage beyond the first buffer: documents come first, then the error."""
    lines = [json.dumps({"text": os.urandom(1000).hex()}).encode() + b"\n" for _ in range(1500)]
    whole = COMPRESS[suffix](b"".join(lines))
    refused(tmp_path, f"a.jsonl{suffix}", whole[: len(whole) // 2], ": (damaged or cut off|cannot be read)")
    middle = len(whole) // 2
    scrambled = whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 99]) + whole[middle + 99 :]
    refused(tmp_path, f"a.jsonl{suffix}", scrambled, "(damaged or cut off|cannot be read|malformed)")


def test_a_frame_that_is_cut_off_after_whole_ones(tmp_path):
    frame = zstandard.compress(JSONL)
    refused(tmp_path, "a.jsonl.zst", frame + frame[:-1], ": (damaged or cut off|cannot be read)")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", ": the file is empty"),
        ("a.json", b" \n\t\r\n", ": nothing but white space in it"),
        ("mark.json", MARK, ": nothing but white space in it"),
        ("a.jsonl.gz", gzip.compress(b""), ": nothing but white space in it"),
        ("a.jsonl.zst", zstandard.compress(b"\n"), ": nothing but white space in it"),
        ("a.txt", b" \n \n", ": no document in it"),
        ("a.json", b"[]", ": no document in it"),
        ("a.json", b'[{"text": "  "}]', ": no document in it .*'empty': 1"),
        ("a.parquet", b"PAR1 no parquet PAR1", ": cannot be read"),
        ("a.csv", b"text\none", r": unknown format '\.csv'. Known are \.parquet, and \.json"),
        ("a", b"one", ": unknown format ''"),
        ("a.gz", gzip.compress(JSONL), r": unknown format '\.gz'"),
    ],
)
def test_a_file_without_documents(tmp_path, name, content, reason):
    refused(tmp_path, name, content, reason)


def test_all_documents_malformed(tmp_path):
    refused(tmp_path, "a.jsonl", b"1\n2\n", ": no document in it .*'malformed': 2", skip_malformed=True)


def test_a_missing_file_and_a_folder(tmp_path):
    for source, reason in [
        (str(tmp_path / "a.jsonl"), "no such file"),
        ("no_such.jsonl", "no such file"),
        ("folder/no_such.jsonl", "no such file"),
        ("no_such", "no such file"),
        (str(tmp_path), "is a folder"),
    ]:
        with pytest.raises(InputError, match=f"^{re.escape(source)}: {reason}"):
            next(read_documents(source, "text", False, CorpusCounts()))


def test_a_data_set_on_an_unreachable_hub(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"(?s)data set owner/name: .* does not answer.*Three ways on.*--data /path"):
        next(read_documents("owner/name", "text", False, CorpusCounts()))


@pytest.mark.parametrize("suffix", [".json", ".json.zst", ".jsonl"])
def test_memory_stays_flat(tmp_path, suffix):
    """A file of 60 MB, read in a few MB."""
    item = json.dumps({"text": "水" * 20_000}, ensure_ascii=False).encode()
    content = b"[" + b",".join([item] * 1000) + b"]" if suffix != ".jsonl" else b"\n".join([item] * 1000)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(zstandard.compress(content) if suffix.endswith(".zst") else content)
    assert len(content) > 60e6
    del content
    counts = CorpusCounts()
    tracemalloc.start()
    for _ in read_documents(str(path), "text", False, counts):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.documents == 1000
    assert peak < 10e6


def test_content_hash():
    """The vectors are coreutils' ``printf abc | b2sum -l 64`` and ``printf '' | b2sum -l 64``, read little-endian."""
    assert content_hash(b"abc").to_bytes(8, "little").hex() == "d8bb14d833d59559"
    assert content_hash(b"").to_bytes(8, "little").hex() == "e4a6a0577479b2b4"


def test_the_share_held_out():
    assert held_out_below(0.5) == 1 << 63
    below = sum(content_hash(str(i).encode()) < held_out_below(0.1) for i in range(20_000))
    assert abs(below / 20_000 - 0.1) < 5 * (0.1 * 0.9 / 20_000) ** 0.5  # five standard deviations


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_share_that_is_none(fraction):
    with pytest.raises(InputError, match=f"--held_out_fraction {fraction}: must lie between 0 and 1"):
        held_out_below(fraction)
