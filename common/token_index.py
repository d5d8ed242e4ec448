"""Where each sequence and document of a token file is: Megatron's and PaddleNLP's ``.idx``, and the older ``_idx.npz``.

``.idx``, little-endian: header, int32 sizes (sequences,), int64 byte pointers (sequences,), int64 document marks
(documents + 1,): document i is the sequences marks[i] to marks[i + 1]. The sequences lie in ``.bin`` one after the
other. All is read in chunks and checked before it is trusted: a wrong index would train on the wrong tokens.

Source: ``IndexedDataset`` in https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/datasets/indexed_dataset.py
and ``MMapIndexedDataset``, ``CompatibleIndexedDataset`` in
https://github.com/PaddlePaddle/PaddleNLP/blob/develop/paddlenlp/data/indexed_dataset.py
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.messages import InputError, say
from common.stored_array import StoredArray

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
