"""Documents -> a token store: tokenized once, by all cores, and found again ever after."""

import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from common.arguments import SharedArguments
from common.console import InputError, say
from common.corpus.documents import CorpusCounts, read_documents
from common.corpus.sources import Source, mark_as_cache
from common.corpus.splits import SeenHashes, content_hash
from common.system import usable_cores
from common.tokens.encoding import Encoder, encoder_of
from common.tokens.megatron import write_index
from common.tokens.store import TokenStore
from common.tokens.tokenizer import tokenizer_fingerprint

BATCH_CHARACTERS = 500_000  # tokenized at once: enough to keep a thread busy, little enough to stay small in memory
FILES = [".bin", ".idx", ".hashes.npy", ".json"]  # the sidecar last: a store with one is whole


def token_store_of(source: Source, tokenizer: PreTrainedTokenizerBase, arguments: SharedArguments) -> TokenStore:
    """Return the token store of ``source``, tokenizing it unless that was done before with the same tokenizer.

    A source that is a token store already is used as it is. Otherwise the store lies in ``arguments.cache_dir`` under
    a name made from all that decides its content; a changed file or tokenizer gives another name. It holds every
    document, duplicates too: they are left out of the rows, not of the store.

    Raises:
        InputError: see ``read_documents``, ``TokenStore`` and ``write_token_store``.
    """
    if source.token_store is not None:
        store = TokenStore(source.token_store, arguments.cache_dir)
        store.check_tokenizer(tokenizer_fingerprint(tokenizer), len(tokenizer))
        share = store.end_token_share(tokenizer.eos_token_id)
        if share < 1:
            say(f"note: only {share:.0%} of the first documents of {source.given} end with {tokenizer.eos_token!r}")
        return store
    origin = origin_of([source], tokenizer, arguments.text_field, arguments.skip_malformed)
    key = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:12]
    cache = mark_as_cache(Path(arguments.cache_dir))
    for found in cache.glob(f"*-{key}/tokens.json"):  # whatever the source was called then
        prefix = found.with_suffix("")
        say(f"tokenized before: {prefix}.bin")
        return TokenStore(prefix, cache)
    prefix = cache / f"{source.name}-{key}" / "tokens"
    counts = CorpusCounts()
    documents = read_documents(source, arguments.text_field, arguments.skip_malformed, counts)
    write_token_store(documents, counts, tokenizer, prefix, origin, source.size_bytes)
    return TokenStore(prefix, cache)


def origin_of(
    sources: list[Source], tokenizer: PreTrainedTokenizerBase, text_field: str | None, skip_malformed: bool
) -> dict:
    """Describe what decides the content of a token store, as JSON types; kept in its sidecar."""
    return {
        "sources": [source.fingerprint() for source in sources],
        "text_field": text_field,
        "skip_malformed": skip_malformed,
        "tokenizer": {"fingerprint": tokenizer_fingerprint(tokenizer), "end_token": tokenizer.eos_token},
    }


def is_whole(prefix: str | Path) -> bool:
    """Return whether a token store of ours lies at ``prefix``, complete: its sidecar is written last."""
    return all(Path(f"{prefix}{name}").exists() for name in FILES)


def write_token_store(
    documents: Iterable[str],
    counts: CorpusCounts,
    tokenizer: PreTrainedTokenizerBase,
    prefix: str | Path,
    origin: dict,
    size_bytes: int = 0,
    workers: int | None = None,
    drop_duplicates: bool = False,
) -> TokenStore:
    """Tokenize ``documents`` into the store ``prefix``, an end-of-document token after each.

    The files appear under their names only when they are complete, the sidecar last. Nothing is dropped but, where
    asked for, exact duplicates, which the sidecar counts. Memory does not grow with the corpus (8 bytes a document
    with ``drop_duplicates``), and the result does not depend on ``workers``.

    Args:
        counts: kept by whoever reads ``documents``; goes into the sidecar, with ``origin`` (JSON types).
        size_bytes: of the files that are read, for the time left; 0 if it is not known.
        workers: threads that tokenize; one for each usable core if None.

    Raises:
        InputError: the disk is full; what was half-written is removed.
    """
    prefix = Path(prefix)
    # The width of a token on disk, as Megatron chooses it.
    dtype = np.dtype(np.uint16 if len(tokenizer) < 65_500 else np.int32)
    with _only_writer(prefix) as whole_already:
        if whole_already:
            return TokenStore(prefix)
        encoder = encoder_of(tokenizer)
        say(f"tokenizing into {prefix}.bin with {encoder.name}" + (f" ({encoder.note})" if encoder.note else ""))
        encoded = _in_order(
            lambda texts: _encode(texts, encoder, tokenizer.eos_token_id, dtype),
            _batches(documents),
            workers or usable_cores(),
        )
        partial = f"{prefix}.partial"
        try:
            duplicates = _write_tokens(partial, encoded, counts, size_bytes, drop_duplicates)
            _complete(partial, dtype, asdict(counts) | duplicates | origin)
            for name in FILES:
                os.replace(f"{partial}{name}", f"{prefix}{name}")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = f"{shutil.disk_usage(prefix.parent).free / 2**30:.2f} GiB free"
            raise InputError(
                f"{prefix.parent}: no space left while tokenizing ({free}). Make room (a token takes {dtype.itemsize} "
                "bytes), or choose another disk with --cache_dir or --output."
            ) from None
        finally:
            for name in (*FILES, ".sizes", ".hashes"):
                Path(f"{partial}{name}").unlink(missing_ok=True)
    return TokenStore(prefix)


def _write_tokens(
    partial: str, encoded: Iterable, counts: CorpusCounts, size_bytes: int, drop_duplicates: bool
) -> dict[str, int]:
    """Write ``partial``.bin, .sizes and .hashes; return how many duplicates were left out, and their tokens."""
    seen, duplicates, duplicate_tokens = SeenHashes(), 0, 0
    with (
        open(f"{partial}.bin", "wb") as bin_file,
        open(f"{partial}.sizes", "wb") as sizes_file,
        open(f"{partial}.hashes", "wb") as hashes_file,
        tqdm(total=size_bytes or None, desc="tokenizing", unit="B", unit_scale=True, mininterval=1) as progress,
    ):
        for tokens, sizes, hashes in encoded:
            progress.update((counts.file_bytes if size_bytes else counts.text_bytes) - progress.n)
            if drop_duplicates:
                new = seen.add(hashes)
                duplicates += int((~new).sum())
                duplicate_tokens += int(sizes[~new].sum())
                tokens, sizes, hashes = tokens[np.repeat(new, sizes)], sizes[new], hashes[new]
            for array, file in ((tokens, bin_file), (sizes, sizes_file), (hashes, hashes_file)):
                file.write(array.tobytes())
        bin_file.flush()
        os.fsync(bin_file.fileno())
    return {"duplicates": duplicates, "duplicate_tokens": duplicate_tokens}


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(texts: list[str], encoder: Encoder, end_token_id: int, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """Return the tokens of all ``texts``, and the size and the hash of each."""
    ids = encoder.encode(texts)
    sizes = np.array([len(document) + 1 for document in ids], dtype=np.int32)
    tokens = np.full(sizes.sum(dtype=np.int64), end_token_id, dtype=dtype)
    is_text = np.ones(len(tokens), dtype=bool)
    is_text[np.cumsum(sizes, dtype=np.int64) - 1] = False
    tokens[is_text] = np.concatenate(ids)
    return tokens, sizes, np.array([content_hash(text.encode()) for text in texts], dtype=np.uint64)


def _in_order(work: Callable, batches: Iterable[list[str]], workers: int) -> Iterator:
    """Yield ``work(batch)`` in the order of the batches, ``workers`` at a time and at most twice as many waiting."""
    with ThreadPoolExecutor(workers) as pool:  # threads: the encoders let go of Python's lock while they work
        waiting = deque()
        for batch in batches:
            waiting.append(pool.submit(work, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _only_writer(prefix: Path) -> Iterator[bool]:
    """Let one process at a time write ``prefix``; yield whether it is there already, written while this one waited.

    The lock dies with its owner, so partial files found under it are of an interrupted run, and written over.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{prefix}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is writing {prefix}.bin: waiting for it")
        lock.acquire()
    try:
        yield is_whole(prefix)
    finally:
        lock.release()


def _complete(partial: str, dtype: np.dtype, described: dict) -> None:
    """Write the index, the hashes and the sidecar of the tokens that lie in ``partial``.bin."""
    if os.path.getsize(f"{partial}.sizes") == 0:  # which cannot be mapped
        sizes, hashes = np.zeros(0, np.int32), np.zeros(0, np.uint64)
    else:
        sizes = np.memmap(f"{partial}.sizes", np.int32, "r")
        hashes = np.memmap(f"{partial}.hashes", np.uint64, "r")
    write_index(f"{partial}.idx", sizes, dtype)
    np.save(f"{partial}.hashes.npy", hashes)
    # "tokens" are all of the .bin's: "end_tokens" are among them.
    counts = {"documents": len(sizes), "tokens": int(sizes.sum(dtype=np.int64)), "end_tokens": len(sizes)}
    sidecar = json.dumps(counts | described | counts | {"hashes": "text"}, indent=1, ensure_ascii=False)
    Path(f"{partial}.json").write_text(sidecar + "\n", encoding="utf-8")
