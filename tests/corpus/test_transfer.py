"""Reading a file at a URL: every fault of a server, and the right bytes in spite of it."""

import io
import random
import re
import time

import pytest
from stand_in import be_impatient, running

from common.console import InputError
from common.corpus.transfer import ATTEMPTS, FileChanged, RemoteFile

CONTENT = random.Random(0).randbytes(1_000_000)


@pytest.fixture
def server(monkeypatch):
    be_impatient(monkeypatch)
    with running("plain", {"a.bin": CONTENT}) as hub:
        hub.url += "/plain/a.bin"
        yield hub


def bounded(call, seconds: float):
    begin = time.monotonic()
    try:
        return call()
    finally:
        assert time.monotonic() - begin < seconds


@pytest.mark.parametrize(
    "faults",
    [
        [],
        ["redirect"],
        ["cut 0", "cut 300000", "cut 1", "cut 400000"],
        [429, 500, 503, "cut 5", 502],
        ["silent", "drip"],
        ["cut 500000", "no ranges"],
        ["cut 500000", "redirect"],
        ["cut 100"] * (ATTEMPTS - 1),
        ["cut 70000", 500, 500, 500, 500, 500] * 3,  # progress in between, so these faults do not add up
    ],
)
def test_every_byte_comes_once_and_in_order(server, faults):
    server.faults["a.bin"].extend(faults)
    with RemoteFile(server.url) as remote:
        assert remote.size_bytes == len(CONTENT)
        assert bounded(remote.readall, 40) == CONTENT
    assert not server.faults["a.bin"]  # every fault was met


def test_it_continues_where_it_broke_off(server):
    server.faults["a.bin"].append("cut 300000")
    with RemoteFile(server.url) as remote:
        remote.readall()
    assert server.asked == [("a.bin", None), ("a.bin", "bytes=300000-")]


def test_reading_anywhere(server):
    chooser = random.Random(1)
    with io.BufferedReader(RemoteFile(server.url)) as remote:
        for _ in range(30):
            start, size = chooser.randrange(len(CONTENT)), chooser.randrange(1, 3000)
            remote.seek(start)
            assert remote.read(size) == CONTENT[start : start + size]
        assert remote.seek(-5, io.SEEK_END) == len(CONTENT) - 5
        assert remote.read(9) == CONTENT[-5:]


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ([429] * 99, "429"),
        ([500] * 99, "500"),
        (["cut 0"] * 99, "ended|Incomplete"),
        (["cut 1000"] * 99, "ended|Incomplete"),  # a little every time is not enough
        (["cut 400000"] + ["cut 0"] * 99, "ended|Incomplete"),
        (["silent"] * 99, "[Tt]imed? ?out"),
        (["drip"] * 99, "bytes in"),
    ],
)
def test_a_server_that_does_not_come_back_ends_in_an_error(server, faults, reason):
    server.faults["a.bin"].extend(faults)
    with pytest.raises(InputError, match=rf"(?s)given up at byte .*after {ATTEMPTS} attempts.*({reason})"):
        bounded(lambda: RemoteFile(server.url, len(CONTENT)).readall(), 40)


@pytest.mark.parametrize(
    ("status", "text"), [(404, "404 Not Found"), (403, "HF_TOKEN"), (401, "HF_TOKEN"), (410, "410")]
)
def test_a_final_answer_is_not_asked_for_again(server, status, text):
    server.faults["a.bin"].extend([status] * 5)
    with pytest.raises(InputError, match=text):
        RemoteFile(server.url)
    assert len(server.asked) == 1


@pytest.mark.parametrize("url", ["data/a.bin", "ftp://127.0.0.1/a.bin", "http://", "http://*bad/a.bin"])
def test_an_invalid_url_is_not_asked_for_again(url, monkeypatch, capsys):
    be_impatient(monkeypatch)
    with pytest.raises(InputError, match=f"{re.escape(url)}: cannot be asked for"):
        bounded(lambda: RemoteFile(url), 2)
    assert "again in" not in capsys.readouterr().out


def test_a_truncated_file_is_refused(server):
    with pytest.raises(InputError, match="has 1,000,000 bytes, not the 1,000,001 that were announced"):
        RemoteFile(server.url, len(CONTENT) + 1)


@pytest.mark.parametrize("size", [len(CONTENT), 500])  # 500: before the byte that is asked for
def test_a_file_that_changes_meanwhile(server, size):
    server.faults["a.bin"].append("cut 1000")
    remote = RemoteFile(server.url)
    assert remote.read(1000) == CONTENT[:1000]
    server.files["a.bin"] = b"x" * size
    with pytest.raises(FileChanged, match="has changed since the download began"):
        remote.read(1000)
    with pytest.raises(FileChanged):
        RemoteFile(server.url, version='"begun with"')


def test_a_server_that_does_not_say_the_size(server, monkeypatch):
    def without_length(self, content, fault):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"5\r\nabcde\r\n0\r\n\r\n")

    monkeypatch.setattr("stand_in.Handler.send_file", without_length)
    with pytest.raises(InputError, match="does not say how large"):
        RemoteFile(server.url)
