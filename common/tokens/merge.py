"""Several token stores -> one pair of files; of one store, the same tokens in the other format."""

import errno
import json
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
from common.tokens.megatron import CHUNK_TOKENS, LEGACY_PAIR, PAIR, TokenPair, write_index
from common.tokens.store import TokenStore, joined_sidecar, make_hashes_comparable

NARROWEST_FIRST = [np.dtype(name) for name in "uint8 int8 uint16 int16 int32 uint32 int64 uint64".split()]


def merge_token_stores(inputs: list[TokenStore], output_prefix: str | Path, legacy: bool = False) -> TokenStore:
    """Write the documents of ``inputs``, one store after the other, as the pair ``output_prefix``; return it.

    Tokens go through memory in chunks, sequences and documents stay what they are, and nothing is dropped but the
    modes of multimodal sequences.

    Args:
        legacy: write ``_ids.npy`` and ``_idx.npz`` instead of ``.bin`` and ``.idx``.

    Raises:
        InputError: the output is there already, an input stands twice, tokenizers or dtypes do not go together, or
            the disk is full; then nothing is left behind.
    """
    suffixes = LEGACY_PAIR if legacy else PAIR
    pairs = [pair for store in inputs for pair in store.pairs]
    dtype = _checked_dtype(inputs, pairs, str(output_prefix))
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
    with whole_or_nothing(output_prefix, [*suffixes, ".hashes.npy", ".json"]) as partial:
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
        with open(partial + ".hashes.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(hashes))
            file.write(hashes)
        Path(partial + ".json").write_text(json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return TokenStore(str(output_prefix) + suffixes[0])


@contextmanager
def whole_or_nothing(prefix: str | Path, suffixes: list[str]) -> Iterator[str]:
    """Yield a partial prefix to write files of ``suffixes`` under; they get their names together at the end, in order.

    Whatever goes wrong before that, nothing is left behind.

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
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        written = sum(Path(partial + suffix).stat().st_size for suffix in suffixes if Path(partial + suffix).exists())
        raise InputError(
            f"{folder}: no space left: {shutil.disk_usage(folder).free / 2**30:.2f} GiB free beside the "
            f"{written / 2**30:.2f} GiB written so far, which are removed. Make room, or choose another disk."
        ) from None
    finally:
        for suffix in suffixes:
            Path(partial + suffix).unlink(missing_ok=True)


def _checked_dtype(inputs: list[TokenStore], pairs: list[TokenPair], output_prefix: str) -> np.dtype:
    """Return the dtype that holds the tokens of all inputs; refuse inputs and outputs that do not go together."""
    if not inputs:
        raise InputError("nothing to merge: give one token store or more.")
    for suffix in (*PAIR, *LEGACY_PAIR, ".json", ".hashes.npy"):
        if Path(output_prefix + suffix).exists():
            raise InputError(f"{output_prefix}{suffix} is there already. Delete it, or choose another name.")
    files = Counter(pair.files[0].resolve() for pair in pairs)
    for file, times in files.items():
        if times > 1:
            raise InputError(f"{file}: given {times} times; its documents would count {times} times. Give it once.")
    dtypes = {store.tokens.dtype for store in inputs if len(store.tokens)} or {inputs[0].tokens.dtype}
    if len(dtypes) == 1:
        return dtypes.pop()
    for wide in NARROWEST_FIRST:
        if all(np.can_cast(dtype, wide) for dtype in dtypes):
            return wide
    raise InputError(f"no dtype holds tokens of {' and '.join(sorted(map(str, dtypes)))}. Tokenize one of them again.")


def _joined_marks(pairs: list[TokenPair]) -> np.ndarray:
    """Return the first sequence of each document, and the end, of all pairs end to end, int64."""
    marks, sequences = [np.zeros(1, dtype=np.int64)], 0
    for pair in pairs:
        marks.append(pair.document_marks[1 : pair.documents + 1] + sequences)
        sequences += len(pair.sizes)
    return np.concatenate(marks)


def _copy_tokens(inputs: list[TokenStore], dtype: np.dtype, file, total: int) -> None:
    hidden = not is_main_process()
    with tqdm(desc="merging", total=total, unit=" tokens", unit_scale=True, mininterval=1, disable=hidden) as progress:
        for store in inputs:
            for start in range(0, len(store.tokens), CHUNK_TOKENS):
                chunk = store.tokens.read(start, start + CHUNK_TOKENS)
                file.write(chunk.astype(dtype, copy=False))  # not tofile: it hides a full disk
                progress.update(len(chunk))
    file.flush()
    os.fsync(file.fileno())
