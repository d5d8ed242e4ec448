"""A name -> a local folder: local path, then ModelScope, then Hugging Face or its mirror."""

import json
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from common.console import InputError, say

PROBE_SECONDS = 8  # an unreachable hub is given up after this, all hubs probed at once
HUGGING_FACE, HUGGING_FACE_MIRROR = "https://huggingface.co", "https://hf-mirror.com"
TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]  # config and tokenizer, no weights
WEIGHT_FILES = ["*.safetensors"]
# Without all files of one of these sets, a folder cannot be loaded.
TOKENIZER_NEEDS = [["tokenizer.json"], ["*.model"], ["vocab.json", "merges.txt"], ["vocab.txt"], ["*.tiktoken"]]
# With these, a folder is whole, whoever filled it; without, its hub may have more.
USUAL_FILES = ["tokenizer.json", "tokenizer_config.json"]


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
    return _fetch_repository("tokenizer", name, TOKENIZER_FILES, TOKENIZER_NEEDS)


def fetch_model(name: str, weights: bool) -> str:
    """Return a local folder with the model called ``name``: its config and tokenizer, and its ``weights``.

    Raises:
        InputError: as ``fetch_tokenizer``. Weights are safetensors: a model that has only others counts as not there.
    """
    if weights:
        return _fetch_repository("model", name, [*TOKENIZER_FILES, *WEIGHT_FILES], [["config.json", *WEIGHT_FILES]])
    return _fetch_repository("model", name, TOKENIZER_FILES, [["config.json"]])


def _fetch_repository(what: str, name: str, files: list[str], needs: list[list[str]]) -> str:
    """Return a folder with the ``files`` (globs) of the model ``name``, all of one of ``needs`` among them."""
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

    def lack(folder: Path) -> str:
        return lack_of(folder, needs)

    def lack_of_whole(folder: Path) -> str:
        unfinished = [f"{path.name} was left unfinished" for path in folder.rglob("*.incomplete")]  # by ModelScope
        return lack_of(folder, [[*needs[0], *USUAL_FILES]]) or "".join(unfinished[:1])

    return _fetch(f"{what} {name}", flag, from_modelscope, from_hugging_face, lack, lack_of_whole)


def lack_of(folder: Path, needs: list[list[str]]) -> str:
    """Return what ``folder`` lacks of ``needs`` (all of one of these sets of globs), or of its weights, or ""."""
    if not any(all(any(folder.glob(glob)) for glob in files) for files in needs):
        return "does not have " + " or ".join(" + ".join(files) for files in needs)
    if not set(WEIGHT_FILES) & set(needs[0]) or (folder / "model.safetensors").exists():
        return ""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return f"does not have {index.name}" if any(folder.glob("*-of-*.safetensors")) else ""
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    absent = [shard for shard in shards if not (folder / shard).exists()]
    return f"does not have {len(absent)} of {len(shards)} shards, {absent[0]} the first" if absent else ""


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


def _fetch(what: str, flag: str, from_modelscope, from_hugging_face, lack: Callable, lack_of_whole: Callable) -> str:
    """Try the caches of both hubs, then (not with HF_HUB_OFFLINE) every hub that answers; the first result wins.

    Neither library always knows whether its cache holds a part, where a download was stopped, or the whole. One that
    does not show to be whole is used last: by then its hub was asked for what is missing, or could not be.
    """
    failures = []
    caches = {"ModelScope's cache": from_modelscope, "Hugging Face's cache": from_hugging_face}
    for cache, fetch in caches.items():
        path, reason = _attempt(fetch, lack_of_whole, local_files_only=True)
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
            path, reason = _attempt(from_modelscope, lack)
        else:
            path, reason = _attempt(from_hugging_face, lack, endpoint=url)
        if path is not None:
            return path
        failures.append(f"  {hub}: {reason}")
    for cache, fetch in caches.items():
        path, _ = _attempt(fetch, lack, local_files_only=True)
        if path is not None:
            say("\n".join([f"note: {what}: taken from {cache}, which may hold a part of it only:", *failures]))
            return path
    raise InputError("\n".join([f"cannot fetch {what}:", *failures, three_ways_on(flag)]))


def _attempt(fetch: Callable, lack: Callable[[Path], str], **where) -> tuple[str | None, str]:
    """Return (path, "") or (None, why not). Each hub library has exceptions of its own: all are caught, and named."""
    try:
        path = fetch(**where)
        reason = lack(Path(path))
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    return (None, reason) if reason else (path, "")


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
