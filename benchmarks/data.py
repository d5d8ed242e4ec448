"""Compare this project's way from text to rows with the tutorials' way, on the same text and cores, in one run.

    python benchmarks/data.py --data corpus.jsonl --tokenizer DIR --num_proc 1 2 16

Each variant runs in a process of its own and starts from nothing. It reads, tokenizes, writes, packs into rows of 512,
and reads every row once. The seconds are of that work, without imports, and so are the CPU seconds, of all processes
together: they say more where other work is on the machine. The tutorials' rules are written out below.

Each number of --num_proc is the number of cores that the variants may use (on Linux), and that of processes of
``datasets.map``. Where it is above the number of cores, only group_texts runs. "ours_seen" is "ours" with a tokenizer
that an earlier run has met, so that the proof of equal ids is in its cache. A machine without a network must have the
packages of requirements.txt; what a training run on token stores can do without are datasets and pyarrow.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow.compute
from transformers import AutoTokenizer

from common.arguments import SharedArguments
from common.corpus.sources import resolve_source
from common.dataset.packing import PackedRows
from common.system import usable_cores
from common.tokens.encoding import encoder_of
from common.tokens.tokenizer import load_tokenizer
from common.tokens.writer import tokenize

CONTEXT_LENGTH = 512
COLUMNS = {"seconds": 9, "cpu": 9, "tokens/s": 12, "ratio": 7, "bytes/token": 13, "peak MB": 9, "dropped": 9}
HEADER = f"{'variant':<30}" + "".join(f"{name:>{width}}" for name, width in COLUMNS.items())


def group_texts(data: str, tokenizer_folder: str, folder: Path, processes: int) -> tuple[int, int | None]:
    """Do as happy-llm's chapter 6 and run_clm.py: map(tokenize), map(group_texts), each batch's tail dropped."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    documents = datasets.load_dataset("json", data_files=data, split="train", cache_dir=str(folder))

    def tokenize_batch(batch):
        return tokenizer([text + tokenizer.eos_token for text in batch["text"]])

    def group(batch):
        joined = {name: list(chain(*lists)) for name, lists in batch.items()}
        whole = len(joined["input_ids"]) // CONTEXT_LENGTH * CONTEXT_LENGTH
        rows = {
            name: [ids[start : start + CONTEXT_LENGTH] for start in range(0, whole, CONTEXT_LENGTH)]
            for name, ids in joined.items()
        }
        return rows | {"labels": rows["input_ids"].copy()}

    tokenized = documents.map(tokenize_batch, batched=True, num_proc=processes, remove_columns=documents.column_names)
    rows = tokenized.map(group, batched=True, num_proc=processes).with_format("numpy")
    read = pyarrow.compute.sum(pyarrow.compute.list_value_length(tokenized.data["input_ids"])).as_py()
    return sum(batch["input_ids"].size for batch in rows.iter(64)), read


def whole_chunks(data: str, tokenizer_folder: str, folder: Path, processes: int) -> tuple[int, int | None]:
    """Do as SwanLab's wiki tutorial: cut each document into pieces of 512 tokens, keep the pieces of exactly 512."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    documents = datasets.load_dataset("json", data_files=data, split="train", cache_dir=str(folder))

    def tokenize_batch(batch):
        limits = {"truncation": True, "max_length": CONTEXT_LENGTH, "return_overflowing_tokens": True}
        pieces = tokenizer(batch["text"], **limits)["input_ids"]
        return {"input_ids": [ids for ids in pieces if len(ids) == CONTEXT_LENGTH]}

    rows = documents.map(tokenize_batch, batched=True, num_proc=processes, remove_columns=documents.column_names)
    return sum(batch["input_ids"].size for batch in rows.with_format("numpy").iter(64)), None


def ours(data: str, tokenizer_folder: str, folder: Path, processes: int) -> tuple[int, int | None]:
    """Do as the recipes do, with tokenize and PackedRows."""
    tokenizer = load_tokenizer(tokenizer_folder)
    store = tokenize(resolve_source(data), tokenizer, SharedArguments(cache_dir=str(folder)))
    rows = PackedRows(store, np.ones(store.documents, dtype=bool), CONTEXT_LENGTH)
    kept = 1  # the first token is no target
    for first in range(0, len(rows), 64):
        batch = rows.__getitems__(range(first, min(first + 64, len(rows))))  # as torch's loader reads a batch
        kept += sum(len(row["shift_labels"]) for row in batch)
    return kept, len(store.tokens)


# Each returns the tokens in rows, and the tokens that it has read, end tokens included; None if it cannot tell.
VARIANTS = {"group_texts": group_texts, "whole_chunks": whole_chunks, "ours": ours, "ours_seen": ours}


def measure(variant: str, data: str, tokenizer: str, processes: int) -> dict:
    """Run one variant in this process, on as many cores as ``processes``.

    Return seconds, CPU seconds, tokens in rows and read, bytes on disk, and a process's peak of MB.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:processes])
    with tempfile.TemporaryDirectory() as folder:
        if variant == "ours_seen":
            encoder_of(load_tokenizer(tokenizer), folder)
        began, cpu_before = time.perf_counter(), cpu_seconds()
        kept, read = VARIANTS[variant](data, tokenizer, Path(folder), processes)
        seconds, used = time.perf_counter() - began, cpu_seconds() - cpu_before
        disk = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {"seconds": seconds, "cpu_seconds": used, "kept": kept, "read": read, "disk": disk, "peak_mb": peak_mb()}


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_mb() -> float:
    """Return the peak memory of this process or of its largest child; on Windows, of this process only."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource  # POSIX only

    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak / (2**20 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a .jsonl file with a field named text")
    parser.add_argument("--tokenizer", required=True, help="a folder")
    cores = usable_cores()
    num_proc = sorted({1, cores, 10})
    parser.add_argument(
        "--num_proc", type=int, nargs="+", default=num_proc, help="cores, and processes of map (default: %(default)s)"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], help="which of them (default: all)"
    )
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(measure(arguments.variant, arguments.data, arguments.tokenizer, arguments.processes)))
        return
    runs = [
        (variant, processes)
        for variant in arguments.variants
        for processes in arguments.num_proc
        if processes <= cores or variant == "group_texts"
    ]
    results = {}
    try:
        for variant, processes in runs:
            results[variant, processes] = launch(variant, processes, arguments)
            print(f"{variant} {processes}: {results[variant, processes]}", file=sys.stderr)
    finally:  # also after Ctrl-C: print what was measured before it
        print(f"{cores} cores, {Path(arguments.data).name}")
        print(table(results, arguments.data), flush=True)


def launch(variant: str, processes: int, arguments: argparse.Namespace) -> dict | str:
    """Run a variant in a process of its own; return what it measured, or the end of its output."""
    command = [sys.executable, __file__, "--data", arguments.data, "--tokenizer", arguments.tokenizer]
    command += ["--variant", variant, "--processes", str(processes)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr[-2000:] if done.returncode else json.loads(done.stdout.splitlines()[-1])


def table(results: dict[tuple[str, int], dict | str], data: str) -> str:
    """Return the measurements as lines. The ratios are to the fastest run of group_texts on at most as many cores."""
    cores = usable_cores()
    measured = {run: result for run, result in results.items() if isinstance(result, dict)}
    counts = sorted({result["read"] for result in measured.values()} - {None})
    lines = [f"{' or '.join(f'{count:,}' for count in counts)} tokens, end tokens included", HEADER]
    with open(data, "rb") as file:
        documents = sum(1 for _ in file)
    read = {}
    for run, result in measured.items():
        without_end_tokens = max(counts, default=math.nan) - documents  # whole_chunks adds none
        read[run] = without_end_tokens if result["read"] is None else result["read"]
    rates = {run: read[run] / result["seconds"] for run, result in measured.items()}

    def best(processes: int) -> float:
        """The fastest of group_texts on as many cores."""
        on_these = [min(run[1], cores) <= min(processes, cores) and run[0] == "group_texts" for run in rates]
        return max((rate for rate, counts in zip(rates.values(), on_these, strict=True) if counts), default=math.nan)

    for run, result in results.items():
        variant, processes = run
        name = f"{variant}, {processes} cores" if variant.startswith("ours") else f"{variant}, num_proc={processes}"
        if isinstance(result, str):
            lines.append(f"{name:<30} failed: {(result.splitlines() or ['nothing was printed'])[-1]}")
            continue
        lines.append(
            f"{name:<30}{result['seconds']:>9.1f}{result['cpu_seconds']:>9.1f}{rates[run]:>12,.0f}"
            f"{rates[run] / best(processes):>7.2f}"
            f"{result['disk'] / read[run]:>13.1f}{result['peak_mb']:>9.0f}{1 - result['kept'] / read[run]:>9.2%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
