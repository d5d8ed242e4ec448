"""Reading token stores: one pair of files, or a folder of pairs, as one list of documents.

``common/tokens/megatron.py`` describes a pair. Beside a pair that we wrote are four more files:

- ``.json``, the sidecar: where the tokens come from, how many there are, and which tokenizer made them;
- ``.hashes.npy``: a 64-bit hash of each document's text, by which documents are held out;
- ``.id_hashes.npy``: a 64-bit hash of each document's ids without end tokens, by which duplicates are found;
- ``.text_bytes.npy``: the size of each document in UTF-8, which bits per byte are computed from.

A pair without hashes gets them computed from its ids, and they are kept in the cache.
"""

import errno
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import numpy as np

from common.console import InputError, say
from common.corpus.sources import mark_as_cache
from common.corpus.splits import content_hash, repeated
from common.progress import Progress
from common.tokens.megatron import (
    COLUMNS,
    HASHES,
    ID_HASHES,
    TEXT_BYTES,
    TokenPair,
    find_pairs,
    open_pair,
    read_column,
    write_row,
)
from common.tokens.token_index import StoredArray

CHUNK_TOKENS = 4_000_000  # tokens in memory when all of a store are read: at most 32 MB
END_TOKEN_DOCUMENTS = 1_000  # the first documents of a store, which ``end_token_share`` looks at


class TokenStore:
    """One pair, or a folder of pairs in the order of their names, read as a list of documents.

    Attributes:
        tokens: every token of the store in order; its slices are arrays of ``tokens.dtype``.
        document_starts: the first token of each document, and the end: int64, (documents + 1,).
        sidecar: what is known of the tokens' origin, counts summed over the pairs; {} for pairs of other programs.
        pairs: the pairs of files that the store consists of.
    """

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None, end_token_id: int | None = None):
        """Open ``path``: a prefix, one file of a pair, or a folder. Only ``document_starts`` is loaded into memory.

        Args:
            cache_dir: where what was computed from all tokens is kept, because computing it takes a while.
            end_token_id: left out of ``id_hashes``, so that a store with end tokens and one without are comparable.

        Raises:
            InputError: a file is missing or damaged, or the files do not fit each other; says which and how.
        """
        found = find_pairs(str(path))
        self.prefix = found[0][0] if len(found) == 1 else str(path)
        self.cache_dir = cache_dir
        self.end_token_id = end_token_id
        pairs, starts = zip(*(open_pair(*pair) for pair in found), strict=True)
        self.pairs: list[TokenPair] = list(pairs)
        self.tokens = joined_tokens(self.pairs)
        self.document_starts = joined_starts(list(starts))
        self.sidecar = self.pairs[0].sidecar if len(pairs) == 1 else joined_sidecar(self.pairs)
        self._id_hashes: np.ndarray | None = None

    @property
    def documents(self) -> int:
        return len(self.document_starts) - 1

    def document_hashes(self) -> np.ndarray:
        """Return a 64-bit hash of each document's text, or of its ids where it is not known: uint64, (documents,).

        These hashes decide which documents are held out.
        """
        parts = self._column(HASHES)
        return _joined(self.id_hashes()[first:last] if part is None else part for first, last, part in parts)

    def id_hashes(self) -> np.ndarray:
        """Return a 64-bit hash of each document's ids without end tokens: uint64, (documents,).

        Documents with equal hashes are copies of each other, in this store or in another of the same tokenizer.
        """
        if self._id_hashes is None:
            self._id_hashes = _joined(
                self._hash_ids(pair, first) if part is None else part
                for pair, (first, _, part) in zip(self.pairs, self._column(ID_HASHES), strict=True)
            )
        return self._id_hashes

    def text_bytes(self) -> np.ndarray | None:
        """Return the size of each document's text in UTF-8, -1 where it is not known: int64, (documents,).

        None if it is known of no document.
        """
        parts = self._column(TEXT_BYTES)
        if all(part is None for _, _, part in parts):
            return None
        return _joined(np.full(last - first, -1, np.int64) if part is None else part for first, last, part in parts)

    def _column(self, suffix: str) -> list[tuple[int, int, np.ndarray | None]]:
        """Return for each pair its first document, its end, and the column with this suffix beside it, or None."""
        parts, first = [], 0
        for pair in self.pairs:
            path = Path(pair.prefix + suffix)
            part = read_column(path, COLUMNS[suffix], pair.documents) if path.exists() else None
            parts.append((first, first + pair.documents, part))
            first += pair.documents
        return parts

    def _hash_ids(self, pair: TokenPair, first: int) -> np.ndarray:
        """Return the hashes of the ids of ``pair``, from ``cache_dir`` if they were computed before.

        ``first`` is the number of the pair's first document in the store.
        """
        starts = self.document_starts[first : first + pair.documents + 1]
        if self.cache_dir is None:
            return hash_documents(self.tokens, starts, self.end_token_id)
        kept = Path(self.cache_dir) / "document_hashes" / f"{files_key([pair])}-{self.end_token_id}.npy"
        if kept.exists():
            return read_column(kept, COLUMNS[ID_HASHES], pair.documents)
        hashes = hash_documents(self.tokens, starts, self.end_token_id)
        keep(kept, hashes)
        return hashes

    def duplicates(self) -> np.ndarray:
        """Return which documents have the ids of an earlier one: their numbers, ascending, int64."""
        return np.flatnonzero(repeated(self.id_hashes()))

    def fingerprint(self, hashes: np.ndarray | None = None) -> str:
        """Return 16 hex digits that change with the documents, their order and their lengths.

        ``hashes``: those by which the documents were split; by default ``document_hashes()``.
        """
        hashes = self.document_hashes() if hashes is None else hashes
        digest = hashlib.blake2b(np.ascontiguousarray(hashes), digest_size=8)
        digest.update(self.document_starts)
        return digest.hexdigest()

    def end_token_share(self, end_token_id: int) -> float:
        """Return the share of the first 1,000 documents that end with ``end_token_id``; 0 if there are no documents."""
        edges = self.document_starts[: END_TOKEN_DOCUMENTS + 1].tolist()
        last_tokens = [self.tokens[start:end][-1:] for start, end in pairwise(edges)]
        return sum(last.tolist() == [end_token_id] for last in last_tokens) / max(1, len(last_tokens))

    def check_tokenizer(self, fingerprint: str, vocabulary_size: int) -> None:
        """Raise InputError if the store cannot have been made with the given tokenizer, or is damaged.

        The fingerprint in the sidecar is compared, and every token id of the store with ``vocabulary_size``.
        """
        made_with = self.sidecar.get("tokenizer", {})
        if made_with.get("fingerprint") not in (None, fingerprint):
            raise InputError(
                f"{self.prefix}: made with another tokenizer (fingerprint {made_with['fingerprint']}, the given one "
                f"has {fingerprint}). Give the tokenizer that made it by --tokenizer, or tokenize the text again."
            )
        kept = None if self.cache_dir is None else Path(self.cache_dir) / "largest_ids" / f"{files_key(self.pairs)}.npy"
        if kept is not None and kept.exists() and read_column(kept, np.dtype("<i8"), 1)[0] < vocabulary_size:
            return
        largest = self._check_ids(vocabulary_size)
        if kept is not None:
            keep(kept, np.array([largest], "<i8"))

    def _check_ids(self, vocabulary_size: int) -> int:
        """Return the largest token; raise InputError if a token is not an id from 0 to ``vocabulary_size`` - 1."""
        largest = -1
        firsts = range(0, len(self.tokens), CHUNK_TOKENS)
        with Progress("checking token ids", len(self.tokens), " tokens") as progress:
            for first in firsts:
                progress.reach(first)
                chunk = self.tokens.read(first, first + CHUNK_TOKENS)
                is_id = (chunk >= 0) & (chunk < vocabulary_size)
                if chunk.dtype.kind == "f":
                    is_id &= chunk == np.trunc(chunk)
                if is_id.all():
                    largest = max(largest, int(chunk.max()))
                    continue
                wrong = int(is_id.argmin())
                document = int(np.searchsorted(self.document_starts, first + wrong, side="right")) - 1
                if "fingerprint" in self.sidecar.get("tokenizer", {}) and "unknown_in" not in self.sidecar["tokenizer"]:
                    reason = "its sidecar names this tokenizer, so it is damaged. Fetch it, or tokenize the text again."
                else:
                    reason = "it was probably made with another tokenizer. Give that one by --tokenizer."
                raise InputError(
                    f"{self.prefix}: document {document:,} holds token {chunk[wrong]:,}, but the given tokenizer has "
                    f"ids 0 to {vocabulary_size - 1:,}: {reason}"
                )
        return largest


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Return the parts one after the other; a single one as it is, so that a memory map stays one."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class JoinedTokens:
    """The tokens of several pairs, one pair after the other: ``len``, ``dtype``, and slices [start:stop] as arrays.

    Slices come from memory maps. Pickling keeps the names of the files, not their content: a worker process that is
    spawned maps the files itself.
    """

    def __init__(self, parts: list[StoredArray]):
        self.parts = [part for part in parts if len(part)] or parts[:1]
        self.dtype = self.parts[0].dtype
        self.starts = [0, *np.cumsum([len(part) for part in self.parts], dtype=np.int64).tolist()]
        self.maps = [part.mapped() for part in self.parts]

    def __reduce__(self):
        return JoinedTokens, (self.parts,)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, window: slice) -> np.ndarray:
        return self._gather(self.maps, window)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) by plain reads from the disk.

        Use this to go through all tokens: pages of a memory map would stay and fill the memory.
        """
        return self._gather(self.parts, slice(start, stop))

    def _gather(self, parts: list[np.ndarray] | list[StoredArray], window: slice) -> np.ndarray:
        start, stop, step = window.indices(len(self))
        if step != 1:
            raise ValueError(f"step {step}: a slice of tokens must have step 1")
        pieces = []
        part = bisect_right(self.starts, start) - 1
        while start < stop:
            end = min(stop, self.starts[part + 1])
            pieces.append(parts[part][start - self.starts[part] : end - self.starts[part]])
            start = end
            part += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, self.dtype), *pieces])


def joined_tokens(pairs: list[TokenPair]) -> JoinedTokens:
    """Return the tokens of the pairs, one pair after the other.

    Raises:
        InputError: they differ in dtype, or are more files than a process may map.
    """
    dtypes = {pair.tokens.dtype: pair.prefix for pair in pairs if len(pair.tokens)}
    if len(dtypes) > 1:
        seen = ", ".join(f"{dtype} in {prefix}" for dtype, prefix in dtypes.items())
        raise InputError(f"tokens of different dtypes: {seen}. Make one store of them with data/prepare.py merge.")
    try:
        return JoinedTokens([pair.tokens for pair in pairs])
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise InputError(
            f"{pairs[0].prefix} and the other {len(pairs) - 1:,} pairs are more files than a process may hold open "
            "here: raise the limit (ulimit -n 65536), or make one store of them with data/prepare.py merge."
        ) from None


def joined_starts(parts: list[np.ndarray]) -> np.ndarray:
    """Return the document starts of pairs, one after the other: [0, 3, 5] and [0, 2] -> [0, 3, 5, 7]."""
    if len(parts) == 1:
        return parts[0]
    joined = np.zeros(1 + sum(len(part) - 1 for part in parts), dtype=np.int64)
    first = 0
    for part in parts:
        np.add(part, int(joined[first]), out=joined[first : first + len(part)])
        first += len(part) - 1
    return joined


def joined_sidecar(pairs: list[TokenPair]) -> dict:
    """Return one sidecar for all pairs: their common tokenizer, and the sum of each count that every sidecar has.

    Other entries are dropped. If only some pairs name their tokenizer, "unknown_in" lists the others. {} if no pair
    has a sidecar.

    Raises:
        InputError: they were made with different tokenizers.
    """
    if not any(pair.sidecar for pair in pairs):
        return {}
    sidecars = [{**pair.sidecar, "documents": pair.documents, "tokens": len(pair.tokens)} for pair in pairs]
    counts = {key: [sidecar.get(key) for sidecar in sidecars] for key in sidecars[0]}
    joined = {key: sum(values) for key, values in counts.items() if all(type(value) is int for value in values)}
    made_by = [sidecar.get("tokenizer", {}) for sidecar in sidecars]
    known = {
        str(tokenizer["fingerprint"]): place for place, tokenizer in enumerate(made_by) if "fingerprint" in tokenizer
    }
    if len(known) > 1:
        seen = ", ".join(f"{pairs[place].prefix} ({fingerprint})" for fingerprint, place in known.items())
        raise InputError(f"made with different tokenizers: {seen}. Tokenize them with the same one.")
    for place in known.values():  # one at most
        joined["tokenizer"] = dict(made_by[place])
        unknown = [
            pair.prefix
            for pair, tokenizer in zip(pairs, made_by, strict=True)
            if "fingerprint" not in tokenizer or "unknown_in" in tokenizer
        ]
        if unknown:
            joined["tokenizer"]["unknown_in"] = unknown
    return joined


def keep(path: Path, row: np.ndarray) -> None:
    """Write ``row`` to ``path`` in the cache, whole or not at all; if that fails, say so and continue without."""
    partial = path.with_name(f"{path.stem}.partial-{uuid4().hex[:8]}.npy")
    try:
        mark_as_cache(path.parent)
        write_row(partial, row)
        os.replace(partial, path)
    except OSError as error:
        if partial.exists():
            partial.unlink()
        say(f"note: {path.parent.name} are not kept for the next run: {error}")


def files_key(pairs: list[TokenPair]) -> str:
    """Return the first pair's name and 16 hex digits that change when a file of the pairs is replaced."""
    stats = [(str(path.resolve()), path.stat()) for pair in pairs for path in pair.files]
    identity = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]
    digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).hexdigest()
    return f"{Path(pairs[0].prefix).name}-{digest}"


def hash_documents(tokens: JoinedTokens, starts: np.ndarray, end_token_id: int | None = None) -> np.ndarray:
    """Return ``content_hash`` of the ids of each document [starts[i], starts[i + 1]): uint64, (documents,).

    The ids are hashed as int32, so that the same document has the same hash whatever the dtype of its store. Tokens
    ``end_token_id`` are left out.
    """
    hashes = np.empty(len(starts) - 1, dtype=np.uint64)
    with Progress("hashing", len(hashes), " documents") as progress:
        for first, last in whole_documents(starts):
            begin, end = int(starts[first]), int(starts[last])
            if end - begin > CHUNK_TOKENS:
                hashes[first] = _hash_in_chunks(tokens, begin, end, end_token_id)
            else:
                ids = tokens.read(begin, end)
                hashes[first:last] = hash_ids(ids, starts[first : last + 1] - begin, end_token_id)
            progress.update(last - first)
    return hashes


def hash_ids(ids: np.ndarray, starts: np.ndarray, end_token_id: int | None) -> list[int]:
    """Return ``content_hash`` of ids [starts[i], starts[i + 1]) as int32, without those that are ``end_token_id``."""
    kept = np.ones(len(ids), bool) if end_token_id is None else ids != end_token_id
    content = memoryview(ids[kept].astype("<i4").tobytes())
    kept_before = np.concatenate([[0], np.cumsum(kept)])
    edges = (kept_before[starts] * 4).tolist()  # bytes
    return [content_hash(content[start:stop]) for start, stop in pairwise(edges)]


def _hash_in_chunks(tokens: JoinedTokens, begin: int, end: int, end_token_id: int | None) -> int:
    """Return the hash of one document that does not fit in memory: some stores are a single document."""
    digest = hashlib.blake2b(digest_size=8)
    for start in range(begin, end, CHUNK_TOKENS):
        ids = tokens.read(start, min(end, start + CHUNK_TOKENS))
        if end_token_id is not None:
            ids = ids[ids != end_token_id]
        digest.update(ids.astype("<i4"))
    return int.from_bytes(digest.digest(), "little")


def whole_documents(starts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield ranges [first, last) of documents that cover all: as many as fit in CHUNK_TOKENS, but at least one."""
    documents = len(starts) - 1
    first = 0
    while first < documents:
        fitting = int(np.searchsorted(starts, starts[first] + CHUNK_TOKENS, side="right")) - 1
        last = min(max(first + 1, fitting), first + CHUNK_TOKENS, documents)
        yield first, last
        first = last
