"""Fetch a corpus into a folder: resumable, and compared with the checksum that its hub publishes.

Both hubs' own downloaders resume, too. This one is used for all of them because it treats plain URLs the same way,
compares sha256 (huggingface_hub compares the size only), goes through hf-mirror.com without Xet storage, and has no
limit of an hour a file (modelscope 1.40 has).
"""

import hashlib
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from filelock import FileLock, Timeout
from tqdm import tqdm

from common.console import InputError, is_main_process, say
from common.corpus.formats import DAMAGE, open_decompressed
from common.corpus.hub_dataset import find_files
from common.corpus.transfer import FileChanged, HubFile, RemoteFile
from common.hub import DATA_SET_ID

ARCHIVES = (".tar.bz2", ".tar.gz", ".tgz", ".tar.xz", ".tar")
PADDLENLP = "https://bj.bcebos.com/paddlenlp/models/transformers/llama/data/"


@dataclass(frozen=True)
class Corpus:
    about: str  # what is not marked otherwise is by the account of those who published or used it, not measured here
    licence: str
    identifier: str = ""  # on the hubs, as in common/corpus/hub_dataset.py
    urls: tuple[str, ...] = ()  # or anywhere else


CORPORA = {
    "wiki-zh": Corpus(
        "Chinese Wikipedia of 2024-08-20, simplified: about 1.44 million articles, 1.99 GB, one JSON array",
        "CC BY-SA (https://dumps.wikimedia.org/legal.html)",
        identifier="fjcanyue/wikipedia-zh-cn:wikipedia-zh-cn-20240820.json",
    ),
    "openwebtext": Corpus(
        "English web pages, about 8.0 million documents, about 24 GB in 80 parquet files",
        "CC0-1.0 for the collection; the pages belong to their authors (https://skylion007.github.io/OpenWebTextCorpus)",
        identifier="Skylion007/openwebtext",
    ),
    "openwebtext-100k": Corpus(
        "100,000 documents of OpenWebText2 as PaddleNLP's token files: ids of LLaMA's tokenizer, and of no other",
        "none stated by PaddleNLP (https://github.com/PaddlePaddle/PaddleNLP, llm/README.md)",
        urls=(PADDLENLP + "llama_openwebtext_100k.bin", PADDLENLP + "llama_openwebtext_100k.idx"),
    ),
    "seq-monkey": Corpus(
        "Mobvoi's general Chinese corpus, which happy-llm trains on: 13 million documents, about 10 GB packed",
        "Apache-2.0 (https://github.com/mobvoi/seq-monkey-data)",
        identifier="ddzhu123/seq-monkey:mobvoi_seq_monkey_general_open_corpus.jsonl.tar.bz2",
    ),
}


def download(name: str, folder: Path, verify: bool = True) -> list[Path]:
    """Fetch a corpus of CORPORA, or the train split of a data set (``owner/name[:subset]``), and return its files.

    The one file of a corpus of CORPORA goes into ``folder`` itself, anything else into a folder of its own in it. An
    interrupted download is continued. Beside every FILE lies FILE.sha256, which ``sha256sum -c`` reads. A file that is
    there already is read and compared with it, and fetched again if it was altered; ``verify=False`` takes it as it is,
    whoever put it there. An archive is unpacked, and its files are returned; it may be deleted then. Once all files are
    here they are listed, and no hub is asked again until one is missing.

    Raises:
        InputError: unknown name, no hub has it, the disk is too small, or what comes is not what the hub announces.
    """
    if name not in CORPORA and not DATA_SET_ID.fullmatch(name):
        raise InputError(f"{name}: not one of {', '.join(CORPORA)}, nor a data set id like owner/name.")
    corpus = CORPORA.get(name) or Corpus("a data set of the hubs", "see its page there", identifier=name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    home = _home(corpus, name, folder)
    with _only_one(folder):
        if here := _already_here(corpus, home, _list_of(home, name), verify):
            return here
        say(f"{name}: {corpus.about}. Licence: {corpus.licence}.")
        place, files = _at_urls(corpus.urls) if corpus.urls else find_files(corpus.identifier)
        targets = _targets(home, [file.path for file in files])
        missing = [(f, t) for f, t in zip(files, targets, strict=True) if not is_here(t, f.sha256, verify)]
        say(f"{name}: {len(files)} files from {place}, {len(files) - len(missing)} of them already here")
        check_disk(folder, sum(max(0, file.size_bytes - size_of(part_of(target))) for file, target in missing))
        for file, target in missing:
            fetch_file(file, target)
        paths = [path for t in targets for path in (unpack(t) if t.name.endswith(ARCHIVES) else [t])]
        _write_list(_list_of(home, name), paths)
        return paths


def unpack(archive: Path) -> list[Path]:
    """Unpack the files of a tar archive beside it, each under its bare name: no path in it can lead elsewhere.

    Links, devices and hidden files are left out, which is said. All streams of a compressed one are read.

    Raises:
        InputError: the archive is damaged or cut off, two files have one name, or the disk is too small.
    """
    say(f"{archive}: unpacking")
    unpacked = []
    try:
        name = re.sub("tgz$", "tar.gz", archive.name)
        # Not tarfile's own "r|*", which reads the first stream of a compressed archive and takes it for all.
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
    """Raise ReadError unless zeros follow the block at which tarfile stopped, to the end: it takes damage for one."""
    behind = 0
    while chunk := tar.fileobj.read(tarfile.RECORDSIZE):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError("its files end at a damaged header, or another archive follows")
        behind += len(chunk)
    if not behind:
        raise tarfile.ReadError("it is cut off: the two blocks that end an archive are not there")


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Let one of the processes and machines that share ``folder`` download into it at a time."""
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
    """Return the folder of a corpus: one of its own, as names like train.jsonl are not of one data set only."""
    alone = name in CORPORA and ":" in corpus.identifier  # has a name like no other, and has always been in `folder`
    return folder if alone else folder / re.sub("[/:]", "--", name)


def _list_of(home: Path, name: str) -> Path:
    """Return where the files of a corpus are listed, one a line, once all are here."""
    return home / f".{re.sub('[/:]', '--', name)}.files"


def _write_list(listed: Path, paths: list[Path]) -> None:
    lines = "\n".join(path.relative_to(listed.parent).as_posix() for path in paths)
    part_of(listed).write_bytes(lines.encode())
    part_of(listed).replace(listed)


def _already_here(corpus: Corpus, home: Path, listed: Path, verify: bool) -> list[Path]:
    """Return the files of a corpus if their names are known and all are here as they were fetched: no hub is asked."""
    names = listed.read_bytes().decode().split("\n") if listed.exists() else _names_without_list(corpus, home)
    targets = _targets(home, names)
    known = all(target.is_file() and (sidecar_of(target).exists() or not verify) for target in targets)
    if not targets or not known or (verify and not all(is_here(target, None) for target in targets)):
        return []
    say(f"{', '.join(map(str, targets[:5]))}{', ...' * (len(targets) > 5)}: already here")
    return targets


def _names_without_list(corpus: Corpus, home: Path) -> list[str]:
    """Return the names that are known of a corpus which was put here by other means, or before lists were written.

    Of an archive that was unpacked and deleted, this is the file that it is named after.
    """
    file = corpus.identifier.partition(":")[2]
    names = [PurePosixPath(urlsplit(url).path).name for url in corpus.urls] or ([file] if file else [])
    if any((home / name).exists() for name in names if name.endswith(ARCHIVES)):
        return []
    suffixes = [next((suffix for suffix in ARCHIVES if name.endswith(suffix)), "") for name in names]
    return [name.removesuffix(suffix) for name, suffix in zip(names, suffixes, strict=True)]


def _at_urls(urls: tuple[str, ...]) -> tuple[str, list[HubFile]]:
    files = []
    for url in urls:
        with RemoteFile(url) as remote:
            files.append(HubFile(PurePosixPath(urlsplit(url).path).name, remote.size_bytes, url))
    return urlsplit(urls[0]).hostname, files


def _targets(home: Path, paths: list[str]) -> list[Path]:
    """Return where the files of ``paths`` go."""
    for path in paths:
        if home.resolve() not in (home / path).resolve().parents:
            raise InputError(f"{path!r} would lie outside {home}. Such a data set is not downloaded.")
    return [home / path for path in paths]


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
