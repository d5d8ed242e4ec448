"""Tokenizers: what they do to text, and which ones are refused."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from common.arguments import SharedArguments
from common.console import InputError
from common.corpus.sources import resolve_source
from common.corpus.splits import content_hash
from common.tokens.encoding import encoder_of
from common.tokens.tokenizer import load_tokenizer, tokenizer_fingerprint
from common.tokens.train_tokenizer import END_TOKEN, tokenizer_trained_on, train_tokenizer

TEXTS = [
    "the quick brown fox jumps over the lazy dog " * 5,
    "今天天气很好,今天天气不好。" * 5,
    "in 1999 it was 1999 " * 5,
]


def encode_batch(tokenizer, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in encoder_of(tokenizer).encode(texts)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A fresh folder of the tokenizer for each test, which may change it."""
    tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def edit(folder, name: str, **changes) -> None:
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps(content | changes), encoding="utf-8")


def without_end_token(folder):
    """Remove the eos and pad tokens from the saved configuration."""
    edit(folder, "tokenizer_config.json", eos_token=None, pad_token=None)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer, text):
    """The decoded text equals the text after NFC normalisation, as with Qwen2's tokenizer."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert (0 in ids) == (END_TOKEN in text)


@pytest.mark.parametrize("text", ["e\u0301", "\ufb01 \u2126", "a\r\n\n  b\t", " 's", "a , b ?", "\u0000", "👩‍👩‍👧"])
def test_awkward_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("the quick  fox", ["the", " quick", " ", " fox"]),
        ("in 1999,", ["in", " ", "1", "9", "9", "9", ","]),
        ("x2y½", ["x", "2", "y", "½"]),
        ("I'll WE'RE don't", ["I", "'ll", " WE", "'RE", " don", "'t"]),
        ("今天,天气。好", ["今天", ",天气", "。好"]),
        ("f(x) == 0.5;\n\n  end", ["f", "(x", ")", " ==", " ", "0", ".", "5", ";\n\n", " ", " end"]),
        ("a\n \n b  ", ["a", "\n \n", " b", "  "]),
        ("\t\tx", ["\t", "\tx"]),
        (' -- "no"!?\r\n', [" --", ' "', "no", '"!?\r\n']),
    ],
)
def test_pre_tokenization_is_qwen2s(tokenizer, text, pieces):
    """Worked out by hand from the pattern in Qwen2's tokenizer.json."""
    found = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[begin:end] for _, (begin, end) in found] == pieces


def test_digits_are_single_tokens_however_often_they_meet(tokenizer):
    assert tokenizer.tokenize("1999") == ["1", "9", "9", "9"]
    multiple = [token for token in tokenizer.get_vocab() if sum(c.isdigit() for c in token) and len(token) > 1]
    assert multiple == []


def test_the_vocabulary(tokenizer):
    assert tokenizer.convert_ids_to_tokens(0) == tokenizer.eos_token == END_TOKEN
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert 257 < len(tokenizer) <= 400
    assert len(train_tokenizer(TEXTS, 257)) == 257
    assert len(train_tokenizer([], 400)) == 257
    assert len(tokenizer.encode("the quick")) == 2  # merges were learned
    with pytest.raises(InputError, match="--vocabulary_size 256: .* at least 257"):
        train_tokenizer(TEXTS, 256)


def test_saved_and_loaded_it_is_the_same(tokenizer, folder):
    loaded = load_tokenizer(str(folder))
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.eos_token_id == loaded.pad_token_id == 0


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gpt2"])
def test_it_is_the_same_beside_the_config_of_any_model(tokenizer, tmp_path, family):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    loaded = load_tokenizer(str(tmp_path))
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert loaded.eos_token_id == loaded.pad_token_id == 0
    by_anyone = AutoTokenizer.from_pretrained(str(tmp_path))
    assert [by_anyone(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_the_fingerprint_changes_with_the_ids_and_not_with_use(tokenizer, folder):
    loaded = load_tokenizer(str(folder))
    before = tokenizer_fingerprint(loaded)
    loaded(TEXTS, truncation=True, max_length=3, padding="max_length")
    assert tokenizer_fingerprint(loaded) == before
    assert tokenizer_fingerprint(load_tokenizer(str(folder), end_token="a")) != before
    assert tokenizer_fingerprint(train_tokenizer(TEXTS, 300)) != before
    loaded.add_tokens(["quick brown"])
    assert tokenizer_fingerprint(loaded) != before


def test_no_end_token_is_refused_and_can_be_named(folder):
    without_end_token(folder)
    with pytest.raises(InputError, match=f"tokenizer {folder} has no end-of-document token.*--end_token"):
        load_tokenizer(str(folder))
    with pytest.raises(InputError, match=f"--end_token '</s>' is not in the vocabulary of {folder}"):
        load_tokenizer(str(folder), end_token="</s>")
    loaded = load_tokenizer(str(folder), end_token=END_TOKEN)
    assert (loaded.eos_token, loaded.eos_token_id, loaded.pad_token_id) == (END_TOKEN, 0, 0)


def test_an_end_token_is_never_added_to_the_vocabulary(folder):
    size = len(load_tokenizer(str(folder)))
    with pytest.raises(InputError, match="not in the vocabulary"):
        load_tokenizer(str(folder), end_token="<|new|>")
    assert len(load_tokenizer(str(folder), end_token="a")) == size


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"README.md": "nothing"},
        {"tokenizer_config.json": "{}"},
        {"tokenizer_config.json": "[]"},
        {"tokenizer_config.json": "{}", "tokenizer.json": '{"cut'},
        {"tokenizer_config.json": "{}", "tokenizer.json": '{"added_tokens": [], "model": {"type": "no such"}}'},
    ],
)
def test_a_folder_without_a_tokenizer_is_one_clear_error(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"^{tmp_path}: no tokenizer that transformers can load") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_batch_is_the_texts_one_by_one(tokenizer):
    texts = [*TEXTS, "", " ", "a\n", "e\u0301 👩‍👩‍👧"]
    one_by_one = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert encode_batch(tokenizer, texts) == one_by_one


def test_no_text_forges_the_end_of_a_document(tokenizer):
    text = f"an {END_TOKEN} inside"
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]  # what transformers does
    [ids] = encode_batch(tokenizer, [text])
    assert tokenizer.eos_token_id not in ids and tokenizer.decode(ids) == text


def test_no_text_is_cut_short_or_filled_up(tokenizer, folder):
    """Some published tokenizer.json files ask for truncation and padding."""
    edit(
        folder,
        "tokenizer.json",
        truncation={"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        padding=dict(strategy={"Fixed": 8}, direction="Right", pad_to_multiple_of=None, pad_id=0)
        | dict(pad_type_id=0, pad_token=END_TOKEN),
    )
    loaded = load_tokenizer(str(folder))
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ["a", *TEXTS]]
    assert encode_batch(loaded, ["a", *TEXTS]) == expected
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)


def test_special_tokens_are_not_added(tokenizer, folder):
    """For example, Llama's tokenizer puts a token before each text."""
    edit(
        folder,
        "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": END_TOKEN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {END_TOKEN: {"id": END_TOKEN, "ids": [0], "tokens": [END_TOKEN]}},
        },
    )
    loaded = load_tokenizer(str(folder))
    assert loaded(TEXTS[0])["input_ids"][0] == 0
    assert encode_batch(loaded, TEXTS) == encode_batch(tokenizer, TEXTS)


def test_a_trained_tokenizer_never_sees_held_out_documents(tmp_path):
    """Each document repeats a word of its own, which becomes a token exactly if the tokenizer saw the document."""
    words = [f"{a}{b}{c}{a}" for a in "bdfg" for b in "aeiou" for c in "klmnp"]
    texts = {word: f" {word}" * 50 for word in words}
    data = tmp_path / "words.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.values()))
    held_out = {word for word, text in texts.items() if content_hash(text.encode()) < 2**64 * 0.3}
    assert 10 < len(held_out) < 60

    arguments = SharedArguments(vocabulary_size=2000, held_out_fraction=0.3, cache_dir=str(tmp_path / "cache"))
    vocabulary = tokenizer_trained_on([resolve_source(str(data))], arguments).get_vocab()
    assert {word for word in words if f"Ġ{word}" in vocabulary} == set(words) - held_out


def test_of_a_single_document_the_tail_is_not_seen(tmp_path):
    """Each tenth of the document repeats a word of its own, which becomes a token exactly if the tokenizer saw it."""
    words = [f"{a}ak{a}" for a in "bdfghjlmnp"]
    text = "".join(f" {word}" * 50 for word in words)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": text}) + "\n")
    arguments = SharedArguments(vocabulary_size=2000, held_out_fraction=0.1, cache_dir=str(tmp_path / "cache"))
    vocabulary = tokenizer_trained_on([resolve_source(str(tmp_path / "a.jsonl"))], arguments).get_vocab()
    seen = [word for word in words if f"Ġ{word}" in vocabulary]
    assert seen == words[:8]  # the last tenth is held out; as much again is left out, because tokens differ in length


def test_a_held_out_document_is_not_seen_in_another_normalisation(tmp_path):
    import unicodedata

    words = [f"{a}é{b}é{a}" for a in "bdfgklm" for b in "npqrst"]
    texts = [f" {word}" * 50 for word in words]
    held_out = [word for word, text in zip(words, texts, strict=True) if content_hash(text.encode()) < 2**64 * 0.3]
    decomposed = [unicodedata.normalize("NFD", text) for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts + decomposed))
    arguments = SharedArguments(vocabulary_size=2000, held_out_fraction=0.3, cache_dir=str(tmp_path / "cache"))
    tokenizer = tokenizer_trained_on([resolve_source(str(tmp_path / "a.jsonl"))], arguments)
    assert len(held_out) > 5
    assert all(len(tokenizer(f" {word}")["input_ids"]) > 1 for word in held_out)


def test_ids_may_be_larger_than_their_number():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from common.model.from_config import model_from_config
    from common.tokens.tokenizer import vocabulary_size

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 7, "</s>": 70_000}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert len(tokenizer) == 3 and vocabulary_size(tokenizer) == 70_001
    shape = dict(model_type="qwen2", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = model_from_config(shape | dict(num_key_value_heads=1), tokenizer, 8)
    assert model.get_input_embeddings().weight.shape[0] == 70_016  # the next multiple of 128


def test_a_trained_tokenizer_is_cached(tmp_path):
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    cache = tmp_path / "cache"
    arguments = SharedArguments(vocabulary_size=300, cache_dir=str(cache))
    first = tokenizer_fingerprint(tokenizer_trained_on([resolve_source(str(data))], arguments))
    (folder,) = cache.glob("a-tokenizer-*")
    written = (folder / "tokenizer.json").stat().st_mtime_ns
    assert tokenizer_fingerprint(tokenizer_trained_on([resolve_source(str(data))], arguments)) == first
    assert [*cache.glob("a-*")] == [folder]
    assert (folder / "tokenizer.json").stat().st_mtime_ns == written

    for change in (dict(vocabulary_size=299), dict(held_out_fraction=0.3), dict(split="1,1")):
        changed = SharedArguments(**{"vocabulary_size": 300, "cache_dir": str(cache)} | change)
        tokenizer_trained_on([resolve_source(str(data))], changed)
    assert len([*cache.glob("a-*")]) == 4
    with data.open("a") as more:
        more.write('{"text": "more"}\n')
    tokenizer_trained_on([resolve_source(str(data))], arguments)
    assert len([*cache.glob("a-*")]) == 5


def test_a_failed_training_leaves_nothing_in_the_cache(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    source = resolve_source(str(tmp_path / "a.jsonl"))
    with pytest.raises(InputError, match="line 2"):
        tokenizer_trained_on([source], SharedArguments(cache_dir=str(tmp_path / "cache")))
    assert not (tmp_path / "cache").exists()


def test_a_token_store_trains_no_tokenizer(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "a.idx").write_bytes(b"")
    with pytest.raises(InputError, match=r"--tokenizer train: .*a\.bin holds tokens, not text"):
        tokenizer_trained_on([resolve_source(str(tmp_path / "a.bin"))], SharedArguments(cache_dir=str(tmp_path)))


def test_a_tokenizer_with_custom_code_is_refused_with_the_familys_place(tmp_path):
    own = {"tokenizer_class": "QWenTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "qwen.tiktoken").write_text("IQ== 0\n")
    with pytest.raises(InputError, match="Qwen 1 is Qwen2 .*convert_weights.py.* Qwen/Qwen2.5-0.5B"):
        load_tokenizer(str(tmp_path))
