"""Read a JSON array of any size item by item, in little memory."""

import codecs
import json
import re
from collections.abc import Iterator

READ_BYTES = 1 << 20
WHITE_SPACE = " \t\r\n"  # JSON's, less than Python's
SPACES = re.compile(f"[{WHITE_SPACE}]*")
# How far from the end of what was read a value may seem wrong, or whole, only because it goes on:
LONGEST_LITERAL = 12  # characters of \uXXXX\uXXXX
LONGEST_EXPONENT = 2  # characters of e- in 1e-5, which is a whole 1 before the 5 is read


class JsonScanner:
    """Reads the values of a JSON text one after the other, keeping only the one at hand in memory.

    Each value is parsed by the standard library, so an array's items are exactly what ``json.loads`` makes of them.
    (ijson's fast backend, measured with ijson 3.6, turns a lone surrogate such as ``"\\ud800"`` into ``"?"``.) Bytes
    that are not UTF-8 become lone surrogates (``surrogateescape``), which no text may hold.
    """

    def __init__(self, stream, largest_value_bytes: int):
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._parse = json.JSONDecoder().raw_decode
        self._largest_value_bytes = largest_value_bytes
        self._text = ""  # decoded, and not yet used from _at on
        self._at = 0
        self._ended = False  # the stream; what was read of it may still be in _text

    def items(self) -> Iterator[object]:
        """Yield the items of the array that comes next; raise ValueError where it is malformed or cut off."""
        separator = self.take("[")
        if self.peek() == "]":
            separator = self.take("]")
        while separator != "]":
            yield self.value()
            separator = self.take(",]")

    def names(self) -> Iterator[str]:
        """Yield the names in the object that comes next; the caller takes each value before the next name."""
        separator = self.take("{")
        if self.peek() == "}":
            separator = self.take("}")
        while separator != "}":
            name = self.value()
            if not isinstance(name, str):
                raise ValueError(f"{name!r} is no name of a field")
            self.take(":")
            yield name
            separator = self.take(",}")

    def value(self) -> object:
        """Return the value that comes next; raise ValueError if there is none, or it is cut off or too large."""
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
            self._read_on()

    def peek(self) -> str:
        """Return the next character that is not white space, without taking it; "" at the end."""
        while True:
            if (character := self._text[self._at : self._at + 1]) and character not in WHITE_SPACE:
                return character
            self._at = SPACES.match(self._text, self._at).end()
            if self._at == len(self._text) and not self._read_on():
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

    def _read_on(self) -> bool:
        """Read more, at least as much as is unused, so that a long value costs linear time; False at the end."""
        unused = len(self._text) - self._at
        if unused > self._largest_value_bytes:
            raise ValueError(f"a value of more than {self._largest_value_bytes:,} characters")
        chunk = self._stream.read(max(READ_BYTES, unused))
        self._ended = not chunk
        self._text = self._text[self._at :] + self._decode(chunk, final=self._ended)
        self._at = 0
        return not self._ended
