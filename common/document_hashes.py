"""The 64-bit hash of each document: loaded, computed from the tokens where a pair comes without, and kept."""

import hashlib
import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import numpy as np
from tqdm import tqdm

from common.messages import InputError, is_main_process, say
from common.splits import content_hash
from common.stored_array import CHUNK_TOKENS, JoinedTokens
from common.token_pair import TokenPair, map_row


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
