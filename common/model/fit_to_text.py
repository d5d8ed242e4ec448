"""``--target_parameters auto``: a model that fits the text and this machine, and the settings that follow from both."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import TrainingArguments

from common.arguments import SharedArguments
from common.command_line import as_word
from common.console import InputError, duration_in_words, say
from common.corpus.formats import COLUMN_FORMATS, COMPRESSIONS, DAMAGE, format_of, known_encoding, open_decompressed
from common.corpus.sources import Source, find_source
from common.model.counts import cpu_flops
from common.model.presets import parameters_of, shape_of_width
from common.model.scaling import (
    LARGEST,
    MOST_PASSES,
    MOST_PASSES_OF_LARGE_MODELS,
    SMALLEST,
    TOKENS_A_PARAMETER,
    tokens_per_step_for,
)
from common.system import usable_cores

# Heads of 64, as many layers, and the vocabulary: 4 is the model of --sample, 12 that of wiki_zh_scratch.py.
SIZES = ((2, 2_048), (3, 4_096), (4, 4_096), (5, 8_192), (6, 8_192), (8, 16_384), (10, 32_768), (12, 32_768))
BYTES_A_TOKEN = 4  # of the text in UTF-8; with --sample 3.7, with 30 short Chinese texts 5.4
SAMPLE_FILES = 50  # of a folder in another encoding
SAMPLE_BYTES = 1 << 20  # of a file in another encoding, to see what it takes in UTF-8: GBK has 2 bytes where that has 3
PACKED = 3  # text has about so many times the bytes of its .gz or .zst
PARAMETERS_A_TOKEN = 50  # at most. --sample has 46: the only measurement with so little text
SECONDS_ON_A_CPU = 3600
LITTLE_TEXT = 10_000_000  # tokens; of less, a twentieth is held out, so that there is something to measure on
STEPS = 1000  # many small steps learn more from little text than few large ones
LEAST_TOKENS_PER_STEP = 1024  # on a CPU, fewer are too little work for what a step of Muon costs
LEAST_STEPS = 200  # or steps have half as many tokens
LEAST_ROWS = 8  # of a step; there are at most 512 tokens in each
MUON_TIME = 1.25  # a step with Muon takes so much longer on a CPU than with AdamW, for which cpu_flops was measured
# Weight decay of a model with so many parameters for each token of text. On a CPU, against 0.1: with 46, as --sample,
# 5% fewer bits; with 14, at 2.0, 2.5% more.
STRONG_DECAY, ITS_PARAMETERS_A_TOKEN = 3.0, 30


@dataclass
class Fit:
    """A size, and the run that it gets: ``tokens`` are trained on, in ``passes`` over the text."""

    heads: int
    vocabulary: int
    parameters: int
    tokens: float
    passes: float
    seconds: float  # on this CPU


def fit_to_text(family: dict, shared: SharedArguments, training: TrainingArguments) -> dict:
    """Return a shape like ``family`` for the text of --data and this machine, and print why.

    Vocabulary, context length, batch, steps, learning rate and output folder follow from it. They are set in ``shared``
    and ``training`` where the command line does not. How much text there is follows from the sizes of the files.

    Raises:
        InputError: there is no --data, or its size is not known.
    """
    if shared.data is None:
        raise InputError("--target_parameters auto: fits the model to your own text. Name it with --data.")
    if "sample" in shared.given:
        raise InputError("--target_parameters auto with --sample, which has a size of its own. Leave one out.")
    sources = [find_source(given) for given in shared.data]
    if shared.plan and not shared.probe:  # otherwise resolve_sources prints them
        for note in (note for source in sources for note in source.notes):
            say(note)
    tokens = sum(tokens_of(source, known_encoding(shared.encoding)) for source in sources)
    if shared.max_data_tokens is not None:
        tokens = min(tokens, shared.max_data_tokens * len(sources))
    on_cpu = training.device.type == "cpu"
    fit, why = best_fit(family, tokens, SECONDS_ON_A_CPU if on_cpu else None)
    chosen = settings_of(fit, tokens, shared)
    chosen["output_dir"] = str(Path(training.output_dir).parent / sources[0].name)
    if "max_steps" in shared.given:
        del chosen["num_train_epochs"]
    chosen = {name: value for name, value in chosen.items() if name not in shared.given}
    for name, value in chosen.items():
        setattr(shared if hasattr(shared, name) else training, name, value)
    measured = "" if SMALLEST <= fit.parameters <= LARGEST else " (measured were 16M to 125M: this is extrapolated)"
    minutes = "less than a minute" if fit.seconds < 60 else f"about {duration_in_words(fit.seconds)}"
    time = f", {minutes} of training on {usable_cores()} CPU cores" * on_cpu
    files = sum(len(source.files) for source in sources)
    flags = " ".join(f"--{name} {as_word(value)}" for name, value in chosen.items())
    say(
        f"fitted to the text: about {tokens:,.0f} tokens in {files:,} file{'s' * (files != 1)}\n"
        f"  model: {fit.heads} layers of {64 * fit.heads}, {fit.parameters / 1e6:.1f}M parameters with a vocabulary of "
        f"{fit.vocabulary:,}; {why}{measured}\n"
        f"  run: {fit.tokens:,.0f} tokens in {fit.passes:.3g} passes ({TOKENS_A_PARAMETER} tokens a parameter, at most "
        f"{most_passes_of(fit.parameters, tokens)} passes){time}\n"
        f"  which means, beside your own flags: {flags}"
    )
    return shape_of_width(family, fit.heads, fit.heads)


def tokens_of(source: Source, encoding: str | None = None) -> float:
    """Return about how many tokens the text of ``source`` has; ``encoding``: as ``known_encoding`` returns it.

    Raises:
        InputError: that is not known without fetching or reading it.
    """
    text_bytes = bytes_of(source, encoding)
    if text_bytes is None:
        raise InputError(
            f"--target_parameters auto: {source.given} is no text on this machine, so its size is not known. Give "
            "one, such as --target_parameters 30M."
        )
    return max(1.0, text_bytes / BYTES_A_TOKEN)


def bytes_of(source: Source, encoding: str | None = None) -> float | None:
    """Return about how many bytes of text, in UTF-8, the files of ``source`` have; None: not here, or no text."""
    if source.token_store is not None or source.hub_id is not None:
        return None
    packed = [PACKED if path.suffix.lower() in {*COMPRESSIONS, ".parquet"} else 1 for path in source.files]
    in_utf8 = 1.0
    if encoding is not None:  # files in UTF-8 may lie among them
        sample = source.files[:SAMPLE_FILES]
        longer = sum(bytes_in_utf8(path, encoding) * path.stat().st_size for path in sample)
        in_utf8 = longer / max(1, sum(path.stat().st_size for path in sample))
    sizes = (path.stat().st_size * factor for path, factor in zip(source.files, packed, strict=True))
    return in_utf8 * sum(sizes)


def bytes_in_utf8(path: Path, encoding: str) -> float:
    """Return how many bytes a byte of a text file becomes in UTF-8, judging by its beginning."""
    if format_of(path.name) in COLUMN_FORMATS:
        return 1.0
    try:
        with open_decompressed(str(path), partial(path.open, "rb"), encoding) as stream:
            in_utf8 = stream.read(SAMPLE_BYTES)
        with path.open("rb") as stream:
            if stream.read(len(in_utf8)) == in_utf8:  # it is in UTF-8 already
                return 1.0
    except DAMAGE:  # reading the file will say where
        return 1.0
    return len(in_utf8) / max(1, len(in_utf8.decode(errors="ignore").encode(encoding, errors="ignore")))


def best_fit(family: dict, tokens: float, most_seconds: float | None) -> tuple[Fit, str]:
    """Return the largest of SIZES that ``tokens`` of text and the time are enough for, and the reason in words.

    Args:
        most_seconds: of the whole run on this CPU; None: no limit.
    """
    why = "the largest of this recipe"
    for heads, vocabulary in reversed(SIZES):
        parameters = parameters_of(shape_of_width(family, heads, heads), vocabulary)
        least = 0.0 if most_seconds else 1.0  # a CPU need not see all of a large text
        passes = min(most_passes_of(parameters, tokens), max(least, TOKENS_A_PARAMETER * parameters / tokens))
        seconds = MUON_TIME * 6 * parameters * passes * tokens / cpu_flops(usable_cores())
        fit = Fit(heads, vocabulary, parameters, passes * tokens, round(passes, 2 if passes >= 1 else 4), seconds)
        if parameters > PARAMETERS_A_TOKEN * tokens:
            why = f"a larger one would have more than {PARAMETERS_A_TOKEN} parameters for each token of text"
        elif most_seconds and seconds > most_seconds:
            why = f"a larger one would take more than {duration_in_words(most_seconds)}"
        else:
            return fit, why
    return fit, "the smallest there is"


def most_passes_of(parameters: int, tokens: float) -> int:
    """Return how often a model of so many parameters sees a text at most: a large one soon knows it by heart."""
    few = MOST_PASSES_OF_LARGE_MODELS * tokens < LEAST_STEPS * LEAST_TOKENS_PER_STEP / 2
    return MOST_PASSES if few or parameters <= tokens else MOST_PASSES_OF_LARGE_MODELS


def settings_of(fit: Fit, tokens: float, shared: SharedArguments) -> dict:
    """Return the flags that follow from a fit: a batch of a power of two, so that there are about STEPS steps."""
    tokens_per_step = min(tokens_per_step_for(fit.parameters), 2 ** int(fit.tokens / STEPS).bit_length() // 2)
    least = LEAST_TOKENS_PER_STEP if fit.tokens >= LEAST_STEPS * LEAST_TOKENS_PER_STEP else LEAST_TOKENS_PER_STEP // 2
    tokens_per_step = max(least, tokens_per_step)
    context_length = min(512, max(128, tokens_per_step // LEAST_ROWS))
    if "context_length" in shared.given:
        tokens_per_step = max(tokens_per_step, shared.context_length)
    steps = max(1, round(fit.tokens / tokens_per_step))
    chosen = dict(
        vocabulary_size=fit.vocabulary,
        context_length=context_length,
        tokens_per_step=tokens_per_step,
        num_train_epochs=fit.passes,
        logging_steps=max(1, steps // 20),
        eval_steps=max(1, steps // 5),
        save_steps=max(1, steps // 5),
    )
    if tokens < LITTLE_TEXT:
        chosen["held_out_fraction"] = 0.05
    if fit.parameters > ITS_PARAMETERS_A_TOKEN * tokens:
        chosen["weight_decay"] = STRONG_DECAY
    return chosen
