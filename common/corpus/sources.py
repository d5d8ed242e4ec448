"""What the user gave -> a source: files of documents, a token store, or a data set on a hub."""

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from common.console import InputError, say
from common.corpus.formats import format_of, known_formats

PAIRS = ((".bin", ".idx"), ("_ids.npy", "_idx.npz"))  # tokens and their index, new and legacy
BESIDE_PAIR = (".json", ".near_duplicates.jsonl")  # what we write beside a token store
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:.+)?")
# No documents, though of a known format: what lies in a folder with data sets, models and tokenizers.
METADATA = {
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "configuration.json"),
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "readme.txt", "license.txt", "requirements.txt"),
}
# Marks a folder as a cache. Source: https://bford.info/cachedir/
CACHE_TAG, CACHE_SIGNATURE = "CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n"
FILES_LISTED = 8  # in a fingerprint; more files are hashed, so that it stays small
NAMES_SHOWN = 10


@dataclass(frozen=True)
class Source:
    """Where documents or tokens come from.

    Attributes:
        given: what the user wrote.
        name: short, fit for a file name, and different from that of every other source resolved with it.
        files: the documents' files, or those of the token store, in order.
        hub_id: the data set's id, or None.
        token_store: a prefix or a folder, as ``TokenStore`` takes it, or None.
    """

    given: str
    name: str
    files: tuple[Path, ...] = ()
    hub_id: str | None = None
    token_store: str | None = None

    @property
    def size_bytes(self) -> int:
        """Size of the files on disk; 0 for a data set on a hub."""
        return sum(path.stat().st_size for path in self.files)

    def fingerprint(self) -> dict:
        """Identify the content as far as can be seen without reading it, as JSON types.

        That is the name (from the folder they share on), size and time of change of every file, or the hub id. Where
        the files lie does not matter; a file that is added, removed, renamed or changed does.
        """
        if self.hub_id is not None:
            return {"hub_id": self.hub_id}
        folder = os.path.commonpath([path.absolute().parent for path in self.files])
        files = [
            {"file": Path(os.path.relpath(path, folder)).as_posix(), "bytes": s.st_size, "modified_ns": s.st_mtime_ns}
            for path, s in ((path, path.stat()) for path in self.files)
        ]
        if len(files) <= FILES_LISTED:
            return {"files": files}
        digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        return {"files": len(files), "bytes": self.size_bytes, "sha256": digest}


def resolve_sources(given: list[str]) -> list[Source]:
    """Resolve every one of ``given``; see ``resolve_source``.

    Raises:
        InputError: a file or a data set is there twice, within a source or in two: its documents would count twice.
    """
    sources, names, seen = [], set(), {}
    for each in given:
        source = resolve_source(each)
        for path in source.files:
            _refuse_second(seen, _identity(path), str(path))
        if source.hub_id is not None:
            _refuse_second(seen, source.hub_id, each)
        name, number = source.name, 2
        while name.casefold() in names:
            name, number = f"{source.name}-{number}", number + 1
        names.add(name.casefold())
        sources.append(replace(source, name=name))
    return sources


def resolve_source(given: str) -> Source:
    """Find out what ``given`` is: a file, a folder, a glob, a token store, or a data set id of a hub.

    Of a folder, all files of a known format are taken, its folders' too; left out without a word are hidden files and
    folders and what lies in a cache (CACHE_TAG), and with a note files of other formats. A folder with token files
    right in it is a token store. A glob takes the files that it matches (``**`` matches folders of any depth).

    Raises:
        InputError: no such file, an unknown format, a folder or glob without a file of a known one, a folder that holds
            token files and documents.
    """
    if not given.strip():
        raise InputError(f"{given!r}: an empty name. Give a file, a folder, a glob or a hub id like owner/name.")
    path = Path(given).expanduser()
    prefix = _prefix_of_pair(str(path))
    if prefix == str(path) and path.exists():
        raise InputError(f"{given}: is there, and so is a token store {prefix}.bin. Name one of the store's files.")
    if prefix is not None:
        suffixes = next((pair for pair in PAIRS if Path(prefix + pair[0]).exists()), PAIRS[0])
        files = tuple(file for file in map(Path, (prefix + suffix for suffix in suffixes)) if file.exists())
        return Source(given, _short_name(Path(prefix).name), files, token_store=prefix)
    if path.is_dir():
        return _folder_source(given, path)
    if path.exists():
        if format_of(path.name) is None:
            raise InputError(f"{given}: unknown format. Known are {known_formats()}.")
        return Source(given, _short_name(_stem(path)), (path,))
    if glob.has_magic(given):
        matches = [match for match in map(Path, set(glob.glob(str(path), recursive=True))) if match.is_file()]
        if not matches:
            raise InputError(f"{given}: matches no file.")
        fixed = [part for part in path.parent.parts if not glob.has_magic(part)]
        return Source(given, _short_name(fixed[-1] if fixed else path.name), _documents_of(given, matches))
    if HUB_ID.fullmatch(given) and format_of(given.split(":")[0]) is None:
        return Source(given, _short_name(given), hub_id=given)
    raise InputError(f"{given}: no such file. Give an existing file, folder or glob, or a hub id like owner/name.")


def mark_as_cache(folder: Path) -> Path:
    """Make ``folder``, if need be, and mark it as a cache, which nobody takes for documents."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CACHE_TAG).write_text(CACHE_SIGNATURE, encoding="ascii")
    return folder


def _prefix_of_pair(path: str) -> str | None:
    """Return the prefix of the token store that ``path`` names, by one of its files or by the prefix itself."""
    for suffixes in PAIRS:
        for suffix in suffixes:
            if path.endswith(suffix):
                if not Path(path).exists():
                    raise InputError(f"{path}: no such file.")
                return path.removesuffix(suffix)
        if all(Path(path + suffix).exists() for suffix in suffixes):
            return path
    return None


def _folder_source(given: str, folder: Path) -> Source:
    name, files = _short_name(folder.resolve().name), list(_files_below(folder))
    tokens = tuple(path for path in files if path.parent == folder and _is_of_pair(path))
    if not tokens:
        return Source(given, name, _documents_of(given, files))
    documents = [path for path in files if format_of(path.name) and not _is_beside_pair(path)]
    if documents:
        raise InputError(f"{given}: holds token files and documents ({_some(documents)}). Give one or the other.")
    return Source(given, name, tokens, token_store=str(folder))


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below ``folder`` that are not hidden, through links to folders too, each folder once."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        identity = _identity(parent)
        if identity in seen or (CACHE_TAG in files and Path(parent) != folder):
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from sorted(Path(parent, name) for name in files if not name.startswith("."))


def _refuse_folder(error: OSError) -> None:
    raise InputError(f"{error.filename}: the folder cannot be read ({error.strerror}).")


def _is_of_pair(path: Path) -> bool:
    return path.name.endswith(sum(PAIRS, ())) and ".partial" not in path.name  # a .partial is being written


def _is_beside_pair(path: Path) -> bool:
    """Whether this is the sidecar or the report that we write beside a token store."""
    prefix = next((str(path).removesuffix(end) for end in BESIDE_PAIR if path.name.endswith(end)), None)
    return prefix is not None and any(Path(prefix + suffixes[0]).exists() for suffixes in PAIRS)


def _documents_of(given: str, files: list[Path]) -> tuple[Path, ...]:
    """Return the files of a known format, sorted; say which others there are."""
    files = [path for path in files if not _is_beside_pair(path)]
    known = sorted(
        (path for path in files if format_of(path.name) and path.name.lower() not in METADATA), key=Path.as_posix
    )
    others = sorted(set(files) - set(known))
    if not known:
        found = f" (but {_some(others)})" if others else ""
        raise InputError(f"{given}: no file of a known format in it{found}. Known are {known_formats()}.")
    if others:
        say(f"note: {given}: {len(others):,} other files are not read: {_some(others)}")
    formats = Counter(format_of(path.name) for path in known)
    if len(formats) > 1:
        say(f"note: {given}: reads {', '.join(f'{count:,} {kind}' for kind, count in formats.most_common())} files")
    seen = {}
    for path in known:
        _refuse_second(seen, _identity(path), str(path))
    return tuple(known)


def _identity(path: str | Path) -> object:
    """Return what is the same for all names and links of a file or folder."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise InputError(f"{path}: is a link to a file that is not there.") from None
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _refuse_second(seen: dict, identity: object, what: str) -> None:
    if identity in seen:
        also = f" (as {seen[identity]})" if seen[identity] != what else ""
        raise InputError(f"{what}: is given twice{also}. Its documents would count twice; leave one out.")
    seen[identity] = what


def _stem(path: Path) -> str:
    """Return the name of a file without the suffixes of its format and compression."""
    stem = path.name[: path.name.lower().rindex(format_of(path.name))]
    return stem or path.name


def _short_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)[:60].strip(".-") or "source"


def _some(paths: list[Path]) -> str:
    more = f" and {len(paths) - NAMES_SHOWN:,} more" if len(paths) > NAMES_SHOWN else ""
    return ", ".join(str(path) for path in paths[:NAMES_SHOWN]) + more
