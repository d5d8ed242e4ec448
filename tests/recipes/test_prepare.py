"""data/prepare.py as it is called on the command line, in this process."""

import importlib.util
import json

import numpy as np
import pytest
from conftest import ROOT

from common.arguments import SharedArguments
from common.console import InputError
from common.corpus.sources import resolve_sources
from common.corpus.splits import content_hash, split_by_hash
from common.tokens.store import TokenStore
from common.tokens.tokenizer import load_tokenizer
from common.tokens.train_tokenizer import tokenizer_trained_on

spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)
SAMPLE = ROOT / "data" / "sample_zh.jsonl"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer") / "mine"
    prepare.main(["train-tokenizer", "--input", str(SAMPLE), "--vocabulary_size", "2000", "--output", str(folder)])
    return str(folder)


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_tokenize_counts_and_closes_every_document(tokenizer, tmp_path, capsys):
    from transformers import AutoTokenizer

    prepare.main(["tokenize", "--input", str(SAMPLE), "--tokenizer", tokenizer, "--output", str(tmp_path / "a")])
    line = last_line(capsys)
    texts = [json.loads(text)["text"] for text in SAMPLE.read_text(encoding="utf-8").splitlines()]
    reference = AutoTokenizer.from_pretrained(tokenizer)
    ids = [[*reference(text, add_special_tokens=False)["input_ids"], reference.eos_token_id] for text in texts]
    assert (line["documents"], line["end_tokens"]) == (263, 263)
    assert line["tokens"] == sum(map(len, ids)) - 263
    assert line["bytes"] == sum(len(text.encode()) for text in texts)
    written = np.fromfile(tmp_path / "a.bin", np.uint16)
    assert written.tolist() == [token for document in ids for token in document]


def test_a_second_run_finds_its_result_and_refuses_that_of_another(tokenizer, tmp_path, capsys):
    flags = ["tokenize", "--tokenizer", tokenizer, "--output", str(tmp_path / "a"), "--input"]
    prepare.main([*flags, str(SAMPLE)])
    first, written = last_line(capsys), (tmp_path / "a.bin").stat().st_mtime_ns
    prepare.main([*flags, str(SAMPLE), "--workers", "1"])
    again = last_line(capsys)
    assert again | {"seconds": 0} == first | {"seconds": 0}
    assert (tmp_path / "a.bin").stat().st_mtime_ns == written
    with pytest.raises(InputError, match=r"a\.bin: exists already, and differs in sources"):
        prepare.main([*flags, str(ROOT / "data" / "sample_en.jsonl")])
    (tmp_path / "b.json").write_text("{}", encoding="utf-8")
    flags[4] = str(tmp_path / "b")
    with pytest.raises(InputError, match=r"b\.json: exists already, but not as part of our token store"):
        prepare.main([*flags, str(SAMPLE)])
    (tmp_path / "b.json").unlink()
    (tmp_path / "b.lock").touch()  # as an interrupted run leaves it
    (tmp_path / "b.bin").write_bytes(b"half")
    prepare.main([*flags, str(SAMPLE)])
    assert (tmp_path / "b.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()


def test_an_output_is_the_same_by_its_prefix_and_by_its_files(tokenizer, tmp_path, capsys):
    zh, en = str(SAMPLE), str(ROOT / "data" / "sample_en.jsonl")
    flags = ["tokenize", "--tokenizer", tokenizer, "--output", str(tmp_path / "a.bin"), "--input"]
    prepare.main([*flags, zh])
    assert last_line(capsys)["documents"] == TokenStore(tmp_path / "a").documents
    flags[4] = str(tmp_path / "a.idx")
    with pytest.raises(InputError, match=r"a\.bin: exists already, and differs in sources"):
        prepare.main([*flags, en])
    prepare.main(["merge", "--input", str(tmp_path / "a"), "--output", str(tmp_path / "m.bin")])
    assert {path.name for path in tmp_path.glob("m*")} == {
        *("m.bin", "m.idx", "m.json", "m.lock", "m.hashes.npy", "m.id_hashes.npy", "m.text_bytes.npy")
    }


@pytest.mark.parametrize("folder", ["a/", "./", "..", "a/.", "a/.bin"])
def test_an_output_that_names_a_folder_is_refused(tmp_path, monkeypatch, capsys, folder):
    monkeypatch.chdir(tmp_path)
    for command in (["tokenize", "--tokenizer", "t"], ["merge"]):
        with pytest.raises(SystemExit):
            prepare.main([*command, "--input", str(SAMPLE), "--output", folder])
        assert f"--output: {folder}: names a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_copies_are_removed_and_counted_unless_they_are_kept(tokenizer, tmp_path, capsys):
    data = tmp_path / "c.jsonl"
    texts = ["one text", "another text", "one text"]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    for flags, documents, duplicates in (([], 2, 1), (["--keep_duplicates"], 3, 0)):
        output = str(tmp_path / f"out{documents}")
        prepare.main(["tokenize", "--input", str(data), "--tokenizer", tokenizer, "--output", output, *flags])
        line = last_line(capsys)
        assert (line["documents"], line["duplicates"], line["end_tokens"]) == (documents, duplicates, documents)
        assert TokenStore(output).documents == documents


def test_near_duplicates_are_removed_and_reported(tokenizer, tmp_path, capsys):
    text = json.loads(SAMPLE.read_text(encoding="utf-8").splitlines()[0])["text"]
    data = tmp_path / "c.jsonl"
    texts = [text, text + "完。", "完全不同的另一篇文章，讲的是别的事情，和上面没有关系。"]
    data.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts), encoding="utf-8")
    flags = ["tokenize", "--input", str(data), "--tokenizer", tokenizer, "--output", str(tmp_path / "a")]
    for _ in range(2):  # the second time it is found, with the same counts
        prepare.main([*flags, "--near_duplicates", "0.8"])
        line = last_line(capsys)
        assert (line["documents"], line["near_duplicates"]) == (2, 1)
    removed = (tmp_path / "a.near_duplicates.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(removed[0])["index"] == 1 and json.loads(removed[0])["kept_index"] == 0


def test_inspect_and_merge(tokenizer, tmp_path, capsys):
    for name in ("sample_zh", "sample_en"):
        data, output = str(ROOT / "data" / f"{name}.jsonl"), str(tmp_path / name)
        prepare.main(["tokenize", "--input", data, "--tokenizer", tokenizer, "--output", output])
    both = [str(tmp_path / "sample_zh"), str(tmp_path / "sample_en")]
    prepare.main(["merge", "--input", *both, "--output", str(tmp_path / "both")])
    assert last_line(capsys)["documents"] == 263 + 88
    prepare.main(["merge", "--input", str(tmp_path / "both"), "--output", str(tmp_path / "old"), "--legacy"])
    assert TokenStore(tmp_path / "old_ids.npy").documents == 351
    capsys.readouterr()
    prepare.main(["inspect", str(tmp_path / "both"), "--tokenizer", tokenizer, "--documents", "1", "--tokens", "9"])
    shown = capsys.readouterr().out
    first = json.loads(SAMPLE.read_text(encoding="utf-8").splitlines()[0])["text"]
    assert "351 documents" in shown and "--- document 0" in shown and first[:5] in shown


def test_what_is_shown_of_documents_and_names_is_printable(tokenizer, tmp_path, capsys):
    """A document, a field and a file name with escape sequences, which would change the terminal."""
    data = tmp_path / "a\x1b[31m.jsonl"
    data.write_text(json.dumps({"text": "one \x1b]0;title\x07 \x9b2J", "\x1b[2J": 1}) + "\n{}\n", encoding="utf-8")
    flags = ["tokenize", "--input", str(data), "--tokenizer", tokenizer, "--output", str(tmp_path / "\x1b[1m")]
    prepare.main([*flags, "--skip_malformed"])
    prepare.main(["inspect", str(tmp_path / "\x1b[1m"), "--tokenizer", tokenizer])
    with pytest.raises(InputError) as refusal:
        prepare.main([*flags, "--text_field", "body"])
    shown = capsys.readouterr().out
    assert r"one \x1b]0;title\x07 \x9b2J" in shown and r"a\x1b[31m.jsonl, line 2" in shown
    assert not any(character in shown + str(refusal.value) for character in "\x1b\x07\x9b")


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16"])
def test_text_in_another_encoding_gives_the_same_tokens(tokenizer, tmp_path, capsys, encoding):
    text = SAMPLE.read_text(encoding="utf-8")
    (tmp_path / "a.jsonl").write_bytes("\n".join(text.splitlines()[:20]).encode(encoding))
    (tmp_path / "b.jsonl").write_bytes("\n".join(text.splitlines()[:20]).encode())
    flags = ["--tokenizer", tokenizer, "--output"]
    prepare.main(["tokenize", *flags, str(tmp_path / "b"), "--input", str(tmp_path / "b.jsonl")])
    of_gbk = ["tokenize", *flags, str(tmp_path / "a"), "--input", str(tmp_path / "a.jsonl")]
    with pytest.raises(InputError, match="--encoding"):
        prepare.main(of_gbk)
    prepare.main([*of_gbk, "--encoding", encoding])
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert TokenStore(tmp_path / "a").sidecar["sources"][0]["encoding"] == encoding
    assert "encoding" not in TokenStore(tmp_path / "b").sidecar["sources"][0]


def test_a_trained_tokenizer_is_judged_on_held_out_text(tokenizer, tmp_path, capsys):
    flags = ["--input", str(SAMPLE), "--vocabulary_size", "600", "--output", str(tmp_path / "t")]
    prepare.main(["train-tokenizer", *flags, "--reference", tokenizer])
    report = last_line(capsys)
    assert 1 < report["bytes_per_token"] < report["reference_bytes_per_token"]
    assert report["embedding_parameters"] == 640 * 512
    assert report["sample"]["documents"] < 263
    before = (tmp_path / "t" / "tokenizer.json").read_bytes()
    with pytest.raises(InputError, match="--output .*exists already. Choose another --output, or remove it"):
        prepare.main(["train-tokenizer", *flags, "--vocabulary_size", "700"])
    assert (tmp_path / "t" / "tokenizer.json").read_bytes() == before


def test_a_tokenizer_of_few_documents_is_judged_on_the_one_that_a_recipe_holds_out(tmp_path, capsys):
    texts = [f" {word}" * 50 for word in ("ab", "cd", "ef", "gh", "ij")]  # each becomes a token if it is trained on
    hashes = np.array([content_hash(text.encode()) for text in texts], np.uint64)
    held_out = split_by_hash(hashes, 0.005).held_out.tolist()
    data, output = tmp_path / "a.jsonl", str(tmp_path / "t")
    flags = ["train-tokenizer", "--input", str(data), "--vocabulary_size", "300", "--output", output]
    data.write_text(json.dumps({"text": texts[0]}), encoding="utf-8")
    prepare.main([*flags[:-1], str(tmp_path / "single")])
    report = last_line(capsys)  # of 150 bytes, the last 0.5% are its tail, and 1% are not trained on
    assert report["held_out_bytes"] == 1 and report["sample"]["sampled_bytes"] == 148
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    prepare.main(flags)
    report = last_line(capsys)
    assert report["held_out_bytes"] == 150 and report["sample"]["documents"] == 5
    assert (report["sample"]["sampled_documents"], report["sample"]["sampled_bytes"]) == (4, 600)
    arguments = SharedArguments(vocabulary_size=300, cache_dir=str(tmp_path / "cache"))
    recipes = tokenizer_trained_on(resolve_sources([str(data)]), arguments)
    for tokenizer in (load_tokenizer(output), recipes):
        words = ("ab", "cd", "ef", "gh", "ij")
        assert [f"Ġ{word}" not in tokenizer.get_vocab() for word in words] == held_out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "no/such.jsonl"], "no such file"),
        (["--input", str(SAMPLE), str(SAMPLE)], "given twice"),
        (["--input", str(SAMPLE), "--text_field", "body"], "no field 'body'"),
        (["--input", str(SAMPLE), "--near_duplicates", "1.5"], "1.5"),
    ],
)
def test_bad_input_is_one_clear_error_and_leaves_nothing(tokenizer, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        prepare.main(["tokenize", "--tokenizer", tokenizer, "--output", str(tmp_path / "out" / "a"), *flags])
    left = [path.name for path in (tmp_path / "out").iterdir()] if (tmp_path / "out").exists() else []
    assert left in ([], ["a.lock"], ["a.near_duplicates.jsonl"])


def test_an_output_that_cannot_be_written_is_one_line(tokenizer, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    below, long = str(tmp_path / "file" / "x"), str(tmp_path / ("x" * 201))
    for flags in (
        ["tokenize", "--input", str(SAMPLE), "--tokenizer", tokenizer],
        ["train-tokenizer", "--input", str(SAMPLE), "--vocabulary_size", "300"],
        ["merge", "--input", str(tmp_path / "no-store")],
        ["download", "owner/name"],
    ):
        with pytest.raises(InputError, match="--output .*file is a file. Choose another folder"):
            prepare.main([*flags, "--output", below])
    for flags in (["--output", long], ["--output", str(tmp_path / "t"), "--sample_mb", "nan"]):
        command = ["merge", "--input", "a"] if long in flags else ["train-tokenizer", "--input", str(SAMPLE)]
        with pytest.raises(SystemExit):
            prepare.main([*command, *flags])
    printed = capsys.readouterr().err
    assert "201 bytes, and 200 is the limit" in printed and "nan: must be a finite number" in printed
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "t").exists()
