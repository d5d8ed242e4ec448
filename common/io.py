"""Small JSON files: written whole or not at all, and read back."""

import errno
import json
import os
import socket
from contextlib import suppress
from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins that Git LFS has not fetched
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # errno of an OSError: the disk, or this user's share of it, is full


def write_json(path: Path, content, durable: bool = False) -> None:
    """Write ``content`` to ``path`` as JSON, so that the file there is always whole: the old one or the new one.

    Args:
        durable: also wait until the content is on the disk, so that it survives a crash of the machine.

    Raises:
        OSError: the file cannot be written, for example because the disk is full. ``path`` is as it was before.
    """
    # Several machines may write at the same time, and two of them may have the same name.
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
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
    """Add a line of JSON for each of ``entries`` to ``path``: all of them, or none if the disk is full.

    If the last line of the file is incomplete, because an earlier process was killed while it wrote, a line break is
    added to it first. ``read_lines`` then skips that line only.

    Raises:
        OSError: the lines cannot be written. ``path`` is as it was before.
    """
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    with open(path, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        last_line_incomplete = size > 0 and file.read(1) != b"\n"
        if last_line_incomplete:
            lines = "\n" + lines
        remaining = memoryview(lines.encode(errors="backslashreplace"))
        try:
            while remaining:
                written = file.write(remaining)  # unbuffered: may be less than all
                remaining = remaining[written:]
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def read_lines(path: Path) -> list[dict]:
    """Return the objects of a .jsonl file, one a line; [] if there is no file.

    A line that is not a JSON object is skipped: a process that was killed while it wrote leaves half a line.
    """
    if not path.exists():
        return []
    entries = []
    # Not splitlines(): it also splits at U+0085, U+2028 and U+2029, which JSON text may contain.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entries.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return entries
