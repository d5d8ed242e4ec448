"""The hubs: unreachable, hanging, and a stand-in of each on this machine."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from functools import partial
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import ROOT

import common.hub as hubs
from common.console import InputError
from common.hub import TOKENIZER_NEEDS, fetch_model, fetch_tokenizer, lack_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "tokenizer.json": b'{"model": "a stand-in"}',
    "tokenizer_config.json": b"{}",
    "part/data.json": b'[{"text": "one"}]',
    "model.safetensors": b"weights",
}


class HuggingFace(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks about owner/small, as a model and as a data set."""

    protocol_version = "HTTP/1.1"

    def answer(self, path: str, query: dict) -> bytes | None:
        if path == "/":
            return b"here"
        if path in {"/api/models/owner/small", "/api/models/owner/small/revision/main"}:
            return json.dumps({"id": "owner/small", "sha": COMMIT}).encode()
        if path == f"/api/models/owner/small/tree/{COMMIT}":
            return json.dumps(
                [{"type": "file", "path": n, "size": len(c), "oid": sha1(c).hexdigest()} for n, c in FILES.items()]
            ).encode()
        found = re.fullmatch(rf"(?:/datasets)?/owner/small/resolve/(?:main|{COMMIT})/(.+)", path)
        return FILES.get(found[1]) if found else None

    def do_GET(self):
        url = urlsplit(self.path)
        self.server.asked.append(self.path)
        self.server.tokens.append(self.headers.get("Authorization"))
        content = self.answer(url.path, {name: values[0] for name, values in parse_qs(url.query).items()})
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("ETag", f'"{sha1(content or b"").hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


class ModelScope(HuggingFace):
    """Answers what modelscope asks about owner/small."""

    def answer(self, path, query):
        if path == "/":
            return b"here"
        if re.fullmatch("/api/v1/(models/owner/small/repo/files|datasets/owner/small/repo/tree)", path):
            files = [
                {"Path": n, "Name": n, "Type": "blob", "Size": len(c), "Sha256": sha256(c).hexdigest()}
                for n, c in FILES.items()
            ]
            return json.dumps({"Code": 200, "Data": {"Files": files, "TotalCount": len(files)}}).encode()
        if re.fullmatch("/api/v1/(models|datasets)/owner/small/repo", path):
            return FILES.get(query["FilePath"])
        return None


class Stalling(HuggingFace):
    """Answers that it is there, but no question about a model."""

    def answer(self, path, query):
        if path.startswith("/api/models/"):
            self.server.stopped.wait()
        return b"here" if path == "/" else None


@pytest.fixture(params=[HuggingFace, ModelScope])
def hub(request):
    """A hub on this machine; ``asked`` lists the paths that were requested of it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), request.param)
    server.stopped = Event()
    server.asked, server.tokens = [], []
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fetch(call: str, port: int, caches, **more: str) -> subprocess.CompletedProcess:
    """Run ``call`` in another process (the endpoints are read at import), where every hub but ``port`` is closed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MODELSCOPE_", "RANK"))}
    environment |= dict(
        HF_ENDPOINT=f"http://127.0.0.1:{port}",
        MODELSCOPE_DOMAIN=f"http://127.0.0.1:{port}",
        HF_HOME=str(caches / "hf"),
        MODELSCOPE_CACHE=str(caches / "modelscope"),
        HTTPS_PROXY="http://127.0.0.1:9",  # so that hf-mirror.com is closed on a connected machine, too
        NO_PROXY="127.0.0.1",
    )
    code = f"from common import hub; from common.hub import fetch_model, fetch_tokenizer; print({call})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, env=environment | more, cwd=ROOT, capture_output=True, text=True, timeout=60)


def files_in(folder) -> dict[str, bytes]:
    """Return the files below a folder, without the hidden ones."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if not name.startswith(".")}


def path_in(result: subprocess.CompletedProcess):
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.splitlines()[-1])


def test_a_tokenizer_is_downloaded_and_found_again(hub, tmp_path):
    folder = path_in(fetch("fetch_tokenizer('owner/small')", hub.server_port, tmp_path))
    assert files_in(folder) == {name: c for name, c in FILES.items() if name.endswith(".json")}  # and no weights
    asked = len(hub.asked)
    assert path_in(fetch("fetch_tokenizer('owner/small')", hub.server_port, tmp_path, HF_HUB_OFFLINE="1")) == folder
    assert len(hub.asked) == asked
    hub.shutdown()
    hub.server_close()
    assert path_in(fetch("fetch_tokenizer('owner/small')", hub.server_port, tmp_path)) == folder


SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = json.dumps({"weight_map": dict(zip("abc", SHARDS, strict=True))}).encode()


@pytest.mark.parametrize("hub", [ModelScope], indirect=True)
@pytest.mark.parametrize("call", ["fetch_model('owner/small', True)", "fetch_tokenizer('owner/small')"])
def test_an_incomplete_cache_of_modelscope_is_completed(hub, tmp_path, monkeypatch, call):
    """ModelScope's library takes the files of a killed download for all files; Hugging Face's does not."""
    weights = dict.fromkeys(SHARDS, b"weights") | {"model.safetensors.index.json": INDEX}
    files = {"config.json": b"{}", "vocab.json": b"{}", "merges.txt": b"", **FILES} | weights
    del files["model.safetensors"]
    monkeypatch.setattr("test_hub.FILES", files)
    folder = path_in(fetch(call, hub.server_port, tmp_path))
    expected = {name: c for name, c in files.items() if "model" in call or name.endswith((".json", ".txt"))}
    assert files_in(folder) == expected
    asked = len(hub.asked)
    assert path_in(fetch(call, hub.server_port, tmp_path)) == folder and len(hub.asked) == asked
    for path in folder.glob("*.*"):
        if path.name not in {SHARDS[0], "model.safetensors.index.json", "config.json", "vocab.json"}:
            path.unlink()
    assert path_in(fetch(call, hub.server_port, tmp_path)) == folder and files_in(folder) == expected
    (folder / SHARDS[1]).unlink(missing_ok=True)
    (folder / "tokenizer_config.json").unlink()
    offline = fetch(call, hub.server_port, tmp_path, HF_HUB_OFFLINE="1")
    if "model" in call:
        assert offline.returncode == 1 and "cannot fetch model owner/small" in offline.stderr
    else:  # these could be all files of the repository
        assert path_in(offline) == folder and "may be incomplete" in offline.stdout


@pytest.mark.parametrize(
    ("names", "lack"),
    [
        (["config.json", "model.safetensors"], ""),
        (["config.json", "x.safetensors"], ""),
        (["config.json", "model.safetensors.index.json", *SHARDS], ""),
        (
            ["config.json", "model.safetensors.index.json", SHARDS[1]],
            "does not have 2 of 3 shards, model-00001",
        ),
        (["config.json", *SHARDS], "does not have model.safetensors.index.json"),
        (["model.safetensors"], r"does not have config.json \+ \*.safetensors"),
        (["config.json", "model.safetensors.index.json"], r"does not have config.json \+ \*.safetensors"),
    ],
)
def test_what_weights_lack(tmp_path, names, lack):
    for name in names:
        (tmp_path / name).write_bytes(INDEX)
    found = lack_of(tmp_path, [["config.json", "*.safetensors"]])
    assert re.match(lack, found) if lack else found == ""


def test_weights_in_other_files_say_what_to_do(tmp_path):
    """Only safetensors are fetched; a repository of .bin files, or of a family to convert, is no dead end."""
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    assert "docs/families.md" in lack_of(tmp_path, [["config.json", "*.safetensors"]])
    own = {"model_type": "baichuan", "auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    assert "data/convert_weights.py" in lack_of(tmp_path, [["config.json", "*.safetensors"]])
    assert lack_of(tmp_path, [["config.json"]]) == ""


@pytest.mark.parametrize(
    ("names", "loads"),
    [("vocab.json", False), ("merges.txt", False), ("vocab.json merges.txt", True), ("a.model", True), ("", False)],
)
def test_what_a_tokenizer_lacks(tmp_path, names, loads):
    for name in names.split():
        (tmp_path / name).write_bytes(b"")
    assert (lack_of(tmp_path, TOKENIZER_NEEDS) == "") == loads


@pytest.mark.parametrize("call", ["fetch_tokenizer('owner/small')", "fetch_model('owner/small', True)"])
def test_offline_no_hub_is_asked(hub, tmp_path, call):
    result = fetch(call, hub.server_port, tmp_path, HF_HUB_OFFLINE="1")
    assert result.returncode == 1 and not hub.asked
    assert "no hub is asked: HF_HUB_OFFLINE is set" in result.stderr and "Three ways to continue" in result.stderr
    assert "Traceback" not in result.stderr


def test_unreachable_hubs(closed_port, tmp_path):
    begin = time.monotonic()
    result = fetch("fetch_tokenizer('owner/small')", closed_port, tmp_path)
    assert time.monotonic() - begin < 30
    assert result.returncode == 1
    assert result.stderr.count("does not answer") == 3
    for way in ("1. a local path", "2. a mirror: export HF_ENDPOINT", "--tokenizer train"):
        assert way in result.stderr
    assert "Traceback" not in result.stderr


def test_a_hub_that_accepts_and_never_answers(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        result = fetch("fetch_tokenizer('owner/small')", silent.getsockname()[1], tmp_path)
    assert time.monotonic() - begin < 30
    assert result.returncode == 1
    assert result.stderr.count("does not answer") == 3


@pytest.mark.parametrize("hub", [Stalling], indirect=True)
def test_a_hub_that_stalls(hub, tmp_path):
    begin = time.monotonic()
    result = fetch("fetch_tokenizer('owner/small')", hub.server_port, tmp_path)
    assert time.monotonic() - begin < 30
    assert result.returncode == 1
    assert "ReadTimeout" in result.stderr and "Three ways to continue" in result.stderr


def test_what_is_local_is_returned_as_it_is(tmp_path):
    assert fetch_tokenizer(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("name", ["small", "a/b/c", "./owner", "/no/such", "../small", "outputs/小说"])
def test_a_name_that_is_no_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such folder, and not a hub id like owner/name"):
        fetch_tokenizer(name)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 988097824\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer.model"])
def test_git_lfs_pointers_are_named_with_the_command_that_fetches_the_files(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(POINTER)
    fetch = partial(fetch_model, weights=True) if "model.s" in name else fetch_tokenizer
    with pytest.raises(InputError, match=f"{name}: a Git LFS pointer, .* git lfs pull"):
        fetch(str(tmp_path))


def test_a_token_goes_to_the_hub_that_was_chosen_and_to_no_mirror(tmp_path):
    """The server notes what it is sent. The mirror is asked because the hub is closed."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HuggingFace)
    server.stopped, server.asked, server.tokens = Event(), [], []
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        path_in(fetch("fetch_tokenizer('owner/small')", server.server_port, tmp_path / "a", HF_TOKEN="hf_secret"))
        assert "Bearer hf_secret" in server.tokens, "HF_ENDPOINT is where the user sends it"
        server.tokens.clear()
        call = f"[setattr(hub, 'HUGGING_FACE_MIRROR', '{url}'), hub.fetch_tokenizer('owner/small')][1]"
        closed = dict(HF_ENDPOINT="http://127.0.0.1:9", MODELSCOPE_DOMAIN="http://127.0.0.1:9", HF_TOKEN="hf_secret")
        path_in(fetch(call.replace("hub.fetch", "fetch"), server.server_port, tmp_path / "b", **closed))
        assert server.tokens and set(server.tokens) == {None}
    finally:
        server.shutdown()
        server.server_close()


def test_whose_token_it_is(monkeypatch):
    """None: huggingface_hub sends what it has. False: it sends none."""
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert [hubs.token_for(url) for url in (hubs.HUGGING_FACE, hubs.HUGGING_FACE_MIRROR)] == [None, False]
    monkeypatch.setenv("HF_ENDPOINT", f"{hubs.HUGGING_FACE_MIRROR}/")
    assert [hubs.token_for(url) for url in (hubs.HUGGING_FACE, hubs.HUGGING_FACE_MIRROR)] == [False, None]
    monkeypatch.setenv("HF_ENDPOINT", "hub.example.org")
    assert [hubs.token_for(url) for url in hubs.hub_endpoints().values()] == [False, None, False]


def test_a_password_in_an_endpoint_is_not_shown(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://me:pass@hub.example.org")
    shown = " ".join(hubs.hub_endpoints())
    assert "Hugging Face (https://hub.example.org)" in shown and "pass" not in shown
    assert "https://me:pass@hub.example.org" in hubs.hub_endpoints().values()
