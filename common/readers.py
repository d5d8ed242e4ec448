"""A file -> its records, streamed: memory does not grow with the file.

Every reader yields (where, record) pairs: ``where`` names the file and the line, item or row for an error message;
``record`` is a dict in a good file, a ValueError in the place of a record that cannot be read while the ones behind it
can. What ends a file for good (it is cut off, its syntax is broken) is an InputError.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from itertools import chain
from typing import BinaryIO

from common.files import (
    DAMAGE,
    LARGEST_DOCUMENT_BYTES,
    TABLE_DELIMITERS,
    format_of,
    known_formats,
    not_utf8,
    open_decompressed,
)
from common.json_scanner import JsonScanner
from common.messages import InputError, say
from common.tables import parquet_records, table_records

# The field of a document's text, by the names that are usual in published corpora.
TEXT_FIELDS = ("text", "content", "contents", "raw_content", "body", "document", "article", "story", "passage")

Records = Iterator[tuple[str, object]]


def file_records(name: str, open_raw: Callable[[], BinaryIO], fields: list[str] | None = None) -> Records:
    """Yield (where, record) of every record of a file, in order; ``name`` says by its suffixes how it is read.

    A ``.txt`` file holds documents separated by blank lines, each a record with the one field "text". JSON is an array,
    one object a line, or (``.json`` only) one object that holds the records in an array, such as {"data": [...]}.

    Args:
        open_raw: opens the file for reading bytes; seekable for ``.parquet``. May be called twice.
        fields: those that are needed; None for all. A table without one of them is an InputError at once.

    Raises:
        InputError: an unknown format; a damaged or cut-off file; broken syntax that hides where the next record is.
    """
    kind = format_of(name)
    if kind is None:
        raise InputError(f"{name}: unknown format. Known are {known_formats()}.")
    if kind == ".parquet":
        yield from parquet_records(name, open_raw, fields)
        return
    try:
        with open_decompressed(name, open_raw) as stream:
            if kind in TABLE_DELIMITERS:
                yield from table_records(name, stream, TABLE_DELIMITERS[kind], fields)
            elif kind == ".txt":
                yield from _paragraph_records(name, stream)
            elif stream.peek().lstrip().startswith(b"["):
                yield from _array_records(name, stream)
            elif kind == ".json" and _is_one_object(name, open_raw, fields or TEXT_FIELDS):
                yield from _object_records(name, stream)
            else:
                yield from _line_records(name, stream)
    except DAMAGE as error:
        raise InputError(f"{name}: damaged or cut off, it cannot be read to its end ({error}).") from None


def _is_one_object(name: str, open_raw: Callable[[], BinaryIO], fields: Iterable[str]) -> bool:
    """Whether the first object is no record itself, but holds records that have one of ``fields`` in an array."""
    wanted = {field.split(".")[0] for field in fields}
    with open_decompressed(name, open_raw) as stream:
        scanner = JsonScanner(stream, LARGEST_DOCUMENT_BYTES)
        try:
            for field in scanner.names():
                if field in wanted:
                    return False
                items = scanner.items() if scanner.peek() == "[" else iter([scanner.value()])
                for number, item in enumerate(items):
                    if number == 0 and isinstance(item, dict) and wanted & set(item):
                        return True
        except ValueError:
            pass  # it is malformed, which is said when it is read
    return False


def _lines(name: str, stream: BufferedReader) -> Iterator[bytes]:
    while line := stream.readline(LARGEST_DOCUMENT_BYTES + 1):
        if len(line) > LARGEST_DOCUMENT_BYTES:
            raise InputError(f"{name}: a line of more than {LARGEST_DOCUMENT_BYTES:,} bytes. Put one document a line.")
        yield line


def _line_records(name: str, stream: BufferedReader) -> Records:
    for number, line in enumerate(_lines(name, stream), start=1):
        if line.strip():
            try:
                record = json.loads(line.decode())
            except UnicodeDecodeError as error:
                record = not_utf8(error)
            except (ValueError, RecursionError) as error:
                record = ValueError(f"malformed line ({error})")
            yield f"{name}, line {number}", record


def _paragraph_records(name: str, stream: BufferedReader) -> Records:
    lines, size = [], 0
    for number, line in enumerate(chain(_lines(name, stream), [b""]), start=1):
        if line.strip():
            lines.append(line)
            size += len(line)
            if size > LARGEST_DOCUMENT_BYTES:
                raise InputError(
                    f"{name}, line {number - len(lines) + 1}: no blank line in {size:,} bytes. Documents of a .txt "
                    "file are separated by blank lines; put them in, or give a .jsonl file with one document a line."
                )
        elif lines:
            try:
                record = {"text": b"".join(lines).decode().replace("\r\n", "\n").removesuffix("\n")}
            except UnicodeDecodeError as error:
                record = not_utf8(error)
            yield f"{name}, line {number - len(lines)}", record
            lines, size = [], 0


def _array_records(name: str, stream: BufferedReader) -> Records:
    number = 0
    try:
        scanner = JsonScanner(stream, LARGEST_DOCUMENT_BYTES)
        for number, record in enumerate(scanner.items(), start=1):
            yield f"{name}, item {number}", record
        if scanner.peek():
            raise ValueError("something follows its end")
    except ValueError as error:  # what follows cannot be found again, so this is never skipped
        raise InputError(f"{name}: the array is malformed after item {number} ({error}). Repair the file.") from None


def _object_records(name: str, stream: BufferedReader) -> Records:
    """The documents are the items of the one array of objects in the file's one object."""
    scanner, found, others, number = JsonScanner(stream, LARGEST_DOCUMENT_BYTES), None, [], 0
    try:
        for field in scanner.names():
            if scanner.peek() != "[":
                others.append(field)
                scanner.value()
                continue
            items = scanner.items()
            first = next(items, None)
            if not isinstance(first, dict):
                others.append(field)
                deque(items, maxlen=0)
                continue
            if found is not None:
                raise ValueError(f"the documents may be in {found!r} or in {field!r}")
            found = field
            for number, record in enumerate(chain([first], items), start=1):
                yield f"{name}, item {number} of {field!r}", record
        if found is None or scanner.peek():
            raise ValueError("no array of objects in it" if found is None else "something follows its end")
    except ValueError as error:
        raise InputError(
            f"{name}: is read as one object that holds the documents in an array, and {error}, after item {number}. If "
            "it holds one document a line, call it .jsonl; otherwise make it an array."
        ) from None
    say(f"{name}: the documents are in {found!r}" + (f"; not read are {', '.join(others)}" if others else ""))
