"""Rows that cut no document that fits into one: best-fit packing, ``--packing best_fit``.

PackedRows cuts the stream of documents wherever a row is full: with rows of 512 tokens, most documents are cut once,
and most rows begin in the middle of one. Here a document longer than a row is cut into whole rows and a rest. Rests and
short documents, the longest first, each go into the row in which the least room is left. What stays empty is a fraction
of a percent. The rows hold every token once; they are other rows, not fewer.

Source: Ding et al., Fewer Truncations Improve Language Modeling, https://arxiv.org/abs/2404.10830
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from common.dataset.packing import IGNORED_TARGET, PackedRows
from common.tokens.store import TokenStore


class BestFitRows(PackedRows):
    """The chosen documents of a store in rows that begin with a document, or with the next part of a long one.

    Every token is a target exactly once, the first of a row, too: in front of a row's input stands the end token, or
    the token before the part. Documents of a row see each other, as in PackedRows. Room that is left has the end token
    as input, and no targets.

    Example: documents [5, 6], [7, 8, 9, 4, 3] and [1], end token 0, context_length 4.

        row           0         1         2
        holds         7 8 9 4   5 6 0     3 0 1 0
        input_ids     0 7 8 9   0 5 6 0   4 3 0 1
        shift_labels  7 8 9 4   5 6 0 -   3 0 1 0      (-: IGNORED_TARGET)

    They are rows to train on. Held-out rows are always windows, so that the losses of all packings compare. Memory:
    about 24 bytes a document, in every process.
    """

    def __init__(self, store: TokenStore, chosen: np.ndarray, context_length: int):
        """Pack the ``chosen`` documents of ``store``; chosen: bool, (documents,)."""
        super().__init__(store, chosen, context_length)
        self.end_token_id = store.end_token_id
        places = np.flatnonzero(chosen)
        starts, ends = store.document_starts[places], store.document_starts[places + 1]
        whole = (ends - starts) // context_length  # rows that a document fills
        rests = ends - starts - whole * context_length
        has_rest = rests > 0
        bins = best_fit(rests[has_rest], context_length)
        # Parts of documents, row by row. Where a part continues a document, it comes first in its row.
        full = np.repeat(starts, whole) + context_length * _counts_within(whole)
        begins = np.concatenate([full, (ends - rests)[has_rest]])
        rows = np.concatenate([np.arange(len(full)), len(full) + bins])
        order = np.lexsort((np.concatenate([np.zeros(len(full), bool), whole[has_rest] == 0]), rows))
        self.part_begins = begins[order]
        self.part_sizes = np.concatenate([np.full(len(full), context_length), rests[has_rest]])[order]
        self.whole_rows = self.rows = int(rows.max(initial=-1)) + 1
        self.first_parts = np.searchsorted(rows[order], np.arange(self.rows + 1))  # of each row, and the end
        self.documents = len(places)

    @property
    def row_tokens(self) -> int:
        """The tokens in the rows: all."""
        return self.stream_tokens

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Return several rows: ``input_ids`` and ``shift_labels``, int64, (context_length,) each."""
        for row in rows:
            if not 0 <= row < self.rows:
                raise IndexError(row)
        inputs = np.full((len(rows), self.context_length), self.end_token_id, dtype=np.int64)
        targets = np.full_like(inputs, IGNORED_TARGET)
        for place, row in enumerate(rows):
            tokens = np.concatenate([self.tokens[begin:end] for begin, end in self._parts(row)])
            targets[place, : len(tokens)] = tokens
            inputs[place, 1 : len(tokens) + 1] = tokens[: self.context_length - 1]
            first = int(self.part_begins[self.first_parts[row]])
            if self.document_starts[self.document_starts.searchsorted(first, side="right") - 1] < first:
                inputs[place, 0] = self.tokens[first - 1 : first][0]
        return [
            {"input_ids": torch.from_numpy(inputs[place]), "shift_labels": torch.from_numpy(targets[place])}
            for place in range(len(rows))
        ]

    def documents_of(self, row: int) -> list[int]:
        """Return the documents that ``row`` has tokens of, by their numbers in the store, from 0."""
        begins = [begin for begin, _ in self._parts(row)]
        return (self.document_starts.searchsorted(begins, side="right") - 1).tolist()

    def tokens_in(self, rows: int) -> int:
        """Return how many tokens so many rows hold, without their empty room: exact for whole passes over all rows."""
        return round(rows * self.stream_tokens / self.rows) if self.rows else 0

    def targets(self) -> np.ndarray:
        """Return every target of the rows in order: int64, (targets,)."""
        ends = self.part_begins + self.part_sizes
        return self._gathered(zip(self.part_begins.tolist(), ends.tolist(), strict=True))

    def _target_pieces(self) -> Iterator[tuple[int, int]]:
        return self._pieces(0, self.stream_tokens)

    def _parts(self, row: int) -> list[tuple[int, int]]:
        """Return the ranges [begin, end) of the store that ``row`` holds."""
        parts = slice(self.first_parts[row], self.first_parts[row + 1])
        begins = self.part_begins[parts]
        return list(zip(begins.tolist(), (begins + self.part_sizes[parts]).tolist(), strict=True))


def best_fit(sizes: np.ndarray, room: int) -> np.ndarray:
    """Return the bin of each size: bins hold ``room``, and each size, the largest first, goes where least room is left.

    Sizes [2, 3, 2, 1], room 4 -> bins [1, 0, 1, 0]. Equal sizes are placed together, so the time grows with the number
    of different ones.

    Args:
        sizes: from 1 to ``room``: (sizes,).
    """
    bins = np.zeros(len(sizes), dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    values, counts = np.unique(sizes, return_counts=True)
    made = taken = 0
    open_bins: dict[int, list[np.ndarray]] = {}  # room that is left -> the bins with it
    rooms: list[int] = []  # the keys, ascending

    def put_back(some: np.ndarray, left: int) -> None:
        if left and len(some):
            if left not in open_bins:
                open_bins[left] = []
                insort(rooms, left)
            open_bins[left].append(some)

    for size, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            place = bisect_left(rooms, size)
            if place < len(rooms):
                left = rooms.pop(place)
                pieces = open_bins.pop(left)
                some = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            else:
                left = room
                some = np.arange(made, made + -(-count // (room // size)))
                made += len(some)
            # A bin that has taken one has the least room that is left, so it takes the next one, while it can.
            in_each = left // size
            used = some[: -(-count // in_each)].copy()  # a few of many bins: a view would keep all of them in memory
            placed = np.repeat(used, in_each)[:count]
            bins[order[taken : taken + len(placed)]] = placed
            in_last = len(placed) - in_each * (len(used) - 1)
            put_back(some[len(used) :], left)
            put_back(used[:-1], left - in_each * size)
            put_back(used[-1:], left - in_last * size)
            taken += len(placed)
            count -= len(placed)
    return bins


def _counts_within(counts: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... for each count in turn: [2, 0, 3] -> [0, 1, 0, 1, 2]."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
