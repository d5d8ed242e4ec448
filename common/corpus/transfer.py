"""Files on hubs and at plain URLs: their names, sizes and checksums, and reading one like a local file.

If a connection breaks, a new one continues at the byte where it broke.
"""

import io
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
from common.hub import token_for, without_password

CONNECT_SECONDS = 8  # to open a connection
SILENCE_SECONDS = 30  # without a byte on an open connection
# Fewer than SLOW_BYTES in SLOW_SECONDS of reading count as a broken connection, and do not count as progress.
SLOW_BYTES = 1 << 16
SLOW_SECONDS = 60
ATTEMPTS = 7  # in a row without progress; the pauses between them are 1, 2, 4, 8, 16 and 30 seconds
LONGEST_PAUSE_SECONDS = 30
TEMPORARY = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses worth another attempt; any other error is final
LOGIN = " (private, or its terms must be accepted on the hub's page first; then export HF_TOKEN)"
NO_URL = (requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL)
BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError, OSError)


class FileChanged(InputError):
    """The URL now serves another version than the one that the bytes read so far came from."""


class RemoteFile(io.RawIOBase):
    """Read ``url`` from any position: every byte once and in order, or InputError after a bounded time.

    A new connection continues where the last one stopped if the file ends early, if the server is silent or very slow,
    or if it answers with a temporary error such as "too many requests". After ATTEMPTS failures in a row without
    progress, the file is given up. An end before ``size_bytes``, another size, or another version is never accepted.

    Args:
        size_bytes: the size that the file must have; None takes it from the first answer.
        headers: sent with every request.
        version: the ETag or modification time that the file must have, so that a download begun by an earlier process
            can be continued; None takes it from the first answer.

    Raises:
        InputError: on opening or at any read, if the file cannot be read. FileChanged if it is another version.
    """

    def __init__(
        self, url: str, size_bytes: int | None = None, headers: dict | None = None, version: str | None = None
    ):
        self.url = url
        self.shown = without_password(url)  # in messages
        self.size_bytes = size_bytes
        self.version = version
        self._headers = {"Accept-Encoding": "identity"} | (headers or {})
        self._position = 0
        self._response: requests.Response | None = None
        self._received_bytes = 0  # since the file was opened
        self._failures = 0  # since the last progress
        self._progress_bytes = 0  # what was received at the last progress
        self._window_bytes = 0  # received in the current window of SLOW_SECONDS
        self._window_seconds = 0.0
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
        self._received_bytes += len(data)
        return len(data)

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _retry(self, action: Callable):
        """Return the result of ``action``, called again after each failure; give up after ATTEMPTS of them in a row."""
        while True:
            if self._received_bytes >= self._progress_bytes + SLOW_BYTES:
                self._failures = 0
                self._progress_bytes = self._received_bytes
            try:
                return action()
            except BROKEN as error:
                self._disconnect()
                self._failures += 1
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                if self._failures == ATTEMPTS:
                    raise InputError(
                        f"{self.shown}: given up at byte {self._position:,} after {ATTEMPTS} attempts ({reason}).\n"
                        "Try again later, or through another network; a download continues from there."
                    ) from None
                pause = max(2 ** (self._failures - 1), getattr(error, "retry_after", 0))
                pause = min(pause, LONGEST_PAUSE_SECONDS)
                say(f"{self.shown}: connection lost at byte {self._position:,} ({reason}); again in {pause:.0f} s")
                time.sleep(pause)

    def _receive(self, wanted: int) -> bytes:
        """Return 1 to ``wanted`` bytes, as soon as some arrive."""
        if self._response is None:
            self._connect()
        begin = time.monotonic()
        data = self._response.raw.read1(wanted, decode_content=False)
        if not data:
            raise ConnectionError(f"the connection ended before byte {self.size_bytes:,}")
        self._window_bytes += len(data)
        self._window_seconds += time.monotonic() - begin  # only the time spent waiting here, not in our caller
        if self._window_seconds > SLOW_SECONDS:
            if self._window_bytes < SLOW_BYTES:
                raise ConnectionError(f"{self._window_bytes:,} bytes in {self._window_seconds:.0f} s")
            self._start_window()
        return data

    def _start_window(self) -> None:
        self._window_bytes = 0
        self._window_seconds = 0.0

    def _connect(self) -> None:
        """Open a connection at the current position."""
        headers = dict(self._headers)
        if self._position:
            headers["Range"] = f"bytes={self._position}-"
            if self.version:
                headers["If-Range"] = self.version
        try:
            response = requests.get(self.url, headers=headers, stream=True, timeout=(CONNECT_SECONDS, SILENCE_SECONDS))
        except NO_URL as error:  # another attempt would not help
            self._refuse(f"cannot be asked for ({error})")
        self._response = response
        self._start_window()
        if response.status_code in TEMPORARY:
            error = ConnectionError(f"HTTP {response.status_code} {response.reason}")
            seconds = response.headers.get("Retry-After", "")
            error.retry_after = int(seconds) if seconds.isdigit() else 0  # a date is also allowed; it is ignored
            raise error
        if response.status_code not in (200, 206):
            advice = {401: LOGIN, 403: LOGIN}.get(response.status_code, "")
            self._refuse(f"HTTP {response.status_code} {response.reason}{advice}")
        self._check(response)
        if response.status_code == 200:  # the server sends the file from its first byte: it does not know ranges
            to_skip = self._position
            while to_skip:
                to_skip -= len(self._receive(min(to_skip, 1 << 20)))

    def _check(self, response: requests.Response) -> None:
        """Raise InputError unless the answer is the requested file, in the version that was begun."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            self._refuse(f"comes encoded as {response.headers['Content-Encoding']}, which was not asked for")
        tag = response.headers.get("ETag", "")
        version = tag if tag.startswith('"') else response.headers.get("Last-Modified")  # If-Range needs a strong tag
        size = response.headers.get("Content-Length")
        if response.status_code == 206:
            content_range = response.headers.get("Content-Range", "")
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", content_range)
            if match is None or int(match[1]) != self._position:
                self._refuse(f"byte {self._position:,} was asked for, {content_range or 'no Content-Range'} came")
            size = match[2]
        if size is None or not size.isdigit():
            self._refuse("the server does not say how large it is, so a file that is cut off would go unnoticed")
        if self.size_bytes is None:
            self.size_bytes = int(size)
        if self.version is None:
            self.version = version
        if version is not None and version != self.version:
            self._disconnect()
            raise FileChanged(f"{self.shown}: has changed since the download began ({self.version}, now {version}).")
        if int(size) != self.size_bytes:
            self._refuse(f"has {int(size):,} bytes, not the {self.size_bytes:,} that were announced")

    def _refuse(self, reason: str) -> None:
        self._disconnect()
        raise InputError(f"{self.shown}: {reason}.")

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


LIST_SECONDS = 60  # for one question to a hub; listing a repository of 10,000 files takes several
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class HubFile:
    """A file of a data set, on a hub or in a cache, or a file at a plain URL."""

    path: str  # within the repository
    size_bytes: int
    url: str | None  # None: it is in a cache
    sha256: str | None = None  # None: the hub does not say (Hugging Face says it for LFS files only)
    headers: dict = field(default_factory=dict, repr=False)  # may hold a token
    local: Path | None = None  # where it is in a cache

    def open(self) -> io.BufferedIOBase:
        if self.local is not None:
            return self.local.open("rb")
        return io.BufferedReader(RemoteFile(self.url, self.size_bytes, self.headers), BUFFER_BYTES)


def remote_files(repository: str, hub: str, url: str) -> list[HubFile]:
    """List the files of the data set ``repository`` on ``hub``, whose endpoint is ``url``.

    Raises:
        Exception: that of the hub's library if there is no such data set; TimeoutError without an answer in time.
    """
    if hub == "ModelScope":
        return _modelscope_files(repository, url)
    return _hugging_face_files(repository, url, token_for(url))


def _modelscope_files(repository: str, endpoint: str) -> list[HubFile]:
    from modelscope.hub.api import HubApi

    api = HubApi(endpoint=endpoint)
    owner, name = repository.split("/")
    files: dict[str, HubFile | None] = {}  # None: a folder
    page = 0
    while True:
        page += 1
        entries = _within(LIST_SECONDS, partial(api.get_dataset_files, repository, page_number=page, endpoint=endpoint))
        new = [entry for entry in entries if entry["Path"] not in files]
        if not new:  # the end is a page without new files: a short page is not the last, as the hub limits their size
            return [file for file in files.values() if file is not None]
        for entry in new:
            url = api.get_dataset_file_url(entry["Path"], dataset_name=name, namespace=owner, endpoint=endpoint)
            file = HubFile(entry["Path"], entry["Size"], url, entry.get("Sha256") or None)
            files[entry["Path"]] = None if entry["Type"] == "tree" else file


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
    """Return the folder of a data set in ModelScope's cache."""
    from modelscope import snapshot_download

    return snapshot_download(repository, repo_type="dataset", local_files_only=True)


def hugging_face_snapshot(repository: str) -> str:
    """Return the folder of a data set in Hugging Face's cache."""
    from huggingface_hub import snapshot_download

    return snapshot_download(repository, repo_type="dataset", local_files_only=True)


def cached_files(repository: str, snapshot: Callable[[str], str]) -> list[HubFile]:
    """List the files of a data set that a cache holds.

    Raises:
        ValueError: the download of one of its files was interrupted.
    """
    folder = Path(snapshot(repository))
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        if path.suffix == ".incomplete":  # ModelScope's name for an interrupted download
            raise ValueError(f"{path.name} was left unfinished: download it again")
    return [HubFile(path.relative_to(folder).as_posix(), path.stat().st_size, None, local=path) for path in paths]


def _within(seconds: float, ask: Callable):
    """Return ``ask()``, or raise TimeoutError after ``seconds``.

    The libraries' own time limits do not cover every way of hanging.
    """
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
