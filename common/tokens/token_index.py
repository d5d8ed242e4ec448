"""The index of a pair of token files, read and checked, and written: where each sequence and each document begins.

A ``.idx`` is little-endian:

    bytes           content
    9               the magic number MMIDIDX
    8, 1, 8, 8      version, code of the tokens' dtype, number of sequences, number of document marks
    4 x sequences   int32 sizes: the tokens of each sequence
    8 x sequences   int64 pointers: the byte of the .bin at which each sequence begins
    8 x marks       int64 document marks: the first sequence of each document, and the end

For example, sizes [2, 1, 3] and document marks [0, 2, 3] are two documents: the first has sequences 0 and 1, which are
tokens 0 to 2; the second has sequence 2, tokens 3 to 5. In most files each sequence is a document of its own.

An index is read in chunks and checked completely before it is used, because a wrong one would train on wrong tokens.

Source: as in ``megatron.py``.
"""

import mmap
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.console import InputError, say

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document marks
DTYPES = {  # codes 9 and 10 are PaddleNLP's
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64,
    6: np.float64, 7: np.float32, 8: np.uint16, 9: np.uint32, 10: np.uint64,
}  # fmt: skip
LARGEST_SIZE = np.iinfo(np.int32).max  # tokens of a sequence
SPARE_NUMBERS = 4096  # that an array of an index may have beyond one for each token: its header, empty documents
CHUNK = 1_000_000  # numbers of an index read at once: 8 MB at most


def known_dtypes() -> list[np.dtype]:
    """Return the dtypes that a token may have, in the order of their codes."""
    return [np.dtype(known) for known in DTYPES.values()]


def token_dtype(vocabulary_size: int) -> np.dtype:
    """Return the dtype of the tokens that we write: uint16 (2 bytes a token) if that holds the ids, else int32.

    ``vocabulary_size``: the largest id + 1.

    The limit is Megatron's, so that its files and ours are the same. Readers take the dtype from the index.
    """
    return np.dtype(np.uint16 if vocabulary_size < 65_500 else np.int32)


@dataclass(frozen=True)
class StoredArray:
    """A row of numbers inside a file. A slice [start:stop] reads them from the disk; ``mapped`` maps all of them."""

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
            raise InputError(
                f"{self.path}: became shorter while it was read. Start again when no other process writes to it."
            )
        return numbers

    def mapped(self) -> np.ndarray:
        """Return all numbers as a read-only memory map."""
        if self.length == 0:  # an empty file cannot be mapped
            return np.zeros(0, self.dtype)
        with open(self.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):  # not on Windows
            # Rows are shuffled, so reading ahead is wasted. Measured on a 2 GB file with 5,000 rows of 512 tokens that
            # were not in memory: 2.0 s and 307 MB mapped with reading ahead, 0.4 s and 25 MB without.
            mapped.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(mapped, self.dtype, self.length, self.offset)


class TokenIndex(NamedTuple):
    """An index that was read and checked."""

    dtype: np.dtype  # of a token
    sizes: StoredArray | np.ndarray  # int32, the tokens of each sequence, (sequences,)
    document_marks: (
        StoredArray | np.ndarray
    )  # int64, the first sequence of each document, and the end, (documents + 1,)
    document_starts: np.ndarray  # int64, the first token of each document, and the end, (documents + 1,)


def read_index(path: Path, bin_path: Path) -> TokenIndex:
    """Return the index of the pair ``path``, ``bin_path``; both exist.

    Raises:
        InputError: it is not an index, is cut off, or does not describe ``bin_path`` from its first byte to its last.
    """
    dtype, sequences, marks = _read_header(path, bin_path)
    sizes = StoredArray(str(path), np.dtype("<i4"), HEADER.size, sequences)
    pointers = StoredArray(str(path), np.dtype("<i8"), HEADER.size + 4 * sequences, sequences)
    document_marks = StoredArray(str(path), np.dtype("<i8"), HEADER.size + 12 * sequences, marks)
    bin_bytes = bin_path.stat().st_size
    tokens = _count_tokens(path, sizes)
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
        InputError: it is not such an archive, or does not describe ``ids`` from the first token to the last.
    """
    _check_sizes(path, len(ids))
    try:
        with np.load(path, allow_pickle=False) as archive:
            # A damaged archive gives bytes instead of arrays, hence asarray.
            sizes, document_marks = np.asarray(archive["lens"]), np.asarray(archive["docs"])
    except Exception as error:  # damage shows as any error of zipfile, zlib or NumPy
        raise InputError(f"{path}: not an archive of the arrays lens and docs ({error}). Fetch it again.") from None
    are_rows = all(array.ndim == 1 and array.dtype.kind in "iu" for array in (sizes, document_marks))
    if not are_rows or len(document_marks) == 0:
        raise InputError(f"{path}: lens and docs must be rows of integers, docs beginning with 0. Fetch it again.")
    sizes, document_marks = sizes.astype(np.int64), document_marks.astype(np.int64)
    tokens = _count_tokens(path, sizes)
    if tokens != len(ids):
        raise InputError(
            f"{path}: describes {tokens:,} tokens, but the _ids.npy beside it holds {len(ids):,}. One of them is cut "
            "off, or the two do not belong together: fetch both again."
        )
    return TokenIndex(ids.dtype, sizes, document_marks, _document_starts(path, _sequence_starts(sizes), document_marks))


def _check_sizes(path: Path, tokens: int) -> None:
    """Raise InputError if the arrays of an ``_idx.npz`` are larger, unpacked, than an index of ``tokens`` can be.

    A few megabytes of zeros unpack to gigabytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            largest = max((member.file_size for member in archive.infolist()), default=0)
    except Exception as error:  # damage shows as any of several errors
        raise InputError(f"{path}: not an archive of the arrays lens and docs ({error}). Fetch it again.") from None
    limit = 8 * (tokens + SPARE_NUMBERS)
    if largest > limit:
        raise InputError(
            f"{path}: {largest:,} bytes in an array, unpacked; an index of {tokens:,} tokens has {limit:,} at most. "
            "It is damaged, or does not belong to the _ids.npy beside it: fetch both again."
        )


def _read_header(path: Path, bin_path: Path) -> tuple[np.dtype, int, int]:
    """Return the dtype of a token, the number of sequences and the number of document marks.

    The numbers are checked against the size of the file, so that a damaged header cannot ask for terabytes of memory.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file, bin_path.open("rb") as bin_file:
        header, bin_begins = file.read(HEADER.size), bin_file.read(len(MAGIC))
    if header[:6] == b"TNTIDX":
        raise InputError(
            f"{path}: in fairseq's format (TNTIDX), which is not supported. Write it again with --data_impl mmap."
        )
    if len(header) < HEADER.size or header[:9] != MAGIC:
        if bin_begins == MAGIC:
            fix = f"{bin_path.name} is one: the names are swapped, rename the two files."
        else:
            fix = "Give another file."
        raise InputError(f"{path}: not a token store index (it does not begin with MMIDIDX). {fix}")
    _, version, code, sequences, marks = HEADER.unpack(header)
    if version == 1 << 56:  # a 1 with its bytes in reverse order
        raise InputError(f"{path}: written in big-endian byte order. Write it again in little-endian.")
    if version != 1 or code not in DTYPES:
        raise InputError(
            f"{path}: version {version}, dtype code {code}; known are version 1 and codes 1 to 10. Convert it."
        )
    expected = HEADER.size + 12 * sequences + 8 * marks  # Python's integers: no overflow
    if file_bytes not in (expected, expected + sequences) or marks == 0:
        raise InputError(
            f"{path}: {file_bytes:,} bytes, but its header ({sequences:,} sequences, {marks:,} document marks) needs "
            f"{expected:,}, and at least one mark. It is cut off or damaged: fetch it again."
        )
    if file_bytes > expected:
        say(f"note: {path} is multimodal: the modes of its sequences are not used, all are trained on as text")
    return np.dtype(DTYPES[code]), sequences, marks


def _count_tokens(path: Path, sizes: StoredArray | np.ndarray) -> int:
    """Return the sum of ``sizes``; raise InputError if one of them is negative or larger than an int32."""
    tokens = 0
    for first in range(0, len(sizes), CHUNK):
        chunk = sizes[first : first + CHUNK]
        if chunk.min() < 0 or chunk.max() > LARGEST_SIZE:
            raise InputError(
                f"{path}: negative sizes, or sizes beyond {LARGEST_SIZE:,}: from {chunk.min():,} to {chunk.max():,} "
                "tokens in a sequence. It is damaged, or in another byte order: fetch it again."
            )
        tokens += int(chunk.sum(dtype=np.int64))
    return tokens


def _sequence_starts(sizes: StoredArray | np.ndarray) -> np.ndarray:
    """Return the first token of each sequence, and the end: sizes [3, 2] -> [0, 3, 5]; int64, (sequences + 1,)."""
    starts = np.zeros(len(sizes) + 1, dtype=np.int64)
    for first in range(0, len(sizes), CHUNK):
        ends = starts[first + 1 : first + 1 + CHUNK]
        np.cumsum(sizes[first : first + CHUNK], dtype=np.int64, out=ends)
        ends += starts[first]
    return starts


def _check_pointers(path: Path, pointers: StoredArray, starts: np.ndarray, itemsize: int) -> None:
    """Raise InputError unless every sequence begins at the byte where the one before it ends."""
    for first in range(0, len(pointers), CHUNK):
        found = pointers[first : first + CHUNK]
        expected = starts[first : first + len(found)] * itemsize
        if np.array_equal(found, expected):
            continue
        wrong = int(np.argmax(found != expected))
        at, right = int(found[wrong]), int(expected[wrong])
        if at < right and (right - at) % 2**32 == 0:
            reason = "the pointers wrapped at 2 GiB, as in files of PaddleNLP's merge.py. Merge with data/prepare.py"
        elif at < 0:
            reason = "a negative pointer. It is damaged: fetch it again"
        else:
            fault = "overlaps the one before it" if at < right else "leaves a gap"
            reason = f"it {fault}. Write the pair again, one sequence directly after the other"
        raise InputError(f"{path}: sequence {first + wrong:,} begins at byte {at:,}, not at {right:,}: {reason}.")


def _document_starts(path: Path, starts: np.ndarray, marks: StoredArray | np.ndarray) -> np.ndarray:
    """Return the first token of each document, and the end: int64, (documents + 1,).

    Args:
        starts: the first token of each sequence, and the end.
        marks: the first sequence of each document, and the end. Sequence starts [0, 2, 3, 6] and marks [0, 2, 3] give
            document starts [0, 3, 6].

    Raises:
        InputError: the documents do not cover all sequences in order.
    """
    firsts = range(0, len(marks), CHUNK)
    if len(marks) == len(starts) and all(_counts_up(marks[first : first + CHUNK], first) for first in firsts):
        return starts  # each sequence is a document, as in most files
    sequences = len(starts) - 1
    last = 0
    result = np.empty(len(marks), dtype=np.int64)
    for first in firsts:
        chunk = marks[first : first + CHUNK]
        inside = chunk.min() >= 0 and chunk.max() <= sequences
        if not inside or chunk[0] < last or (chunk[1:] < chunk[:-1]).any() or (first == 0 and chunk[0] != 0):
            raise InputError(
                f"{path}: document marks do not rise from 0 to {sequences:,}, the number of sequences (among marks "
                f"{first:,} to {first + len(chunk):,}). It is damaged: fetch it again."
            )
        result[first : first + len(chunk)] = starts[chunk]
        last = int(chunk[-1])
    if last != sequences:
        raise InputError(
            f"{path}: its documents end at sequence {last:,} of {sequences:,}: end_document() was not called for the "
            "last document. Write the pair again."
        )
    return result


def _counts_up(chunk: np.ndarray, first: int) -> bool:
    """Whether ``chunk`` is first, first + 1, first + 2, ..."""
    return np.array_equal(chunk, np.arange(first, first + len(chunk)))


def write_index(path: str, sizes: np.ndarray, dtype: np.dtype, document_marks: np.ndarray | None = None) -> None:
    """Write the ``.idx`` of sequences of ``sizes`` tokens, each token of ``dtype``.

    Args:
        document_marks: the first sequence of each document, and the end. By default each sequence is a document.

    Raises:
        InputError: a sequence is longer than an int32 can say, or the format has no code for ``dtype``.
    """
    code = next((code for code, known in DTYPES.items() if np.dtype(known) == dtype), None)
    if code is None:
        known = ", ".join(map(str, known_dtypes()))
        raise InputError(f"{path}: the format has no code for tokens of {dtype}. Use one of {known}.")
    if len(sizes) and sizes.max() > LARGEST_SIZE:
        raise InputError(
            f"{path}: a document of {sizes.max():,} tokens; the format allows {LARGEST_SIZE:,}. Split the document."
        )
    marks = np.arange(len(sizes) + 1) if document_marks is None else document_marks
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, len(sizes), len(marks)))
        for first in range(0, len(sizes), CHUNK):
            file.write(sizes[first : first + CHUNK].astype("<i4").tobytes())
        pointer = 0
        for first in range(0, len(sizes), CHUNK):
            # int64, because int32 wraps past 2 GiB.
            ends = pointer + np.cumsum(sizes[first : first + CHUNK], dtype=np.int64) * dtype.itemsize
            file.write(np.concatenate([[pointer], ends[:-1]]).astype("<i8").tobytes())
            pointer = int(ends[-1])
        for first in range(0, len(marks), CHUNK):
            file.write(marks[first : first + CHUNK].astype("<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())
