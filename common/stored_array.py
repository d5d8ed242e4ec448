"""Numbers on disk that are never loaded whole: read in pieces, or memory-mapped; one file or several end to end."""

import mmap
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from common.messages import InputError

CHUNK_TOKENS = 4_000_000  # to go through all tokens: at most 32 MB at once


@dataclass(frozen=True)
class StoredArray:
    """Numbers that lie one after the other in a file: a slice [start:stop] is read, ``mapped`` maps them all."""

    path: str
    dtype: np.dtype
    offset: int  # bytes
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, window: slice) -> np.ndarray:
        start, stop, _ = window.indices(self.length)
        offset = self.offset + start * self.dtype.itemsize
        numbers = np.fromfile(self.path, self.dtype, max(0, stop - start), offset=offset)
        if len(numbers) < stop - start:
            raise InputError(f"{self.path}: became shorter while it was read. Start again when nothing writes to it.")
        return numbers

    def mapped(self) -> np.ndarray:
        """Return all numbers as a read-only memory map."""
        if self.length == 0:  # an empty file cannot be mapped
            return np.zeros(0, self.dtype)
        with open(self.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):  # not on Windows
            # Rows are shuffled, so reading ahead is waste: measured on a 2 GB file, 5,000 rows of 512 tokens not yet in
            # memory took 2.0 s with it and 0.4 s without, and mapped 307 MB against 25 MB.
            mapped.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(mapped, self.dtype, self.length, self.offset)


class JoinedTokens:
    """The tokens of pairs end to end: ``len``, ``dtype``, and slices [start:stop] of the memory maps, as arrays.

    Pickled as file names, not as content, so that a worker process that is spawned maps the files anew.
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
        """Return tokens [start, stop) by plain reads. For going through all: mapped pages would fill the memory."""
        return self._gather(self.parts, slice(start, stop))

    def _gather(self, parts: list[np.ndarray] | list[StoredArray], window: slice) -> np.ndarray:
        start, stop, step = window.indices(len(self))
        if step != 1:
            raise ValueError(f"step {step}: tokens are taken in runs")
        pieces, part = [], bisect_right(self.starts, start) - 1
        while start < stop:
            end = min(stop, self.starts[part + 1])
            pieces.append(parts[part][start - self.starts[part] : end - self.starts[part]])
            start, part = end, part + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, self.dtype), *pieces])
