"""Tables: no quoting in .tsv, joined files, Arrow files of ``datasets``; and files that would decode to gigabytes."""

import io
import random
import re
import subprocess
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from conftest import ROOT

from common.console import InputError
from common.corpus.records import file_records
from common.corpus.tables import _page_header


def read(name: str, content: bytes, fields=None) -> list[tuple[str, object]]:
    return list(file_records(name, lambda: io.BytesIO(content), fields))


def texts(name: str, content: bytes) -> list[str]:
    return [record["text"] for _, record in read(name, content, ["text"])]


def refused(name: str, content: bytes, reason: str, fields=None) -> None:
    with pytest.raises(InputError, match=f"(?s)^{re.escape(name)}{reason}"):
        read(name, content, fields)


def test_a_tsv_has_no_quoting(capsys):
    content = b'id\ttext\n1\t"unbalanced opening\n2\tsecond row\r\n\n3\tthird ends"\n4\ta \r b\n5\t"all"\n6\t\n'
    assert texts("a.tsv", content) == ['"unbalanced opening', "second row", 'third ends"', "a \r b", '"all"', ""]
    assert "note: a.tsv: 1 fields begin and end with a quote, which is kept" in capsys.readouterr().out
    rows = read("a.tsv", b'id\ttext\n1\t"two\nlines"\n')
    assert rows[0][1] == {"id": "1", "text": '"two'} and rows[1][0] == "a.tsv, line 3"
    assert str(rows[1][1]).startswith("a row of 1 fields, the header has 2. A .tsv has no quoting; name a file with")


def test_a_csv_may_be_separated_by_tabs():
    assert texts("a.csv", b'id\ttext\n1\t"one, ""two""\nthree"\n') == ['one, "two"\nthree']
    assert texts("a.csv", b"text,a\tb\none,2\n") == ["one"]  # a comma in the first line: commas separate


@pytest.mark.parametrize(("name", "separator"), [("a.csv", b","), ("a.tsv", b"\t")])
def test_joined_tables(name, separator):
    """cat a.csv b.csv, each with a byte order mark and a header."""
    part = b"\xef\xbb\xbfid|text\n%d|one\n".replace(b"|", separator)
    rows = read(name, part % 1 + part % 2, ["text"])
    assert [record["id"] for _, record in rows if isinstance(record, dict)] == ["1", "2"]
    assert [(where, str(error)) for where, error in rows if isinstance(error, ValueError)] == [
        (f"{name}, line 3", "the header again, as in files that were joined")
    ]


def test_a_line_without_end_is_not_collected_in_memory(monkeypatch):
    monkeypatch.setattr("common.corpus.tables.LARGEST_DOCUMENT_BYTES", 1 << 20)
    for name in ("a.csv", "a.tsv"):
        refused(name, b"text\n" + b"x" * (1 << 21), ": a line of more than 1,048,576 characters")


def test_the_fields_of_lists_are_named():
    """Parquet and Arrow files name the fields within a list as JSON does."""
    rows = [{"id": 1, "m": [{"role": "u", "content": "x"}, {"role": "a", "content": "y"}], "p": ["z"]}]
    table = pyarrow.Table.from_pylist(rows)
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    assert read("a.parquet", sink.getvalue(), ["m.content", "p"])[0][1] == {
        "m": [{"content": "x"}, {"content": "y"}],
        "p": ["z"],
    }
    refused("a.parquet", sink.getvalue(), r": no field 'm.text'; the fields are \['id', 'm.role', 'm.con", ["m.text"])
    assert read("a.arrow", arrow(table), ["m.content"])[0][1] == {"m": rows[0]["m"]}
    refused("a.arrow", arrow(table), r": no field 'm.text'; the fields are \['id', 'm.role', 'm.con", ["m.text"])


def arrow(table: pyarrow.Table, new=pyarrow.ipc.new_stream, **options) -> bytes:
    sink = io.BytesIO()
    with new(sink, table.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=40)
    return sink.getvalue()


TABLE = pyarrow.table(
    {"text": [f"文{i}" for i in range(100)], "kind": pyarrow.array(["a", "b"] * 50).dictionary_encode()}
)


@pytest.mark.parametrize("new", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_arrow(new):
    content = arrow(TABLE, new)
    assert [record for _, record in read("a.arrow", content)] == TABLE.to_pylist()
    assert read("a.arrow", content, ["text"])[99] == ("a.arrow, row 100", {"text": "文99"})
    for compression in ("lz4", "zstd"):
        refused("a.arrow", arrow(TABLE, new, compression=compression), ": its batches are compressed")
    refused("a.arrow", content, ": no field 'body'", ["body"])


def test_an_arrow_file_that_is_damaged():
    content = arrow(TABLE)
    assert content.endswith(b"\xff\xff\xff\xff\0\0\0\0")  # without this mark, pyarrow takes the file for a shorter one
    for end in (0, 4, 100, len(content) // 2, len(content) - 8, len(content) - 1):
        refused("a.arrow", content[:end], ":")
    choose = random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[choose.randrange(len(damaged))] = choose.randrange(256)
        try:
            read("a.arrow", bytes(damaged))
        except InputError as error:
            assert len(str(error)) < 1_000


def test_a_data_set_saved_by_datasets(tmp_path):
    """The file as the library writes it; ``test_sources`` has the folders."""
    rows = [{"text": f"文 {i}", "tags": [{"a": i}]} for i in range(2_500)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "d"))
    (path,) = (tmp_path / "d").glob("*.arrow")
    assert [record for _, record in file_records(str(path), lambda: path.open("rb"))] == rows


BOMBS = """
import io
import numpy, pyarrow, pyarrow.parquet
from common.corpus.records import file_records

ROWS = 200_000

def written(texts, **how):
    sink = io.BytesIO()
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, sink, compression="zstd", row_group_size=ROWS, store_schema=False, **how)
    return sink.getvalue()

zeros = pyarrow.array(numpy.zeros(ROWS, numpy.int32))
once = pyarrow.DictionaryArray.from_arrays(zeros, pyarrow.array(["x" * 300_000]))
pairs = pyarrow.ListArray.from_arrays(pyarrow.array(numpy.arange(0, ROWS + 1, 2), pyarrow.int32()), once)
same = pyarrow.array(["x" * 20_000] * 10_000)  # each says only that it begins as the one before
contents = [written(once), written(pairs), written(same, use_dictionary=False, column_encoding="DELTA_BYTE_ARRAY")]
pool = pyarrow.system_memory_pool()
pyarrow.set_memory_pool(pool)  # so that its peak is that of reading
for content in contents:
    records = file_records("a.parquet", lambda: io.BytesIO(content))
    seen = sum(len("".join(next(records)[1]["text"])) for _ in range(200))
    print(len(content), seen, pool.max_memory())
"""


def test_a_small_parquet_file_does_not_take_gigabytes():
    """1 KB that holds 60 GB of text: the memory of pyarrow's decoder, in a process of its own."""
    run = subprocess.run([sys.executable, "-c", BOMBS], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    results = [list(map(int, line.split())) for line in run.stdout.splitlines()]
    assert [seen for _, seen, _ in results] == [200 * 300_000, 200 * 600_000, 200 * 20_000]
    assert all(size < 2_000 and peak < 200e6 for size, _, peak in results)


def test_the_header_of_a_page():
    """Truth: the dictionary's text, with its length in four bytes, is the page."""
    for length in (1, 100, 5_000, 70_000):
        once = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(9, np.int32)), pyarrow.array(["x" * length]))
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": once}), sink, store_schema=False)
        assert _page_header(sink.getvalue()[4:20]) == (2, length + 4)
    assert _page_header(b"") == _page_header(b"\x15") == _page_header(b"\x15\x04\x15\xff") == (None, 0)


DAMAGED_FOOTERS = """
import io
import pyarrow, pyarrow.parquet
from common.console import InputError
from common.corpus.records import file_records

sink = io.BytesIO()
pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["a", "b", "c"]}), sink, store_schema=False)
content = sink.getvalue()
footer = int.from_bytes(content[-8:-4], "little")
refused = 0
for at in range(len(content) - 8 - footer, len(content)):
    for change in (1, 2, 16, 128):
        damaged = bytearray(content)
        damaged[at] ^= change
        try:
            list(file_records("a.parquet", lambda: io.BytesIO(bytes(damaged)), ["id", "text"]))
        except InputError:
            refused += 1
print(refused)
"""


def test_no_damaged_footer_ends_the_process():
    """pyarrow's metadata aborts the process on some of these, so this is a process of its own."""
    run = subprocess.run([sys.executable, "-c", DAMAGED_FOOTERS], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 100
