"""Files of documents: which formats are known, and opening them so that a damaged or cut-off file is noticed."""

import bz2
import io
import lzma
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

from common.console import InputError

# pyarrow and not zstandard, whose reader takes a file that is cut off for a shorter one. pyarrow has no xz, and ends at
# an empty stream of bz2; the files of the standard library take a damaged second stream for the end: see _StreamFile.
PYARROW_CODECS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
DECODERS = {".bz2": bz2.BZ2Decompressor, ".xz": partial(lzma.LZMADecompressor, lzma.FORMAT_XZ)}
COMPRESSIONS = {*PYARROW_CODECS, *DECODERS}
TABLE_DELIMITERS = {".csv": ",", ".tsv": "\t"}
FORMATS = {".json", ".jsonl", ".ndjson", ".txt", ".parquet", *TABLE_DELIMITERS}
LARGEST_DOCUMENT_BYTES = 1 << 28  # beyond it, it is not one document but a file without separators
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # as Windows editors write it
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
DAMAGE = (OSError, EOFError, lzma.LZMAError)  # what reading a damaged file raises
BUFFER_BYTES = 1 << 20


def format_of(name: str) -> str | None:
    """Return the suffix that says how the file ``name`` is read, less that of its compression; None if unknown."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    kind = "".join(suffixes[:-1][-1:] if compressed else suffixes[-1:])
    return kind if kind in FORMATS and not (compressed and kind == ".parquet") else None


def known_formats() -> str:
    """Return the formats, for an error message."""
    return f"{' '.join(sorted(FORMATS))}, all but .parquet also with one of {' '.join(sorted(COMPRESSIONS))} behind it"


def not_utf8(error: UnicodeDecodeError) -> ValueError:
    """Return the error of a record that is not UTF-8, with what to do about it."""
    found = f"byte 0x{error.object[error.start]:02x} at {error.start:,}: {error.reason}"
    return ValueError(f"not UTF-8 ({found}); Chinese text in GBK is converted by: iconv -f GB18030 -t UTF-8")


def open_decompressed(name: str, open_raw: Callable[[], BinaryIO]) -> io.BufferedReader:
    """Open a file for reading bytes, decompressed by the suffix of ``name``, less a byte order mark.

    All members, frames or streams of a compressed file are read. One that is cut off exactly between two of them
    cannot be told from a whole one.

    Raises:
        One of DAMAGE, here or at any later read: the file is damaged or cut off.
        InputError: it is UTF-16.
    """
    raw, suffix = open_raw(), Path(name).suffix.lower()
    if suffix in DECODERS:
        raw = _StreamFile(io.BufferedReader(raw, BUFFER_BYTES), DECODERS[suffix])
    elif suffix in PYARROW_CODECS:
        import pyarrow

        raw = pyarrow.input_stream(io.BufferedReader(raw, BUFFER_BYTES), compression=PYARROW_CODECS[suffix])
    # Twice: one fills its buffer with a single read, however short; the other then has a whole one to peek into.
    stream = io.BufferedReader(io.BufferedReader(raw, BUFFER_BYTES), BUFFER_BYTES)
    start = stream.peek(3)
    if start.startswith(UTF16_MARKS):
        stream.close()
        raise InputError(f"{name}: is UTF-16, by its first two bytes. Convert it: iconv -f UTF-16 -t UTF-8")
    if start.startswith(BYTE_ORDER_MARK):
        stream.read(3)
    return stream


class CountedFile(io.FileIO):
    """A local file that reports the bytes of every read, for showing progress."""

    def __init__(self, path: Path, count_bytes: Callable[[int], None]):
        super().__init__(path, "rb")
        self._count_bytes = count_bytes

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        self._count_bytes(len(data))
        return data

    def readinto(self, buffer) -> int:
        read = super().readinto(buffer)
        self._count_bytes(read)
        return read


class _StreamFile(io.RawIOBase):
    """A file of one or more streams, with padding between them; anything else behind a stream is an error."""

    def __init__(self, file: io.BufferedReader, new_decoder: Callable):
        self._file, self._new_decoder = file, new_decoder
        self._decoder: bz2.BZ2Decompressor | lzma.LZMADecompressor | None = None  # None between two streams
        self._pending = b""  # read from the file, not yet given to a decoder

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while True:
            if not self._pending and (self._decoder is None or self._decoder.needs_input):
                self._pending = self._file.read1(BUFFER_BYTES)
                if not self._pending:
                    if self._decoder is not None:
                        raise EOFError("the last stream has no end")
                    return 0
            if self._decoder is None:
                self._pending = self._pending.lstrip(b"\0")
                if not self._pending:
                    continue
                self._decoder = self._new_decoder()
            chunk = self._decoder.decompress(self._pending, max_length=len(buffer))
            self._pending = b""
            if self._decoder.eof:
                self._pending, self._decoder = self._decoder.unused_data, None
            if chunk:
                buffer[: len(chunk)] = chunk
                return len(chunk)

    def close(self) -> None:
        self._file.close()
        super().close()
