"""Downloading corpora: interrupted, altered, truncated, archived, and found again."""

import bz2
import gzip
import io
import lzma
import random
import shutil
import subprocess
import sys
import tarfile
import time
from hashlib import sha256
from pathlib import Path
from threading import Thread

import pytest
from conftest import ROOT
from stand_in import be_impatient, running, use_hubs

from common.console import InputError
from common.corpus import download as download_module
from common.corpus import hub_dataset as hub_data
from common.corpus.download import CORPORA, Corpus, download, unpack
from common.corpus.transfer import ATTEMPTS

CONTENT = random.Random(0).randbytes(2_500_000)
FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "wiki.json": CONTENT,
    "data/train-00000-of-00002.jsonl": b'{"text": "one"}\n',
    "data/train-00001-of-00002.jsonl": b'{"text": "two"}\n',
    "data/test-00000-of-00001.jsonl": b'{"text": "never"}\n',
}
OWN = "owner--name--wiki.json"  # the folder of owner/name:wiki.json


@pytest.fixture(params=["ModelScope", "Hugging Face"])
def hub(request, monkeypatch):
    """One hub that has FILES; every other is closed."""
    be_impatient(monkeypatch)
    with running(request.param, dict(FILES)) as server:
        use_hubs(monkeypatch, **{request.param.lower().replace(" ", "_"): server.url})
        yield server


@pytest.fixture
def plain(monkeypatch):
    """Files at plain URLs, as the corpus "tokens"."""
    be_impatient(monkeypatch)
    with running("plain", {"t.bin": CONTENT, "t.idx": b"index"}) as server:
        urls = tuple(f"{server.url}/plain/{name}" for name in server.files)
        monkeypatch.setitem(CORPORA, "tokens", Corpus("tokens", "none", urls=urls))
        yield server


def recorded(path: Path) -> list[str]:
    return path.with_name(path.name + ".sha256").read_text().split()


def names_in(folder: Path) -> set[str]:
    """Return the files below a folder without the lock and the list of a download, which are hidden."""
    paths = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(folder).as_posix() for p in paths}


def test_a_file_of_a_data_set(hub, tmp_path, capsys):
    (path,) = download("owner/name:wiki.json", tmp_path)
    assert path == tmp_path / OWN / "wiki.json" and path.read_bytes() == CONTENT
    assert recorded(path) == [sha256(CONTENT).hexdigest(), "wiki.json"]
    assert names_in(tmp_path / OWN) == {"wiki.json", "wiki.json.sha256"}
    assert sha256(CONTENT).hexdigest() in capsys.readouterr().out


@pytest.mark.parametrize("name", ["owner/name:wiki.json", "owner/name", "whole"])
def test_found_again_without_a_hub(hub, tmp_path, monkeypatch, capsys, name):
    """A node without network uses the files it has, in every way in which a corpus can be named."""
    monkeypatch.setitem(CORPORA, "whole", Corpus("like openwebtext", "none", identifier="owner/name"))
    if name != "owner/name:wiki.json":
        del hub.files["wiki.json"]
    paths = download(name, tmp_path)
    hub.stopped.set()
    hub.shutdown()
    hub.server_close()
    for verify in (False, True):
        capsys.readouterr()
        assert download(name, tmp_path, verify) == paths
        assert "already here" in capsys.readouterr().out
    home = next(parent for parent in paths[0].parents if parent.parent == tmp_path)
    home.rename(tmp_path / "moved")  # the list is in it: it may be copied to such a node
    (tmp_path / "node").mkdir()
    (tmp_path / "moved").rename(tmp_path / "node" / home.name)
    assert len(download(name, tmp_path / "node", verify=False)) == len(paths)
    if name != "owner/name:wiki.json":
        (tmp_path / "node" / home.name / "data" / "train-00001-of-00002.jsonl").unlink()
        with pytest.raises(InputError, match="cannot find data set"):
            download(name, tmp_path / "node", verify=False)


def test_some_of_the_files_are_not_taken_for_all(hub, tmp_path):
    """The list is written last."""
    del hub.files["wiki.json"]
    last = "data/train-00001-of-00002.jsonl"
    hub.faults[last].extend(["cut 0"] * ATTEMPTS)
    with pytest.raises(InputError, match="given up"):
        download("owner/name", tmp_path, verify=False)
    assert [path.name for path in download("owner/name", tmp_path, verify=False)][1:] == [Path(last).name]


def test_the_train_split_and_nothing_else(hub, tmp_path):
    del hub.files["wiki.json"]
    paths = download("owner/name", tmp_path)
    assert [path.read_bytes() for path in paths] == [b'{"text": "one"}\n', b'{"text": "two"}\n']
    assert all(path.parent == tmp_path / "owner--name" / "data" for path in paths)
    paths[1].unlink()
    asked = len(hub.asked)
    assert download("owner/name", tmp_path) == paths
    assert {name for name, _ in hub.asked[asked:]} <= {"README.md", "data/train-00001-of-00002.jsonl"}  # none twice


@pytest.mark.parametrize("lfs", [True, False])  # False: there is no checksum that would tell them apart
def test_two_data_sets_with_one_file_name(monkeypatch, tmp_path, lfs):
    """The second download does not return the file of the first, whether its file is named or not."""
    first, second = {"train.jsonl": b'{"text": "one"}\n'}, {"train.jsonl": b'{"text": "two"}\n'}
    for name in ("owner/name:train.jsonl", "owner/name"):
        folder = tmp_path / name.replace("/", "-")
        with running("Hugging Face", first, lfs) as server:
            use_hubs(monkeypatch, hugging_face=server.url)
            (one,) = download(name, folder)
        with running("Hugging Face", second, lfs) as server, monkeypatch.context() as patch:
            use_hubs(patch, hugging_face=server.url)
            patch.setattr("stand_in.NAME", "other/dataset")
            (two,) = download(name.replace("owner/name", "other/dataset"), folder)
        assert one.read_bytes() == first["train.jsonl"] and two.read_bytes() == second["train.jsonl"]


def test_the_file_of_a_named_corpus_lies_in_the_folder_itself(hub, monkeypatch, tmp_path):
    """It has always been there, and a user may have put it there."""
    monkeypatch.setitem(CORPORA, "wiki", Corpus("articles", "none", identifier="owner/name:wiki.json"))
    assert download("wiki", tmp_path) == [tmp_path / "wiki.json"]
    assert CORPORA["wiki-zh"].identifier.endswith(":wikipedia-zh-cn-20240820.json")  # as the documents say
    (tmp_path / "wikipedia-zh-cn-20240820.json").write_bytes(b"mine")
    assert download("wiki-zh", tmp_path, verify=False) == [tmp_path / "wikipedia-zh-cn-20240820.json"]


@pytest.mark.parametrize("faults", [["cut 1000000", "cut 0", 429, 500], ["redirect"], ["silent"], ["altered"]])
def test_faults_of_the_server(hub, tmp_path, faults):
    """After altered bytes the file is downloaded again; after every other fault the download continues."""
    hub.faults["wiki.json"].extend(faults)
    (path,) = download("owner/name:wiki.json", tmp_path)
    assert path.read_bytes() == CONTENT and recorded(path)[0] == sha256(CONTENT).hexdigest()


def test_an_interrupted_download_is_continued(hub, tmp_path):
    hub.faults["wiki.json"].extend(["cut 0", "cut 2000000"] + ["cut 0"] * ATTEMPTS)
    with pytest.raises(InputError, match="given up at byte 2,000,000"):
        download("owner/name:wiki.json", tmp_path)
    assert (tmp_path / OWN / "wiki.json.part").read_bytes() == CONTENT[:2_000_000]
    assert not (tmp_path / OWN / "wiki.json").exists()
    hub.faults.clear()
    hub.asked.clear()
    download("owner/name:wiki.json", tmp_path)
    assert (tmp_path / OWN / "wiki.json").read_bytes() == CONTENT
    assert hub.asked[-1] == ("wiki.json", "bytes=2000000-")


def test_a_killed_download_is_continued(plain, tmp_path):
    """SIGKILL in the middle of a file, as when a person closes the terminal window."""
    plain.faults["t.bin"].extend(["", "cut 1500000"] + [503] * 10_000)
    code = (
        "from common.corpus import download; from pathlib import Path; import sys\n"
        "download.CORPORA['tokens'] = download.Corpus('', '', urls=tuple(sys.argv[2:]))\n"
        "download.download('tokens', Path(sys.argv[1]))"
    )
    urls = CORPORA["tokens"].urls
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *urls], cwd=ROOT, stderr=subprocess.DEVNULL)
    part = tmp_path / "tokens" / "t.bin.part"
    end = time.monotonic() + 30
    while time.monotonic() < end and not (part.exists() and part.stat().st_size > 1_000_000):
        time.sleep(0.02)
    process.kill()
    process.wait(timeout=10)
    left = part.read_bytes()
    assert left and left == CONTENT[: len(left)]
    plain.faults.clear()
    assert [path.read_bytes() for path in download("tokens", tmp_path)] == [CONTENT, b"index"]
    assert ("t.bin", f"bytes={len(left)}-") in plain.asked
    assert names_in(tmp_path / "tokens") == {"t.bin", "t.bin.sha256", "t.idx", "t.idx.sha256"}


def test_a_part_of_another_version_is_not_continued(plain, tmp_path):
    plain.faults["t.bin"].extend(["", "cut 1500000"] + ["cut 0"] * ATTEMPTS)
    with pytest.raises(InputError, match="given up"):
        download("tokens", tmp_path)
    assert (tmp_path / "tokens" / "t.bin.part").stat().st_size == 1_500_000
    plain.faults.clear()
    plain.files["t.bin"] = b"x" * len(CONTENT)
    assert download("tokens", tmp_path)[0].read_bytes() == b"x" * len(CONTENT)


def test_a_part_of_unknown_origin_is_not_continued(plain, tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "t.bin.part").write_bytes(b"?" * 1000)
    assert download("tokens", tmp_path)[0].read_bytes() == CONTENT


def test_a_hub_that_sends_something_else_twice(hub, tmp_path):
    hub.faults["wiki.json"].extend(["altered"] * 2)
    with pytest.raises(InputError, match=f"announced is {sha256(CONTENT).hexdigest()}.*Nothing was kept"):
        download("owner/name:wiki.json", tmp_path)
    assert names_in(tmp_path) == set()


def test_an_altered_file_is_downloaded_again(hub, tmp_path, capsys):
    (path,) = download("owner/name:wiki.json", tmp_path)
    path.write_bytes(CONTENT[:-1])
    assert download("owner/name:wiki.json", tmp_path, verify=False) == [path]
    assert path.read_bytes() == CONTENT[:-1]  # verify=False does not read it
    assert download("owner/name:wiki.json", tmp_path)[0].read_bytes() == CONTENT
    assert "was altered" in capsys.readouterr().out


def test_a_file_of_the_users_own(hub, tmp_path):
    mine = tmp_path / OWN / "wiki.json"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    asked = len(hub.asked)
    assert download("owner/name:wiki.json", tmp_path, verify=False) == [mine]  # as recipes call it
    assert len(hub.asked) == asked
    with pytest.raises(InputError, match="was not downloaded by this command"):
        download("owner/name:wiki.json", tmp_path)
    assert mine.read_bytes() == b"mine"
    mine.write_bytes(CONTENT)  # downloaded by other means: the same bytes are accepted
    asked = len(hub.asked)
    download("owner/name:wiki.json", tmp_path)
    assert len(hub.asked) == asked and recorded(mine)[0] == sha256(CONTENT).hexdigest()


def test_a_new_version_on_the_hub_does_not_replace_what_is_here(hub, tmp_path, capsys):
    del hub.files["wiki.json"]
    first, second = download("owner/name", tmp_path)
    hub.files["data/train-00000-of-00002.jsonl"] = b'{"text": "new"}\n'
    assert download("owner/name", tmp_path)[0].read_bytes() == b'{"text": "one"}\n'
    second.unlink()
    assert download("owner/name", tmp_path)[0].read_bytes() == b'{"text": "one"}\n'
    assert "another version" in capsys.readouterr().out
    first.unlink()
    assert download("owner/name", tmp_path)[0].read_bytes() == b'{"text": "new"}\n'


def test_a_hub_without_checksums(monkeypatch, tmp_path):
    be_impatient(monkeypatch)
    with running("Hugging Face", dict(FILES), lfs=False) as server:
        use_hubs(monkeypatch, hugging_face=server.url)
        server.faults["wiki.json"].extend(["", "cut 1000"])
        (path,) = download("owner/name:wiki.json", tmp_path)
        assert path.read_bytes() == CONTENT and recorded(path)[0] == sha256(CONTENT).hexdigest()


@pytest.mark.parametrize("place", ["Hugging Face's cache", "ModelScope's cache"])
def test_a_data_set_that_only_a_cache_holds(monkeypatch, tmp_path, capsys, place):
    """Offline, it is copied from the cache; after an interruption, from the start."""
    be_impatient(monkeypatch)
    cache = tmp_path / "cache"
    for name, content in FILES.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(content)

    def nothing(_):
        raise OSError("nothing here")

    snapshots = {"Hugging Face's cache": "hugging_face_snapshot", "ModelScope's cache": "modelscope_snapshot"}
    for cached, snapshot in snapshots.items():
        monkeypatch.setattr(hub_data, snapshot, (lambda _: str(cache)) if cached == place else nothing)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    part = tmp_path / OWN / "wiki.json.part"
    part.parent.mkdir()
    part.write_bytes(b"?" * 1000)
    (path,) = download("owner/name:wiki.json", tmp_path)
    assert path.read_bytes() == CONTENT and recorded(path)[0] == sha256(CONTENT).hexdigest()
    assert f"1 files from {place}" in capsys.readouterr().out and not part.exists()


def test_a_disk_that_is_too_small(hub, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"0\.10 GB free, 0\.27 needed"):
        download("owner/name:wiki.json", tmp_path)
    assert names_in(tmp_path) == set()
    assert ("wiki.json", None) not in hub.asked


@pytest.mark.parametrize("name", ["wiki", "a/b/c", "../x", "owner/", ""])
def test_unknown_names(name, tmp_path):
    with pytest.raises(InputError, match="not one of wiki-zh, openwebtext, openwebtext-100k, .*seq-monkey"):
        download(name, tmp_path)


def test_no_hub_has_it(hub, tmp_path):
    with pytest.raises(InputError, match=r"(?s)cannot find.*ModelScope.*Hugging Face.*Three ways to continue"):
        download("owner/other", tmp_path)


def test_paths_that_lead_elsewhere(hub, tmp_path):
    """The hub chooses the file names, but nothing is ever written outside the folder."""
    hub.files |= {"../evil.jsonl": b"{}", "/evil.jsonl": b"{}"}
    del hub.files["wiki.json"]
    download("owner/name", tmp_path / "here")
    assert names_in(tmp_path) == {"here/" + name for name in names_in(tmp_path / "here")}
    assert not any("evil" in name for name in names_in(tmp_path))
    for path in ("../evil", "a/../../../evil", "/etc/evil"):
        with pytest.raises(InputError, match="outside"):
            download_module._targets(tmp_path, [path, "good"])
        with pytest.raises(InputError, match="outside"):
            download(f"owner/name:{path}", tmp_path / "here", verify=False)


def test_several_processes_download_a_file_once(hub, tmp_path):
    hub.faults["wiki.json"].append("cut 100000")
    found = []
    threads = [Thread(target=lambda: found.extend(download("owner/name:wiki.json", tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert found == [tmp_path / OWN / "wiki.json"] * 3
    assert found[0].read_bytes() == CONTENT
    assert [name for name, part in hub.asked].count("wiki.json") == 2  # the download and its continuation


def archive_of(members: dict[str, bytes | None], mode: str) -> bytes:
    """Return a tar archive; None as content makes a symbolic link to /etc/passwd."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content or b""))
    return stream.getvalue()


def test_an_archive_is_unpacked(hub, tmp_path, capsys):
    hub.files["corpus.jsonl.tar.bz2"] = archive_of({"./._corpus.jsonl": b"mac", "./corpus.jsonl": CONTENT}, "w:bz2")
    name = "owner/name:corpus.jsonl.tar.bz2"
    (path,) = download(name, tmp_path)
    assert path == tmp_path / "owner--name--corpus.jsonl.tar.bz2" / "corpus.jsonl" and path.read_bytes() == CONTENT
    assert recorded(path)[0] == sha256(CONTENT).hexdigest()
    assert "._corpus.jsonl is left out" in capsys.readouterr().out
    path.with_name("corpus.jsonl.tar.bz2").unlink()  # as the docstring allows
    hub.asked.clear()
    assert download(name, tmp_path) == [path]
    assert not hub.asked


def test_all_files_of_an_archive_are_found_again(hub, tmp_path):
    hub.files["two.tar"] = archive_of({"a.jsonl": b"1", "b.jsonl": b"2"}, "w:")
    paths = download("owner/name:two.tar", tmp_path)
    assert [path.name for path in paths] == ["a.jsonl", "b.jsonl"]
    hub.asked.clear()
    assert download("owner/name:two.tar", tmp_path) == paths and not hub.asked


def test_a_corpus_downloaded_before_there_were_lists(hub, tmp_path):
    hub.files["corpus.jsonl.tar"] = archive_of({"corpus.jsonl": CONTENT}, "w:")
    for name in ("owner/name:wiki.json", "owner/name:corpus.jsonl.tar"):
        (path,) = download(name, tmp_path)
        (listed,) = path.parent.glob(".*.files")
        listed.unlink()
        path.with_name("corpus.jsonl.tar").unlink(missing_ok=True)
        hub.asked.clear()
        assert download(name, tmp_path) == [path] and not hub.asked


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_nothing_in_an_archive_leaves_its_folder(tmp_path, suffix):
    members = {
        "../../a.jsonl": b"1",
        "/tmp/b.jsonl": b"2",
        "link.jsonl": None,
        "deep/er/c.jsonl": b"3",
        "x\\..\\d": b"4",
    }
    archive = tmp_path / "folder" / f"a.{suffix}"
    archive.parent.mkdir()
    archive.write_bytes(archive_of(members, f"w:{suffix[4:]}"))
    assert [path.read_bytes() for path in unpack(archive)] == [b"1", b"2", b"3", b"4"]
    assert {name for name in names_in(tmp_path) if "sha256" not in name} == {
        f"folder/{name}" for name in (archive.name, "a.jsonl", "b.jsonl", "c.jsonl", "d")
    }


@pytest.mark.parametrize("mode", ["w:", "w:gz", "w:bz2", "w:xz"])
def test_a_damaged_archive(tmp_path, mode):
    archive = tmp_path / "a.tar"
    archive.write_bytes(archive_of({"a.jsonl": CONTENT}, mode)[:-500_000])
    with pytest.raises(InputError, match="cannot be unpacked"):
        unpack(archive)
    assert names_in(tmp_path) <= {"a.tar", "a.jsonl.part"}
    archive.write_bytes(gzip.compress(b"no archive"))
    with pytest.raises(InputError, match="cannot be unpacked"):
        unpack(archive)


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "tar.bz2", "tar.xz"])
@pytest.mark.parametrize("at", [512, 3 * 512, 3 * 512 + 100, 10_000])
def test_an_archive_of_several_streams(tmp_path, suffix, at):
    """As written by pbzip2, pigz and ``cat``; cut between two blocks of the archive, and within one."""
    compress = {"tar.gz": gzip.compress, "tgz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}[suffix]
    content = archive_of({"a.jsonl": b"1" * 600, "b.jsonl": b"2" * 600, "c.jsonl": b"3"}, "w:")
    archive = tmp_path / f"x.{suffix}"
    archive.write_bytes(compress(content[:at]) + compress(content[at:]))
    assert [path.read_bytes() for path in unpack(archive)] == [b"1" * 600, b"2" * 600, b"3"]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_an_archive_that_tarfile_takes_for_whole(tmp_path, suffix):
    """Cut off between two files; a header overwritten; a second archive after the first."""
    content = archive_of({"a.jsonl": b"1", "b.jsonl": b"2"}, "w:")
    damaged = bytearray(content)
    damaged[1024:1034] = b"x" * 10
    archive = tmp_path / f"x.{suffix}"
    for kind, reason in ((content[:1024], "cut off"), (damaged, "damaged header"), (content * 2, "another archive")):
        archive.write_bytes(bytes(kind) if suffix == "tar" else gzip.compress(kind))
        with pytest.raises(InputError, match=f"cannot be unpacked.*{reason}"):
            unpack(archive)


def test_a_cut_off_archive_is_refused_again(hub, tmp_path):
    """The files that were unpacked from it are not taken for all of its files at the next call."""
    hub.files["corpus.jsonl.tar"] = archive_of({"corpus.jsonl": b"1", "more.jsonl": b"2"}, "w:")[:1024]
    for verify in (True, False):
        with pytest.raises(InputError, match="cut off"):
            download("owner/name:corpus.jsonl.tar", tmp_path, verify)


def test_two_files_of_one_name_in_an_archive(tmp_path):
    (tmp_path / "a.tar").write_bytes(archive_of({"x/a.jsonl": b"1", "y/a.jsonl": b"2"}, "w:"))
    with pytest.raises(InputError, match="two files called a.jsonl"):
        unpack(tmp_path / "a.tar")
