"""Token stores -> rows of fixed length: the rows of one store, and of several stores joined.

Another packing is a class beside PackedRows, as in best_fit.py. These know of packing, too:

- ``--packing`` in arguments.py; dataset/rows.py and train/forgetting.py, which build the rows;
- dataset/ledger.py, which accounts for dropped tokens; model/attention.py, which keeps documents apart;
- distributed/context_parallel.py, which refuses what it cannot divide.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from common.tokens.store import TokenStore
from common.tokens.tokenizer import decoded

IGNORED_TARGET = -100  # torch's cross_entropy skips such targets
MOST_DECODED = 4_000_000  # tokens of a document
IGNORED_ROW = -1  # the index of a row without targets: it completes a batch and trains nothing


class PackedRows:
    """The chosen documents of a store as one stream of tokens, cut into rows.

    Each document ends with its end-of-document token, and the next one follows directly. Row i is the window of
    context_length + 1 tokens that starts at token i * context_length of the stream. Its first context_length tokens are
    the input, its last context_length tokens are the targets. Windows overlap by one token, so that every token of the
    stream except the first is a target exactly once. Only the last partial row is dropped: at most context_length
    tokens.

    Example: documents [5, 6], [7, 8, 9] and [1], end token 0, context_length 4.

        stream        5 6 0 7 8 9 0 1 0
        row           0         1
        window        5 6 0 7 8 8 9 0 1 0
        input_ids     5 6 0 7   8 9 0 1
        shift_labels  6 0 7 8   9 0 1 0

    In isolated rows, attention stays within a document. ``position_ids`` start again at 0 with every document, and
    model/attention.py finds the documents by them. The first token of a document is not a target, because nothing in
    its document precedes it.

        shift_labels  6 0 - 8   9 0 - 0     (-: IGNORED_TARGET)
        position_ids  0 1 2 0   0 1 2 0

    A row is found on the memory map in O(log documents).

    Source: for the ignored targets, Qwen's maintainers in https://github.com/QwenLM/Qwen/issues/427
    """

    def __init__(
        self,
        store: TokenStore,
        chosen: np.ndarray,
        context_length: int,
        isolated: bool = False,
        max_rows: int | None = None,
        part: tuple[int, int] | None = None,
    ):
        """Pack the ``chosen`` documents of ``store``.

        Args:
            chosen: which of the store's documents are packed: bool, (documents,).
            isolated: attention stays within a document.
            max_rows: at most this many rows are served; None: all whole rows.
            part: of the one document that is chosen, only these tokens, [begin, end); None: all.
        """
        self.source = str(store.prefix)
        self.tokens = store.tokens
        self.document_starts = store.document_starts
        self.text_bytes = store.text_bytes()  # of each document of the store
        self.chosen = chosen
        self.context_length = context_length
        self.isolated = isolated
        # Neighbouring chosen documents lie in the store as one run. The edges are where runs begin and end, in turn:
        # chosen [1, 1, 0, 1] -> edges [0, 2, 3, 4], the runs [0, 2) and [3, 4).
        edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0))
        self.run_starts = store.document_starts[edges[0::2]]  # the first token of each run, in the store
        run_lengths = store.document_starts[edges[1::2]] - self.run_starts
        if part is not None:
            self.run_starts = self.run_starts + part[0]
            run_lengths = np.array([part[1] - part[0]])
        self.stream_starts = np.concatenate([[0], np.cumsum(run_lengths)])  # the same in the stream, and its end
        self.documents = int(chosen.sum()) if part is None or part[0] == 0 else 0  # a document counts where it begins
        self.stream_tokens = int(self.stream_starts[-1])
        self.whole_rows = max(0, (self.stream_tokens - 1) // context_length)
        self.rows = self.whole_rows if max_rows is None else min(self.whole_rows, max_rows)

    @property
    def row_tokens(self) -> int:
        """The tokens of the stream that the whole rows cover."""
        return self.whole_rows * self.context_length + 1 if self.whole_rows else 0

    @property
    def dropped_tokens(self) -> int:
        """The tokens of the last partial row."""
        return self.stream_tokens - self.row_tokens

    def tokens_in(self, rows: int) -> int:
        """Return how many tokens so many rows hold."""
        return rows * self.context_length

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``shift_labels`` and, if isolated, ``position_ids``: int64, (context_length,) each."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Return several rows. torch's loader calls this for a batch: it takes half the time of single rows."""
        for row in rows:
            if not 0 <= row < self.rows:
                raise IndexError(row)
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
        """Return the documents that ``row`` has tokens of, by their numbers in the store, from 0."""
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
        """Return every target of the rows in order, without the ignored ones: int64, (targets,)."""
        length = self.rows * self.context_length
        if length == 0:
            return np.zeros(0, dtype=np.int64)
        targets = self.window(1, length)
        return targets[~self.starts_in(1, length)] if self.isolated else targets

    def target_bytes(self, tokenizer: PreTrainedTokenizerBase) -> float:
        """Return the bytes of UTF-8 text that all targets stand for; end-of-document tokens stand for none.

        A document all of whose tokens are targets counts with the size of its text, which a tokenizer that loses some
        of the text does not give back. A document that is cut counts with the share of its decoded text that is in the
        targets. If the size of a text is not known, or a cut document is too long to be decoded as a whole, the decoded
        bytes of its targets are counted.
        """
        total, not_known = 0, [np.zeros(0, np.int64)]
        for begin, end in self._target_pieces():
            first = int(self.document_starts.searchsorted(begin, side="right")) - 1
            last = int(self.document_starts.searchsorted(end))
            for document in range(first, last):
                start, stop = self.document_starts[document : document + 2].tolist()
                targets = slice(max(begin, start + 1 if self.isolated else start), min(end, stop))
                text_bytes = -1 if self.text_bytes is None else int(self.text_bytes[document])
                if text_bytes >= 0 and targets == slice(start, stop):
                    total += text_bytes
                elif text_bytes < 0 or stop - start > MOST_DECODED:
                    not_known.append(self.tokens[targets].astype(np.int64))
                else:
                    total += self._share_of_text(targets, slice(start, stop), text_bytes, tokenizer)
        targets = np.concatenate(not_known)
        return total + len(decoded(targets[targets != tokenizer.eos_token_id], tokenizer).encode())

    def _target_pieces(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges of the store that hold the targets."""
        return self._pieces(1, self.rows * self.context_length)

    def _share_of_text(self, targets: slice, document: slice, text_bytes: int, tokenizer) -> float:
        """Return the bytes of ``targets``, a part of ``document``, whose text has ``text_bytes``."""
        part, whole = (
            len(decoded(tokens[tokens != tokenizer.eos_token_id], tokenizer).encode())
            for tokens in (self.tokens[targets].astype(np.int64), self.tokens[document].astype(np.int64))
        )
        if whole == 0:
            return text_bytes * (targets.stop - targets.start) / (document.stop - document.start)
        return part if whole == text_bytes else text_bytes * part / whole

    def _pieces(self, start: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges [begin, end) of the store that hold tokens [start, start + length) of the stream, by run."""
        run = int(self.stream_starts.searchsorted(start, side="right")) - 1
        while length:
            begin = int(self.run_starts[run] + start - self.stream_starts[run])
            taken = min(length, int(self.stream_starts[run + 1]) - start)
            yield begin, begin + taken
            start += taken
            length -= taken
            run += 1

    def _gathered(self, pieces: Iterable[tuple[int, int]]) -> np.ndarray:
        """Return the tokens of ``pieces`` of the store, one after the other, as int64."""
        parts = [self.tokens[begin:end] for begin, end in pieces]
        if not parts:
            return np.zeros(0, dtype=np.int64)
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return tokens.astype(np.int64)

    def _marked(self, pieces: Iterable[tuple[int, int]], length: int) -> np.ndarray:
        """Return which of the ``length`` tokens of ``pieces`` are the first of a document: bool, (length,)."""
        mask = np.zeros(length, dtype=bool)
        offset = 0  # of the piece, among the ``length`` tokens
        for begin, end in pieces:
            first, last = self.document_starts.searchsorted([begin, end])
            mask[offset + self.document_starts[first:last] - begin] = True
            offset += end - begin
        return mask


class JoinedRows(Dataset):
    """The rows of several sources, one source after the other.

    Attributes:
        weights: the proportions in which training mixes the sources; None: each row is trained on once a pass.
        split_alone: of each source, whether its documents are held out or not whatever the other sources are.
        first_rows: the first row of each source, and the end: int64, (sources + 1,).
    """

    def __init__(
        self, sources: list[PackedRows], weights: list[float] | None = None, split_alone: list[bool] | None = None
    ):
        self.sources = sources
        self.weights = weights
        self.split_alone = [True] * len(sources) if split_alone is None else split_alone
        self.context_length = sources[0].context_length
        self.first_rows = np.cumsum([0, *(len(rows) for rows in sources)])
        self.documents = sum(rows.documents for rows in sources)
        self.stream_tokens = sum(rows.stream_tokens for rows in sources)
        self._target_bytes: float | None = None

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Return several rows, as PackedRows does. IGNORED_ROW stands for a row without targets."""
        numbers = np.asarray(rows)
        sources = np.searchsorted(self.first_rows, numbers, side="right") - 1
        outside = (numbers != IGNORED_ROW) & ((sources < 0) | (sources == len(self.sources)))
        if outside.any():
            raise IndexError(int(numbers[outside][0]))
        found = [self._ignored_row()] * len(numbers)
        for source in np.unique(sources[sources >= 0]):
            places = np.flatnonzero(sources == source)
            own = self.sources[source].__getitems__((numbers[places] - self.first_rows[source]).tolist())
            for place, row in zip(places, own, strict=True):
                found[place] = row
        return found

    def _ignored_row(self) -> dict[str, torch.Tensor]:
        """Return a row that trains nothing: it completes the last batch."""
        zeros = torch.zeros(self.context_length, dtype=torch.int64)
        row = {"input_ids": zeros, "shift_labels": torch.full_like(zeros, IGNORED_TARGET)}
        if self.sources[0].isolated:
            row["position_ids"] = torch.arange(len(zeros))
        return row

    def targets(self) -> np.ndarray:
        """Return every target of the rows in order, without the ignored ones: int64, (targets,)."""
        return np.concatenate([rows.targets() for rows in self.sources])

    def target_bytes(self, tokenizer: PreTrainedTokenizerBase) -> float:
        """Return the bytes of UTF-8 text that all targets stand for, as PackedRows does; computed once."""
        if self._target_bytes is None:
            self._target_bytes = sum(rows.target_bytes(tokenizer) for rows in self.sources)
        return self._target_bytes


def collate_rows(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack rows into a batch of contiguous tensors, int64, (rows, context_length) each.

    ``labels`` is the same tensor as ``shift_labels``. transformers computes a loss only if there are ``labels``, but
    then uses ``shift_labels``.
    """
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {**batch, "labels": batch["shift_labels"]}


def document_positions(starts: np.ndarray) -> np.ndarray:
    """Return the position of every token in its document, from 0: int64, (..., tokens).

    The beginning of the row counts as the start of a document. For example, starts [0, 0, 0, 1, 0] give
    [0, 1, 2, 0, 1].

    Args:
        starts: which tokens are the first of a document: bool, (..., tokens).
    """
    places = np.arange(starts.shape[-1])
    # The place at which the document of each token starts: [0, 0, 0, 3, 3].
    first_places = np.maximum.accumulate(np.where(starts, places, 0), axis=-1)
    return places - first_places
