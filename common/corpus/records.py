"""A file -> its records, streamed: memory does not grow with the size of the file.

Every reader yields (where, record) pairs. ``where`` names the file and the line, item or row, for error messages.
``record`` is a dict. If a record cannot be read but the records after it can, it is a ValueError instead. If nothing
after an error can be read (the file is cut off, its syntax is broken), InputError is raised.
"""

import codecs
import csv
import io
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from itertools import chain
from typing import BinaryIO

from common.console import InputError, say
from common.corpus.formats import (
    DAMAGE,
    LARGEST_DOCUMENT_BYTES,
    TABLE_DELIMITERS,
    format_of,
    known_formats,
    not_utf8,
    open_decompressed,
)

# The names that published corpora usually give to the field with a document's text.
TEXT_FIELDS = ("text", "content", "contents", "raw_content", "body", "document", "article", "story", "passage")

Records = Iterator[tuple[str, object]]


def file_records(name: str, open_raw: Callable[[], BinaryIO], fields: list[str] | None = None) -> Records:
    """Yield (where, record) of every record of a file, in order; the suffixes of ``name`` say how it is read.

    A ``.txt`` file holds documents separated by blank lines; each is a record with the one field "text". JSON is an
    array, one object a line, or (``.json`` only) one object with the records in an array, such as {"data": [...]}.

    Args:
        open_raw: opens the file for reading bytes; seekable for ``.parquet``. It may be called twice.
        fields: the fields that are needed; None for all. If a table lacks one of them, InputError is raised at once.

    Raises:
        InputError: the format is unknown, the file is damaged or cut off, or its syntax is broken so that the next
            record cannot be found.
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
        raise InputError(f"{name}: damaged or cut off; it cannot be read to its end ({error}).") from None


def _is_one_object(name: str, open_raw: Callable[[], BinaryIO], fields: Iterable[str]) -> bool:
    """Whether the first object is not a record, but holds an array of records that have one of ``fields``."""
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
            pass  # malformed: reading it will raise the error
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
    lines = []
    size_bytes = 0
    for number, line in enumerate(chain(_lines(name, stream), [b""]), start=1):  # a blank line ends the last document
        if line.strip():
            lines.append(line)
            size_bytes += len(line)
            if size_bytes > LARGEST_DOCUMENT_BYTES:
                raise InputError(
                    f"{name}, line {number - len(lines) + 1}: no blank line in {size_bytes:,} bytes. Documents of a "
                    ".txt file are separated by blank lines. Add them, or give a .jsonl file with one document a line."
                )
        elif lines:
            try:
                record = {"text": b"".join(lines).decode().replace("\r\n", "\n").removesuffix("\n")}
            except UnicodeDecodeError as error:
                record = not_utf8(error)
            yield f"{name}, line {number - len(lines)}", record
            lines = []
            size_bytes = 0


def _array_records(name: str, stream: BufferedReader) -> Records:
    number = 0
    try:
        scanner = JsonScanner(stream, LARGEST_DOCUMENT_BYTES)
        for number, record in enumerate(scanner.items(), start=1):
            yield f"{name}, item {number}", record
        if scanner.peek():
            raise ValueError("something follows its end")
    except ValueError as error:  # never skipped, because the next record cannot be found
        raise InputError(f"{name}: the array is malformed after item {number} ({error}). Repair the file.") from None


def _object_records(name: str, stream: BufferedReader) -> Records:
    """Yield the items of the only array of objects in the file's only object."""
    scanner = JsonScanner(stream, LARGEST_DOCUMENT_BYTES)
    found = None  # the field with that array
    others = []
    number = 0
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
                deque(items, maxlen=0)  # read to the end of the array
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
            f"{name}: is read as one object that holds the documents in an array, but {error}, after item {number}. If "
            "it holds one document a line, rename it to .jsonl; otherwise make it an array."
        ) from None
    left_out = f"; not read are {', '.join(others)}" if others else ""
    say(f"{name}: the documents are in {found!r}{left_out}")


READ_BYTES = 1 << 20
WHITE_SPACE = " \t\r\n"  # in JSON; fewer characters than in Python
SPACES = re.compile(f"[{WHITE_SPACE}]*")
# Near the end of what was read so far, a value may only seem wrong or complete. "Near" is, in characters:
LONGEST_LITERAL = 12  # \uXXXX\uXXXX seems wrong until it is read to its end
LONGEST_EXPONENT = 2  # 1e-5 seems to be a complete 1 until the 5 is read


class JsonScanner:
    """Read the values of a JSON text one after the other, with only the current value in memory.

    Each value is parsed by the standard library, so the items of an array are exactly those of ``json.loads``. (ijson
    3.6 with its fast backend turned a lone surrogate such as ``"\\ud800"`` into ``"?"``.) Bytes that are not UTF-8
    become lone surrogates (``surrogateescape``), which valid text never contains.
    """

    def __init__(self, stream, largest_value_bytes: int):
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._parse = json.JSONDecoder().raw_decode
        self._largest_value_bytes = largest_value_bytes
        self._text = ""  # decoded; the part from _at on is not used yet
        self._at = 0
        self._ended = False  # whether the stream is at its end; _text may still hold unused text

    def items(self) -> Iterator[object]:
        """Yield the items of the array that comes next; raise ValueError if it is malformed or cut off."""
        separator = self.take("[")
        if self.peek() == "]":
            separator = self.take("]")
        while separator != "]":
            yield self.value()
            separator = self.take(",]")

    def names(self) -> Iterator[str]:
        """Yield the names in the object that comes next; the caller must take each value before the next name."""
        separator = self.take("{")
        if self.peek() == "}":
            separator = self.take("}")
        while separator != "}":
            name = self.value()
            if not isinstance(name, str):
                raise ValueError(f"{name!r} is not the name of a field")
            self.take(":")
            yield name
            separator = self.take(",}")

    def value(self) -> object:
        """Return the value that comes next; raise ValueError if it is missing, malformed, cut off or too large."""
        self.peek()
        while True:
            try:
                value, end = self._parse(self._text, self._at)
                if self._ended or end < len(self._text) - LONGEST_EXPONENT:
                    self._at = end
                    return value
            except RecursionError:
                raise ValueError("nested too deeply") from None
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - LONGEST_LITERAL
                if self._ended or not cut:
                    raise ValueError(error.msg) from None
            self._read_more()

    def peek(self) -> str:
        """Return the next character that is not white space, without taking it; "" at the end."""
        while True:
            character = self._text[self._at : self._at + 1]
            if character and character not in WHITE_SPACE:
                return character
            self._at = SPACES.match(self._text, self._at).end()
            if self._at == len(self._text) and not self._read_more():
                return ""

    def take(self, expected: str) -> str:
        """Take the next character, which must be one of ``expected``."""
        found = self.peek()
        if not found:
            raise ValueError("cut off")
        if found not in expected:
            raise ValueError(f"expected {' or '.join(expected)}, found {found!r}")
        self._at += 1
        return found

    def _read_more(self) -> bool:
        """Read more text; return False at the end of the stream.

        At least as much is read as is still unused, so that reading a long value takes linear time.
        """
        unused = len(self._text) - self._at
        if unused > self._largest_value_bytes:
            raise ValueError(f"a value of more than {self._largest_value_bytes:,} characters")
        chunk = self._stream.read(max(READ_BYTES, unused))
        self._ended = not chunk
        self._text = self._text[self._at :] + self._decode(chunk, final=self._ended)
        self._at = 0
        return not self._ended


BATCH_BYTES = 1 << 24  # of a .parquet file, decoded at once


def table_records(name: str, stream: io.BufferedReader, delimiter: str, fields: list[str] | None) -> Records:
    """Yield (where, record) of every row; the first row names the fields.

    All values are text: "NA", "1" and "" are not converted. Quoting follows RFC 4180, also in .tsv: a line break may
    stand within quotes. Empty lines are dropped.

    Raises:
        InputError: the header lacks one of ``fields`` or repeats a name, or the quoting is broken so that the next row
            cannot be found.
    """
    csv.field_size_limit(LARGEST_DOCUMENT_BYTES)  # a setting of the whole process; the default is 128 KiB
    # Bytes that are not UTF-8 become lone surrogates, so that the error for them can name the row.
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        repeated = [column for column, times in Counter(header).items() if times > 1]
        if repeated:
            raise InputError(f"{name}: its header has {repeated} more than once. Name every field once.")
        check_fields(name, fields, header)
        line = rows.line_num + 1
        for row in rows:
            if len(row) == len(header):
                yield f"{name}, line {line}", dict(zip(header, row, strict=True))
            elif row:
                yield f"{name}, line {line}", ValueError(f"a row of {len(row)} fields, the header has {len(header)}")
            line = rows.line_num + 1
    except csv.Error as error:
        raise InputError(f"{name}, line {rows.line_num}: broken quoting ({error}). Repair the file.") from None


def parquet_records(name: str, open_raw: Callable[[], BinaryIO], fields: list[str] | None) -> Records:
    """Yield (where, record) of every row, with a batch of about BATCH_BYTES in memory; only ``fields`` are read.

    Raises:
        InputError: one of ``fields`` is missing, or the file is damaged or cut off.
    """
    import pyarrow
    import pyarrow.parquet

    # Read columns in small parts, not a whole row group at once. Check the pages that have a checksum.
    how = dict(buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    row = 0
    group = 0
    try:
        with open_raw() as raw, pyarrow.parquet.ParquetFile(raw, **how) as file:
            schema = file.metadata.schema
            check_fields(name, fields, [schema.column(i).path for i in range(len(schema))])
            for group in range(file.num_row_groups):
                batch_rows = _rows_of_a_batch(file.metadata.row_group(group), fields)
                for batch in file.iter_batches(batch_rows, [group], fields):
                    for record in _rows(batch):
                        row += 1
                        yield f"{name}, row {row} (row group {group})", record
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{name}: cannot be read after row {row}, in row group {group} ({error}).") from None


def check_fields(name: str, fields: list[str] | None, columns: list[str]) -> None:
    """Raise InputError unless each of ``fields`` is a column, or contains columns ("meta" contains "meta.text")."""
    missing = [field for field in fields or () if not any(_is_within(column, field) for column in columns)]
    if missing:
        shown = [column[:60] for column in columns[:40]]
        raise InputError(f"{name}: no field {missing[0]!r}; the fields are {shown} (choose with --text_field).")


def _is_within(column: str, field: str) -> bool:
    return column == field or column.startswith(f"{field}.")


def _rows_of_a_batch(row_group, fields: list[str] | None) -> int:
    columns = [row_group.column(i) for i in range(row_group.num_columns)]
    if fields is not None:
        columns = [column for column in columns if any(_is_within(column.path_in_schema, field) for field in fields)]
    row_bytes = sum(column.total_uncompressed_size for column in columns) / max(row_group.num_rows, 1)
    return max(1, int(BATCH_BYTES / max(row_bytes, 1024)))


def _rows(batch) -> list:
    """Return the rows as dicts, with a ValueError in place of each row that has text that is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [not_utf8(error)]
        return [_rows(batch.slice(i, 1))[0] for i in range(batch.num_rows)]
