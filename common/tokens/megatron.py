"""One pair of token files on disk, Megatron's or PaddleNLP's: memory-mapped, and checked against its index and sidecar.

``.idx``, little-endian: header, int32 sizes (sequences,), int64 byte pointers (sequences,), int64 document marks
(documents + 1,): document i is the sequences marks[i] to marks[i + 1]. The sequences lie in ``.bin`` one after the
other. The older pair is ``_ids.npy`` and ``_idx.npz``. All is read in chunks and checked before it is trusted: a wrong
index would train on the wrong tokens.

Source: ``IndexedDataset`` in https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/datasets/indexed_dataset.py
and ``MMapIndexedDataset``, ``CompatibleIndexedDataset`` in
https://github.com/PaddlePaddle/PaddleNLP/blob/develop/paddlenlp/data/indexed_dataset.py
"""

import json
import mmap
import os
import struct
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.console import InputError, say

CHUNK_TOKENS = 4_000_000  # to go through all tokens: at most 32 MB at once


@dataclass(frozen=True)
class StoredArray:
    """Numbers that lie one after the other in a file: a slice [start:stop] is read, ``mapped`` maps them all."""

    path: str
    dtype: np.dtype
    offset: int  # bytes
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, window: slice) -> np.ndarray:
        start, stop, _ = window.indices(self.length)
        offset = self.offset + start * self.dtype.itemsize
        numbers = np.fromfile(self.path, self.dtype, max(0, stop - start), offset=offset)
        if len(numbers) < stop - start:
            raise InputError(f"{self.path}: became shorter while it was read. Start again when nothing writes to it.")
        return numbers

    def mapped(self) -> np.ndarray:
        """Return all numbers as a read-only memory map."""
        if self.length == 0:  # an empty file cannot be mapped
            return np.zeros(0, self.dtype)
        with open(self.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):  # not on Windows
            # Rows are shuffled, so reading ahead is waste: measured on a 2 GB file, 5,000 rows of 512 tokens not yet in
            # memory took 2.0 s with it and 0.4 s without, and mapped 307 MB against 25 MB.
            mapped.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(mapped, self.dtype, self.length, self.offset)


class JoinedTokens:
    """The tokens of pairs end to end: ``len``, ``dtype``, and slices [start:stop] of the memory maps, as arrays.

    Pickled as file names, not as content, so that a worker process that is spawned maps the files anew.
    """

    def __init__(self, parts: list[StoredArray]):
        self.parts = [part for part in parts if len(part)] or parts[:1]
        self.dtype = self.parts[0].dtype
        self.starts = [0, *np.cumsum([len(part) for part in self.parts], dtype=np.int64).tolist()]
        self.maps = [part.mapped() for part in self.parts]

    def __reduce__(self):
        return JoinedTokens, (self.parts,)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, window: slice) -> np.ndarray:
        return self._gather(self.maps, window)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) by plain reads. For going through all: mapped pages would fill the memory."""
        return self._gather(self.parts, slice(start, stop))

    def _gather(self, parts: list[np.ndarray] | list[StoredArray], window: slice) -> np.ndarray:
        start, stop, step = window.indices(len(self))
        if step != 1:
            raise ValueError(f"step {step}: tokens are taken in runs")
        pieces, part = [], bisect_right(self.starts, start) - 1
        while start < stop:
            end = min(stop, self.starts[part + 1])
            pieces.append(parts[part][start - self.starts[part] : end - self.starts[part]])
            start, part = end, part + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, self.dtype), *pieces])


MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document marks
DTYPES = {  # codes 9 and 10 are PaddleNLP's
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64,
    6: np.float64, 7: np.float32, 8: np.uint16, 9: np.uint32, 10: np.uint64,
}  # fmt: skip
CHUNK = 1_000_000  # numbers read at once: 8 MB at most


class TokenIndex(NamedTuple):
    """A checked index. ``document_starts``: where each document starts, and the end, in tokens, (documents + 1,)."""

    dtype: np.dtype  # of a token
    sizes: StoredArray | np.ndarray  # int32 tokens of each sequence, (sequences,)
    document_marks: StoredArray | np.ndarray  # int64, the first sequence of each document, and the end
    document_starts: np.ndarray  # int64


def write_index(path: str, sizes: np.ndarray, dtype: np.dtype, document_marks: np.ndarray | None = None) -> None:
    """Write the ``.idx`` of sequences of ``sizes`` tokens. Pointers are int64 all the way: past 2 GiB too.

    Args:
        document_marks: the first sequence of each document, and the end; by default a sequence is a document.

    Raises:
        InputError: a sequence is longer than an int32 can say, or the format has no code for ``dtype``.
    """
    code = next((code for code, known in DTYPES.items() if np.dtype(known) == dtype), None)
    if code is None:
        raise InputError(f"{path}: no code for tokens of {dtype}. Known are {', '.join(map(str, known_dtypes()))}.")
    if len(sizes) and sizes.max() > np.iinfo(np.int32).max:
        raise InputError(f"{path}: a document of {sizes.max():,} tokens; the format ends at 2,147,483,647. Split it.")
    marks = np.arange(len(sizes) + 1) if document_marks is None else document_marks
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, len(sizes), len(marks)))
        for first in range(0, len(sizes), CHUNK):
            file.write(sizes[first : first + CHUNK].astype("<i4").tobytes())
        pointer = 0
        for first in range(0, len(sizes), CHUNK):
            ends = pointer + np.cumsum(sizes[first : first + CHUNK], dtype=np.int64) * dtype.itemsize
            file.write(np.concatenate([[pointer], ends[:-1]]).astype("<i8").tobytes())
            pointer = int(ends[-1])
        for first in range(0, len(marks), CHUNK):
            file.write(marks[first : first + CHUNK].astype("<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())


def read_index(path: Path, bin_path: Path) -> TokenIndex:
    """Return the index of the pair ``path``, ``bin_path``; both exist.

    Raises:
        InputError: it is no index, cut off, or does not describe ``bin_path`` from its first byte to its last.
    """
    dtype, sequences, marks = _read_header(path, bin_path)
    sizes = StoredArray(str(path), np.dtype("<i4"), HEADER.size, sequences)
    pointers = StoredArray(str(path), np.dtype("<i8"), HEADER.size + 4 * sequences, sequences)
    document_marks = StoredArray(str(path), np.dtype("<i8"), HEADER.size + 12 * sequences, marks)
    bin_bytes, tokens = bin_path.stat().st_size, _count_tokens(path, sizes)
    if bin_bytes != tokens * dtype.itemsize:
        raise InputError(
            f"{bin_path}: {bin_bytes:,} bytes, but {path.name} describes {tokens * dtype.itemsize:,} ({tokens:,} "
            f"tokens of {dtype}). It is cut off, or the two do not belong together: fetch both again."
        )
    starts = _sequence_starts(sizes)
    _check_pointers(path, pointers, starts, dtype.itemsize)
    return TokenIndex(dtype, sizes, document_marks, _document_starts(path, starts, document_marks))


def read_legacy_index(path: Path, ids: np.ndarray) -> TokenIndex:
    """Return the index ``path``, an ``_idx.npz`` with ``lens`` and ``docs``, of the tokens ``ids``.

    Raises:
        InputError: it is no such archive, or does not describe ``ids`` from the first token to the last.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            sizes, document_marks = np.asarray(archive["lens"]), np.asarray(archive["docs"])  # damaged, they are bytes
    except Exception as error:  # damage shows as any of zipfile's, zlib's and NumPy's errors
        raise InputError(f"{path}: not an archive of the arrays lens and docs ({error}). Fetch it again.") from None
    rows = all(array.ndim == 1 and array.dtype.kind in "iu" for array in (sizes, document_marks))
    if not rows or len(document_marks) == 0:
        raise InputError(f"{path}: lens and docs must be rows of integers, docs beginning with 0. Fetch it again.")
    sizes, document_marks = sizes.astype(np.int64), document_marks.astype(np.int64)
    tokens = _count_tokens(path, sizes)
    if tokens != len(ids):
        raise InputError(
            f"{path}: describes {tokens:,} tokens, but the _ids.npy beside it holds {len(ids):,}. One of them is cut "
            "off, or the two do not belong together: fetch both again."
        )
    return TokenIndex(ids.dtype, sizes, document_marks, _document_starts(path, _sequence_starts(sizes), document_marks))


def known_dtypes() -> list[np.dtype]:
    """Return the dtypes that a token may have, in the order of their codes."""
    return [np.dtype(known) for known in DTYPES.values()]


def _read_header(path: Path, bin_path: Path) -> tuple[np.dtype, int, int]:
    """Return dtype, number of sequences and number of document marks, all in keeping with the size of the file."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file, bin_path.open("rb") as bin_file:
        header, bin_begins = file.read(HEADER.size), bin_file.read(len(MAGIC))
    if header[:6] == b"TNTIDX":
        raise InputError(f"{path}: fairseq's format (TNTIDX), which is not read. Write it anew with --data_impl mmap.")
    if len(header) < HEADER.size or header[:9] != MAGIC:
        swapped = bin_begins == MAGIC
        raise InputError(
            f"{path}: not a token store index (it does not begin with MMIDIDX). "
            + (f"{bin_path.name} is one: the names are swapped, rename the two." if swapped else "Give another.")
        )
    _, version, code, sequences, marks = HEADER.unpack(header)
    if version == 1 << 56:
        raise InputError(f"{path}: written in big-endian byte order. Write it again in little-endian.")
    if version != 1 or code not in DTYPES:
        raise InputError(
            f"{path}: version {version}, dtype code {code}; known are version 1 and codes 1 to 10. Convert it."
        )
    expected = HEADER.size + 12 * sequences + 8 * marks  # Python's integers: no overflow
    if file_bytes not in (expected, expected + sequences) or marks == 0:
        raise InputError(
            f"{path}: {file_bytes:,} bytes, but its header ({sequences:,} sequences, {marks:,} document marks) needs "
            f"{expected:,}, and a mark at least. It is cut off or damaged: fetch it again."
        )
    if file_bytes > expected:
        say(f"note: {path} is multimodal: the mode of its sequences is not used, all are trained as text")
    return np.dtype(DTYPES[code]), sequences, marks


def _count_tokens(path: Path, sizes: StoredArray | np.ndarray) -> int:
    tokens = 0
    for first in range(0, len(sizes), CHUNK):
        chunk = sizes[first : first + CHUNK]
        if chunk.min() < 0 or chunk.max() > np.iinfo(np.int32).max:
            raise InputError(
                f"{path}: negative sizes, or beyond an int32: from {chunk.min():,} to {chunk.max():,} tokens in a "
                "sequence. It is damaged, or in another byte order: fetch it again."
            )
        tokens += int(chunk.sum(dtype=np.int64))
    return tokens


def _sequence_starts(sizes: StoredArray | np.ndarray) -> np.ndarray:
    """Return where each sequence starts, and the end, in tokens, int64, (sequences + 1,)."""
    starts = np.zeros(len(sizes) + 1, dtype=np.int64)
    for first in range(0, len(sizes), CHUNK):
        ends = starts[first + 1 : first + 1 + CHUNK]
        np.cumsum(sizes[first : first + CHUNK], dtype=np.int64, out=ends)
        ends += starts[first]
    return starts


def _check_pointers(path: Path, pointers: StoredArray, starts: np.ndarray, itemsize: int) -> None:
    """Raise InputError unless every sequence begins where the one before it ends."""
    for first in range(0, len(pointers), CHUNK):
        found = pointers[first : first + CHUNK]
        expected = starts[first : first + len(found)] * itemsize
        if np.array_equal(found, expected):
            continue
        wrong = int(np.argmax(found != expected))
        at, right = int(found[wrong]), int(expected[wrong])
        if at < right and (right - at) % 2**32 == 0:
            reason = "the pointers wrapped at 2 GiB, as PaddleNLP's merge.py writes them. Merge with data/prepare.py"
        elif at < 0:
            reason = "a negative pointer. It is damaged: fetch it again"
        else:
            fault = "overlaps the one before it" if at < right else "leaves a gap"
            reason = f"it {fault}. Write the pair again, one sequence after the other"
        raise InputError(f"{path}: sequence {first + wrong:,} begins at byte {at:,}, not at {right:,}: {reason}.")


def _document_starts(path: Path, starts: np.ndarray, marks: StoredArray | np.ndarray) -> np.ndarray:
    """Return where each document starts, and the end, in tokens; check that documents cover all sequences in order."""
    firsts = range(0, len(marks), CHUNK)
    if len(marks) == len(starts) and all(_counts_up(marks[first : first + CHUNK], first) for first in firsts):
        return starts  # a sequence is a document, as most have it
    sequences, last = len(starts) - 1, 0
    result = np.empty(len(marks), dtype=np.int64)
    for first in firsts:
        chunk = marks[first : first + CHUNK]
        inside = chunk.min() >= 0 and chunk.max() <= sequences
        if not inside or chunk[0] < last or (chunk[1:] < chunk[:-1]).any() or (first == 0 and chunk[0] != 0):
            raise InputError(
                f"{path}: document marks that do not rise from 0 to {sequences:,}, its number of sequences (among "
                f"marks {first:,} to {first + len(chunk):,}). It is damaged: fetch it again."
            )
        result[first : first + len(chunk)] = starts[chunk]
        last = int(chunk[-1])
    if last != sequences:
        raise InputError(
            f"{path}: its documents end at sequence {last:,} of {sequences:,}: end_document() was not called for the "
            "last. Write the pair again."
        )
    return result


def _counts_up(chunk: np.ndarray, first: int) -> bool:
    return np.array_equal(chunk, np.arange(first, first + len(chunk)))


PAIR, LEGACY_PAIR = (".bin", ".idx"), ("_ids.npy", "_idx.npz")  # tokens, index
LARGEST_SIDECAR_BYTES = 64 * 2**20  # a larger .json is somebody's text


@dataclass(frozen=True)
class TokenPair:
    """One pair of files on disk, checked, and what is known of it. ``sidecar`` is empty for another writer's pair."""

    prefix: str
    files: tuple[Path, Path]  # tokens, index
    tokens: StoredArray
    sizes: StoredArray | np.ndarray  # tokens of each sequence, (sequences,)
    document_marks: StoredArray | np.ndarray  # the first sequence of each document, and the end, (documents + 1,)
    sidecar: dict

    @property
    def documents(self) -> int:
        return len(self.document_marks) - 1


def find_pairs(given: str) -> list[tuple[str, tuple[str, str]]]:
    """Return (prefix, suffixes) of every pair that ``given`` names: a prefix, one file of a pair, or a folder."""
    for suffixes in (PAIR, LEGACY_PAIR):
        for suffix in suffixes:
            if given.endswith(suffix):
                return [(given.removesuffix(suffix), suffixes)]
    for suffixes in (PAIR, LEGACY_PAIR):
        if any(Path(given + suffix).exists() for suffix in suffixes):
            return [(given, suffixes)]
    if not Path(given).is_dir():
        return [(given, PAIR)]
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(map(str, Path(given).iterdir())):
        suffixes = next((known for known in (PAIR, LEGACY_PAIR) if path.endswith(known)), None)
        if suffixes is None:
            continue
        if ".partial" in Path(path).name:
            say(f"note: {path} is not read: it is being written, or was left by an interrupted write")
            continue
        prefix = next(path.removesuffix(suffix) for suffix in suffixes if path.endswith(suffix))
        if found.setdefault(prefix, suffixes) != suffixes:
            raise InputError(
                f"{prefix}: lies there as .bin and as _ids.npy; its documents would count twice. Move one."
            )
    if not found:
        raise InputError(f"{given}: a folder without token stores (.bin and .idx, or _ids.npy and _idx.npz).")
    return sorted(found.items())


def open_pair(prefix: str, suffixes: tuple[str, str]) -> tuple[TokenPair, np.ndarray]:
    """Return the pair ``prefix`` and its document starts, int64, (documents + 1,)."""
    tokens_path, index_path = (Path(prefix + suffix) for suffix in suffixes)
    for path in (tokens_path, index_path):
        if not path.is_file():
            raise InputError(f"{path}: no such file. A token store is a pair of {tokens_path.name}, {index_path.name}.")
    if suffixes == PAIR:
        index = read_index(index_path, tokens_path)
        tokens = StoredArray(str(tokens_path), index.dtype, 0, int(index.document_starts[-1]))
    else:
        ids = map_row(tokens_path)
        if ids.dtype not in known_dtypes():
            raise InputError(f"{tokens_path}: holds {ids.dtype}, no token ids. Give another.")
        index = read_legacy_index(index_path, ids)
        tokens = StoredArray(str(tokens_path), ids.dtype, ids.offset, len(ids))
    if Path(prefix + ".lsm").exists():
        say(f"note: {prefix}.lsm, PaddleNLP's loss mask, is not used: every token is trained")
    sidecar = read_sidecar(Path(prefix + ".json"), len(index.document_marks) - 1, len(tokens))
    pair = TokenPair(prefix, (tokens_path, index_path), tokens, index.sizes, index.document_marks, sidecar)
    return pair, index.document_starts


def read_sidecar(path: Path, documents: int, tokens: int) -> dict:
    """Return the sidecar of a pair that holds so many documents and tokens; {} where there is none."""
    if not path.exists():
        return {}
    try:
        if path.stat().st_size > LARGEST_SIDECAR_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(sidecar, dict) or not isinstance(sidecar.get("tokenizer", {}), dict):
            raise ValueError("no record of counts and tokenizer")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not the sidecar of a token store ({error}). If it is a text of yours, move it away from the "
            "pair; if it is damaged, tokenize the text again."
        ) from None
    counts = sidecar.get("documents", documents), sidecar.get("tokens", tokens)
    if counts != (documents, tokens):
        raise InputError(
            f"{path}: speaks of {counts[0]} documents and {counts[1]} tokens, but the pair beside it holds "
            f"{documents:,} and {tokens:,}: it is of another pair. Fetch all files of one again."
        )
    return sidecar


def map_row(path: Path) -> np.memmap:
    """Return a ``.npy`` file of one row, memory-mapped."""
    try:
        row = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # damage shows as any of several errors
        raise InputError(f"{path}: not an array that can be mapped ({error}). Fetch or write it again.") from None
    if row.ndim != 1:
        raise InputError(f"{path}: of shape {row.shape}, where one row is due. Fetch or write it again.")
    return row
