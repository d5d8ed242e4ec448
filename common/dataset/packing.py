"""Token stores -> rows of fixed length: of one store, and of several joined."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from common.tokens.store import TokenStore

IGNORED_TARGET = -100  # torch's cross_entropy skips such targets
IGNORED_ROW = -1  # the index of a row without targets: it completes a batch and trains nothing


class PackedRows:
    """The chosen documents of a store as one stream, cut into rows.

    Row i is the window of context_length + 1 tokens that starts at i * context_length: its first context_length
    tokens are the input, its last context_length the targets. Windows overlap by one token, so that every token of
    the stream but the first is a target exactly once. Documents follow each other without gap, each closed by its
    end-of-document token. Dropped: the last partial row, ``dropped_tokens`` < context_length + 1.

    Isolated rows also have ``position_ids`` that start again at 0 with every document, by which attention stays
    within it (model/attention.py), and the first token of a document is no target: nothing before it foretells it.
    (Source: Qwen's maintainers, https://github.com/QwenLM/Qwen/issues/427)

    A row is found in O(log documents) on the memory map.
    """

    def __init__(
        self,
        store: TokenStore,
        chosen: np.ndarray,
        context_length: int,
        isolated: bool = False,
        max_rows: int | None = None,
    ):
        """``chosen``: bool mask over the store's documents, shape (documents,)."""
        self.tokens, self.document_starts = store.tokens, store.document_starts
        self.context_length, self.isolated, self.chosen = context_length, isolated, chosen
        self.source = str(store.prefix)
        edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0))  # runs of chosen documents
        self.run_starts = store.document_starts[edges[0::2]]  # in the store
        run_lengths = store.document_starts[edges[1::2]] - self.run_starts
        self.stream_starts = np.concatenate([[0], np.cumsum(run_lengths)])  # in the stream; the last is its end
        self.documents = int(chosen.sum())
        self.stream_tokens = int(self.stream_starts[-1])
        self.whole_rows = max(0, (self.stream_tokens - 1) // context_length)
        self.rows = self.whole_rows if max_rows is None else min(self.whole_rows, max_rows)

    @property
    def row_tokens(self) -> int:
        """Tokens of the stream that its whole rows cover."""
        return self.whole_rows * self.context_length + 1 if self.whole_rows else 0

    @property
    def dropped_tokens(self) -> int:
        """Tokens of the last partial row."""
        return self.stream_tokens - self.row_tokens

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``shift_labels`` and, isolated, ``position_ids``: int64, (context_length,) each."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Return several rows; torch's loader asks for a batch so, which takes half the time of one by one."""
        if out := [row for row in rows if not 0 <= row < self.rows]:
            raise IndexError(out[0])
        length = self.context_length + 1
        pieces = [list(self._pieces(row * self.context_length, length)) for row in rows]
        windows = np.stack([self._gathered(parts) for parts in pieces])  # (rows, context_length + 1)
        named = {"input_ids": windows[:, :-1], "shift_labels": windows[:, 1:]}
        if self.isolated:
            starts = np.stack([self._marked(parts, length) for parts in pieces])
            named["shift_labels"] = np.where(starts[:, 1:], IGNORED_TARGET, windows[:, 1:])
            named["position_ids"] = document_positions(starts[:, :-1])
        tensors = {name: torch.from_numpy(numbers) for name, numbers in named.items()}
        return [{name: tensor[place] for name, tensor in tensors.items()} for place in range(len(rows))]

    def documents_of(self, row: int) -> list[int]:
        """Return the documents that a row has tokens of, counted in the store from 0."""
        found: list[int] = []
        for begin, end in self._pieces(row * self.context_length, self.context_length + 1):
            first, last = np.searchsorted(self.document_starts, [begin, end - 1], side="right") - 1
            found += range(int(first), int(last) + 1)
        return found

    def window(self, start: int, length: int) -> np.ndarray:
        """Return tokens [start, start + length) of the stream as int64."""
        return self._gathered(self._pieces(start, length))

    def starts_in(self, start: int, length: int) -> np.ndarray:
        """Return which tokens [start, start + length) of the stream are the first of a document: bool, (length,)."""
        return self._marked(self._pieces(start, length), length)

    def targets(self) -> np.ndarray:
        """Return every target of the rows in order, without the ignored ones: int64."""
        length = self.rows * self.context_length
        if length == 0:
            return np.zeros(0, dtype=np.int64)
        targets = self.window(1, length)
        return targets[~self.starts_in(1, length)] if self.isolated else targets

    def _pieces(self, start: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield where the stream's tokens [start, start + length) lie in the store, run by run."""
        run = int(self.stream_starts.searchsorted(start, side="right")) - 1
        while length:
            begin = int(self.run_starts[run] + start - self.stream_starts[run])
            taken = min(length, int(self.stream_starts[run + 1]) - start)
            yield begin, begin + taken
            start, length, run = start + taken, length - taken, run + 1

    def _gathered(self, pieces: Iterable[tuple[int, int]]) -> np.ndarray:
        """Return the tokens of ``pieces`` of the store as int64."""
        parts = [self.tokens[begin:end] for begin, end in pieces] or [self.tokens[:0]]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(np.int64)

    def _marked(self, pieces: Iterable[tuple[int, int]], length: int) -> np.ndarray:
        """Return which of the ``length`` tokens of ``pieces`` are the first of a document: bool, (length,)."""
        mask, offset = np.zeros(length, dtype=bool), 0
        for begin, end in pieces:
            first, last = self.document_starts.searchsorted([begin, end])
            mask[offset + self.document_starts[first:last] - begin] = True
            offset += end - begin
        return mask


class JoinedRows(Dataset):
    """The rows of several sources, one after the other. ``weights`` says how training mixes them, if not evenly."""

    def __init__(self, sources: list[PackedRows], weights: list[float] | None = None):
        self.sources, self.weights = sources, weights
        self.context_length = sources[0].context_length
        self.first_rows = np.cumsum([0, *(len(rows) for rows in sources)])
        self.documents = sum(rows.documents for rows in sources)
        self.stream_tokens = sum(rows.stream_tokens for rows in sources)
        self._target_bytes: int | None = None

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Return several rows, as PackedRows does; IGNORED_ROW may be among them."""
        numbers = np.asarray(rows)
        sources = np.searchsorted(self.first_rows, numbers, side="right") - 1
        if (out := numbers[(numbers != IGNORED_ROW) & ((sources < 0) | (sources == len(self.sources)))]).size:
            raise IndexError(int(out[0]))
        found = [self._ignored_row()] * len(numbers)
        for source in np.unique(sources[sources >= 0]):
            places = np.flatnonzero(sources == source)
            own = self.sources[source].__getitems__((numbers[places] - self.first_rows[source]).tolist())
            for place, row in zip(places, own, strict=True):
                found[place] = row
        return found

    def _ignored_row(self) -> dict[str, torch.Tensor]:
        zeros = torch.zeros(self.context_length, dtype=torch.int64)
        ignored = {"input_ids": zeros, "shift_labels": torch.full_like(zeros, IGNORED_TARGET)}
        return ignored | ({"position_ids": torch.arange(len(zeros))} if self.sources[0].isolated else {})

    def targets(self) -> np.ndarray:
        """Return every target of the rows in order, without the ignored ones: int64."""
        return np.concatenate([rows.targets() for rows in self.sources])

    def target_bytes(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return the UTF-8 size of the text that the targets decode to; end-of-document tokens weigh nothing."""
        if self._target_bytes is None:
            targets = self.targets()
            text = tokenizer.decode(targets[targets != tokenizer.eos_token_id], clean_up_tokenization_spaces=False)
            self._target_bytes = len(text.encode())
        return self._target_bytes


def collate_rows(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack rows into a batch, each tensor of shape (rows, context_length), contiguous.

    ``labels`` repeats ``shift_labels``: transformers computes a loss only when there are labels, and then prefers
    the shifted ones.
    """
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {**batch, "labels": batch["shift_labels"]}


def document_positions(starts: np.ndarray) -> np.ndarray:
    """Return the place of every token in its document, from 0; the row's own beginning counts as a start.

    Args:
        starts: which tokens are the first of a document, bool, shape (..., tokens).

    Returns:
        int64, shape (..., tokens).
    """
    places = np.arange(starts.shape[-1])
    return places - np.maximum.accumulate(np.where(starts, places, 0), axis=-1)
