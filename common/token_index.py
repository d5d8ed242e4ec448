"""The ``.idx`` file of Megatron and PaddleNLP: where each sequence and document is in the ``.bin`` beside it.

Little-endian: header, int32 sizes (sequences,), int64 byte pointers (sequences,), int64 marks (documents + 1,).

Source: ``IndexedDataset`` in https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/datasets/indexed_dataset.py
"""

import os
import struct
from pathlib import Path

import numpy as np

from common.messages import InputError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
DTYPES = {  # codes 9 and 10 are PaddleNLP's
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64,
    6: np.float64, 7: np.float32, 8: np.uint16, 9: np.uint32, 10: np.uint64,
}  # fmt: skip


def write_index(path: str, sizes: np.ndarray, dtype: np.dtype) -> None:
    """Write the ``.idx`` of documents of one sequence each. Pointers are int64 all the way: past 2 GiB too."""
    code = next(code for code, known in DTYPES.items() if np.dtype(known) == dtype)
    pointers = np.zeros(len(sizes), dtype=np.int64)
    np.cumsum(sizes[:-1], out=pointers[1:], dtype=np.int64)
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, len(sizes), len(sizes) + 1))
        file.write(sizes.astype("<i4").tobytes())
        file.write((pointers * dtype.itemsize).astype("<i8").tobytes())
        file.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())


def read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Return dtype, sizes (sequences,), byte pointers (sequences,), document_index (documents + 1,).

    Raises:
        InputError: it is no index, of another version, cut off, or its numbers cannot be right.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or header[:9] != MAGIC:
        raise InputError(f"{path}: not a token store index (it does not begin with MMIDIDX). Give another.")
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise InputError(
            f"{path}: version {version}, dtype code {code}; known are version 1 and codes 1 to 10. Convert it."
        )
    expected = HEADER.size + 12 * sequences + 8 * documents
    if file_bytes not in (expected, expected + sequences):  # multimodal pairs end with a byte per sequence
        raise InputError(
            f"{path}: {file_bytes:,} bytes, but its header ({sequences:,} sequences, {documents:,} document marks) "
            f"needs {expected:,}. It is cut off or damaged: fetch it again."
        )
    body = np.memmap(path, dtype=np.uint8, mode="r", offset=HEADER.size)
    sizes = body[: 4 * sequences].view("<i4")
    pointers = body[4 * sequences : 12 * sequences].view("<i8")
    document_index = body[12 * sequences : 12 * sequences + 8 * documents].view("<i8")
    rising = documents > 0 and document_index[0] == 0 and bool((np.diff(document_index) >= 0).all())
    if not rising or document_index[-1] != sequences or (len(sizes) and sizes.min() < 0):
        raise InputError(
            f"{path}: negative sizes, or document marks that do not rise from 0 to {sequences:,}. Fetch it again."
        )
    return np.dtype(DTYPES[code]), sizes, pointers, document_index
