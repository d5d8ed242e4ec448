"""A data set id -> its records, streamed: ModelScope, Hugging Face, its mirror, or what a cache holds.

Neither library's own streaming is used, for these reasons (datasets 5.2, modelscope 1.40): ``MsDataset`` patches the
inside of ``datasets`` while it loads and needs the extra ``modelscope[datasets]``; ``datasets`` knows one endpoint
only, read at import, holds a JSON array in memory whole (wiki-zh is one of 2 GB), and waits up to 20 minutes for a hub
that answers "too many requests". What ``datasets`` decides here is which files of a repository are the train split.
"""

import re
from collections import Counter
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from common.console import InputError, say
from common.corpus.records import Records, file_records
from common.corpus.transfer import HubFile, cached_files, hugging_face_snapshot, modelscope_snapshot, remote_files
from common.hub import answering_hubs, hub_endpoints, offline, three_ways_on

IDENTIFIER = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::(.+))?")


def hub_records(identifier: str, fields: list[str] | None = None) -> Records:
    """Yield (where, record) for the train split of a data set, as ``file_records`` does for each of its files.

    ``identifier``: ``owner/name``, or ``owner/name:subset``, a subset being a configuration of the data set
    (``wikimedia/wikipedia:20231101.zh``) or the path of one of its files. Nothing is written to disk.

    Raises:
        InputError: no hub and no cache has it, or the one that has it breaks off and stays away. A stream that is cut
            off never looks like its end.
    """
    place, files = find_files(identifier)
    say(f"{identifier}: reading {len(files)} files, {sum(f.size_bytes for f in files) / 1e9:.2f} GB, from {place}")
    for file in files:
        yield from file_records(file.path, file.open, fields)


def find_files(identifier: str) -> tuple[str, list[HubFile]]:
    """Return the first place that has the data set, and the files of its train split there.

    Asked are ModelScope, Hugging Face (HF_ENDPOINT), its mirror, and last the caches of both libraries; these alone
    where HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set. A cache does not tell whether it holds all files: which it has
    is said.
    """
    if not IDENTIFIER.fullmatch(identifier):
        raise InputError(f"{identifier}: not a hub id like owner/name, owner/name:subset or owner/name:file.")
    repository, subset = IDENTIFIER.fullmatch(identifier).groups()
    flag_set = offline("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    endpoints = {} if flag_set else hub_endpoints()
    answering = answering_hubs(endpoints.values())
    places = {hub: partial(remote_files, repository, hub, url) for hub, url in endpoints.items()}
    places |= {"ModelScope's cache": partial(cached_files, repository, modelscope_snapshot)}
    places |= {"Hugging Face's cache": partial(cached_files, repository, hugging_face_snapshot)}
    failures = [f"  no hub is asked: {flag_set} is set"] if flag_set else []
    for place, list_files in places.items():
        if place in endpoints and endpoints[place] not in answering:
            failures.append(f"  {place}: does not answer")
            continue
        try:
            files = train_files(list_files(), subset)
        except (Exception, InputError) as error:  # each library has exceptions of its own: all are caught, and named
            failures.append(f"  {place}: {type(error).__name__}: {error}".replace("\n", " "))
            continue
        paths = [file.path for file in files]
        if place not in endpoints and paths != [subset]:
            what = f"{len(paths)} files: {', '.join(paths[:5])}{', ...' * (len(paths) > 5)}"
            say("\n".join([f"note: {identifier}: {place} may hold a part of it only, {what}", *failures]))
        return place, files
    raise InputError("\n".join([f"cannot find data set {identifier}:", *failures, three_ways_on("--data")]))


def train_files(files: list[HubFile], subset: str | None) -> list[HubFile]:
    """Return the files that ``datasets`` takes for the train split of ``subset``, in its order.

    It is shown a folder of empty files with the repository's names, and the repository's own README.md.

    Raises:
        ValueError: there is no such subset, one has to be chosen, or there is no train split.
    """
    import datasets

    by_path = {file.path: file for file in files}
    if subset in by_path:
        return [by_path[subset]]
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "repository").resolve()
        for path in by_path:
            if ".." in PurePosixPath(path).parts or PurePosixPath(path).is_absolute() or path == "dataset_infos.json":
                continue  # would lie outside, or is read by `datasets` and superseded by README.md
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
        splits = {
            str(split): [by_path[Path(path).relative_to(folder).as_posix()] for path in paths]
            for split, paths in builder.config.data_files.items()
        }
    if "train" not in splits:
        raise ValueError(f"no train split, only {', '.join(splits)}; name a file instead: owner/name:file")
    chosen = splits["train"]
    others = [path for path in by_path if by_path[path] not in chosen and path not in {"README.md", ".gitattributes"}]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        say(f"not of the train split, so not read: {', '.join(others[:5])}{more}")
    _check_shards([file.path for file in chosen if file.local is not None])
    return chosen


def _check_shards(paths: list[str]) -> None:
    """Raise ValueError if of files numbered ``-00000-of-00003`` one is missing: a cache may hold a part of them."""
    found = [re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})(\D.*)", path) for path in paths]
    shards = Counter((match[1], int(match[3]), match[4]) for match in found if match)
    for (before, total, after), count in shards.items():
        if count != total:
            raise ValueError(
                f"{count} of {total} shards {before}NNNNN-of-{total:05}{after} are there: download it again"
            )
