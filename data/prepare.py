"""Documents -> token store, on the command line. Recipes call the same functions themselves.

    python data/prepare.py tokenize --input corpus.jsonl.gz more/ --tokenizer DIR --output tokens/corpus
    python data/prepare.py inspect tokens/corpus --tokenizer DIR
    python data/prepare.py merge --input tokens/a tokens/b --output tokens/ab
    python data/prepare.py train-tokenizer --input corpus.jsonl --vocabulary_size 16000 --output my-tokenizer
    python data/prepare.py corpora
    python data/prepare.py download wiki-zh --output data

Train on the result with ``--data tokens/corpus.bin``. For corpora too large for one machine, see
data/prepare_distributed.py.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common.command_line import OneLineErrors
from common.console import InputError, printable
from common.corpus.corpora import CORPORA, listing
from common.corpus.documents import CorpusCounts, read_documents
from common.corpus.download import download
from common.corpus.hub_dataset import with_cached_files
from common.corpus.near_duplicates import NearDuplicateCounts, without_near_duplicates
from common.corpus.sources import PAIR_SUFFIXES, Source, resolve_sources
from common.run.disk import check_path
from common.tokens.merge import merge_token_stores
from common.tokens.store import TokenStore
from common.tokens.tokenizer import load_tokenizer, tokenizer_fingerprint, vocabulary_size
from common.tokens.train_tokenizer import (
    LARGEST_SHARE,
    SAMPLE_BYTES,
    head_and_tail,
    only_document,
    sample_and_held_out,
    sample_of,
    tokenizer_report,
    train_tokenizer,
)
from common.tokens.writer import COMPLETE, FILES, origin_of, write_token_store

HELD_OUT_FRACTION = 0.005  # of the documents: a recipe's default, so train-tokenizer reports on the same documents
REPORT_BYTES = 20_000_000  # of held-out text, at most
LONGEST_PREFIX = 200  # bytes: file systems take names of 255, and suffixes follow


def tokenize(arguments: argparse.Namespace) -> None:
    """Write a token store; the last line of output has its counts as JSON."""
    began = time.perf_counter()
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.end_token)
    sources = resolve_sources(arguments.input, arguments.encoding)
    removes = {"keep_duplicates": arguments.keep_duplicates, "near_duplicate_similarity": arguments.near_duplicates}
    origin = origin_of(sources, tokenizer, arguments.text_field, arguments.skip_malformed) | removes
    if differences(arguments.output, origin) != []:  # then the sources are read, from a cache if no hub answers
        sources = [with_cached_files(source) for source in sources]
        origin |= origin_of(sources, tokenizer, arguments.text_field, arguments.skip_malformed)
    check_output(arguments.output, origin)
    counts = CorpusCounts()
    documents = documents_of(sources, arguments, counts)
    if arguments.near_duplicates is not None:
        documents = drop_near_duplicates(documents, arguments, counts)
    size_bytes = sum(source.size_bytes for source in sources)
    drop_duplicates = not arguments.keep_duplicates
    store = write_token_store(
        documents, counts, tokenizer, arguments.output, origin, size_bytes, arguments.workers, drop_duplicates
    )
    sidecar = store.sidecar
    line = {
        "documents": sidecar["documents"],
        "tokens": sidecar["tokens"] - sidecar["end_tokens"],  # of text; the .bin also has one end token a document
        "end_tokens": sidecar["end_tokens"],
        "bytes": sidecar["text_bytes"],
        "seconds": round(time.perf_counter() - began, 2),
    }
    for name in ("duplicates", "near_duplicates", "empty", "malformed"):
        line[name] = sidecar[name]
    print(json.dumps(line))


def drop_near_duplicates(
    documents: Iterator[str], arguments: argparse.Namespace, counts: CorpusCounts
) -> Iterator[str]:
    """Yield ``documents`` without near-duplicates; list these in OUTPUT.near_duplicates.jsonl and add to ``counts``."""
    found = NearDuplicateCounts()
    report = Path(f"{arguments.output}.near_duplicates.jsonl")
    yield from without_near_duplicates(documents, arguments.near_duplicates, report, found)
    counts.near_duplicates = found.removed


def check_output(output: str, origin: dict) -> None:
    """Raise InputError if there is another token store at ``output``.

    A token store of the same origin is accepted: it will be found and not made again.
    """
    existing = [name for name in FILES if Path(f"{output}{name}").exists()]
    different = differences(output, origin)
    interrupted = Path(f"{output}.lock").exists()  # we were stopped between the renaming of two files
    if existing and different is None and not interrupted:
        raise InputError(
            f"{output}{existing[0]}: exists already, but not as part of our token store. Choose another --output."
        )
    if different:
        raise InputError(
            f"{output}.bin: exists already, and differs in {', '.join(different)} (see {output}.json). "
            "Choose another --output, or remove its files."
        )


def differences(output: str, origin: dict) -> list[str] | None:
    """Return in what the token store at ``output`` differs from ``origin``; None if there is no complete one."""
    if not all(Path(f"{output}{name}").exists() for name in COMPLETE):
        return None
    sidecar = TokenStore(output).sidecar
    wanted = json.loads(json.dumps(origin))  # with the types that the sidecar has
    return [name for name, value in wanted.items() if sidecar.get(name) != value]


def documents_of(sources: list[Source], arguments: argparse.Namespace, counts: CorpusCounts) -> Iterator[str]:
    """Yield the documents of all sources, one source after the other, and add to ``counts``."""
    for source in sources:
        yield from read_documents(source, arguments.text_field, arguments.skip_malformed, counts)


def inspect(arguments: argparse.Namespace) -> None:
    """Print counts, the sidecar, and the first documents (as text if a tokenizer is given)."""
    store = TokenStore(arguments.store)
    counts = f"{store.documents:,} documents, {len(store.tokens):,} tokens of {store.tokens.dtype}"
    print(printable(f"{counts} in {arguments.store}"))
    if store.sidecar:
        print(printable(json.dumps(store.sidecar, indent=1, ensure_ascii=False)))
    else:
        print("no sidecar: made by another program")
    tokenizer = None if arguments.tokenizer is None else load_tokenizer(arguments.tokenizer)
    if tokenizer is not None:
        store.check_tokenizer(tokenizer_fingerprint(tokenizer), vocabulary_size(tokenizer))
    for number in range(min(arguments.documents, store.documents)):
        ids = store.tokens[store.document_starts[number] : store.document_starts[number + 1]]
        shown = ids[: arguments.tokens].tolist()
        left = f" and {len(ids) - len(shown):,} more" if len(ids) > len(shown) else ""
        text = tokenizer.decode(shown) if tokenizer else str(shown)
        print(printable(f"--- document {number}, {len(ids):,} tokens\n{text}{left}"))


def merge(arguments: argparse.Namespace) -> None:
    """Join token stores into one, or write one in the other format."""
    store = merge_token_stores([TokenStore(path) for path in arguments.input], arguments.output, arguments.legacy)
    print(json.dumps({"documents": store.documents, "tokens": len(store.tokens)}))


def check_empty(folder: str) -> None:
    """Raise InputError if ``folder`` holds anything: a tokenizer, or a model's, would be written over."""
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise InputError(f"--output {folder}: exists already. Choose another --output, or remove it.")


def train(arguments: argparse.Namespace) -> None:
    """Train a tokenizer on a sample of the training documents; report on the documents that a recipe holds out."""
    check_empty(arguments.output)
    sources = resolve_sources(arguments.input, arguments.encoding)
    only, texts = only_document(documents_of(sources, arguments, CorpusCounts()))
    if only is None:
        sample_bytes = int(arguments.sample_mb * 1e6)
        sample, held_out, counts = sample_and_held_out(texts, HELD_OUT_FRACTION, sample_bytes, REPORT_BYTES)
    else:
        head, tail = head_and_tail(only, HELD_OUT_FRACTION)
        sample, counts = sample_of([head], LARGEST_SHARE * len(head.encode()))
        held_out = [tail]
    tokenizer = train_tokenizer(sample, arguments.vocabulary_size)
    tokenizer.save_pretrained(arguments.output)
    reference = None if arguments.reference is None else load_tokenizer(arguments.reference)
    report = tokenizer_report(tokenizer, held_out, arguments.hidden_size, reference)
    print(json.dumps({"output": arguments.output, "sample": counts, **report}))


def fetch(arguments: argparse.Namespace) -> None:
    """Download a corpus (such as wiki-zh) or any data set id; continue an interrupted download and check the files."""
    for path in download(arguments.name, Path(arguments.output)):
        print(printable(str(path)))


def list_corpora(arguments: argparse.Namespace) -> None:
    """List the corpora that --data and download know by a name, with their licences and their ids on the hubs."""
    print(printable(listing()))


def at_least_one(text: str) -> int:
    """Return ``text`` as a number; for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return int(text)


def store_prefix(text: str) -> str:
    """Return the prefix of the token store that ``text`` names, by the prefix or by one of its files; for argparse."""
    suffix = next((suffix for suffix in PAIR_SUFFIXES if text.endswith(suffix)), "")
    prefix = text.removesuffix(suffix)
    if os.path.basename(prefix) in ("", ".", ".."):
        raise argparse.ArgumentTypeError(
            f"{text}: names a folder. Give the beginning of the file names too, such as "
            f"{os.path.join(os.path.dirname(prefix), 'corpus')}"
        )
    length = len(os.fsencode(os.path.basename(prefix)))
    if length > LONGEST_PREFIX:
        raise argparse.ArgumentTypeError(f"a name of {length} bytes, and {LONGEST_PREFIX} is the limit")
    return prefix


def megabytes(text: str) -> float:
    """Return ``text`` as a finite number; for argparse."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text}: must be a finite number")
    return number


def add_source_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--input", nargs="+", required=True, help="Files, folders, globs, data set ids.")
    sub.add_argument("--text_field", help="Field of the text, or a template like '{title}\\n\\n{text}'.")
    sub.add_argument("--encoding", help="Of text that is not UTF-8: gb18030 for Chinese text in GBK.")
    sub.add_argument("--skip_malformed", action="store_true", help="Skip and count malformed documents.")


def main(argv: list[str] | None = None) -> None:
    parser = OneLineErrors(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable, output: str | None, kind: Callable = str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__, allow_abbrev=False)
        sub.set_defaults(run=run)
        if output is not None:
            sub.add_argument("--output", required=True, type=kind, help=output)
        return sub

    sub = command("tokenize", tokenize, "Prefix of the .bin and .idx.", store_prefix)
    add_source_flags(sub)
    sub.add_argument("--tokenizer", required=True, help="A folder, or a ModelScope or Hugging Face id.")
    sub.add_argument("--end_token", help="End-of-document token, for a tokenizer that defines none.")
    sub.add_argument("--workers", type=at_least_one, help="Threads or processes that tokenize (one a core).")
    sub.add_argument("--keep_duplicates", action="store_true", help="Keep exact copies of a document.")
    sub.add_argument("--near_duplicates", type=float, metavar="SIMILARITY", help="Remove documents this similar: 0.8.")

    sub = command("inspect", inspect, None)
    sub.add_argument("store", help="Prefix, .bin file, or a folder of token stores.")
    sub.add_argument("--tokenizer", help="Decode the documents with it, and check that it made the store.")
    sub.add_argument("--documents", type=int, default=3, help="How many documents to show (3).")
    sub.add_argument("--tokens", type=int, default=60, help="How many tokens of each (60).")

    sub = command("merge", merge, "Prefix of the result.", store_prefix)
    sub.add_argument("--input", nargs="+", required=True, help="Token stores, in the order of the result.")
    sub.add_argument("--legacy", action="store_true", help="Write the older _ids.npy and _idx.npz.")

    sub = command("train-tokenizer", train, "Folder of the tokenizer.")
    add_source_flags(sub)
    sub.add_argument("--vocabulary_size", type=int, default=32_000, help="Tokens (32000).")
    sub.add_argument(
        "--sample_mb", type=megabytes, default=SAMPLE_BYTES / 1e6, help="Text to train on, in MB (%(default)s)."
    )
    sub.add_argument("--reference", help="A tokenizer to compare with, such as Qwen/Qwen2-0.5B.")
    sub.add_argument("--hidden_size", type=int, default=512, help="To count the embedding's parameters (512).")

    command("corpora", list_corpora, None)

    sub = command("download", fetch, "Folder.")
    sub.add_argument("name", help=f"{', '.join(CORPORA)}, or a data set id like owner/name.")

    arguments = parser.parse_args(argv)
    if "output" in arguments:
        is_prefix = arguments.run in (tokenize, merge)
        check_path(os.path.dirname(arguments.output) if is_prefix else arguments.output, "--output")
    arguments.run(arguments)


if __name__ == "__main__":
    main()
