"""Files with columns -> their records, streamed: CSV, TSV, Parquet and Arrow."""

import csv
import io
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from common.console import InputError
from common.corpus.formats import LARGEST_DOCUMENT_BYTES, Records, not_utf8, refuse_what_is_not_data

BATCH_BYTES = 1 << 24  # of a .parquet file, decoded at once
# A value that comes again is in the file once, so a few bytes can decode to gigabytes. A batch holds so few rows that
# it stays below this even if every row has the largest value that the column can have.
LARGEST_BATCH_BYTES = 1 << 26
LIST_LEVELS = re.compile(r"\.(list|bag)\.(element|item|array|array_element)(?=\.|$)")


def table_records(
    name: str, stream: io.BufferedReader, kind: str, fields: list[str] | None, note: Callable[[str], None]
) -> Records:
    """Yield (where, record) of every row; the first row names the fields.

    All values are text: "NA", "1" and "" are not converted. A .tsv has no quoting: a quote is text, and a field holds
    neither tabs nor line breaks. In a .csv, quoting follows RFC 4180: a line break may stand within quotes. Its fields
    are separated by tabs if its first line has tabs and no comma. Empty lines are dropped. A row that repeats the first
    one, as in files that were joined, is malformed.

    Raises:
        InputError: the header lacks one of ``fields`` or repeats a name, or the quoting is broken so that the next row
            cannot be found.
    """
    rows = _tab_rows(name, stream, note) if kind == ".tsv" else _csv_rows(name, stream)
    _, header = next(rows, (1, []))
    repeated = [column for column, times in Counter(header).items() if times > 1]
    if repeated:
        raise InputError(f"{name}: its header has {repeated} more than once. Name every field once.")
    check_fields(name, fields, header)
    for line, row in rows:
        where = f"{name}, line {line}"
        if row == header:
            yield where, ValueError("the header again, as in files that were joined")
        elif len(row) == len(header):
            yield where, dict(zip(header, row, strict=True))
        elif row:
            advice = ". A .tsv has no quoting; name a file with quotes .csv" if kind == ".tsv" else ""
            yield where, ValueError(f"a row of {len(row)} fields, the header has {len(header)}{advice}")


def _tab_rows(name: str, stream: io.BufferedReader, note: Callable[[str], None]) -> Iterator[tuple[int, list[str]]]:
    """Yield the line and the fields of every row of a .tsv; note how many fields look as if they were quoted."""
    quoted = 0
    for number, line in enumerate(_text_lines(name, stream, newline="\n"), start=1):
        row = line.removesuffix("\n").removesuffix("\r").split("\t")
        quoted += sum(len(field) > 1 and field[0] == field[-1] == '"' for field in row)
        if row != [""]:
            yield number, row
    if quoted:
        note(
            f"note: {name}: {quoted:,} fields begin and end with a quote, which is kept: a .tsv has no quoting. If "
            "these quotes are not part of the text, name the file .csv; its fields may be separated by tabs."
        )


def _csv_rows(name: str, stream: io.BufferedReader) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the fields of every row of a .csv."""
    csv.field_size_limit(LARGEST_DOCUMENT_BYTES)  # a setting of the whole process; the default is 128 KiB
    first_line = stream.peek().partition(b"\n")[0]
    delimiter = "\t" if b"\t" in first_line and b"," not in first_line else ","
    rows = csv.reader(_text_lines(name, stream, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for row in rows:
            yield line, row
            line = rows.line_num + 1
    except csv.Error as error:
        raise InputError(f"{name}, line {rows.line_num}: broken quoting ({error}). Repair the file.") from None


def _text_lines(name: str, stream: io.BufferedReader, newline: str) -> Iterator[str]:
    """Yield the lines with their line breaks, without byte order marks at their start, which joined files have."""
    # Bytes that are not UTF-8 become lone surrogates, so that the error for them can name the row.
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline=newline)
    while line := text.readline(LARGEST_DOCUMENT_BYTES + 1):
        if len(line) > LARGEST_DOCUMENT_BYTES:
            raise InputError(f"{name}: a line of more than {LARGEST_DOCUMENT_BYTES:,} characters. Put one row a line.")
        yield line.removeprefix("\ufeff")


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
        with _opened(name, open_raw) as raw, pyarrow.parquet.ParquetFile(raw, **how) as file:
            schema = file.metadata.schema
            paths = [schema.column(i).path for i in range(len(schema))]
            check_fields(name, fields, [LIST_LEVELS.sub("", path) for path in paths])
            needed = [i for i, path in enumerate(paths) if fields is None or _is_needed(path, fields)]
            needed_paths = [paths[i] for i in needed]
            for group in range(file.num_row_groups):
                _refuse_damaged_metadata(file, group, needed_paths)
                batch_rows = _rows_of_a_batch(raw, file.metadata.row_group(group), schema, needed)
                for batch in file.iter_batches(batch_rows, [group], needed_paths):
                    for record in _rows(batch):
                        row += 1
                        yield f"{name}, row {row} (row group {group})", record
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:  # the second is of a name
        raise InputError(f"{name}: cannot be read after row {row}, in row group {group} ({error}).") from None


def _refuse_damaged_metadata(file, group: int, paths: list[str]) -> None:
    """Read one row of ``group``, which raises OSError if its metadata is damaged.

    ``RowGroupMetaData.column`` aborts the process on such metadata (seen with pyarrow 26). This can go when it raises.
    """
    next(file.iter_batches(1, [group], paths), None)


def check_fields(name: str, fields: list[str] | None, columns: list[str]) -> None:
    """Raise InputError unless each of ``fields`` is a column, or contains columns ("meta" contains "meta.text")."""
    missing = [field for field in fields or () if not any(_is_within(column, field) for column in columns)]
    if missing:
        shown = [column[:60] for column in columns[:40]]
        raise InputError(f"{name}: no field {missing[0]!r}; the fields are {shown} (choose with --text_field).")


def _is_needed(path: str, fields: Iterable[str]) -> bool:
    return any(_is_within(LIST_LEVELS.sub("", path), field) for field in fields)


def _is_within(column: str, field: str) -> bool:
    return column == field or column.startswith(f"{field}.")


def _opened(name: str, open_raw: Callable[[], BinaryIO]) -> BinaryIO:
    raw = open_raw()
    try:
        refuse_what_is_not_data(name, raw.read(64))
        raw.seek(0)
    except BaseException:
        raw.close()
        raise
    return raw


def _rows_of_a_batch(raw: BinaryIO, row_group, schema, needed: list[int]) -> int:
    rows = max(row_group.num_rows, 1)
    columns = [row_group.column(i) for i in needed]
    mean_bytes = sum(column.total_uncompressed_size for column in columns) / rows
    largest_bytes = sum(
        _largest_value_bytes(raw, row_group.column(i), schema.column(i).length or 0)
        * max(1, row_group.column(i).num_values / rows)
        for i in needed
    )
    return max(1, int(min(BATCH_BYTES / max(mean_bytes, 1024), LARGEST_BATCH_BYTES / max(largest_bytes, 1))))


def _largest_value_bytes(raw: BinaryIO, column, fixed_bytes: int) -> int:
    """Return a limit of what a value takes that takes less, or nothing, in the file; 0 if there are no such values.

    Such values are in a dictionary, share their beginning with the one before (DELTA_BYTE_ARRAY), or are null in a
    column of values of ``fixed_bytes``.
    """
    if "DELTA_BYTE_ARRAY" in column.encodings:
        return column.total_uncompressed_size
    offsets = [column.data_page_offset, column.dictionary_page_offset or 0]
    raw.seek(min((offset for offset in offsets if offset > 0), default=0))
    kind, page_bytes = _page_header(raw.read(16))
    if kind is None:
        return column.total_uncompressed_size
    return max(fixed_bytes, page_bytes if kind == DICTIONARY_PAGE else 0)


DICTIONARY_PAGE = 2  # PageType in https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift


def _page_header(start: bytes) -> tuple[int | None, int]:
    """Return the type of the page that begins so and its size without compression; (None, 0) if it is none.

    A page begins with its header, in Thrift's compact protocol: fields 1 (type) and 2 (size), each of them a byte 0x15
    (the next field, an i32) and a number in zigzag order (2 is 4), seven bits a byte, the lowest first.
    """
    numbers = []
    at = 0
    for _ in range(2):
        if start[at : at + 1] != b"\x15":
            return None, 0
        number = shift = 0
        more = True
        while more:
            at += 1
            if at >= len(start):
                return None, 0
            number |= (start[at] & 0x7F) << shift
            shift += 7
            more = start[at] >= 0x80
        at += 1
        numbers.append(number >> 1)
    return numbers[0], numbers[1]


ROWS_AT_ONCE = 16  # of an Arrow batch, whose values may be in a dictionary


def arrow_records(name: str, open_raw: Callable[[], BinaryIO], fields: list[str] | None) -> Records:
    """Yield (where, record) of every row of an Arrow file or stream, such as ``datasets.save_to_disk`` writes.

    Raises:
        InputError: one of ``fields`` is missing, the file is damaged or cut off, or its batches are compressed.
    """
    import pyarrow
    import pyarrow.ipc

    row = 0
    try:
        with _opened(name, open_raw) as raw:
            is_file = raw.read(6) == b"ARROW1"
            _check_messages(name, raw, first=8 if is_file else 0)
            raw.seek(0)
            with pyarrow.ipc.open_file(raw) if is_file else pyarrow.ipc.open_stream(raw) as reader:
                check_fields(
                    name, fields, [path for field in reader.schema for path in _paths_in(field.name, field.type)]
                )
                needed = [i for i, field in enumerate(reader.schema) if _has_a_part(field, fields)]
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
                for batch in batches:
                    batch.validate(full=True)
                    for first in range(0, batch.num_rows, ROWS_AT_ONCE):
                        for record in _rows(batch.select(needed).slice(first, ROWS_AT_ONCE)):
                            row += 1
                            yield f"{name}, row {row}", record
    except (OSError, MemoryError, UnicodeDecodeError, struct.error, pyarrow.ArrowException) as error:
        raise InputError(f"{name}: cannot be read after row {row} ({error}). Fetch or write it again.") from None


def _paths_in(name: str, kind) -> Iterator[str]:
    """Yield the names of the fields within a column, such as "meta.text"; a list has the names of its items."""
    import pyarrow

    if hasattr(kind, "value_type") and not pyarrow.types.is_dictionary(kind):
        yield from _paths_in(name, kind.value_type)
    elif pyarrow.types.is_struct(kind):
        for inner in kind:
            yield from _paths_in(f"{name}.{inner.name}", inner.type)
    else:
        yield name


def _has_a_part(column, fields: list[str] | None) -> bool:
    paths = list(_paths_in(column.name, column.type))
    return fields is None or any(_is_within(path, field) for path in paths for field in fields)


def _check_messages(name: str, raw: BinaryIO, first: int) -> None:
    """Raise InputError unless the messages from byte ``first`` on are whole, end with the mark, and are not compressed.

    How much a compressed batch takes is known only when it is unpacked. ``datasets`` does not compress.

    Source: https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format
    """
    size = raw.seek(0, io.SEEK_END)
    at = first
    while True:
        raw.seek(at)
        mark, length = struct.unpack("<Ii", raw.read(8).ljust(8, b"\0"))
        if mark != 0xFFFFFFFF or length < 0 or at + 8 + length > size:
            raise InputError(f"{name}: not an Arrow file, damaged or cut off at byte {at:,}. Fetch or write it again.")
        if length == 0:
            return
        body_bytes, compressed = _message(raw.read(length))
        if compressed:
            raise InputError(
                f"{name}: its batches are compressed, so what they take is known only when they are unpacked. Write it "
                "without compression, or as .parquet."
            )
        at += 8 + length + body_bytes
        if not 0 <= body_bytes <= size - at + body_bytes:
            raise InputError(f"{name}: cut off in a batch of {body_bytes:,} bytes. Fetch or write it again.")


def _message(metadata: bytes) -> tuple[int, bool]:
    """Return the size of a message's body, and whether the batch in it is compressed.

    Source: format/Message.fbs in https://github.com/apache/arrow, and https://flatbuffers.dev/internals
    """

    def place(table: int, number: int) -> int:
        """Return where field ``number`` of a table is; 0 if it has its default value."""
        offsets = table - struct.unpack_from("<i", metadata, table)[0]
        if 4 + 2 * number >= struct.unpack_from("<H", metadata, offsets)[0]:
            return 0
        offset = struct.unpack_from("<H", metadata, offsets + 4 + 2 * number)[0]
        return table + offset if offset else 0

    def table_at(at: int) -> int:
        return at + struct.unpack_from("<I", metadata, at)[0]

    message = table_at(0)
    kind, body = place(message, 1), place(message, 3)
    body_bytes = struct.unpack_from("<q", metadata, body)[0] if body else 0
    kind = metadata[kind] if 0 < kind < len(metadata) else 0
    if kind not in (DICTIONARY_BATCH, RECORD_BATCH):
        return body_bytes, False
    batch = table_at(place(message, 2))
    if kind == DICTIONARY_BATCH:
        batch = table_at(place(batch, 1))
    return body_bytes, place(batch, 3) > 0


DICTIONARY_BATCH, RECORD_BATCH = 2, 3  # MessageHeader in Message.fbs


def _rows(batch) -> list:
    """Return the rows as dicts, with a ValueError in place of each row that has text that is not UTF-8.

    A date that Python cannot hold also spoils its row only.
    """
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [not_utf8(error) if isinstance(error, UnicodeDecodeError) else ValueError(str(error))]
        return [_rows(batch.slice(i, 1))[0] for i in range(batch.num_rows)]
