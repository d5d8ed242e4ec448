"""Token stores -> the rows of each split, with a ledger of each source."""

from dataclasses import fields

import numpy as np

from common.arguments import SharedArguments
from common.console import InputError
from common.corpus.splits import Split, split_by_hash, split_in_order
from common.dataset.ledger import Ledger
from common.dataset.packing import JoinedRows, PackedRows
from common.tokens.store import TokenStore, make_hashes_comparable


def split_rows(
    stores: dict[str, TokenStore], arguments: SharedArguments
) -> tuple[JoinedRows, JoinedRows, JoinedRows | None, dict[str, Ledger]]:
    """Return training rows, held-out rows, test rows (None unless --split asks for them), a ledger of each source.

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
        rows = {
            use: PackedRows(
                store,
                getattr(split, use),
                arguments.context_length,
                arguments.packing == "isolated",
                None if use == "train" else arguments.max_eval_rows,
            )
            for use in packed
        }
        ledgers[name] = Ledger.of(store, split, rows)
        for use, part in rows.items():
            packed[use].append(part)
    joined = {use: JoinedRows(parts, arguments.data_weights) for use, parts in packed.items()}
    for use in ("train", "held_out") + (("test",) if joined["test"].documents else ()):
        if len(joined[use]) == 0:
            raise InputError(
                f"the {use} documents hold {joined[use].stream_tokens:,} tokens, less than one row of "
                f"{arguments.context_length:,} + 1. Give more text, a shorter --context_length, or another "
                "--held_out_fraction or --split."
            )
    return joined["train"], joined["held_out"], joined["test"] if len(joined["test"]) else None, ledgers


def _splits(stores: list[TokenStore], arguments: SharedArguments) -> list[Split]:
    """Return the split of each store. Hashes are looked at together: a copy in another source is a copy too."""
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

    The least that a model must beat. Counted over at most the first 10 million training tokens of each source, one
    added to each count.
    """
    counts = np.ones(vocabulary_size, dtype=np.int64)
    for rows in train.sources:
        counts += np.bincount(rows.window(0, min(rows.stream_tokens, 10_000_000)), minlength=vocabulary_size)
    return float(np.mean(np.log(counts.sum()) - np.log(counts[held_out.targets()])))
