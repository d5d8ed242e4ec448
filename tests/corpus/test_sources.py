"""What the user gave -> a source: files, folders, globs, token stores, hub ids. No file occurs twice."""

import json
import os
import re
import sys
from pathlib import Path

import datasets
import pytest

from common.console import InputError
from common.corpus.sources import resolve_source, resolve_sources

links = pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Return a function that makes files below the folder in which the test runs."""
    monkeypatch.chdir(tmp_path)

    def make(*names: str) -> None:
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(name, encoding="utf-8")

    return make


def found(given: str) -> list[str]:
    return [path.as_posix() for path in resolve_source(given).files]


def refused(given: str | list[str], reason: str) -> None:
    with pytest.raises(InputError, match=f"(?s){reason}"):
        resolve_sources([given] if isinstance(given, str) else given)


def test_a_file(files, tmp_path):
    files("data/wiki.zh.jsonl.gz", "a [1].json", "目录/语料.txt")
    source = resolve_source("data/wiki.zh.jsonl.gz")
    assert source.files == (Path("data/wiki.zh.jsonl.gz"),)
    assert (source.given, source.name) == ("data/wiki.zh.jsonl.gz", "wiki.zh")
    assert source.hub_id is None and source.token_store is None and source.size_bytes == 21
    assert found("a [1].json") == ["a [1].json"]  # a name, not a pattern
    assert resolve_source("a [1].json").name == "a-1"
    assert resolve_source("目录/语料.txt").name == "语料"
    assert found(str(tmp_path / "data/wiki.zh.jsonl.gz")) == [(tmp_path / "data/wiki.zh.jsonl.gz").as_posix()]


def test_a_folder(files, capsys):
    files("d/b.jsonl", "d/a/c.jsonl.zst", "d/a/b/z.jsonl", "d/a.jsonl", "d/.hidden.jsonl", "d/.git/x.jsonl")
    assert found("d") == ["d/a.jsonl", "d/a/b/z.jsonl", "d/a/c.jsonl.zst", "d/b.jsonl"] == found("d/")
    assert capsys.readouterr().out == ""
    assert resolve_source("d/a").name == "a" and resolve_source("d/a/..").name == "d"
    os.chdir("d/a")
    assert resolve_source(".").name == "a" and len(found(".")) == 2


def test_a_folder_with_other_files(files, capsys):
    files("d/a.parquet", "d/README.md", "d/b/c.docx", "d/tokenizer.json", "d/e.txt", "d/f.txt", "d/g.parquet.gz")
    assert found("d") == ["d/a.parquet", "d/e.txt", "d/f.txt"]
    assert capsys.readouterr().out.splitlines() == [
        "note: d: 4 other files are not read: d/README.md, d/b/c.docx, d/g.parquet.gz, d/tokenizer.json",
        "note: d: reads 2 .txt, 1 .parquet files",
        "note: d: .txt files: 2; each file is one document",
    ]
    files(*(f"many/{i:03}.pdf" for i in range(100)), "many/a.txt")
    found("many")
    assert re.search(r"100 other files .*: many/000.pdf, .*, many/009.pdf and 90 more\n", capsys.readouterr().out)


def test_a_folder_without_documents(files):
    files("d/a.docx", "e/.hidden.jsonl")
    refused("d", r"^d: no file of a known format in it \(but d/a.docx\)\. Known are \.arrow \.csv \.json")
    refused("e", r"^e: no file of a known format in it\. Known are")


def test_caches_are_left_alone(files):
    """The tag is specified in https://bford.info/cachedir/, including its first line."""
    files("d/a.jsonl", "d/cache/x/tokens.json", "d/cache/x/tokens.bin", "d/cache/CACHEDIR.TAG")
    assert found("d") == ["d/a.jsonl"]


def test_files_beside_a_token_store_are_not_documents(files, capsys):
    files("d/a.jsonl", "d/x/tokens.json", "d/x/tokens.bin", "d/x/tokens.idx", "d/x/tokens.near_duplicates.jsonl")
    assert found("d") == ["d/a.jsonl"]
    assert "2 other files are not read: d/x/tokens.bin, d/x/tokens.idx" in capsys.readouterr().out


def test_a_glob(files, capsys):
    files("d/a.jsonl", "d/b.jsonl", "d/c/d.jsonl", "d/c/e.csv", "d/x.md", "d/.h.jsonl")
    assert found("d/*.jsonl") == ["d/a.jsonl", "d/b.jsonl"]
    assert found("d/**/*.jsonl") == ["d/a.jsonl", "d/b.jsonl", "d/c/d.jsonl"]
    assert found("d/[ab].jsonl") == ["d/a.jsonl", "d/b.jsonl"]
    assert found("d/?/e.*") == ["d/c/e.csv"]
    assert [resolve_source(given).name for given in ("d/c/*", "d/*/e.csv", "**/a.jsonl", "[d]/a.jsonl")] == [
        *("c", "d", "a.jsonl", "a.jsonl")
    ]
    assert capsys.readouterr().out == "note: d/c/*: reads 1 .jsonl, 1 .csv files\n"
    assert found("d/*") == ["d/a.jsonl", "d/b.jsonl"]
    assert "1 other files are not read: d/x.md" in capsys.readouterr().out
    refused("d/*.parquet", r"^d/\*\.parquet: matches no file")
    refused("d/*.md", r"^d/\*\.md: no file of a known format in it \(but d/x\.md\)")


def test_token_stores(files):
    files("t/a.bin", "t/a.idx", "t/a.json", "t/a.hashes.npy", "t/a.near_duplicates.jsonl", "l/g_ids.npy", "l/g_idx.npz")
    for given in ("t/a.bin", "t/a.idx", "t/a"):
        source = resolve_source(given)
        assert (source.token_store, source.name) == ("t/a", "a")
        assert source.files == (Path("t/a.bin"), Path("t/a.idx"))
    for given in ("l/g_ids.npy", "l/g_idx.npz", "l/g"):
        source = resolve_source(given)
        assert (source.token_store, source.name) == ("l/g", "g")
        assert source.files == (Path("l/g_ids.npy"), Path("l/g_idx.npz"))
    files("t/b.bin", "t/b.idx", "t/c.partial-1.bin", "other/one.bin")
    source = resolve_source("t")
    assert (source.token_store, source.name) == ("t", "t")
    assert source.files == tuple(map(Path, ("t/a.bin", "t/a.idx", "t/b.bin", "t/b.idx")))
    assert resolve_source("l").token_store == "l"
    # Half a pair is still a source: opening it will say which file is missing.
    assert resolve_source("other/one.bin").files == (Path("other/one.bin"),)


def test_token_stores_that_are_unclear(files):
    files("d/a.bin", "d/a.idx", "d/a.json", "d/a.jsonl", "w.bin", "w.idx", "w/x.jsonl")
    refused("d", r"^d: holds token files and documents \(d/a\.jsonl\)\. Give one or the other")
    refused("w", r"^w: exists, and so does a token store w\.bin")
    refused("no.bin", r"^no\.bin: no such file")
    assert resolve_source("w.bin").token_store == "w" and found("w/x.jsonl") == ["w/x.jsonl"]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("owner/name", "owner-name"),
        ("Skywork/SkyPile-150B", "Skywork-SkyPile-150B"),
        ("wikimedia/wikipedia:20231101.zh", "wikimedia-wikipedia-20231101.zh"),
        ("owner/name:data/train.jsonl", "owner-name-data-train.jsonl"),
    ],
)
def test_a_hub_id(files, given, name):
    source = resolve_source(given)
    assert (source.hub_id, source.name, source.files, source.size_bytes) == (given, name, (), 0)
    assert source.fingerprint() == {"hub_id": given}


@pytest.mark.parametrize(
    "given",
    ["no", "no.jsonl", "a/no.jsonl", "a/no.json.gz", "./a", "../a", "/a", "a/b/c", "https://a.b/c", "a\\b"],
)
def test_no_such_file(files, given):
    refused(given, f"^{re.escape(given)}: no such file")


def test_names_that_are_refused(files):
    files("a.docx", "b")
    refused("a.docx", r"^a\.docx: unknown format\. Known are \.arrow .* \.zstd\. Save its text as a \.txt file\.$")
    refused("b", r"^b: unknown format")
    refused("", "^'': an empty name")
    refused(" ", "^' ': an empty name")


def test_a_name_fits_a_file_name(files):
    files("a:b?.txt" if sys.platform != "win32" else "a b.txt", f"{'x' * 200}.txt", "-.txt", "d/..txt")
    for given in os.listdir("."):
        if given.endswith("txt"):
            assert re.fullmatch(r"[\w-][\w.-]{0,59}", resolve_source(given).name)
    assert resolve_source("-.txt").name == "source"


def test_names_are_distinct(files):
    files("a/train.jsonl", "b/train.jsonl", "c/Train.txt", "train-2.jsonl", "d/train.jsonl")
    given = ["train-2.jsonl", "a/train.jsonl", "b/train.jsonl", "c/Train.txt", "d/train.jsonl"]
    names = [source.name for source in resolve_sources(given)]
    assert names == ["train-2", "train", "train-3", "Train-4", "train-5"]
    assert [source.given for source in resolve_sources(given)] == given


@links
def test_a_file_twice(files, tmp_path):
    files("d/a.jsonl", "d/b.jsonl")
    refused(["d/a.jsonl", "d/a.jsonl"], r"^d/a\.jsonl: is given twice\. Its documents would count twice")
    refused(["d/a.jsonl", str(tmp_path / "d/a.jsonl")], r"a\.jsonl: is given twice \(as d/a\.jsonl\)")
    refused(["d/b.jsonl", "d/*.jsonl"], r"^d/b\.jsonl: is given twice")
    refused(["d", "./d/../d/a.jsonl"], r"a\.jsonl: is given twice")
    Path("link.jsonl").symlink_to("d/a.jsonl")
    refused(["d", "link.jsonl"], r"^link\.jsonl: is given twice \(as d/a\.jsonl\)")
    os.link("d/a.jsonl", "d/c.jsonl")
    refused("d", r"^d/c\.jsonl: is given twice \(as d/a\.jsonl\)")
    refused(["owner/name", "owner/name"], r"^owner/name: is given twice")
    files("t.bin", "t.idx")
    refused(["t.bin", "t"], r"^t\.bin: is given twice")
    assert len(resolve_sources(["d/a.jsonl", "d/b.jsonl", "owner/name:a", "owner/name:b"])) == 4


@links
def test_links(files):
    """A linked folder is read, because large data is often elsewhere. A circle of links ends."""
    files("elsewhere/a.jsonl", "d/b.jsonl")
    Path("d/part").symlink_to("../elsewhere", target_is_directory=True)
    Path("elsewhere/circle").symlink_to("../d", target_is_directory=True)
    assert found("d") == ["d/b.jsonl", "d/part/a.jsonl"]
    Path("d/gone.jsonl").symlink_to("nowhere")
    refused("d", r"^d/gone\.jsonl: is a link to a file that does not exist")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read(files):
    files("d/a.jsonl", "d/closed/b.jsonl")
    os.chmod("d/closed", 0)
    refused("d", r"^d/closed: the folder cannot be read")
    os.chmod("d/closed", 0o700)


def test_fingerprint(files, tmp_path):
    files("d/a.jsonl", "d/b/a.jsonl")
    os.utime("d/a.jsonl", ns=(0, 5_000_000_000))
    first = resolve_source("d").fingerprint()
    assert first["files"][0] == {"file": "a.jsonl", "bytes": 9, "modified_ns": 5_000_000_000}
    assert [file["file"] for file in first["files"]] == ["a.jsonl", "b/a.jsonl"]
    assert json.loads(json.dumps(first)) == first
    assert resolve_source("d/a.jsonl").fingerprint() == {"files": first["files"][:1]}
    assert resolve_source(str(tmp_path / "d")).fingerprint() == first
    os.rename("d", "moved")
    assert resolve_source("moved").fingerprint() == first
    os.utime("moved/a.jsonl", ns=(0, 6_000_000_000))
    assert resolve_source("moved").fingerprint() != first


def test_the_fingerprint_of_many_files_stays_small(files):
    files(*(f"d/{i:04}.jsonl" for i in range(300)))
    first = resolve_source("d").fingerprint()
    assert (first["files"], first["bytes"]) == (300, 300 * len("d/0000.jsonl"))
    assert len(json.dumps(first)) < 200
    assert resolve_source("d").fingerprint() == first
    os.utime("d/0123.jsonl", ns=(0, 0))
    touched = resolve_source("d").fingerprint()
    os.rename("d/0200.jsonl", "d/9999.jsonl")
    assert len({json.dumps(each) for each in (first, touched, resolve_source("d").fingerprint())}) == 3


def test_the_rules_of_reading_are_in_the_fingerprint(files):
    """Other rules give other documents, so they give another cache key; sources of other formats keep theirs."""
    files("d/a.txt", "e/a.jsonl", "f/a.tsv")
    one = resolve_source("d/a.txt").fingerprint()
    files("d/b.txt")
    assert (one["txt"], resolve_source("d").fingerprint()["txt"]) == (
        "blank lines separate documents",
        "each file is one document",
    )
    assert resolve_source("f").fingerprint()["tsv"] == "no quoting"
    assert list(resolve_source("e").fingerprint()) == ["files"] == list(resolve_source("e", "utf-8").fingerprint())
    assert resolve_source("e", "GB18030").fingerprint()["encoding"] == "gb18030"
    assert resolve_source("owner/name", "gbk").fingerprint() == {"hub_id": "owner/name", "encoding": "gbk"}


def test_an_encoding_that_would_be_ignored(files):
    files("a.parquet", "t.bin", "t.idx", "b.jsonl")
    with pytest.raises(InputError, match="^--encoding gbk: it would be ignored"):
        resolve_sources(["a.parquet", "t.bin"], "gbk")
    assert [source.encoding for source in resolve_sources(["a.parquet", "b.jsonl"], "gbk")] == ["gbk", "gbk"]
    assert resolve_sources([], "gbk") == []


def test_files_without_a_suffix(files, capsys):
    """As WikiExtractor --json writes them."""
    files("w/AA/LICENSE", "w/Makefile")
    for name in ("w/AA/wiki_00", "w/AA/wiki_01"):
        Path(name).write_text('{"id": "1", "text": "x"}\n')
    assert found("w") == ["w/AA/wiki_00", "w/AA/wiki_01"]
    assert "2 other files are not read: w/AA/LICENSE, w/Makefile" in capsys.readouterr().out
    assert found("w/AA/wiki_00") == ["w/AA/wiki_00"] and resolve_source("w/AA/wiki_00").name == "wiki_00"
    Path("part.00000-of-00002").write_text('[{"text": "x"}]')
    assert resolve_source("part.00000-of-00002").name == "part"
    refused("w/Makefile", r"^w/Makefile: unknown format")


def test_git_lfs_pointers_are_found_before_anything_is_read(files):
    files("d/a.jsonl", "d/b.parquet", "t.bin", "t.idx")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for given, name in (("d", "d/b.parquet"), ("t.bin", "t.bin"), ("model", "model")):
        Path(name).write_text(pointer)
        refused(given, rf"^{name}: a Git LFS pointer, not the data itself\. Fetch the data: git lfs pull")


def test_folders_of_save_to_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = datasets.Dataset.from_dict({"text": [str(i) for i in range(10)]})
    data.save_to_disk("one", num_shards=2)
    datasets.load_from_disk("one").map(lambda row: {"text": row["text"] * 2})  # leaves cache-*.arrow there
    assert len(list(Path("one").glob("*.arrow"))) == 3
    assert found("one") == ["one/data-00000-of-00002.arrow", "one/data-00001-of-00002.arrow"]
    assert [path.name for path in resolve_source("one/data*1-of*.arrow").files] == ["data-00001-of-00002.arrow"]
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk("two")
    assert found("two") == ["two/train/data-00000-of-00001.arrow"]
    assert "note: two: not in the split 'train', so not read: test\n" in capsys.readouterr().out
    assert found("two/test") == ["two/test/data-00000-of-00001.arrow"]
    refused(".", r"^\.: one in it is a data set of save_to_disk\. Give that folder by itself")
    datasets.DatasetDict({"test": data}).save_to_disk("three")
    refused("three", r"^three: has no split 'train', only \['test'\]\. Give one of its folders")
    Path("one/data-00001-of-00002.arrow").unlink()
    refused("one", r"^one: not a whole data set of save_to_disk: one/data-00001-of-00002\.arrow are missing")
    for content in ("{}", "[]", '{"_data_files": "x"}', '{"_data_files": [1, {}]}'):
        Path("one/state.json").write_text(content)
        refused("one", "^one: not a whole data set of save_to_disk: ")
    Path("one/state.json").write_text("{")
    refused("one", r"^one/state\.json: damaged")
