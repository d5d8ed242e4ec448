"""Corpora with a name: where they are, and reading the first tokens of one from a hub that is on this machine."""

import json

import numpy as np
import pytest
from stand_in import be_impatient, running, use_hubs

import common.tokens.writer as token_writer
from common.arguments import SharedArguments
from common.console import InputError
from common.corpus.corpora import CORPORA, Corpus, listing, on_modelscope
from common.corpus.sources import resolve_source, resolve_sources
from common.dataset.rows import build_rows
from common.hub import DATA_SET_ID
from common.tokens import batches
from common.tokens.train_tokenizer import tokenizer_trained_on
from common.tokens.writer import tokenize
from data.prepare import main as prepare

FILES = {
    f"data/{name}.jsonl": "".join(
        json.dumps({"text": f"{name} {number}: " + "water " * (number % 50), "score": 1}) + "\n"
        for number in range(600)
    ).encode()
    for name in ("a", "b", "c")
}
TEXTS = [json.loads(line)["text"] for content in FILES.values() for line in content.splitlines()]


@pytest.fixture(params=["ModelScope", "Hugging Face"])
def hub(request, monkeypatch):
    """One hub with FILES, which has the corpus "small"; on the other hub it would have another name."""
    be_impatient(monkeypatch)
    on_other = {"ModelScope": ("elsewhere/name", "owner/name"), "Hugging Face": ("owner/name", "elsewhere/name")}
    identifier, modelscope = on_other[request.param]
    small = Corpus("a small corpus", "CC0", identifier=identifier, modelscope=modelscope)
    monkeypatch.setitem(CORPORA, "small", small)
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 2_000)
    monkeypatch.setattr(token_writer, "usable_cores", lambda: 2)
    with running(request.param, dict(FILES)) as server:
        use_hubs(monkeypatch, **{request.param.lower().replace(" ", "_"): server.url})
        yield server


def test_every_corpus_says_what_it_is_and_where(capsys):
    prepare(["corpora"])
    said = capsys.readouterr().out
    assert said.strip() == listing()
    for name, corpus in CORPORA.items():
        assert name in said and corpus.about in said and corpus.licence in said
        assert bool(corpus.urls) != bool(DATA_SET_ID.fullmatch(corpus.identifier))
    assert on_modelscope("HuggingFaceFW/fineweb-edu") == "AI-ModelScope/fineweb-edu" in said
    assert on_modelscope("jingyaogong/minimind_dataset") == "gongjy/minimind_dataset" in said
    assert on_modelscope("Skylion007/openwebtext") == "Skylion007/openwebtext"
    assert on_modelscope("") == ""  # of a corpus that is not on a hub


def test_a_name_is_a_source(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = resolve_source("fineweb-edu-zh")
    assert (source.name, source.hub_id) == ("fineweb-edu-zh", "opencsg/chinese-fineweb-edu-v2")
    assert "Licence: Apache-2.0 and OpenCSG" in capsys.readouterr().out
    with pytest.raises(InputError, match="fineweb-edo: no such file.*or one of wiki-zh,.* fineweb-edu, fineweb-edu-zh"):
        resolve_source("fineweb-edo")
    with pytest.raises(InputError, match="Skywork/SkyPile-150B: is given twice"):
        resolve_sources(["skypile", "Skywork/SkyPile-150B"])
    with pytest.raises(InputError, match="openwebtext-100k: .*prepare.py download openwebtext-100k --output data"):
        resolve_source("openwebtext-100k")
    (tmp_path / "skypile").mkdir()
    (tmp_path / "skypile" / "mine.jsonl").write_text('{"text": "x"}\n')
    assert resolve_source("skypile").files  # what lies here comes first
    assert "skypile: read from the file or folder of this name here, not from the corpus" in capsys.readouterr().out


def test_the_first_tokens_are_read_and_the_files_after_them_not(hub, tmp_path):
    """Trained tokenizer, tokens, rows: all of the first documents, the same ones each time; the ledger is exact."""

    def run(cache: str):
        shared = SharedArguments(
            cache_dir=str(tmp_path / cache), tokenizer="train", vocabulary_size=300, context_length=16,
            max_data_tokens="3K", held_out_fraction=0.1,
        )  # fmt: skip
        [source] = resolve_sources(["small"])
        tokenizer = tokenizer_trained_on([source], shared)
        store = tokenize(source, tokenizer, shared)
        return tokenizer, store, build_rows({"small": store}, shared)

    tokenizer, store, rows = run("one")
    assert {name for name, _ in hub.asked} == {"data/a.jsonl"}
    sizes = np.cumsum([len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS])
    fitting = int((sizes <= 3_000).sum())
    assert (store.documents, len(store.tokens)) == (fitting, sizes[fitting - 1]) and 0 < fitting < 300
    ledger = rows.ledgers["small"]
    assert (ledger.documents, ledger.tokens_read) == (fitting, sizes[fitting - 1])
    assert ledger.bytes_read == sum(len(text.encode()) for text in TEXTS[:fitting])
    assert ledger.documents_after_limit > 0 and "after --max_data_tokens left out" in str(ledger)
    again = run("two")
    assert again[2].fingerprints == rows.fingerprints and again[2].ledgers == rows.ledgers
    hub.asked.clear()
    assert run("one")[1].prefix == store.prefix and not hub.asked


def test_a_limit_beyond_the_first_file_reads_on(hub, tmp_path):
    shared = SharedArguments(cache_dir=str(tmp_path), tokenizer="train", vocabulary_size=300, max_data_tokens="30K")
    [source] = resolve_sources(["small"])
    store = tokenize(source, tokenizer_trained_on([source], shared), shared)
    assert 600 < store.documents < 1_200
    assert {name for name, _ in hub.asked} == {"data/a.jsonl", "data/b.jsonl"}


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5T", "", "0.1"])
def test_limits_that_are_refused(text):
    with pytest.raises(InputError, match="--max_data_tokens"):
        SharedArguments(max_data_tokens=text)
    assert SharedArguments(max_data_tokens="1.5b").max_data_tokens == 1_500_000_000
