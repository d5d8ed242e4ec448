"""The flags that every recipe shares. A recipe's DATA and TRAINING dicts set their defaults."""

from dataclasses import dataclass, field


@dataclass
class SharedArguments:
    """Flags beside ``transformers.TrainingArguments``."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "Documents to train on: a .json, .jsonl (also .gz, .zst), .txt or .parquet file, a token store "
            "(its .bin file), or a Hugging Face data set id."
        },
    )
    text_field: str = field(default="text", metadata={"help": "Name of the field that holds a document's text."})
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
    max_eval_rows: int | None = field(
        default=None, metadata={"help": "Evaluate on the first N held-out rows only (said in the results)."}
    )
    cache_dir: str = field(default="data/cache", metadata={"help": "Where tokenized data is kept and found again."})
    swanlab: str = field(
        default="auto",
        metadata={
            "help": "SwanLab: auto (online when logged in, otherwise offline), online, local, offline or off.",
            "choices": ["auto", "online", "local", "offline", "off"],
        },
    )
