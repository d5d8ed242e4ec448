"""Several token stores -> one pair of files. One store -> the same tokens in the other format."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import numpy as np
from tqdm import tqdm

from common.console import InputError, is_main_process
from common.io import DISK_FULL, write_json
from common.tokens.megatron import HASHES, LEGACY_PAIR, PAIR, SIDECAR, TokenPair, write_index
from common.tokens.store import CHUNK_TOKENS, TokenStore, joined_sidecar, make_hashes_comparable

NARROWEST_FIRST = [np.dtype(name) for name in "uint8 int8 uint16 int16 int32 uint32 int64 uint64".split()]


def merge_token_stores(inputs: list[TokenStore], output_prefix: str | Path, legacy: bool = False) -> TokenStore:
    """Write the documents of ``inputs``, one store after the other, as the pair ``output_prefix``; return its store.

    Tokens go through memory in chunks. Sequences and documents stay as they are. Dropped are only the modes of
    multimodal sequences.

    Args:
        legacy: write ``_ids.npy`` and ``_idx.npz`` instead of ``.bin`` and ``.idx``.

    Raises:
        InputError: the output exists, an input is given twice, tokenizers or dtypes do not go together, or the disk is
            full. No file is left then.
    """
    suffixes = LEGACY_PAIR if legacy else PAIR
    pairs = [pair for store in inputs for pair in store.pairs]
    _refuse_to_overwrite(str(output_prefix))
    _refuse_repeated_inputs(inputs, pairs)
    dtype = _common_dtype(inputs)
    make_hashes_comparable(inputs)
    sidecar = {
        "documents": sum(pair.documents for pair in pairs),
        "tokens": sum(len(pair.tokens) for pair in pairs),
        **joined_sidecar(pairs),
        "hashes": inputs[0].hashes_of,
        "inputs": [{"prefix": pair.prefix, "documents": pair.documents, **pair.sidecar} for pair in pairs],
    }
    sizes = np.concatenate([pair.sizes[:] for pair in pairs])  # (sequences,)
    marks = _joined_marks(pairs)  # (documents + 1,)
    hashes = np.concatenate([store.document_hashes() for store in inputs])
    with whole_or_nothing(output_prefix, [*suffixes, HASHES, SIDECAR]) as partial:
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
        with open(partial + HASHES, "wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(hashes))
            file.write(hashes)  # not np.save, which does not report a full disk
        write_json(Path(partial + SIDECAR), sidecar)
    return TokenStore(str(output_prefix) + suffixes[0])


def _refuse_to_overwrite(output_prefix: str) -> None:
    for suffix in (*PAIR, *LEGACY_PAIR, SIDECAR, HASHES):
        if Path(output_prefix + suffix).exists():
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
    with tqdm(
        desc="merging", total=total, unit=" tokens", unit_scale=True, mininterval=1, disable=not is_main_process()
    ) as progress:
        for store in inputs:
            for start in range(0, len(store.tokens), CHUNK_TOKENS):
                chunk = store.tokens.read(start, start + CHUNK_TOKENS)
                file.write(chunk.astype(dtype, copy=False))  # not tofile, which does not report a full disk
                progress.update(len(chunk))
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def whole_or_nothing(prefix: str | Path, suffixes: list[str]) -> Iterator[str]:
    """Yield a temporary prefix for files with ``suffixes``; at the end rename them all to ``prefix``, in this order.

    If anything fails before the end, the temporary files are removed.

    Raises:
        InputError: no space is left on the disk.
    """
    folder = Path(prefix).parent
    folder.mkdir(parents=True, exist_ok=True)
    partial = f"{prefix}.partial-{uuid4().hex[:8]}"
    try:
        yield partial
        for suffix in suffixes:
            os.replace(partial + suffix, f"{prefix}{suffix}")
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        written = sum(Path(partial + suffix).stat().st_size for suffix in suffixes if Path(partial + suffix).exists())
        raise InputError(
            f"{folder}: no space left: {shutil.disk_usage(folder).free / 2**30:.2f} GiB free after "
            f"{written / 2**30:.2f} GiB were written, which are removed now. Make room, or choose another disk."
        ) from None
    finally:
        for suffix in suffixes:
            Path(partial + suffix).unlink(missing_ok=True)
