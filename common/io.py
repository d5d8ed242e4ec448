"""Small JSON files: written whole or not at all, and read back."""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path


def read_lines(path: Path) -> list[dict]:
    """Return the whole lines of a .jsonl file; a kill may have cut one off."""
    found = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):  # not splitlines: JSON holds U+0085, U+2028 and U+2029 as they are
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def write_json(path: Path, content, durable: bool = False) -> None:
    """Write ``content`` so that ``path`` is always whole: the old one or the new one. ``durable``: through a crash."""
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.partial")  # machines may write at once
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def append_lines(path: Path, entries: list[dict]) -> None:
    """Add a line of JSON for each of ``entries``, all or none: where they do not fit the disk, ``path`` is as before.

    Half a line, as a kill in the middle of this leaves, is ended first.
    """
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    with open(path, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        cut_off = size > 0 and file.read(1) != b"\n"
        left = memoryview(("\n" * cut_off + lines).encode(errors="backslashreplace"))
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise
