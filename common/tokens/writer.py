"""Documents -> a token store: tokenized once, by all cores, and found again by later runs."""

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
from common.io import DISK_FULL, write_json
from common.system import usable_cores
from common.tokens.encoding import Encoder, encoder_of
from common.tokens.megatron import HASHES, PAIR, SIDECAR, token_dtype, write_index
from common.tokens.store import TokenStore
from common.tokens.tokenizer import tokenizer_fingerprint

BATCH_CHARACTERS = 500_000  # tokenized at once: enough to keep a thread busy, and still small in memory
FILES = [*PAIR, HASHES, SIDECAR]  # renamed in this order, so a store that has a sidecar is complete
WORK_FILES = (".sizes", ".hashes")  # int32 sizes and uint64 hashes as they come; deleted at the end


def tokenize(source: Source, tokenizer: PreTrainedTokenizerBase, arguments: SharedArguments) -> TokenStore:
    """Return the token store of ``source``; tokenize it only if no earlier run did so with the same tokenizer.

    A source that is a token store is returned as it is. Otherwise the store is in ``arguments.cache_dir``, under a name
    that is a hash of everything that decides its content: a changed file, flag or tokenizer gives another name. The
    store holds every document, duplicates too: they are left out of the rows later, not of the store.

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
    for found in cache.glob(f"*-{key}/tokens{SIDECAR}"):  # by the key alone: the source may have had another name
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
    """Return everything that decides the content of a token store, as JSON types.

    It is kept in the store's sidecar, and the store's name in the cache is a hash of it: any change here makes every
    user tokenize again.
    """
    return {
        "sources": [source.fingerprint() for source in sources],
        "text_field": text_field,
        "skip_malformed": skip_malformed,
        "tokenizer": {"fingerprint": tokenizer_fingerprint(tokenizer), "end_token": tokenizer.eos_token},
    }


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
    """Tokenize ``documents`` into the store ``prefix``, with an end-of-document token after each; return the store.

    The files get their names only when all of them are complete, the sidecar last. A store that is complete already is
    returned as it is. Memory does not grow with the corpus (except for 8 bytes a document with ``drop_duplicates``),
    and the result does not depend on ``workers``.

    Args:
        counts: what the reader of ``documents`` counts; goes into the sidecar, with ``origin`` (JSON types).
        size_bytes: of the files that are read, to estimate the time left; 0 if not known.
        workers: threads that tokenize; by default one for each usable core.
        drop_duplicates: drop exact copies of an earlier document; the sidecar counts them. Nothing else is dropped.

    Raises:
        InputError: the disk is full. Half-written files are removed.
    """
    prefix = Path(prefix)
    workers = usable_cores() if workers is None else workers
    dtype = token_dtype(len(tokenizer))
    with _only_writer(prefix) as already_written:
        if already_written:
            return TokenStore(prefix)
        encoder = encoder_of(tokenizer)
        note = f" ({encoder.note})" if encoder.note else ""
        say(f"tokenizing into {prefix}.bin with {encoder.name}{note}")
        encoded = _in_order(
            lambda texts: _encode(texts, encoder, tokenizer.eos_token_id, dtype), _batches(documents), workers
        )
        partial = f"{prefix}.partial"
        try:
            duplicates = _write_tokens(partial, encoded, counts, size_bytes, drop_duplicates)
            _write_rest(partial, dtype, asdict(counts) | duplicates | origin)
            for suffix in FILES:
                os.replace(f"{partial}{suffix}", f"{prefix}{suffix}")
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            free = f"{shutil.disk_usage(prefix.parent).free / 2**30:.2f} GiB free"
            raise InputError(
                f"{prefix.parent}: no space left while tokenizing ({free}). Make room (a token takes {dtype.itemsize} "
                "bytes), or choose another disk with --cache_dir or --output."
            ) from None
        finally:
            for suffix in (*FILES, *WORK_FILES):
                Path(f"{partial}{suffix}").unlink(missing_ok=True)
    return TokenStore(prefix)


@contextmanager
def _only_writer(prefix: Path) -> Iterator[bool]:
    """Let one process at a time write ``prefix``; yield whether the store is complete already.

    It may be complete because another process wrote it while this one waited. The lock ends with its process: partial
    files found under it are from an interrupted run, and are overwritten.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{prefix}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is writing {prefix}.bin: waiting for it")
        lock.acquire()
    try:
        yield all(Path(f"{prefix}{suffix}").exists() for suffix in FILES)
    finally:
        lock.release()


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yield ``documents`` in lists of at least BATCH_CHARACTERS in all, the last list excepted."""
    batch = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


def _in_order(work: Callable, batches: Iterable[list[str]], workers: int) -> Iterator:
    """Yield ``work(batch)`` in the order of the batches, computed by ``workers`` threads.

    At most twice as many batches as workers wait, so that reading does not run ahead and fill the memory.
    """
    with ThreadPoolExecutor(workers) as pool:  # threads suffice: the encoders release Python's lock while they work
        waiting = deque()
        for batch in batches:
            waiting.append(pool.submit(work, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _encode(
    texts: list[str], encoder: Encoder, end_token_id: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tokens of all ``texts``, an end token after each, and the size and the hash of each text.

    Texts with ids [5, 6] and [7], end token 0: tokens [5, 6, 0, 7, 0], sizes [3, 2].

    Returns:
        Tokens of ``dtype``, (tokens,); sizes, int32, (texts,); hashes, uint64, (texts,).
    """
    ids = encoder.encode(texts)
    sizes = np.array([len(document) + 1 for document in ids], dtype=np.int32)
    tokens = np.full(sizes.sum(dtype=np.int64), end_token_id, dtype=dtype)
    is_text = np.ones(len(tokens), dtype=bool)
    is_text[np.cumsum(sizes, dtype=np.int64) - 1] = False
    tokens[is_text] = np.concatenate(ids)
    return tokens, sizes, np.array([content_hash(text.encode()) for text in texts], dtype=np.uint64)


def _write_tokens(
    partial: str, encoded: Iterable, counts: CorpusCounts, size_bytes: int, drop_duplicates: bool
) -> dict[str, int]:
    """Write ``partial``.bin, .sizes and .hashes; return how many duplicates were dropped, and their tokens."""
    seen = SeenHashes()
    duplicates = 0
    duplicate_tokens = 0
    total = size_bytes if size_bytes > 0 else None
    with (
        open(f"{partial}.bin", "wb") as bin_file,
        open(f"{partial}.sizes", "wb") as sizes_file,
        open(f"{partial}.hashes", "wb") as hashes_file,
        tqdm(total=total, desc="tokenizing", unit="B", unit_scale=True, mininterval=1) as progress,
    ):
        for tokens, sizes, hashes in encoded:
            done_bytes = counts.text_bytes if total is None else counts.file_bytes
            progress.update(done_bytes - progress.n)
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


def _write_rest(partial: str, dtype: np.dtype, described: dict) -> None:
    """Write the index, the hashes and the sidecar that belong to ``partial``.bin."""
    if os.path.getsize(f"{partial}.sizes") == 0:  # an empty file cannot be mapped
        sizes = np.zeros(0, np.int32)
        hashes = np.zeros(0, np.uint64)
    else:
        sizes = np.memmap(f"{partial}.sizes", np.int32, "r")
        hashes = np.memmap(f"{partial}.hashes", np.uint64, "r")
    write_index(f"{partial}.idx", sizes, dtype)
    np.save(f"{partial}{HASHES}", hashes)
    # "tokens" counts all tokens of the .bin, the end tokens among them.
    counts = {"documents": len(sizes), "tokens": int(sizes.sum(dtype=np.int64)), "end_tokens": len(sizes)}
    # ``counts`` stands first, so that the sidecar begins with them, and last, so that they win over ``described``.
    write_json(Path(f"{partial}{SIDECAR}"), counts | described | counts | {"hashes": "text"})
