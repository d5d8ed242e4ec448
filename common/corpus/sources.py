"""What the user gave -> a source: files of documents, a token store, or a data set on a hub."""

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from common.console import InputError, say
from common.corpus.corpora import CORPORA
from common.corpus.formats import (
    ARCHIVES,
    COLUMN_FORMATS,
    format_by_content,
    format_of,
    known_encoding,
    known_formats,
    refuse_pointers,
)
from common.hub import DATA_SET_ID

# The suffixes of a token store's two files, tokens and index: Megatron's, and the older pair of PaddleNLP's GPT.
PAIRS = ((".bin", ".idx"), ("_ids.npy", "_idx.npz"))
PAIR_SUFFIXES = tuple(suffix for pair in PAIRS for suffix in pair)
BESIDE_PAIR = (".json", ".near_duplicates.jsonl")  # what we write beside a token store
# These have a known format but are not documents: they lie in the folders of data sets, models and tokenizers.
METADATA = {
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "configuration.json"),
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "readme.txt", "license.txt", "requirements.txt"),
}
# A file of this name and content marks a folder as a cache. Source: https://bford.info/cachedir/
CACHE_TAG = "CACHEDIR.TAG"
CACHE_SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55\n"
# What datasets.save_to_disk writes beside its .arrow files; and into the folder of several splits.
STATE_OF_SAVED = "state.json"
SPLITS_OF_SAVED = "dataset_dict.json"
BOOKS = (".doc", ".docx", ".epub", ".htm", ".html", ".md", ".mobi", ".odt", ".pdf", ".rtf")  # texts with a layout
PACKED = (".7z", ".rar", ".zip")
FILES_LISTED = 8  # in a fingerprint; a longer list is hashed, so that the fingerprint stays small
NAMES_SHOWN = 10


@dataclass(frozen=True)
class Source:
    """Where documents or tokens come from.

    Attributes:
        given: what the user wrote.
        name: short, fit for a file name, and different from the names of all sources resolved with it.
        files: the files of documents, or of the token store, in order.
        hub_id: the data set's id, or None.
        token_store: a prefix or a folder, as ``TokenStore`` takes it, or None.
        encoding: of the text files, as ``known_encoding`` returns it; None for UTF-8.
        whole_texts: each of the .txt files is one document; otherwise blank lines separate the documents.
        cached_files: (path, bytes) of the files that are read from a hub's cache, because no hub answers.
        notes: on what is not read of it, for ``resolve_source`` to print.
        said: what was printed of it; a source is read twice if a tokenizer is trained on it.
    """

    given: str
    name: str
    files: tuple[Path, ...] = ()
    hub_id: str | None = None
    token_store: str | None = None
    encoding: str | None = None
    whole_texts: bool = False
    cached_files: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)
    said: set[str] = field(default_factory=set, compare=False, repr=False)

    def say_once(self, message: str) -> None:
        """Print what was not printed of this source before."""
        if message not in self.said:
            self.said.add(message)
            say(message)

    @property
    def texts(self) -> list[Path]:
        """The .txt files."""
        return [path for path in self.files if format_of(path.name) == ".txt"]

    @property
    def text_rule(self) -> str:
        """How .txt files become documents."""
        return "each file is one document" if self.whole_texts else "blank lines separate documents"

    @property
    def size_bytes(self) -> int:
        """Size of the files on disk; 0 for a data set on a hub."""
        return sum(path.stat().st_size for path in self.files)

    def fingerprint(self) -> dict:
        """Identify the content, as JSON types, without reading it.

        For files this is the name (relative to the folder that they share), the size and the modification time of each;
        for a data set it is the hub id, and the files of a cache that may be incomplete. It does not change when the
        folder is moved. It changes when a file is added, removed, renamed or modified. The rules by which some formats
        are read are part of it, too.
        """
        rules = {} if self.encoding is None else {"encoding": self.encoding}
        if self.hub_id is not None and self.cached_files:
            rules["cached_files"] = [list(file) for file in self.cached_files]
        if self.hub_id is not None:
            return {"hub_id": self.hub_id} | rules
        folder = os.path.commonpath([path.absolute().parent for path in self.files])
        files = []
        for path in self.files:
            status = path.stat()
            name = Path(os.path.relpath(path, folder)).as_posix()
            files.append({"file": name, "bytes": status.st_size, "modified_ns": status.st_mtime_ns})
        if self.texts:
            rules["txt"] = self.text_rule
        if any(format_of(path.name) == ".tsv" for path in self.files):
            rules["tsv"] = "no quoting"
        if len(files) <= FILES_LISTED:
            return {"files": files} | rules
        digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        return {"files": len(files), "bytes": self.size_bytes, "sha256": digest} | rules


def resolve_sources(given: list[str], encoding: str | None = None) -> list[Source]:
    """Resolve each of ``given`` as ``resolve_source`` does, and give every source a name of its own.

    Args:
        encoding: of all text files (--encoding); None for UTF-8.

    Raises:
        InputError: a file or data set occurs twice, in one source or in two, so its documents would count twice.
    """
    sources = []
    names = set()
    seen = {}
    for each in given:
        source = resolve_source(each, encoding)
        for path in source.files:
            _refuse_second(seen, _identity(path), str(path))
        if source.hub_id is not None:
            _refuse_second(seen, source.hub_id, each)
        name = source.name
        number = 2
        while name.casefold() in names:
            name = f"{source.name}-{number}"
            number += 1
        names.add(name.casefold())
        sources.append(replace(source, name=name))
    if sources and encoding is not None and not any(map(_may_have_text_files, sources)):
        raise InputError(f"--encoding {encoding}: it would be ignored, because there are no text files in {given}.")
    return sources


def resolve_source(given: str, encoding: str | None = None) -> Source:
    """Decide what ``given`` is: a file, a folder, a glob, a token store, a data set id, or a name of CORPORA.

    From a folder and its subfolders, all files of a known format are taken; the content decides the format of a file
    without a suffix. Files of other formats are left out, and a note names them. Hidden files, hidden folders and
    caches (CACHE_TAG) are left out without a note, unless documents lie directly in a cache. A folder with token files
    directly in it is a token store. From a folder that ``datasets.save_to_disk`` wrote, the data files that it lists
    are taken, and of several splits "train". A glob takes the files that it matches (``**`` matches folders of any
    depth).

    Several .txt files in a source are one document each. In a single one, blank lines separate the documents. A note
    says which it is.

    Raises:
        InputError: there is no such file; the format is unknown; a folder or glob has no file of a known format; a
            folder holds both token files and documents; a file is a pointer of Git LFS, and not the data.
    """
    source = find_source(given)
    for note in source.notes:
        source.say_once(note)
    if given in CORPORA and source.hub_id is None:
        say(f"note: {given}: read from the file or folder of this name here, not from the corpus that has this name")
    refuse_pointers(source.files)
    if source.token_store is not None:
        return source
    source = replace(source, encoding=known_encoding(encoding), whole_texts=len(source.texts) > 1)
    if source.texts:
        say(f"note: {given}: .txt files: {len(source.texts):,}; {source.text_rule}")
    return source


def find_source(given: str) -> Source:
    """Return what ``resolve_source`` does, without the encoding; print nothing: the notes are in the source."""
    if not given.strip():
        raise InputError(f"{given!r}: an empty name. Give a file, a folder, a glob or a hub id like owner/name.")
    path = Path(given).expanduser()
    prefix = _prefix_of_pair(str(path))
    if prefix == str(path) and path.exists():
        raise InputError(f"{given}: exists, and so does a token store {prefix}.bin. Name one of the store's files.")
    if prefix is not None:
        suffixes = next((pair for pair in PAIRS if Path(prefix + pair[0]).exists()), PAIRS[0])
        files = tuple(Path(prefix + suffix) for suffix in suffixes if Path(prefix + suffix).exists())
        return Source(given, _short_name(Path(prefix).name), files, token_store=prefix)
    if path.is_dir():
        return _folder_source(given, path)
    if path.exists():
        refuse_pointers([path])
        if format_of(path.name) is None and format_by_content(path.name, partial(path.open, "rb")) is None:
            raise InputError(f"{given}: unknown format. Known are {known_formats()}.{way_to_text(path)}")
        return Source(given, _short_name(_stem(path)), (path,))
    if glob.has_magic(given):
        matches = [Path(match) for match in set(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
        if not matches:
            raise InputError(f"{given}: matches no file.")
        fixed = [part for part in path.parent.parts if not glob.has_magic(part)]
        files, notes = _documents_of(given, matches)
        return Source(given, _short_name(fixed[-1] if fixed else path.name), files, notes=notes)
    if given in CORPORA:
        return _named_corpus(given)
    if DATA_SET_ID.fullmatch(given) and format_of(given.split(":")[0]) is None:
        return Source(given, _short_name(given), hub_id=given)
    raise InputError(
        f"{given}: no such file. Give an existing file, folder or glob, a hub id like owner/name, or one of "
        f"{', '.join(CORPORA)} (python data/prepare.py corpora says what they are)."
    )


def _named_corpus(name: str) -> Source:
    """Return the source that streams a corpus of CORPORA, with a note on what it is and its licence."""
    corpus = CORPORA[name]
    if corpus.urls or corpus.identifier.endswith(ARCHIVES):
        what = "an archive" if corpus.identifier else "a token store at plain URLs"
        raise InputError(
            f"{name}: is {what}, which cannot be streamed. Download it first, and give its files with --data: "
            f"python data/prepare.py download {name} --output data"
        )
    licence = f"{name}: {corpus.about}. Licence: {corpus.licence}."
    return Source(name, _short_name(name), hub_id=corpus.identifier, notes=(licence,))


def _may_have_text_files(source: Source) -> bool:
    formats = (format_of(path.name) for path in source.files)
    return source.hub_id is not None or (source.token_store is None and not set(COLUMN_FORMATS).issuperset(formats))


def mark_as_cache(folder: Path) -> Path:
    """Make ``folder`` if it does not exist, and mark it as a cache, which is never read as documents; return it."""
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
    name = _short_name(folder.resolve().name)
    if (folder / SPLITS_OF_SAVED).is_file() or (folder / STATE_OF_SAVED).is_file():
        files, notes = _saved_files(given, folder)
        return Source(given, name, files, notes=notes)
    in_caches = []
    files = list(_files_below(folder, in_caches))
    tokens = tuple(path for path in files if path.parent == folder and _is_of_pair(path))
    if not tokens:
        known, notes = _documents_of(given, files)
        return Source(given, name, known, notes=(*in_caches, *notes))
    documents = [path for path in files if format_of(path.name) and not _is_beside_pair(path)]
    if documents:
        raise InputError(f"{given}: holds token files and documents ({_some(documents)}). Give one or the other.")
    return Source(given, name, tokens, token_store=str(folder), notes=tuple(in_caches))


def _saved_files(given: str, folder: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Return the data files of a folder that ``datasets.save_to_disk`` wrote; of several splits, those of "train".

    Second, a note on the other splits. The folder may hold other .arrow files, such as the results of ``map``, which
    are not listed.
    """
    splits, notes = _saved_list(folder / SPLITS_OF_SAVED, "splits"), ()
    if splits:
        if "train" not in splits:
            raise InputError(f"{given}: has no split 'train', only {splits}. Give one of its folders.")
        others = [split for split in splits if split != "train"]
        if others:
            notes = (f"note: {given}: not in the split 'train', so not read: {', '.join(others)}",)
        folder = folder / "train"
    names = [entry.get("filename") for entry in _saved_list(folder / STATE_OF_SAVED, "_data_files", dict)]
    files = tuple(folder / Path(str(name)).name for name in names)
    missing = [path for path in files if not path.is_file()]
    if missing or not files:
        what = f"{_some(missing)} are missing" if missing else f"{folder / STATE_OF_SAVED} lists no data files"
        raise InputError(f"{given}: not a whole data set of save_to_disk: {what}. Save or fetch it again.")
    return files, notes


def _saved_list(path: Path, key: str, kind: type = str) -> list:
    """Return the list ``key`` of a JSON file of ``datasets``; [] if there is no such file or list."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}). Save or fetch the data set again.") from None
    entries = found.get(key) if isinstance(found, dict) else None
    return [entry for entry in entries if isinstance(entry, kind)] if isinstance(entries, list) else []


def _files_below(folder: Path, notes: list[str]) -> Iterator[Path]:
    """Yield the files below ``folder`` that are not hidden. Links to folders are followed, each folder once.

    Add to ``notes`` which documents lie in a cache, and so are not read.
    """
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        identity = _identity(parent)
        is_cache = CACHE_TAG in files and Path(parent) != folder
        if is_cache and identity not in seen:
            notes += _documents_in_cache([Path(parent, name) for name in files])
        if identity in seen or is_cache:
            folders.clear()  # os.walk goes into what is left in this list
            continue
        seen.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from sorted(Path(parent, name) for name in files if not name.startswith("."))


def _documents_in_cache(files: list[Path]) -> list[str]:
    """Return a note on the documents among ``files`` of a cache; [] if there are none."""
    documents = [path for path in sorted(files) if _is_document(path) and not _is_beside_pair(path)]
    marked = f"is marked as a cache by {CACHE_TAG}, so its files are not read"
    return [f"note: {documents[0].parent}: {marked}: {_some(documents)}"] if documents else []


def _is_document(path: Path) -> bool:
    return _known_format(path) is not None and path.name.lower() not in METADATA


def _refuse_folder(error: OSError) -> None:
    raise InputError(f"{error.filename}: the folder cannot be read ({error.strerror}).")


def _is_of_pair(path: Path) -> bool:
    return path.name.endswith(PAIR_SUFFIXES) and ".partial" not in path.name  # a .partial is being written


def _is_beside_pair(path: Path) -> bool:
    """Whether ``path`` is the sidecar or the report that we write beside a token store."""
    for ending in BESIDE_PAIR:
        if path.name.endswith(ending):
            prefix = str(path).removesuffix(ending)
            return any(Path(prefix + suffixes[0]).exists() for suffixes in PAIRS)
    return False


def way_to_text(path: Path) -> str:
    """Return, as a sentence, how a file of another kind becomes one that is known; "" if it is of none of these."""
    if path.suffix.lower() in BOOKS:
        return " Save its text as a .txt file."
    return " Unpack it, and give the folder." if path.suffix.lower() in PACKED else ""


def _documents_of(given: str, files: list[Path]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Return the files of a known format, sorted; and notes on the other files and on several formats."""
    files = [path for path in files if not _is_beside_pair(path)]
    known = [path for path in files if _is_document(path)]
    known.sort(key=Path.as_posix)
    others = sorted(set(files) - set(known))
    if not known:
        found = f" (but {_some(others)})" if others else ""
        raise InputError(f"{given}: no file of a known format in it{found}. Known are {known_formats()}.")
    notes = [f"note: {given}: {len(others):,} other files are not read: {_some(others)}"] if others else []
    saved = [path for path in known if format_of(path.name) == ".arrow" and (path.parent / STATE_OF_SAVED).exists()]
    if saved and not glob.has_magic(given):
        raise InputError(f"{given}: {saved[0].parent} in it is a data set of save_to_disk. Give that folder by itself.")
    formats = Counter(map(_known_format, known))
    if len(formats) > 1:
        counted = ", ".join(f"{count:,} {kind}" for kind, count in formats.most_common())
        notes.append(f"note: {given}: reads {counted} files")
    seen = {}
    for path in known:
        _refuse_second(seen, _identity(path), str(path))
    return tuple(known), tuple(notes)


def _known_format(path: Path) -> str | None:
    """Return the format of a file, which its content decides if it has no suffix; None if it is unknown."""
    if path.suffix:
        return format_of(path.name)
    return format_by_content(path.name, partial(path.open, "rb"))


def _identity(path: str | Path) -> object:
    """Return a value that is the same for all names and links of one file or folder."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise InputError(f"{path}: is a link to a file that does not exist.") from None
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _refuse_second(seen: dict, identity: object, what: str) -> None:
    if identity in seen:
        also = f" (as {seen[identity]})" if seen[identity] != what else ""
        raise InputError(f"{what}: is given twice{also}. Its documents would count twice; leave one out.")
    seen[identity] = what


def _stem(path: Path) -> str:
    """Return the name of a file without the suffixes of its format and compression."""
    kind = format_of(path.name)
    stem = path.stem if kind is None else path.name[: path.name.lower().rindex(kind)]
    return stem or path.name


def _short_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)[:60].strip(".-") or "source"


def _some(paths: list[Path]) -> str:
    more = f" and {len(paths) - NAMES_SHOWN:,} more" if len(paths) > NAMES_SHOWN else ""
    return ", ".join(str(path) for path in paths[:NAMES_SHOWN]) + more
