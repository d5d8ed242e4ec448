"""Near-duplicates, against the exact Jaccard similarity of sets of shingles that are made here in another way."""

import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from common.console import InputError
from common.corpus.near_duplicates import NearDuplicateCounts, bands_and_rows, shingle_hashes, without_near_duplicates
from common.system import usable_cores

datasketch = pytest.importorskip("datasketch")


def bundled(name: str) -> list[str]:
    lines = (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def exact_shingles(text: str) -> set[tuple[str, ...]]:
    """The same definition, one character or word at a time."""
    units = re.findall(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+", text.lower())
    return {tuple(units[i : i + 5]) for i in range(max(1, len(units) - 4))} if units else set()


def exact_similarity(one: str, other: str) -> float:
    a, b = exact_shingles(one), exact_shingles(other)
    return len(a & b) / len(a | b)


def edited(text: str, every: int, seed: int) -> str:
    """Exchange two neighbouring characters of ``text`` about once in ``every`` characters."""
    characters, generator = list(text), random.Random(seed)
    for _ in range(len(text) // every):
        i = generator.randrange(len(text) - 1)
        characters[i : i + 2] = characters[i + 1], characters[i]
    return "".join(characters)


def run(documents, tmp_path, threshold=0.8):
    counts = NearDuplicateCounts()
    kept = list(without_near_duplicates(documents, threshold, tmp_path / "report.jsonl", counts))
    lines = (tmp_path / "report.jsonl").read_text(encoding="utf-8").splitlines()
    return kept, [json.loads(line) for line in lines], counts


@pytest.mark.parametrize("name", ["sample_zh.jsonl", "sample_en.jsonl"])
def test_planted_near_duplicates_are_dropped_and_the_rest_stays_in_order(tmp_path, name):
    originals = bundled(name)[:80]
    every = 300 if "zh" in name else 900
    planted = {20: edited(originals[3], every, 1), 50: originals[40], 70: edited(originals[69], every, 2)}
    documents = []
    for i, text in enumerate(originals):
        documents += [text, planted[i]] if i in planted else [text]
    kept, report, counts = run(documents, tmp_path)
    assert kept == originals
    assert [(entry["index"], entry["kept_index"]) for entry in report] == [(21, 3), (52, 41), (73, 71)]
    for entry in report:
        text = documents[entry["index"]]
        truth = exact_similarity(text, documents[entry["kept_index"]])
        assert truth >= 0.8 and entry["similarity"] == pytest.approx(truth, abs=0.12)
        assert entry["bytes"] == len(text.encode()) and text.startswith(entry["beginning"])
    assert counts.documents == len(documents) == len(kept) + counts.removed and counts.removed == len(report)
    assert counts.removed_bytes == sum(len(text.encode()) for text in documents) - sum(len(t.encode()) for t in kept)
    assert (counts.threshold, counts.permutations, counts.bands) == (0.8, 128, 18)


def test_all_pairs_against_exact_similarity(tmp_path):
    """Of documents edited more and more, those well above the threshold are dropped, those well below are kept."""
    generator = random.Random(0)
    originals = bundled("sample_zh.jsonl")[:60]
    documents = originals + [edited(text, generator.choice([20, 60, 200, 800]), i) for i, text in enumerate(originals)]
    kept, report, _ = run(documents, tmp_path)
    removed = {entry["index"] for entry in report}
    above = below = 0
    for i in range(len(originals), len(documents)):
        truth = max(exact_similarity(documents[i], documents[j]) for j in range(i) if j not in removed)
        if truth > 0.9:  # three standard errors from the threshold
            above += 1
            assert i in removed, truth
        if truth < 0.7:
            below += 1
            assert i not in removed, truth
    assert above > 10 and below > 10
    assert removed.isdisjoint(range(len(originals)))
    assert kept == [text for i, text in enumerate(documents) if i not in removed]


@pytest.mark.parametrize(
    "text",
    [
        "The cat, the CAT sat\non  a mat again",
        "水是生命之源，水是生命之源。",
        "iPhone 15 在2023年发布 of Apple",
        "two words",
        "水",
        "Ⅷ 2024 ½",
    ],
)
def test_shingles_are_those_of_the_definition(text):
    others = ["一篇别的文章。", "another one", ""]
    alone, among = shingle_hashes([text])[0], shingle_hashes([others[0], text, *others[1:]])[1]
    assert len(set(alone.tolist())) == len(exact_shingles(text))
    np.testing.assert_array_equal(alone, among)  # the other texts do not change the shingles of a text


def test_shingles_depend_on_words_their_order_and_their_letters_only():
    def shingles(text):
        return shingle_hashes([text])[0].tolist()

    assert shingles("One two, three four: FIVE six!") == shingles("one  two three\nfour five six")
    assert shingles("one two three four five") != shingles("two one three four five")
    assert shingles("ab cd ef gh ij") != shingles("abc d ef gh ij") != shingles("ba cd ef gh ij")
    assert shingles("，。 \n\t!") == shingles("") == []
    assert set(shingles("天地玄黄宇宙洪荒")) & set(shingles("日月盈昃天地玄黄宇宙"))


def test_similarity_is_that_of_datasketch_with_hashes_given_one_by_one(tmp_path):
    documents = ["人" * 3 + text for text in bundled("sample_zh.jsonl")[:1]]
    documents.append(edited(documents[0], 200, 5))
    _, report, _ = run(documents, tmp_path, threshold=0.5)
    signatures = [datasketch.MinHash(num_perm=128, hashfunc=int) for _ in documents]
    for signature, hashes in zip(signatures, shingle_hashes(documents), strict=True):
        for one in hashes:
            signature.update(one)
    assert 0.5 < report[0]["similarity"] == round(signatures[0].jaccard(signatures[1]), 4) < 1


def test_candidates_are_those_of_datasketch_lsh():
    from common.corpus.near_duplicates import _SimilarityIndex

    bands, rows = bands_and_rows(0.5)
    reference, index = datasketch.MinHashLSH(num_perm=128, params=(bands, rows)), _SimilarityIndex(bands, rows)
    generator = np.random.default_rng(0)
    base = generator.integers(0, 2**32, 128, dtype=np.uint32)
    found = 0
    for position in range(300):  # all are somewhat similar: several documents share a band
        changed = generator.random(128) < generator.uniform(0.2, 0.9)
        signature = np.where(changed, generator.integers(0, 2**32, 128, dtype=np.uint32), base)
        minhash = datasketch.MinHash(hashvalues=signature, scheme="affine32")
        expected = reference.query(minhash)
        best, similarity = index.most_similar(signature)
        if expected:
            found += 1
            others = {i: float((np.frombuffer(index.signatures[i], np.uint32) == signature).mean()) for i in expected}
            assert similarity == max(others.values())
            assert best == min(i for i in others if others[i] == similarity)
        else:
            assert best is None and similarity == 0.0
        reference.insert(position, minhash)
        index.add(position, signature)
    assert found > 50


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_catch_a_pair_at_the_threshold(threshold):
    bands, rows = bands_and_rows(threshold)
    assert bands * rows <= 128
    agree = np.random.default_rng(1).random((4000, bands, rows)) < threshold
    assert agree.all(axis=2).any(axis=1).mean() > 0.94


def test_short_empty_and_long_documents(tmp_path, monkeypatch):
    from common.corpus import near_duplicates

    monkeypatch.setattr(near_duplicates, "PIECE_CHARACTERS", 1000)
    long = "".join(bundled("sample_zh.jsonl")[:20])
    documents = ["水", "……", "!?", "水。", "火", long, long + "终", "……", "a b", "A, b"]
    kept, report, counts = run(documents, tmp_path)
    assert kept == ["水", "……", "!?", "火", long, "……", "a b"]  # without letters: never a near-duplicate
    assert [(entry["index"], entry["kept_index"]) for entry in report] == [(3, 0), (6, 5), (9, 8)]
    assert counts.documents == 10


def test_streams_and_reports_as_it_goes(tmp_path, monkeypatch):
    from common.corpus import near_duplicates

    monkeypatch.setattr(near_duplicates, "GROUP_CHARACTERS", 1000)
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield f"文章{taken // 2}，" + "".join(chr(0x4E00 + (taken // 2 * 31 + i * 7) % 20000) for i in range(100))

    kept = without_near_duplicates(endless(), 0.9, tmp_path / "new" / "report.jsonl", NearDuplicateCounts())
    assert taken == 0
    for _ in range(200):
        next(kept)
    assert taken < 400 + 1000 * usable_cores()
    assert len((tmp_path / "new" / "report.jsonl").read_text(encoding="utf-8").splitlines()) >= 190


def test_no_documents(tmp_path):
    assert run([], tmp_path) == ([], [], NearDuplicateCounts(0, 0, 0, 0.8, 128, 18))


@pytest.mark.parametrize("threshold", [-1, 0, 0.49, 1.01, 80, float("nan")])
def test_bad_thresholds_are_refused_at_once(tmp_path, threshold):
    with pytest.raises(InputError, match=r"0\.5 and 1"):
        without_near_duplicates([], threshold, tmp_path / "report.jsonl", NearDuplicateCounts())
    assert not (tmp_path / "report.jsonl").exists()


def test_missing_package_names_the_command(tmp_path):
    code = (
        "import sys; sys.modules['datasketch'] = None\n"
        "from common.corpus.near_duplicates import NearDuplicateCounts, without_near_duplicates\n"
        f"without_near_duplicates([], 0.8, {str(tmp_path / 'report')!r}, NearDuplicateCounts())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and "pip install 'datasketch" in result.stderr and "Traceback" not in result.stderr
