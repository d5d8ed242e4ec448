"""Sources -> documents: json, jsonl (plain, .gz, .zst, .bz2, .xz), txt, parquet, or a Hugging Face data set id.

Everything is streamed: memory does not grow with the file. JSON and text are read here, because an error has to
name its line, a large array has to stay out of memory, and a compressed file that is cut off has to be noticed;
everything else goes through ``datasets`` in streaming.
"""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from common.hub import check_hugging_face_answers, three_ways_on
from common.messages import InputError

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSIONS = {*OPENERS, ".zst"}
FORMATS = {".json", ".jsonl", ".ndjson", ".txt", ".parquet"}
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error)  # what these raise on a damaged file
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # as Windows editors write it


@dataclass
class CorpusCounts:
    """What a pass over a source met. ``documents`` are those handed out; ``text_bytes`` is their UTF-8 size."""

    documents: int = 0
    text_bytes: int = 0
    empty: int = 0
    malformed: int = 0


def read_documents(source: str, text_field: str, skip_malformed: bool, counts: CorpusCounts) -> Iterator[str]:
    """Yield the text of every document of ``source``, counting into ``counts`` as it goes.

    Dropped, and counted: documents of white space only (``empty``) and, with ``skip_malformed``, those that cannot be
    read (``malformed``).

    Raises:
        InputError: a missing or empty file, an unknown format, a malformed document (file and line), a missing
            text field (naming the fields there are), no document at all.
    """
    for where, record in _records(source):
        try:
            text = _text_of(record, text_field)
        except ValueError as error:
            if not skip_malformed:
                raise InputError(
                    f"{where}: {error}. Nothing was trained. Repair it, or count and skip such documents "
                    "with --skip_malformed."
                ) from None
            counts.malformed += 1
            continue
        if not text.strip():
            counts.empty += 1
            continue
        counts.documents += 1
        counts.text_bytes += len(text.encode())
        yield text
    if counts.documents == 0:
        raise InputError(f"{source}: no document in it ({asdict(counts)}).")


def source_fingerprint(source: str) -> dict:
    """Identify ``source`` as far as can be seen without reading it: name, size and modification time, or hub id."""
    path = Path(source)
    if not path.exists():
        return {"hub_id": source}
    status = path.stat()
    return {"file": path.name, "bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def _text_of(record, text_field: str) -> str:
    """Return the text of a record; raise ValueError saying what is wrong with it."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with a field {text_field!r}, found {type(record).__name__}")
    if text_field not in record:
        raise ValueError(f"no field {text_field!r}; the fields are {sorted(record)} (choose one with --text_field)")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} holds {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which no tokenizer takes
        raise ValueError(f"field {text_field!r} is not valid Unicode ({error.reason})") from None
    return text


def _records(source: str) -> Iterator[tuple[str, object]]:
    """Yield (where, record) pairs; a record that cannot be parsed is a ValueError in its place."""
    path = Path(source)
    if not path.exists():
        if path.suffix in FORMATS | COMPRESSIONS or source.startswith((".", "/")) or source.count("/") != 1:
            raise InputError(f"{source}: no such file. Give --data a file that exists, or a hub id like owner/name.")
        check_hugging_face_answers(source)
        yield from _dataset_records(source, source)
        return
    if path.is_dir():
        raise InputError(f"{source}: is a folder. Give --data one file.")
    if path.stat().st_size == 0:
        raise InputError(f"{source}: the file is empty.")
    kind = path.suffixes[-2] if path.suffix in COMPRESSIONS and len(path.suffixes) > 1 else path.suffix
    if kind in {".json", ".jsonl", ".ndjson"}:
        yield from _json_records(path)
    elif kind == ".txt":
        yield from _stream_records(path, _paragraph_records)
    elif kind == ".parquet":
        yield from _dataset_records(source, "parquet", data_files=source)
    else:
        raise InputError(
            f"{source}: unknown format {kind!r}. Known are .parquet, and .json, .jsonl and .txt, "
            f"also with one of {' '.join(sorted(COMPRESSIONS))} behind it."
        )


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".zst":
        import pyarrow  # zstandard's own reader takes a file that is cut off for a shorter one

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20)
    return OPENERS.get(path.suffix, open)(path, "rb")


def _json_records(path: Path) -> Iterator[tuple[str, object]]:
    """A file that starts with '[' is one array; anything else is one JSON object a line."""
    with _open(path) as stream:
        head = b""
        try:
            while not head.strip(b" \t\r\n" + BYTE_ORDER_MARK):
                chunk = stream.read(1)
                if not chunk:
                    raise InputError(f"{path}: nothing but white space in it.")
                head += chunk
        except DAMAGE as error:
            raise InputError(f"{path}: cannot be read ({error}).") from None
    yield from _stream_records(path, _array_records if head.endswith(b"[") else _line_records)


def _stream_records(path: Path, reader: Callable) -> Iterator[tuple[str, object]]:
    """Yield what ``reader`` finds in the decompressed bytes of ``path``, less a byte order mark."""
    try:
        with _open(path) as stream:
            if stream.peek(3).startswith(BYTE_ORDER_MARK):
                stream.read(3)
            yield from reader(path, stream)
    except DAMAGE as error:
        raise InputError(f"{path}: damaged or cut off ({error}). Fetch it again.") from None


def _line_records(path: Path, stream) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
            record = ValueError(f"malformed line ({error})")
        yield f"{path}, line {number}", record


def _paragraph_records(path: Path, stream) -> Iterator[tuple[str, object]]:
    """Documents are separated by blank lines."""
    for blank, numbered in groupby(enumerate(stream, start=1), lambda numbered: not numbered[1].strip()):
        if blank:
            continue
        numbers, lines = zip(*numbered, strict=True)
        try:
            record = {"text": b"".join(lines).decode().replace("\r\n", "\n").removesuffix("\n")}
        except UnicodeDecodeError as error:
            record = error
        yield f"{path}, line {numbers[0]}", record


def _array_records(path: Path, stream) -> Iterator[tuple[str, object]]:
    import ijson

    number = 0
    try:
        for number, record in enumerate(ijson.items(stream, "item"), start=1):
            yield f"{path}, item {number}", record
    except (ijson.JSONError, UnicodeDecodeError) as error:
        # What follows a syntax error in an array cannot be found again, so this is never skipped.
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: the array is malformed after item {number} ({reason}). Repair the file.") from None


def _dataset_records(source: str, *args, **kwargs) -> Iterator[tuple[str, object]]:
    """Stream through ``datasets``."""
    import datasets

    try:
        dataset = datasets.load_dataset(*args, split="train", streaming=True, **kwargs)
        for number, record in enumerate(dataset, start=1):
            yield f"{source}, document {number}", record
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        if Path(source).exists():
            raise InputError(f"{source}: cannot be read ({error}).") from None
        raise InputError(f"data set {source!r} cannot be streamed ({error}).\n{three_ways_on('--data')}") from None
