"""One pair of token files on disk: found by what the user gave, opened, and checked against its index and sidecar."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.messages import InputError, say
from common.stored_array import StoredArray
from common.token_index import known_dtypes, read_index, read_legacy_index

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
