"""Train a ladder of model sizes on a text, and fit the rules of ``--target_parameters`` and of ``--plan``'s prediction.

    python benchmarks/ladder.py --data zh.jsonl en.jsonl --sizes 8M 16M 32M 64M 125M --rates 0.5 1 2 --tokens 16e6 48e6

Each run is a process of its own: the recipe's model of one size, trained by the recipe's Trainer on a number of tokens
at one multiple of the rule's learning rate, then evaluated on held-out text. Each run adds a line to
--output/runs.jsonl. A ladder can be interrupted and added to: runs that are there are not made again. A run of another
kind is given whole:

    --run '{"size": "swanlab-wiki", "tokenizer": "DIR", "tokens": 24e6, "rate": 0.8, "tokens_per_step": 65536}'

The size "tutorial" is SwanLab's tutorial as learning.py has it, with its schedule stretched over the tokens. A run with
other settings names the flags in "change"; it is evaluated as all others are, and is not in the fit:

    --run '{"size": "42M", "tokens": 16e6, "rate": 1, "change": {"packing": "best_fit", "weight_decay": 0.3}}'

The fit is printed and kept in --output/fit.json:

    bits per byte = irreducible + a / parameters^alpha + b / bytes^beta + c / steps^1.5

Only the best learning rate of each size and number of tokens counts. The bytes of later passes over the same text count
less (common/model/scaling.py). Runs of more than four passes are left out: held-out text can be predicted worse again
there, which the law has no term for. Each of these runs is also predicted by the fit of all others: that tells the
error. With it, a run predicts its end, and a time budget gets its size:

    python recipes/wiki_zh_scratch.py --plan --probe --ladder outputs/ladder/fit.json
    python recipes/wiki_zh_scratch.py --plan --minutes 10 --ladder outputs/ladder/fit.json
"""

import argparse
import itertools
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from launching import ROOT, circumstances, compact, error_in, launcher, load_recipe, one_gpu, run
from learning import TUTORIAL, chunks_of_the_tutorial
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from trainers import trainer_on
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from common.arguments import SharedArguments
from common.corpus.sources import resolve_sources
from common.dataset.rows import build_rows
from common.distributed.accelerator import synchronize
from common.distributed.launch import read_launch
from common.model.attention import generating, set_attention
from common.model.counts import flops_per_token, parameter_report
from common.model.from_config import keep_residual_in_bf16, model_from_config
from common.model.fused_loss import use_fused_loss
from common.model.presets import PRESETS, parameter_count, shape_with
from common.model.scaling import (
    STEPS_POWER,
    TOKENS_PER_STEP,
    LossLaw,
    counted_bytes,
    learning_rates_for,
    tokens_per_step_for,
    vocabulary_for,
)
from common.tokens.tokenizer import load_tokenizer, vocabulary_size
from common.tokens.train_tokenizer import tokenizer_trained_on
from common.tokens.writer import tokenize
from common.train.batch import derive_micro_batch, set_batch
from common.train.combinations import choose_optimizer

CONTEXT_LENGTH = 512
TUTORIAL_STEP = 131_072  # tokens
MOST_PASSES = 4  # of a run that is in the fit
WARM_UP_STEPS = 3  # before the clock starts: they compile


class Clock(TrainerCallback):
    """Measure the seconds from the end of step WARM_UP_STEPS to the end of the last step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (WARM_UP_STEPS, state.max_steps):
            synchronize()
            if state.global_step == WARM_UP_STEPS:
                self.started = time.perf_counter()
            self.seconds = time.perf_counter() - self.started


def work_of_the_tutorial(wanted: dict, arguments: argparse.Namespace) -> dict:
    """Train and evaluate SwanLab's tutorial in this process; return its row."""
    set_seed(42)
    shared = SharedArguments(cache_dir=arguments.cache_dir, context_length=CONTEXT_LENGTH)
    tokenizer = load_tokenizer(wanted["tokenizer"])
    sources = resolve_sources(arguments.data)
    rows = build_rows({source.name: tokenize(source, tokenizer, shared) for source in sources}, shared)
    chunks = [chunk for source in rows.train.sources for chunk in chunks_of_the_tutorial(source, source.chosen)]
    shape = {**PRESETS["swanlab-wiki"], "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT_LENGTH}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.float32)
    steps, clock = round(wanted["tokens"] / TUTORIAL_STEP), Clock()
    training = TrainingArguments(
        **TUTORIAL | dict(warmup_steps=TUTORIAL["warmup_steps"] / 270), **read_launch().defaults(), max_steps=steps,
        output_dir=str(Path(arguments.output, "trainer")), report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, training, train_dataset=chunks, callbacks=[clock]).train()
    tokens = steps * TUTORIAL_STEP
    per_second = (steps - WARM_UP_STEPS) * TUTORIAL_STEP / clock.seconds
    return {
        **wanted, "wanted": wanted, "parameters": model.num_parameters(), "shape": shape_in_words(shape),
        "vocabulary": len(tokenizer), "tokens_per_step": TUTORIAL_STEP, "learning_rate": training.learning_rate,
        "tokens": tokens, "tokens_per_second": per_second, "seconds": tokens / per_second,
        "tflops": per_second * flops_per_token(model, CONTEXT_LENGTH) / 1e12,
        "bits_alone": bits_alone(model, rows.held_out, tokenizer), **circumstances(),
    }  # fmt: skip


def work(wanted: dict, arguments: argparse.Namespace) -> dict:
    """Train and evaluate one run in this process; return its row."""
    if wanted["size"] == "tutorial":
        return work_of_the_tutorial(wanted, arguments)
    recipe = load_recipe("wiki_zh_scratch.py")
    set_seed(42)
    size = parameter_count(wanted["size"]) if wanted["size"] not in PRESETS else None
    vocabulary = SharedArguments.vocabulary_size if size is None else vocabulary_for(size)
    vocabulary = wanted.get("vocabulary", vocabulary)
    change = wanted.get("change", {})
    of_data = {name: value for name, value in change.items() if name in SharedArguments.__dataclass_fields__}
    of_training = {name: value for name, value in change.items() if name not in of_data}
    shared = SharedArguments(
        **dict(cache_dir=arguments.cache_dir, vocabulary_size=vocabulary, context_length=CONTEXT_LENGTH) | of_data
    )
    sources = resolve_sources(arguments.data)
    given = wanted.get("tokenizer") or arguments.tokenizer
    tokenizer = (
        tokenizer_trained_on(sources, shared)
        if given == "train"
        else load_tokenizer(given.format(vocabulary=vocabulary))
    )
    rows = build_rows({source.name: tokenize(source, tokenizer, shared) for source in sources}, shared)
    shape = PRESETS[wanted["size"]] if size is None else shape_with(size, recipe.MODEL, vocabulary_size(tokenizer))
    tokens_per_step = TOKENS_PER_STEP if size is None else tokens_per_step_for(size)
    tokens_per_step = wanted.get("tokens_per_step", tokens_per_step)
    training = TrainingArguments(
        **{name: value for name, value in recipe.TRAINING.items() if name not in ("tokens_per_step", "optimizer")}
        | read_launch().defaults()
        | dict(
            output_dir=str(Path(arguments.output, "trainer")), max_steps=round(wanted["tokens"] / tokens_per_step),
            eval_strategy="no", save_strategy="no", disable_tqdm=True, logging_steps=100,
        )
        | of_training
    )  # fmt: skip
    launch = read_launch()
    launch = replace(launch, optimizer=choose_optimizer("auto", launch, training))
    training.learning_rate = wanted.get("rate", 1.0) * learning_rates_for(tokens_per_step)[launch.optimizer]
    if "learning_rate" in wanted:
        training.learning_rate = wanted["learning_rate"]
    model = model_from_config(shape, tokenizer, shared.context_length, training)
    derive_micro_batch(model, launch, training, shared)
    launch = replace(launch, rows_per_step=set_batch(launch, training, tokens_per_step, shared.context_length))
    set_attention(model, "auto", shared.packing == "isolated", training.device)
    use_fused_loss(model)
    keep_residual_in_bf16(model)
    clock = Clock()
    trainer = trainer_on(rows.train, rows.held_out, model, training, launch, tokenizer, callbacks=[clock])
    trainer.train()
    packed = trainer.evaluate()
    tokens = training.max_steps * tokens_per_step
    per_second = (training.max_steps - WARM_UP_STEPS) * tokens_per_step / clock.seconds
    counts = parameter_report(model)
    text_bytes = sum(ledger.bytes_read * ledger.tokens_train / ledger.tokens_read for ledger in rows.ledgers.values())
    flops = flops_per_token(model, shared.context_length)
    return {
        **wanted, "wanted": wanted,
        "parameters": counts["total"], "body": counts["rest"], "shape": shape_in_words(shape),
        "vocabulary": vocabulary_size(tokenizer), "tokens_per_step": tokens_per_step,
        "learning_rate": training.learning_rate,
        "tokens": tokens, "text_bytes": text_bytes, "passes": tokens / rows.train.stream_tokens,
        "tokens_per_second": per_second, "seconds": tokens / per_second, "tflops": per_second * flops / 1e12,
        "bits_per_byte": packed["eval_bits_per_byte"], "bits_alone": bits_alone(model, rows.held_out, tokenizer),
        **circumstances(),
    }  # fmt: skip


def shape_in_words(shape: dict) -> str:
    return "{hidden_size} x {num_hidden_layers}".format(**shape)


@torch.no_grad()
def bits_alone(model, held_out, tokenizer, at_once: int = 64) -> float:
    """Return the bits per byte of held-out documents, each alone after an end token, in windows of CONTEXT_LENGTH.

    No document sees another one. The end tokens, which have no bytes, are no targets.
    """
    end, text_bytes, windows = tokenizer.eos_token_id, 0, []
    for source in held_out.sources:
        for document in np.flatnonzero(source.chosen):
            ids = np.array(source.tokens[source.document_starts[document] : source.document_starts[document + 1] - 1])
            text_bytes += len(tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode())
            stream = torch.from_numpy(np.concatenate([[end], ids]).astype(np.int64))
            for start in range(0, len(ids), CONTEXT_LENGTH):
                windows.append(stream[start : start + CONTEXT_LENGTH + 1])
    windows.sort(key=len)
    nats = 0.0
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16), generating(model):
        for first in range(0, len(windows), at_once):
            some = windows[first : first + at_once]
            inputs = pad_sequence([window[:-1] for window in some], batch_first=True).to(model.device)
            targets = pad_sequence([window[1:] for window in some], batch_first=True, padding_value=-100)
            logits = model(input_ids=inputs, use_cache=False).logits.float()
            losses = cross_entropy(logits.flatten(0, 1), targets.flatten().to(model.device), reduction="sum")
            nats += losses.item()
    return nats / math.log(2) / text_bytes


def best_of(rows: list[dict]) -> list[dict]:
    """Return, of the rows with the same size and number of tokens, the one with the fewest bits."""
    best: dict[tuple, dict] = {}
    for row in rows:
        key = (row["size"], row["tokens"])
        if key not in best or row["bits_per_byte"] < best[key]["bits_per_byte"]:
            best[key] = row
    return list(best.values())


def fit(rows: list[dict]) -> tuple[LossLaw, list[dict]]:
    """Return the law of the best rows; and these rows with ``predicted``, by the law of all other rows.

    Raises:
        SystemExit: there are fewer rows than the law needs.
    """
    best = best_of([row for row in rows if "rate" in row and row["passes"] <= MOST_PASSES])
    if len(best) < 8:
        found = f"{len(best)} sizes and numbers of tokens, of at most {MOST_PASSES} passes"
        sys.exit(f"{found}: the fit of six constants needs at least 8.")
    predicted = []
    for row in best:
        law = law_of([other for other in best if other is not row])
        predicted.append({**row, "predicted": law.bits_per_byte(*measured(row))})
    error = np.mean([abs(row["predicted"] / row["bits_per_byte"] - 1) for row in predicted])
    return replace(law_of(best), error=float(f"{error:.3g}")), predicted


ALPHAS, BETAS = np.arange(0.1, 1.51, 0.05), np.arange(0.1, 1.01, 0.05)


def law_of(rows: list[dict]) -> LossLaw:
    """Return the law that fits ``rows`` best, in the squares of relative errors; its own error is not known, NaN.

    All powers of a grid are tried. With given powers, the law is linear in its other constants, none of which is
    negative.
    """
    from scipy.optimize import nnls  # here, because a machine that only trains need not have it

    parameters, trained, steps = np.array([measured(row) for row in rows]).T
    bits = np.array([row["bits_per_byte"] for row in rows])
    best = None
    for alpha, beta in itertools.product(ALPHAS, BETAS):
        terms = [np.ones(len(rows)), (parameters / 1e6) ** -alpha, (trained / 1e6) ** -beta, steps**-STEPS_POWER]
        constants, error = nnls(np.stack(terms, axis=1) / bits[:, None], np.ones(len(rows)))
        if best is None or error < best[0]:
            best = (error, alpha, beta, constants)
    _, alpha, beta, (irreducible, a, b, c) = best
    constants = [float(f"{constant:.4g}") for constant in (irreducible, a, alpha, b, beta, c)]
    limits = [[float(values.min()), float(values.max())] for values in (parameters, trained, steps)]
    return LossLaw(*constants, math.nan, rows[0]["text"], *limits, max(row["passes"] for row in rows))


def measured(row: dict) -> tuple[float, float, float]:
    """Return what the law is a function of: parameters, counted bytes, and steps."""
    return row["parameters"], counted_bytes(row["text_bytes"], row["passes"]), row["tokens"] / row["tokens_per_step"]


def rates_table(rows: list[dict]) -> str:
    """Return, for each size and number of tokens, the bits at each multiple of the rule's learning rate."""
    multiples = sorted({row["rate"] for row in rows if "rate" in row})
    lines = ["| size | tokens | " + " | ".join(f"rate x {multiple:g}" for multiple in multiples) + " |"]
    lines.append("|---" * (2 + len(multiples)) + "|")
    for size, tokens in dict.fromkeys((row["size"], row["tokens"]) for row in rows if "rate" in row):
        bits = {
            row["rate"]: row["bits_per_byte"]
            for row in rows
            if (row["size"], row["tokens"]) == (size, tokens) and "rate" in row
        }
        cells = [f"{bits[multiple]:.4f}" if multiple in bits else "-" for multiple in multiples]
        lines.append(f"| {size} | {tokens / 1e6:.1f}M | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def after_passes(row: dict, passes: float) -> dict:
    """Return ``row`` as it would be after other passes over the text."""
    return {**row, "passes": passes, "tokens": row["tokens"] * passes / row["passes"]}


def plot(rows: list[dict], law: LossLaw, path: Path) -> None:
    """Draw measured bits against the bytes trained on, and the law's line for each size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="MB of text trained on", ylabel="bits per byte, held out", xscale="log")
    best = best_of([row for row in rows if "rate" in row])
    for size in dict.fromkeys(row["size"] for row in best):
        mine = [row for row in best if row["size"] == size]
        dots = axes.plot(
            [row["text_bytes"] * row["passes"] / 1e6 for row in mine],
            [row["bits_per_byte"] for row in mine],
            "o",
            label=size,
        )
        passes = np.geomspace(0.3, 20, 60)
        line = [law.bits_per_byte(*measured(after_passes(mine[0], each))) for each in passes]
        axes.plot(passes * mine[0]["text_bytes"] / 1e6, line, "-", color=dots[0].get_color(), linewidth=1)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--text", help="a name for the text, for the plan's message; otherwise the names of the files")
    parser.add_argument("--tokenizer", default="train", help="a folder or id; {vocabulary} in it is replaced")
    parser.add_argument("--sizes", nargs="*", default=["8M", "16M", "32M", "64M", "125M", "250M"])
    parser.add_argument("--rates", nargs="*", type=float, default=[0.5, 1.0, 2.0], help="multiples of the rule's rate")
    parser.add_argument("--tokens", nargs="*", type=float, default=[16e6, 48e6], help="tokens that each run trains on")
    parser.add_argument("--run", nargs="*", default=[], help="more runs, as JSON")
    parser.add_argument(
        "--at_once", type=int, default=1, help="runs at the same time; above 1, their speed says nothing"
    )
    parser.add_argument("--output", default=str(ROOT / "outputs" / "ladder"))
    parser.add_argument("--cache_dir", default=str(ROOT / "data" / "cache"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    name = arguments.text
    if name is None:
        name = ", ".join(Path(file).name for file in arguments.data)
    if arguments.worker:
        row = {**work(json.loads(arguments.worker), arguments), "text": name}
        with (output / "runs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return
    grid = [
        {"size": size, "tokens": tokens, "rate": rate}
        for size in arguments.sizes
        for tokens in arguments.tokens
        for rate in arguments.rates
    ]
    wanted = [*(json.loads(each) for each in arguments.run), *grid]
    there = rows_in(output)
    left = [each for each in wanted if not any(is_made(each, row) for row in there)]
    with ThreadPoolExecutor(arguments.at_once) as pool:
        for each, failure in zip(
            left, pool.map(lambda one: launched(one, sys.argv[1:] if argv is None else argv), left), strict=True
        ):
            print(compact(each), compact(failure if failure else "done"), file=sys.stderr, flush=True)
    rows = [row for row in rows_in(output) if "change" not in row]
    for row in rows_in(output):
        if "change" in row:
            print(f"{compact(row['wanted'])}: {row['bits_alone']:.4f}, {row['tokens_per_second']:.0f} tokens/s")
    print(rates_table(rows))
    law, predicted = fit(rows)
    for row in predicted:
        name = f"{row['size']}, {row['tokens'] / 1e6:.1f}M tokens"
        print(f"{name}: {row['bits_per_byte']:.4f}, predicted by all others {row['predicted']:.4f}")
    (output / "fit.json").write_text(json.dumps(asdict(law), indent=1), encoding="utf-8")
    print(json.dumps(asdict(law)))
    plot(rows, law, output / "ladder.png")


def launched(wanted: dict, argv: list[str]) -> str:
    """Make one run in a process of its own, which adds its row; return an error message, or ""."""
    plain = ["--dynamo_backend", "no"] if wanted["size"] == "tutorial" else []  # it does not compile
    output, failure = run(
        [*launcher("single_gpu.yaml"), *plain, __file__, *argv, "--worker", json.dumps(wanted)], one_gpu()
    )
    return error_in(output) if failure else ""


def is_made(wanted: dict, row: dict) -> bool:
    """Return whether ``row`` is of the run that is wanted."""
    return wanted.items() <= row["wanted"].items() and wanted.get("change") == row.get("change")


def rows_in(output: Path) -> list[dict]:
    """Return the rows of the runs that are in the folder."""
    file = output / "runs.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


if __name__ == "__main__":
    main()
