"""Files -> records: every layout gives the same records, and every fault of a file is one clear error."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from common.console import InputError
from common.corpus.formats import NotUtf8, format_by_content, format_of, known_encoding
from common.corpus.records import JsonScanner, file_records

RECORDS = [
    {"id": 1, "text": "one\ntwo", "tags": ["a"]},
    {"id": 2, "text": "今天天气很好。", "tags": []},
    {"id": 3, "text": 'naïve café 😀 \\ "quoted" \x00 \u2028', "tags": None},
]
TEXTS = [record["text"] for record in RECORDS]
JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS, indent=1, ensure_ascii=False).encode()
COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda content: lzma.compress(content, preset=0),
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,  # as the zstd command does
}


def read(name: str, content: bytes, fields=None) -> list[tuple[str, object]]:
    return list(file_records(name, lambda: io.BytesIO(content), fields))


def refused(name: str, content: bytes, reason: str, fields=None) -> None:
    """Assert that such a file ends in an error that begins with the file's name, and matches ``reason``."""
    with pytest.raises(InputError, match=f"(?s)^{re.escape(name)}{reason}"):
        read(name, content, fields)


def parquet(row_group_size=None, **columns) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, row_group_size=row_group_size)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.json", ".json"),
        ("a.b.JSONL.GZ", ".jsonl"),
        ("folder.csv/a.txt.xz", ".txt"),
        ("c4-train.00000-of-01024.json.gz", ".json"),
        ("a.parquet", ".parquet"),
        ("a.parquet.gz", None),
        ("a.jsonl.zip", None),
        ("a.gz", None),
        ("gz", None),
        (".jsonl", None),
        ("", None),
    ],
)
def test_format_of(name, kind):
    assert format_of(name) == kind


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("array.json", ARRAY),
        ("dense.json", json.dumps(RECORDS, separators=(",", ":")).encode()),
        ("lines.json", JSONL),
        ("array.jsonl", b"\n " + ARRAY),
        ("lines.ndjson", b"\n \t\n" + JSONL.replace(b"\n", b"\r\n\r\n")),
        ("no_last_newline.jsonl", JSONL.rstrip()),
        ("object.json", b'{"data": %s}' % ARRAY),
        ("lines_of_object.json", b'{\n"RECORDS":%s\n}\n' % ARRAY),
        ("metadata.json", b'{"version": "1",\n"columns": ["id"], "data":%s, "end": {"x": [{}]}}' % ARRAY),
    ],
)
@pytest.mark.parametrize("suffix", ["", *COMPRESS])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_layout_of_json_gives_the_same_records(name, content, suffix, mark):
    content = COMPRESS.get(suffix, bytes)(mark + content)
    assert [record for _, record in read(name + suffix, content)] == RECORDS


def test_where_a_record_is():
    assert [where for where, _ in read("a.jsonl", b"\n" + JSONL)] == [f"a.jsonl, line {n}" for n in (2, 3, 4)]
    assert [where for where, _ in read("a.json", ARRAY)] == [f"a.json, item {n}" for n in (1, 2, 3)]
    assert [where for where, _ in read("a.txt", b"\n\na\nb\n\n\nc")] == ["a.txt, line 3", "a.txt, line 7"]
    assert [where for where, _ in read("a.csv", b'text\n"a\nb"\nc\n\n"d"')] == [f"a.csv, line {n}" for n in (2, 4, 6)]
    rows = read("a.parquet", parquet(text=["a", "b", "c"], row_group_size=2))
    assert [where for where, _ in rows] == [f"a.parquet, row {n} (row group {g})" for n, g in ((1, 0), (2, 0), (3, 1))]


# Any JSON text, in reads of any size: the scanner must return what json.loads returns.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


LAYOUTS = ["%s", "%s\r", " %s", "%s \r", "\t%s", "\ufeff%s", "%s,", "%s 1", "%s}", "[%s", "NaN", "\x0b%s", "1e"]


@settings(max_examples=100, deadline=None)
@given(VALUES, st.sampled_from(LAYOUTS))
def test_a_line_is_what_json_loads_gives(value, layout):
    line = layout.replace("%s", json.dumps(value)) + "\n"
    _, (_, found) = read("a.jsonl", b"{}\n\xef\xbb\xbf" + line.encode())  # a mark, so that a second one is left
    try:
        expected = json.loads(line)
    except ValueError as error:
        assert isinstance(found, ValueError) and str(found) == f"malformed line ({error})"
    else:
        assert json.dumps(found) == json.dumps(expected)  # NaN is not equal to itself


class Dripping(io.RawIOBase):
    """Returns a few bytes a read, so that the end of a read falls on every place of the text."""

    def __init__(self, content: bytes, size: int):
        self._stream, self._size = io.BytesIO(content), size

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(self._size)


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, max_size=5), st.integers(1, 9), st.booleans(), st.sampled_from([None, 0, 2]))
def test_the_scanner_gives_what_json_loads_gives(items, size, ascii_only, indent):
    text = json.dumps(items, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "replace")
    scanner = JsonScanner(Dripping(text, size), 1 << 20)
    assert list(scanner.items()) == json.loads(text)
    assert scanner.peek() == ""


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=3), st.integers(1, 9), st.data())
def test_an_array_that_is_cut_off_is_never_a_shorter_one(items, size, data):
    text = json.dumps(items).encode()
    end = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(ValueError):
        list(JsonScanner(Dripping(text[:end], size), 1 << 20).items())


def test_lone_surrogates_are_kept_to_be_refused():
    """ijson's C backend turns them into "?"."""
    content = rb'[{"text": "a\ud800b"}, {"text": "\udc00\ud83d"}, {"text": "\ud83d\ude00"}]'
    assert [record["text"] for _, record in read("a.json", content)] == ["a\ud800b", "\udc00\ud83d", "😀"]
    content = b'[{"text": "a\xffb"}, {"text": "c"}]'
    assert [record["text"] for _, record in read("a.json", content)] == ["a\udcffb", "c"]


@pytest.mark.parametrize(
    ("content", "after"),
    [
        (b'[{"text": "one"}, {"text": "two"}, {"text" "three"}]', 2),
        (b'[{"text": "one"}, {"text": "two"}', 2),
        (b'[{"text": "one"}, {"text": "two"}, ', 2),
        (b'[{"text": "one"},]', 1),
        (b'[{"text": "one"} {"text": "two"}]', 1),
        (b'[{"text": "one"}] and more', 1),
        (b'[{"text": "one"}][]', 1),
        (b'[{"text": "o\nne"}]', 0),
        (b"[", 0),
        (b"[" + b"[" * 1_000_000, 0),
        (b'[{"a":' * 1_000_000, 0),
    ],
)
def test_a_malformed_array(content, after):
    refused("a.json", content, f": the array is malformed after item {after} ")


def test_a_value_without_end_is_not_collected_in_memory(monkeypatch):
    monkeypatch.setattr("common.corpus.records.LARGEST_DOCUMENT_BYTES", 1 << 21)
    content = b'["' + b"x" * (1 << 23)
    refused("a.json", content, ": the array is malformed after item 0 .a value of more than 2,097,152")
    refused("a.jsonl", content[1:], ": a line of more than 2,097,152 bytes")
    refused("a.txt", b"x\n" * (1 << 22), ", line 1: no blank line in 2,097,15")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": [{"text": "x"}], "b": [{}]}', "the documents may be in 'a' or in 'b', after item 1"),
        (b'{"a": [{"text": "x"}, {}', "cut off, after item 2"),
        (b'{"a": [{"text": "x"}, {"text": "y', "Unterminated string starting at, after item 1"),
        (b'{"a": [{"text": "x"}], "b": 1', "cut off, after item 1"),
        (b'{"a": [{"text": "x"}]}\n{', "something follows its end, after item 1"),
        (b'{"a": [{"text": "x"}] "b"', "expected , or }, found '\"', after item 1"),
        (b'{"a": [{"text": "x"}], 3: 4}', "3 is not the name of a field, after item 1"),
    ],
)
def test_one_object_that_is_not_clear(content, reason):
    refused("a.json", content, f": is read as one object that holds .* in an array, but {re.escape(reason)}")


def test_one_line_that_is_a_record_is_read_as_one():
    line = b'{"text": "one", "spans": [{"text": "two"}]}\n'
    assert [record["text"] for _, record in read("a.json", line)] == ["one"]
    line = b'{"spans": [{"start": 1}], "story_text": "one"}\n'
    assert [record["story_text"] for _, record in read("a.json", line * 2, ["story_text"])] == ["one", "one"]
    assert [record["story_text"] for _, record in read("a.json", line)] == ["one"]
    assert len(read("a.jsonl", b'{"data": [{"text": "one"}]}\n')) == 1
    assert [record for _, record in read("a.json", b'{"d":[{"m":{"t":1}}]}', ["m.t"])] == [{"m": {"t": 1}}]
    large = b'{"text": "%s"}\n' % (b"x" * 3_000_000)
    assert [len(record["text"]) for _, record in read("a.json", large * 2)] == [3_000_000] * 2


def test_malformed_lines_are_named_in_their_place():
    bad = [b'{"text": "cut', b"nonsense", b'{"text": "\xff\xfe"}', b"[" * 100_000 + b"x", b"9" * 5000]
    records = read("a.jsonl", b"\n".join([b'{"text": "first"}', *bad, b'{"text": "ok"}']))
    assert [where for where, _ in records] == [f"a.jsonl, line {n}" for n in range(1, 8)]
    assert [isinstance(record, ValueError) for _, record in records] == [False, True, True, True, True, True, False]
    assert isinstance(records[3][1], NotUtf8) and "byte 0xff at 10: invalid start byte" in str(records[3][1])
    assert records[6][1] == {"text": "ok"}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_several_members_frames_or_streams(suffix):
    compress = COMPRESS[suffix]
    pieces = b"".join(compress(JSONL[i : i + 7]) for i in range(0, len(JSONL), 7))  # cuts lines and characters
    assert [record for _, record in read("a.jsonl" + suffix, pieces)] == RECORDS
    with_empty_ones = compress(b"") + compress(JSONL) + compress(b"")
    assert [record for _, record in read("a.jsonl" + suffix, with_empty_ones)] == RECORDS
    with_one_inside = compress(JSONL[:7]) + compress(b"") * 2 + compress(JSONL[7:])
    assert [record for _, record in read("a.jsonl" + suffix, with_one_inside)] == RECORDS
    # If it is cut off between two of them, nothing shows that it is not complete.
    assert len(read("a.jsonl" + suffix, compress(JSONL))) == 3


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".txt", ".csv"])
def test_a_compressed_file_that_is_cut_off_or_damaged(kind, suffix):
    """A file cut off anywhere, even after its last document or at the end of a line, is never read as a shorter one."""
    content = {".jsonl": JSONL * 3, ".json": ARRAY, ".txt": b"one\n\ntwo\n", ".csv": b"text\none\ntwo\n"}[kind]
    whole, damage = COMPRESS[suffix](content), ": (damaged or cut off|the array is malformed)"
    for end in (1, 3, 10, len(whole) // 2, len(whole) - 1):
        refused(f"a{kind}{suffix}", whole[:end], damage)
        if kind != ".json":  # a second array is an error whether it is whole or not
            refused(f"a{kind}{suffix}", whole + whole[:end], ": damaged or cut off")
    refused(f"a{kind}{suffix}", content, damage)
    if kind != ".json":
        refused(f"a{kind}{suffix}", whole + b"something else, and then some", ": damaged or cut off")
        refused(f"a{kind}{suffix}", whole + b"\x01" + whole[1:], ": damaged or cut off")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damage_beyond_the_first_buffer(suffix):
    lines = [json.dumps({"text": os.urandom(1000).hex()}).encode() + b"\n" for _ in range(3000)]
    whole = COMPRESS[suffix](b"".join(lines))
    middle = len(whole) // 2
    records = file_records("a.jsonl" + suffix, lambda: io.BytesIO(whole[:middle]))
    assert len(next(records)[1]["text"]) == 2000
    with pytest.raises(InputError, match="damaged or cut off"):
        list(records)
    inverted = bytes(255 - byte for byte in whole[middle : middle + 99])
    refused("a.jsonl" + suffix, whole[:middle] + inverted + whole[middle + 99 :], ": damaged or cut off")


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv", "a.jsonl.gz"])
def test_utf16_is_named(name, order):
    content = "\ufefftext\n今天".encode(order)
    refused(name, gzip.compress(content) if name.endswith(".gz") else content, ": is UTF-16, .*--encoding utf-16")


def test_xz_padding_between_streams():
    content = lzma.compress(JSONL) + b"\0" * 8 + lzma.compress(JSONL) + b"\0" * 4
    assert len(read("a.jsonl.xz", content)) == 6


def test_a_file_without_records():
    for name in ("a.json", "a.jsonl", "a.txt", "a.jsonl.gz", "a.txt.xz", "a.csv.zst", "a.json.bz2"):
        assert read(name, b"") == []
    for suffix, compress in COMPRESS.items():
        assert read(f"a.json{suffix}", compress(b"\xef\xbb\xbf \n")) == []
    assert read("a.json", b"[]") == [] == read("a.json", b"[ \n] ") == read("a.csv", b"text\n")
    assert read("a.parquet", parquet(text=pyarrow.array([], "string"))) == []
    refused("a.docx", b"", ": unknown format. Known are .arrow .csv .json")


def test_text_documents_are_separated_by_blank_lines():
    content = b"\n \none\r\ntwo\r\n\r\n  indented\n\n\t\n\n\n\xe4\xb8\x89\n \nlast"
    assert [record["text"] for _, record in read("a.txt", content)] == ["one\ntwo", "  indented", "三", "last"]
    records = read("a.txt", b"one\n\nt\xffo\n\nthree")
    assert records[0][1] == {"text": "one"} and records[2][1] == {"text": "three"}
    assert records[1][0] == "a.txt, line 3" and isinstance(records[1][1], ValueError)


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_tables(delimiter):
    rows = ["id{}text", "1{}NA", '2{}"one,\ttwo ""quoted""\r\n\nthree"', '"3"{}', "4{}007", "5{}null", "6{} 三 "]
    content = "\r\n".join(rows).replace("{}", delimiter).encode()
    records = [record for _, record in read("a.csv", b"\xef\xbb\xbf" + content, ["text"])]
    assert [record["text"] for record in records] == ["NA", 'one,\ttwo "quoted"\r\n\nthree', "", "007", "null", " 三 "]
    assert [record["id"] for record in records] == list("123456")


def test_a_row_with_a_wrong_number_of_fields():
    records = read("a.csv", b"id,text\n1,one\n2,two, and more\n3\n4,four\n5,\xff\n")
    assert [(where[-1], str(record)) for where, record in records if isinstance(record, ValueError)] == [
        ("3", "a row of 3 fields, the header has 2"),
        ("4", "a row of 1 fields, the header has 2"),
    ]
    assert records[3][1] == {"id": "4", "text": "four"} and records[4][1]["text"] == "\udcff"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"id,body\n1,one\n", r": no field 'text'; the fields are \['id', 'body'\] .*--text_field"),
        (b"", r": no field 'text'; the fields are \[\]"),
        (b"text,id,text\n", r": its header has \['text'\] more than once"),
        (b'id,text\n1,"one\n2,two\n', ", line 3: broken quoting .unexpected end of data"),
        (b'id,text\n1,"one" two\n2,three\n', ", line 2: broken quoting .',' expected after '\"'"),
    ],
)
def test_a_table_that_is_refused(content, reason):
    refused("a.csv", content, reason, ["text"])


def test_parquet_reads_the_columns_that_are_needed():
    meta = [{"text": "m1", "lang": "zh"}, {"text": "m2", "lang": "en"}]
    content = parquet(id=[1, 2], text=["one", None], meta=meta, large=pyarrow.array(["a", "b"], "large_string"))
    assert [record for _, record in read("a.parquet", content, ["text"])] == [{"text": "one"}, {"text": None}]
    assert [record for _, record in read("a.parquet", content, ["meta.text", "large"])] == [
        {"meta": {"text": "m1"}, "large": "a"},
        {"meta": {"text": "m2"}, "large": "b"},
    ]
    assert [record for _, record in read("a.parquet", content)][1]["meta"] == meta[1]
    refused("a.parquet", content, r": no field 'body'; the fields are \['id', 'text', 'meta.text', 'meta.l", ["body"])


def test_parquet_that_is_damaged():
    sink = io.BytesIO()
    table = pyarrow.table({"text": [os.urandom(500).hex() for _ in range(1000)]})
    pyarrow.parquet.write_table(table, sink, row_group_size=100, write_page_checksum=True)
    content = sink.getvalue()
    refused("a.parquet", content[:-1], ": cannot be read after row 0, in row group 0")
    refused("a.parquet", b"PAR1 no parquet PAR1", ": cannot be read")
    refused("a.parquet", b"", ": cannot be read")
    middle = len(content) // 2
    broken = content[:middle] + bytes(2000) + content[middle + 2000 :]
    refused("a.parquet", broken, r": cannot be read after row [45]00, in row group [45]")


def test_parquet_text_that_is_not_utf8_spoils_one_row_only():
    binary = pyarrow.array([b"one", b"\xff", b"three"], "binary")
    content = parquet(text=pyarrow.Array.from_buffers(pyarrow.string(), 3, binary.buffers()))
    records = [record for _, record in read("a.parquet", content)]
    assert isinstance(records[1], ValueError) and "byte 0xff at 0" in str(records[1])
    assert [records[0], records[2]] == [{"text": "one"}, {"text": "three"}]


@pytest.mark.parametrize("name", ["a.json", "a.json.zst", "a.jsonl", "a.csv", "object.json"])
def test_memory_stays_flat(tmp_path, name):
    """A file of 60 MB, read in a few MB."""
    item = json.dumps({"text": "水" * 20_000}, ensure_ascii=False).encode()
    layout = {".jsonl": (b"", b"\n", b""), ".csv": (b"text\n", b"\n", b"")}.get(format_of(name), (b"[", b",\n", b"]"))
    begin, between, end = (b'{"data":[', b",", b"]}") if name.startswith("object") else layout
    content = begin + between.join([item[9:-1] if name == "a.csv" else item] * 1000) + end
    assert len(content) > 60e6
    path = tmp_path / name
    path.write_bytes(zstandard.compress(content) if name.endswith(".zst") else content)
    del content
    tracemalloc.start()
    records = sum(len(record["text"]) for _, record in file_records(str(path), lambda: path.open("rb")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert records == 1000 * 20_000
    assert peak < 10e6


def test_memory_stays_flat_over_a_row_group(tmp_path):
    """One row group of 200 MB beside a column that is not needed, measured in a process of its own."""
    path = tmp_path / "a.parquet"
    texts = pyarrow.array([os.urandom(5_000).hex() for _ in range(2_000)])
    schema = pyarrow.schema({"text": pyarrow.string(), "other": pyarrow.string()})
    with pyarrow.parquet.ParquetWriter(path, schema, use_dictionary=False, compression="zstd") as writer:
        writer.write_table(pyarrow.table([pyarrow.concat_arrays([texts] * 10)] * 2, schema), row_group_size=20_000)
    script = (
        "import resource, sys; from common.corpus.records import file_records; import pyarrow.parquet\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "n = sum(len(r['text']) for _, r in file_records(sys.argv[1], lambda: open(sys.argv[1], 'rb'), ['text']))\n"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    pytest.importorskip("resource")
    run = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    characters, grown = map(int, run.stdout.split())
    assert characters == 20_000 * 10_000
    assert grown * (1 if sys.platform == "darwin" else 1024) < 120e6


def test_an_error_of_the_file_is_not_taken_for_damage():
    """The error of a file at a URL that gives up passes unchanged through decompressors and the parquet reader."""

    class Broken(io.RawIOBase):
        def readable(self):
            return True

        def seekable(self):
            return True

        def seek(self, *_):
            return 1_000

        def tell(self):
            return 1_000

        def readinto(self, buffer):
            raise InputError("the hub has gone")

    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.csv", "a.json.zst", "a.txt.bz2", "a.parquet"):
        with pytest.raises(InputError, match="^the hub has gone"):
            list(file_records(name, Broken))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.jsonl.xz", "object.json", "a.csv", "a.parquet"])
def test_files_are_closed(name):
    opened = []

    def open_raw():
        content = {"a.json": ARRAY, "object.json": b'{"data": %s}' % ARRAY, "a.csv": b"text\none\ntwo\nthree"}
        raw = parquet(text=TEXTS) if name == "a.parquet" else content.get(name, JSONL)
        opened.append(io.BytesIO(COMPRESS.get(Path(name).suffix, bytes)(raw)))
        return opened[-1]

    assert len(list(file_records(name, open_raw))) == 3
    assert opened and all(file.closed for file in opened)


def test_byte_order_marks_of_joined_files_go():
    mark = b"\xef\xbb\xbf"
    joined = (
        mark + "第一篇\r\n\r\n".encode() + mark + "第二篇\r\n".encode() + mark + b"\r\n\r\n" + "末 \ufeff.".encode()
    )
    assert [record["text"] for _, record in read("a.txt", joined)] == ["第一篇", "第二篇", "末 \ufeff."]
    members = gzip.compress(mark + b'{"text": "1"}\n') + gzip.compress(mark + b'{"text": "2"}\n')
    assert [record for _, record in read("a.jsonl.gz", members)] == [{"text": "1"}, {"text": "2"}]


def test_lines_of_white_space_are_blank():
    """Truth: ``str.isspace``; U+3000 indents Chinese text, U+00A0 comes from web pages."""
    spaces = [chr(c) for c in range(sys.maxunicode + 1) if chr(c).isspace() and chr(c) not in "\r\n"]
    content = "\n".join(f"{number}\n{space}" for number, space in enumerate(spaces)).encode()
    assert [record["text"] for _, record in read("a.txt", content)] == [str(i) for i in range(len(spaces))]
    assert [record["text"] for _, record in read("a.txt", "\u3000\u3000一\n\u3000二\n".encode())] == [
        "\u3000\u3000一\n\u3000二"
    ]
    damaged = read("a.txt", b"one\n\xff\ntwo")
    assert len(damaged) == 1 and isinstance(damaged[0][1], NotUtf8)


def test_a_text_file_that_is_one_document(monkeypatch):
    def whole(content: bytes):
        return list(file_records("a.txt", lambda: io.BytesIO(content), whole_text=True))

    assert whole(b"\xef\xbb\xbf\none\r\n\r\ntwo\n") == [("a.txt", {"text": "\none\n\ntwo"})]
    assert whole(b"") == [("a.txt", {"text": ""})] and isinstance(whole(b"\xff")[0][1], NotUtf8)
    monkeypatch.setattr("common.corpus.records.LARGEST_DOCUMENT_BYTES", 1 << 20)
    with pytest.raises(
        InputError, match="^a.txt: more than 1,048,576 bytes. Of several .txt files, each is one document"
    ):
        whole(b"x\n" * (1 << 20))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_the_content_says_how_a_file_is_compressed(suffix):
    """A .gz whose suffix got lost, as after some downloads."""
    assert [record for _, record in read("a.jsonl", COMPRESS[suffix](JSONL))] == RECORDS
    assert [record for _, record in read("a.json", COMPRESS[suffix](ARRAY))] == RECORDS


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (JSONL, ".jsonl"),
        (JSONL.rstrip(b"\n"), ".jsonl"),
        (b"\xef\xbb\xbf" + JSONL, ".jsonl"),
        (gzip.compress(JSONL), ".jsonl"),
        (b'{"text": "' + b"x" * 3_000_000 + b'"}\n', ".jsonl"),
        (ARRAY, ".json"),
        (parquet(text=TEXTS), ".parquet"),
        (b"# Title\n", None),
        (b"all: test\n", None),
        (b'{\n "cells": []\n}\n', None),
        (b'{"a": 1,\n"b": 2}\n', None),
        (b"[section]\n", None),
        (b"", None),
        (b"\x1f\x8b\x08 not gzip at all", None),
        (b"\xff\xfe{\0", None),
        (b"\x7fELF\x02\x01", None),
    ],
)
def test_formats_are_recognised_by_content(content, kind):
    assert format_by_content("wiki_00", lambda: io.BytesIO(content)) == kind
    if kind is None:
        refused("wiki_00", content, ": unknown format")
    elif len(content) < 1_000_000:
        assert [record["text"] for _, record in read("wiki_00", content)] == TEXTS


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl", "a.json.gz", "a.txt", "a.csv.zst"])
def test_what_is_not_data_is_named(name):
    refused(name, POINTER, ": a Git LFS pointer, not the data itself. Fetch the data: git lfs pull")
    page = b"\n<!DOCTYPE html><html><body>404</body></html>"
    if name in ("a.parquet", "a.arrow", "a.jsonl"):
        refused(name, page, ": a web page, not data")
    assert [record["text"] for _, record in read("b.txt", page)] == [page.decode().strip()]


def test_a_window_that_is_too_large_is_not_damage():
    """zstd -19 --long=31 of a line of 2 GB of "x" and a short one; xz with a dictionary of 1 GiB."""
    wide = bytes.fromhex("28b52ffd04a8") + zstandard.ZstdCompressor().compress(JSONL)[6:]
    refused("a.jsonl.zst", wide, ": is not damaged, .* zstd -d --long=31, or xz -d")
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 30}]
    refused("a.jsonl.xz", lzma.compress(JSONL, filters=filters), ": is not damaged, .* zstd -d --long=31, or xz -d")


def test_a_record_of_very_many_values_is_refused(monkeypatch):
    """60 KB of .gz hold a line of 60 MB, which as a list takes a gigabyte."""
    monkeypatch.setattr("common.corpus.records.MOST_VALUES", 1_000)
    many = b'{"text": [%s{}]}' % (b"{}," * 1_000)
    records = read("a.jsonl", many + b"\n" + JSONL)
    assert str(records[0][1]) == "malformed line (more than 1,000 values in one record)"
    assert [record for _, record in records[1:]] == RECORDS
    monkeypatch.setattr("common.corpus.records.READ_BYTES", 100)
    refused("a.json", b"[%s]" % many, ": the array is malformed after item 0 .more than 1,000 values in one record")


CHINESE = [{"text": "数学是研究数量、结构的学科。"}, {"text": "地理,\n“你好”"}]
IN_UTF8 = {
    "a.jsonl": "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in CHINESE),
    "a.json": json.dumps(CHINESE, ensure_ascii=False),
    "object.json": json.dumps({"data": CHINESE}, ensure_ascii=False),
    "a.csv": 'text\n数学是研究数量、结构的学科。\n"地理,\n“你好”"\n',
    "a.txt": "数学是研究数量、结构的学科。\n\n地理,\n“你好”\n",
}


@pytest.mark.parametrize("encoding", ["gb18030", "gbk", "big5hkscs", "utf-16", "utf-16-be", "utf-8"])
@pytest.mark.parametrize("name", IN_UTF8)
def test_another_encoding(name, encoding):
    """Each file in another encoding has the records that the same file has in UTF-8."""

    def records(name, content, encoding=None):
        found = file_records(name, lambda: io.BytesIO(content), encoding=known_encoding(encoding))
        return [record for _, record in found]

    content = IN_UTF8[name]
    if encoding == "big5hkscs":  # has no simplified characters
        for simplified, traditional in zip("数学结构“”", "數學結構「」", strict=True):
            content = content.replace(simplified, traditional)
    wanted = records(name, content.encode())
    assert len(wanted) == 2 and records(name, content.encode(encoding), encoding) == wanted
    assert records(f"{name}.gz", gzip.compress(content.encode(encoding)), encoding) == wanted


TWO_BYTES = {
    "French": "L'été dernier, à Orléans, le théâtre était fermé.\n\nÇa se répète.\n",
    "Spanish": "El niño comió aquí, ¿y después qué? Mañana será otro día, según él.\n\nSí.\n",
    "German": "Über größere Häuser läßt sich schön plaudern, müßte man hören.\n\nGrüße.\n",
    "Greek": "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας.\n\nΝαι.\n",
    "Russian": "Москва - столица России.\n\nДа.\n",
}


@pytest.mark.parametrize("encoding", ["gb18030", "gbk", "big5", "cp1252", "utf-16"])
@pytest.mark.parametrize("language", TWO_BYTES)
def test_utf8_whose_letters_have_two_bytes_is_recognised_and_said(language, encoding, capsys):
    text = TWO_BYTES[language]
    found = list(file_records("a.txt", lambda: io.BytesIO(text.encode()), encoding=encoding))
    assert [record["text"] for _, record in found] == text.strip().split("\n\n")
    assert capsys.readouterr().out == f"note: what is in UTF-8 is read as UTF-8, although --encoding says {encoding}\n"


def test_letters_at_the_end_of_a_buffer_are_judged_with_the_next(monkeypatch, capsys):
    monkeypatch.setattr("common.corpus.formats.BUFFER_BYTES", 100)
    text = "a" * 95 + "é" + "b" * 60 + "é" * 9
    found = list(file_records("a.txt", lambda: io.BytesIO(text.encode()), encoding="gb18030"))
    assert found[0][1]["text"] == text and "is read as UTF-8" in capsys.readouterr().out


def test_letters_too_few_to_tell_are_read_as_the_flag_says_and_said(capsys):
    """An e with an accent in UTF-8 is a letter of GBK."""
    found = list(file_records("a.txt", lambda: io.BytesIO("un café".encode()), encoding="gb18030"))
    assert found[0][1]["text"] == "un caf茅"
    assert "may be UTF-8 as well as gb18030. They are read as gb18030; if" in capsys.readouterr().out
    gbk = "一些汉字".encode("gb18030")
    assert [record["text"] for _, record in file_records("a.txt", lambda: io.BytesIO(gbk), encoding="gb18030")] == [
        "一些汉字"
    ]
    assert capsys.readouterr().out == ""


TRADITIONAL = "春眠不覺曉，處處聞啼鳥。夜來風雨聲，花落知多少。\n\n床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。\n"
SIMPLIFIED = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。\n\n床前明月光，疑是地上霜。举头望明月，低头思故乡。\n"


@pytest.mark.parametrize(
    ("text", "written", "read", "warned"),
    [
        (TRADITIONAL, "big5", "gb18030", True),
        (TRADITIONAL, "big5hkscs", "gb18030", True),
        (TRADITIONAL, "cp950", "gb18030", True),
        ("plain ASCII first\n\n" * 99 + TRADITIONAL, "big5", "gb18030", True),
        (TRADITIONAL, "big5", "big5", False),
        (TRADITIONAL, "gbk", "gb18030", False),
        (SIMPLIFIED, "gb2312", "gb18030", False),
        ("㐀㐁\ue000" + SIMPLIFIED, "gb18030", "gb18030", False),  # rare ones, and one for private use
        ("日本語の文章です。東京は日本の首都です。", "gb18030", "gb18030", False),
    ],
)
def test_big5_read_as_gb18030_is_warned_of(text, written, read, warned, capsys):
    list(file_records("a.txt", lambda: io.BytesIO(text.encode(written)), encoding=read))
    said = capsys.readouterr().out
    assert said.startswith("warning: read as gb18030, many letters") is warned and ("--encoding big5" in said) is warned


def test_text_that_is_not_of_the_encoding():
    def records(content, encoding="gb18030"):
        return list(file_records("a.jsonl", lambda: io.BytesIO(content), encoding=encoding))

    line = json.dumps(CHINESE[0], ensure_ascii=False).encode("gb18030")
    found = records(line + b'\n{"text": "\xff\xff"}\n' + line)
    assert [record for _, record in found[::2]] == [CHINESE[0]] * 2 and isinstance(found[1][1], NotUtf8)
    with pytest.raises(InputError, match="^a.jsonl: is not utf-16 "):
        records(b'\xff\xfe{\0"\0\x00\xd8x\0', "utf-16")
    assert [record for _, record in records(b'{"text": "ascii"}\n')] == [{"text": "ascii"}]
    refused("a.json", json.dumps(CHINESE, ensure_ascii=False).encode("gbk")[:-3], ": .*--encoding gb18030")


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "shift_jis", "cp1252"])
@pytest.mark.parametrize("ascii_bytes", [0, 100, 199, 200, 201])
def test_utf8_is_recognised_beside_another_encoding(monkeypatch, encoding, ascii_bytes):
    """Also where the text begins in ASCII, and where a buffer ends within its first character that is not ASCII."""
    monkeypatch.setattr("common.corpus.formats.BUFFER_BYTES", 100)
    before = "a" * (ascii_bytes - len('{"text": "')) if ascii_bytes else ""
    record = {"text": f"{before}数学是研究数量、结构的学科。" + "é" * 200}
    for line in (json.dumps(record, ensure_ascii=False).encode(), codecs.BOM_UTF8 + b'{"text": "ascii"}'):
        found = list(file_records("a.jsonl", lambda line=line: io.BytesIO(line), encoding=encoding))
        assert [each for _, each in found] == [json.loads(line.decode("utf-8-sig"))]


def test_names_of_encodings():
    assert [known_encoding(name) for name in (None, "UTF-8", "utf_8_sig", "GBK", "gb18030")] == [
        *(None, None, None, "gbk", "gb18030")
    ]
    for name in ("gb18031", "", "zlib", "rot13", "a\0b"):
        with pytest.raises(InputError, match=r"^--encoding .*: unknown\. For Chinese text: gb18030"):
            known_encoding(name)
