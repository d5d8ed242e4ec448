"""Documents -> batches of documents -> their tokens, and what is known of each document."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.console import InputError
from common.corpus.documents import CorpusCounts
from common.corpus.splits import content_hash
from common.tokens.encoding import Encoder
from common.tokens.megatron import COLUMNS, HASHES, ID_HASHES, TEXT_BYTES
from common.tokens.store import hash_ids
from common.tokens.tokenizer import decoded, unknown_id, vocabulary_size

BATCH_CHARACTERS = 500_000  # tokenized at once: enough to keep a worker busy, and still small in memory
TRIED_BATCHES = 4  # the first ones; their documents are decoded and compared with the text


def batches(documents: Iterable[str], counts: CorpusCounts) -> Iterator[tuple[list[str], bool, CorpusCounts]]:
    """Yield ``documents`` in lists of at least BATCH_CHARACTERS in all, the last list excepted.

    With each comes whether it is one of the first TRIED_BATCHES, and what ``counts`` were when it was read.
    """

    def counts_now() -> CorpusCounts:
        return replace(counts, first_malformed=list(counts.first_malformed))

    batch = []
    characters = 0
    yielded = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch, yielded < TRIED_BATCHES, counts_now()
            yielded += 1
            batch = []
            characters = 0
    if batch:
        yield batch, yielded < TRIED_BATCHES, counts_now()


class Encoded(NamedTuple):
    """A batch of documents as tokens."""

    tokens: np.ndarray  # of all documents, an end token after each
    sizes: np.ndarray  # int32, the tokens of each document, (documents,)
    columns: dict[str, np.ndarray]  # suffix of COLUMNS -> a number for each document, (documents,)
    unknown: np.ndarray  # how many tokens of each document are the unknown token, (documents,)
    tried: int  # documents that were decoded
    changed: int  # of these, the documents that did not come back as they were
    counts: CorpusCounts  # of everything up to the end of this batch
    left_out: int = 0  # documents of the batch that are not in it, because they come after --max_data_tokens


def encode(
    texts: list[str],
    is_tried: bool,
    counts: CorpusCounts,
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    dtype: np.dtype,
) -> Encoded:
    """Return the tokens of all ``texts``, an end token after each, and what is known of each text.

    Texts with ids [5, 6] and [7], end token 0: tokens [5, 6, 0, 7, 0], sizes [3, 2].

    Args:
        is_tried: decode the documents, and compare the result with the texts. A text larger than a batch is left out.

    Raises:
        InputError: ``dtype`` is too narrow for an id.
    """
    end_token_id = tokenizer.eos_token_id
    ids = encoder.encode(texts)
    sizes = np.array([len(document) + 1 for document in ids], dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    wide = np.full(starts[-1], end_token_id, dtype=np.int64)
    is_text = np.ones(len(wide), dtype=bool)
    is_text[starts[1:] - 1] = False
    wide[is_text] = np.concatenate(ids)
    if wide.max() > np.iinfo(dtype).max:
        raise InputError(
            f"the tokenizer gave id {wide.max():,}, but its largest is {vocabulary_size(tokenizer) - 1:,}: it does not "
            f"fit {dtype}. Repair the tokenizer's files, or give another."
        )
    contents = [text.encode() for text in texts]
    columns = {
        HASHES: [content_hash(content) for content in contents],
        ID_HASHES: hash_ids(wide, starts, end_token_id),
        TEXT_BYTES: [len(content) for content in contents],
    }
    unknown = unknown_id(tokenizer)
    is_unknown = np.zeros(len(wide), dtype=bool) if unknown is None else is_text & (wide == unknown)
    tried = [place for place, text in enumerate(texts) if is_tried and len(text) <= BATCH_CHARACTERS]
    return Encoded(
        tokens=wide.astype(dtype),
        sizes=sizes,
        columns={suffix: np.array(numbers, COLUMNS[suffix]) for suffix, numbers in columns.items()},
        unknown=np.add.reduceat(is_unknown, starts[:-1], dtype=np.int64),
        tried=len(tried),
        changed=sum(decoded(ids[place], tokenizer) != texts[place] for place in tried),
        counts=counts,
    )


def up_to(max_tokens: int, encoded: Iterator[Encoded]) -> Iterator[Encoded]:
    """Yield ``encoded`` up to the last document with which there are at most ``max_tokens``; then read no further.

    The last batch is cut: it has the documents that fit, and its counts are without the text of the others.

    Raises:
        InputError: the first document does not fit.
    """
    left = max_tokens
    for number, batch in enumerate(encoded):
        ends = np.cumsum(batch.sizes, dtype=np.int64)
        fitting = int(np.searchsorted(ends, left, side="right"))
        if fitting == len(ends):
            left -= int(ends[-1])
            yield batch
            continue
        if number == 0 and fitting == 0:
            raise InputError(
                f"--max_data_tokens {max_tokens}: the first document alone has {ends[0]:,} tokens. Give at least that."
            )
        text_bytes = batch.counts.text_bytes - int(batch.columns[TEXT_BYTES][fitting:].sum())
        yield batch._replace(
            tokens=batch.tokens[: ends[fitting - 1] if fitting else 0],
            sizes=batch.sizes[:fitting],
            columns={suffix: numbers[:fitting] for suffix, numbers in batch.columns.items()},
            unknown=batch.unknown[:fitting],
            counts=replace(batch.counts, text_bytes=text_bytes),
            left_out=len(ends) - fitting,
        )
        return
