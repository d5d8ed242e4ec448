"""README.md of the final model: a Hugging Face model card, whose licence is left to whoever shares the model."""

import json
from pathlib import Path

CARD_FILE, MARK = (
    "README.md",
    "<!-- written by accelerate-pretraining-recipes; edit freely, remove this line to keep -->",
)


def write_card(folder: str | Path, recipe: str, results: dict, texts: list[str], command: str) -> None:
    """Write the card of the model in ``folder``; leave one alone that somebody has made their own (without our mark).

    Args:
        results: all_results.json.
        texts: in the language of the text trained on, by which it is guessed.
        command: that trained it.
    """
    path = Path(folder) / CARD_FILE
    if path.exists() and MARK not in path.read_text(encoding="utf-8"):
        return
    metrics = {"loss": "eval_loss", "perplexity": "eval_perplexity", "bits_per_byte": "eval_bits_per_byte"}
    language = language_of(texts)
    values = [(name, results[key]) for name, key in metrics.items() if key in results]
    sources = list(results["sources"])
    header = [
        "---",
        f"language: {language}  # guessed by its letters" if language else "# language: yours to say",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "# license: yours to choose; the data's licence may ask for one",
        "tags: [pretraining, accelerate]",
        "# datasets: yours to name, by their ids on the hub",
        f"metrics: {json.dumps([name for name, _ in values])}",
        "model-index:",
        f"- name: {json.dumps(Path(folder).resolve().name, ensure_ascii=False)}",
        "  results:",
        "  - task: {type: text-generation}",
        "    dataset: {name: held-out documents of the training data, type: held-out}",
        "    metrics:",
        *[f"    - {{type: {name}, value: {value:.6g}}}" for name, value in values],
        "---",
    ]
    rows = [f"| {name.replace('_', ' ')} | {value:,.4f} |" for name, value in values]
    body = f"""{MARK}

# {Path(folder).resolve().name}

A base language model: it continues text, and follows no instructions. Trained by `{recipe}` for
{results["steps"]:,} steps on {results["ledger"]["tokens_trained"]:,} tokens of {", ".join(sources)}.

| on held-out documents | |
|---|---|
{chr(10).join(rows)}

```python
from transformers import pipeline

print(pipeline("text-generation", ".")("..."))
```

It was trained by this command; `report.html` has curves, ledger and environment:

```
{command.replace("```", "'''")}
```

What the data contains, the model may repeat: names, errors, prejudices. Nothing was done against it.
"""
    path.write_text("\n".join(header) + "\n" + body, encoding="utf-8")


def language_of(texts: list[str]) -> str | None:
    """Guess zh, ja or en by the letters: Han without kana, with kana, or nearly all ASCII; None for all others."""
    letters = [ord(letter) for text in texts for letter in text if letter.isalpha()]
    han = sum(0x4E00 <= letter < 0xA000 for letter in letters)
    kana = sum(0x3040 <= letter < 0x3100 for letter in letters)
    if letters and han + kana >= len(letters) / 10:
        return "ja" if kana > han / 20 else "zh"
    return "en" if letters and sum(letter < 128 for letter in letters) > 0.97 * len(letters) else None
