"""Fetch a corpus into a folder: resumable, and compared with the checksum that its hub publishes.

Both hubs' own downloaders resume, too. This one is used for all of them because it treats plain URLs the same way,
compares sha256 (huggingface_hub compares the size only), goes through hf-mirror.com without Xet storage, and has no
limit of an hour a file (modelscope 1.40 has).
"""

import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from common.files import DAMAGE, open_decompressed
from common.hub_data import IDENTIFIER, find_files
from common.hub_files import HubFile
from common.messages import InputError, say
from common.remote_file import RemoteFile
from common.verified_file import check_disk, copy, fetch_file, finish, is_here, part_of, sidecar_of, size_of

ARCHIVES = (".tar.bz2", ".tar.gz", ".tgz", ".tar.xz", ".tar")
PADDLENLP = "https://bj.bcebos.com/paddlenlp/models/transformers/llama/data/"


@dataclass(frozen=True)
class Corpus:
    about: str  # what is not marked otherwise is by the account of those who published or used it, not measured here
    licence: str
    identifier: str = ""  # on the hubs, as in common/hub_data.py
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
    if name not in CORPORA and not IDENTIFIER.fullmatch(name):
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
