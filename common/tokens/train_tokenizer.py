"""Train a byte-level BPE tokenizer on a sample of the documents, and compare it with another tokenizer."""

import hashlib
import heapq
import json
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.arguments import SharedArguments
from common.console import InputError, say
from common.corpus.documents import CorpusCounts, read_documents
from common.corpus.hub_dataset import with_cached_files
from common.corpus.sources import Source, mark_as_cache
from common.corpus.splits import content_hash, held_out_below, training_documents
from common.progress import Progress
from common.tokens.bpe import END_TOKEN, LEAST_OCCURRENCES, train_bpe, train_bpe_aside
from common.tokens.encoding import encoder_of
from common.tokens.tokenizer import load_tokenizer, padded_vocabulary, vocabulary_size

# Training keeps every distinct word and its pairs in memory. In Chinese a whole clause is one word, and few clauses
# come twice. Measured with 32,000 tokens: 1 MB of text takes 91 MB of memory for Chinese verse, 73 for Chinese prose, 6
# for English. This size therefore takes at most 3 GB. On held-out verse, half of it gave 0.5% fewer bytes a token, and
# an eighth 2% fewer.
SAMPLE_BYTES = 32_000_000
SMALL_BYTES = 1_000_000  # a smaller sample takes seconds, and no process of its own
LARGEST_SHARE = 100  # no document gives more than 1/100 of the sample, so that one long book does not dominate


def tokenizer_trained_on(sources: list[Source], arguments: SharedArguments) -> PreTrainedTokenizerBase:
    """Train a tokenizer of ``arguments.vocabulary_size`` on the training documents, or load it from the cache.

    It is trained on a sample of them, and never on held-out documents. Its folder's name is a hash of everything that
    decides its content.

    Raises:
        InputError: a source holds tokens and not text; a branch would train a tokenizer of its own; or what
            ``training_sample`` and ``train_tokenizer`` raise.
    """
    for source in sources:
        if source.token_store is not None:
            raise InputError(
                f"--tokenizer train: {source.given} holds tokens, not text. Give the tokenizer that made them."
            )
    folder = _folder_of(sources, arguments)
    if not folder.exists():
        sources = [with_cached_files(source) for source in sources]  # what is read now, if no hub has all of it
        folder = _folder_of(sources, arguments)
    if not folder.exists() and arguments.branch_from:  # refused later otherwise, when all text is tokenized with it
        raise InputError(
            f"--branch_from {arguments.branch_from}: a branch has the tokenizer of its run, and none was trained on "
            f"this --data so far. Give the run's: --tokenizer {arguments.branch_from}"
        )
    if not folder.exists():
        names = ", ".join(source.given for source in sources)
        say(f"training a tokenizer of {arguments.vocabulary_size:,} tokens on {names}")
        partial = folder.with_name(f"{folder.name}.partial-{uuid4().hex[:8]}")
        trained = train_tokenizer(training_sample(sources, arguments), arguments.vocabulary_size)
        trained.save_pretrained(mark_as_cache(partial))
        try:
            partial.rename(folder)
        except OSError:  # another launch made the same folder meanwhile
            shutil.rmtree(partial)
    return load_tokenizer(str(folder))


def _folder_of(sources: list[Source], arguments: SharedArguments) -> Path:
    """Return the folder in the cache of a tokenizer that is trained on ``sources``."""
    held_out = held_out_below(arguments.held_out_fraction) if arguments.split is None else arguments.split
    decides = [[source.fingerprint() for source in sources], arguments.text_field, arguments.vocabulary_size, held_out]
    if arguments.max_data_tokens is not None:
        decides.append(arguments.max_data_tokens)
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    return Path(arguments.cache_dir) / f"{sources[0].name}-tokenizer-{key}"


def training_sample(sources: list[Source], arguments: SharedArguments) -> list[str]:
    """Return a sample of the training documents of ``sources``, about SAMPLE_BYTES of text.

    Held-out documents are left out as ``common/corpus/splits.py`` chooses them: by their hash, or by --split in order.
    If there is only one document, its tail is left out.
    With --split, the end of a source's training documents is known only after all of them are read. The sample is
    then taken from all documents, and those after that end are dropped from it.
    With --max_data_tokens, it is taken from the first documents of each source, see ``_certainly_within``.

    Raises:
        InputError: no document is left to train on.
    """
    counts = [CorpusCounts() for _ in sources]
    documents = (
        text
        for source, count in zip(sources, counts, strict=True)
        for text in _certainly_within(
            arguments.max_data_tokens, read_documents(source, arguments.text_field, arguments.skip_malformed, count)
        )
    )
    texts = _watched(documents, counts, sum(source.size_bytes for source in sources))
    if arguments.split is None:
        only, texts = only_document(texts)
        if only is not None:
            return [head_and_tail(only, arguments.held_out_fraction)[0]]
        return sample_and_held_out(texts, arguments.held_out_fraction)[0]

    def trains(number: int) -> bool:
        """Whether document ``number``, counted over all sources, is a training document of its source."""
        for documents in (count.documents for count in counts):
            if number < documents:
                return number < training_documents(documents, arguments.split)
            number -= documents
        raise AssertionError(f"document {number} past the last source")

    sample, _ = sample_of(texts, may_be_used=trains)
    return sample


def _watched(texts: Iterable[str], counts: list[CorpusCounts], total_bytes: int) -> Iterator[str]:
    """Yield ``texts`` and show how much of their files is read; ``counts`` are what their readers count."""
    with Progress("reading text for the tokenizer", total_bytes, "B") as progress:
        for text in texts:
            progress.reach(sum(count.file_bytes for count in counts))
            yield text


def _certainly_within(max_tokens: int | None, texts: Iterator[str]) -> Iterator[str]:
    """Yield the first ``texts`` that will be within ``max_tokens`` whatever the tokenizer is; None yields all.

    How many tokens a text has is not known before there is a tokenizer, but a token of text has at least one byte. So
    a text has at most as many tokens as bytes, and an end token. At least one text is yielded.
    """
    left = max_tokens
    for number, text in enumerate(texts):
        if max_tokens is not None:
            left -= len(text.encode()) + 1
            if left < 0 and number:
                return
        yield text


def only_document(texts: Iterator[str]) -> tuple[str | None, Iterator[str]]:
    """Return the text if all ``texts`` are the same, else None; and the texts, of which only copies may be missing."""
    first = next(texts)
    other = next((text for text in texts if _nfc_hash(text) != _nfc_hash(first)), None)
    return (first, iter([first])) if other is None else (None, chain([first, other], texts))


def head_and_tail(text: str, fraction: float) -> tuple[str, str]:
    """Return the part of the only document on which a tokenizer is trained, and the part from which it is judged.

    The last ``fraction`` of its tokens will be held out. How much text these are is not known before there is a
    tokenizer, so twice as much is left out of the head, which has at most SAMPLE_BYTES.

    Raises:
        InputError: the text is too short to be cut.
    """
    cut = int(len(text) * (1 - min(2 * fraction, (1 + fraction) / 2)))
    if cut == 0:
        raise InputError(f"the only document has {len(text)} characters, too few to train a tokenizer. Give more text.")
    return _beginning(text[:cut].encode(), SAMPLE_BYTES).decode(), text[int(len(text) * (1 - fraction)) :]


def sample_and_held_out(
    texts: Iterable[str], fraction: float, limit_bytes: int = SAMPLE_BYTES, held_out_bytes: int = 0
) -> tuple[list[str], list[str], dict[str, int]]:
    """Return a sample of the training documents, held-out documents, and the sample's counts.

    Of the held-out documents, at most ``held_out_bytes`` are returned, or one.

    If a document is the same as a held-out one in another Unicode normalisation, it is held out with it: both have the
    same tokens.

    Raises:
        InputError: no document is left to train on.
    """
    limit = held_out_below(fraction)
    held_out: list[str] = []
    held_out_hashes: set[int] = set()

    def not_held_out() -> Iterator[str]:
        left_bytes = held_out_bytes
        for text in texts:
            content = text.encode()
            if content_hash(content) >= limit:
                yield text
                continue
            held_out_hashes.add(_nfc_hash(text))
            if held_out_bytes and (not held_out or len(content) <= left_bytes):
                held_out.append(text)
                left_bytes -= len(content)

    sample, counts = sample_of(not_held_out(), limit_bytes)
    if not held_out_hashes:  # split_by_hash then holds out the document with the lowest hash, the sample's first
        held_out.append(sample[0])
        held_out_hashes.add(_nfc_hash(sample[0]))
    sample = [text for text in sample if _nfc_hash(text) not in held_out_hashes]
    if not sample:
        raise InputError("no document to train a tokenizer on: all are held out. Give more of them.")
    sampled_bytes = sum(len(text.encode()) for text in sample)
    return sample, held_out, counts | {"sampled_documents": len(sample), "sampled_bytes": sampled_bytes}


def _nfc_hash(text: str) -> int:
    """Return a hash that texts have in common if they are the same in NFC. Of a long one, the beginning decides.

    (``sample_of`` keeps only the beginning of a long document, by far more than these characters.)
    """
    return content_hash(unicodedata.normalize("NFC", text[:80_000])[:20_000].encode())


class _Taken(NamedTuple):
    """What a sample takes of a document."""

    content: bytes
    cut: bool  # whether ``content`` is only the beginning of the document
    number: int  # the document's, in the order of reading


def sample_of(
    documents: Iterable[str], limit_bytes: int = SAMPLE_BYTES, may_be_used: Callable[[int], bool] | None = None
) -> tuple[list[str], dict[str, int]]:
    """Return a random sample of ``documents`` of about ``limit_bytes``, with no more than that in memory.

    The sample is the documents with the lowest ``content_hash`` that fit in the limit together. It depends on their
    texts only, not on their order, and each document is as likely to be in it as any other. Of a document larger than
    1/LARGEST_SHARE of the limit, only the beginning is taken. An exact copy is not taken again.

    Args:
        may_be_used: called with the number of each sampled document after all were read; if False, it is dropped.

    Returns:
        The sample, by rising hash, and the counts ``documents``, ``bytes`` (UTF-8, of the source),
        ``sampled_documents``, ``sampled_bytes``, ``cut`` (documents of which only the beginning was taken).

    Raises:
        InputError: the limit is below LARGEST_SHARE bytes, or nothing was sampled.
    """
    largest = limit_bytes // LARGEST_SHARE
    if largest < 1:
        raise InputError(f"a sample of {limit_bytes} bytes: give at least {LARGEST_SHARE}; {SAMPLE_BYTES:,} is usual.")
    chosen: dict[int, _Taken] = {}  # by content_hash
    highest: list[int] = []  # a heap of the negated hashes in ``chosen``: its first is the highest hash
    below = 2**64  # documents with this hash or a higher one did not fit
    source_documents = source_bytes = sampled_bytes = 0
    for text in documents:
        content = text.encode()
        source_documents += 1
        source_bytes += len(content)
        document_hash = content_hash(content)
        if document_hash >= below or document_hash in chosen:
            continue
        chosen[document_hash] = _Taken(_beginning(content, largest), len(content) > largest, source_documents - 1)
        heapq.heappush(highest, -document_hash)
        sampled_bytes += len(chosen[document_hash].content)
        while sampled_bytes > limit_bytes:
            below = -heapq.heappop(highest)
            sampled_bytes -= len(chosen.pop(below).content)
    sample = [chosen[document_hash] for document_hash in sorted(chosen)]
    if may_be_used is not None:
        sample = [taken for taken in sample if may_be_used(taken.number)]
        sampled_bytes = sum(len(taken.content) for taken in sample)
    if not sample:
        raise InputError("no document to train a tokenizer on. Give more text.")
    counts = {
        "documents": source_documents,
        "bytes": source_bytes,
        "sampled_documents": len(sample),
        "sampled_bytes": sampled_bytes,
        "cut": sum(taken.cut for taken in sample),
    }
    say(
        f"sampled {sampled_bytes / 1e6:,.1f} of {source_bytes / 1e6:,.1f} MB, {len(sample):,} of {source_documents:,} "
        f"documents ({counts['cut']:,} cut to their first {largest:,} bytes)"
    )
    return [taken.content.decode() for taken in sample], counts


def _beginning(content: bytes, limit: int) -> bytes:
    """Return at most the first ``limit`` bytes of UTF-8 ``content``, without a character that is cut in two."""
    if len(content) <= limit:
        return content
    return content[:limit].decode(errors="ignore").encode()


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with Qwen2's pre-tokenisation on ``texts``.

    Its base is the 256 bytes, so any text can be encoded and decoded again (after NFC normalisation). END_TOKEN has
    id 0. The same texts give the same tokenizer, in any order. Memory grows with the distinct words of ``texts``, see
    SAMPLE_BYTES. If no other pair of tokens occurs LEAST_OCCURRENCES times, the vocabulary is smaller than asked for,
    with a note.

    Raises:
        InputError: ``vocabulary_size`` is below 257.
    """
    if vocabulary_size < 257:
        raise InputError(
            f"--vocabulary_size {vocabulary_size}: a byte-level tokenizer needs at least 257, for the 256 bytes and "
            "the end-of-document token."
        )
    texts = list(texts)
    train = train_bpe if sum(len(text.encode()) for text in texts) < SMALL_BYTES else train_bpe_aside
    backend = train(texts, vocabulary_size)
    if backend.get_vocab_size() < vocabulary_size:
        say(
            f"note: the vocabulary has {backend.get_vocab_size():,} tokens, not {vocabulary_size:,}: no other pair of "
            f"tokens occurs {LEAST_OCCURRENCES} times in the text, and what a model hardly meets it does not learn "
            "(word2vec's limit)"
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_TOKEN, pad_token=END_TOKEN)


def tokenizer_report(
    tokenizer: PreTrainedTokenizerBase,
    held_out_texts: Iterable[str],
    hidden_size: int,
    reference: PreTrainedTokenizerBase | None = None,
) -> dict[str, float]:
    """Compare ``tokenizer`` with ``reference`` on texts that neither should have been trained on.

    Returns:
        ``held_out_bytes``; ``bytes_per_token`` (UTF-8; end-of-document tokens not counted); ``vocabulary_size``;
        ``embedding_rows`` (the rows that ``model_from_config`` makes); ``embedding_parameters`` (rows times
        ``hidden_size``; an output layer that is not tied to the embedding has as many again). With a reference, also
        the last four for it, with ``reference_`` before the name, and ``embedding_parameters_saved``.

    Raises:
        InputError: there is no held-out text.
    """
    texts = list(held_out_texts)
    held_out_bytes = sum(len(text.encode()) for text in texts)
    if held_out_bytes == 0:
        raise InputError("no held-out text to evaluate the tokenizer on: give a larger corpus, or hold out more of it.")
    report = {"held_out_bytes": held_out_bytes, **_measured(tokenizer, texts, held_out_bytes, hidden_size)}
    if reference is not None:
        other = _measured(reference, texts, held_out_bytes, hidden_size)
        report |= {f"reference_{name}": value for name, value in other.items()}
        report["embedding_parameters_saved"] = other["embedding_parameters"] - report["embedding_parameters"]
    return report


def _measured(tokenizer: PreTrainedTokenizerBase, texts: list[str], text_bytes: int, hidden_size: int) -> dict:
    tokens = sum(len(ids) for ids in encoder_of(tokenizer).encode(texts))
    ids = vocabulary_size(tokenizer)
    rows = padded_vocabulary(ids)
    return {
        "bytes_per_token": round(text_bytes / tokens, 4),
        "vocabulary_size": ids,
        "embedding_rows": rows,
        "embedding_parameters": rows * hidden_size,
    }
