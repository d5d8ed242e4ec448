"""The files of a data set on ModelScope, on Hugging Face, and in the caches of both: names, sizes, checksums, URLs."""

import io
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from common.hub import HUGGING_FACE_MIRROR
from common.remote_file import RemoteFile

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
