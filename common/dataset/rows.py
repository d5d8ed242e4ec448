"""Token stores -> the rows of each split, with a ledger of each source."""

import math
from dataclasses import dataclass, fields

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.arguments import SharedArguments
from common.console import InputError, say
from common.corpus.splits import Split, hashes_of_equals, split_by_hash, split_in_order, splits_alone
from common.dataset.best_fit import BestFitRows
from common.dataset.ledger import Ledger
from common.dataset.packing import JoinedRows, PackedRows
from common.tokens.store import TokenStore

MUCH_EMPTY = 0.05  # usual is a fraction of a percent


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

    If there is only one distinct document, its last tokens are held out: ``held_out_fraction`` of them, at least a row.

    Dropped: the last partial row of each split of each source, but nothing of BestFitRows. The ledgers count it.

    Raises:
        InputError: a split is shorter than one row, or the flags make none.
    """
    if arguments.max_eval_rows is not None and arguments.max_eval_rows < 1:
        raise InputError(
            f"--max_eval_rows {arguments.max_eval_rows}: must be at least 1, or left out to evaluate on all."
        )
    packed = {"train": [], "held_out": [], "test": []}
    ledgers, fingerprints = {}, []
    hashes = _document_hashes(list(stores.values()))
    splits = _splits(stores, hashes, arguments)
    only_one = arguments.split is None and not any(split.held_out.any() for split in splits)
    for (name, store), split, own_hashes in zip(stores.items(), splits, hashes, strict=True):
        fingerprints.append(store.fingerprint(own_hashes))
        rows = _head_and_tail(store, split, arguments) if only_one else _packed(store, split, arguments)
        for use in packed:
            packed[use].append(rows[use])
        ledgers[name] = Ledger.of(store, split, rows)
    alone = [arguments.split is not None or splits_alone(own, arguments.held_out_fraction) for own in hashes]
    joined = {use: JoinedRows(parts, arguments.data_weights, alone) for use, parts in packed.items()}
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
    for (name, ledger), train in zip(ledgers.items(), packed["train"], strict=True):
        say(f"ledger of {name}: {ledger}")
        if isinstance(train, BestFitRows) and train.rows:
            say(_empty_room(name, train))
    test = joined["test"] if len(joined["test"]) else None
    return Rows(joined["train"], joined["held_out"], test, ledgers, fingerprints)


def _empty_room(name: str, rows: BestFitRows) -> str:
    """Return how much of the ``rows`` of a source stays empty; a warning where that is much."""
    empty = 1 - rows.row_tokens / (rows.rows * rows.context_length)
    found = f"{empty:.2%} of the training rows of {name} stay empty; the log's tokens/s count that, too"
    if empty < MUCH_EMPTY:
        return f"best_fit: {found}"
    return (
        f"warning: --packing best_fit: {found}. Few of its documents fit together into rows of "
        f"{rows.context_length:,} tokens: with another --packing nothing stays empty."
    )


def _document_hashes(stores: list[TokenStore]) -> list[np.ndarray]:
    """Return the hashes by which the documents of each store are split: one value for all that have the same ids.

    Stores are compared with each other: a copy in another source is a copy, too.
    """
    hashes = np.concatenate([store.document_hashes() for store in stores])
    id_hashes = np.concatenate([store.id_hashes() for store in stores])
    return _for_each_store(hashes_of_equals(hashes, id_hashes), stores)


def _for_each_store(values: np.ndarray, stores: list[TokenStore]) -> list[np.ndarray]:
    """Cut ``values`` of the documents of all stores into those of each."""
    return np.split(values, np.cumsum([store.documents for store in stores])[:-1])


def _splits(stores: dict[str, TokenStore], hashes: list[np.ndarray], arguments: SharedArguments) -> list[Split]:
    """Return the split of each store; say which shares of --split are empty."""
    of_all, documents = np.concatenate(hashes), [store.documents for store in stores.values()]
    if arguments.split is None:
        whole = split_by_hash(of_all, arguments.held_out_fraction, arguments.keep_duplicates)
    else:
        whole = split_in_order(documents, of_all, arguments.split, arguments.keep_duplicates)
    masks = [_for_each_store(getattr(whole, field.name), list(stores.values())) for field in fields(Split)]
    splits = [Split(*own) for own in zip(*masks, strict=True)]
    if arguments.split is not None:
        for name, split in zip(stores, splits, strict=True):
            _say_empty_shares(name, split, arguments.split)
    return splits


def _say_empty_shares(name: str, split: Split, shares: str) -> None:
    asked = [use for use, share in zip(("train", "held_out", "test"), shares.split(","), strict=False) if float(share)]
    empty = [use for use in asked if not getattr(split, use).any()]
    if empty:
        say(
            f"note: --split {shares} of the {len(split.train):,} documents of {name} leaves no document for "
            f"{' and '.join(empty)}"
        )


def _packed(store: TokenStore, split: Split, arguments: SharedArguments) -> dict[str, PackedRows]:
    """Return the rows of each use of the documents of ``store``."""
    isolated, most = arguments.packing == "isolated", arguments.max_eval_rows
    if arguments.packing == "best_fit":
        train = BestFitRows(store, split.train, arguments.context_length)
    else:
        train = PackedRows(store, split.train, arguments.context_length, isolated)
    return {
        "train": train,
        "held_out": PackedRows(store, split.held_out, arguments.context_length, isolated, most),
        "test": PackedRows(store, split.test, arguments.context_length, isolated, most),
    }


def _head_and_tail(store: TokenStore, split: Split, arguments: SharedArguments) -> dict[str, PackedRows]:
    """Return the rows of the only distinct document, whose tail is held out; none if it is in another store.

    They are windows with every packing.
    """
    rows = _packed(store, split, arguments)
    if not split.train.any():
        return rows
    if split.train.sum() > 1:
        raise InputError(
            "--keep_duplicates: the corpus has only one distinct document, and what is held out of it would be trained "
            "on in its copies. Leave the flag out, or give more documents."
        )
    tokens = rows["train"].stream_tokens
    row = arguments.context_length + 1
    tail = max(math.ceil(arguments.held_out_fraction * tokens), row)
    if tokens - tail < row:
        raise InputError(
            f"the corpus has only one distinct document, of {tokens:,} tokens. Its tail cannot be held out: {tail:,} "
            f"tokens would be held out, and at least a row of {arguments.context_length:,} + 1 must be left to train "
            "on. Give more text, or a shorter --context_length."
        )
    say(f"note: only one distinct document: the last {tail:,} of its {tokens:,} tokens are held out")
    isolated, most = arguments.packing == "isolated", arguments.max_eval_rows
    head, end = (0, tokens - tail), (tokens - tail, tokens)
    return rows | {
        "train": PackedRows(store, split.train, arguments.context_length, isolated, part=head),
        "held_out": PackedRows(store, split.train, arguments.context_length, isolated, most, part=end),
    }


def beginnings(rows: JoinedRows, tokenizer: PreTrainedTokenizerBase, count: int = 3, tokens: int = 8) -> list[str]:
    """Return how ``count`` of the rows begin, spread over all of them: prompts in the language of the text."""
    chosen = sorted({row * len(rows) // count for row in range(count)}) if len(rows) else []
    texts = (tokenizer.decode(rows[row]["input_ids"][:tokens], skip_special_tokens=True) for row in chosen)
    # A row may begin or end within a character.
    return [text.strip("\ufffd \n") for text in texts if text.strip("\ufffd \n")]


def unigram_loss(train: JoinedRows, held_out: JoinedRows, vocabulary_size: int) -> float:
    """Return the held-out loss, in nats a token, of predicting every token by its frequency in training.

    A model that has learnt anything is below it. The frequencies are counted over at most the first 10 million training
    tokens of each source, and one is added to each count.
    """
    counts = np.ones(vocabulary_size, dtype=np.int64)
    for rows in train.sources:
        counts += np.bincount(rows.window(0, min(rows.stream_tokens, 10_000_000)), minlength=vocabulary_size)
    return float(np.mean(np.log(counts.sum()) - np.log(counts[held_out.targets()])))
