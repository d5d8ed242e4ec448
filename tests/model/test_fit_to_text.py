"""--target_parameters auto: sizes by hand, flags win, and real runs on the kinds of files that people have."""

import json
import re
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import ROOT, texts_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.arguments import SharedArguments
from common.console import InputError
from common.corpus.formats import known_encoding
from common.corpus.sources import find_source
from common.model.fit_to_text import SIZES, best_fit, bytes_of, fit_to_text, tokens_of
from common.model.presets import parameters_of, shape_of_width

TEXTS = texts_of(ROOT / "data" / "sample_zh.jsonl")
# Two layers of 128 by hand: q and o 128 x 128, k and v 128 x 64, three 128 x 320, two norms, norms of q and k.
SMALLEST = 2_048 * 128 + 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 320 + 2 * 128 + 2 * 64) + 128
GPU = SimpleNamespace(device=SimpleNamespace(type="cuda"), output_dir="outputs/x")


def given_to(monkeypatch, training=GPU, cores: int = 2, **given) -> tuple[SharedArguments, SimpleNamespace]:
    """Return arguments as ``parse_flags`` makes them, on a machine with so many cores."""
    monkeypatch.setattr("common.model.fit_to_text.usable_cores", lambda: cores)
    shared = SharedArguments(data=given.pop("data", None), context_length=given.get("context_length", 512))
    shared.given = given | ({} if shared.data is None else {"data": shared.data})
    return shared, SimpleNamespace(**vars(training), learning_rate=0.0)


def test_the_sizes_reach_from_the_samples_to_the_recipes_own(wiki):
    assert shape_of_width(wiki.MODEL, 12, 12) == wiki.MODEL and SIZES[-1] == (12, wiki.DATA["vocabulary_size"])
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    fourth = shape_of_width(wiki.MODEL, 4, 4)
    assert all(fourth[name] == wiki.SAMPLE_MODEL[name] for name in same)
    assert parameters_of(shape_of_width(wiki.MODEL, 2, 2), 2_048) == SMALLEST
    sizes = [parameters_of(shape_of_width(wiki.MODEL, heads, heads), vocabulary) for heads, vocabulary in SIZES]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("tokens", "seconds", "heads", "passes", "why"),
    [
        (10_000, None, 2, 8, "the smallest there is"),  # 0.5M parameters at most, and the smallest has 0.6M
        (20_000, None, 2, 8, "more than 50"),  # 4 passes would be 156 steps of 512
        (100_000, None, 4, 4, "more than 50 parameters for each token"),  # 5M at most: 4.0M, and not 8.0M
        (1e9, None, 12, 103_043_328 * 20 / 1e9, "the largest of this recipe"),
        (1e10, None, 12, 1, "the largest of this recipe"),  # a GPU sees all of the text once
        # 94 GFLOP/s on two cores for an hour are 3.4e14 FLOPs: 1.25 x 6 N x 20 N of them allow N = 1.5M.
        (1e9, 3600, 2, 20 * SMALLEST / 1e9, "take more than an hour"),
    ],
)
def test_text_and_time_decide_the_size(wiki, monkeypatch, tokens, seconds, heads, passes, why):
    monkeypatch.setattr("common.model.fit_to_text.usable_cores", lambda: 2)
    fit, reason = best_fit(wiki.MODEL, tokens, seconds)
    assert (fit.heads, fit.passes) == (heads, pytest.approx(passes, rel=0.01)) and why in reason
    if seconds is not None:
        assert fit.seconds == pytest.approx(1.25 * 6 * SMALLEST * 20 * SMALLEST / (2 * 47e9)) and fit.seconds < seconds


def test_the_settings_follow_where_no_flag_says_otherwise(wiki, tmp_path, monkeypatch, capsys):
    """400,000 bytes are 100,000 tokens: 4 passes in steps of 1,024 are 391 steps."""
    (tmp_path / "novel.txt").write_bytes(b"x" * 400_000)
    shared, training = given_to(monkeypatch, data=[str(tmp_path / "novel.txt")])
    shape = fit_to_text(wiki.MODEL, shared, training)
    assert (shape["hidden_size"], shape["num_hidden_layers"], shape["model_type"]) == (256, 4, "qwen3")
    assert (shared.vocabulary_size, shared.tokens_per_step, shared.context_length) == (4_096, 1024, 128)
    assert (shared.held_out_fraction, shared.optimizer, training.learning_rate) == (0.05, "auto", 0.0)
    assert (training.num_train_epochs, training.eval_steps, training.logging_steps) == (4, 78, 19)
    assert training.weight_decay == 3  # 40 parameters a token
    assert training.output_dir == "outputs/novel"
    printed = capsys.readouterr().out
    assert "about 100,000 tokens in 1 file\n" in printed and "--vocabulary_size 4096 --context_length 128" in printed
    given = dict(context_length=256, learning_rate=3e-3, max_steps=70)
    shared, training = given_to(monkeypatch, data=[str(tmp_path / "novel.txt")], **given)
    fit_to_text(wiki.MODEL, shared, training)
    assert (shared.context_length, training.learning_rate) == (256, 0.0), "as the command line has them"
    assert shared.tokens_per_step == 1024 and not hasattr(training, "num_train_epochs")
    (tmp_path / "novels.txt").write_bytes(b"x" * 2_400_000)  # 13M parameters fit: 21 for each of 600,000 tokens
    shared, training = given_to(monkeypatch, data=[str(tmp_path / "novels.txt")])
    fit_to_text(wiki.MODEL, shared, training)
    assert not hasattr(training, "weight_decay"), "the recipe's own"


@pytest.mark.parametrize("auto", ["Auto", "AUTO", " auto "])
def test_auto_is_auto_in_upper_and_lower_case(wiki, tmp_path, capsys, auto):
    (tmp_path / "novel.txt").write_bytes(b"x" * 400_000)
    wiki.main(["--plan", "--data", str(tmp_path / "novel.txt"), "--target_parameters", auto])
    printed = capsys.readouterr().out
    assert "fitted to the text: about 100,000 tokens" in printed and "model: 4 layers of 256" in printed


def test_no_line_of_a_run_is_printed_twice(wiki, tmp_path, cache_dir, capsys):
    """Of files that are looked at to fit the model, read to train the tokenizer, and read to be tokenized."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:20]) + "{broken\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "quoted.tsv").write_text('text\n"in quotes"\n')
    for name in ("b.txt", "c.txt"):
        (folder / name).write_text(TEXTS[20], encoding="utf-8")
    own = "--target_parameters auto --max_steps 1 --swanlab off --disable_tqdm true --max_eval_rows 2 --skip_malformed"
    files = ["--cache_dir", str(cache_dir), "--output_dir", str(tmp_path / "run")]
    wiki.main(["--data", str(folder), *own.split(), "--keep_duplicates", *files])
    lines = [line for line in capsys.readouterr().out.splitlines() if len(line) > 20]
    notes = (
        "1 other files are not read",
        "reads 2 .jsonl",
        "no documents",
        "malformed",
        "quote, which is kept",
        ".txt files: 2",
    )
    assert [sum(line.startswith("note:") and note in line for line in lines) for note in notes] == [1] * len(notes)
    assert [line for line, times in Counter(lines).items() if times > 1 and not line.startswith("step ")] == []


@pytest.mark.parametrize("more", [[], ["--minutes", "3", "--plan_card", "H100"]])
def test_a_plan_names_the_files_that_are_not_read_once(wiki, tmp_path, capsys, more):
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "novel.txt").write_bytes(b"x" * 400_000)
    auto = [] if more else ["--target_parameters", "auto"]
    wiki.main(["--plan", "--data", str(tmp_path), *auto, *more])
    assert capsys.readouterr().out.count("Thumbs.db") == 1


def test_files_in_utf8_beside_others_are_not_made_longer(tmp_path):
    """Two files of 600 characters: 1,800 bytes in UTF-8, 1,200 in GBK, which are 1,800 in UTF-8."""
    for name, encoding in {"a.txt": "gb18030", "b.txt": "utf-8"}.items():
        (tmp_path / name).write_text("数" * 600, encoding=encoding)
    assert bytes_of(find_source(str(tmp_path)), "gb18030") == pytest.approx(3600)


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "big5"])
def test_a_text_is_as_long_in_every_encoding(encoding, tmp_path):
    """Chinese letters have 3 bytes in UTF-8 and 2 in the others."""
    text = "\r\n".join("天地玄黃宇宙洪荒 heaven" for _ in range(3000))
    sizes = []
    for name, content in {"utf8.txt": text.encode(), "other.txt": text.encode(encoding)}.items():
        (tmp_path / name).write_bytes(content)
        known = known_encoding(encoding if name == "other.txt" else None)
        sizes.append(tokens_of(find_source(str(tmp_path / name)), known))
    assert sizes[0] == len(text.encode()) / 4 and sizes[1] == pytest.approx(sizes[0], rel=0.001)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "fits the model to your own text. Name it with --data"),
        ({"data": ["owner/name"]}, "owner/name is no text on this machine.*--target_parameters 30M"),
        ({"data": ["no/such.txt"]}, "no/such.txt: no such file"),
        ({"data": ["x"], "sample": True}, "with --sample, which has a size of its own"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(wiki, monkeypatch, given, message):
    with pytest.raises(InputError, match=message):
        fit_to_text(wiki.MODEL, *given_to(monkeypatch, **given))


def thirty_texts(folder) -> tuple[list[str], list[str]]:
    (folder / "notes").mkdir()
    texts = [text[:600] for text in TEXTS[:30]]
    for number, text in enumerate(texts):
        (folder / "notes" / f"{number}.txt").write_text(text, encoding="utf-8")
    return [str(folder / "notes")], texts


def a_novel(folder) -> tuple[list[str], list[str]]:
    """One document without a blank line, of which the tail is held out."""
    text = "\n".join(re.sub(r"\n+", "\n", text) for text in TEXTS[:60])
    (folder / "novel.txt").write_text(text, encoding="utf-8")
    return [str(folder / "novel.txt")], [text]


def a_content_field(folder) -> tuple[list[str], list[str]]:
    lines = [json.dumps({"id": number, "content": text}) for number, text in enumerate(TEXTS[:60])]
    (folder / "posts.jsonl").write_text("\n".join(lines))
    return [str(folder / "posts.jsonl")], TEXTS[:60]


def gbk_of_windows(folder) -> tuple[list[str], list[str]]:
    texts = [re.sub(r"\n+", "\n", text) for text in TEXTS[:60]]
    (folder / "windows.txt").write_bytes("\r\n\r\n".join(texts).encode("gb18030"))
    return [str(folder / "windows.txt"), "--encoding", "gb18030"], texts


@pytest.mark.parametrize("made", [thirty_texts, a_novel, a_content_field, gbk_of_windows])
def test_one_command_trains_on_the_files_that_people_have(wiki, made, cache_dir, tmp_path, capsys):
    """Every document with all of its bytes; the model is the one that the run says, its tokenizer knows the text."""
    data, texts = made(tmp_path)
    own = "--target_parameters auto --max_steps 4 --swanlab off --disable_tqdm true --max_eval_rows 3".split()
    wiki.main(["--data", *data, *own, "--cache_dir", str(cache_dir), "--output_dir", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    read = sum(len(text.encode()) for text in texts)
    assert results["steps"] == 4 and results["ledger"]["documents"] == len(texts)
    assert results["ledger"]["bytes_read"] == pytest.approx(read, rel=0.001)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    layers = model.config.num_hidden_layers
    assert f"model: {layers} layers of {64 * layers}" in printed and model.config.hidden_size == 64 * layers
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text("utf-8").splitlines()]
    whole = "".join(texts).replace("\n", "")
    assert samples and all(sample["prompt"].replace("\n", "") in whole for sample in samples), "from this text"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    bytes_a_token = len(texts[0].encode()) / len(tokenizer(texts[0])["input_ids"])
    assert bytes_a_token > 2, "it learnt words of this text, not of what its bytes would mean in another encoding"
