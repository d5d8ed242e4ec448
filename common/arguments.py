"""The flags that every recipe shares. A recipe's DATA and TRAINING dicts set their defaults."""

from dataclasses import dataclass, field

from common.messages import InputError


@dataclass
class SharedArguments:
    """Flags beside ``transformers.TrainingArguments``."""

    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Documents to train on, one source or several: a .json, .jsonl, .txt, .csv or .parquet file (also "
            ".gz, .zst, .bz2, .xz), a folder or a 'glob' of them, a token store (its .bin file, or a folder of such), "
            "or a data set id of ModelScope or Hugging Face."
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
    keep_duplicates: bool = field(
        default=False, metadata={"help": "Train on exact copies of a document too, instead of leaving them out."}
    )
    skip_malformed: bool = field(
        default=False, metadata={"help": "Count malformed documents in the ledger and go on, instead of stopping."}
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
            "not see each other.",
            "choices": ["cross", "isolated"],
        },
    )
    optimizer: str = field(
        default="auto",
        metadata={
            "help": "muon: Muon for the matrices of the layers, AdamW for the rest. adamw: what --optim names. auto: "
            "muon, but adamw under DeepSpeed, whose ZeRO cuts matrices up.",
            "choices": ["auto", "muon", "adamw"],
        },
    )
    attn_implementation: str = field(
        default="auto",
        metadata={
            "help": "Attention kernel: sdpa, flex_attention, eager, flash_attention_2 ... auto: the fastest there is."
        },
    )
    plan: bool = field(
        default=False,
        metadata={"help": "Only say what memory the run needs, and what would make it fit. Loads nothing."},
    )
    probe: bool = field(
        default=False,
        metadata={"help": "With --plan: load everything, train three steps, and say what the whole run will take."},
    )
    plan_config: str | None = field(default=None, metadata={"help": "With --plan: the accelerate YAML to plan for."})
    plan_processes: int | None = field(
        default=None, metadata={"help": "With --plan: cards to plan for; otherwise the YAML's num_processes."}
    )
    plan_memory_gib: float | None = field(
        default=None,
        metadata={"help": "With --plan: memory of a card, in GiB; otherwise that of the card here, if any."},
    )
    cache_dir: str = field(default="data/cache", metadata={"help": "Where tokenized data is kept and found again."})
    swanlab: str = field(
        default="auto",
        metadata={
            "help": "SwanLab: auto (online when logged in, otherwise offline), online, local, offline or off.",
            "choices": ["auto", "online", "local", "offline", "off"],
        },
    )

    def __post_init__(self):
        """Raise InputError for flags that would be ignored."""
        for name in ("plan_config", "plan_processes", "plan_memory_gib"):
            if getattr(self, name) is not None and (self.probe or not self.plan):
                why = "the probe runs as it is launched" if self.probe else "it would be ignored"
                raise InputError(f"--{name} {getattr(self, name)}: {why}. With --plan alone, or leave it out.")
