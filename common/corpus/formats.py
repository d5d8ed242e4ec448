"""The known file formats, and opening compressed files so that a damaged or cut-off file is noticed."""

import bz2
import io
import lzma
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

from common.console import InputError

# pyarrow reads these. (The zstandard package takes a file that is cut off for a complete, shorter one.)
PYARROW_CODECS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
# pyarrow has no xz, and stops at an empty stream of bz2. The standard library's BZ2File and LZMAFile take a damaged
# second stream for the end of the file. So _StreamFile drives the decoders itself.
DECODERS = {".bz2": bz2.BZ2Decompressor, ".xz": partial(lzma.LZMADecompressor, lzma.FORMAT_XZ)}
COMPRESSIONS = {*PYARROW_CODECS, *DECODERS}
TABLE_DELIMITERS = {".csv": ",", ".tsv": "\t"}
FORMATS = {".json", ".jsonl", ".ndjson", ".txt", ".parquet", *TABLE_DELIMITERS}
LARGEST_DOCUMENT_BYTES = 1 << 28  # more is not one document, but a file without separators
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Windows editors write it
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
DAMAGE = (OSError, EOFError, lzma.LZMAError)  # what reading a damaged file raises
BUFFER_BYTES = 1 << 20


def format_of(name: str) -> str | None:
    """Return the suffix of ``name`` that gives its format, without that of a compression; None if it is unknown."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    if compressed:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind not in FORMATS or (compressed and kind == ".parquet"):
        return None
    return kind


def known_formats() -> str:
    """Return the formats, for an error message."""
    return f"{' '.join(sorted(FORMATS))}, and all but .parquet compressed as {' '.join(sorted(COMPRESSIONS))}"


def not_utf8(error: UnicodeDecodeError) -> ValueError:
    """Return the error for a record that is not UTF-8, with the fix."""
    found = f"byte 0x{error.object[error.start]:02x} at {error.start:,}: {error.reason}"
    return ValueError(f"not UTF-8 ({found}); to convert Chinese text in GBK: iconv -f GB18030 -t UTF-8")


def open_decompressed(name: str, open_raw: Callable[[], BinaryIO]) -> io.BufferedReader:
    """Open a file for reading bytes; decompress it according to the suffix of ``name``, and skip a byte order mark.

    All members, frames or streams of a compressed file are read. If the file is cut off exactly between two of them,
    this is not noticed.

    Raises:
        One of DAMAGE, here or at any later read: the file is damaged or cut off.
        InputError: it is UTF-16.
    """
    raw = open_raw()
    suffix = Path(name).suffix.lower()
    if suffix in DECODERS:
        raw = _StreamFile(io.BufferedReader(raw, BUFFER_BYTES), DECODERS[suffix])
    elif suffix in PYARROW_CODECS:
        import pyarrow

        raw = pyarrow.input_stream(io.BufferedReader(raw, BUFFER_BYTES), compression=PYARROW_CODECS[suffix])
    # Two readers, because peek reads once and a single read may be short. The outer one reads from the inner one, which
    # reads until it has as much as was asked for.
    stream = io.BufferedReader(io.BufferedReader(raw, BUFFER_BYTES), BUFFER_BYTES)
    start = stream.peek(3)
    if start.startswith(UTF16_MARKS):
        stream.close()
        raise InputError(f"{name}: is UTF-16, judging by its first two bytes. Convert it: iconv -f UTF-16 -t UTF-8")
    if start.startswith(BYTE_ORDER_MARK):
        stream.read(3)
    return stream


class CountedFile(io.FileIO):
    """A local file that reports the number of bytes of every read, for a progress bar."""

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
    """Decompress a file of one or more streams, with padding between them; anything else after a stream is an error."""

    def __init__(self, file: io.BufferedReader, new_decoder: Callable):
        self._file = file
        self._new_decoder = new_decoder
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
                self._pending = self._decoder.unused_data
                self._decoder = None
            if chunk:
                buffer[: len(chunk)] = chunk
                return len(chunk)

    def close(self) -> None:
        self._file.close()
        super().close()
