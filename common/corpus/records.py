"""A file -> its records, streamed: memory does not grow with the size of the file.

Every reader yields (where, record) pairs. ``where`` names the file and the line, item or row, for error messages.
``record`` is a dict. If a record cannot be read but the records after it can, it is a ValueError instead. If nothing
after an error can be read (the file is cut off, its syntax is broken), InputError is raised.
"""

import codecs
import json
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from itertools import chain
from typing import BinaryIO

from common.console import InputError, say
from common.corpus.formats import (
    ANOTHER_ENCODING,
    BYTE_ORDER_MARK,
    DAMAGE,
    LARGEST_DOCUMENT_BYTES,
    TABLE_DELIMITERS,
    WINDOW_TOO_LARGE,
    Records,
    format_by_content,
    format_of,
    known_formats,
    not_utf8,
    open_decompressed,
)
from common.corpus.tables import arrow_records, parquet_records, table_records

# The names that published corpora usually give to the field with a document's text.
TEXT_FIELDS = (
    "text", "content", "contents", "raw_content", "body", "document", "article", "story", "passage",
    "正文", "内容", "文本",
)  # fmt: skip
SCAN_ONCE = json.JSONDecoder().scan_once  # (text, place) -> the value there, and the place after it
MOST_VALUES = 1 << 23  # of a JSON record; at most the commas, braces and brackets in it, also those of its text
# A document without text, and a blank line, have only white space, control and format characters.
BLANK_CATEGORIES = {"Cc", "Cf", "Zs", "Zl", "Zp"}
BLANK = "".join(c for c in map(chr, range(0x3001)) if unicodedata.category(c) in BLANK_CATEGORIES) + "\ufeff"
NOT_BLANK = re.compile(f"[^{re.escape(BLANK)}]")


def file_records(
    name: str,
    open_raw: Callable[[], BinaryIO],
    fields: list[str] | None = None,
    encoding: str | None = None,
    whole_text: bool = False,
    note: Callable[[str], None] = say,
) -> Records:
    """Yield (where, record) of every record of a file, in order; the suffixes of ``name`` say how it is read.

    A ``.txt`` file holds documents separated by blank lines; each is a record with the one field "text". JSON is an
    array, one object a line, or (``.json`` only) one object with the records in an array, such as {"data": [...]}. If
    no suffix is of a known format, the content decides, as in ``format_by_content``.

    Args:
        open_raw: opens the file for reading bytes; seekable for ``.parquet`` and ``.arrow``. It may be called twice.
        fields: the fields that are needed; None for all. If a table lacks one of them, InputError is raised at once.
        encoding: of the text, if it is not UTF-8, as ``known_encoding`` returns it.
        whole_text: a ``.txt`` file is one document.
        note: prints what looks wrong in the file.

    Raises:
        InputError: the format is unknown, the file is damaged or cut off, or its syntax is broken so that the next
            record cannot be found.
    """
    kind = format_of(name)
    if kind is None:
        kind = format_by_content(name, open_raw)
    if kind is None:
        raise InputError(f"{name}: unknown format. Known are {known_formats()}.")
    if kind == ".parquet":
        yield from parquet_records(name, open_raw, fields)
        return
    if kind == ".arrow":
        yield from arrow_records(name, open_raw, fields)
        return
    try:
        with open_decompressed(name, open_raw, encoding, note) as stream:
            if kind in TABLE_DELIMITERS:
                yield from table_records(name, stream, kind, fields, note)
            elif kind == ".txt" and whole_text:
                yield _whole_text(name, stream)
            elif kind == ".txt":
                yield from _paragraph_records(name, stream)
            elif stream.peek().lstrip().startswith(b"["):
                yield from _array_records(name, stream)
            elif kind == ".json" and _is_one_object(name, open_raw, encoding, fields or TEXT_FIELDS):
                yield from _object_records(name, stream)
            else:
                yield from _line_records(name, stream)
    except DAMAGE as error:
        if any(reason in str(error) for reason in WINDOW_TOO_LARGE):
            raise InputError(
                f"{name}: is not damaged, but compressed with a larger window than is read here (128 MiB in .zst, "
                "256 MiB in .xz). Unpack it first: zstd -d --long=31, or xz -d"
            ) from None
        raise InputError(f"{name}: damaged or cut off; it cannot be read to its end ({error}).") from None


def _is_one_object(name: str, open_raw: Callable[[], BinaryIO], encoding: str | None, fields: Iterable[str]) -> bool:
    """Whether the first object is not a record, but holds an array of records that have one of ``fields``."""
    wanted = {field.split(".")[0] for field in fields}
    with open_decompressed(name, open_raw, encoding) as stream:
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
    """Yield the lines without byte order marks at their start, which files that were joined have."""
    while line := stream.readline(LARGEST_DOCUMENT_BYTES + 1):
        if len(line) > LARGEST_DOCUMENT_BYTES:
            raise InputError(f"{name}: a line of more than {LARGEST_DOCUMENT_BYTES:,} bytes. Put one document a line.")
        yield line.removeprefix(BYTE_ORDER_MARK)


def _check_values(text: str) -> None:
    """Raise ValueError if ``text`` may hold more than MOST_VALUES values of JSON: "{}," takes 70 bytes in memory."""
    if len(text) > 2 * MOST_VALUES and sum(text.count(mark) for mark in "{[,") > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values in one record")


def _parsed(text: str) -> object:
    """Return ``json.loads(text)``, in less time where nothing but one line break is around the value."""
    try:
        value, end = SCAN_ONCE(text, 0)
    except StopIteration:  # it does not begin with a value
        return json.loads(text)
    return value if text[end:] in ("", "\n", "\r\n") else json.loads(text)


def _line_records(name: str, stream: BufferedReader) -> Records:
    for number, line in enumerate(_lines(name, stream), start=1):
        if line.strip():
            try:
                text = line.decode()
                _check_values(text)
                record = _parsed(text)
            except UnicodeDecodeError as error:
                record = not_utf8(error)
            except (ValueError, RecursionError) as error:
                record = ValueError(f"malformed line ({error})")
            yield f"{name}, line {number}", record


def _whole_text(name: str, stream: BufferedReader) -> tuple[str, object]:
    """Return (where, record) of a .txt file that is one document."""
    lines = []
    size_bytes = 0
    for line in _lines(name, stream):
        lines.append(line)
        size_bytes += len(line)
        if size_bytes > LARGEST_DOCUMENT_BYTES:
            raise InputError(
                f"{name}: more than {LARGEST_DOCUMENT_BYTES:,} bytes. Of several .txt files, each is one document. To "
                "split them at blank lines, join them into one file and give that."
            )
    return name, _text_record(lines)


def _text_record(lines: list[bytes]) -> object:
    try:
        return {"text": b"".join(lines).decode().replace("\r\n", "\n").removesuffix("\n")}
    except UnicodeDecodeError as error:
        return not_utf8(error)


def _paragraph_records(name: str, stream: BufferedReader) -> Records:
    lines = []
    size_bytes = 0
    for number, line in enumerate(chain(_lines(name, stream), [b""]), start=1):  # a blank line ends the last document
        if NOT_BLANK.search(line.decode(errors="replace")):  # U+FFFD, for what is not UTF-8, is not blank
            lines.append(line)
            size_bytes += len(line)
            if size_bytes > LARGEST_DOCUMENT_BYTES:
                raise InputError(
                    f"{name}, line {number - len(lines) + 1}: no blank line in {size_bytes:,} bytes. Documents of a "
                    ".txt file are separated by blank lines. Add them, or give a .jsonl file with one document a line."
                )
        elif lines:
            yield f"{name}, line {number - len(lines)}", _text_record(lines)
            lines = []
            size_bytes = 0


def _array_records(name: str, stream: BufferedReader) -> Records:
    scanner = JsonScanner(stream, LARGEST_DOCUMENT_BYTES)
    number = 0
    try:
        for number, record in enumerate(scanner.items(), start=1):
            yield f"{name}, item {number}", record
        if scanner.peek():
            raise ValueError("something follows its end")
    except ValueError as error:  # never skipped, because the next record cannot be found
        advice = f"{ANOTHER_ENCODING}." if scanner.has_undecoded() else "Repair the file."
        raise InputError(f"{name}: the array is malformed after item {number} ({error}). {advice}") from None


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

    def has_undecoded(self) -> bool:
        """Whether the text around the current place has bytes that are not UTF-8."""
        return re.search("[\udc80-\udcff]", self._text) is not None

    def _read_more(self) -> bool:
        """Read more text; return False at the end of the stream.

        At least as much is read as is still unused, so that reading a long value takes linear time.
        """
        unused = len(self._text) - self._at
        if unused > self._largest_value_bytes:
            raise ValueError(f"a value of more than {self._largest_value_bytes:,} characters")
        _check_values(self._text)
        chunk = self._stream.read(max(READ_BYTES, unused))
        self._ended = not chunk
        self._text = self._text[self._at :] + self._decode(chunk, final=self._ended)
        self._at = 0
        return not self._ended
