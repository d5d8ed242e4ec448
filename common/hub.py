"""A name -> a local folder: local path, then ModelScope, then Hugging Face or its mirror."""

import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from common.messages import InputError, say

PROBE_SECONDS = 8  # an unreachable hub is given up after this, all hubs probed at once
HUGGING_FACE, HUGGING_FACE_MIRROR = "https://huggingface.co", "https://hf-mirror.com"
TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]  # config and tokenizer, no weights
TOKENIZER_VOCABULARIES = ["tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken"]
WEIGHT_FILES = ["*.safetensors"]


def three_ways_on(flag: str) -> str:
    """Return the advice that ends every error about an unreachable hub."""
    third = {
        "--tokenizer": "train one on your own text: --tokenizer train",
        "--model": "weights in a single file: --model FILE.gguf",
        "--data": "nothing from a hub: --data FILE --tokenizer train, or the bundled articles: --sample",
    }[flag]
    return (
        "Three ways on:\n"
        f"  1. a local path: {flag} /path/to/it, fetched on another machine\n"
        "  2. a mirror: export HF_ENDPOINT=https://hf-mirror.com, and launch again\n"
        f"  3. {third}"
    )


def fetch_tokenizer(name: str) -> str:
    """Return a local folder with the tokenizer called ``name`` (a folder, or a model id on a hub).

    Raises:
        InputError: it is neither a folder nor on a hub that answers. Hubs that do not are given up within 30 seconds;
            one that answers and then stalls takes as long as its own library waits.
    """
    return _fetch_repository("tokenizer", name, TOKENIZER_FILES, TOKENIZER_VOCABULARIES)


def fetch_model(name: str, weights: bool) -> str:
    """Return a local folder with the model called ``name``: its config and tokenizer, and its ``weights``.

    Raises:
        InputError: as ``fetch_tokenizer``. Weights are safetensors: a model that has only others counts as not there.
    """
    if weights:
        return _fetch_repository("model", name, [*TOKENIZER_FILES, *WEIGHT_FILES], WEIGHT_FILES)
    return _fetch_repository("model", name, TOKENIZER_FILES, ["config.json"])


def _fetch_repository(what: str, name: str, files: list[str], needed: list[str]) -> str:
    """Return a folder with the ``files`` (globs) of the model ``name``, at least one of ``needed`` among them."""
    flag = f"--{what}"
    if Path(name).is_dir():
        return name
    if name.startswith((".", "/")) or name.count("/") != 1:
        raise InputError(f"{flag} {name}: no such folder, and not a hub id like owner/name.")

    def from_modelscope(**where):
        from modelscope import snapshot_download

        return snapshot_download(name, allow_patterns=files, **where)

    def from_hugging_face(**where):
        from huggingface_hub import HfApi, snapshot_download

        if "endpoint" in where:  # a hub that stalls: snapshot_download would wait for ever
            HfApi(**where).model_info(name, timeout=PROBE_SECONDS)
        return snapshot_download(name, allow_patterns=files, **where)

    def complete(folder: Path) -> bool:  # a cache may hold the config alone
        return any(list(folder.glob(pattern)) for pattern in needed)

    return _fetch(f"{what} {name}", flag, from_modelscope, from_hugging_face, complete)


def offline(*flags: str) -> str:
    """Return the one of ``flags`` (variables of the environment, such as HF_HUB_OFFLINE) that is set, or ""."""
    return next((flag for flag in flags if os.environ.get(flag, "").upper() in {"1", "ON", "YES", "TRUE"}), "")


def hub_endpoints() -> dict[str, str]:
    """Return the hubs and their URLs in the order in which they are asked."""
    modelscope = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN")  # the second is the old
    endpoints = {"ModelScope": modelscope or "https://www.modelscope.cn"}
    for url in (os.environ.get("HF_ENDPOINT") or HUGGING_FACE, HUGGING_FACE_MIRROR):
        endpoints[f"Hugging Face ({url})"] = url.rstrip("/")
    return {hub: url if "://" in url else f"https://{url}" for hub, url in endpoints.items()}


def _fetch(what: str, flag: str, from_modelscope, from_hugging_face, complete: Callable[[Path], bool]) -> str:
    """Try the caches of both hubs, then (not with HF_HUB_OFFLINE) every hub that answers; the first result wins."""
    failures = []
    for cache, fetch in (("ModelScope's cache", from_modelscope), ("Hugging Face's cache", from_hugging_face)):
        path, reason = _attempt(fetch, complete, local_files_only=True)
        if path is not None:
            return path
        failures.append(f"  {cache}: {reason}")
    flag_set = offline("HF_HUB_OFFLINE")
    if flag_set:
        failures.append(f"  no hub is asked: {flag_set} is set")
    endpoints = {} if flag_set else hub_endpoints()
    answering = answering_hubs(endpoints.values())
    for hub, url in endpoints.items():
        if url not in answering:
            failures.append(f"  {hub}: does not answer")
            continue
        say(f"fetching {what} from {hub}")
        if hub == "ModelScope":
            path, reason = _attempt(from_modelscope, complete)
        else:
            path, reason = _attempt(from_hugging_face, complete, endpoint=url)
        if path is not None:
            return path
        failures.append(f"  {hub}: {reason}")
    raise InputError("\n".join([f"cannot fetch {what}:", *failures, three_ways_on(flag)]))


def _attempt(fetch: Callable, complete: Callable[[Path], bool], **where) -> tuple[str | None, str]:
    """Return (path, "") or (None, why not). Each hub library has exceptions of its own: all are caught, and named."""
    try:
        path = fetch(**where)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    return (path, "") if complete(Path(path)) else (None, "does not have it")


def answering_hubs(urls: Iterable[str]) -> set[str]:
    """Return the URLs that answer an HTTP request within PROBE_SECONDS, asked all at once.

    Daemon threads, because a name look-up on a dead network ignores every timeout that Python offers.
    """
    import requests

    answering = set()

    def probe(url: str) -> None:
        try:
            requests.head(url, timeout=PROBE_SECONDS / 2)
            answering.add(url)
        except requests.RequestException:
            pass

    threads = [threading.Thread(target=probe, args=(url,), daemon=True) for url in set(urls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PROBE_SECONDS)
    return set(answering)
