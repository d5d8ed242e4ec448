"""Documents -> a token store, and reading any such store.

The store is the ecosystem's own format, Megatron's (and PaddleNLP's) pair of ``.bin`` (raw tokens) and ``.idx``
(where each sequence and document is). Beside the pair we keep ``.json``, a sidecar that says where the tokens come
from and which tokenizer made them, and ``.hashes.npy``, a 64-bit hash of each document's text, by which documents
are held out.
"""

import errno
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from uuid import uuid4

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from common.corpus import CorpusCounts, read_documents, source_fingerprint
from common.held_out import content_hash
from common.messages import InputError, say
from common.token_index import read_index, write_index
from common.tokenizer import encode_batch, tokenizer_fingerprint

BATCH_DOCUMENTS = 1_000  # tokenized at once: enough to fill the cores, little enough to stay small in memory


class TokenStore:
    """A memory-mapped ``.bin/.idx`` pair, read as a list of documents.

    Attributes:
        tokens: every token of the store in order, shape (tokens,), read-only.
        document_starts: where each document starts in ``tokens``, and the end: shape (documents + 1,), int64.
        sidecar: what is known of the tokens' origin; empty for a pair of another writer.
    """

    def __init__(self, prefix: str | Path):
        """Open ``prefix``.bin and ``prefix``.idx.

        Raises:
            InputError: a file is missing, or the two do not fit each other; says which and how.
        """
        self.prefix = str(prefix).removesuffix(".bin").removesuffix(".idx")
        bin_path, idx_path = Path(self.prefix + ".bin"), Path(self.prefix + ".idx")
        for path in (bin_path, idx_path):
            if not path.exists():
                raise InputError(f"{path}: no such file. A token store is a pair of {bin_path.name}, {idx_path.name}.")
        dtype, sizes, pointers, document_index = read_index(idx_path)
        if bin_path.stat().st_size != int(sizes.sum(dtype=np.int64)) * dtype.itemsize:
            raise InputError(
                f"{bin_path}: {bin_path.stat().st_size:,} bytes, but {idx_path.name} describes "
                f"{int(sizes.sum(dtype=np.int64)) * dtype.itemsize:,}. The pair is damaged or does not belong together."
            )
        starts = np.zeros(len(sizes) + 1, dtype=np.int64)
        np.cumsum(sizes, out=starts[1:])
        if not np.array_equal(pointers, starts[:-1] * dtype.itemsize):
            raise InputError(
                f"{idx_path}: its sequences overlap or leave gaps; write the pair again, one sequence after the other."
            )
        empty = bin_path.stat().st_size == 0
        self.tokens = np.zeros(0, dtype) if empty else np.memmap(bin_path, dtype=dtype, mode="r")
        self.document_starts = starts[document_index]
        sidecar_path = Path(self.prefix + ".json")
        self._hashes: np.ndarray | None = None
        self.sidecar = json.loads(sidecar_path.read_text(encoding="utf-8")) if sidecar_path.exists() else {}

    @property
    def documents(self) -> int:
        return len(self.document_starts) - 1

    def document_hashes(self) -> np.ndarray:
        """Return a uniform 64-bit hash of each document: of its text, or of its tokens for a foreign pair."""
        if self._hashes is None:
            path = Path(self.prefix + ".hashes.npy")
            spans = zip(self.document_starts[:-1], self.document_starts[1:], strict=True)
            if path.exists():
                self._hashes = np.load(path, allow_pickle=False)
            else:
                hashes = [content_hash(self.tokens[start:end].tobytes()) for start, end in spans]
                self._hashes = np.array(hashes, dtype=np.uint64)
        return self._hashes

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with the documents, their order and their lengths."""
        content = self.document_hashes().tobytes() + self.document_starts.tobytes()
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    def check_tokenizer(self, fingerprint: str, vocabulary_size: int) -> None:
        """Raise InputError unless the store can have been made with the tokenizer at hand."""
        made_with = self.sidecar.get("tokenizer", {}).get("fingerprint")
        if made_with not in (None, fingerprint):
            raise InputError(
                f"{self.prefix}: made with another tokenizer (fingerprint {made_with}, the one at hand has "
                f"{fingerprint}). Give the one it was made with by --tokenizer, or tokenize the text again."
            )
        if made_with is None and len(self.tokens) and (largest := int(self.tokens.max())) >= vocabulary_size:
            raise InputError(
                f"{self.prefix}: holds token {largest:,}, but the tokenizer at hand has {vocabulary_size:,} tokens: "
                "it was probably made with another. Give that one by --tokenizer."
            )


def token_store_of(
    source: str, tokenizer: PreTrainedTokenizerBase, cache_dir: str, text_field: str, skip_malformed: bool
) -> TokenStore:
    """Return the token store of ``source``, tokenizing it unless that was done before with the same tokenizer.

    A ``.bin`` source is a token store already, and used as it is. Otherwise the store lies in ``cache_dir`` under a
    name made from all that decides its content; a changed file or tokenizer gives another name.

    Raises:
        InputError: see ``read_documents``, ``TokenStore`` and ``write_token_store``.
    """
    made_by = {"fingerprint": tokenizer_fingerprint(tokenizer), "end_token": tokenizer.eos_token}
    if source.endswith(".bin"):
        store = TokenStore(source)
        store.check_tokenizer(made_by["fingerprint"], len(tokenizer))
        return store
    origin = {"source": source_fingerprint(source), "text_field": text_field, "skip_malformed": skip_malformed}
    key = hashlib.sha256(json.dumps([origin, made_by], sort_keys=True).encode()).hexdigest()[:12]
    prefix = Path(cache_dir) / f"{Path(source).name.split('.')[0]}-{key}" / "tokens"
    if prefix.with_suffix(".json").exists():
        say(f"tokenized before: {prefix}.bin")
        return TokenStore(prefix)
    counts = CorpusCounts()
    return write_token_store(
        read_documents(source, text_field, skip_malformed, counts),
        lambda texts: encode_batch(tokenizer, texts),
        tokenizer.eos_token_id,
        len(tokenizer),
        prefix,
        lambda: {**asdict(counts), **origin, "tokenizer": made_by},
    )


def write_token_store(
    documents: Iterable[str],
    encode: Callable[[list[str]], list[list[int]]],
    end_token_id: int,
    vocabulary_size: int,
    prefix: str | Path,
    describe: Callable[[], dict],
) -> TokenStore:
    """Tokenize ``documents`` into the store ``prefix``, an end-of-document token after each.

    The files appear under their names only when they are complete, the sidecar last. Nothing is dropped.

    Args:
        encode: texts -> token ids of each, without special tokens.
        vocabulary_size: decides the width of a token on disk: uint16 below 65,500, as Megatron does, else int32.
        describe: called at the end; returns what the sidecar says besides the counts (JSON types).

    Raises:
        InputError: the disk is full; what was half-written is removed.
    """
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if vocabulary_size < 65_500 else np.int32)
    for left_over in prefix.parent.glob("*.partial-*.bin"):
        say(f"note: {left_over} is of another launch: running, or interrupted, then it may be deleted")
    partial = prefix.with_name(f"{prefix.name}.partial-{uuid4().hex[:8]}")
    names = [".bin", ".idx", ".hashes.npy", ".json"]
    sizes, hashes = array("i"), array("Q")
    documents = iter(documents)
    try:
        with (
            open(f"{partial}.bin", "wb") as bin_file,
            tqdm(desc="tokenizing", unit=" documents", unit_scale=True, mininterval=1) as progress,
        ):
            while batch := list(islice(documents, BATCH_DOCUMENTS)):
                for ids in encode(batch):
                    np.array([*ids, end_token_id], dtype=dtype).tofile(bin_file)
                    sizes.append(len(ids) + 1)
                hashes.extend(content_hash(text.encode()) for text in batch)
                progress.update(len(batch))
            bin_file.flush()
            os.fsync(bin_file.fileno())
        write_index(f"{partial}.idx", np.frombuffer(sizes, np.int32), dtype)
        np.save(f"{partial}.hashes.npy", np.frombuffer(hashes, np.uint64))
        counts = {"documents": len(sizes), "tokens": int(np.frombuffer(sizes, np.int32).sum(dtype=np.int64))}
        sidecar = json.dumps({**counts, **describe()}, indent=1, ensure_ascii=False)
        Path(f"{partial}.json").write_text(sidecar + "\n", encoding="utf-8")
        for name in names:
            os.replace(f"{partial}{name}", f"{prefix}{name}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = f"{shutil.disk_usage(prefix.parent).free / 2**30:.2f} GiB free"
        raise InputError(
            f"{prefix.parent}: no space left while tokenizing ({free} after {len(sizes):,} documents). "
            f"Make room (a token takes {dtype.itemsize} bytes), or choose another disk with --cache_dir."
        ) from None
    finally:
        for name in names:
            Path(f"{partial}{name}").unlink(missing_ok=True)
    return TokenStore(prefix)
