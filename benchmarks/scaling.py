"""Compute memory and traffic of each strategy on 1 to 1,000 GPUs, and the first YAML that fits. No GPU is needed.

    python benchmarks/scaling.py                       # the tables of docs/scaling.md
    python benchmarks/scaling.py --model qwen2.5-1.5b --context_length 4096 --rows 2

Memory is the prediction of --plan. It is within 5% of the peaks measured on one and two cards (fsdp2_offload: 9%). For
more cards it is computed only. Traffic is what each card sends for one optimizer step. A ring of n cards sends
(n - 1) / n of a tensor for a gather or a scatter, and twice that for an all-reduce. Parameters are sent in bf16,
gradients in fp32 (DDP, FSDP2) or bf16 (DeepSpeed).
Source: https://arxiv.org/abs/1910.02054 section 7, and each library's defaults.

The last table divides the same step among 8 to 1,024 cards. Each YAML takes as many rows at once as a run would take.
Its seconds are those of the slowest of three, as if they ran at the same time: computing, what a card sends over
NVLink, what a machine sends over its network. A ring enters and leaves a machine once, so a machine sends as much as
one card. Of the YAMLs that fit, the fastest is named.
"""

import argparse
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from common.model.counts import PEAK_TFLOPS, flops_per_token
from common.model.from_config import planned_model
from common.model.memory import Setting, predict
from common.model.presets import PRESETS
from common.system import GIB
from common.train.batch import largest_divisor, rows_that_fit

CARDS = (1, 2, 8, 64, 256, 1000)
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
MODELS = ("smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b")
MACHINES = ((1, 16), (1, 24), (1, 80), (8, 24), (8, 80), (64, 80))  # number of cards, GiB of each card
VOCABULARY = 151_936
LEAST_ROWS = 1

# Machines of 8 x H100 80GB. Bytes a second in each direction: of a card over NVLink (900 GB/s in both), of a machine
# over InfiniBand (400 Gbit/s for each card), of a machine over a network card of 100 Gbit/s.
# Source: https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html
CARDS_OF_A_MACHINE, CARD_GIB = 8, 80
NVLINK, INFINIBAND, SLOW_NETWORK = 450e9, CARDS_OF_A_MACHINE * 50e9, 12.5e9
FLOPS_A_CARD = 0.5 * PEAK_TFLOPS["H100"] * 1e12  # measured on one: 48% of the peak with 0.5B, 54% with 7B
ROWS_A_STEP, CONTEXT_LENGTH = 2048, 2048  # 4.2M tokens
LARGE = {  # published shapes beside those of PRESETS, with their vocabulary
    "qwen2.5-0.5b": (PRESETS["qwen2.5-0.5b"], 151_936),
    "qwen2.5-3b": (PRESETS["qwen2.5-3b"], 151_936),
    "llama-2-7b": (PRESETS["llama-2-7b"], 32_000),
    "llama-2-13b": (PRESETS["llama-2-13b"], 32_000),
    "qwen2.5-32b": (
        dict(model_type="qwen2", hidden_size=5120, intermediate_size=27_648, num_hidden_layers=64,
             num_attention_heads=40, num_key_value_heads=8, tie_word_embeddings=False),
        152_064,
    ),
    "llama-3.1-70b": (
        dict(model_type="llama", hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
             num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False),
        128_256,
    ),
}  # fmt: skip
LARGE_CARDS = (8, 64, 256, 1024)


@dataclass(frozen=True)
class Way:
    """A YAML as a way to divide a step. ``copies``: each machine has a copy of the model (hsdp.yaml)."""

    name: str
    strategy: str
    copies: bool = False
    recompute: bool = False


WAYS = (  # of two that take as long, the first is named
    Way("ddp", "ddp"),
    Way("zero1", "zero1"),
    Way("fsdp2", "fsdp2"),
    Way("hsdp", "fsdp2", copies=True),
    Way("zero2_recompute", "zero2", recompute=True),
    Way("fsdp2_recompute", "fsdp2", recompute=True),
    Way("hsdp, recompute", "fsdp2", copies=True, recompute=True),
)
SAME = 0.02  # so much longer is no difference


@dataclass(frozen=True)
class Step:
    """What a step takes under a Way: rows at once, bytes on each card, and seconds by what they are spent on."""

    way: Way
    rows: int
    need: float
    computing: float
    nvlink: float
    sent: float  # bytes that each machine sends over its network

    def seconds(self, network: float) -> float:
        """Return the seconds of a step with a network of so many bytes a second for each machine."""
        return max(self.computing, self.nvlink, self.sent / network)


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


def bytes_exchanged(way: Way, parameters: float, cards: int, accumulation: int) -> tuple[float, float]:
    """Return the bytes that a card sends over NVLink and that a machine sends over its network, for a step."""
    machines = max(1, cards // CARDS_OF_A_MACHINE)
    if not way.copies:
        sent = bytes_sent(way.strategy, parameters, cards, accumulation)
        return sent, sent if machines > 1 else 0.0
    within = bytes_sent(way.strategy, parameters, cards // machines, accumulation)
    # Once a step, copies add up their gradients: an all-reduce among the cards that have the same shard.
    return within, 2 * 4 * parameters * (machines - 1) / machines


def step_under(way: Way, model: PreTrainedModel, cards: int) -> Step | None:
    """Return what a step of ROWS_A_STEP rows takes under ``way``; None if it does not fit the cards."""
    rows_a_card = ROWS_A_STEP // cards
    machines = cards // CARDS_OF_A_MACHINE
    if way.copies and machines == 1:
        return None
    setting = Setting(
        rows=LEAST_ROWS, context_length=CONTEXT_LENGTH, strategy=way.strategy, processes=cards,
        copies=machines if way.copies else 1, recompute=way.recompute,
    )  # fmt: skip
    rows = largest_divisor(rows_a_card, rows_that_fit(model, setting, rows_a_card, CARD_GIB))
    need = predict(model, replace(setting, rows=rows, accumulated=rows_a_card > rows)).total
    if need > 0.95 * CARD_GIB * GIB:
        return None
    flops = flops_per_token(model, CONTEXT_LENGTH) * rows_a_card * CONTEXT_LENGTH
    again = 4 / 3 if way.recompute else 1  # the forward pass once more
    nvlink, network = bytes_exchanged(way, model.num_parameters(), cards, rows_a_card // rows)
    return Step(way, rows, need, again * flops / FLOPS_A_CARD, nvlink / NVLINK, network)


def fastest(steps: list[Step], network: float) -> Step:
    """Return the first of ``steps`` that takes as long as the fastest, or hardly longer."""
    least = min(step.seconds(network) for step in steps)
    return next(step for step in steps if step.seconds(network) <= (1 + SAME) * least)


def large_row(name: str, model: PreTrainedModel, cards: int) -> str:
    """Return the line of a model on so many cards: the fastest YAML with each network."""
    steps = [step for step in (step_under(way, model, cards) for way in WAYS) if step is not None]
    if not steps:
        return row(name, cards, "zero3_offload, or more cards", *["-"] * 6)
    best = fastest(steps, INFINIBAND)
    seconds = [best.computing, best.nvlink, best.sent / INFINIBAND]
    cells = [
        name,
        f"{cards:,}",
        best.way.name,
        best.rows,
        f"{best.need / GIB:.1f}",
        *(f"{value:.2f}" for value in seconds),
    ]
    slow = fastest(steps, SLOW_NETWORK)
    return row(*cells, "-" if cards == CARDS_OF_A_MACHINE else f"{slow.way.name}: {slow.seconds(SLOW_NETWORK):.2f}")


def print_large() -> None:
    """Print the fastest YAML for each of LARGE on each of LARGE_CARDS."""
    print(f"\nThe fastest YAML for steps of {ROWS_A_STEP * CONTEXT_LENGTH:,} tokens:\n")
    heads = ["model", "cards", "YAML", "rows at once", "GiB a card", "s computing", "s NVLink", "s InfiniBand"]
    print(row(*heads, "with 100 Gbit/s a machine: s") + "\n" + "|---" * (len(heads) + 1) + "|")
    for name, (shape, vocabulary) in LARGE.items():
        model = planned_model(shape, vocabulary, CONTEXT_LENGTH)
        for cards in LARGE_CARDS:
            print(large_row(name, model, cards))


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
    print_large()


def row(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
