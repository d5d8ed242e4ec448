"""The known file formats, and opening a file so that damage, another format or another encoding is noticed."""

import bz2
import codecs
import io
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from common.console import InputError
from common.io import LFS_POINTER

# What the readers of records.py and tables.py yield: where a record is, and the record.
Records = Iterator[tuple[str, object]]

# pyarrow reads these. (The zstandard package takes a file that is cut off for a complete, shorter one.)
PYARROW_CODECS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
# No decoder gets more, because a small file could ask for gigabytes. The limit of zstd's library is 128 MiB.
LARGEST_XZ_BYTES = 1 << 28
# pyarrow has no xz, and stops at an empty stream of bz2. The standard library's BZ2File and LZMAFile take a damaged
# second stream for the end of the file. So _StreamFile drives the decoders itself.
DECODERS = {
    ".bz2": bz2.BZ2Decompressor,
    ".xz": partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, memlimit=LARGEST_XZ_BYTES),
}
COMPRESSIONS = {*PYARROW_CODECS, *DECODERS}
ARCHIVES = (".tar.bz2", ".tar.gz", ".tgz", ".tar.xz", ".tar")  # data/prepare.py download unpacks them
# How a compressed file begins, whatever its name is. No text begins so. (The fourth byte of bz2 is its level.)
COMPRESSED = (
    (".gz", re.compile(rb"\x1f\x8b\x08")),
    (".zst", re.compile(rb"\x28\xb5\x2f\xfd")),
    (".bz2", re.compile(rb"BZh[1-9]1AY&SY")),
    (".xz", re.compile(rb"\xfd7zXZ\0")),
)
# What the decoders say when a file needs a larger window than they allow.
WINDOW_TOO_LARGE = ("Frame requires too much memory", "Memory usage limit exceeded")
TABLE_DELIMITERS = {".csv": ",", ".tsv": "\t"}
COLUMN_FORMATS = {".parquet": b"PAR1", ".arrow": b"ARROW1"}  # and how their files begin; an .arrow stream has no mark
FORMATS = {".json", ".jsonl", ".ndjson", ".txt", *TABLE_DELIMITERS, *COLUMN_FORMATS}
LARGEST_DOCUMENT_BYTES = 1 << 28  # more is not one document, but a file without separators
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Windows editors write it
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# So many characters of two bytes in UTF-8, and no others, are hardly another encoding: of the letters in Chinese text,
# 17% in GBK look so (measured on data/sample_zh.jsonl), and all of eight in less than one text of a million.
ENOUGH_OF_TWO_BYTES = 8
# Of Big5 that is read as gb18030, 43% of the letters are characters for private use, and of 20 letters 15% at least
# (2,000 places in data/sample_zh.jsonl in traditional characters); of GBK, in simplified and traditional ones, none.
PRIVATE_USE, MOST_PRIVATE_USE, LETTERS_JUDGED = re.compile("[\ue000-\uf8ff]"), 0.05, 10
LARGEST_POINTER_BYTES = 1024  # by the specification of Git LFS
DAMAGE = (OSError, EOFError, lzma.LZMAError)  # what reading a damaged file raises
BUFFER_BYTES = 1 << 20
ANOTHER_ENCODING = (
    "If the text is in another encoding, name it: --encoding gb18030 for Chinese text in GBK, big5 for traditional "
    "characters of Taiwan and Hong Kong"
)
WITHIN_GB18030 = ("gbk", "gb2312")  # Python's names; Windows calls its own gb18030 GBK, too


class NotUtf8(ValueError):
    """A record has bytes that are not UTF-8."""


def format_of(name: str) -> str | None:
    """Return the suffix of ``name`` that gives its format, without that of a compression; None if it is unknown."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    if compressed:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind not in FORMATS or (compressed and kind in COLUMN_FORMATS):
        return None
    return kind


def format_by_content(name: str, open_raw: Callable[[], BinaryIO]) -> str | None:
    """Return the format of a file whose name does not give it, as a suffix: .parquet, .arrow, .jsonl or .json.

    A file is .jsonl if its first line is a JSON object, and .json if it begins as an array of objects. Text is not
    recognised: None, because a README is text too.
    """
    try:
        with open_raw() as raw:
            start = raw.read(8)
        for kind, mark in COLUMN_FORMATS.items():
            if start.startswith(mark):
                return kind
        with open_decompressed(name, open_raw) as stream:
            start = stream.peek()
    except (InputError, *DAMAGE):
        return None
    first_line, line_break, _ = start.lstrip().partition(b"\n")
    if re.match(rb'\{\s*"', first_line) and (not line_break or _is_json(first_line)):
        return ".jsonl"
    return ".json" if re.match(rb"\s*\[\s*\{", start) else None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def known_formats() -> str:
    """Return the formats, for an error message."""
    columns = " and ".join(sorted(COLUMN_FORMATS))
    return f"{' '.join(sorted(FORMATS))}, and all but {columns} compressed as {' '.join(sorted(COMPRESSIONS))}"


def known_encoding(name: str | None) -> str | None:
    """Return Python's name of a text encoding; None for UTF-8, which needs no decoding of ours.

    Raises:
        InputError: there is no such encoding of text.
    """
    if name is None:
        return None
    try:
        "".encode(name)  # also refuses codecs that are not of text, such as zlib
        found = codecs.lookup(name).name
    except (LookupError, ValueError):
        raise InputError(f"--encoding {name!r}: unknown. For Chinese text: gb18030 (also for GBK) or big5.") from None
    return None if found in ("utf-8", "utf-8-sig") else found


def not_utf8(error: UnicodeDecodeError) -> NotUtf8:
    """Return the error for a record that is not UTF-8."""
    return NotUtf8(f"not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start:,}: {error.reason})")


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Raise InputError if one of the files is a pointer of Git LFS: a clone without the data itself."""
    for path in paths:
        if path.stat().st_size <= LARGEST_POINTER_BYTES:
            with path.open("rb") as file:
                refuse_what_is_not_data(str(path), file.read(len(LFS_POINTER)))


def refuse_what_is_not_data(name: str, start: bytes) -> None:
    """Raise InputError if a file that begins with ``start`` is a pointer of Git LFS, or a web page instead of data."""
    if start.startswith(LFS_POINTER):
        raise InputError(f"{name}: a Git LFS pointer, not the data itself. Fetch the data: git lfs pull")
    if format_of(name) not in (".txt", *TABLE_DELIMITERS) and re.match(rb"\s*<(!doctype|html)", start, re.IGNORECASE):
        raise InputError(f"{name}: a web page, not data; its download was answered with a page. Fetch it again.")


def open_decompressed(
    name: str,
    open_raw: Callable[[], BinaryIO],
    encoding: str | None = None,
    note: Callable[[str], None] | None = None,
) -> io.BufferedReader:
    """Open a file for reading bytes in UTF-8; decompress it, and skip a byte order mark.

    The suffix of ``name`` says how it is compressed, or else its first bytes. All members, frames or streams of a
    compressed file are read. If the file is cut off exactly between two of them, this is not noticed.

    Args:
        encoding: of the text, as ``known_encoding`` returns it; bytes that are not of it become bytes that are not
            UTF-8, so that the reader can name their place. A file in UTF-8 is recognised, and read as it is.
        note: prints that a file is or may be in another encoding than ``encoding``; None: nothing is printed.

    Raises:
        One of DAMAGE, here or at any later read: the file is damaged or cut off.
        InputError: it is UTF-16, and not ``encoding``; or ``refuse_what_is_not_data``.
    """
    stream = io.BufferedReader(open_raw(), BUFFER_BYTES)
    try:
        start = stream.peek()
        refuse_what_is_not_data(name, start)
        stream = _buffered(_decompressed(_compression(name, start), stream))
        start = stream.peek()
        if encoding is not None:
            stream = _buffered(_DecodedFile(name, stream, encoding, note))
            start = stream.peek()
        elif start.startswith(UTF16_MARKS):
            raise InputError(f"{name}: is UTF-16, judging by its first two bytes. Give --encoding utf-16.")
    except BaseException:
        stream.close()
        raise
    if start.startswith(BYTE_ORDER_MARK):
        stream.read(len(BYTE_ORDER_MARK))
    return stream


def _buffered(raw: BinaryIO) -> io.BufferedReader:
    # Two readers, because peek reads once and a single read may be short. The outer one reads from the inner one, which
    # reads until it has as much as was asked for.
    inner = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw, BUFFER_BYTES)
    return io.BufferedReader(inner, BUFFER_BYTES)


def _compression(name: str, start: bytes) -> str | None:
    suffix = Path(name).suffix.lower()
    if suffix in COMPRESSIONS:
        return suffix
    return next((found for found, mark in COMPRESSED if mark.match(start)), None)


def _decompressed(compression: str | None, stream: io.BufferedReader) -> BinaryIO:
    if compression in DECODERS:
        return _StreamFile(stream, DECODERS[compression])
    if compression in PYARROW_CODECS:
        import pyarrow

        return pyarrow.input_stream(stream, compression=PYARROW_CODECS[compression])
    return stream


def _is_utf8(start: bytes) -> bool | None:
    """Whether text that begins so, and not in ASCII only, is UTF-8; None if it may be, or another encoding.

    One character of three bytes decides, as Chinese ones have. Those of two bytes, as French and Russian have, must be
    ENOUGH_OF_TWO_BYTES: a few characters of GBK may by chance be such.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    if max(text, default="") > "\u07ff" or len(text.encode()) - len(text) >= ENOUGH_OF_TWO_BYTES:
        return True
    return None


def _looks_like_big5(start: bytes) -> bool:
    """Whether text that begins so has, read as gb18030, letters that Big5 gives and nobody writes."""
    text = codecs.getincrementaldecoder("gb18030")("ignore").decode(start)
    letters = len(re.findall(r"[^\x00-\x7f]", text))
    return letters >= LETTERS_JUDGED and len(PRIVATE_USE.findall(text)) > MOST_PRIVATE_USE * letters


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


class _DecodedFile(io.RawIOBase):
    """Text of another encoding, as UTF-8. A byte that is not of it becomes three bytes that are not UTF-8.

    The first part that is not ASCII decides whether the file is in UTF-8: then it is given out as it is.
    """

    def __init__(self, name: str, file: io.BufferedReader, encoding: str, note: Callable[[str], None] | None = None):
        self._name = name
        self._file = file
        self._encoding = encoding
        self._note = note
        self._decode = codecs.getincrementaldecoder(encoding)("surrogateescape").decode
        self._is_utf8: bool | None = None  # None: not decided yet
        self._pending = b""  # UTF-8, not yet given out

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._pending:
            chunk = self._next_chunk()
            self._pending = chunk if self._is_utf8 else self._decoded(chunk)
            if not chunk:
                break
        given = self._pending[: len(buffer)]
        buffer[: len(given)] = given
        self._pending = self._pending[len(given) :]
        return len(given)

    def _next_chunk(self) -> bytes:
        chunk = self._file.read1(BUFFER_BYTES)
        if self._is_utf8 is None and not chunk.isascii():
            found = _is_utf8(chunk)
            if found is None:  # too few characters, or only a part of the first one
                chunk += self._file.read1(BUFFER_BYTES)
                found = _is_utf8(chunk)
            self._is_utf8 = found is True
            if self._note is not None:
                self._say_encoding(found, chunk)
        return chunk

    def _say_encoding(self, is_utf8: bool | None, chunk: bytes) -> None:
        """Note what ``chunk`` says of the encoding, in words that are the same for all files of a source."""
        if is_utf8:
            self._note(f"note: what is in UTF-8 is read as UTF-8, although --encoding says {self._encoding}")
        elif is_utf8 is None:
            self._note(
                f"note: so few letters of a file are beyond ASCII that they may be UTF-8 as well as {self._encoding}. "
                f"They are read as {self._encoding}; if your files are in UTF-8, leave --encoding out"
            )
        elif self._encoding == "gb18030" and _looks_like_big5(chunk):
            self._note(
                "warning: read as gb18030, many letters of the text are ones that nobody writes (for private use), as "
                "Big5 gives them. If it is in traditional characters of Taiwan or Hong Kong: --encoding big5"
            )

    def _decoded(self, chunk: bytes) -> bytes:
        try:
            return self._decode(chunk, final=not chunk).encode("utf-8", "surrogatepass")
        except UnicodeError as error:
            raise InputError(f"{self._name}: is not {self._encoding} ({error}). Give another --encoding.") from None

    def close(self) -> None:
        self._file.close()
        super().close()


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
