"""A data set id -> its records, streamed from ModelScope, Hugging Face or its mirror, or read from a cache.

Neither library's own streaming is used (datasets 5.2, modelscope 1.40). ``MsDataset`` patches the inside of
``datasets`` while it loads, and needs the extra ``modelscope[datasets]``. ``datasets`` knows one endpoint only, which
it reads at import; it holds a whole JSON array in memory (wiki-zh is one of 2 GB); and it waits up to 20 minutes for a
hub that answers "too many requests". ``datasets`` is used to decide which files of a repository are the train split.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from common.console import InputError, say
from common.corpus.corpora import on_modelscope
from common.corpus.formats import Records, format_of
from common.corpus.records import file_records
from common.corpus.sources import Source
from common.corpus.transfer import HubFile, cached_files, hugging_face_snapshot, modelscope_snapshot, remote_files
from common.hub import DATA_SET_ID, answering_hubs, hub_endpoints, offline, ways_to_continue

NAMES_SHOWN = 5


def hub_records(
    identifier: str,
    fields: list[str] | None = None,
    encoding: str | None = None,
    note: Callable[[str], None] = say,
) -> Records:
    """Yield (where, record) for the train split of a data set, as ``file_records`` does for each of its files.

    Nothing is written to disk.

    Args:
        identifier: ``owner/name`` or ``owner/name:subset``. A subset is a configuration of the data set
            (``wikimedia/wikipedia:20231101.zh``) or the path of one of its files.
        fields: the fields that are needed; None for all.
        encoding: of the text files, as ``known_encoding`` returns it; None for UTF-8.
        note: prints what is read and what is not.

    Raises:
        InputError: no hub and no cache has the data set, or its hub breaks off and does not come back. A stream that is
            cut off is never taken for a complete one.
    """
    place, files = find_files(identifier, note)
    gigabytes = sum(file.size_bytes for file in files) / 1e9
    note(f"{identifier}: reading {len(files)} files, {gigabytes:.2f} GB, from {place}")
    # As in a folder: see ``resolve_source``.
    whole_texts = sum(format_of(file.path) == ".txt" for file in files) > 1
    for file in files:
        yield from file_records(file.path, file.open, fields, encoding, whole_texts, note)


def with_cached_files(source: Source) -> Source:
    """Return ``source``, with the files that are read of it if they come from a cache, which may be incomplete.

    They belong to the key of what is made from it: when the hub answers again, or the cache has more files, the data
    set is read again.
    """
    if source.hub_id is None:
        return source
    _, files = find_files(source.hub_id, source.say_once)
    is_one_named_file = [file.path for file in files] == [DATA_SET_ID.fullmatch(source.hub_id)[2]]
    if is_one_named_file or any(file.local is None for file in files):
        return source
    return replace(source, cached_files=tuple((file.path, file.size_bytes) for file in files))


def find_files(identifier: str, note: Callable[[str], None] = say) -> tuple[str, list[HubFile]]:
    """Return the first place that has the data set, and the files of its train split there.

    The places are ModelScope (where some have another name, see ``corpora.py``), Hugging Face (HF_ENDPOINT), its
    mirror, and then the caches of both libraries. If
    HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set, only the caches are tried. A cache does not say whether it has all
    files, so a note names those it has.

    Raises:
        InputError: ``identifier`` is not a data set id, or no place has it.
    """
    match = DATA_SET_ID.fullmatch(identifier)
    if match is None:
        raise InputError(f"{identifier}: not a hub id like owner/name, owner/name:subset or owner/name:file.")
    repository, subset = match.groups()
    flag_set = offline("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    endpoints = {} if flag_set else hub_endpoints()
    answering = answering_hubs(endpoints.values())
    there = on_modelscope(repository)
    places = {}
    for hub, url in endpoints.items():
        places[hub] = partial(remote_files, there if hub == "ModelScope" else repository, hub, url)
    places["ModelScope's cache"] = partial(cached_files, there, modelscope_snapshot)
    places["Hugging Face's cache"] = partial(cached_files, repository, hugging_face_snapshot)
    failures = [f"  no hub is asked: {flag_set} is set"] if flag_set else []
    for place, list_files in places.items():
        if place in endpoints and endpoints[place] not in answering:
            failures.append(f"  {place}: does not answer")
            continue
        try:
            files = train_files(list_files(), subset, note)
        except (Exception, InputError) as error:  # each hub library has its own exceptions; all become a reason
            failures.append(f"  {place}: {type(error).__name__}: {error}".replace("\n", " "))
            continue
        paths = [file.path for file in files]
        if place not in endpoints and paths != [subset]:
            what = f"{len(paths)} file{'s' * (len(paths) > 1)}: {_some(paths)}"
            note("\n".join([f"note: {identifier}: {place} may be incomplete; it has {what}", *failures]))
        return place, files
    raise InputError("\n".join([f"cannot find data set {identifier}:", *failures, ways_to_continue("--data")]))


def train_files(files: list[HubFile], subset: str | None, note: Callable[[str], None] = say) -> list[HubFile]:
    """Return the files that ``datasets`` takes for the train split of ``subset``, in its order.

    ``datasets`` is given a folder of empty files with the repository's file names, and the repository's README.md.

    Raises:
        ValueError: there is no such subset, a subset must be chosen, or there is no train split.
    """
    by_path = {file.path: file for file in files}
    if subset in by_path:
        return [by_path[subset]]
    splits = _splits(by_path, subset)
    if "train" not in splits:
        raise ValueError(f"no train split, only {', '.join(splits)}; name a file instead: owner/name:file")
    chosen = splits["train"]
    others = [path for path in by_path if by_path[path] not in chosen and path not in {"README.md", ".gitattributes"}]
    if others:
        note(f"not in the train split, so not read: {_some(others)}")
    _check_shards([file.path for file in chosen if file.local is not None])
    return chosen


def _splits(by_path: dict[str, HubFile], subset: str | None) -> dict[str, list[HubFile]]:
    """Return the files of each split of ``subset``, as ``datasets`` assigns them."""
    import datasets

    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "repository").resolve()
        for path in by_path:
            if ".." in PurePosixPath(path).parts or PurePosixPath(path).is_absolute():
                continue  # would be written outside the folder
            if path == "dataset_infos.json":
                continue  # README.md has replaced it, but `datasets` would still read it
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
        if "README.md" in by_path:
            with by_path["README.md"].open() as stream:
                (folder / "README.md").write_bytes(stream.read())
        try:
            builder = datasets.load_dataset_builder(str(folder), name=subset, cache_dir=str(Path(temporary, "cache")))
        except FileNotFoundError:  # EmptyDatasetError
            raise ValueError(f"none of its files can be streamed ({', '.join(by_path)})") from None
        except ValueError as error:
            raise ValueError(f"{str(error).split('Example of usage')[0].strip()} (owner/name:subset)") from None
        return {
            str(split): [by_path[Path(path).relative_to(folder).as_posix()] for path in paths]
            for split, paths in builder.config.data_files.items()
        }


def _check_shards(paths: list[str]) -> None:
    """Raise ValueError if a file is missing among files numbered like ``-00000-of-00003``.

    A cache may hold only a part of them.
    """
    found = [re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})(\D.*)", path) for path in paths]
    shards = Counter((match[1], int(match[3]), match[4]) for match in found if match)
    for (before, total, after), count in shards.items():
        if count != total:
            raise ValueError(
                f"{count} of {total} shards {before}NNNNN-of-{total:05}{after} are there: download it again"
            )


def _some(paths: list[str]) -> str:
    more = f" and {len(paths) - NAMES_SHOWN} more" if len(paths) > NAMES_SHOWN else ""
    return ", ".join(paths[:NAMES_SHOWN]) + more
