"""The bundled articles are what data/README.md says they are."""

import json

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
