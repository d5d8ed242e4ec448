"""Compare how fast the tutorial's recipe and ours learn: bits per byte of held-out text against seconds of training.

    python benchmarks/learning.py --data zh.jsonl.zst en.jsonl.zst --tokenizer qwen2.5-tokenizer

The model is that of the tutorial, with 123M parameters. Every 50th document of each file is held out. Each run is
a process of its own and starts with nothing compiled. The clock runs from the first step on and includes compiling. It
stops while held-out text is evaluated, which all runs do with the same code.

Each run leaves a JSON file in --output. The table and the plot, learning.png, are made from all files there, so runs
can be added one by one: --runs recipe. Runs of different commits, versions, devices or corpora are refused.

Bits per byte are of text only: the ends of documents have no bytes and are no targets here.

The tutorial's recipe is SwanLab's wiki tutorial. It trains on chunks of exactly 512 tokens within a document and drops
the rest. It has no end-of-document token, transformers' own loss, and no padding of the vocabulary; batch, schedule and
optimizer are as in the tutorial. Its warmup of 200 steps leaves only the last 70 of 270 steps to the cosine. Its 35.4M
tokens are several passes over a corpus of some 9M.
"""

import argparse
import hashlib
import json
import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from launching import ROOT, circumstances, compact, error_in, launcher, load_recipe, one_gpu, run
from trainers import trainer_on
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from common.arguments import SharedArguments
from common.corpus.sources import resolve_sources
from common.dataset.packing import JoinedRows, PackedRows, collate_rows
from common.distributed.accelerator import synchronize
from common.distributed.launch import read_launch
from common.model.attention import generating, set_attention
from common.model.from_config import keep_residual_in_bf16, model_from_config
from common.model.fused_loss import use_fused_loss
from common.model.presets import PRESETS
from common.tokens.store import TokenStore
from common.tokens.tokenizer import load_tokenizer
from common.tokens.train_tokenizer import tokenizer_trained_on
from common.tokens.writer import tokenize
from common.train.batch import derive_micro_batch, set_batch
from common.train.combinations import choose_optimizer

CONTEXT_LENGTH = 512
POINTS = 8  # evaluations a run
TUTORIAL = dict(
    per_device_train_batch_size=32, gradient_accumulation_steps=8, learning_rate=5e-4, lr_scheduler_type="cosine",
    warmup_steps=200, weight_decay=0.1,
)  # fmt: skip
# What each run changes in the recipe's TRAINING. "tokens": how many it trains on. "vocabulary": trains a tokenizer.
RUNS = {
    "tutorial": {"tokens": 270 * 131_072},
    "recipe": {},
    "AdamW 1e-3": {"optimizer": "adamw", "learning_rate": 1e-3},
    "AdamW 2e-3": {"optimizer": "adamw", "learning_rate": 2e-3},
    "2e-3": {"learning_rate": 2e-3},
    "8e-3": {"learning_rate": 8e-3},
    "32k a step": {"tokens_per_step": 32_768},
    "131k a step": {"tokens_per_step": 131_072},
    "linear to 0": {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {}},
    "cosine to 10%": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    "weight decay 0.01": {"weight_decay": 0.01},
    "vocabulary 16k": {"vocabulary": 16_384},
    "vocabulary 32k": {"vocabulary": 32_768},
}  # fmt: skip


class Race(TrainerCallback):
    """Measure bits per byte POINTS times during training. The clock stops meanwhile."""

    def __init__(self, rows: JoinedRows, tokenizer):
        self.rows = rows
        self.bytes = rows.target_bytes(tokenizer)
        self.end = tokenizer.eos_token_id
        self.points = []
        self.seconds = 0.0

    def on_train_begin(self, *_, **__):
        self.started = now()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step not in {1, *(state.max_steps * point // POINTS for point in range(1, POINTS + 1))}:
            return
        self.seconds += now() - self.started
        point = {"step": state.global_step, "seconds": self.seconds}
        if state.global_step > 1:
            point["bits_per_byte"] = held_out_nats(model, self.rows, self.end) / math.log(2) / self.bytes
        self.points.append(point)
        self.started = now()


def now() -> float:
    synchronize()
    return time.perf_counter()


@torch.no_grad()
def held_out_nats(model, rows: JoinedRows, end: int, at_once: int = 32) -> float:
    """Return the sum of the losses, in nats, of all targets except ``end``, computed from whole logits.

    The end of a document has no bytes. The tutorial never trains on one, so counting it would charge the tutorial.
    """
    total = 0.0
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16), generating(model):
        for start in range(0, len(rows), at_once):
            batch = collate_rows([rows[row] for row in range(start, min(start + at_once, len(rows)))])
            ids, targets = (batch[name].to(model.device) for name in ("input_ids", "shift_labels"))
            logits = model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
            total += torch.nn.functional.cross_entropy(
                logits, targets.flatten(), ignore_index=end, reduction="sum"
            ).item()
    model.train()
    return total


def chunks_of_the_tutorial(store: TokenStore, chosen: np.ndarray) -> list[dict]:
    """Cut each document, without its end token, into chunks of exactly CONTEXT_LENGTH tokens; drop the rest."""
    rows = []
    for document in np.flatnonzero(chosen):
        tokens = store.tokens[int(store.document_starts[document]) : int(store.document_starts[document + 1]) - 1]
        for start in range(0, len(tokens) - CONTEXT_LENGTH + 1, CONTEXT_LENGTH):
            ids = torch.from_numpy(np.asarray(tokens[start : start + CONTEXT_LENGTH]).astype(np.int64))
            rows.append({"input_ids": ids, "labels": ids})
    return rows


def documents_fingerprint(stores: list[TokenStore]) -> str:
    """Return 16 hex digits that depend on the documents, but not on the tokenizer."""
    return hashlib.blake2b(np.concatenate([store.document_hashes() for store in stores]), digest_size=8).hexdigest()


def work(name: str, arguments: argparse.Namespace) -> dict:
    """Train one run in this process; return its points and counts."""
    recipe = load_recipe("wiki_zh_scratch.py")
    changes = dict(RUNS[name])
    tokens = changes.pop("tokens", arguments.tokens)
    vocabulary = changes.pop("vocabulary", None)
    set_seed(42)
    shared = SharedArguments(vocabulary_size=vocabulary or 0, cache_dir=arguments.cache_dir)
    sources = resolve_sources(arguments.data)
    tokenizer = tokenizer_trained_on(sources, shared) if vocabulary else load_tokenizer(arguments.tokenizer, None)
    stores = [tokenize(source, tokenizer, shared) for source in sources]
    held_out = [np.arange(store.documents) % 50 == 0 for store in stores]
    rows, race_rows = (
        JoinedRows(
            [PackedRows(store, mask == wanted, CONTEXT_LENGTH) for store, mask in zip(stores, held_out, strict=True)]
        )
        for wanted in (False, True)
    )
    race = Race(race_rows, tokenizer)
    settings = dict(report_to="none", save_strategy="no", disable_tqdm=True, output_dir=arguments.output)
    launch = read_launch()
    settings |= launch.defaults()
    if name == "tutorial":
        shape = {**PRESETS["swanlab-wiki"], "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT_LENGTH}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.float32)
        training = TrainingArguments(**settings, **TUTORIAL, max_steps=round(tokens / 131_072))
        chunks = [
            chunk
            for store, mask in zip(stores, held_out, strict=True)
            for chunk in chunks_of_the_tutorial(store, ~mask)
        ]
        trainer = Trainer(model, training, train_dataset=chunks)
        tokens_per_step = 131_072
    else:
        wanted = {**recipe.TRAINING, **changes, **settings, "eval_strategy": "no"}
        tokens_per_step = wanted.pop("tokens_per_step")
        optimizer = wanted.pop("optimizer")
        wanted["max_steps"] = round(tokens / tokens_per_step)
        training = TrainingArguments(**wanted)
        launch = replace(launch, optimizer=choose_optimizer(optimizer, launch, training))
        if training.learning_rate == 0:
            training.learning_rate = recipe.LEARNING_RATES[launch.optimizer]
        model = model_from_config(PRESETS["swanlab-wiki"], tokenizer, CONTEXT_LENGTH, training)
        shared.tokens_per_step, shared.context_length = tokens_per_step, CONTEXT_LENGTH
        derive_micro_batch(model, launch, training, shared)
        launch = replace(launch, rows_per_step=set_batch(launch, training, tokens_per_step, CONTEXT_LENGTH))
        set_attention(model, "auto", False, training.device)
        use_fused_loss(model)
        keep_residual_in_bf16(model)
        trainer = trainer_on(rows, race_rows, model, training, launch, tokenizer)
    assert training.n_gpu <= 1, "one GPU is measured; Trainer would spread the batch over several GPUs"
    trainer.add_callback(race)
    trainer.train()
    first, last = race.points[0], race.points[-1]
    return {
        "name": name, "points": race.points, "tokens_per_step": tokens_per_step,
        "tokens": last["step"] * tokens_per_step, "parameters": model.num_parameters(),
        "tokens_per_second": (last["step"] - 1) * tokens_per_step / (last["seconds"] - first["seconds"]),
        "training_tokens": rows.stream_tokens, "held_out_bytes": race.bytes,
        "circumstances": {**circumstances(), "data": documents_fingerprint(stores)},
    }  # fmt: skip


def launch(name: str, arguments: list[str]) -> str:
    """Train a run in a process of its own, which writes its JSON file; return an error message, or ""."""
    command = launcher("single_gpu.yaml")
    command += ["--dynamo_backend", "no"] if name == "tutorial" else []  # the tutorial does not compile
    output, failure = run([*command, __file__, *arguments, "--worker", name], one_gpu())
    return error_in(output) if failure else ""


def seconds_to(points: list[dict], bits: float) -> float | None:
    """Return the seconds at which a run first reached ``bits``, interpolated linearly; None if it never did."""
    earlier = None
    for point in (point for point in points if "bits_per_byte" in point):
        if point["bits_per_byte"] <= bits:
            if earlier is None:
                return point["seconds"]
            share = (earlier["bits_per_byte"] - bits) / (earlier["bits_per_byte"] - point["bits_per_byte"])
            return earlier["seconds"] + share * (point["seconds"] - earlier["seconds"])
        earlier = point
    return None


def unlike(results: list[dict]) -> str:
    """Return the reason why ``results`` do not compare, or ""."""
    found = {result["name"]: result.get("circumstances", {}) for result in results}
    names = dict.fromkeys(name for circumstances in found.values() for name in circumstances)
    seen = {name: {run: circumstances.get(name) for run, circumstances in found.items()} for name in names}
    different = {name: runs for name, runs in seen.items() if len({json.dumps(value) for value in runs.values()}) > 1}
    return "; ".join(f"{name}: {json.dumps(runs)}" for name, runs in different.items())


def table(results: list[dict], failures: dict[str, str] | None = None) -> str:
    """Return the runs as a Markdown table. The last column is the time to the bits of the tutorial's last point."""
    tutorial = next((result for result in results if result["name"] == "tutorial"), None)
    goal = tutorial["points"][-1]["bits_per_byte"] if tutorial else None
    reached = f"seconds to {goal:.3f} bits" if goal else "seconds to the tutorial's bits"
    lines = [
        f"| run | parameters | tokens a step | tokens trained | tokens/s | seconds | bits per byte | {reached} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        last, seconds = result["points"][-1], seconds_to(result["points"], goal) if goal else None
        lines.append(
            f"| {result['name']} | {result['parameters'] / 1e6:.1f}M | {result['tokens_per_step']:,} "
            f"| {result['tokens'] / 1e6:.1f}M | {result['tokens_per_second']:,.0f} | {last['seconds']:.0f} "
            f"| {last['bits_per_byte']:.4f} | {'-' if seconds is None else f'{seconds:.0f}'} |"
        )
    lines += [f"| {name} | failed: {why} | | | | | | |" for name, why in (failures or {}).items()]
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="seconds of training on one GPU", ylabel="bits per byte, held out", xscale="log")
    for result in results:
        points = [point for point in result["points"] if "bits_per_byte" in point]
        seconds, bits = ([point[key] for point in points] for key in ("seconds", "bits_per_byte"))
        axes.plot(
            seconds, bits, "o-", label=result["name"], markersize=3, linewidth=2 if result["name"] == "recipe" else 1
        )
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--tokenizer", required=True, help="a folder or id")
    parser.add_argument("--tokens", type=float, default=20e6, help="number of tokens that each of our runs trains on")
    known = ", ".join(RUNS).replace("%", "%%")  # argparse formats help texts with %
    parser.add_argument("--runs", nargs="*", default=["tutorial", "recipe"], help=f"names of: {known}")
    parser.add_argument("--output", default=str(ROOT / "outputs" / "learning"))
    parser.add_argument("--cache_dir", default=str(ROOT / "data" / "cache"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    if arguments.worker:
        result = work(arguments.worker, arguments)
        file = output / (re.sub(r"\W+", "_", arguments.worker) + ".json")
        file.write_text(json.dumps(result, indent=1), encoding="utf-8")
        return
    unknown = set(arguments.runs) - set(RUNS)
    if unknown:
        sys.exit(f"--runs {', '.join(unknown)}: not among {', '.join(RUNS)}")
    kept = [result for result in results_in(output) if result["name"] not in arguments.runs]
    for result in kept:  # the data are compared later, after they are tokenized
        here = {**circumstances(), "data": result.get("circumstances", {}).get("data")}
        difference = unlike([result, {"name": "this machine now", "circumstances": here}])
        if difference:
            sys.exit(f"{output} has a run that does not compare. Use another --output. {difference}")
    failures = {}
    try:
        for name in arguments.runs:
            failure = launch(name, argv)
            if failure:
                failures[name] = failure
            print(name, compact(failure if failure else "done"), file=sys.stderr, flush=True)
    finally:  # also after Ctrl-C: report what was measured before it
        report([result for result in results_in(output) if result["name"] not in failures], failures, output)


def results_in(output: Path) -> list[dict]:
    """Return the results of all runs in a folder, in the order of RUNS."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in output.glob("*.json")]
    return sorted(results, key=lambda result: list(RUNS).index(result["name"]))


def report(results: list[dict], failures: dict[str, str], output: Path) -> None:
    """Print the table and draw the plot; exit with the reason if the results do not compare."""
    difference = unlike(results)
    if difference:
        sys.exit(f"{output} has runs that do not compare, so there is no table. Use another --output. {difference}")
    print(table(results, failures), flush=True)
    if results:
        plot(results, output / "learning.png")


if __name__ == "__main__":
    main()
