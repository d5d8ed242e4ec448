"""The bundled articles are what data/README.md says they are."""

import json
from collections import Counter

import pytest
from conftest import ROOT


@pytest.mark.parametrize(("name", "articles", "size"), [("sample_zh", 240, 180_000), ("sample_en", 80, 80_000)])
def test_the_samples(name, articles, size):
    content = (ROOT / "data" / f"{name}.jsonl").read_bytes()
    documents = [json.loads(line) for line in content.splitlines()]
    assert len(documents) >= articles and len(content) >= size
    assert all(set(document) == {"title", "text"} for document in documents)
    assert len({document["title"] for document in documents}) == len(documents)
    # Varied, no filler: no two articles share a sentence-long run of text, here compared by their openings.
    assert len({document["text"][:12] for document in documents}) == len(documents)
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert f"{len(documents)} articles" in readme and f"{len(content):,} bytes" in readme


def test_the_dialogues():
    """A question and an answer, once or more, in the form that TRL reads; two thirds in Chinese."""
    content = (ROOT / "data" / "dialogues" / "train.jsonl").read_bytes()
    dialogues = [json.loads(line)["messages"] for line in content.splitlines()]
    chinese = sum(any("\u4e00" <= letter <= "\u9fff" for letter in dialogue[0]["content"]) for dialogue in dialogues)
    assert (len(dialogues), chinese) == (24, 16)
    for dialogue in dialogues:
        assert [message["role"] for message in dialogue] == ["user", "assistant"] * (len(dialogue) // 2)
        assert dialogue and all(message["content"].strip() for message in dialogue)
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert "24 short dialogues, 16 in Chinese and 8 in English" in readme and f"{len(content):,} bytes" in readme


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_minimal_pairs(language):
    """100 pairs, 20 of each kind, no pair twice; the two sentences differ, and the task reads this file."""
    path = f"data/tasks/minimal_pairs_{language}.jsonl"
    pairs = [json.loads(line) for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]
    assert Counter(Counter(pair["phenomenon"] for pair in pairs).values()) == {20: 5}
    sentences = {(pair["sentence_good"], pair["sentence_bad"]) for pair in pairs}
    assert len(sentences) == 100 and all(good != bad for good, bad in sentences)
    if language == "zh":  # of equal length: a longer sentence is less probable, whatever is in it
        assert all(len(good) == len(bad) for good, bad in sentences)
    assert path in (ROOT / path.replace(".jsonl", ".yaml")).read_text(encoding="utf-8")
