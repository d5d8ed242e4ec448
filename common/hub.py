"""A model's or tokenizer's name -> a local folder: a local path, ModelScope, Hugging Face, or its mirror."""

import json
import os
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from common.console import InputError, say
from common.model_folder import custom_code, refuse_pointers

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)  # owner/name
DATA_SET_ID = re.compile(rf"({HUB_ID.pattern})(?::(.+))?", re.ASCII)  # owner/name, owner/name:subset or owner/name:file
PROBE_SECONDS = 8  # all hubs are probed at once; one that has not answered after this time is given up
# Names of published models without their owner, as the shapes of model/presets.py are called.
SHORT_NAMES = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
}
HUGGING_FACE = "https://huggingface.co"
HUGGING_FACE_MIRROR = "https://hf-mirror.com"
TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]  # config and tokenizer, no weights
WEIGHT_FILES = ["*.safetensors"]
# A folder can be loaded only if it has all files of one of these sets.
TOKENIZER_NEEDS = [["tokenizer.json"], ["*.model"], ["vocab.json", "merges.txt"], ["vocab.txt"], ["*.tiktoken"]]
# A folder with these is complete, whoever filled it. If one is missing, the hub may have more files.
USUAL_FILES = ["tokenizer.json", "tokenizer_config.json"]


def ways_to_continue(flag: str) -> str:
    """Return the advice that ends every error about an unreachable hub."""
    third = {
        "--tokenizer": "train one on your own text: --tokenizer train",
        "--model": "weights in a single file: --model FILE.gguf",
        "--data": "nothing from a hub: --data FILE --tokenizer train, or the bundled articles: --sample",
    }[flag]
    return (
        "Three ways to continue:\n"
        f"  1. a local path: {flag} /path/to/it, downloaded on another machine\n"
        "  2. a mirror: export HF_ENDPOINT=https://hf-mirror.com, and launch again\n"
        f"  3. {third}"
    )


def full_name(name: str) -> str:
    """Return the id that ``name`` is short for: Qwen/Qwen2.5-0.5B for qwen2.5-0.5b. Other names are returned as is."""
    return SHORT_NAMES.get(name.lower(), name)


def fetch_tokenizer(name: str) -> str:
    """Return a local folder with the tokenizer called ``name`` (a folder, or a model id on a hub).

    Raises:
        InputError: ``name`` is not a folder, and no hub that answers has it. A hub that does not answer is given up
            within 30 seconds. A hub that answers and then stalls takes as long as its own library waits.
    """
    return _fetch_repository("tokenizer", name, TOKENIZER_FILES, TOKENIZER_NEEDS)


def fetch_model(name: str, weights: bool) -> str:
    """Return a local folder with the model called ``name``: its config, its tokenizer and, if asked, its ``weights``.

    Raises:
        InputError: as ``fetch_tokenizer``. Weights are safetensors; a model that has only other weights counts as
            missing.
    """
    if weights:
        return _fetch_repository("model", name, [*TOKENIZER_FILES, *WEIGHT_FILES], [["config.json", *WEIGHT_FILES]])
    return _fetch_repository("model", name, TOKENIZER_FILES, [["config.json"]])


def _fetch_repository(what: str, name: str, files: list[str], needs: list[list[str]]) -> str:
    """Return a folder with those files of the model ``name`` that match ``files`` (globs).

    The folder has all files of at least one of the sets ``needs``.
    """
    flag = f"--{what}"
    if Path(name).is_dir():
        refuse_pointers(name, files)
        return name
    if not HUB_ID.fullmatch(full_name(name)):
        raise InputError(
            f"{flag} {name}: no such folder, and not a hub id like owner/name. Without an owner these are known: "
            f"{', '.join(SHORT_NAMES)}."
        )
    name = full_name(name)

    def from_modelscope(**where):
        from modelscope import snapshot_download

        return snapshot_download(name, allow_patterns=files, **where)

    def from_hugging_face(**where):
        from huggingface_hub import HfApi, snapshot_download

        if "endpoint" in where:  # a hub may stall here, and snapshot_download would wait forever
            where["token"] = token_for(where["endpoint"])
            HfApi(**where).model_info(name, timeout=PROBE_SECONDS)
        return snapshot_download(name, allow_patterns=files, **where)

    def lack(folder: Path) -> str:
        return lack_of(folder, needs)

    def lack_of_complete(folder: Path) -> str:
        missing = lack_of(folder, [[*needs[0], *USUAL_FILES]])
        if missing:
            return missing
        for path in folder.rglob("*.incomplete"):  # ModelScope's name for an interrupted download
            return f"{path.name} was left unfinished"
        return ""

    return _fetch(f"{what} {name}", flag, from_modelscope, from_hugging_face, lack, lack_of_complete)


def lack_of(folder: Path, needs: list[list[str]]) -> str:
    """Return what ``folder`` lacks, or "" if it can be loaded.

    It needs all files (globs) of at least one of the sets ``needs`` and, if these include weights, every shard that
    the index of the weights names.
    """
    if not any(all(any(folder.glob(glob)) for glob in files) for files in needs):
        missing = "does not have " + " or ".join(" + ".join(files) for files in needs)
        if not set(WEIGHT_FILES) & set(needs[0]) or not (folder / "config.json").exists():
            return missing
        code = custom_code(folder)
        return f"{missing}; docs/families.md says what to do with .bin files" if code is None else f"{missing}; {code}"
    if not set(WEIGHT_FILES) & set(needs[0]) or (folder / "model.safetensors").exists():
        return ""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return f"does not have {index.name}" if any(folder.glob("*-of-*.safetensors")) else ""
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    absent = [shard for shard in shards if not (folder / shard).exists()]
    return f"does not have {len(absent)} of {len(shards)} shards, {absent[0]} the first" if absent else ""


def offline(*flags: str) -> str:
    """Return the first of ``flags`` (environment variables such as HF_HUB_OFFLINE) that is set, or ""."""
    for flag in flags:
        if os.environ.get(flag, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return flag
    return ""


def hub_endpoints() -> dict[str, str]:
    """Return the hubs and their URLs, in the order in which they are asked."""
    # MODELSCOPE_DOMAIN is the older name of MODELSCOPE_ENDPOINT.
    modelscope = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN")
    endpoints = {"ModelScope": modelscope or "https://www.modelscope.cn"}
    for url in (os.environ.get("HF_ENDPOINT") or HUGGING_FACE, HUGGING_FACE_MIRROR):
        endpoints[f"Hugging Face ({without_password(url)})"] = url.rstrip("/")
    return {hub: _with_scheme(url) for hub, url in endpoints.items()}


def token_for(url: str) -> bool | None:
    """Return what to tell huggingface_hub of its token for the hub at ``url``: None for its own, False for none.

    A token (HF_TOKEN, or of a login) was given for the hub that the user chose: HF_ENDPOINT, else Hugging Face. It
    does not go to the mirror that is asked because that hub failed.
    """
    chosen = os.environ.get("HF_ENDPOINT") or HUGGING_FACE
    return None if url.rstrip("/") == _with_scheme(chosen).rstrip("/") else False


def without_password(url: str) -> str:
    """Return ``url`` for a message: https://me:secret@host/x as https://host/x."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)


def _with_scheme(url: str) -> str:
    return url if "://" in url else f"https://{url}"


def _fetch(what: str, flag: str, from_modelscope, from_hugging_face, lack: Callable, lack_of_complete: Callable) -> str:
    """Try the caches of both hubs, then every hub that answers (none with HF_HUB_OFFLINE); return the first result.

    A library does not always know whether its cache holds all files, or only those before an interruption. A cache that
    does not look complete is therefore used last: after its hub was asked for the missing files, or could not be asked.
    """
    failures = []
    caches = {"ModelScope's cache": from_modelscope, "Hugging Face's cache": from_hugging_face}
    for cache, fetch in caches.items():
        path, reason = _attempt(fetch, lack_of_complete, local_files_only=True)
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
        say(f"downloading {what} from {hub}")
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
            say("\n".join([f"note: {what}: taken from {cache}, which may be incomplete:", *failures]))
            return path
    raise InputError("\n".join([f"cannot fetch {what}:", *failures, ways_to_continue(flag)]))


def _attempt(fetch: Callable, lack: Callable[[Path], str], **where) -> tuple[str | None, str]:
    """Return (path, ""), or (None, reason) if ``fetch`` fails or its folder lacks files."""
    try:
        path = fetch(**where)
        reason = lack(Path(path))
    except Exception as error:  # each hub library has its own exceptions; all become a reason
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    return (None, reason) if reason else (path, "")


def answering_hubs(urls: Iterable[str]) -> set[str]:
    """Return the URLs that answer an HTTP request within PROBE_SECONDS; all are asked at once.

    The threads are daemons because a name look-up on a dead network ignores every timeout that Python offers.
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
