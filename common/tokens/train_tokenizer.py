"""Train a byte-level BPE tokenizer on a sample of any source, and report what it is worth."""

import hashlib
import heapq
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from uuid import uuid4

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.arguments import SharedArguments
from common.console import InputError, say
from common.corpus.documents import CorpusCounts, read_documents
from common.corpus.sources import Source, mark_as_cache
from common.corpus.splits import content_hash, held_out_below, training_documents
from common.tokens.encoding import encoder_of
from common.tokens.tokenizer import VOCABULARY_MULTIPLE, load_tokenizer

END_TOKEN = "<|endoftext|>"  # Qwen's and GPT-2's end-of-document token
# Qwen2's pre-tokenisation: one digit at a time, letters of any script together, white space apart.
# Source: pre_tokenizer of https://huggingface.co/Qwen/Qwen2-0.5B/blob/main/tokenizer.json
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Training keeps every distinct word with its pairs, and in Chinese a clause is one word, which hardly comes twice: 1 MB
# of text took 91 MB of memory on verse, 73 on prose, 6 on English (measured, 32,000 tokens), so this much takes 3 GB at
# most. A sample of half the size gave 0.5% fewer bytes a token on verse that was held out, one of an eighth 2%.
SAMPLE_BYTES = 32_000_000
LARGEST_SHARE = 100  # no document gives more than 1/100 of the sample: a library's one book does not make its tokenizer


def tokenizer_trained_on(sources: list[Source], arguments: SharedArguments) -> PreTrainedTokenizerBase:
    """Train a tokenizer on a sample of the documents that train, or find it in the cache."""
    for source in sources:
        if source.token_store is not None:
            raise InputError(
                f"--tokenizer train: {source.given} holds tokens, not text. Give the tokenizer that made them."
            )
    held_out = arguments.split or held_out_below(arguments.held_out_fraction)
    decides = [[source.fingerprint() for source in sources], arguments.text_field, arguments.vocabulary_size, held_out]
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    folder = mark_as_cache(Path(arguments.cache_dir)) / f"{sources[0].name}-tokenizer-{key}"
    if not folder.exists():
        say(f"training a tokenizer of {arguments.vocabulary_size:,} tokens on {', '.join(s.given for s in sources)}")
        partial = folder.with_name(f"{folder.name}.partial-{uuid4().hex[:8]}")
        train_tokenizer(training_sample(sources, arguments), arguments.vocabulary_size).save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:  # another launch was faster
            shutil.rmtree(partial)
    return load_tokenizer(str(folder))


def training_sample(sources: list[Source], arguments: SharedArguments) -> list[str]:
    """Return a sample of the documents of ``sources`` that are not held out, by their hash or by --split.

    Where --split ends a share is known when all documents are read: of the sample, those behind it are left out then.
    """
    counts = [CorpusCounts() for _ in sources]
    texts = (
        text
        for source, count in zip(sources, counts, strict=True)
        for text in read_documents(source, arguments.text_field, arguments.skip_malformed, count)
    )
    if arguments.split is None:
        limit = held_out_below(arguments.held_out_fraction)
        sample, sampled = sample_of(text for text in texts if content_hash(text.encode()) >= limit)
        none_held_out = sampled["documents"] == sum(count.documents for count in counts)
        if none_held_out:  # that of the lowest hash is held out then: see split_by_hash
            sample = sample[1:]
        if not sample:
            raise InputError("no document to train a tokenizer on: the only one is held out. Give more of them.")
        return sample

    def trains(number: int) -> bool:
        for documents in (count.documents for count in counts):
            if number < documents:
                return number < training_documents(documents, arguments.split)
            number -= documents
        raise AssertionError("a document of no source")

    return sample_of(texts, may_be_used=trains)[0]


def sample_of(
    documents: Iterable[str], limit_bytes: int = SAMPLE_BYTES, may_be_used: Callable[[int], bool] | None = None
) -> tuple[list[str], dict[str, int]]:
    """Choose about ``limit_bytes`` of ``documents`` at random, holding no more than that in memory.

    Chosen are the documents with the lowest ``content_hash`` that fit together: a choice that depends on their texts
    alone, not on their order, and takes every document with the same probability. Of a document larger than
    1/LARGEST_SHARE of the limit only the beginning is taken; an exact copy is not taken again.

    Args:
        may_be_used: asked, with its number, of every document chosen, after all were read.

    Returns:
        The sample, by rising hash, and the counts ``documents``, ``bytes`` (UTF-8, of the source),
        ``sampled_documents``, ``sampled_bytes``, ``cut`` (documents of which the beginning was taken).

    Raises:
        InputError: the limit is below LARGEST_SHARE bytes, or nothing was sampled.
    """
    largest = limit_bytes // LARGEST_SHARE
    if largest < 1:
        raise InputError(f"a sample of {limit_bytes} bytes: give at least {LARGEST_SHARE}; {SAMPLE_BYTES:,} is usual.")
    # content_hash -> what is taken of the document, whether it was cut, the document's number
    chosen: dict[int, tuple[bytes, bool, int]] = {}
    highest: list[int] = []  # a heap of the negated hashes in ``chosen``
    below = 2**64  # documents with a hash from here on did not fit
    source_documents = source_bytes = sampled_bytes = 0
    for text in documents:
        content = text.encode()
        source_documents += 1
        source_bytes += len(content)
        document_hash = content_hash(content)
        if document_hash >= below or document_hash in chosen:
            continue
        chosen[document_hash] = _beginning(content, largest), len(content) > largest, source_documents - 1
        heapq.heappush(highest, -document_hash)
        sampled_bytes += len(chosen[document_hash][0])
        while sampled_bytes > limit_bytes:
            below = -heapq.heappop(highest)
            sampled_bytes -= len(chosen.pop(below)[0])
    sample = [chosen[document_hash] for document_hash in sorted(chosen)]
    if may_be_used is not None:
        sample = [taken for taken in sample if may_be_used(taken[2])]
        sampled_bytes = sum(len(content) for content, _, _ in sample)
    if not sample:
        raise InputError("no document to train a tokenizer on.")
    counts = {
        "documents": source_documents,
        "bytes": source_bytes,
        "sampled_documents": len(sample),
        "sampled_bytes": sampled_bytes,
        "cut": sum(cut for _, cut, _ in sample),
    }
    say(
        f"sampled {sampled_bytes / 1e6:,.1f} of {source_bytes / 1e6:,.1f} MB, {len(sample):,} of {source_documents:,} "
        f"documents ({counts['cut']:,} cut to their first {largest:,} bytes)"
    )
    return [content.decode() for content, _, _ in sample], counts


def _beginning(content: bytes, limit: int) -> bytes:
    """Return at most ``limit`` bytes of UTF-8, whole characters."""
    return content if len(content) <= limit else content[:limit].decode(errors="ignore").encode()


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with Qwen2's pre-tokenisation on ``texts``.

    Any text encodes to it and decodes back (after NFC normalisation): its base is the 256 bytes. END_TOKEN is id 0.
    The same texts give the same tokenizer, in any order. Memory grows with the distinct words of ``texts``, see
    SAMPLE_BYTES. The vocabulary comes out smaller, and that is said, if ``texts`` have no more pairs to merge.

    Raises:
        InputError: fewer than 257 tokens asked for.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if vocabulary_size < 257:
        raise InputError(f"--vocabulary_size {vocabulary_size}: a byte-level tokenizer needs at least 257.")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer=trainer)
    if backend.get_vocab_size() < vocabulary_size:
        say(
            f"note: the vocabulary came out at {backend.get_vocab_size():,} tokens, not {vocabulary_size:,}: the text "
            "has no more pairs to merge"
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
        ``held_out_bytes``, ``bytes_per_token`` (UTF-8; without end-of-document tokens), ``vocabulary_size``,
        ``embedding_rows`` (those that ``model_from_config`` gives it), ``embedding_parameters`` (rows times
        ``hidden_size``; a head that is not tied to the embedding has as many again), each of the last four also
        for the reference, with ``reference_`` before it, and ``embedding_parameters_saved``.

    Raises:
        InputError: there is no held-out text.
    """
    texts = list(held_out_texts)
    held_out_bytes = sum(len(text.encode()) for text in texts)
    if held_out_bytes == 0:
        raise InputError("no held-out text to judge the tokenizer by: give a larger corpus, or hold out more of it.")
    report = {"held_out_bytes": held_out_bytes, **_judged(tokenizer, texts, held_out_bytes, hidden_size)}
    if reference is not None:
        other = _judged(reference, texts, held_out_bytes, hidden_size)
        report |= {f"reference_{name}": value for name, value in other.items()}
        report["embedding_parameters_saved"] = other["embedding_parameters"] - report["embedding_parameters"]
    return report


def _judged(tokenizer: PreTrainedTokenizerBase, texts: list[str], text_bytes: int, hidden_size: int) -> dict:
    tokens = sum(len(ids) for ids in encoder_of(tokenizer).encode(texts))
    rows = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return {
        "bytes_per_token": round(text_bytes / tokens, 4),
        "vocabulary_size": len(tokenizer),
        "embedding_rows": rows,
        "embedding_parameters": rows * hidden_size,
    }
