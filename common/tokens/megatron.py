"""One pair of token files, Megatron's or PaddleNLP's: found, opened, checked and memory-mapped.

A pair is ``.bin`` and ``.idx``. The ``.bin`` holds the tokens of all sequences, one sequence after the other, and no
header. ``token_index.py`` describes the ``.idx``. The older pair is ``_ids.npy`` (the tokens) and ``_idx.npz``
(``lens``: the tokens of each sequence, ``docs``: the document marks).

Source: ``IndexedDataset`` in https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/datasets/indexed_dataset.py
and ``MMapIndexedDataset``, ``CompatibleIndexedDataset`` in
https://github.com/PaddlePaddle/PaddleNLP/blob/develop/paddlenlp/data/indexed_dataset.py
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.console import InputError, say
from common.corpus.formats import refuse_pointers
from common.corpus.sources import PAIRS
from common.tokens.token_index import CHUNK, StoredArray, known_dtypes, read_index, read_legacy_index

PAIR, LEGACY_PAIR = PAIRS  # the suffixes of the tokens and of the index
SIDECAR = ".json"  # the suffix of our record beside a pair: where its tokens come from, and their tokenizer
HASHES = ".hashes.npy"  # 64-bit hashes of the documents' texts
ID_HASHES = ".id_hashes.npy"  # 64-bit hashes of the documents' ids without end-of-document tokens
TEXT_BYTES = ".text_bytes.npy"  # the documents' sizes in UTF-8
# The suffixes of the files beside a pair that have one number for each document, and the numbers' dtypes. Pairs of
# other programs have none of these files, and those of our earlier versions only HASHES.
COLUMNS = {HASHES: np.dtype("<u8"), ID_HASHES: np.dtype("<u8"), TEXT_BYTES: np.dtype("<i8")}
LARGEST_SIDECAR_BYTES = 64 * 2**20  # a larger .json must be a text of the user's


@dataclass(frozen=True)
class TokenPair:
    """One pair of files, checked, and its sidecar, which is {} for a pair that another program wrote."""

    prefix: str
    files: tuple[Path, Path]  # tokens, index
    tokens: StoredArray
    sizes: StoredArray | np.ndarray  # the tokens of each sequence, (sequences,)
    document_marks: StoredArray | np.ndarray  # the first sequence of each document, and the end, (documents + 1,)
    sidecar: dict

    @property
    def documents(self) -> int:
        return len(self.document_marks) - 1


def find_pairs(given: str) -> list[tuple[str, tuple[str, str]]]:
    """Return the prefix and the suffixes of every pair that ``given`` names: a prefix, one file of a pair, or a folder.

    The pairs of a folder are sorted by prefix. Files of unfinished writes are left out, with a note. If nothing is
    found, ``given`` itself is returned as a prefix: ``open_pair`` then says which file is missing.

    Raises:
        InputError: the folder holds no pair, or one in both formats.
    """
    for suffixes in PAIRS:
        for suffix in suffixes:
            if given.endswith(suffix):
                return [(given.removesuffix(suffix), suffixes)]
    for suffixes in PAIRS:
        if any(Path(given + suffix).exists() for suffix in suffixes):
            return [(given, suffixes)]
    if Path(given).is_dir():
        return _pairs_in_folder(given)
    return [(given, PAIR)]


def _pairs_in_folder(folder: str) -> list[tuple[str, tuple[str, str]]]:
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(map(str, Path(folder).iterdir())):
        suffixes = next((known for known in PAIRS if path.endswith(known)), None)
        if suffixes is None:
            continue
        if ".partial" in Path(path).name:
            say(f"note: {path} is not read: it is still being written, or its writing was interrupted")
            continue
        prefix = next(path.removesuffix(suffix) for suffix in suffixes if path.endswith(suffix))
        if found.setdefault(prefix, suffixes) != suffixes:
            raise InputError(
                f"{prefix}: is there as .bin and as _ids.npy, so its documents would count twice. Move one of them to "
                "another folder."
            )
    if not found:
        raise InputError(
            f"{folder}: a folder without token stores (.bin and .idx, or _ids.npy and _idx.npz). Give another."
        )
    return sorted(found.items())


def open_pair(prefix: str, suffixes: tuple[str, str]) -> tuple[TokenPair, np.ndarray]:
    """Return the pair ``prefix``, checked, and its document starts, int64, (documents + 1,).

    Raises:
        InputError: a file is missing or damaged, or the files do not fit each other.
    """
    tokens_path, index_path = (Path(prefix + suffix) for suffix in suffixes)
    for path in (tokens_path, index_path):
        if not path.is_file():
            raise InputError(
                f"{path}: no such file. A token store is a pair of files, {tokens_path.name} and {index_path.name}: "
                "give both."
            )
    refuse_pointers([tokens_path, index_path])
    if suffixes == PAIR:
        index = read_index(index_path, tokens_path)
        tokens = StoredArray(str(tokens_path), index.dtype, 0, int(index.document_starts[-1]))
    else:
        ids = map_row(tokens_path)
        if ids.dtype not in known_dtypes():
            raise InputError(f"{tokens_path}: holds {ids.dtype}, which are not token ids. Give another file.")
        index = read_legacy_index(index_path, ids)
        tokens = StoredArray(str(tokens_path), ids.dtype, ids.offset, len(ids))
    if Path(prefix + ".lsm").exists():
        say(f"note: {prefix}.lsm, PaddleNLP's loss mask, is not used: every token is trained on")
    sidecar = read_sidecar(Path(prefix + SIDECAR), len(index.document_marks) - 1, len(tokens))
    pair = TokenPair(prefix, (tokens_path, index_path), tokens, index.sizes, index.document_marks, sidecar)
    return pair, index.document_starts


def read_sidecar(path: Path, documents: int, tokens: int) -> dict:
    """Return the sidecar ``path`` of a pair with so many ``documents`` and ``tokens``; {} if there is none.

    Raises:
        InputError: it is not a sidecar, or it is one of another pair.
    """
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
            "pair. If it is damaged, tokenize the text again."
        ) from None
    counts = sidecar.get("documents", documents), sidecar.get("tokens", tokens)
    if counts != (documents, tokens):
        raise InputError(
            f"{path}: describes {counts[0]} documents and {counts[1]} tokens, but the pair beside it holds "
            f"{documents:,} and {tokens:,}. It is the sidecar of another pair: fetch all files of one pair again."
        )
    return sidecar


def map_row(path: Path) -> np.memmap:
    """Return the one-dimensional array of a ``.npy`` file, memory-mapped.

    Raises:
        InputError: it is damaged, or of another shape.
    """
    try:
        row = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # damage shows as any of several errors
        raise InputError(f"{path}: not an array that can be mapped ({error}). Fetch or write it again.") from None
    if row.ndim != 1:
        raise InputError(f"{path}: of shape {row.shape}, but it must have one dimension. Fetch or write it again.")
    return row


def write_row(path: str | Path, row: np.ndarray) -> None:
    """Write a one-dimensional array as a ``.npy`` file. (np.save raises errors without a reason on a full disk.)"""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(row))
        for first in range(0, len(row), CHUNK):
            file.write(row[first : first + CHUNK].tobytes())
        file.flush()
        os.fsync(file.fileno())


def read_column(path: Path, dtype: np.dtype, documents: int) -> np.ndarray:
    """Return a column, one number for each document, memory-mapped: ``dtype``, (documents,).

    Raises:
        InputError: the file is damaged, or of another pair.
    """
    column = map_row(path)
    if column.dtype != dtype or len(column) != documents:
        raise InputError(
            f"{path}: {len(column):,} numbers of {column.dtype}, but the pair has {documents:,} documents, and a "
            f"number of {dtype} for each is needed. It is damaged or of another pair: fetch it again, or delete it."
        )
    return column
