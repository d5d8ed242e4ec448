"""Compute memory and traffic of each strategy on 1 to 1,000 GPUs, and the first YAML that fits. No GPU is needed.

    python benchmarks/scaling.py                       # the tables of docs/scaling.md
    python benchmarks/scaling.py --model qwen2.5-1.5b --context_length 4096 --rows 2

Memory is the prediction of --plan. It is within 5% of the peaks measured on one and two cards (fsdp2_offload: 9%). For
more cards it is computed only. Traffic is what each card sends for one optimizer step. A ring of n cards sends
(n - 1) / n of a tensor for a gather or a scatter, and twice that for an all-reduce. Parameters are sent in bf16,
gradients in fp32 (DDP, FSDP2) or bf16 (DeepSpeed).
Source: https://arxiv.org/abs/1910.02054 section 7, and each library's defaults.
"""

import argparse
from dataclasses import replace

from common.model.from_config import planned_model
from common.model.memory import Setting, predict
from common.model.presets import PRESETS
from common.system import GIB

CARDS = (1, 2, 8, 64, 256, 1000)
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
MODELS = ("smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b")
MACHINES = ((1, 16), (1, 24), (1, 80), (8, 24), (8, 80), (64, 80))  # number of cards, GiB of each card
VOCABULARY = 151_936
LEAST_ROWS = 1


def bytes_sent(strategy: str, parameters: float, cards: int, accumulation: int = 1) -> float:
    """Return the bytes that each card sends for an optimizer step of ``accumulation`` micro-batches."""
    gather = 2 * parameters
    scatter = {"fsdp2": 4, "ddp": 4}.get(strategy, 2) * parameters
    volume = {
        "ddp": 2 * scatter,  # an all-reduce of the gradients, once a step
        "zero1": scatter + gather,  # once a step: gradients to their owners, new parameters back
        "zero2": accumulation * scatter + gather,  # each micro-batch's gradients go to their owners
        "zero3": accumulation * (2 * gather + scatter),  # parameters in the forward and in the backward pass
        "fsdp2": accumulation * (2 * gather + scatter),
    }[strategy]
    return volume * (cards - 1) / cards


def candidates(cards: int, setting: Setting) -> list[tuple[str, Setting]]:
    """Return the YAMLs to try, the fastest first, each with its variant of ``setting``."""
    if cards == 1:
        plain = [("single_gpu", replace(setting, strategy="single"))]
        switches = plain + [("single_gpu, recompute", replace(setting, strategy="single", recompute=True))]
    else:
        sharded = [("ddp", "ddp", False), ("fsdp2", "fsdp2", False), ("fsdp2_recompute", "fsdp2", True)]
        switches = [(name, replace(setting, strategy=how, recompute=again)) for name, how, again in sharded]
    moved = dict(offload_optimizer=True, offload_parameters=True, recompute=True)
    return switches + [("zero3_offload", replace(setting, strategy="zero3", **moved))]


def first_that_fits(model, cards: int, limit_gib: float, context_length: int) -> str:
    """Return the first YAML whose prediction for one row at a time fits 95% of a card, or "-"."""
    setting = Setting(rows=LEAST_ROWS, context_length=context_length, processes=cards)
    for name, changed in candidates(cards, setting):
        if predict(model, changed).total <= 0.95 * limit_gib * GIB:
            return name
    return "-"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-7b", choices=PRESETS)
    parser.add_argument("--context_length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1, help="rows of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches of a step, for the traffic")
    arguments = parser.parse_args(argv)
    model = planned_model(PRESETS[arguments.model], VOCABULARY, arguments.context_length)
    parameters = model.num_parameters()
    print(
        f"{arguments.model}, {parameters / 1e9:.2f}B parameters, {arguments.rows} row(s) of {arguments.context_length} "
        "tokens at once, compiled, AdamW. GiB of memory on each card:\n"
    )
    print(row("GPUs", *STRATEGIES, "fsdp2_recompute", "fsdp2_offload") + "\n" + "|---" * 8 + "|")
    for cards in CARDS:
        cells = []
        for name in (*STRATEGIES, "fsdp2_recompute", "fsdp2_offload"):
            setting = Setting(
                rows=arguments.rows,
                context_length=arguments.context_length,
                strategy=("single" if cards == 1 and name == "ddp" else name.split("_")[0]),
                processes=cards,
                recompute=name.endswith("recompute"),
                offload_optimizer=name.endswith("offload"),
                offload_parameters=name.endswith("offload"),
            )
            cells.append(f"{predict(model, setting).total / GIB:.1f}")
        print(row(cards, *cells))
    print(f"\nGB that each card sends for a step of {arguments.accumulation} micro-batches:\n")
    print(row("GPUs", *STRATEGIES) + "\n" + "|---" * 6 + "|")
    for cards in CARDS[1:]:
        sent = [bytes_sent(strategy, parameters, cards, arguments.accumulation) for strategy in STRATEGIES]
        print(row(cards, *(f"{volume / 1e9:.1f}" for volume in sent)))
    print(f"\nThe first YAML that fits, one row of {arguments.context_length} tokens at once:\n")
    print(
        row("model", *(f"{cards} x {gib} GiB" for cards, gib in MACHINES)) + "\n" + "|---" * (len(MACHINES) + 1) + "|"
    )
    for name in MODELS:
        planned = planned_model(PRESETS[name], VOCABULARY, arguments.context_length)
        print(row(name, *(first_that_fits(planned, *machine, arguments.context_length) for machine in MACHINES)))


def row(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
