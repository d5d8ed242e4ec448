"""Reading token stores: tokens on disk, memory-mapped, in the pairs of files that the ecosystem writes.

A pair is Megatron's (and PaddleNLP's) ``.bin`` (raw tokens) and ``.idx`` (where each sequence and document is), or the
older ``_ids.npy`` and ``_idx.npz`` of PaddleNLP's GPT. Beside a pair of ours lie ``.json``, a sidecar that says where
the tokens come from and which tokenizer made them, and ``.hashes.npy``, a 64-bit hash of each document's text, by
which documents are held out and duplicates found. A pair without hashes has them computed from its tokens, and kept. A
folder of pairs is read as one store.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import numpy as np
from tqdm import tqdm

from common.console import InputError, is_main_process, say
from common.corpus.splits import content_hash, repeated
from common.tokens.megatron import CHUNK_TOKENS, JoinedTokens, TokenPair, find_pairs, map_row, open_pair


class TokenStore:
    """One pair, or a folder of pairs in the order of their names, read as a list of documents.

    Attributes:
        tokens: every token of the store in order; its slices are arrays of ``tokens.dtype``.
        document_starts: where each document starts in ``tokens``, and the end: shape (documents + 1,), int64.
        sidecar: what is known of the tokens' origin, counts summed over the pairs; empty for another writer's pairs.
        pairs: what the store is made of.
        hashes_of: what the document hashes are of: "text", or "tokens" where those of the text are not at hand.
    """

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None):
        """Open ``path``: a prefix, one file of a pair, or a folder. Nothing is loaded but ``document_starts``.

        Args:
            cache_dir: keeps the document hashes of pairs that come without, which take a while to compute.

        Raises:
            InputError: a file is missing or damaged, or the files do not fit each other; says which and how.
        """
        found = find_pairs(str(path))
        self.prefix = found[0][0] if len(found) == 1 else str(path)
        self.cache_dir = cache_dir
        pairs, starts = zip(*(open_pair(*pair) for pair in found), strict=True)
        self.pairs: list[TokenPair] = list(pairs)
        self.tokens = joined_tokens(self.pairs)
        self.document_starts = joined_starts(list(starts))
        self.sidecar = self.pairs[0].sidecar if len(pairs) == 1 else joined_sidecar(self.pairs)
        self.hashes_of = "text" if all(kind_of_hashes(pair) == "text" for pair in pairs) else "tokens"
        self._hashes: np.ndarray | None = None

    @property
    def documents(self) -> int:
        return len(self.document_starts) - 1

    def document_hashes(self) -> np.ndarray:
        """Return a uniform 64-bit hash of each document, of what ``hashes_of`` says."""
        if self._hashes is None:
            parts, first = [], 0
            for pair in self.pairs:
                if kind_of_hashes(pair) == self.hashes_of:
                    parts.append(load_hashes(Path(pair.prefix + ".hashes.npy"), pair.documents))
                else:
                    parts.append(self._hashes_of_tokens(pair, first))
                first += pair.documents
            self._hashes = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self._hashes

    def _hashes_of_tokens(self, pair: TokenPair, first: int) -> np.ndarray:
        """Return the hashes of the documents of ``pair``, which begin at document ``first``; kept in ``cache_dir``."""
        kept = None if self.cache_dir is None else Path(self.cache_dir) / "document_hashes" / f"{files_key(pair)}.npy"
        if kept is not None and kept.exists():
            return load_hashes(kept, pair.documents)
        hashes = hash_documents(self.tokens, self.document_starts[first : first + pair.documents + 1])
        if kept is not None:
            keep(kept, hashes)
        return hashes

    def hash_tokens(self) -> None:
        """Know the documents by their tokens from now on, whatever is at hand."""
        if self.hashes_of == "text":
            self.hashes_of, self._hashes = "tokens", None

    def duplicates(self) -> np.ndarray:
        """Return which documents have the hash of an earlier one: their indexes, ascending, int64."""
        return np.flatnonzero(repeated(self.document_hashes()))

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with the documents, their order and their lengths."""
        digest = hashlib.blake2b(np.ascontiguousarray(self.document_hashes()), digest_size=8)
        digest.update(self.document_starts)
        return digest.hexdigest()

    def end_token_share(self, end_token_id: int) -> float:
        """Return the share of the first 1,000 documents that end with ``end_token_id``; 0 for no documents."""
        ends = [self.tokens[start:end][-1:] for start, end in pairwise(self.document_starts[:1001].tolist())]
        return sum(last.tolist() == [end_token_id] for last in ends) / max(1, len(ends))

    def check_tokenizer(self, fingerprint: str, vocabulary_size: int) -> None:
        """Raise InputError unless the store can have been made with the tokenizer at hand.

        Where the sidecar names another tokenizer it cannot; where some tokens' is unknown, all ids are looked at.
        """
        made_with = self.sidecar.get("tokenizer", {})
        if made_with.get("fingerprint") not in (None, fingerprint):
            raise InputError(
                f"{self.prefix}: made with another tokenizer (fingerprint {made_with['fingerprint']}, the one at hand "
                f"has {fingerprint}). Give the one it was made with by --tokenizer, or tokenize the text again."
            )
        if made_with.get("fingerprint") is None or made_with.get("unknown_in"):
            self._check_ids(vocabulary_size)

    def _check_ids(self, vocabulary_size: int) -> None:
        starts, hidden = range(0, len(self.tokens), CHUNK_TOKENS), not is_main_process()
        for start in tqdm(starts, "checking token ids", delay=2, mininterval=1, disable=hidden):
            chunk = self.tokens.read(start, start + CHUNK_TOKENS)
            known = (chunk >= 0) & (chunk < vocabulary_size)
            if chunk.dtype.kind == "f":
                known &= chunk == np.trunc(chunk)
            if known.all():
                continue
            wrong = int(known.argmin())
            document = int(np.searchsorted(self.document_starts, start + wrong, side="right")) - 1
            raise InputError(
                f"{self.prefix}: document {document:,} holds token {chunk[wrong]:,}, but the tokenizer at hand has ids "
                f"0 to {vocabulary_size - 1:,}: it was probably made with another. Give that one by --tokenizer."
            )


def make_hashes_comparable(stores: Iterable[TokenStore]) -> None:
    """Know the documents of all ``stores`` by their tokens if those of one are: a hash of text is equal to none."""
    kinds = {store.hashes_of for store in stores}
    if len(kinds) > 1:
        say("note: the text of some sources is not at hand: the documents of all are compared by their tokens")
        for store in stores:
            store.hash_tokens()


def joined_tokens(pairs: list[TokenPair]) -> JoinedTokens:
    """Return the tokens of the pairs end to end.

    Raises:
        InputError: they differ in dtype, or are more than a process may map.
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
    """Return the document starts of pairs laid end to end."""
    if len(parts) == 1:
        return parts[0]
    joined, first = np.zeros(1 + sum(len(part) - 1 for part in parts), dtype=np.int64), 0
    for part in parts:
        np.add(part, int(joined[first]), out=joined[first : first + len(part)])
        first += len(part) - 1
    return joined


def joined_sidecar(pairs: list[TokenPair]) -> dict:
    """Return what the sidecars say together: the counts that all have, summed, and the tokenizer. {} if none has any.

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
    for place in known.values():
        unknown = [
            pair.prefix
            for pair, tokenizer in zip(pairs, made_by, strict=True)
            if "fingerprint" not in tokenizer or "unknown_in" in tokenizer
        ]
        joined["tokenizer"] = {**made_by[place], **({"unknown_in": unknown} if unknown else {})}
    return joined


def load_hashes(path: Path, documents: int) -> np.ndarray:
    """Return the document hashes in ``path``, memory-mapped."""
    hashes = map_row(path)
    if hashes.dtype != np.uint64 or len(hashes) != documents:
        raise InputError(
            f"{path}: {len(hashes):,} hashes of {hashes.dtype}, but the pair has {documents:,} documents, and hashes "
            "are uint64. It is damaged or of another pair: fetch it again, or delete it to have it computed."
        )
    return hashes


def kind_of_hashes(pair: TokenPair) -> str | None:
    """Return what the hashes beside ``pair`` are of, "text" or "tokens"; None if there are none, or it is not known."""
    if not Path(pair.prefix + ".hashes.npy").exists():
        return None
    # Sidecars from before it was written down: of text, unless a merge took in pairs of other writers, whose text and
    # therefore its size is not known.
    return pair.sidecar.get("hashes", "text" if "text_bytes" in pair.sidecar else None)


def hash_documents(tokens: JoinedTokens, starts: np.ndarray) -> np.ndarray:
    """Return ``content_hash`` of each document [starts[i], starts[i + 1]), uint64.

    Of its ids as int32, so that the same documents in another width have the same hashes.
    """
    hashes = np.empty(len(starts) - 1, dtype=np.uint64)
    hidden = not is_main_process()
    with tqdm(
        desc="hashing", total=len(hashes), unit=" documents", unit_scale=True, delay=2, mininterval=1, disable=hidden
    ) as progress:
        for first, last in whole_documents(starts):
            begin, end = int(starts[first]), int(starts[last])
            if end - begin > CHUNK_TOKENS:
                hashes[first] = _hash_in_chunks(tokens, begin, end)
            else:
                content = memoryview(tokens.read(begin, end).astype("<i4").tobytes())
                edges = ((starts[first : last + 1] - begin) * 4).tolist()
                hashes[first:last] = [content_hash(content[start:stop]) for start, stop in pairwise(edges)]
            progress.update(last - first)
    return hashes


def _hash_in_chunks(tokens: JoinedTokens, begin: int, end: int) -> int:
    """Return ``content_hash`` of one document that is too long to be in memory whole: some stores are one document."""
    digest = hashlib.blake2b(digest_size=8)
    for start in range(begin, end, CHUNK_TOKENS):
        digest.update(tokens.read(start, min(end, start + CHUNK_TOKENS)).astype("<i4"))
    return int.from_bytes(digest.digest(), "little")


def whole_documents(starts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield [first, last) over all documents: as many at once as CHUNK_TOKENS hold, one at least."""
    first, documents = 0, len(starts) - 1
    while first < documents:
        fitting = int(np.searchsorted(starts, starts[first] + CHUNK_TOKENS, side="right")) - 1
        last = min(max(first + 1, fitting), first + CHUNK_TOKENS, documents)
        yield first, last
        first = last


def files_key(pair: TokenPair) -> str:
    """Return the pair's name and 16 hex digits that change when one of its files is replaced."""
    stats = [(str(path.resolve()), path.stat()) for path in pair.files]
    identity = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]
    return f"{Path(pair.prefix).name}-{hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).hexdigest()}"


def keep(path: Path, hashes: np.ndarray) -> None:
    """Write ``hashes`` to ``path``, whole or not at all; where that cannot be done, say so and go on without."""
    partial = path.with_name(f"{path.stem}.partial-{uuid4().hex[:8]}.npy")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(partial, hashes)
        os.replace(partial, path)
    except OSError as error:
        if partial.exists():
            partial.unlink()
        say(f"note: document hashes are not kept for the next run: {error}")
