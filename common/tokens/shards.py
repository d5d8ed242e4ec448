"""Tokenize a corpus in many tasks, each of which writes one shard: a folder of token stores, read as one store.

``data/prepare_distributed.py`` gives ``write_shard`` and ``report_shards`` to datatrove. They are here and not in that
script because other machines have to import them. The plan is made once and written into the folder, so that every
task follows the same plan, on whatever machine and in whatever later launch it runs.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from common.console import InputError, say
from common.corpus.documents import CorpusCounts, detect_text_field, read_documents
from common.corpus.sources import Source
from common.corpus.splits import repeated
from common.io import write_json
from common.tokens.megatron import SIDECAR
from common.tokens.store import TokenStore
from common.tokens.tokenizer import load_tokenizer
from common.tokens.writer import origin_of, write_token_store

WORK_FOLDER = ".tasks"  # in the folder of shards; hidden, so that nobody takes its files for documents
LARGEST_SHARE = 1.5  # of an equal share: if whole files would give a task more, documents are dealt out instead


def plan_shards(
    folder: str,
    sources: list[Source],
    tokenizer_name: str,
    end_token: str | None,
    text_field: str | None,
    skip_malformed: bool,
    tasks: int,
) -> None:
    """Write the plan of ``tasks`` shards of ``sources`` into ``folder``, unless an earlier launch wrote the same one.

    The text field of each source is detected here. If each task detected it in its own files, tasks might disagree.

    Raises:
        InputError: fewer than one task; the folder holds another plan or other token stores; or what
            ``detect_text_field`` raises.
    """
    if tasks < 1:
        raise InputError(f"--tasks {tasks}: must be at least 1.")
    tokenizer = load_tokenizer(tokenizer_name, end_token)
    shares = share_files(sources, tasks)
    path = _plan_path(folder)
    known_fields = _read_plan(folder).get("text_fields", {}) if path.exists() else {}  # older plans have none
    task_sources = [sources] * tasks if shares is None else shares
    plan = {
        "tasks": tasks,
        "whole_files": shares is not None,
        "shares": [[_to_json(source) for source in share] for share in task_sources],
        "text_fields": _text_fields(sources, text_field, known_fields),
        "size_bytes": sum(source.size_bytes for source in sources),
        "tokenizer_name": os.path.abspath(tokenizer_name) if os.path.isdir(tokenizer_name) else tokenizer_name,
        "end_token": end_token,
        "skip_malformed": skip_malformed,
        "origin": origin_of(sources, tokenizer, text_field, skip_malformed),
    }
    if path.exists():
        _refuse_other_plan(folder, plan)
    elif any(Path(folder).glob("*.bin")):
        raise InputError(f"{folder}: holds token stores that this command did not write. Choose another --output.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, plan)
    how = (
        "whole files" if shares is not None else f"every {tasks}th document, for which each task reads all of the input"
    )
    say(f"{tasks} tasks, each with {how}, into {folder}")


def _text_fields(sources: list[Source], text_field: str | None, known: dict[str, str]) -> dict[str, str]:
    """Return the field of each source's text: ``text_field`` if given, else as ``known``, else detected."""
    fields = {}
    for source in sources:
        if text_field is not None:
            fields[source.name] = text_field
        elif source.name in known:
            fields[source.name] = known[source.name]
        else:
            fields[source.name] = detect_text_field(source)
    return fields


def share_files(sources: list[Source], tasks: int) -> list[list[Source]] | None:
    """Deal whole files out in their order, about as many bytes to each task; None if documents must be dealt out.

    None means that a task would get more than LARGEST_SHARE of an equal share, because some files are too large, or
    that a source is on a hub. If there are fewer files than tasks, some tasks get no file.
    """
    total = sum(source.size_bytes for source in sources)
    if total == 0 or any(source.hub_id is not None for source in sources):
        return [sources] if tasks == 1 else None
    files: list[list[list[Path]]] = [[[] for _ in sources] for _ in range(tasks)]  # (tasks, sources, files)
    share_bytes = [0] * tasks
    before = 0  # bytes of the files so far
    for number, source in enumerate(sources):
        for path in source.files:
            size = path.stat().st_size
            task = min(tasks - 1, int((before + size / 2) * tasks / total))  # by the middle of the file
            files[task][number].append(path)
            share_bytes[task] += size
            before += size
    if max(share_bytes) > LARGEST_SHARE * total / tasks:
        return None
    return [
        [replace(source, files=tuple(own)) for source, own in zip(sources, share, strict=True) if own]
        for share in files
    ]


def write_shard(_: object, rank: int, tasks: int, folder: str, threads: int) -> None:
    """Tokenize the share of task ``rank`` into its shard, unless that was done before. Called as a datatrove step.

    With whole files, the shard holds all their documents in order. Otherwise the task reads all input and takes every
    ``tasks``-th document, from number ``rank`` on. Task 0 then counts the empty and malformed documents.

    Raises:
        RuntimeError: with the message of an InputError. An InputError is a SystemExit, which would end the worker
            process silently, and its pool would wait forever.
    """
    plan = _read_plan(folder)
    sources = [_from_json(source) for source in plan["shares"][rank]]
    if not sources:
        return
    read = CorpusCounts()
    counts = read
    documents = chain.from_iterable(
        read_documents(source, plan["text_fields"][source.name], plan["skip_malformed"], read, may_be_empty=True)
        for source in sources
    )
    if not plan["whole_files"]:
        counts = CorpusCounts()
        documents = _every_nth(documents, rank, tasks, read, counts)
    try:
        tokenizer = load_tokenizer(plan["tokenizer_name"], plan["end_token"])
        size_bytes = sum(source.size_bytes for source in sources)
        origin = plan["origin"] | {"shard": f"{rank} of {tasks}"}
        write_token_store(documents, counts, tokenizer, shard_prefix(folder, rank, tasks), origin, size_bytes, threads)
    except InputError as error:
        raise RuntimeError(str(error)) from None


def shard_prefix(folder: str, rank: int, tasks: int) -> str:
    """Return the prefix of the token store that task ``rank`` writes."""
    return str(Path(folder) / f"shard-{rank:05d}-of-{tasks:05d}")


def _every_nth(
    documents: Iterable[str], rank: int, tasks: int, read: CorpusCounts, counts: CorpusCounts
) -> Iterator[str]:
    """Yield every ``tasks``-th of ``documents``, from number ``rank`` on.

    Args:
        read: what the reader of all ``documents`` counts.
        counts: gets the counts of the documents that are yielded; those of empty and malformed ones if ``rank`` is 0.
    """
    for number, text in enumerate(documents):
        counts.file_bytes = read.file_bytes
        if number % tasks == rank:
            counts.documents += 1
            counts.text_bytes += len(text.encode())
            yield text
    counts.file_bytes = read.file_bytes
    if rank == 0:
        counts.empty = read.empty
        counts.malformed = read.malformed
        counts.first_malformed = read.first_malformed


def report_shards(_: object, __: int, ___: int, folder: str, began: float) -> None:
    """Check the shards and print their counts as one line of JSON. Called as a datatrove step, after all tasks."""
    print(json.dumps(check_shards(folder) | {"seconds": round(time.time() - began, 2)}), flush=True)


def check_shards(folder: str) -> dict[str, int]:
    """Check that the shards in ``folder`` hold every document of the plan exactly once; return their total counts.

    Returns:
        ``documents``, ``tokens`` (without end-of-document tokens), ``end_tokens``, ``duplicates`` (exact copies: they
        are in the shards, and a recipe leaves them out), ``empty``, ``malformed``, ``bytes`` (UTF-8), ``shards``.

    Raises:
        InputError: a shard is missing or damaged, the shards do not add up, or none holds a document.
    """
    plan = _read_plan(folder)
    ranks = [rank for rank, share in enumerate(plan["shares"]) if share]  # tasks that write a shard
    prefixes = {rank: shard_prefix(folder, rank, plan["tasks"]) for rank in ranks}
    missing = [rank for rank, prefix in prefixes.items() if not Path(f"{prefix}{SIDECAR}").exists()]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(ranks)} shards are missing, of tasks {missing[:20]}. Launch again. The "
            f"logs are in {Path(folder, WORK_FOLDER)}. If a shard was there and was deleted, also delete the mark of "
            "its finished task, in completions in that folder."
        )
    sidecars = [TokenStore(prefix).sidecar for prefix in prefixes.values()]
    store = TokenStore(folder)
    documents = [sidecar["documents"] for sidecar in sidecars]
    read_bytes = [sidecar["file_bytes"] for sidecar in sidecars]
    whole = _all_were_read(plan, documents, read_bytes)
    if not whole or store.documents != sum(documents) or len(store.pairs) != len(ranks):
        raise InputError(
            f"{folder}: the shards do not add up: {documents} documents from {read_bytes} bytes of a source of "
            f"{plan['size_bytes']:,}, {store.documents:,} documents in all. The input changed meanwhile, or other "
            "files got into the folder. Remove the folder and launch again."
        )
    empty, malformed = (sum(sidecar[name] for sidecar in sidecars) for name in ("empty", "malformed"))
    if store.documents == 0:
        raise InputError(
            f"{folder}: no document in any shard ({empty:,} empty, {malformed:,} malformed in the input). Remove the "
            "folder and launch with other input, or another --text_field."
        )
    return {
        "documents": store.documents,
        "tokens": len(store.tokens) - store.documents,
        "end_tokens": store.documents,
        "duplicates": int(repeated(store.id_hashes()).sum()),
        "empty": empty,
        "malformed": malformed,
        "bytes": sum(sidecar["text_bytes"] for sidecar in sidecars),
        "shards": len(ranks),
    }


def _all_were_read(plan: dict, documents: list[int], read_bytes: list[int]) -> bool:
    """Whether shards with these ``documents``, made from ``read_bytes`` of input each, cover the input of ``plan``."""
    if plan["whole_files"]:
        return sum(read_bytes) == plan["size_bytes"]
    # Every task read all input, and documents went to tasks 0, 1, 2, 0, 1, ...: of 5 documents, 3 tasks have [2, 2, 1].
    tasks = plan["tasks"]
    in_turn = [-(-(sum(documents) - rank) // tasks) for rank in range(tasks)]
    return documents == in_turn and set(read_bytes) == {plan["size_bytes"]}


def _refuse_other_plan(folder: str, plan: dict) -> None:
    """Raise InputError if the plan in ``folder`` is for another number of tasks, or for shards of other content."""
    existing = _read_plan(folder)
    tasks = plan["tasks"]
    origin = json.loads(json.dumps(plan["origin"]))  # as it reads back: tuples become lists
    if existing["tasks"] != tasks:
        difference = f"for {existing['tasks']} tasks, not {tasks}"
    elif existing["origin"] != origin:
        changed = ", ".join(key for key in origin if origin[key] != existing["origin"][key])
        difference = f"made with other settings ({changed})"
    else:
        return
    raise InputError(
        f"{folder}: holds shards {difference}. Launch with the earlier settings to continue, remove the folder, or "
        "choose another --output."
    )


def _plan_path(folder: str) -> Path:
    return Path(folder) / WORK_FOLDER / "plan.json"


def _read_plan(folder: str) -> dict:
    return json.loads(_plan_path(folder).read_text(encoding="utf-8"))


def _to_json(source: Source) -> dict:
    files = [str(path.absolute()) for path in source.files]  # absolute: a task may start in another folder
    return {
        "given": source.given,
        "name": source.name,
        "files": files,
        "hub_id": source.hub_id,
        "encoding": source.encoding,
        "whole_texts": source.whole_texts,
    }


def _from_json(source: dict) -> Source:
    return Source(
        given=source["given"],
        name=source["name"],
        files=tuple(map(Path, source["files"])),
        hub_id=source["hub_id"],
        encoding=source.get("encoding"),  # plans of earlier versions have neither this nor the next
        whole_texts=source.get("whole_texts", False),
    )
