"""Documents -> a token store: tokenized once, by all cores, and found again by later runs."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from common.arguments import SharedArguments
from common.console import InputError, say
from common.corpus.documents import CorpusCounts, read_documents
from common.corpus.hub_dataset import with_cached_files
from common.corpus.sources import Source, mark_as_cache
from common.corpus.splits import SeenHashes
from common.io import DISK_FULL, write_json
from common.progress import Progress
from common.system import usable_cores
from common.tokens.batches import Encoded, batches, encode, up_to
from common.tokens.encoding import encoder_of
from common.tokens.megatron import COLUMNS, HASHES, ID_HASHES, PAIR, SIDECAR, write_row
from common.tokens.store import TokenStore
from common.tokens.token_index import token_dtype, write_index
from common.tokens.tokenizer import tokenizer_fingerprint, unknown_id, vocabulary_size
from common.tokens.worker_pool import in_order

FILES = [*PAIR, *COLUMNS, SIDECAR]  # renamed in this order, so a store that has a sidecar is complete
COMPLETE = [*PAIR, HASHES, SIDECAR]  # what a complete store has, also one of an earlier version
WORK_FILES = [".sizes", *(suffix.removesuffix(".npy") for suffix in COLUMNS)]  # as they come; deleted at the end


def tokenize(source: Source, tokenizer: PreTrainedTokenizerBase, arguments: SharedArguments) -> TokenStore:
    """Return the token store of ``source``; tokenize it only if no earlier run did so with the same tokenizer.

    A source that is a token store is returned as it is. Otherwise the store is in ``arguments.cache_dir``, under a name
    that is a hash of everything that decides its content: a changed file, flag or tokenizer gives another name. The
    store holds every document, duplicates too: they are left out of the rows later, not of the store.

    Raises:
        InputError: see ``read_documents``, ``TokenStore`` and ``write_token_store``.
    """
    place = source.token_store
    limit = arguments.max_data_tokens
    if place is not None and limit is not None:
        raise InputError(
            f"--max_data_tokens {limit}: {source.given} is a token store, which is read whole. Give the text that it "
            "was made from, or leave the flag out."
        )
    if place is None:
        origin = origin_of([source], tokenizer, arguments.text_field, arguments.skip_malformed, limit)
        place = _tokenized_before(origin, arguments)
        if place is None:
            place = _tokenize_now(source, tokenizer, arguments, origin)
    store = TokenStore(place, arguments.cache_dir, tokenizer.eos_token_id)
    store.check_tokenizer(tokenizer_fingerprint(tokenizer), vocabulary_size(tokenizer))
    store.id_hashes()  # computed once, before other processes ask for them
    _say_what_is_lost(store, source.given, tokenizer)
    if limit is not None:
        _say_what_is_left_out(store, source.given, limit)
    return store


def _tokenized_before(origin: dict, arguments: SharedArguments) -> Path | None:
    """Return the prefix of the token store that an earlier run made of ``origin``; None if there is none."""
    # By the key alone, because the source may have had another name.
    for found in Path(arguments.cache_dir).glob(f"*-{_key(origin)}/tokens{SIDECAR}"):
        say(f"tokenized before: {found.with_suffix('.bin')}")
        return found.with_suffix("")
    return None


def _tokenize_now(source: Source, tokenizer: PreTrainedTokenizerBase, arguments: SharedArguments, origin: dict) -> Path:
    """Tokenize ``source``, whose origin is ``origin``, into the cache; return the prefix of its token store."""
    source = with_cached_files(source)  # what is read now, if no hub has the whole data set
    if source.cached_files:
        origin = origin | {"sources": [source.fingerprint()]}
        place = _tokenized_before(origin, arguments)
        if place is not None:
            return place
    place = mark_as_cache(Path(arguments.cache_dir, f"{source.name}-{_key(origin)}")) / "tokens"
    counts, limit = CorpusCounts(), arguments.max_data_tokens
    documents = read_documents(source, arguments.text_field, arguments.skip_malformed, counts)
    options = dict(max_tokens=limit, cache_dir=arguments.cache_dir)
    write_token_store(documents, counts, tokenizer, place, origin, source.size_bytes, **options)
    return place


def _key(origin: dict) -> str:
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:12]


def _say_what_is_lost(store: TokenStore, given: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print what of the text is not in the tokens, and what is not known about it."""
    share = store.end_token_share(tokenizer.eos_token_id)
    if share < 1:
        say(f"note: only {share:.0%} of the first documents of {given} end with {tokenizer.eos_token!r}")
    counts = Counter(store.sidecar)  # 0 for a count that the sidecar does not have
    if counts["unknown_tokens"]:
        unknown = counts["unknown_tokens"] / max(1, counts["tokens"] - counts["end_tokens"])
        token = tokenizer.convert_ids_to_tokens(unknown_id(tokenizer))
        say(f"note: {unknown:.2%} of the tokens of {given} are {token}: the tokenizer does not know their text")
    if counts["changed_documents"]:
        say(
            f"note: {counts['changed_documents']:,} of the first {counts['tried_documents']:,} documents of {given} do "
            "not come back from their tokens as they were (case, spaces, Unicode normalisation or unknown characters)"
        )
    sizes = store.text_bytes()
    if sizes is None or (len(sizes) and sizes.min() < 0):
        say(
            f"note: the token store {store.prefix} does not say how many bytes its texts have: bits per byte count the "
            "bytes of the decoded tokens"
        )


def _say_what_is_left_out(store: TokenStore, given: str, limit: int) -> None:
    """Print where --max_data_tokens ended the reading of ``given``, or that it did not."""
    found = f"{store.documents:,} documents with {len(store.tokens):,} tokens"
    after = store.sidecar.get("documents_after_limit", 0)
    if after:
        say(
            f"{given}: {found} are within --max_data_tokens {limit:,}; the {after:,} documents after them that were "
            "read are left out, and what follows was not read"
        )
    else:
        say(f"note: {given}: all of it was read, {found}, which is within --max_data_tokens {limit:,}")


def origin_of(
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    text_field: str | None,
    skip_malformed: bool,
    max_tokens: int | None = None,
) -> dict:
    """Return everything that decides the content of a token store, as JSON types.

    It is kept in the store's sidecar, and the store's name in the cache is a hash of it: any change here makes every
    user tokenize again.
    """
    made_with = {"fingerprint": tokenizer_fingerprint(tokenizer), "end_token": tokenizer.eos_token}
    if vocabulary_size(tokenizer) > len(tokenizer):
        made_with["vocabulary_size"] = vocabulary_size(tokenizer)  # earlier versions stored such ids in too few bits
    limit = {} if max_tokens is None else {"max_tokens": max_tokens}
    return {
        "sources": [source.fingerprint() for source in sources],
        "text_field": text_field,
        "skip_malformed": skip_malformed,
        "tokenizer": made_with,
        **limit,
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
    max_tokens: int | None = None,
    cache_dir: str | Path | None = None,
) -> TokenStore:
    """Tokenize ``documents`` into the store ``prefix``, with an end-of-document token after each; return the store.

    The files get their names only when all of them are complete, the sidecar last. A store that is complete already is
    returned as it is. Memory does not grow with the corpus (except for 8 bytes a document with ``drop_duplicates``),
    and the result does not depend on ``workers``.

    Args:
        counts: what the reader of ``documents`` counts; goes into the sidecar, with ``origin`` (JSON types).
        size_bytes: of the files that are read, to estimate the time left; 0 if not known.
        workers: threads or processes that tokenize, see ``in_order``; by default one for each usable core.
        drop_duplicates: drop documents with the ids of an earlier one; the sidecar counts them. Nothing else is
            dropped.
        max_tokens: end before the first document with which the store would have more tokens, end tokens included. The
            documents that were tokenized together with it are left out, and the sidecar counts them. Reading runs ahead
            of tokenizing by a few batches, whose documents are not counted anywhere.
        cache_dir: where the proof of equal ids is kept: ``encoder_of``.

    Raises:
        InputError: the disk is full, ``max_tokens`` is too small for the first document, or a process that tokenizes
            was killed. Half-written files are removed.
    """
    prefix = Path(prefix)
    workers = usable_cores() if workers is None else workers
    dtype = token_dtype(vocabulary_size(tokenizer))
    with _only_writer(prefix) as already_written:
        if already_written:
            return TokenStore(prefix)
        encoder = encoder_of(tokenizer, cache_dir)
        note = f" ({encoder.note})" if encoder.note else ""
        say(f"tokenizing into {prefix}.bin with {encoder.name}{note}")
        partial = f"{prefix}.partial"

        def work(batch: tuple) -> Encoded:
            return encode(*batch, encoder, tokenizer, dtype)

        try:
            with closing(in_order(work, batches(documents, counts), workers)) as encoded:
                kept = encoded if max_tokens is None else up_to(max_tokens, encoded)
                found = _write_tokens(partial, kept, counts, size_bytes, drop_duplicates)
            _write_rest(partial, dtype, asdict(counts) | found | origin)
            for suffix in FILES:
                os.replace(f"{partial}{suffix}", f"{prefix}{suffix}")
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise _no_space_left(prefix.parent, dtype) from None
        finally:
            for suffix in (*FILES, *WORK_FILES):
                Path(f"{partial}{suffix}").unlink(missing_ok=True)
    return TokenStore(prefix)


def _no_space_left(folder: Path, dtype: np.dtype) -> InputError:
    """Return the error of a full disk. Call this before the half-written files are removed: it says what was free."""
    free = f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB free"
    return InputError(
        f"{folder}: no space left while tokenizing ({free}). Make room (a token takes {dtype.itemsize} bytes), or "
        "choose another disk with --cache_dir or --output."
    )


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
        yield all(Path(f"{prefix}{suffix}").exists() for suffix in COMPLETE)
    finally:
        lock.release()


def _write_tokens(
    partial: str, encoded: Iterable[Encoded], counts: CorpusCounts, size_bytes: int, drop_duplicates: bool
) -> dict[str, int]:
    """Write ``partial``.bin and the WORK_FILES; return how many duplicates were dropped, and other counts.

    If ``encoded`` was cut, the counts of the reader up to there are among them: it has read further meanwhile.
    """
    seen = SeenHashes()
    found = dict(duplicates=0, duplicate_tokens=0, unknown_tokens=0, tried_documents=0, changed_documents=0)
    with ExitStack() as files:
        bin_file = files.enter_context(open(f"{partial}.bin", "wb"))
        work_files = [files.enter_context(open(f"{partial}{suffix}", "wb")) for suffix in WORK_FILES]
        progress = files.enter_context(Progress("tokenizing", size_bytes, "B"))
        for batch in encoded:
            progress.reach(counts.file_bytes if size_bytes > 0 else counts.text_bytes)
            kept = seen.add(batch.columns[ID_HASHES]) if drop_duplicates else np.ones(len(batch.sizes), bool)
            found["duplicates"] += int((~kept).sum())
            found["duplicate_tokens"] += int(batch.sizes[~kept].sum())
            found["unknown_tokens"] += int(batch.unknown[kept].sum())
            found["tried_documents"] += batch.tried
            found["changed_documents"] += batch.changed
            if batch.left_out:
                found |= asdict(batch.counts) | {"documents_after_limit": batch.left_out}
            bin_file.write(batch.tokens[np.repeat(kept, batch.sizes)].tobytes())
            for file, numbers in zip(work_files, [batch.sizes, *batch.columns.values()], strict=True):
                file.write(numbers[kept].tobytes())
        bin_file.flush()
        os.fsync(bin_file.fileno())
    return found


def _write_rest(partial: str, dtype: np.dtype, described: dict) -> None:
    """Write the index, the columns and the sidecar that belong to ``partial``.bin."""
    sizes = _work_file(f"{partial}.sizes", np.dtype(np.int32))
    write_index(f"{partial}.idx", sizes, dtype)
    for suffix, numbers in COLUMNS.items():
        write_row(f"{partial}{suffix}", _work_file(f"{partial}{suffix.removesuffix('.npy')}", numbers))
    # "tokens" counts all tokens of the .bin, the end tokens among them.
    counts = {"documents": len(sizes), "tokens": int(sizes.sum(dtype=np.int64)), "end_tokens": len(sizes)}
    # ``counts`` stands first, so that the sidecar begins with them, and last, so that they win over ``described``.
    write_json(Path(f"{partial}{SIDECAR}"), counts | described | counts)


def _work_file(path: str, dtype: np.dtype) -> np.ndarray:
    if os.path.getsize(path) == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r")
