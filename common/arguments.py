"""The flags: those that every recipe shares, and how a recipe's dicts and the command line become arguments."""

import argparse
import json
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from typing import TypeVar

from common.command_line import OneLineErrors, ShowHelp, as_word, help_on_one_screen
from common.console import InputError
from common.late_compile import compiling_late
from common.other_names import hints

with compiling_late():
    from transformers import HfArgumentParser, TrainingArguments

    from common.trainer_fields import REFUSED, check_fields

Own = TypeVar("Own")
Replacement = dict | Callable[[str], dict]


@dataclass
class SharedArguments:
    """The flags that every recipe has beside those of ``transformers.TrainingArguments``."""

    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Documents to train on, one source or several: a .json, .jsonl, .txt, .csv or .parquet file (also "
            ".gz, .zst, .bz2, .xz), a folder or a 'glob' of them, a token store (its .bin file, or a folder of such), "
            "a data set id of ModelScope or Hugging Face, or a name that python data/prepare.py corpora lists."
        },
    )
    max_data_tokens: str | None = field(
        default=None,
        metadata={
            "help": "Read each source of --data only up to so many tokens: 500M, 1.5B, 300000. Whole documents, in "
            "order; of a hub's data set, the files that follow are not fetched."
        },
    )
    data_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Mix the sources of --data by these weights, one for each, instead of taking every row once a pass."
        },
    )
    text_field: str | None = field(
        default=None,
        metadata={
            "help": "Field that holds a document's text, or a template such as '{title}\\n\\n{text}'. Found among the "
            "usual names if left out."
        },
    )
    encoding: str | None = field(
        default=None,
        metadata={"help": "Encoding of the text files of --data that are not UTF-8: gb18030 for Chinese text in GBK."},
    )
    keep_duplicates: bool = field(
        default=False, metadata={"help": "Train on exact copies of a document too, instead of leaving them out."}
    )
    skip_malformed: bool = field(
        default=False, metadata={"help": "Count malformed documents in the ledger and continue, instead of stopping."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "A local folder, a ModelScope or Hugging Face model id, or 'train' to train one on --data."},
    )
    vocabulary_size: int = field(default=32_000, metadata={"help": "Tokens of a tokenizer trained with 'train'."})
    end_token: str | None = field(
        default=None, metadata={"help": "End-of-document token, for a tokenizer that does not define one."}
    )
    context_length: int = field(default=512, metadata={"help": "Tokens a row: what the model sees at once."})
    tokens_per_step: int = field(
        default=131_072,
        metadata={"help": "Tokens an optimizer step over all processes; gradient accumulation is derived from it."},
    )
    held_out_fraction: float = field(
        default=0.005, metadata={"help": "Share of the documents held out for evaluation (at least one document)."}
    )
    split: str | None = field(
        default=None,
        metadata={
            "help": "Split by order instead, as PaddleNLP and Megatron do: shares such as 949,50,1 for training, "
            "evaluation, and a test after training."
        },
    )
    max_eval_rows: int | None = field(
        default=None,
        metadata={"help": "Evaluate on the first N held-out rows of each source only (said in the results)."},
    )
    packing: str = field(
        default="cross",
        metadata={
            "help": "cross: rows are windows over the stream of documents. isolated: the same rows, but documents do "
            "not see each other. best_fit: rows to train on begin with a document, and cut none that fits into one.",
            "choices": ["cross", "isolated", "best_fit"],
        },
    )
    optimizer: str = field(
        default="auto",
        metadata={
            "help": "muon: Muon for the matrices of the layers, AdamW for the rest. adamw: what --optim names. auto: "
            "muon, but adamw under DeepSpeed (ZeRO cuts matrices up), fsdp2_offload.yaml, and another --optim.",
            "choices": ["auto", "muon", "adamw"],
        },
    )
    attn_implementation: str = field(
        default="auto",
        metadata={
            "help": "Attention kernel: sdpa, flex_attention, eager, flash_attention_2 ... auto: the fastest there is."
        },
    )
    cuda_graph: str = field(
        default="auto",
        metadata={
            "help": "Launch forward and backward of a micro-batch as one CUDA graph. auto: for small models on fast "
            "cards, which would wait for the CPU otherwise.",
            "choices": ["auto", "yes", "no"],
        },
    )
    recompute: str | None = field(
        default=None,
        metadata={
            "help": "What backward computes again instead of keeping it. all: every layer. 2 (3, 4 ...): every second "
            "layer. keep_products: all but attention and matrix products. keep_attention: all but attention. Left out: "
            "what the YAML says."
        },
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Start from the weights of this checkpoint, under another YAML or number of processes, in another "
            "--output_dir: at its next row, with a new optimizer and schedule."
        },
    )
    branch_from: str | None = field(
        default=None,
        metadata={
            "help": "Leave another run at this checkpoint of it, outputs/run/checkpoint-N, and continue in another "
            "--output_dir with other flags: data, weights, rate, length. Optimizer and random states are kept."
        },
    )
    plan: bool = field(
        default=False,
        metadata={"help": "Only print the memory that the run needs, and what would make it fit. Loads nothing."},
    )
    probe: bool = field(
        default=False,
        metadata={"help": "With --plan: load everything, train three steps, and print what the whole run will take."},
    )
    plan_config: str | None = field(
        default=None,
        metadata={
            "help": "With --plan: the accelerate YAML to plan for. Without one: that of the launch; without a launch "
            "ddp.yaml for several cards, fp16.yaml for a card here without bf16, else single_gpu.yaml."
        },
    )
    plan_processes: int | None = field(
        default=None, metadata={"help": "With --plan: cards to plan for; otherwise the YAML's num_processes."}
    )
    plan_memory_gib: float | None = field(
        default=None,
        metadata={"help": "With --plan: memory of a card, in GiB; otherwise that of the card here, if any."},
    )
    plan_json: bool = field(
        default=False, metadata={"help": "With --plan or --plan --probe: print the figures as JSON, in the last line."}
    )
    eval_tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Also measure these tasks of lm_eval at the end: names (zhoblimp blimp xstorycloze_zh ...) or YAML "
            "files. docs/tasks.md says which of them small models can do."
        },
    )
    eval_tasks_every: int | None = field(
        default=None, metadata={"help": "Measure --eval_tasks every so many steps, too."}
    )
    cache_dir: str = field(default="data/cache", metadata={"help": "Where tokenized data is kept and found again."})
    swanlab: str = field(
        default="auto",
        metadata={
            "help": "SwanLab: auto (online when logged in, otherwise offline), online, local, offline or off.",
            "choices": ["auto", "online", "local", "offline", "off"],
        },
    )
    language: str = field(
        default="auto",
        metadata={
            "help": "Labels of report.html: en, zh, or auto: zh where the system's language is Chinese.",
            "choices": ["auto", "en", "zh"],
        },
    )
    save_minutes: float | None = field(
        default=None,
        metadata={"help": "Also save whenever so many minutes have passed: for notebooks with a time limit."},
    )
    on_save_error: str = field(
        default="stop",
        metadata={
            "help": "When the disk is full while saving: stop, or continue (the last whole checkpoint stays).",
            "choices": ["stop", "continue"],
        },
    )
    max_bad_steps: int = field(
        default=10,
        metadata={
            "help": "Steps in a row that may be left out because loss or gradient is not finite; one more ends the run."
        },
    )
    on_loss_spike: str = field(
        default="warn",
        metadata={
            "help": "A loss 6 robust deviations above the median of 128 steps: warn, skip (leave it out) or stop.",
            "choices": ["warn", "skip", "stop"],
        },
    )
    allow_changes: list[str] = field(
        default_factory=list,
        metadata={"help": "Continue a run although these differ; the refusal names them: training.weight_decay ..."},
    )
    given: dict[str, object] = field(init=False, repr=False, default_factory=dict)  # flags of the command line itself
    own: dict[str, object] = field(init=False, repr=False, default_factory=dict)  # the values of the recipe's own flags

    def __post_init__(self):
        """Raise InputError for flags that would be ignored."""
        for name in ("init_from", "branch_from"):
            if getattr(self, name) == "":  # such as a variable of the shell that is not set
                raise InputError(f"--{name} '': names no checkpoint. Give one, or leave the flag out to start anew.")
        if self.branch_from and self.init_from:
            raise InputError(
                f"--branch_from {self.branch_from} with --init_from: a branch continues with the weights of its "
                "checkpoint. Leave --init_from out."
            )
        for name in ("plan_config", "plan_processes", "plan_memory_gib"):
            if getattr(self, name) is not None and (self.probe or not self.plan):
                why = "the probe runs as it is launched" if self.probe else "it would be ignored"
                raise InputError(f"--{name} {getattr(self, name)}: {why}. With --plan alone, or leave it out.")
        if self.plan_json and not (self.plan or self.probe):
            raise InputError("--plan_json: it would be ignored. With --plan, or leave it out.")
        if isinstance(self.max_data_tokens, str):  # from here on a number
            self.max_data_tokens = count_of("--max_data_tokens", self.max_data_tokens)
        if self.eval_tasks_every is not None and not self.eval_tasks:
            raise InputError(f"--eval_tasks_every {self.eval_tasks_every}: name what to measure with --eval_tasks.")
        if self.eval_tasks_every is not None and self.eval_tasks_every < 1:
            raise InputError(f"--eval_tasks_every {self.eval_tasks_every}: must be at least 1 step.")


# The smallest values of numbers that nobody checks further on.
AT_LEAST = {
    "learning_rate": 0, "weight_decay": 0, "adam_beta1": 0, "adam_beta2": 0, "adam_epsilon": 0, "max_grad_norm": 0,
    "warmup_steps": 0, "neftune_noise_alpha": 0, "seed": 0, "data_seed": 0, "context_length": 1, "tokens_per_step": 1,
    "per_device_train_batch_size": 0, "per_device_eval_batch_size": 0, "gradient_accumulation_steps": 0,
    "dataloader_num_workers": 0, "dataloader_prefetch_factor": 1, "logging_steps": 0, "eval_steps": 0, "save_steps": 0,
    "eval_delay": 0, "save_total_limit": 0, "ddp_timeout": 1, "ddp_bucket_cap_mb": 1, "max_bad_steps": 0,
    "save_minutes": 0, "plan_processes": 1, "plan_memory_gib": 0.01,
}  # fmt: skip
BELOW = {
    "adam_beta1": 1, "adam_beta2": 1, "seed": 2**32, "data_seed": 2**32, "max_steps": 2**31, "num_train_epochs": 10**6
}  # fmt: skip
JSON_FIELDS = ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")


# transformers 5.23 gave new names to these fields, and warns at the old ones. Both are taken here, in every version.
NEW_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def count_of(flag: str, text: str, also: str = "") -> int:
    """Return the number that ``text`` means: 120M, 1.5B, 300000, 3e7; spaces and upper or lower case do not matter.

    Args:
        also: what else the flag takes, for the message: " or auto".

    Raises:
        InputError: it is not a number, or below 1.
    """
    number, exponent = r"([+-]?(?:\d+\.?\d*|\.\d+))", r"(?:E\+?(\d{1,2}))"
    match = re.fullmatch(rf"\s*{number}(?:{exponent}|\s*([KMB]))?\s*", text.upper().replace("_", ""))
    if match is None:
        raise InputError(
            f"{flag} {as_word(text)}: not a number. Write it as 30M, 1.5B, 30000000 or 3e7{also}; K, M and B are "
            "thousands, millions and billions."
        )
    count = round(float(match[1]) * 10 ** int(match[2] or 0) * UNITS[match[3] or ""])
    if count < 1:
        raise InputError(f"{flag} {text}: must be at least 1; useful are 1M and more.")
    return count


class _Default:
    """A default of a flag, which differs from the same value given on the command line. Prints as the value."""

    def __init__(self, value):
        self.value = value

    def __str__(self) -> str:
        return str(self.value)


class _Parser(OneLineErrors, HfArgumentParser):
    """A parser of dataclasses, whose --help fits a screen and whose errors are one line."""


def _parser_of(own_flags: type, defaults: dict, not_read: Collection[str]) -> _Parser:
    """Return the parser of a recipe's flags; see ``parse_flags``."""
    kinds = (own_flags, SharedArguments, TrainingArguments)
    parser = _Parser(kinds, allow_abbrev=False, add_help=False, usage="%(prog)s [flags]")
    for action in parser._actions:  # what is refused anyway is left out of --help all
        if action.dest in not_read or action.dest in REFUSED:
            action.help = argparse.SUPPRESS
    own = {each.name for each in fields(own_flags)}
    set_by_dicts = {name: value for name, value in defaults.items() if name not in own}
    shown = [action.dest for action in parser._actions if action.help != argparse.SUPPRESS]
    others = len(set(shown) - own - set_by_dicts.keys())
    parser.set_defaults(**defaults)
    # What argparse takes as a value and not as a flag: -5M, too, so that the message is about the number.
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    of_recipe = HfArgumentParser(own_flags, prog=parser.prog, add_help=False)
    parser.one_screen = help_on_one_screen(of_recipe, set_by_dicts, others, "plan" not in not_read)
    about = "Show this recipe's own flags and exit; with 'all', every flag."
    shown_as = dict(metavar="all", default=argparse.SUPPRESS, help=about)
    parser.add_argument("-h", "--help", nargs="?", action=ShowHelp, **shown_as)
    return parser


def parse_flags(
    own_flags: type[Own],
    argv: list[str] | None,
    defaults: dict,
    not_read: Collection[str] = (),
    **replacements: Replacement,
) -> tuple[Own, SharedArguments, TrainingArguments]:
    """Return the arguments of a run: a recipe's own, the shared ones, and Trainer's.

    A flag on the command line wins. Otherwise ``replacements`` count, then ``defaults``, then the default of the flag.

    Args:
        own_flags: dataclass of the flags that only this recipe has.
        argv: the words after the script's name; None: those of this process.
        not_read: flags that the recipe does not read, and so refuses.
        replacements: a flag of ``own_flags`` -> other defaults, which count when that flag is not at its default:
            ``sample={"max_steps": 900}`` stands for ``--sample``. A function is called with the flag's value for them.

    Raises:
        SystemExit: a flag is unknown, abbreviated, not read, or has a value of the wrong kind; the parser says which.
        InputError: a value is out of its range, or would not do what it says.
    """
    kinds = (own_flags, SharedArguments, TrainingArguments)
    parser = _parser_of(own_flags, defaults, not_read)
    names = [each.name for kind in kinds for each in fields(kind) if each.init]
    parser.set_defaults(**{name: _Default(parser.get_default(name)) for name in names})
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unknown flags: {' '.join(unknown)}{hints(unknown, names)}")
    values = vars(parsed)
    given = {name: values[name] for name in names if not isinstance(values[name], _Default)}
    changed = {name for name, value in given.items() if value != parser.get_default(name).value}
    for name in sorted(changed.intersection(not_read)):
        parser.error(
            f"--{name}: this recipe does not read it. Precision and devices are the launcher's. wiki_zh_scratch.py "
            "reads every flag"
        )
    replaced = {}
    for flag, others in replacements.items():
        if flag in changed:
            replaced |= others(values[flag]) if callable(others) else others
    for name in names:
        if isinstance(values[name], _Default):
            values[name] = replaced.get(name, values[name].value)
    check_numbers(values)
    check_fields(values)
    for old, new in NEW_NAMES.items():
        if new in values and values[new] is None:
            values[new], values[old] = values[old], None  # TrainingArguments give the old name the value of the new one
    shared = _made(SharedArguments, values)
    own = _made(own_flags, values)
    shared.given, shared.own = given, dict(vars(own))
    return own, shared, _made(TrainingArguments, values)


def _made(kind: type, values: dict):
    """Return an object of ``kind``, a dataclass. What TrainingArguments refuse themselves is an InputError."""
    own = {each.name: values[each.name] for each in fields(kind) if each.init}
    try:
        return kind(**own)
    except (ValueError, TypeError, ImportError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"transformers refuses these flags: {reason}") from None


def check_numbers(values: dict) -> None:
    """Raise InputError for numbers out of their range. No flag takes NaN or infinity."""
    for name, value in values.items():
        in_json = name in JSON_FIELDS and isinstance(value, str)
        for number in _numbers(_json_object(name, value) if in_json else value):
            if not math.isfinite(number):
                off = " To switch clipping off: --max_grad_norm 0" if name == "max_grad_norm" else ""
                raise InputError(f"--{name} {value}: must be a finite number.{off}")
        if name in AT_LEAST and value is not None and value < AT_LEAST[name]:
            raise InputError(f"--{name} {value}: must be at least {AT_LEAST[name]}.")
        if name in BELOW and value is not None and value >= BELOW[name]:
            raise InputError(f"--{name} {value}: must be below {BELOW[name]}.")


def _json_object(name: str, text: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"--{name} {text}: must be JSON, such as '{{\"num_decay_steps\": 0.3}}'.")
    return found


def _numbers(value: object) -> list[float]:
    """Return the numbers in ``value``, also those within lists and dicts."""
    if isinstance(value, dict):
        return _numbers(list(value.values()))
    if isinstance(value, list | tuple):
        return [number for inner in value for number in _numbers(inner)]
    return [value] if isinstance(value, float) else []
