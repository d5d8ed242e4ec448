"""Tables of documents: .csv, .tsv and .parquet files, one record a row."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator
from typing import BinaryIO

from common.files import LARGEST_DOCUMENT_BYTES, not_utf8
from common.messages import InputError

BATCH_BYTES = 1 << 24  # of a .parquet file decoded at once

Records = Iterator[tuple[str, object]]


def table_records(name: str, stream: io.BufferedReader, delimiter: str, fields: list[str] | None) -> Records:
    """Yield (where, record) of every row; the first row names the fields. "NA", "1" and "" stay the text they are.

    Quoting is that of RFC 4180, line breaks within quotes included, in .tsv too. Empty lines are no rows.

    Raises:
        InputError: the header lacks one of ``fields`` or repeats a name; quotes that do not end, or end within a field:
            where the next row starts cannot be known then.
    """
    csv.field_size_limit(LARGEST_DOCUMENT_BYTES)  # its default of 128 KiB is that of the whole process
    # What is not UTF-8 becomes lone surrogates, which no text may hold: so the error names the row, not the buffer.
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
    """Yield (where, record) of every row, a batch of at most BATCH_BYTES in memory; only ``fields`` are read.

    Raises:
        InputError: a column that ``fields`` names is missing, or the file is damaged or cut off.
    """
    import pyarrow
    import pyarrow.parquet

    # A column is read bit by bit, not the whole of a row group at once; pages with a checksum are checked.
    how = dict(buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    row = group = 0
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
        raise InputError(f"{name}: cannot be read behind row {row}, in row group {group} ({error}).") from None


def check_fields(name: str, fields: list[str] | None, columns: list[str]) -> None:
    """Raise InputError unless every one of ``fields`` is a column, or holds some ("meta" holds "meta.text")."""
    missing = [field for field in fields or () if not any(_is_within(column, field) for column in columns)]
    if missing:
        shown = [column[:60] for column in columns[:40]]
        raise InputError(f"{name}: no field {missing[0]!r}; the fields are {shown} (choose with --text_field).")


def _is_within(column: str, field: str) -> bool:
    return column == field or column.startswith(f"{field}.")


def _rows_of_a_batch(row_group, fields: list[str] | None) -> int:
    columns = [row_group.column(i) for i in range(row_group.num_columns)]
    needed = [c for c in columns if fields is None or any(_is_within(c.path_in_schema, field) for field in fields)]
    row_bytes = sum(column.total_uncompressed_size for column in needed) / max(row_group.num_rows, 1)
    return max(1, int(BATCH_BYTES / max(row_bytes, 1024)))


def _rows(batch) -> list:
    """Return the rows as dicts, a ValueError in place of one with text that is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [not_utf8(error)]
        return [_rows(batch.slice(i, 1))[0] for i in range(batch.num_rows)]
