"""Tokenize a corpus in several tasks, each its own shard: a token store in one folder, which is read as one store.

``data/prepare_distributed.py`` hands ``write_shard`` and ``report_shards`` to datatrove. They are here, and not in that
script, because other machines have to import them. The plan is made once and lies in the folder, so that all tasks, on
whatever machine, now or in a later launch, follow the same one.
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
from common.tokens.store import TokenStore
from common.tokens.tokenizer import load_tokenizer
from common.tokens.writer import origin_of, write_token_store

WORK_FOLDER = ".tasks"  # in the folder of shards; hidden, so that it is not taken for documents
LARGEST_SHARE = 1.5  # times an equal share: where whole files would give a task more, documents are dealt out instead


def plan_shards(
    folder: str,
    sources: list[Source],
    tokenizer_name: str,
    end_token: str | None,
    text_field: str | None,
    skip_malformed: bool,
    tasks: int,
) -> None:
    """Write the plan of ``tasks`` shards of ``sources`` into ``folder``, or find the same one there.

    The field of the text is found here, once for each source: every task, judging by its own files, might find another.

    Raises:
        InputError: fewer than one task, the folder holds something else (another plan, or other token stores), or what
            ``detect_text_field`` raises.
    """
    if tasks < 1:
        raise InputError(f"--tasks {tasks}: at least 1.")
    tokenizer = load_tokenizer(tokenizer_name, end_token)
    is_local = os.path.isdir(tokenizer_name)
    shares, path = share_files(sources, tasks), _plan_path(folder)
    known = _read_plan(folder).get("text_fields", {}) if path.exists() and text_field is None else {}
    plan = {
        "tasks": tasks,
        "whole_files": shares is not None,
        "shares": [[_to_json(source) for source in share] for share in shares or [sources] * tasks],
        "text_fields": {s.name: text_field or known.get(s.name) or detect_text_field(s) for s in sources},
        "size_bytes": sum(source.size_bytes for source in sources),
        "tokenizer_name": os.path.abspath(tokenizer_name) if is_local else tokenizer_name,
        "end_token": end_token,
        "skip_malformed": skip_malformed,
        "origin": origin_of(sources, tokenizer, text_field, skip_malformed),
    }
    if path.exists():
        _refuse_other_plan(folder, plan)
    elif any(Path(folder).glob("*.bin")):
        raise InputError(f"{folder}: holds token stores that are not of this command. Choose another --output.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(plan, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)
    how = "whole files" if shares else f"every {tasks}th document, for which each task reads all of the input"
    say(f"{tasks} tasks, each with {how}, into {folder}")


def share_files(sources: list[Source], tasks: int) -> list[list[Source]] | None:
    """Deal the files out in their order, to each task about as many bytes; None where documents must be dealt out.

    That is where a file, or what is on a hub, is too large a piece: a task would have more than LARGEST_SHARE. A task
    may get no file where files are few.
    """
    total, before = sum(source.size_bytes for source in sources), 0
    if total == 0 or any(source.hub_id is not None for source in sources):
        return [sources] if tasks == 1 else None
    files: list[list[list[Path]]] = [[[] for _ in sources] for _ in range(tasks)]  # (tasks, sources, files)
    share_bytes = [0] * tasks
    for number, source in enumerate(sources):
        for path in source.files:
            size = path.stat().st_size
            task = min(tasks - 1, int((before + size / 2) * tasks / total))  # where the file's middle falls
            files[task][number].append(path)
            share_bytes[task] += size
            before += size
    if max(share_bytes) > LARGEST_SHARE * total / tasks:
        return None
    return [
        [replace(source, files=tuple(mine)) for source, mine in zip(sources, share, strict=True) if mine]
        for share in files
    ]


def write_shard(_: object, rank: int, tasks: int, folder: str, threads: int) -> None:
    """Tokenize the share of task ``rank`` into its shard, unless that was done before. Called as a datatrove step.

    A share of whole files holds their documents in order. Otherwise the task reads everything and takes every
    ``tasks``-th document; what is empty or malformed is counted by task 0.

    Raises:
        RuntimeError: with the message of an InputError. That is a SystemExit, which would end the worker without a
            word, and its pool would wait for ever.
    """
    plan = _read_plan(folder)
    sources = [_from_json(source) for source in plan["shares"][rank]]
    if not sources:
        return
    read, counts = CorpusCounts(), CorpusCounts()
    documents = chain.from_iterable(
        read_documents(source, plan["text_fields"][source.name], plan["skip_malformed"], read, may_be_empty=True)
        for source in sources
    )
    if plan["whole_files"]:
        counts = read
    else:
        documents = _every_nth(documents, rank, tasks, read, counts)
    try:
        tokenizer = load_tokenizer(plan["tokenizer_name"], plan["end_token"])
        size_bytes = sum(source.size_bytes for source in sources)
        origin = plan["origin"] | {"shard": f"{rank} of {tasks}"}
        write_token_store(documents, counts, tokenizer, shard_prefix(folder, rank, tasks), origin, size_bytes, threads)
    except InputError as error:
        raise RuntimeError(str(error)) from None


def check_shards(folder: str) -> dict[str, int]:
    """Make sure that the shards in ``folder`` hold every document of the plan once; return their counts in all.

    Returns:
        ``documents``, ``tokens`` (without end-of-document tokens), ``end_tokens``, ``duplicates`` (exact copies: they
        are in the shards, and a recipe leaves them out), ``empty``, ``malformed``, ``bytes`` (UTF-8), ``shards``.

    Raises:
        InputError: a shard is missing or damaged, the shards do not add up, there is no document in any.
    """
    plan = _read_plan(folder)
    expected = [rank for rank, share in enumerate(plan["shares"]) if share]
    prefixes = {rank: shard_prefix(folder, rank, plan["tasks"]) for rank in expected}
    missing = [rank for rank, prefix in prefixes.items() if not Path(f"{prefix}.json").exists()]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(expected)} shards are missing, of tasks {missing[:20]}. Launch again. "
            f"The logs are in {Path(folder, WORK_FOLDER)}; so are, in completions, the marks of finished tasks: remove "
            "those of shards that were there and are gone."
        )
    sidecars = [TokenStore(prefix).sidecar for prefix in prefixes.values()]
    dealt, read_bytes = [sidecar["documents"] for sidecar in sidecars], [sidecar["file_bytes"] for sidecar in sidecars]
    if plan["whole_files"]:
        whole = sum(read_bytes) == plan["size_bytes"]
    else:  # dealt out in turn, shard k of n holds (documents - k) / n of them, rounded up
        in_turn = [-(-(sum(dealt) - rank) // plan["tasks"]) for rank in expected]
        whole = dealt == in_turn and set(read_bytes) == {plan["size_bytes"]}
    store = TokenStore(folder)
    if not whole or store.documents != sum(dealt) or len(store.pairs) != len(expected):
        raise InputError(
            f"{folder}: the shards do not add up: {dealt} documents from {read_bytes} bytes of a source of "
            f"{plan['size_bytes']:,}, {store.documents:,} documents in all. Did the input change meanwhile, or other "
            "files get into the folder? Remove the folder and launch again."
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
        "duplicates": int(repeated(store.document_hashes()).sum()),
        "empty": empty,
        "malformed": malformed,
        "bytes": sum(sidecar["text_bytes"] for sidecar in sidecars),
        "shards": len(expected),
    }


def report_shards(_: object, __: int, ___: int, folder: str, began: float) -> None:
    """Check the shards and print their counts as one line of JSON. Called as a datatrove step, after all tasks."""
    print(json.dumps(check_shards(folder) | {"seconds": round(time.time() - began, 2)}), flush=True)


def shard_prefix(folder: str, rank: int, tasks: int) -> str:
    return str(Path(folder) / f"shard-{rank:05d}-of-{tasks:05d}")


def _every_nth(
    documents: Iterable[str], rank: int, tasks: int, read: CorpusCounts, counts: CorpusCounts
) -> Iterator[str]:
    """Yield every ``tasks``-th of ``documents`` from number ``rank`` on; count them, of all those ``read``."""
    for number, text in enumerate(documents):
        counts.file_bytes = read.file_bytes
        if number % tasks == rank:
            counts.documents += 1
            counts.text_bytes += len(text.encode())
            yield text
    counts.file_bytes = read.file_bytes
    if rank == 0:
        counts.empty, counts.malformed, counts.first_malformed = read.empty, read.malformed, read.first_malformed


def _refuse_other_plan(folder: str, plan: dict) -> None:
    there, plan = _read_plan(folder), json.loads(json.dumps(plan))
    if there["tasks"] != plan["tasks"]:
        what = f"for {there['tasks']} tasks"
    else:
        what = "made otherwise: " + ", ".join(
            key for key in plan["origin"] if plan["origin"][key] != there["origin"][key]
        )
    if (there["tasks"], there["origin"]) != (plan["tasks"], plan["origin"]):
        raise InputError(
            f"{folder}: holds shards {what}. Launch as before to go on with them, remove the folder, or choose another "
            "--output."
        )


def _plan_path(folder: str) -> Path:
    return Path(folder) / WORK_FOLDER / "plan.json"


def _read_plan(folder: str) -> dict:
    return json.loads(_plan_path(folder).read_text(encoding="utf-8"))


def _to_json(source: Source) -> dict:
    files = [str(path.absolute()) for path in source.files]  # a task may start in another folder
    return {"given": source.given, "name": source.name, "files": files, "hub_id": source.hub_id}


def _from_json(source: dict) -> Source:
    return Source(source["given"], source["name"], tuple(map(Path, source["files"])), source["hub_id"])
