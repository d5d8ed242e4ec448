"""Download a corpus into a folder: resumable, and compared with the checksum that its hub publishes.

The downloaders of huggingface_hub, modelscope and fsspec are not used. docs/libraries.md says which of our promises
each of them breaks, and how this was measured.
"""

import hashlib
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from common.console import InputError, say
from common.corpus.corpora import CORPORA, Corpus
from common.corpus.formats import ARCHIVES, DAMAGE, open_decompressed
from common.corpus.hub_dataset import find_files
from common.corpus.transfer import FileChanged, HubFile, RemoteFile
from common.hub import DATA_SET_ID
from common.progress import Progress


def download(name: str, folder: Path, verify: bool = True) -> list[Path]:
    """Download a corpus of CORPORA, or the train split of a data set (``owner/name[:subset]``); return its files.

    A corpus of CORPORA that is one file goes into ``folder`` itself. Everything else gets its own folder in ``folder``.
    An interrupted download is continued. Beside every FILE is FILE.sha256, which ``sha256sum -c`` can check. An archive
    is unpacked and its files are returned; the archive may then be deleted. When all files are there, they are listed,
    and no hub is asked again until one is missing.

    Args:
        verify: compare the files that are already there with FILE.sha256, and download those that were altered again.
            False takes them as they are, whoever put them there.

    Raises:
        InputError: the name is unknown, no hub has it, the disk is too small, or a file is not the announced one.
    """
    if name in CORPORA:
        corpus = CORPORA[name]
    elif DATA_SET_ID.fullmatch(name):
        corpus = Corpus("a data set of the hubs", "see its page there", identifier=name)
    else:
        raise InputError(f"{name}: not one of {', '.join(CORPORA)}, nor a data set id like owner/name.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    home = _home(corpus, name, folder)
    with _one_at_a_time(folder):
        here = _already_here(corpus, home, _list_of(home, name), verify)
        if here:
            return here
        say(f"{name}: {corpus.about}. Licence: {corpus.licence}.")
        place, files = _at_urls(corpus.urls) if corpus.urls else find_files(corpus.identifier)
        targets = _targets(home, [file.path for file in files])
        missing = [
            (file, target)
            for file, target in zip(files, targets, strict=True)
            if not is_here(target, file.sha256, verify)
        ]
        say(f"{name}: {len(files)} files from {place}, {len(files) - len(missing)} of them already here")
        check_disk(folder, sum(max(0, file.size_bytes - size_of(part_of(target))) for file, target in missing))
        for file, target in missing:
            fetch_file(file, target)
        paths = []
        for target in targets:
            paths += unpack(target) if target.name.endswith(ARCHIVES) else [target]
        _write_list(_list_of(home, name), paths)
        return paths


def unpack(archive: Path) -> list[Path]:
    """Unpack the files of a tar archive into the archive's own folder; return them.

    Every file gets its bare name, so that no path in the archive can lead elsewhere. Links, devices and hidden files
    are left out, and a message names them. All streams of a compressed archive are read.

    Raises:
        InputError: the archive is damaged or cut off, two of its files have one name, or the disk is too small.
    """
    say(f"{archive}: unpacking")
    unpacked = []
    try:
        name = re.sub("tgz$", "tar.gz", archive.name)
        # tarfile's own mode "r|*" would stop after the first stream of a compressed archive.
        with open_decompressed(name, partial(archive.open, "rb")) as raw, tarfile.open(fileobj=raw, mode="r|") as tar:
            for member in tar:
                target = archive.parent / PurePosixPath(member.name.replace("\\", "/")).name
                if member.isdir():
                    continue
                if not member.isfile() or target.name.startswith("."):
                    say(f"{archive}: {member.name} is left out (a link, a device or a hidden file)")
                    continue
                if target in unpacked:
                    raise InputError(f"{archive}: holds two files called {target.name}. Unpack it by hand.")
                unpacked.append(target)
                if not is_here(target, announced=None):
                    check_disk(archive.parent, member.size)
                    with tar.extractfile(member) as stream, part_of(target).open("wb") as out:
                        digest = copy(stream, out, "unpacking", target, member.size)
                    finish(target, digest)
            _check_end(tar)
    except (tarfile.TarError, *DAMAGE) as error:
        raise InputError(f"{archive}: cannot be unpacked ({type(error).__name__}: {error}).") from None
    return unpacked


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ReadError unless only zeros follow, up to the end of the archive.

    An archive ends with two blocks of zeros. tarfile also stops, without an error, at a damaged header.
    """
    zeros = 0
    while chunk := tar.fileobj.read(tarfile.RECORDSIZE):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError("its files end at a damaged header, or another archive follows")
        zeros += len(chunk)
    if not zeros:
        raise tarfile.ReadError("it is cut off: the two blocks that end an archive are missing")


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let only one of the processes and machines that share ``folder`` download into it at a time."""
    lock = FileLock(folder / ".download.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is downloading into {folder}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _home(corpus: Corpus, name: str, folder: Path) -> Path:
    """Return the folder of a corpus. It is its own folder because many data sets have a file such as train.jsonl."""
    is_one_named_file = name in CORPORA and ":" in corpus.identifier  # its name is unique, so `folder` itself will do
    return folder if is_one_named_file else folder / re.sub("[/:]", "--", name)


def _list_of(home: Path, name: str) -> Path:
    """Return the file that lists the files of a corpus, one a line; it is written when all are there."""
    return home / f".{re.sub('[/:]', '--', name)}.files"


def _write_list(list_file: Path, paths: list[Path]) -> None:
    lines = "\n".join(path.relative_to(list_file.parent).as_posix() for path in paths)
    part_of(list_file).write_bytes(lines.encode())
    part_of(list_file).replace(list_file)


def _already_here(corpus: Corpus, home: Path, list_file: Path, verify: bool) -> list[Path]:
    """Return the files of a corpus if all are there, unaltered if ``verify``; otherwise []. No hub is asked."""
    names = _listed_names(list_file) if list_file.exists() else _names_without_list(corpus, home)
    targets = _targets(home, names)
    for target in targets:
        if not target.is_file() or (verify and not sidecar_of(target).exists()):
            return []
    if not targets or (verify and not all(is_here(target, None) for target in targets)):
        return []
    say(f"{', '.join(map(str, targets[:5]))}{', ...' * (len(targets) > 5)}: already here")
    return targets


def _listed_names(list_file: Path) -> list[str]:
    return list_file.read_bytes().decode().split("\n")


def _names_without_list(corpus: Corpus, home: Path) -> list[str]:
    """Return the names of a corpus's files as far as they are known without a list.

    There is no list if somebody put the files there, or if they were downloaded before lists were written. For an
    archive that was unpacked and deleted, the name is that of the archive without its suffix.
    """
    names = [_name_at(url) for url in corpus.urls]
    _, _, file = corpus.identifier.partition(":")
    if file:
        names.append(file)
    if any((home / name).exists() for name in names if name.endswith(ARCHIVES)):
        return []
    return [_without_suffix(name) for name in names]


def _without_suffix(name: str) -> str:
    for suffix in ARCHIVES:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def _name_at(url: str) -> str:
    return PurePosixPath(urlsplit(url).path).name


def _at_urls(urls: tuple[str, ...]) -> tuple[str, list[HubFile]]:
    """Return the host of ``urls``, and their files with the sizes that it states."""
    files = []
    for url in urls:
        with RemoteFile(url) as remote:
            files.append(HubFile(_name_at(url), remote.size_bytes, url))
    return urlsplit(urls[0]).hostname, files


def _targets(home: Path, paths: list[str]) -> list[Path]:
    """Return where the files ``paths`` of a repository go."""
    for path in paths:
        if home.resolve() not in (home / path).resolve().parents:
            raise InputError(f"{path!r} would lie outside {home}. Such a data set is not downloaded.")
    return [home / path for path in paths]


CHUNK_BYTES = 1 << 20
SPARE_DISK_BYTES = 1 << 28  # stays free after everything is written


def is_here(target: Path, announced: str | None, verify: bool = True) -> bool:
    """Return whether ``target`` has the sha256 ``announced``, or the one that TARGET.sha256 says it was written with.

    A file that was altered since it was written counts as missing, and a message says so.

    Args:
        announced: what the hub says; None if it says nothing.
        verify: False does not read a file that has a TARGET.sha256.

    Raises:
        InputError: there is such a file, but it was not written by this command and is not the announced one.
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
            f"{target}: a file of this name exists and was not downloaded by this command (its sha256 is {found}, "
            f"announced is {announced or 'none'}). Give it with --data as it is, or move it away and run this again."
        )
    elif found != recorded:
        say(f"{target}: was altered after it was downloaded (its sha256 is {found}, not {recorded})")
    elif announced is not None:
        say(f"{target}: the hub now has another version (sha256 {announced}). Delete this file to get it.")
    return found in (announced, recorded)


def fetch_file(file: HubFile, target: Path) -> None:
    """Write ``target`` and TARGET.sha256; continue from the TARGET.part that an interrupted download left.

    A file that is in a cache is copied.

    Raises:
        InputError: the server does not come back (what has arrived is kept), the disk cannot be written, or two
            downloads in a row do not have the announced sha256.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for is_last_attempt in (False, True):
        try:
            digest = _fetch_rest(file, target)
        except FileChanged as error:
            problem = str(error)
        except OSError as error:  # from the disk: network errors have become InputError
            raise InputError(
                f"{part_of(target)}: cannot be written ({error}). Run this again to continue from there."
            ) from None
        else:
            if file.sha256 in (None, digest.hexdigest()):
                finish(target, digest)
                return
            problem = f"{file.url}: its sha256 is {digest.hexdigest()}, announced is {file.sha256}."
        part_of(target).unlink()
        if is_last_attempt:
            raise InputError(f"{problem} Nothing was kept. Try again later, or through another network.")
        say(f"{problem} Downloading it again from the start.")


def _fetch_rest(file: HubFile, target: Path):
    """Append what is missing to the part of ``target``; return the sha256 of the whole. A cached file is copied."""
    part = part_of(target)
    version_file = target.with_name(target.name + ".part.version")
    if file.local is not None:
        with file.open() as cached, part.open("wb") as out:
            return copy(cached, out, "copying", target, file.size_bytes)
    version = None
    if file.sha256 is None:  # no checksum will be compared: a part is continued only if the server's version is known
        if size_of(part) and version_file.exists():
            version = version_file.read_text(encoding="utf-8") or None
        if version is None:
            part.unlink(missing_ok=True)
    if size_of(part) > file.size_bytes:
        part.unlink(missing_ok=True)
    with part.open("a+b") as out, RemoteFile(file.url, file.size_bytes, file.headers, version) as remote:
        if file.sha256 is None:
            version_file.write_text(remote.version or "", encoding="utf-8")
        out.seek(0)
        digest = copy(out, None, "continuing", target, size_of(part)) if size_of(part) else hashlib.sha256()
        remote.seek(size_of(part))
        copy(remote, out, "downloading", target, file.size_bytes, digest)
    version_file.unlink(missing_ok=True)
    return digest


def copy(source, out, what: str, target: Path, total_bytes: int, digest=None):
    """Copy ``source`` to ``out`` with a progress bar; return the sha256.

    Args:
        out: None only reads ``source``.
        what: what the bar says is being done with ``target``.
        total_bytes: the end of the bar.
        digest: the sha256 of what was copied before; None starts a new one.
    """
    if digest is None:
        digest = hashlib.sha256()
    with Progress(f"{what} {target.name}", total_bytes, "B", source.tell() if out is not None else 0) as bar:
        while chunk := source.read(CHUNK_BYTES):
            if out is not None:
                out.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
    return digest


def finish(target: Path, digest) -> None:
    """Rename the part of ``target`` to ``target``, and write its sha256 beside it."""
    _write_sidecar(target, digest.hexdigest())  # first: a file without one would not be recognized as downloaded
    part_of(target).replace(target)
    say(f"{target}: {size_of(target):,} bytes, sha256 {digest.hexdigest()}")


def _write_sidecar(target: Path, sha256: str) -> None:
    sidecar_of(target).write_bytes(f"{sha256}  {target.name}\n".encode())  # the format of sha256sum


def sidecar_of(target: Path) -> Path:
    return target.with_name(target.name + ".sha256")


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def size_of(path: Path) -> int:
    """Return the size of a file in bytes; 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Raise InputError if ``needed_bytes`` more do not fit on the disk of ``folder``."""
    free = shutil.disk_usage(folder).free
    needed = needed_bytes + SPARE_DISK_BYTES
    if free < needed:
        raise InputError(
            f"{folder}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} needed. Make room, or choose another disk."
        )
