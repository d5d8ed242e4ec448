"""A hub on this machine: it answers like ModelScope, Hugging Face or a plain server, with the faults a test sets."""

import json
import re
import time
from collections import defaultdict, deque
from contextlib import contextmanager
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "owner/name"


class Hub(ThreadingHTTPServer):
    """Serve ``files`` of the data set owner/name. Each of the next requests for a file meets one of its ``faults``.

    Faults: "cut N" (N bytes, then the connection ends), "drip" (a byte every 0.05 s), "silent" (headers, then nothing),
    "altered" (right size, other bytes), "no ranges" (the whole file from its start), an HTTP status, "redirect".
    """

    daemon_threads = True

    def __init__(self, kind: str, files: dict[str, bytes], lfs: bool = True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.kind, self.files, self.lfs = kind, files, lfs
        self.faults, self.asked, self.stopped = defaultdict(deque), [], Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def file_of(self, path: str, query: dict) -> str | None:
        if self.kind == "ModelScope" and path == f"/api/v1/datasets/{NAME}/repo":
            return query.get("FilePath")
        found = re.fullmatch(rf"/datasets/{NAME}/resolve/(?:{COMMIT}|main)/(.+)|/plain/(.+)|/elsewhere/(.+)", path)
        return unquote(next(filter(None, found.groups()))) if found else None

    def answer(self, path: str, query: dict):
        """Return the answer to a question about the data set."""
        if path == "/":
            return {}
        if self.kind == "Hugging Face" and path in {f"/api/datasets/{NAME}", f"/api/datasets/{NAME}/revision/main"}:
            siblings = []
            for name, content in self.files.items():
                lfs = {"sha256": sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
                siblings.append({"rfilename": name, "size": len(content)} | ({"lfs": lfs} if self.lfs else {}))
            return {"id": NAME, "sha": COMMIT, "siblings": siblings}
        if self.kind == "Hugging Face" and path == f"/api/datasets/{NAME}/tree/{COMMIT}":
            return [
                {"type": "file", "path": n, "size": len(c), "oid": sha1(c).hexdigest()} for n, c in self.files.items()
            ]
        if self.kind == "ModelScope" and path == f"/api/v1/datasets/{NAME}":
            return {"Code": 200, "Data": {"Id": 77, "Type": 4}}
        if self.kind == "ModelScope" and path in {
            "/api/v1/datasets/77/repo/tree",
            f"/api/v1/datasets/{NAME}/repo/tree",
        }:
            first = (int(query.get("PageNumber", 1)) - 1) * 3  # three a page, however many are asked for
            entries = [
                {"Path": n, "Name": n, "Type": "blob", "Size": len(c), "Sha256": sha256(c).hexdigest()}
                for n, c in self.files.items()
            ]
            entries.append({"Path": "data", "Name": "data", "Type": "tree", "Size": 0})
            return {"Code": 200, "Data": {"Files": entries[first : first + 3], "TotalCount": len(entries)}}
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 0

    def do_GET(self):
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        name = self.server.file_of(url.path, query)
        if name is None:
            content = self.server.answer(url.path, query)
            return self.reply(404 if content is None else 200, json.dumps(content or {}).encode())
        self.server.asked.append((name, self.headers.get("Range")))
        if name not in self.server.files:
            return self.reply(404, b"")
        faults = self.server.faults[name]
        fault = faults.popleft() if faults and self.command == "GET" else ""
        if isinstance(fault, int):
            return self.reply(fault, b"later", {"Retry-After": "0"})
        if fault == "redirect":
            return self.reply(302, b"", {"Location": f"/elsewhere/{name}"})
        self.send_file(self.server.files[name], fault)

    do_HEAD = do_GET

    def send_file(self, content: bytes, fault: str) -> None:
        tag = f'"{sha1(content).hexdigest()}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and self.headers.get("If-Range", tag) == tag and fault != "no ranges" else None
        if start is not None and start >= len(content):
            return self.reply(416, b"")
        headers = {"ETag": tag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start is not None:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = memoryview(content)[start or 0 :]
        if fault == "altered":
            body = bytes(byte ^ 1 for byte in body)
        self.send_response(200 if start is None else 206)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "silent":
            self.server.stopped.wait()
        elif fault == "drip":
            for byte in body:
                if self.server.stopped.is_set():
                    break
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
        elif fault.startswith("cut"):
            self.wfile.write(body[: int(fault.split()[1])])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def reply(self, status: int, content: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for header, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def handle(self):
        try:
            super().handle()
        except OSError:  # the client has gone
            self.close_connection = True

    def log_message(self, *_):
        pass


@contextmanager
def running(kind: str, files: dict[str, bytes], lfs: bool = True):
    """Serve ``files`` until the end of the block."""
    hub = Hub(kind, files, lfs)
    Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.stopped.set()
        hub.shutdown()
        hub.server_close()


def use_hubs(monkeypatch, modelscope: str | None = None, hugging_face: str | None = None) -> None:
    """Let this process ask these hubs and no other; None is a closed port. The suite is offline otherwise."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "MODELSCOPE_DOMAIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", modelscope or "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", hugging_face or "http://127.0.0.1:9")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # closes hf-mirror.com
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def be_impatient(monkeypatch) -> None:
    """Make waiting short: seconds instead of minutes."""
    from common.corpus import transfer as remote_file

    monkeypatch.setattr(remote_file, "LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(remote_file, "SILENCE_SECONDS", 1)
    monkeypatch.setattr(remote_file, "SLOW_SECONDS", 0.5)
