"""Several token stores -> one pair of files. One store -> the same tokens in the other format."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock

from common.console import InputError
from common.io import DISK_FULL, write_json
from common.progress import Progress
from common.tokens.megatron import COLUMNS, LEGACY_PAIR, PAIR, SIDECAR, TokenPair, read_column, write_row
from common.tokens.store import CHUNK_TOKENS, TokenStore, joined_sidecar
from common.tokens.token_index import write_index

NARROWEST_FIRST = [np.dtype(name) for name in "uint8 int8 uint16 int16 int32 uint32 int64 uint64".split()]


def merge_token_stores(inputs: list[TokenStore], output_prefix: str | Path, legacy: bool = False) -> TokenStore:
    """Write the documents of ``inputs``, one store after the other, as the pair ``output_prefix``; return its store.

    Tokens go through memory in chunks. Sequences and documents stay as they are. Dropped are only the modes of
    multimodal sequences, and the columns (COLUMNS) that some inputs do not have: a run then does without, or computes
    them.

    A merge that was killed leaves files with the name ``.partial``; the same call writes them again.

    Args:
        legacy: write ``_ids.npy`` and ``_idx.npz`` instead of ``.bin`` and ``.idx``.

    Raises:
        InputError: the output exists, an input is given twice, tokenizers or dtypes do not go together, or the disk is
            full. No file is left then.
    """
    suffixes = LEGACY_PAIR if legacy else PAIR
    pairs = [pair for store in inputs for pair in store.pairs]
    _refuse_repeated_inputs(inputs, pairs)
    dtype = _common_dtype(inputs)
    sidecar = {
        "documents": sum(pair.documents for pair in pairs),
        "tokens": sum(len(pair.tokens) for pair in pairs),
        **joined_sidecar(pairs),
        "inputs": [{"prefix": pair.prefix, "documents": pair.documents, **pair.sidecar} for pair in pairs],
    }
    sizes = np.concatenate([pair.sizes[:] for pair in pairs])  # (sequences,)
    marks = _joined_marks(pairs)  # (documents + 1,)
    columns = _common_columns(pairs)
    with whole_or_nothing(str(output_prefix), [*suffixes, *columns, SIDECAR]) as partial:
        with open(partial + suffixes[0], "wb") as file:
            if legacy:
                header = {"descr": dtype.str, "fortran_order": False, "shape": (sidecar["tokens"],)}
                np.lib.format.write_array_header_1_0(file, header)
            _copy_tokens(inputs, dtype, file, sidecar["tokens"])
        if legacy:
            with open(partial + suffixes[1], "wb") as file:
                np.savez(file, lens=sizes.astype(np.int32), docs=marks)
        else:
            write_index(partial + suffixes[1], sizes, dtype, marks)
        for suffix, column in columns.items():
            write_row(partial + suffix, column)
        write_json(Path(partial + SIDECAR), sidecar)
    return TokenStore(str(output_prefix) + suffixes[0])


def _common_columns(pairs: list[TokenPair]) -> dict[str, np.ndarray]:
    """Return the columns that all pairs with documents have, one pair after the other, by their suffixes."""
    pairs = [pair for pair in pairs if pair.documents]
    columns = {}
    for suffix, dtype in COLUMNS.items():
        paths = [Path(pair.prefix + suffix) for pair in pairs]
        if pairs and all(path.exists() for path in paths):
            parts = [read_column(path, dtype, pair.documents) for path, pair in zip(paths, pairs, strict=True)]
            columns[suffix] = np.concatenate(parts)
    return columns


def _refuse_to_overwrite(output_prefix: str, suffixes: list[str]) -> None:
    """Raise InputError if a file of a token store ``output_prefix`` exists, unless an interrupted write left it.

    The sidecar gets its name last. So if it still has its temporary name, the others were left by an interrupted write:
    before that began, none of them existed.
    """
    left = suffixes[:-1] if Path(f"{output_prefix}.partial{SIDECAR}").exists() else []
    for suffix in (*PAIR, *LEGACY_PAIR, *COLUMNS, SIDECAR):
        if Path(output_prefix + suffix).exists() and suffix not in left:
            raise InputError(f"{output_prefix}{suffix} exists already. Delete it, or choose another name.")


def _refuse_repeated_inputs(inputs: list[TokenStore], pairs: list[TokenPair]) -> None:
    if not inputs:
        raise InputError("nothing to merge: give one token store or more.")
    files = Counter(pair.files[0].resolve() for pair in pairs)
    for file, times in files.items():
        if times > 1:
            raise InputError(f"{file}: given {times} times; its documents would count {times} times. Give it once.")


def _common_dtype(inputs: list[TokenStore]) -> np.dtype:
    """Return the narrowest dtype that holds the tokens of all inputs, or raise InputError if there is none."""
    dtypes = {store.tokens.dtype for store in inputs if len(store.tokens)}
    if not dtypes:
        return inputs[0].tokens.dtype
    if len(dtypes) == 1:
        return dtypes.pop()
    for wide in NARROWEST_FIRST:
        if all(np.can_cast(dtype, wide) for dtype in dtypes):
            return wide
    raise InputError(f"no dtype holds tokens of {' and '.join(sorted(map(str, dtypes)))}. Tokenize one of them again.")


def _joined_marks(pairs: list[TokenPair]) -> np.ndarray:
    """Return the first sequence of each document of all pairs, and the end: int64, (documents + 1,).

    Two pairs with marks [0, 2, 3] each give [0, 2, 3, 5, 6].
    """
    marks = [np.zeros(1, dtype=np.int64)]
    sequences = 0
    for pair in pairs:
        marks.append(pair.document_marks[1 : pair.documents + 1] + sequences)
        sequences += len(pair.sizes)
    return np.concatenate(marks)


def _copy_tokens(inputs: list[TokenStore], dtype: np.dtype, file, total: int) -> None:
    """Write the tokens of ``inputs``, ``total`` in all, to the open ``file`` as ``dtype``."""
    with Progress("merging", total, " tokens") as progress:
        for store in inputs:
            for start in range(0, len(store.tokens), CHUNK_TOKENS):
                chunk = store.tokens.read(start, start + CHUNK_TOKENS)
                file.write(chunk.astype(dtype, copy=False))  # not tofile, which does not report a full disk
                progress.update(len(chunk))
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def whole_or_nothing(prefix: str, suffixes: list[str]) -> Iterator[str]:
    """Yield a temporary prefix for files with ``suffixes``; at the end rename them all to ``prefix``, in this order.

    If anything fails before the end, the temporary files are removed. If the process is killed, they stay, and are
    overwritten the next time. One process at a time does so: ``prefix``.lock.

    Raises:
        InputError: a file exists already, or no space is left on the disk.
    """
    folder = Path(prefix).parent
    folder.mkdir(parents=True, exist_ok=True)
    partial = f"{prefix}.partial"
    with FileLock(f"{prefix}.lock"):
        _refuse_to_overwrite(prefix, suffixes)
        try:
            yield partial
            for suffix in suffixes:
                os.replace(partial + suffix, f"{prefix}{suffix}")
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            existing = [Path(partial + suffix) for suffix in suffixes if Path(partial + suffix).exists()]
            written = sum(path.stat().st_size for path in existing)
            raise InputError(
                f"{folder}: no space left: {shutil.disk_usage(folder).free / 2**30:.2f} GiB free after "
                f"{written / 2**30:.2f} GiB were written, which are removed now. Make room, or choose another disk."
            ) from None
        finally:
            for suffix in suffixes:
                Path(partial + suffix).unlink(missing_ok=True)
