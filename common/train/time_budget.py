"""--plan --minutes: the size of model that should learn most in a given time on one card."""

import json
import math
from dataclasses import asdict, dataclass

import numpy as np
from transformers import TrainingArguments

from common.arguments import SharedArguments, count_of
from common.command_line import launch_command
from common.console import InputError, duration_in_words, say
from common.corpus.formats import known_encoding
from common.corpus.sources import find_source
from common.distributed.accelerator import computes_in_bf16, device_name
from common.distributed.launch import Launch
from common.model.counts import PEAK_TFLOPS, flops_per_token, peak_by_name
from common.model.fit_to_text import bytes_of
from common.model.from_config import planned_model
from common.model.presets import QWEN2_VOCABULARY, shape_near
from common.model.scaling import MOST_PASSES, LossLaw, in_short, tokens_per_step_for, vocabulary_for

SIZES = "8M 11M 16M 20M 26M 32M 42M 50M 64M 80M 100M 125M 160M 200M 250M 350M".split()
# A step takes SECONDS_A_STEP, in which the card waits, and its FLOPs at FLOPS. Fitted on five runs of 42M to 123M alone
# on an H200, which it gives within 3% (benchmarks/results/ladder_h200_2026-11-30.csv, 03723a0).
MEASURED_CARD, FLOPS, SECONDS_A_STEP = "H200", 414e12, 0.0062
FP16_ONLY = ("T4", "V100")
# Of the text of the same runs, 149 MB of Chinese and English, with vocabularies trained on it; the last is Qwen2's.
BYTES_A_TOKEN = {8_192: 3.12, 16_384: 3.48, 32_768: 3.80, 151_665: 3.59}
SHOWN = 3  # sizes on each side of the best
FEWEST_MINUTES, MOST_MINUTES = 0.1, 100_000  # six seconds; ten weeks, with fewer than the 2**31 steps of a run
DECIDED = ("target_parameters", "model", "max_steps", "num_train_epochs", "sample")
OF_MEMORY = ("plan_config", "plan_processes", "plan_memory_gib")
# With these, a run is not what was measured, neither its speed nor its loss.
NOT_OF_THE_LAW = (
    "optimizer", "optim", "learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs",
    "context_length", "packing", "recompute", "gradient_checkpointing", "attn_implementation",
)  # fmt: skip
NOT_OF_THE_RUN = {"plan", "probe", "plan_json", "minutes", "plan_card", "ladder"}


@dataclass(frozen=True)
class Speed:
    """How fast one card trains: a step takes ``seconds_a_step``, and its FLOPs at ``flops`` a second.

    Attributes:
        card: which card it is, and how its speed is known.
        fp16: whether it computes in fp16 only.
    """

    flops: float
    seconds_a_step: float
    card: str
    fp16: bool = False

    def tokens_per_second(self, flops_a_token: float, tokens_per_step: int) -> float:
        return tokens_per_step / (self.seconds_a_step + tokens_per_step * flops_a_token / self.flops)


@dataclass(frozen=True)
class Candidate:
    """What --target_parameters of this size trains: its parameters, and the batch and vocabulary that follow."""

    target_parameters: str
    parameters: int
    flops_a_token: int
    tokens_per_step: int
    bytes_a_token: float


@dataclass(frozen=True)
class Text:
    """How much text there is: in bytes, None if that is not known; and the tokens that are read of it at most."""

    bytes: float | None = None
    most_tokens: float = math.inf


@dataclass(frozen=True)
class Outcome:
    """What a size should reach in the time: ``LossLaw.forecast`` says what the last three are."""

    target_parameters: str
    parameters: int
    tokens_per_second: float
    tokens: int
    steps: int
    passes: float
    bits_per_byte: float
    extrapolated: bool
    measured: str


def check_minutes(minutes: float | None, card: str | None, launch: Launch, shared: SharedArguments) -> None:
    """Refuse --minutes and --plan_card where they would be ignored, and flags that they would ignore.

    Raises:
        InputError: with what to leave out.
    """
    if minutes is None and card is not None:
        raise InputError(f"--plan_card {card}: it would be ignored. With --plan --minutes, or leave it out.")
    if minutes is None:
        return
    if not shared.plan:
        raise InputError(f"--minutes {minutes:g}: it would be ignored. --plan --minutes {minutes:g} names a size.")
    if not FEWEST_MINUTES <= minutes <= MOST_MINUTES:
        raise InputError(f"--minutes {minutes:g}: must be {FEWEST_MINUTES} to {MOST_MINUTES:,}.")
    if "tokens_per_step" in shared.given and shared.tokens_per_step % shared.context_length:
        nearest = max(1, round(shared.tokens_per_step / shared.context_length)) * shared.context_length
        raise InputError(
            f"--tokens_per_step {shared.tokens_per_step}: not whole rows of {shared.context_length} tokens. Use "
            f"--tokens_per_step {nearest}."
        )
    if card is not None and shared.probe:
        raise InputError(f"--plan_card {card}: --probe measures the card that is here. Leave one out.")
    for name in (*DECIDED, *OF_MEMORY):
        if name in shared.given:
            why = "chooses it" if name in DECIDED else "plans the time of one card, not memory"
            raise InputError(f"--{name} with --minutes, which {why}. Leave one out.")
    if launch.processes > 1:
        raise InputError(f"--minutes in {launch.processes} processes: it plans for one card. Start one process.")


def speed_of_card(card: str | None, training: TrainingArguments) -> Speed:
    """Return the speed of the card called ``card``, such as "H100"; None: of the card here.

    Raises:
        InputError: it is not known, or there is no card here.
    """
    if card is None and training.device.type == "cpu":
        raise InputError(
            f"--minutes: there is no accelerator here. Name one, such as --plan_card {MEASURED_CARD}; or fit a model "
            "to an hour of this CPU: --data FILES --target_parameters auto"
        )
    name = device_name(training.device) if card is None else card
    peak = peak_by_name(name)
    if peak is None:
        raise InputError(
            f"--minutes: the speed of {name} is not known; known are {', '.join(PEAK_TFLOPS)}. Measured on the card "
            "itself: --plan --probe --minutes"
        )
    share = FLOPS / 1e12 / PEAK_TFLOPS[MEASURED_CARD]
    known = peak_by_name(name, {MEASURED_CARD: 1}) is not None
    how = "measured" if known else f"assumed: {share:.0%} of its peak, as measured on an {MEASURED_CARD}"
    if card is None:
        fp16 = not computes_in_bf16(training.device)
    else:
        fp16 = peak_by_name(name, dict.fromkeys(FP16_ONLY, 1)) is not None
    return Speed(share * peak * 1e12, SECONDS_A_STEP, f"{name} ({how})", fp16)


def name_size(recipe: str, family: dict, minutes: float, law: LossLaw, speed: Speed, shared: SharedArguments) -> None:
    """Print the size of a model like ``family`` that should learn most in so many minutes, with its command.

    With ``--plan_json`` the last line is JSON.
    """
    text = text_of(shared)
    sizes = candidates(family, shared)
    found = [outcome(size, minutes, law, speed, text) for size in sizes]
    best = min(range(len(found)), key=lambda place: found[place].bits_per_byte)
    chosen = found[best]
    there = "text that is enough for one pass (its size is not known)"
    if text.bytes is not None:
        megabytes = text.bytes / 1e6
        there = f"about {megabytes:,.0f} MB of text" if megabytes >= 10 else f"about {megabytes:.2g} MB of text"
    say(f"{duration_in_words(60 * minutes)} on one {speed.card}, {there}:")
    for each in found[max(0, best - SHOWN) : best + SHOWN + 1]:
        mark = ">" if each is chosen else " "
        doubtful = f"  (extrapolated: measured were {each.measured})" if each.extrapolated else ""
        say(
            f"  {mark} {each.target_parameters:>4} {each.tokens_per_second:>11,.0f} tokens/s "
            f"{each.tokens / 1e6:>7,.0f}M tokens {each.passes:>6.2f} passes {each.bits_per_byte:>7.3f} bits per byte"
            f"{doubtful}"
        )
    close = [each.target_parameters for each in found if each.bits_per_byte <= chosen.bits_per_byte * (1 + law.error)]
    alike = "" if len(close) == 1 else f" From {close[0]} to {close[-1]}, the differences are within the law's error."
    say(
        f"--target_parameters {chosen.target_parameters} should learn most: {chosen.bits_per_byte:.3f} bits per byte."
        f"{alike} The law was fitted on {law.text}; it missed runs that it had not seen by {law.error:.1%} on average. "
        "On other text, take the order of the sizes from it, and not the figure."
    )
    if chosen.passes > law.most_passes:
        fitted = " --target_parameters auto fits a model to so little." if chosen.passes > MOST_PASSES else ""
        say(
            f"note: {in_short(chosen.passes)} passes over the same text. Those after the first "
            f"{in_short(law.most_passes)} count as nothing here: after many passes, held-out text is predicted worse "
            f"again. More text would help most.{fitted}"
        )
    flags = {name: value for name, value in shared.given.items() if name not in NOT_OF_THE_RUN}
    flags |= {"target_parameters": chosen.target_parameters, "max_steps": chosen.steps}
    if sizes[best].tokens_per_step != tokens_per_step_for(count_of("", chosen.target_parameters)):
        flags["tokens_per_step"] = sizes[best].tokens_per_step
    changed = [f"--{name}" for name in NOT_OF_THE_LAW if name in shared.given]
    if changed:
        say(
            "note: the law, and a speed that --probe has not measured, are of the recipe's own settings, without "
            f"{', '.join(changed)}."
        )
    yaml = f"accelerate_configs/{'fp16' if speed.fp16 else 'single_gpu'}.yaml"
    say("Start, evaluations and saving come on top. Whether it fits the card: --plan without --minutes. The command:")
    say(f"  {launch_command(yaml, recipe, flags)}")
    if shared.plan_json:
        say(json.dumps({"minutes": minutes, "card": speed.card, "law_error": law.error, **asdict(chosen)}))


def candidates(family: dict, shared: SharedArguments) -> list[Candidate]:
    """Return SIZES of a model like ``family``, from small to large, without those that have no sensible shape.

    Raises:
        InputError: none has: the vocabulary is too large.
    """
    found = []
    for size in SIZES:
        target = count_of("--target_parameters", size)
        vocabulary, tokens_per_step = shared.vocabulary_size, shared.tokens_per_step
        if shared.tokenizer != "train":
            vocabulary = QWEN2_VOCABULARY
        elif "vocabulary_size" not in shared.given:
            vocabulary = vocabulary_for(target)
        if "tokens_per_step" not in shared.given:
            tokens_per_step = whole_rows(tokens_per_step_for(target), shared.context_length)
        try:
            shape, parameters = shape_near(target, family, vocabulary)
        except InputError:
            continue
        flops = flops_per_token(planned_model(shape, vocabulary, shared.context_length), shared.context_length)
        found.append(Candidate(size, parameters, flops, tokens_per_step, bytes_a_token(vocabulary)))
    if not found:
        raise InputError(
            f"--minutes: no size up to {SIZES[-1]} has a vocabulary of {shared.vocabulary_size:,}. Give a smaller "
            "--vocabulary_size, with --tokenizer train."
        )
    return found


def whole_rows(tokens_per_step: int, context_length: int) -> int:
    """Return the tokens of a step of whole rows, near ``tokens_per_step``: 8,192 in rows of 500 are 16 rows, 8,000."""
    if tokens_per_step % context_length == 0:
        return tokens_per_step
    return context_length * 2 ** max(0, round(math.log2(tokens_per_step / context_length)))


def outcome(size: Candidate, minutes: float, law: LossLaw, speed: Speed, text: Text) -> Outcome:
    """Return what ``size`` should reach in so many minutes."""
    per_second = speed.tokens_per_second(size.flops_a_token, size.tokens_per_step)
    steps = max(1, int(60 * minutes * per_second / size.tokens_per_step))
    tokens = steps * size.tokens_per_step
    text_bytes = tokens * size.bytes_a_token if text.bytes is None else text.bytes
    text_bytes = min(text_bytes, text.most_tokens * size.bytes_a_token)
    passes = tokens * size.bytes_a_token / text_bytes
    forecast = law.forecast(size.parameters, text_bytes, passes, steps)
    known = {name: forecast[name] for name in ("bits_per_byte", "extrapolated", "measured")}
    return Outcome(size.target_parameters, size.parameters, per_second, tokens, steps, passes, **known)


def bytes_a_token(vocabulary: int) -> float:
    """Return about how many bytes of text a token of such a vocabulary stands for."""
    sizes = [math.log(size) for size in BYTES_A_TOKEN]
    return float(np.interp(math.log(vocabulary), sizes, list(BYTES_A_TOKEN.values())))


def text_of(shared: SharedArguments) -> Text:
    """Return how much text --data has on this machine, and how much of it is read."""
    if shared.data is None:
        return Text()
    sources = [find_source(given) for given in shared.data]
    if not shared.probe:  # otherwise resolve_sources printed them
        for note in (note for source in sources for note in source.notes):
            say(note)
    sizes = [bytes_of(source, known_encoding(shared.encoding)) for source in sources]
    limit = math.inf if shared.max_data_tokens is None else shared.max_data_tokens * len(sizes)
    return Text(None if None in sizes else max(1.0, sum(sizes)), limit)
