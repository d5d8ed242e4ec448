"""The proof that tiktoken gives a tokenizer's ids: found again, and made again where it does not hold."""

import json

import numpy as np
import pytest
from test_encoding import AWKWARD_TEXTS, documents, edited, reference, split, trained, with_pre_tokenizer, wrapped

from common.tokens import encoding, proofs
from common.tokens.encoding import encoder_of
from common.tokens.proofs import place_of_proof, read_proof


def forbidden(*_):
    raise AssertionError("found out a second time")


@pytest.fixture
def once(monkeypatch):
    """Return a function after which nothing may be found out about a tokenizer again."""

    def forbid():
        monkeypatch.setattr(encoding, "find_facts", forbidden)
        monkeypatch.setattr(encoding, "try_awkward_texts", forbidden)

    return forbid


@pytest.mark.parametrize("kind", ["qwen2", "llama3", "gpt2"])
def test_a_tokenizer_seen_before_has_the_same_ids_and_nothing_is_found_out_again(kind, tmp_path, once):
    texts = [*documents("zh")[:40], *documents("en")[:40], *AWKWARD_TEXTS, "", "<|endoftext|> in text"]
    first = encoder_of(wrapped(trained(kind)), tmp_path)
    assert "awkward texts tried at start" in first.note
    once()
    second = encoder_of(wrapped(trained(kind)), tmp_path)
    assert second.name == "tiktoken" and "awkward texts tried before" in second.note
    expected = reference(trained(kind), *texts)
    assert [ids.tolist() for ids in first.encode(texts)] == expected
    assert [ids.tolist() for ids in second.encode(texts)] == expected
    assert second.encode(texts)[0].dtype == np.uint32
    [kept] = (tmp_path / "tokenizer_proofs").glob("*.npz")
    assert {file.name for file in kept.parent.iterdir()} == {kept.name, "CACHEDIR.TAG"}


def test_what_tiktoken_cannot_do_is_known_the_second_time_too(tmp_path, once):
    tokenizer = wrapped(with_pre_tokenizer(split(r"\p{L}+|\s+")))
    note = encoder_of(tokenizer, tmp_path).note
    once()
    again = encoder_of(tokenizer, tmp_path)
    assert again.name == "tokenizers" and again.note == note and "leaves some characters out" in note
    assert [ids.tolist() for ids in again.encode(["a b 1"])] == reference(
        with_pre_tokenizer(split(r"\p{L}+|\s+")), "a b 1"
    )


def test_another_tokenizer_version_or_code_is_found_out_anew(tmp_path, monkeypatch):
    qwen2 = trained("qwen2").to_str()
    place = place_of_proof(tmp_path, qwen2, "<|endoftext|>")
    changed = json.loads(qwen2)
    changed["model"]["merges"] = changed["model"]["merges"][:-1]
    assert place_of_proof(tmp_path, json.dumps(changed), "<|endoftext|>") != place
    assert place_of_proof(tmp_path, edited(trained("qwen2"), normalizer=None).to_str(), "<|endoftext|>") != place
    assert place_of_proof(tmp_path, qwen2, "a") != place
    assert place_of_proof(tmp_path, qwen2, "<|endoftext|>") == place
    monkeypatch.setattr(proofs, "version", lambda name: "9.9" if name == "tokenizers" else "1")
    other = place_of_proof(tmp_path, qwen2, "<|endoftext|>")
    assert other != place
    monkeypatch.setattr(proofs, "CODE", proofs.CODE[:-1])
    assert place_of_proof(tmp_path, qwen2, "<|endoftext|>") not in (place, other)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "another", "folder"])
def test_a_damaged_proof_is_made_again(damage, tmp_path):
    tokenizer = wrapped(trained("qwen2"))
    first = encoder_of(tokenizer, tmp_path)
    [kept] = (tmp_path / "tokenizer_proofs").glob("*.npz")
    content = kept.read_bytes()
    middle = len(content) // 2
    kept.unlink()
    if damage == "folder":
        kept.mkdir()
    elif damage == "another":
        np.savez(kept, reason=np.array(""), tried=np.array(1))
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        kept.write_bytes({"empty": b"", "cut": content[:middle], "flipped": flipped}[damage])
    assert read_proof(kept) is None
    again = encoder_of(tokenizer, tmp_path)
    assert "tried at start" in again.note
    assert [ids.tolist() for ids in again.encode(AWKWARD_TEXTS)] == [
        ids.tolist() for ids in first.encode(AWKWARD_TEXTS)
    ]
    assert damage == "folder" or read_proof(kept).tried > 5_000


def test_a_disk_that_takes_no_proof_is_no_reason_to_stop(tmp_path):
    (tmp_path / "file").write_text("in the way")
    encoder = encoder_of(wrapped(trained("qwen2")), tmp_path / "file")
    assert encoder.name == "tiktoken"


def test_without_a_cache_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder_of(wrapped(trained("qwen2")))
    assert not list(tmp_path.iterdir())
