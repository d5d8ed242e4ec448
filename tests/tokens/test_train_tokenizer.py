"""Training a tokenizer: the sample, the round trip and the report, compared with independent results."""

import json
import random
import unicodedata

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from common.arguments import SharedArguments
from common.console import InputError
from common.corpus.sources import resolve_sources
from common.corpus.splits import content_hash, held_out_below, split_in_order
from common.tokens.train_tokenizer import (
    END_TOKEN,
    SAMPLE_BYTES,
    sample_of,
    tokenizer_report,
    train_tokenizer,
    training_sample,
)


def bundled(name: str) -> list[str]:
    lines = (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


CHINESE, ENGLISH = bundled("sample_zh.jsonl"), bundled("sample_en.jsonl")


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(CHINESE, 2_000)


def numbered(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [f"document {i}: " + "x" * generator.randrange(100) for i in range(count)]


def test_sample_is_the_lowest_hashes_that_fit_whatever_the_order():
    documents = numbered(1000)
    sample, counts = sample_of(iter(documents), 20_000)
    ranked, expected, total = sorted(documents, key=lambda text: content_hash(text.encode())), [], 0
    for text in ranked:
        if total + len(text.encode()) > 20_000:
            break
        expected.append(text)
        total += len(text.encode())
    assert sample == expected and 19_000 < total <= 20_000
    source_bytes = sum(len(text.encode()) for text in documents)
    assert counts == {
        "documents": 1000,
        "bytes": source_bytes,
        "sampled_documents": len(expected),
        "sampled_bytes": total,
        "cut": 0,
    }
    random.Random(1).shuffle(documents)
    assert sample_of(documents, 20_000) == (sample, counts)


def test_sample_takes_every_document_with_the_same_probability():
    """Over 300 sources, the share taken does not depend on a document's place, and hardly on its size."""
    taken_place, taken_long = [0] * 10, 0
    for seed in range(300):
        documents = [f"{seed} {place} " + "y" * (80 if place % 2 else 10) for place in range(200)]
        chosen = set(sample_of(documents, 20_000 // 2)[0])
        for place, text in enumerate(documents):
            if text in chosen:
                taken_place[place // 20] += 1
                taken_long += place % 2
    mean = sum(taken_place) / 10
    assert mean > 0 and all(abs(count - mean) < 0.05 * mean for count in taken_place)
    assert abs(taken_long / sum(taken_place) - 0.5) < 0.01


def test_sample_holds_no_more_than_its_limit_in_memory():
    import tracemalloc

    def large_source():
        for i in range(20_000):
            yield f"{i} " + "z" * 5_000  # 100 MB

    tracemalloc.start()
    sample, counts = sample_of(large_source(), 1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts["bytes"] > 100e6 and 0.98e6 < counts["sampled_bytes"] <= 1e6 and peak < 4e6


def test_a_source_that_fits_is_the_sample_and_copies_count_once():
    sample, counts = sample_of(CHINESE + CHINESE[:50], SAMPLE_BYTES)
    assert sorted(sample) == sorted(CHINESE)
    assert counts["documents"] == len(CHINESE) + 50 and counts["sampled_documents"] == len(CHINESE)
    assert counts["sampled_bytes"] == sum(len(text.encode()) for text in CHINESE)


def test_a_long_document_gives_its_beginning_in_whole_characters(capsys):
    book = "长" * 100_000
    sample, counts = sample_of([*CHINESE, book], 100_000)
    taken = [text for text in sample if text.startswith("长长长")]
    assert all(text == "长" * 333 for text in taken) and all(len(text.encode()) <= 1000 for text in sample)
    assert counts["cut"] == sum(text not in CHINESE for text in sample) > 0
    assert f"{counts['cut']} cut to their first 1,000 bytes" in capsys.readouterr().out
    assert sample_of([book], SAMPLE_BYTES)[0] == ["长" * 100_000]


def test_held_out_documents_are_not_in_the_sample():
    limit = held_out_below(0.2)
    held_out = {text for text in CHINESE if content_hash(text.encode()) < limit}
    sample, _ = sample_of((text for text in CHINESE if content_hash(text.encode()) >= limit), SAMPLE_BYTES)
    assert held_out and held_out.isdisjoint(sample) and held_out | set(sample) == set(CHINESE)


@pytest.mark.parametrize("split", ["1,1", "2,1,1"])
def test_documents_held_out_by_order_are_not_in_the_sample(tmp_path, split):
    """Nor are test documents of any source, nor a copy of either among the training documents."""
    files = {"a": [*CHINESE[:40], CHINESE[3]], "b": [CHINESE[30], *CHINESE[40:61]]}
    for name, texts in files.items():
        lines = [json.dumps({"text": text}) for text in ["", *texts]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    sources = resolve_sources([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    sample = training_sample(sources, SharedArguments(split=split))
    texts = files["a"] + files["b"]
    hashes = np.array([content_hash(text.encode()) for text in texts], np.uint64)
    rows = split_in_order([41, 22], hashes, split).train  # what the rows train on
    assert sorted(sample) == sorted(text for text, trains in zip(texts, rows, strict=True) if trains)
    assert len(sample) in (30, 31) and CHINESE[30] not in sample


@pytest.mark.parametrize("limit_bytes", [99, 0, -5])
def test_a_sample_of_nothing_is_refused(limit_bytes):
    with pytest.raises(InputError, match="at least 100"):
        sample_of(CHINESE, limit_bytes)


def test_no_document_is_refused():
    with pytest.raises(InputError, match="no document"):
        sample_of([], SAMPLE_BYTES)


@given(st.text() | st.text(alphabet="地球的引力 \n\t,。aé1２　\u200b\U0001f600\u0301'sTll"))
def test_any_text_comes_back_after_nfc(trained, text):
    ids = trained.encode(text, add_special_tokens=False)
    assert trained.decode(ids, clean_up_tokenization_spaces=False) == unicodedata.normalize("NFC", text)
    if END_TOKEN not in text:
        assert trained.eos_token_id not in ids


def test_vocabulary(trained, capsys):
    assert len(trained) == 2_000 and trained.eos_token == END_TOKEN and trained.eos_token_id == 0
    small = train_tokenizer(["ab ab ab ab ab cd cd cd cd"], 1_000)  # ab occurs 5 times, cd and the pairs with a space 4
    assert {token for token in small.get_vocab() if len(token) > 1} == {END_TOKEN, "ab"} and len(small) == 258
    assert f"{len(small)} tokens, not 1,000: no other pair of tokens occurs 5 times" in capsys.readouterr().out
    assert len(train_tokenizer(["水"], 257)) == 257
    with pytest.raises(InputError, match="at least 257"):
        train_tokenizer(CHINESE, 256)


def test_first_merge_is_the_most_frequent_pair():
    tokenizer = train_tokenizer(["ab ab ab ab ab cd", "xy"], 258)
    assert tokenizer.convert_ids_to_tokens(257) == "ab"


def test_same_texts_same_tokenizer_in_any_order(trained):
    shuffled = CHINESE.copy()
    random.Random(0).shuffle(shuffled)
    again = train_tokenizer(shuffled, 2_000)
    assert json.loads(again.backend_tokenizer.to_str()) == json.loads(trained.backend_tokenizer.to_str())


def test_saved_and_loaded_it_is_the_same(trained, tmp_path):
    from common.tokens.tokenizer import load_tokenizer, tokenizer_fingerprint

    trained.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(trained)
    assert loaded(CHINESE[0])["input_ids"] == trained(CHINESE[0])["input_ids"]


def test_report(trained):
    bytes_only = train_tokenizer(["水"], 257)
    held_out = ["天地 abc", "水\n"]
    report = tokenizer_report(trained, iter(held_out), 64, bytes_only)
    assert report["held_out_bytes"] == 14
    tokens = sum(len(trained.encode(text, add_special_tokens=False)) for text in held_out)
    assert report["bytes_per_token"] == pytest.approx(14 / tokens, abs=1e-4)
    assert report["reference_bytes_per_token"] == 1.0  # one token a byte
    assert (report["vocabulary_size"], report["embedding_rows"]) == (2_000, 2_048)  # 16 x 128
    assert (report["reference_vocabulary_size"], report["reference_embedding_rows"]) == (257, 384)
    assert report["embedding_parameters"] == 2_048 * 64 and report["reference_embedding_parameters"] == 384 * 64
    assert report["embedding_parameters_saved"] == (384 - 2_048) * 64
    json.dumps(report)
    alone = tokenizer_report(trained, held_out, 64)
    assert alone == {name: value for name, value in report.items() if name in alone} and "reference" not in str(alone)


def test_report_counts_the_rows_of_the_model(trained):
    from common.model.from_config import model_from_config

    shape = dict(model_type="qwen2", hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = model_from_config(shape | dict(num_key_value_heads=1), trained, 32)
    report = tokenizer_report(trained, CHINESE[:2], 64)
    assert model.get_input_embeddings().weight.numel() == report["embedding_parameters"]


def test_trained_for_its_language_it_needs_fewer_tokens(trained):
    english = train_tokenizer(ENGLISH, 2_000)
    report = tokenizer_report(trained, CHINESE[:20], 64, english)
    assert report["bytes_per_token"] > 1.5 * report["reference_bytes_per_token"]


def test_report_without_text_is_refused(trained):
    with pytest.raises(InputError, match="no held-out text"):
        tokenizer_report(trained, [], 64)
