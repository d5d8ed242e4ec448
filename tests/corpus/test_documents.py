"""Reading documents: what is text, what is counted, and what stops with a clear error."""

import gzip
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pyarrow
import pyarrow.parquet
import pytest

from common.console import InputError
from common.corpus.documents import CorpusCounts, read_documents
from common.corpus.sources import resolve_source

DOCUMENTS = ["one\ntwo", "今天天气很好。", 'naïve café 😀 \\ "quoted"']


def lines(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def parquet(**columns) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Return a function that writes files and reads a source; it returns the documents and the counts."""
    monkeypatch.chdir(tmp_path)

    def read(given: str, files: dict[str, bytes], text_field=None, skip_malformed=False):
        for name, content in files.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(content)
        counts = CorpusCounts()
        return list(read_documents(resolve_source(given), text_field, skip_malformed, counts)), counts

    return read


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps([{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)]).encode()),
        ("a.jsonl", lines(*({"id": i, "text": text} for i, text in enumerate(DOCUMENTS)))),
        ("a.jsonl.gz", gzip.compress(lines(*({"text": text} for text in DOCUMENTS)), mtime=0)),
        ("a.txt", "\n\n".join(DOCUMENTS).encode()),
        ("a.csv", 'id,text\n1,"one\ntwo"\n2,今天天气很好。\n3,"naïve café 😀 \\ ""quoted"""\n'.encode()),
        ("a.parquet", parquet(id=range(3), text=DOCUMENTS)),
    ],
)
def test_every_format_gives_the_same_documents(read, name, content):
    documents, counts = read(name, {name: content})
    assert documents == DOCUMENTS
    text_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    assert counts == CorpusCounts(documents=3, text_bytes=text_bytes, file_bytes=len(content))
    assert json.loads(json.dumps(asdict(counts))) == asdict(counts)


def test_a_folder_of_formats_is_read_in_order(read, capsys):
    files = {
        "d/a.jsonl": lines({"content": "one"}, {"content": "two"}),
        "d/b.txt": b"three\n\nfour",
        "d/c/d.csv": b"content,n\nfive,1\n",
        "d/e.parquet": parquet(content=["six"], n=[1]),
        "d/f.json": b'[{"content": "seven"}]',
    }
    documents, counts = read("d", files)
    assert documents == "one two three four five six seven".split()
    assert (counts.documents, counts.file_bytes) == (7, sum(map(len, files.values())))
    assert "d: the text is in field 'content'\n" in capsys.readouterr().out
    assert read("d/*.j*", {}, "content")[0] == ["one", "two", "seven"]
    assert "field" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"title": "t", "tags": ["x"], "text": "one"}, "text"),  # wiki-zh
        ({"id": 1, "content": "one", "meta": {"text": "m"}}, "content"),
        ({"raw_content": "one", "doc_id": "x"}, "raw_content"),
        ({"编号": "1", "正文": "one", "标题": "x"}, "正文"),
        ({"Text": "one", "id": "2"}, "Text"),
        ({"article": "one", "body": None}, "article"),
        ({"story": "one", "summary": "x"}, "story"),
    ],
)
def test_the_usual_names_are_found(read, capsys, record, field):
    assert read("a.jsonl", {"a.jsonl": lines(record)})[0] == ["one"]
    assert capsys.readouterr().out == f"a.jsonl: the text is in field {field!r}\n"


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([{"text": "1", "body": "2"}], r"may be in any of \['text', 'body'\]\. .*--text_field; .*\['body', 'text'\]"),
        ([{"id": 1, "sentence": "x", "m": {"x": 1}}], r"is in none of .*text, content.*\['id', 'm\.x', 'sentence'\]"),
        ([{}], r"is in none of .*; the fields are \[\]"),
        (
            [{"text": None, "content": "summary"}, {"text": "1", "content": "2"}],
            r"may be in any of \['content', 'text'\]",
        ),
    ],
)
def test_a_field_that_is_not_clear(read, records, reason):
    with pytest.raises(InputError, match=f"^a.jsonl, line 1: the text {reason}"):
        read("a.jsonl", {"a.jsonl": lines(*records)})


def test_the_field_is_found_after_documents_without_text(read):
    records = [{"text": None}, {"text": None, "body": None}, {"text": "one", "body": None}]
    documents, counts = read("a.jsonl", {"a.jsonl": lines(*records)})
    assert (documents, counts.empty, counts.malformed) == (["one"], 2, 0)
    documents, counts = read("a.parquet", {"a.parquet": parquet(text=[b"one", None], body=[None, None])})
    assert (documents, counts.empty, counts.malformed) == (["one"], 1, 0)


def test_the_field_is_found_after_malformed_records(read):
    content = b"nonsense\n[1]\n" + lines({"content": "one"})
    assert read("a.jsonl", {"a.jsonl": content}, skip_malformed=True)[0] == ["one"]
    with pytest.raises(InputError, match="^a.jsonl, line 1: malformed line"):
        read("a.jsonl", {})


@pytest.mark.parametrize(
    ("text_field", "text"),
    [
        ("body", "b"),
        ("meta.text", "m"),
        ("meta.deep.er", "d"),
        ("dotted.name", "n"),
        ("{title}\n\n{body}", "t\n\nb"),
        (r"{title}\n\n{body}", "t\n\nb"),  # as bash passes it on
        (r"{title}\t{meta.text}", "t\tm"),
        ("100% of {title}: {{{dotted.name}}} %s", "100% of t: {n} %s"),
        ("{percent}", "%s %%"),
    ],
)
def test_fields_and_templates(read, text_field, text):
    record = {"title": "t", "body": "b", "meta": {"text": "m", "deep": {"er": "d"}}, "dotted.name": "n"}
    record["percent"] = "%s %%"
    assert read("a.jsonl", {"a.jsonl": lines(record)}, text_field) == read("a.jsonl", {}, text_field)
    assert read("a.jsonl", {}, text_field)[0] == [text]
    table = pyarrow.Table.from_pylist([record])
    pyarrow.parquet.write_table(table, "a.parquet")
    assert read("a.parquet", {}, text_field)[0] == [text]


@pytest.mark.parametrize("text_field", ["{}", "{title", "title}{", "{title!r}", "{title:>9}", "{{title}}", "{title}{}"])
def test_a_template_that_is_not_valid(read, text_field):
    with pytest.raises(InputError, match=rf"^--text_field '{re.escape(text_field)}': .*An example: '\{{title}}\\n"):
        read("a.jsonl", {"a.jsonl": lines({"title": "x"})}, text_field)


@pytest.mark.parametrize(
    ("text_field", "reason"),
    [
        ("txt", r"no field 'txt'; the fields are \['meta\.n', 'text'\]"),
        ("meta.text", "no field 'meta.text'"),
        ("text.text", "no field 'text.text'"),
        ("{text} {tags}", "no field 'tags'"),
        ("meta", r"field 'meta' holds objects, not text .choose one of \['meta\.n'\]"),
    ],
)
def test_a_missing_field_is_named(read, text_field, reason):
    with pytest.raises(InputError, match=f"^a.jsonl, line 1: {reason}"):
        read("a.jsonl", {"a.jsonl": lines({"text": "one", "meta": {"n": 1}})}, text_field)


def test_a_parquet_or_csv_without_the_field_is_never_skipped(read):
    files = {"d/a.jsonl": lines({"text": "one"}), "d/b.parquet": parquet(body=["x"], n=[1])}
    with pytest.raises(InputError, match=r"^d.b\.parquet: no field 'text'; the fields are \['body', 'n'\]"):
        read("d", files, skip_malformed=True)
    with pytest.raises(InputError, match=r"^e\.csv: no field 'text'; the fields are \['body'\]"):
        read("e.csv", {"e.csv": b"body\none\n"}, "text", skip_malformed=True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "malformed line"),
        (b"not json", "malformed line"),
        (b'{"text": "\xff\xfe"}', "not UTF-8 .byte 0xff"),
        (b"[" * 100_000, "malformed line"),
        (b'{"text": "\\ud800"}', "not valid Unicode"),
        (b'{"txt": "one", "id": 2}', r"no field 'text'; the fields are \['id', 'txt'\]"),
        (b'{"text": [1]}', "field 'text' holds int, not text"),
        (b'"one"', "expected an object with a field 'text', found str"),
    ],
)
def test_a_malformed_line_is_named_or_skipped_and_counted(read, capsys, line, reason):
    files = {"a.jsonl": b'{"text": "one"}\n\n' + line + b'\n{"text": " "}\n{"text": "four"}\n'}
    with pytest.raises(InputError, match=f"^a.jsonl, line 3: {reason}.*--skip_malformed"):
        read("a.jsonl", files)
    capsys.readouterr()
    documents, counts = read("a.jsonl", files, skip_malformed=True)
    assert documents == ["one", "four"]
    assert (counts.documents, counts.text_bytes, counts.empty, counts.malformed) == (2, 7, 1, 1)
    assert re.match(f"a.jsonl, line 3: {reason}", counts.first_malformed[0])
    said = capsys.readouterr().out
    assert f"1 malformed documents of a.jsonl were skipped, the first:\n  {counts.first_malformed[0]}\n" in said


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.json", b'[{"text": "one"}, {"text": 2}, {"text": "three"}]', "item 2"),
        ("a.json", b'[{"text": "one"}, {"text": "\\udc00"}, {"text": "three"}]', "item 2"),
        ("a.json", b'[{"text": "one"}, {"text": "\xff"}, {"text": "three"}]', "item 2"),
        ("a.txt", b"one\n\ntwo\n\xff\n\nthree", "line 3"),
        ("a.csv", b"text,n\none,1\ntwo\nthree,3\n", "line 3"),
        ("a.csv", b"text,n\none,1\n\xd6\xd0,2\nthree,3\n", "line 3"),
        ("a.parquet", parquet(text=[b"one", b"\xff", b"three"]), "row 2"),
    ],
)
def test_a_malformed_document_of_another_format(read, name, content, where):
    with pytest.raises(InputError, match=f"^{name}, {where}.*: .*--skip_malformed"):
        read(name, {name: content})
    documents, counts = read(name, {}, skip_malformed=True)
    assert documents == ["one", "three"]
    assert (counts.documents, counts.text_bytes, counts.malformed) == (2, 8, 1)


def test_the_first_malformed_ones_are_kept(read):
    counts = read("a.jsonl", {"a.jsonl": lines({"text": "x"}, *range(1000))}, skip_malformed=True)[1]
    assert counts.malformed == 1000
    assert [place.split(":")[0] for place in counts.first_malformed] == [f"a.jsonl, line {n}" for n in range(2, 12)]


@pytest.mark.parametrize(
    "blank", ["", " \n\t", "\x00\x01\x1b\x7f\x9f", "\u200b\ufeff\u3000\u2028\u00ad", "\r\n \x0b\x0c"]
)
def test_documents_without_text_are_counted_as_empty(read, blank):
    documents, counts = read("a.jsonl", {"a.jsonl": lines({"text": blank}, {"text": blank + "x" + blank})})
    assert documents == [blank + "x" + blank]  # kept exactly
    assert (counts.documents, counts.empty) == (1, 1)


@pytest.mark.parametrize("text_field", ["text", "meta.text", "{meta.text}{text}"])
def test_a_document_of_null_is_counted_as_empty(read, text_field):
    records = [
        {"text": None, "meta": {"text": None}},
        {"text": "x", "meta": {"text": "x"}},
        {"text": None, "meta": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), "a.parquet")
    for name, files in (("a.jsonl", {"a.jsonl": lines(*records)}), ("a.parquet", {})):
        documents, counts = read(name, files, text_field)
        assert (documents, counts.documents, counts.empty) == (["x" * text_field.count("t}") or "x"], 1, 2)


def test_every_white_space_or_control_character_is_blank(read):
    """Truth from Python's tables: what ``isspace`` calls white space, and the control characters of Latin-1."""
    blank = [chr(c) for c in range(sys.maxunicode + 1) if chr(c).isspace() or c < 32 or 127 <= c < 160]
    texts = [{"text": character} for character in blank] + [{"text": "."}]
    assert read("a.jsonl", {"a.jsonl": lines(*texts)})[1].empty == len(blank)


def test_a_template_of_blank_fields_is_empty(read):
    records = [{"title": " ", "text": ""}, {"title": "", "text": "x"}]
    documents, counts = read("a.jsonl", {"a.jsonl": lines(*records)}, "Title: {title}\n{text}")
    assert documents == ["Title: \nx"] and counts.empty == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet"])
def test_a_document_of_50_mb(read, name):
    text = f"{'水' * 17_000_000}\\ and one"
    content = {
        "a.jsonl": lambda: json.dumps({"text": text}, ensure_ascii=False).encode(),
        "a.json": lambda: json.dumps([{"text": text}, {"text": "x"}], ensure_ascii=False).encode(),
        "a.csv": lambda: f'text,n\n"{text}",1\nx,2'.encode(),
        "a.txt": f"{text}\n\nx".encode,
        "a.parquet": lambda: parquet(text=[text, "x"]),
    }[name]()
    documents, counts = read(name, {name: content}, "text")
    assert documents[0] == text and documents[1:] in ([], ["x"])
    assert counts.text_bytes == 51_000_009 + len(documents[1:])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "0 empty, 0 malformed"),
        ("a.json", b" \n\t\r\n", "0 empty, 0 malformed"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "0 empty, 0 malformed"),
        ("a.txt", b" \n \n", "0 empty, 0 malformed"),
        ("a.json", b"[]", "0 empty, 0 malformed"),
        ("a.json", b'[{"text": "  "}]', "1 empty, 0 malformed"),
        ("a.jsonl", b"1\n2\n", "0 empty, 2 malformed"),
        ("a.csv", b"text\n", "0 empty, 0 malformed"),
        ("a.parquet", parquet(text=pyarrow.array([], "string")), "0 empty, 0 malformed"),
    ],
)
def test_a_source_without_documents(read, name, content, reason):
    with pytest.raises(InputError, match=f"^{name}: it has no documents .{reason}"):
        read(name, {name: content}, "text", skip_malformed=True)


def test_files_without_documents_in_a_folder_are_named(read, capsys):
    files = {"d/a.jsonl": b"", "d/b.jsonl": lines({"text": "x"}), "d/c.jsonl": lines({"text": ""}), "d/d.json": b"[]"}
    assert read("d", files, "text")[0] == ["x"]
    names = ", ".join(os.path.join("d", name) for name in ("a.jsonl", "c.jsonl", "d.json"))
    assert capsys.readouterr().out.endswith(f"\nnote: 3 files of d have no documents: {names}\n")


def test_counts_of_several_sources_add_up(read):
    files = {"a.jsonl": lines({"text": "one"}), "b.jsonl": b"\n", "c.jsonl": lines({"text": "three"}, {"text": ""})}
    read("a.jsonl", files)
    counts = CorpusCounts()
    for name in ("a.jsonl", "c.jsonl"):
        list(read_documents(resolve_source(name), None, False, counts))
    assert (counts.documents, counts.text_bytes, counts.empty) == (2, 8, 1)
    assert counts.file_bytes == len(files["a.jsonl"]) + len(files["c.jsonl"])
    with pytest.raises(InputError, match="^b.jsonl: it has no documents"):
        list(read_documents(resolve_source("b.jsonl"), None, False, counts))


def test_messages_about_a_source_do_not_include_other_sources(read, capsys):
    files = {"a.jsonl": lines({"text": "x"}, {"text": ""}, *range(20)), "b.jsonl": lines({"text": "x"}, 1, 2)}
    counts = read("a.jsonl", files | {"c.jsonl": lines({"text": ""}, 1)}, skip_malformed=True)[1]
    capsys.readouterr()
    list(read_documents(resolve_source("b.jsonl"), None, True, counts))
    said = capsys.readouterr().out.partition("note: ")[2]
    assert said.startswith("2 malformed documents of b.jsonl were skipped, the first:\n  b.jsonl, line 2: ")
    assert "  b.jsonl, line 3: " in said and "a.jsonl" not in said and counts.malformed == 22
    with pytest.raises(InputError, match=r"^c.jsonl: it has no documents \(1 empty, 1 malformed\)"):
        list(read_documents(resolve_source("c.jsonl"), None, True, counts))


def test_progress_never_passes_the_size_of_the_source(read):
    files = {f"d/{i}.jsonl": lines(*({"text": "x" * 3_000} for _ in range(1_000))) for i in range(3)}
    read("d", files)
    counts, source, seen = CorpusCounts(), resolve_source("d"), []
    for _ in read_documents(source, "text", False, counts):
        seen.append(counts.file_bytes)
    assert seen == sorted(seen) and len(set(seen)) >= 6  # in steps of a megabyte
    assert 0 < seen[0] < source.size_bytes / 3 and counts.file_bytes == source.size_bytes


def test_a_token_store_is_not_text(read):
    with pytest.raises(InputError, match=r"^t\.bin: holds tokens, not text"):
        read("t.bin", {"t.bin": b"", "t.idx": b""})


def test_a_data_set_of_a_hub(read, monkeypatch, capsys):
    """hub_dataset finds its files; read_documents finds the text field and asks for the fields it needs."""
    asked = []

    def hub_records(identifier, fields, encoding, note):
        asked.append((identifier, fields))
        yield "train.parquet, row 1", {"content": "one", "meta": {"x": "m1"}}
        yield "train.parquet, row 2", {"content": "two", "meta": {"x": "m2"}}

    stand_in = ModuleType("common.corpus.hub_dataset")
    stand_in.hub_records = hub_records
    monkeypatch.setitem(sys.modules, "common.corpus.hub_dataset", stand_in)
    assert read("owner/name:zh", {})[0] == ["one", "two"]
    assert asked == [("owner/name:zh", None), ("owner/name:zh", ["content"])]
    assert capsys.readouterr().out == "owner/name:zh: the text is in field 'content'\n"
    assert read("owner/name", {}, "{meta.x}: {content}")[0] == ["m1: one", "m2: two"]
    assert asked[2:] == [("owner/name", ["meta.x", "content"])]


def test_each_of_several_text_files_is_one_document(read, capsys):
    files = {f"d/{i:02}.txt": f"title {i}\n\nfirst\n\nsecond\n".encode() for i in range(30)} | {"d/30.txt": b"\n"}
    documents, counts = read("d", files)
    assert documents == [f"title {i}\n\nfirst\n\nsecond" for i in range(30)] and counts.empty == 1
    said = capsys.readouterr().out
    assert said.startswith("note: d: .txt files: 31; each file is one document\n")
    assert "d: 30 documents in .txt files; each file is one document\n" in said
    assert read("d/00.txt", {})[0] == ["title 0", "first", "second"]
    said = capsys.readouterr().out
    assert said.startswith("note: d/00.txt: .txt files: 1; blank lines separate documents\n")
    assert said.endswith("d/00.txt: 3 documents in .txt files; blank lines separate documents\n")


@pytest.mark.parametrize(
    ("record", "text_field", "text"),
    [
        ({"段落": [{"行号": 1, "内容": "一"}, {"内容": None}, {"内容": "二"}]}, "段落.内容", "一\n二"),
        ({"talk": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "talk.value", "q\na"),
        ({"text": ["p1", "p2"]}, "text", "p1\np2"),
        ({"t": "T", "pages": [["a", "b"], ["c"]]}, "{t}: {pages}", "T: a\nb\nc"),
        ({"m": [{"c": [{"text": "x"}, {"text": "y"}]}, {"c": [{"text": "z"}]}]}, "m.c.text", "x\ny\nz"),
    ],
)
def test_text_field_joins_lists(read, record, text_field, text):
    assert read("a.jsonl", {"a.jsonl": lines(record)}, text_field)[0] == [text]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), "a.parquet")
    assert read("a.parquet", {}, text_field)[0] == [text]


@pytest.mark.parametrize(
    ("record", "text_field", "reason"),
    [
        (
            {"text": ["p1", "p2"]},
            None,
            r"field 'text' holds a list, not text\. To join its items .*--text_field text\.",
        ),
        (
            {"messages": [{"role": "u", "content": "x"}]},
            None,
            r"the text is in none of .*\['messages.content', 'messages",
        ),
        ({"m": [{"role": "u"}]}, "m.content", r"no field 'm\.content'; the fields are \['m\.role'\]"),
        (
            {"m": [{"role": "u"}]},
            "m",
            r"field 'm' holds objects, not text .choose one of \['m\.role'\] with --text_field",
        ),
        ({"ids": [1, 2]}, "ids", "field 'ids' holds int, not text"),
    ],
)
def test_lists_that_are_not_joined(read, record, text_field, reason):
    with pytest.raises(InputError, match=f"^a.jsonl, line 1: {reason}"):
        read("a.jsonl", {"a.jsonl": lines(record)}, text_field)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt", "a.tsv"])
def test_another_encoding_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "你好世界"
    layout = {"a.jsonl": '{{"text": "{}"}}\n', "a.txt": "{}\n"}.get(name, "text\n{}\n")
    Path(name).write_bytes(layout.format(text).encode("gbk"))

    def read(encoding=None):
        return list(read_documents(resolve_source(name, encoding), "text", False, CorpusCounts()))

    with pytest.raises(InputError, match=rf"^{name}, line \d: not .*UTF-8.*--encoding gb18030 for Chinese text in GBK"):
        read()
    assert read("gb18030") == [text]
    Path(name).write_bytes(layout.format("\xff\xff").encode("latin-1"))
    with pytest.raises(InputError, match=rf"^{name}, line \d: not valid gb18030\. Repair it"):
        read("gb18030")


def test_text_of_windows_that_is_more_than_gbk_gets_the_name_of_its_encoding(tmp_path):
    """Windows writes GB 18030 under the name GBK: the letter of four bytes is in the second paragraph."""
    (tmp_path / "novel.txt").write_bytes("第一章\r\n\r\n\u3400\U00020000".encode("gb18030"))
    source = resolve_source(str(tmp_path / "novel.txt"), "gbk")
    with pytest.raises(
        InputError, match="not valid gbk. gb18030 has the characters of GBK, and more: --encoding gb18030"
    ):
        list(read_documents(source, None, False, CorpusCounts()))
