"""README.md of the final model: a Hugging Face model card. Whoever shares the model chooses its licence."""

import math
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

CARD_FILE = "README.md"
MARK = "<!-- written by accelerate-pretraining-recipes; edit freely, remove this line to keep -->"
METRICS = {"loss": "eval_loss", "perplexity": "eval_perplexity", "bits_per_byte": "eval_bits_per_byte"}
# ModelCardData writes no comments, so these lines are added after what it writes.
TO_FILL_IN = """\
# license: choose one; the licence of the data may require a certain one
# datasets: add their ids on the hub"""
BODY = """\
{mark}

# {name}

This is a base language model: it continues text and does not follow instructions. `{recipe}` trained it for
{steps:,} steps on {tokens:,} tokens of {sources}.{branch}

| on held-out documents | |
|---|---|
{rows}

```python
from transformers import pipeline

print(pipeline("text-generation", ".")("..."))
```

This command trained it. `report.html` has the curves, the ledger and the environment:

```
{command}
```

The model may repeat what its data contains: names, errors, prejudices. Nothing was done to prevent this.
"""


def write_card(folder: str | Path, recipe: str, results: dict, texts: list[str], command: str) -> None:
    """Write the card of the model in ``folder``, unless somebody has removed our mark from the card that is there.

    Args:
        recipe: the file name of the recipe.
        results: the content of all_results.json.
        texts: some text in the language of the training data; the card's language is guessed from it.
        command: the command that trained the model.
    """
    path = Path(folder) / CARD_FILE
    if path.exists() and MARK not in path.read_text(encoding="utf-8"):
        return
    name = Path(folder).resolve().name
    values = {metric: results[key] for metric, key in METRICS.items() if key in results}
    language = language_of(texts)
    if language is None:
        note = "# language: its two-letter code, such as fr"
    else:
        note = f"# language: {language} is a guess from the letters of the prompts. Correct it if it is wrong."
    body = BODY.format(
        mark=MARK,
        name=name,
        recipe=recipe,
        steps=results["steps"],
        tokens=results["ledger"]["tokens_trained"],
        sources=", ".join(results["sources"]),
        rows="\n".join(f"| {metric.replace('_', ' ')} | {value:,.4f} |" for metric, value in values.items()),
        branch=_branch(results.get("branch")),
        command=command.replace("```", "'''"),  # the fence of the code block around it
    )
    header = card_data(name, language, values).to_yaml()
    path.write_text(f"---\n{header}\n{note}\n{TO_FILL_IN}\n---\n{body}", encoding="utf-8")


def _branch(branch: dict | None) -> str:
    """Return where the run has left another one, as a paragraph of the card; "" if it has not."""
    if branch is None:
        return ""
    text = f"\n\nIt is a branch: its first {branch['step']:,} steps are those of `{branch['checkpoint']}`"
    if branch["tokens_elsewhere"]:
        text += f", {branch['tokens_elsewhere']:,} tokens of which are not counted above"
    changed = "".join(f"\n- {name}: `{old}` -> `{new}`" for name, (old, new) in branch["changed"].items())
    return f"{text}. What differs after them:\n{changed}" if changed else f"{text}. Nothing differs after them."


def card_data(name: str, language: str | None, values: dict[str, float]) -> ModelCardData:
    """Return the card's metadata; ``values``: metric -> its value on the held-out documents."""
    # JSON, in which the hub keeps the metadata, has no NaN and no infinity.
    known = {metric: float(f"{value:.6g}") for metric, value in values.items() if math.isfinite(value)}
    evaluations = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name="held-out documents of the training data",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in known.items()
    ]
    data = ModelCardData(
        language=language,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pretraining", "accelerate"],
    )
    if evaluations:
        data.metrics = list(known)
        data.model_name = name
        data.eval_results = evaluations
    return data


def language_of(texts: list[str]) -> str | None:
    """Guess the language of ``texts`` from their letters; None if it is not one of the three that can be told.

    "ja" or "zh" if at least a tenth of the letters are Han or kana, with or without kana; "en" if nearly all are ASCII.
    """
    letters = [ord(letter) for text in texts for letter in text if letter.isalpha()]
    if not letters:
        return None
    han = sum(0x4E00 <= letter < 0xA000 for letter in letters)
    kana = sum(0x3040 <= letter < 0x3100 for letter in letters)
    if han + kana >= len(letters) / 10:
        return "ja" if kana > han / 20 else "zh"
    ascii_letters = sum(letter < 128 for letter in letters)
    return "en" if ascii_letters > 0.97 * len(letters) else None
