"""Where every token and every document of a source went."""

from collections import Counter
from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from common.corpus.splits import Split
from common.dataset.packing import PackedRows
from common.tokens.store import TokenStore


@dataclass
class Ledger:
    """The counts of a source, or of several added up.

    Two sums always hold, or ``check`` raises:

        tokens_read = tokens_train + tokens_held_out + tokens_test + tokens_duplicate + tokens_dropped
        documents = documents_train + documents_held_out + documents_test + documents_duplicate
    """

    bytes_read: int = 0  # UTF-8 text of ``documents``; 0 if the token store does not say it
    documents: int = 0  # read
    documents_train: int = 0
    documents_held_out: int = 0
    documents_test: int = 0
    documents_duplicate: int = 0  # exact copies of an earlier document: left out, unless --keep_duplicates
    documents_empty: int = 0  # without text, so without tokens; not counted in ``documents``
    documents_malformed: int = 0  # skipped because of --skip_malformed; not counted in ``documents``
    documents_after_limit: int = 0  # read after --max_data_tokens was reached; not counted in ``documents``
    tokens_read: int = 0  # including an end-of-document token for each document
    tokens_train: int = 0  # in training rows
    tokens_held_out: int = 0  # in held-out rows
    tokens_test: int = 0  # in test rows
    tokens_duplicate: int = 0
    tokens_dropped: int = 0  # the last partial row of each split
    rows_train: int = 0
    rows_held_out: int = 0
    rows_test: int = 0
    rows_trained: int = 0  # by the steps so far, over all passes
    tokens_trained: int = 0  # the same rows, in tokens

    @classmethod
    def of(cls, store: TokenStore, split: Split, rows: dict[str, PackedRows]) -> "Ledger":
        """Return the ledger of a source: what its store says was read, compared with what its rows hold.

        Args:
            rows: the rows of "train", "held_out" and "test".

        Raises:
            AssertionError: a token or a document is missing from the sums.
        """
        sizes = np.diff(store.document_starts)
        said = Counter(store.sidecar)  # 0 for a count that the sidecar does not have
        left_out = said["duplicates"] + said["near_duplicates"]  # by data/prepare.py: they are not in the store
        ledger = cls(
            bytes_read=said["text_bytes"],
            documents=store.documents + left_out,
            documents_duplicate=int(split.duplicate.sum()) + left_out,
            documents_empty=said["empty"],
            documents_malformed=said["malformed"],
            documents_after_limit=said["documents_after_limit"],
            tokens_read=len(store.tokens) + said["duplicate_tokens"],
            tokens_duplicate=int(sizes[split.duplicate].sum()) + said["duplicate_tokens"],
            tokens_dropped=sum(part.dropped_tokens for part in rows.values()),
        )
        for name, part in rows.items():
            setattr(ledger, f"documents_{name}", part.documents)
            setattr(ledger, f"tokens_{name}", part.row_tokens)
            setattr(ledger, f"rows_{name}", part.whole_rows)
        ledger.check()
        return ledger

    def check(self) -> None:
        """Raise AssertionError unless every document and token is accounted for."""
        uses = ("train", "held_out", "test", "duplicate")
        documents = sum(getattr(self, f"documents_{use}") for use in uses)
        tokens = sum(getattr(self, f"tokens_{use}") for use in uses) + self.tokens_dropped
        assert self.documents == documents, f"the ledger of documents does not add up: {asdict(self)}"
        assert self.tokens_read == tokens, f"the ledger of tokens does not add up: {asdict(self)}"

    def trained(self, rows: int, tokens: int) -> "Ledger":
        """Return this ledger with the ``rows`` that the steps so far have trained on, and the tokens in them."""
        return replace(self, rows_trained=rows, tokens_trained=tokens)

    def __add__(self, other: "Ledger") -> "Ledger":
        return Ledger(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Ledger)))

    def __str__(self) -> str:
        """Return the two sums as one line. What is not train or held out is named only if there is any."""
        parts = [f"{self.tokens_train:,} train", f"{self.tokens_held_out:,} held out"]
        notes = [f"{self.documents_held_out:,} held out"]
        if self.documents_test:
            parts.append(f"{self.tokens_test:,} test")
            notes.append(f"{self.documents_test:,} test")
        if self.documents_duplicate:
            parts.append(f"{self.tokens_duplicate:,} duplicate")
            notes.append(f"{self.documents_duplicate:,} duplicates left out")
        if self.documents_empty:
            notes.append(f"{self.documents_empty:,} empty")
        if self.documents_malformed:
            notes.append(f"{self.documents_malformed:,} malformed skipped")
        if self.documents_after_limit:
            notes.append(f"{self.documents_after_limit:,} after --max_data_tokens left out")
        return (
            f"{self.tokens_read:,} tokens read = {' + '.join(parts)} + {self.tokens_dropped:,} dropped (last partial "
            f"rows); {self.documents:,} documents ({', '.join(notes)})"
        )
