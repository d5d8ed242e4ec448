"""Token store -> fixed-length rows, the held-out split, the order of training, and the token ledger."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from common.held_out import held_out_documents
from common.messages import InputError
from common.token_store import TokenStore

IGNORED_ROW = -1  # the index of a row without targets: it completes a batch and trains nothing
IGNORED_TARGET = -100  # torch's cross_entropy skips such targets


class PackedRows(Dataset):
    """The chosen documents of a store as one stream, cut into rows.

    Row i is the window of context_length + 1 tokens that starts at i * context_length: its first context_length
    tokens are the input, its last context_length the targets. Windows overlap by one token, so that every token of
    the stream but the first is a target exactly once. Documents follow each other without gap, each closed by its
    end-of-document token. Dropped: the last partial row, ``dropped_tokens`` < context_length + 1.

    A row is found in O(log gaps) on the memory map, where a gap is a run of documents of the other split.
    """

    def __init__(self, store: TokenStore, chosen: np.ndarray, context_length: int, max_rows: int | None = None):
        """``chosen``: bool mask over the store's documents, shape (documents,)."""
        self.tokens, self.context_length = store.tokens, context_length
        edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0))  # runs of chosen documents
        self.run_starts = store.document_starts[edges[0::2]]  # in the store
        run_lengths = store.document_starts[edges[1::2]] - self.run_starts
        self.stream_starts = np.concatenate([[0], np.cumsum(run_lengths)])  # in the stream; the last is its end
        self.documents = int(chosen.sum())
        self.stream_tokens = int(self.stream_starts[-1])
        self.whole_rows = max(0, (self.stream_tokens - 1) // context_length)
        self.rows = self.whole_rows if max_rows is None else min(self.whole_rows, max_rows)
        self._target_bytes: int | None = None

    @property
    def row_tokens(self) -> int:
        """Tokens of the stream that its whole rows cover."""
        return self.whole_rows * self.context_length + 1 if self.whole_rows else 0

    @property
    def dropped_tokens(self) -> int:
        """Tokens of the last partial row."""
        return self.stream_tokens - self.row_tokens

    def target_bytes(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return the UTF-8 size of the text that the rows' targets decode to; end-of-document tokens weigh nothing."""
        if self._target_bytes is None:
            targets = self.window(1, self.rows * self.context_length)
            text = tokenizer.decode(targets[targets != tokenizer.eos_token_id], clean_up_tokenization_spaces=False)
            self._target_bytes = len(text.encode())
        return self._target_bytes

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` and ``shift_labels``, int64, shape (context_length,) each."""
        if row == IGNORED_ROW:
            return {
                "input_ids": torch.zeros(self.context_length, dtype=torch.int64),
                "shift_labels": torch.full((self.context_length,), IGNORED_TARGET, dtype=torch.int64),
            }
        if not 0 <= row < self.rows:
            raise IndexError(row)
        window = torch.from_numpy(self.window(row * self.context_length, self.context_length + 1))
        return {"input_ids": window[:-1], "shift_labels": window[1:]}

    def window(self, start: int, length: int) -> np.ndarray:
        """Return tokens [start, start + length) of the stream as int64, gathered from the runs they lie in."""
        pieces = []
        run = int(np.searchsorted(self.stream_starts, start, side="right")) - 1
        while length:
            offset = start - self.stream_starts[run]
            taken = min(length, int(self.stream_starts[run + 1] - start))
            begin = int(self.run_starts[run] + offset)
            pieces.append(self.tokens[begin : begin + taken])
            start, length, run = start + taken, length - taken, run + 1
        return np.concatenate(pieces).astype(np.int64)


def collate_rows(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack rows into a batch, each tensor of shape (rows, context_length), contiguous.

    ``labels`` repeats ``shift_labels``: transformers computes a loss only when there are labels, and then prefers
    the shifted ones.
    """
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "shift_labels")}
    return {**batch, "labels": batch["shift_labels"]}


class TrainingOrder(Sampler):
    """The row at every position of the whole run: pass after pass over the rows, each shuffled by (seed, pass).

    Position p is row permutation[pass][p % rows] with pass = p // rows, so a step may span two passes, and resuming
    is a seek: set ``start`` and iterate.

    Attributes:
        start, real, total: positions from ``start`` to ``real`` hold rows; those up to ``total`` are ignored rows,
            which complete the last step.
        length: what ``len`` says, in rows.
    """

    def __init__(self, rows: int, seed: int, start: int = 0, real: int = 0, total: int = 0):
        self.rows, self.seed = rows, seed
        self.start, self.real, self.total, self.length = start, real, total, total

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        position = self.start
        while position < self.real:
            epoch, first = divmod(position, self.rows)
            permutation = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
            last = min(self.rows, first + self.real - position)
            yield from permutation[first:last].tolist()
            position += last - first
        yield from [IGNORED_ROW] * (self.total - max(position, self.real))


@dataclass
class Ledger:
    """Where every token went: tokens_read = tokens_train + tokens_held_out + tokens_dropped."""

    documents: int  # read, of both splits
    documents_held_out: int
    documents_empty: int  # white space only: no tokens, not among ``documents``
    documents_malformed: int  # skipped at --skip_malformed, not among ``documents``
    tokens_read: int  # with an end-of-document token for each document
    tokens_train: int  # laid into training rows
    tokens_held_out: int  # laid into held-out rows
    tokens_dropped: int  # the last partial row of each split
    tokens_trained: int = 0  # targets of the steps made, over all passes

    @classmethod
    def of(cls, store: TokenStore, train: PackedRows, held_out: PackedRows) -> "Ledger":
        """Count the store and its two splits; raises AssertionError if a token is unaccounted for."""
        ledger = cls(
            documents=store.documents,
            documents_held_out=held_out.documents,
            documents_empty=store.sidecar.get("empty", 0),
            documents_malformed=store.sidecar.get("malformed", 0),
            tokens_read=len(store.tokens),
            tokens_train=train.row_tokens,
            tokens_held_out=held_out.row_tokens,
            tokens_dropped=train.dropped_tokens + held_out.dropped_tokens,
        )
        laid = ledger.tokens_train + ledger.tokens_held_out + ledger.tokens_dropped
        assert ledger.tokens_read == laid, f"the ledger does not add up: {asdict(ledger)}"
        return ledger

    def __str__(self) -> str:
        return (
            f"{self.tokens_read:,} tokens read ({self.documents:,} documents) = {self.tokens_train:,} train"
            f" + {self.tokens_held_out:,} held out ({self.documents_held_out:,} documents)"
            f" + {self.tokens_dropped:,} dropped (last partial rows)"
            + (f"; {self.documents_empty:,} empty documents" if self.documents_empty else "")
            + (f"; {self.documents_malformed:,} malformed documents skipped" if self.documents_malformed else "")
        )


def split_rows(store: TokenStore, fraction: float, context_length: int, max_eval_rows: int | None = None):
    """Return (training rows, held-out rows, ledger) of a store.

    Raises:
        InputError: a split is shorter than one row.
    """
    if max_eval_rows is not None and max_eval_rows < 1:
        raise InputError(f"--max_eval_rows {max_eval_rows}: must be at least 1, or left out to evaluate on all.")
    mask = held_out_documents(store.document_hashes(), fraction)
    train = PackedRows(store, ~mask, context_length)
    held_out = PackedRows(store, mask, context_length, max_eval_rows)
    for name, rows in (("training", train), ("held-out", held_out)):
        if len(rows) == 0:
            raise InputError(
                f"the {name} documents hold {rows.stream_tokens:,} tokens, less than one row of {context_length:,} + 1."
                " Give more text, a shorter --context_length, or another --held_out_fraction."
            )
    return train, held_out, Ledger.of(store, train, held_out)


def unigram_loss(train: PackedRows, held_out: PackedRows, vocabulary_size: int) -> float:
    """Return the held-out loss, in nats a token, of predicting every token by its frequency in training.

    The least that a model must beat. Counted over at most the first 10 million training tokens, one added to each
    count.
    """
    read = min(train.stream_tokens, 10_000_000)
    counts = 1 + np.bincount(train.window(0, read), minlength=vocabulary_size)
    targets = held_out.window(1, held_out.rows * held_out.context_length)
    return float(np.mean(np.log(counts.sum()) - np.log(counts[targets])))
