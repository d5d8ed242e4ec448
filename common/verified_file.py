"""One file of a hub -> one local file: resumed where it broke off, compared with its sha256, recognised next time."""

import hashlib
import shutil
from pathlib import Path

from tqdm import tqdm

from common.hub_files import HubFile
from common.messages import InputError, is_main_process, say
from common.remote_file import FileChanged, RemoteFile

CHUNK_BYTES = 1 << 20
SPARE_DISK_BYTES = 1 << 28  # left free beside what is written


def is_here(target: Path, announced: str | None, verify: bool = True) -> bool:
    """Whether ``target`` has the sha256 ``announced``, or lies there as it was written (by its TARGET.sha256).

    ``verify=False``: a file with a TARGET.sha256 is not read. False also for one that was altered since, which is said.

    Raises:
        InputError: a file of somebody else's making is there.
    """
    if not target.exists():
        return False
    sidecar = sidecar_of(target)
    recorded = sidecar.read_text(encoding="utf-8").split()[0] if sidecar.exists() else None
    if recorded is not None and not verify:
        return True
    with target.open("rb") as stream:
        found = copy(stream, None, "verifying", target, target.stat().st_size).hexdigest()
    if found == announced:
        _write_sidecar(target, found)
    elif recorded is None:
        raise InputError(
            f"{target}: a file of this name is there and was not fetched by this command (sha256 {found}, announced is "
            f"{announced or 'none'}). Give it with --data as it is, or move it away and run this again."
        )
    elif found != recorded:
        say(f"{target}: was altered since it was fetched (sha256 {found}, not {recorded})")
    elif announced is not None:
        say(f"{target}: the hub has another version by now (sha256 {announced}). Delete this one to fetch that.")
    return found in (announced, recorded)


def fetch_file(file: HubFile, target: Path) -> None:
    """Write ``target`` and TARGET.sha256, going on from the TARGET.part that an interrupted download left.

    A file that a cache holds is copied.

    Raises:
        InputError: the server stays away (what has come is kept), or two downloads do not have the announced sha256.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for once_more in (True, False):
        try:
            digest = _fetch_rest(file, target)
        except FileChanged as error:
            problem = str(error)
        except OSError as error:  # of the disk: what goes wrong on the network ends in InputError
            raise InputError(f"{part_of(target)}: cannot be written ({error}). Run this again to go on.") from None
        else:
            if file.sha256 in (None, digest.hexdigest()):
                return finish(target, digest)
            problem = f"{file.url}: its sha256 is {digest.hexdigest()}, announced is {file.sha256}."
        part_of(target).unlink()
        if not once_more:
            raise InputError(f"{problem} Nothing was kept. Try again later, or through another network.")
        say(f"{problem} Fetching it from the start.")


def _fetch_rest(file: HubFile, target: Path):
    """Append to the part of ``target`` what is missing of it (all, from a cache); return the digest of the whole."""
    part, version = part_of(target), target.with_name(target.name + ".part.version")
    if file.local is not None:
        with file.open() as cached, part.open("wb") as out:
            return copy(cached, out, "copying", target, file.size_bytes)
    begun = None
    if file.sha256 is None and size_of(part) and version.exists():  # the server's word is all there is to compare
        begun = version.read_text(encoding="utf-8") or None
    if size_of(part) > file.size_bytes or (file.sha256 is None and begun is None):
        part.unlink(missing_ok=True)
    with part.open("a+b") as out, RemoteFile(file.url, file.size_bytes, file.headers, begun) as remote:
        if file.sha256 is None:
            version.write_text(remote.version or "", encoding="utf-8")
        out.seek(0)
        digest = copy(out, None, "going on with", target, size_of(part)) if size_of(part) else hashlib.sha256()
        remote.seek(size_of(part))
        copy(remote, out, "fetching", target, file.size_bytes, digest)
    version.unlink(missing_ok=True)
    return digest


def copy(source, out, what: str, target: Path, total_bytes: int, digest=None):
    """Copy ``source`` to ``out`` (None: nowhere) with a bar up to ``total_bytes``; return the sha256, or add to it."""
    digest = digest or hashlib.sha256()
    with tqdm(total=total_bytes, unit="B", unit_scale=True, disable=not is_main_process()) as bar:
        bar.set_description(f"{what} {target.name}")
        bar.update(source.tell() if out is not None else 0)
        while chunk := source.read(CHUNK_BYTES):
            if out is not None:
                out.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
    return digest


def finish(target: Path, digest) -> None:
    """Turn the part of ``target`` into ``target``, with its sha256 beside it."""
    _write_sidecar(target, digest.hexdigest())  # first: a file without one would not be taken for ours
    part_of(target).replace(target)
    say(f"{target}: {size_of(target):,} bytes, sha256 {digest.hexdigest()}")


def _write_sidecar(target: Path, sha256: str) -> None:
    sidecar_of(target).write_bytes(f"{sha256}  {target.name}\n".encode())  # the form of sha256sum


def sidecar_of(target: Path) -> Path:
    return target.with_name(target.name + ".sha256")


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Raise InputError if ``needed_bytes`` more do not fit on the disk of ``folder``."""
    free, needed = shutil.disk_usage(folder).free, needed_bytes + SPARE_DISK_BYTES
    if free < needed:
        raise InputError(
            f"{folder}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} needed. Make room, or choose another disk."
        )
