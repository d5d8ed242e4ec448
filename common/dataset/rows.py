"""Token stores -> the rows of each split, with a ledger of each source."""

from dataclasses import dataclass, fields

import numpy as np

from common.arguments import SharedArguments
from common.console import InputError, say
from common.corpus.splits import Split, split_by_hash, split_in_order
from common.dataset.ledger import Ledger
from common.dataset.packing import JoinedRows, PackedRows
from common.tokens.store import TokenStore, make_hashes_comparable


@dataclass
class Rows:
    """The rows of a run: to train on, held out, and to test on (None unless --split asks for a test).

    Attributes:
        ledgers: of each source.
        fingerprints: of each source's documents, by which a run knows its data again.
    """

    train: JoinedRows
    held_out: JoinedRows
    test: JoinedRows | None
    ledgers: dict[str, Ledger]
    fingerprints: list[str]


def build_rows(stores: dict[str, TokenStore], arguments: SharedArguments) -> Rows:
    """Split the documents of ``stores`` and cut each split into rows; print where every token went.

    Dropped: the last partial row of each split of each source. The ledgers count it.

    Raises:
        InputError: a split is shorter than one row, or the flags make none.
    """
    if arguments.max_eval_rows is not None and arguments.max_eval_rows < 1:
        raise InputError(
            f"--max_eval_rows {arguments.max_eval_rows}: must be at least 1, or left out to evaluate on all."
        )
    packed = {"train": [], "held_out": [], "test": []}
    ledgers = {}
    for (name, store), split in zip(stores.items(), _splits(list(stores.values()), arguments), strict=True):
        rows = {}
        for use in packed:
            most = None if use == "train" else arguments.max_eval_rows
            isolated = arguments.packing == "isolated"
            rows[use] = PackedRows(store, getattr(split, use), arguments.context_length, isolated, most)
            packed[use].append(rows[use])
        ledgers[name] = Ledger.of(store, split, rows)
    joined = {use: JoinedRows(parts, arguments.data_weights) for use, parts in packed.items()}
    uses = ["train", "held_out"]
    if joined["test"].documents:
        uses.append("test")
    for use in uses:
        if len(joined[use]) == 0:
            raise InputError(
                f"the {use} documents hold {joined[use].stream_tokens:,} tokens, less than one row of "
                f"{arguments.context_length:,} + 1. Give more text, a shorter --context_length, or another "
                "--held_out_fraction or --split."
            )
    for name, ledger in ledgers.items():
        say(f"ledger of {name}: {ledger}")
    test = joined["test"] if len(joined["test"]) else None
    fingerprints = [store.fingerprint() for store in stores.values()]
    return Rows(joined["train"], joined["held_out"], test, ledgers, fingerprints)


def _splits(stores: list[TokenStore], arguments: SharedArguments) -> list[Split]:
    """Return the split of each store. Stores are compared with each other: a copy in another source is a copy, too."""
    make_hashes_comparable(stores)
    hashes = np.concatenate([store.document_hashes() for store in stores])
    documents = [store.documents for store in stores]
    if arguments.split is None:
        whole = split_by_hash(hashes, arguments.held_out_fraction, arguments.keep_duplicates)
    else:
        whole = split_in_order(documents, hashes, arguments.split, arguments.keep_duplicates)
    ends = np.cumsum([0, *documents])
    return [
        Split(*(getattr(whole, field.name)[begin:end] for field in fields(Split)))
        for begin, end in zip(ends[:-1], ends[1:], strict=True)
    ]


def unigram_loss(train: JoinedRows, held_out: JoinedRows, vocabulary_size: int) -> float:
    """Return the held-out loss, in nats a token, of predicting every token by its frequency in training.

    A model that has learnt anything is below it. The frequencies are counted over at most the first 10 million training
    tokens of each source, and one is added to each count.
    """
    counts = np.ones(vocabulary_size, dtype=np.int64)
    for rows in train.sources:
        counts += np.bincount(rows.window(0, min(rows.stream_tokens, 10_000_000)), minlength=vocabulary_size)
    return float(np.mean(np.log(counts.sum()) - np.log(counts[held_out.targets()])))
