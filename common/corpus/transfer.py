"""Files on hubs and at plain URLs: their names, sizes and checksums, and reading one like a local file.

A connection that breaks is opened again at the byte where it broke.
"""

import io
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import requests
import urllib3

from common.console import InputError, say
from common.hub import HUGGING_FACE_MIRROR

CONNECT_SECONDS, SILENCE_SECONDS = 8, 30  # without a connection, and without a byte on one that is open
SLOW_BYTES, SLOW_SECONDS = 1 << 16, 60  # fewer bytes than this in as many seconds of reading is as good as none
ATTEMPTS = 7  # in a row without SLOW_BYTES; the pauses between them are 1, 2, 4, 8, 16 and 30 seconds
LONGEST_PAUSE_SECONDS = 30
PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers that a server takes back; any other error is final
LOGIN = " (private, or its terms are to be accepted on the hub's page first; then export HF_TOKEN)"
NO_URL = (requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL)
BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError, OSError)


class FileChanged(InputError):
    """What is behind the URL is not what the bytes read so far came from."""


class RemoteFile(io.RawIOBase):
    """Read ``url`` from any position; every byte comes once and in order, or InputError is raised in bounded time.

    A file that ends early, a server that says nothing, drips or answers "too many requests" is asked again from where
    it stopped, ATTEMPTS times without progress. What is never taken for the file: an end before ``size_bytes``, another
    size than the one given, another version than the one that was begun (its ETag or time of change, ``version``).

    ``size_bytes`` None: taken from the first answer. ``version``: given to go on with what an earlier process began.

    Raises:
        InputError: the file cannot be had (or FileChanged), on opening or at any read.
    """

    def __init__(
        self, url: str, size_bytes: int | None = None, headers: dict | None = None, version: str | None = None
    ):
        self.url, self.size_bytes, self.version = url, size_bytes, version
        self._headers = {"Accept-Encoding": "identity"} | (headers or {})
        self._position = 0
        self._response: requests.Response | None = None
        self._received, self._failures, self._mark = 0, 0, 0  # bytes ever; failed attempts since there were `mark`
        self._retry(self._connect)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}[whence]
        if target != self._position:
            self._disconnect()
            self._position = target
        return target

    def readinto(self, buffer) -> int:
        wanted = min(len(buffer), self.size_bytes - self._position)
        if wanted <= 0:
            return 0
        data = self._retry(lambda: self._receive(wanted))
        buffer[: len(data)] = data
        self._position += len(data)
        self._received += len(data)
        return len(data)

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _retry(self, action):
        """Return what ``action`` does, in spite of ATTEMPTS - 1 failures in a row."""
        while True:
            if self._received >= self._mark + SLOW_BYTES:  # only real progress clears the count
                self._failures, self._mark = 0, self._received
            try:
                return action()
            except BROKEN as error:
                self._disconnect()
                self._failures += 1
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                if self._failures == ATTEMPTS:
                    raise InputError(
                        f"{self.url}: given up at byte {self._position:,} after {ATTEMPTS} attempts ({reason}).\n"
                        "Try again later, or through another network; a download goes on from there."
                    ) from None
                pause = max(2 ** (self._failures - 1), getattr(error, "retry_after", 0))
                pause = min(pause, LONGEST_PAUSE_SECONDS)
                say(f"{self.url}: broken off at byte {self._position:,} ({reason}); again in {pause:.0f} s")
                time.sleep(pause)

    def _receive(self, wanted: int) -> bytes:
        """Return 1 to ``wanted`` bytes, as they come."""
        if self._response is None:
            self._connect()
        begin = time.monotonic()
        data = self._response.raw.read1(wanted, decode_content=False)
        if not data:
            raise ConnectionError(f"the connection ended before byte {self.size_bytes:,}")
        self._window_bytes += len(data)
        self._window_seconds += time.monotonic() - begin  # of reading: what the reader does in between is not its fault
        if self._window_seconds > SLOW_SECONDS:
            if self._window_bytes < SLOW_BYTES:
                raise ConnectionError(f"{self._window_bytes:,} bytes in {self._window_seconds:.0f} s")
            self._window_bytes = self._window_seconds = 0
        return data

    def _connect(self) -> None:
        """Open the connection at the current position."""
        headers = dict(self._headers)
        if self._position:
            headers["Range"] = f"bytes={self._position}-"
            if self.version:
                headers["If-Range"] = self.version
        try:
            response = requests.get(self.url, headers=headers, stream=True, timeout=(CONNECT_SECONDS, SILENCE_SECONDS))
        except NO_URL as error:  # will not get better
            self._refuse(f"cannot be asked for ({error})")
        self._response, self._window_bytes, self._window_seconds = response, 0, 0.0
        if response.status_code in PASSING:
            error = ConnectionError(f"HTTP {response.status_code} {response.reason}")
            wait = response.headers.get("Retry-After", "")
            error.retry_after = int(wait) if wait.isdigit() else 0  # a date is possible, too: the pauses will do
            raise error
        if response.status_code not in (200, 206):
            advice = {401: LOGIN, 403: LOGIN}.get(response.status_code, "")
            self._refuse(f"HTTP {response.status_code} {response.reason}{advice}")
        self._check(response)
        if response.status_code == 200:  # a server without ranges, or the answer to If-Range: from the start
            behind = self._position
            while behind:
                behind -= len(self._receive(min(behind, 1 << 20)))

    def _check(self, response: requests.Response) -> None:
        """Raise InputError unless this is the file that was asked for, in the version that was begun."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            self._refuse(f"comes encoded as {response.headers['Content-Encoding']}, which was not asked for")
        tag = response.headers.get("ETag", "")
        version = tag if tag.startswith('"') else response.headers.get("Last-Modified")  # If-Range wants a strong tag
        size = response.headers.get("Content-Length")
        if response.status_code == 206:
            first, size = re.fullmatch(r"bytes (\d+)-\d+/(\d+)|.*", response.headers.get("Content-Range", "")).groups()
            if first != str(self._position):
                self._refuse(f"byte {self._position:,} was asked for, byte {first} came")
        if size is None or not size.isdigit():
            self._refuse("the server does not say how large it is, so an early end could not be told")
        if self.size_bytes is None:
            self.size_bytes = int(size)
        if self.version is None:
            self.version = version
        if version is not None and version != self.version:
            self._disconnect()
            raise FileChanged(f"{self.url}: is another file since the download was begun ({self.version}, {version}).")
        if int(size) != self.size_bytes:
            self._refuse(f"has {int(size):,} bytes, not the {self.size_bytes:,} that were announced")

    def _refuse(self, reason: str) -> None:
        self._disconnect()
        raise InputError(f"{self.url}: {reason}.")

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


LIST_SECONDS = 60  # for one question to a hub that answers; a repository of 10,000 files takes several
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class HubFile:
    path: str  # within the repository
    size_bytes: int
    url: str | None  # None: it is in a cache
    sha256: str | None = None  # None: the hub does not say (Hugging Face does for LFS files only)
    headers: dict = field(default_factory=dict, repr=False)  # may hold a token
    local: Path | None = None

    def open(self) -> io.BufferedIOBase:
        if self.local is not None:
            return self.local.open("rb")
        return io.BufferedReader(RemoteFile(self.url, self.size_bytes, self.headers), BUFFER_BYTES)


def remote_files(repository: str, hub: str, url: str) -> list[HubFile]:
    """List a data set on ``hub``; the error of the hub's library where it has none, or does not answer in time."""
    if hub == "ModelScope":
        return _modelscope_files(repository, url)
    # A token is sent to the hub that the user chose, never to the mirror that is asked because that one failed.
    chosen = url != HUGGING_FACE_MIRROR or os.environ.get("HF_ENDPOINT", "").rstrip("/") == url
    return _hugging_face_files(repository, url, None if chosen else False)


def _modelscope_files(repository: str, endpoint: str) -> list[HubFile]:
    from modelscope.hub.api import HubApi

    api, (owner, name) = HubApi(endpoint=endpoint), repository.split("/")
    files, page = {}, 0
    while True:
        page += 1
        entries = _within(LIST_SECONDS, partial(api.get_dataset_files, repository, page_number=page, endpoint=endpoint))
        new = [entry for entry in entries if entry["Path"] not in files]
        if not new:  # not "a short page": the hub may give fewer than asked for
            return [file for file in files.values() if file is not None]
        for entry in new:
            location = api.get_dataset_file_url(entry["Path"], dataset_name=name, namespace=owner, endpoint=endpoint)
            file = HubFile(entry["Path"], entry["Size"], location, entry.get("Sha256") or None)
            files[entry["Path"]] = file if entry["Type"] != "tree" else None


def _hugging_face_files(repository: str, endpoint: str, token: bool | None) -> list[HubFile]:
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    ask = partial(HfApi(endpoint=endpoint, token=token).dataset_info, repository, files_metadata=True)
    info = _within(LIST_SECONDS, partial(ask, timeout=LIST_SECONDS))
    headers = build_hf_headers(token=token)
    return [
        HubFile(
            path=file.rfilename,
            size_bytes=int(file.size),
            url=hf_hub_url(repository, file.rfilename, repo_type="dataset", revision=info.sha, endpoint=endpoint),
            sha256=file.lfs.sha256 if file.lfs else None,
            headers=headers,
        )
        for file in info.siblings
    ]


def modelscope_snapshot(repository: str) -> str:
    from modelscope import snapshot_download

    return snapshot_download(repository, repo_type="dataset", local_files_only=True)


def hugging_face_snapshot(repository: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(repository, repo_type="dataset", local_files_only=True)


def cached_files(repository: str, snapshot: Callable[[str], str]) -> list[HubFile]:
    """List what a cache holds of a data set; ValueError if a download was stopped in the middle of one of its files."""
    folder = Path(snapshot(repository))
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if unfinished := [path.name for path in paths if path.suffix == ".incomplete"]:  # as ModelScope's library calls it
        raise ValueError(f"{unfinished[0]} was left unfinished: download it again")
    return [HubFile(p.relative_to(folder).as_posix(), p.stat().st_size, None, local=p) for p in paths]


def _within(seconds: float, ask: Callable):
    """Return ``ask()``, or raise TimeoutError: no library's own time limit holds against every way of hanging."""
    outcome = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((ask(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds} seconds") from None
    if error is not None:
        raise error
    return result
