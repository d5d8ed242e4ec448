"""What follows from the size of a model: vocabulary, tokens a step, learning rate, passes; and the loss to expect.

The rules were fitted on runs of benchmarks/ladder.py, whose rows are in benchmarks/results/ladder_*.csv. Outside the
sizes that were measured they are extrapolated, and say so.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from common.arguments import SharedArguments
from common.console import InputError, say
from common.model.presets import is_auto, parameter_count

SMALLEST, LARGEST = 16e6, 125e6  # parameters of the measured models, embedding included
# Small models learn more from many small steps, large ones are faster with large steps. 42M and 62M parameters on 16M
# and 18M tokens: steps of 16,384 and 32,768 tokens equally good, 65,536 6% worse.
TOKENS_PER_STEP, MODEL_OF_THESE = 65_536, 100e6
# The best of three at 65,536 tokens a step, interpolated: 5.4e-3 for 66M parameters and 4.7e-3 for 123M. At 32,768, for
# 16M and 31M, the lowest that was tried (4e-3) was the best. So it depends on the batch, and hardly on the size.
LEARNING_RATES = {"muon": 5e-3, "adamw": 1e-3}  # at TOKENS_PER_STEP
# Smaller steps keep the rates of this one: at 1,024 tokens, 4.2M parameters want 3e-3 to 5e-3 (benchmarks/LOG.md).
SMALLEST_STEP = 16_384
WEIGHT_DECAY = 0.1  # 0.01 and 0.2 were within 0.2%
# From so many parameters on, so large a vocabulary: the embedding takes a quarter to a half of a small model. At 42M,
# 16,384 and 32,768 were equal in equal time.
VOCABULARIES = ((0, 8_192), (12e6, 16_384), (40e6, 32_768))
TOKENS_A_PARAMETER = 20  # Source: https://arxiv.org/abs/2203.15556
MOST_PASSES = 8  # what more of them are worth: https://arxiv.org/abs/2305.16264, figure 5
# Of a model with more parameters than the text has tokens, if they make so many steps. 103M on 39M tokens: 1.2345 bits
# per byte after 2.7 passes, which were 1,617 steps, and 1.260 after 7.9. 66M after 3.9 passes: 1.234.
MOST_PASSES_OF_LARGE_MODELS, ENOUGH_STEPS = 4, 1600
# After about so many passes, further ones are worth nothing: R* of the same paper, equation 5.
PASSES_THAT_COUNT = 15.4
# What few steps cost falls as this power of their number. 1, 1.5 and 2 were tried: benchmarks/LOG.md
STEPS_POWER = 1.5
BUNDLED_LAW = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "ladder_h200_2026-11-30.json"


def defaults_for(target_parameters: str) -> dict:
    """Return the flags that ``--target_parameters`` decides, and print them. A flag on the command line wins.

    ``num_train_epochs`` 0 means ``passes_for``, which needs the text. For "auto", ``fit_to_text`` decides later.
    """
    if is_auto(target_parameters):
        return {}
    parameters = parameter_count(target_parameters)
    known = SMALLEST <= parameters <= LARGEST
    measured = f"models of {SMALLEST / 1e6:.0f}M to {LARGEST / 1e6:.0f}M were measured"
    found = {
        "vocabulary_size": vocabulary_for(parameters),
        "tokens_per_step": tokens_per_step_for(parameters),
        "weight_decay": WEIGHT_DECAY,
        "num_train_epochs": 0,
    }
    say(
        f"{target_parameters} parameters, unless a flag says otherwise: a vocabulary of {found['vocabulary_size']:,} "
        f"(with --tokenizer train), {found['tokens_per_step']:,} tokens a step, weight decay {WEIGHT_DECAY}, "
        f"{TOKENS_A_PARAMETER} tokens a parameter in 1 to {MOST_PASSES} passes; over a text with fewer tokens than the "
        f"model has parameters, at most {MOST_PASSES_OF_LARGE_MODELS} passes, or what makes {ENOUGH_STEPS:,} steps if "
        f"that is more ({measured}{'' if known else ': this is extrapolated'})"
    )
    return found


def vocabulary_for(parameters: float) -> int:
    """Return the size of the vocabulary for a model of so many parameters."""
    return [vocabulary for least, vocabulary in VOCABULARIES if parameters >= least][-1]


def tokens_per_step_for(parameters: float) -> int:
    """Return the tokens of an optimizer step for a model of so many parameters: a power of two that grows as its root.

    Source: for the power, between 0.33 and 0.5 as the budget grows with the model, https://arxiv.org/abs/2401.02954
    """
    return 2 ** round(math.log2(TOKENS_PER_STEP * (parameters / MODEL_OF_THESE) ** 0.5))


def learning_rates_for(tokens_per_step: int) -> dict[str, float]:
    """Return the learning rates of "muon" and "adamw" for a batch, to two digits: they grow as its root.

    Below SMALLEST_STEP they stay.

    Source: for the root, https://arxiv.org/abs/2205.10287
    """
    factor = (max(tokens_per_step, SMALLEST_STEP) / TOKENS_PER_STEP) ** 0.5
    return {optimizer: float(f"{rate * factor:.1e}") for optimizer, rate in LEARNING_RATES.items()}


def passes_for(parameters: float, text_tokens: int, tokens_per_step: int) -> float:
    """Return the passes over ``text_tokens`` that give TOKENS_A_PARAMETER; at least 1, and at most as said above."""
    most = float(MOST_PASSES)
    if parameters > text_tokens:
        for_enough_steps = ENOUGH_STEPS * tokens_per_step / text_tokens
        most = min(most, max(MOST_PASSES_OF_LARGE_MODELS, for_enough_steps))
    return min(most, max(1.0, TOKENS_A_PARAMETER * parameters / text_tokens))


def counted_bytes(text_bytes: float, passes: float) -> float:
    """Return what training ``passes`` times on ``text_bytes`` is worth, in bytes of new text.

    The first pass counts in full, and each later one counts less than the one before: 4 passes over 100 MB are worth
    372 MB, 8 passes 664 MB.

    Source: https://arxiv.org/abs/2305.16264, equation 5
    """
    if passes <= 1:
        return text_bytes * passes
    return text_bytes * (1 + PASSES_THAT_COUNT * (1 - math.exp(-(passes - 1) / PASSES_THAT_COUNT)))


def read_law(path: str | None, shared: SharedArguments, minutes: float | None = None) -> "LossLaw | None":
    """Return the law in the file of --ladder; without one, with ``minutes``, the law that comes with the project.

    Raises:
        InputError: it cannot be read, or would be ignored.
    """
    if path is None:
        return None if minutes is None else LossLaw.read(str(BUNDLED_LAW))
    if not (shared.plan and (shared.probe or minutes is not None)):
        raise InputError(f"--ladder {path}: it would be ignored. It predicts with --plan --probe, or --plan --minutes.")
    return LossLaw.read(path)


@dataclass(frozen=True)
class LossLaw:
    """Bits per byte = irreducible + a / parameters^alpha + b / bytes^beta + c / steps^STEPS_POWER.

    The last term is what a run loses that makes few steps, of which the first ones find out little.

    Attributes:
        a, b, c: bits at 1M parameters, at 1 MB of text, and at one step.
        error: mean relative error for runs that were left out of the fit, in turn.
        text: which text it was fitted on. It holds for no other.
        parameters, trained, steps: the smallest and the largest number that was measured of parameters, of bytes (as
            ``counted_bytes`` has them), and of steps.
        most_passes: over the text that were measured.
    """

    irreducible: float
    a: float
    alpha: float
    b: float
    beta: float
    c: float
    error: float
    text: str
    parameters: list[float]
    trained: list[float]
    steps: list[float]
    most_passes: float

    @classmethod
    def read(cls, path: str) -> "LossLaw":
        """Read the fit that benchmarks/ladder.py wrote.

        Raises:
            InputError: ``path`` is not such a file.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"--ladder {path}: not a fit.json of benchmarks/ladder.py ({error}). If an earlier version of it made "
                "the file, run it again: it fits the runs that are there, without repeating them."
            ) from None

    def bits_per_byte(self, parameters: float, trained_bytes: float, steps: float) -> float:
        """Return the bits per byte of held-out text to expect; ``trained_bytes``: as ``counted_bytes`` has them."""
        too_small = self.a / (parameters / 1e6) ** self.alpha
        too_little = self.b / (trained_bytes / 1e6) ** self.beta
        return self.irreducible + too_small + too_little + self.c / steps**STEPS_POWER

    def forecast(
        self, parameters: float, text_bytes: float, passes: float, steps: float
    ) -> dict[str, float | bool | str]:
        """Return what a run should reach, and what twice the parameters, the text or the passes would.

        Twice the text or the passes are twice the steps. More passes than were measured count as nothing: at some
        number of them, held-out text is predicted worse again. ``extrapolated``: whether the run is outside of what was
        measured; ``measured``: the limits that it is outside of, in words.
        """
        trained, twice = (counted_bytes(text_bytes, min(each, self.most_passes)) for each in (passes, 2 * passes))
        limits = {
            "parameters": (parameters, self.parameters),
            "bytes of text": (trained, self.trained),
            "steps": (steps, self.steps),
            "passes": (passes, [0.0, self.most_passes]),
        }
        outside = [
            f"{in_short(least)} to {in_short(most)} {name}"
            for name, (value, (least, most)) in limits.items()
            if not least <= value <= most
        ]
        return {
            "bits_per_byte": self.bits_per_byte(parameters, trained, steps),
            "twice_the_parameters": self.bits_per_byte(2 * parameters, trained, steps),
            "twice_the_text": self.bits_per_byte(parameters, 2 * trained, 2 * steps),
            "twice_the_passes": self.bits_per_byte(parameters, twice, 2 * steps),
            "extrapolated": len(outside) > 0,
            "measured": ", ".join(outside),
        }


def in_short(number: float) -> str:
    """Return a number as one says it: 16M, 972M, 4,700, 7.87."""
    if number >= 1e6:
        return f"{number / 1e6:.3g}M"
    return f"{number:,.0f}" if number >= 999.5 else f"{number:.3g}"
