"""Continued pretraining as a user runs it: a small model that knows the bundled English articles, on the CPU."""

import json
import math
import shutil
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load_recipe, losses, store_of_tokens, texts_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.console import InputError
from common.tokens.train_tokenizer import train_tokenizer
from common.train.trainer import PretrainingTrainer

ENGLISH, CHINESE = (ROOT / "data" / f"sample_{language}.jsonl" for language in ("en", "zh"))
IDS, ROW = 512, 64  # of the tokenizer; tokens
CHINESE_RETAINED = 5  # articles


def held_out(texts: list[str], fraction: float = 0.1) -> list[bool]:
    """Return which texts are held out: those whose 64-bit blake2b is below the fraction."""
    return [int.from_bytes(blake2b(t.encode(), digest_size=8).digest(), "little") < fraction * 2**64 for t in texts]


@pytest.fixture(scope="module")
def recipe():
    module = load_recipe("openwebtext_continue")
    module.PROMPTS = ["The meaning of life is"]  # generating takes longer than these runs' training
    return module


@pytest.fixture(scope="module")
def retained(tmp_path_factory) -> Path:
    """A few Chinese articles, one of them twice, and all the English ones, most of which are trained on."""
    path = tmp_path_factory.mktemp("retained") / "retained.jsonl"
    texts = texts_of(CHINESE)[:CHINESE_RETAINED]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[3], *texts_of(ENGLISH)]))
    return path


def run(weights: Path, cache_dir: Path, output_dir: Path, *flags: str) -> list[str]:
    """Return the flags of a run of a few seconds: 6 steps of 4 rows of 64 tokens."""
    return [
        *("--model", str(weights), "--data", str(ENGLISH), "--held_out_fraction", "0.1", "--max_steps", "6"),
        *"--context_length 64 --tokens_per_step 256 --per_device_train_batch_size 4 --learning_rate 1e-3".split(),
        *"--logging_steps 1 --eval_steps 3 --save_steps 3 --swanlab off --disable_tqdm true".split(),
        *("--cache_dir", str(cache_dir), "--output_dir", str(output_dir), *flags),
    ]


def results_of(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(recipe, weights, retained, cache_dir, tmp_path_factory) -> Path:
    """A run left alone, with a second held-out set."""
    folder = tmp_path_factory.mktemp("run") / "alone"
    recipe.main(run(weights, cache_dir, folder, "--retain", str(retained)))
    return folder


@torch.no_grad()
def loss_by_hand(folder: Path, texts: list[str]) -> tuple[float, int, int]:
    """Return nats a token, targets, and bytes of ``texts`` under the model in ``folder``, by plain transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = (len(ids) - 1) // ROW
    nats = 0.0
    for row in range(rows):
        window = torch.tensor(ids[row * ROW : (row + 1) * ROW + 1])
        log_probabilities = model(window[None, :-1]).logits[0].double().log_softmax(-1)
        nats -= log_probabilities[torch.arange(ROW), window[1:]].sum().item()
    return nats / (rows * ROW), rows * ROW, len("".join(texts).encode())


def test_help_names_every_flag(recipe, capsys):
    with pytest.raises(SystemExit) as stop:
        recipe.main(["--help", "all"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--model", "--retain", "--from_scratch", "--data_weights"))


def test_both_sets_before_and_after_are_what_plain_transformers_computes(weights, finished, retained):
    """The retained set by hand: the Chinese articles once, and of the English ones those that are held out."""
    english, results = texts_of(ENGLISH), results_of(finished)
    kept = [text for text, out in zip(english, held_out(english), strict=True) if out]
    chinese = texts_of(CHINESE)[:CHINESE_RETAINED]
    for name, texts in (("eval", kept), ("retain", chinese + kept)):
        for prefix, folder in (("before_", weights), ("", finished)):
            loss, targets, text_bytes = loss_by_hand(folder, texts)
            assert results[f"{prefix}{name}_loss"] == pytest.approx(loss, rel=1e-5), (prefix, name)
            assert results[f"{prefix}{name}_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
            bits = loss * targets / math.log(2) / text_bytes
            # The last partial row is not among the targets, but among these bytes.
            assert results[f"{prefix}{name}_bits_per_byte"] == pytest.approx(bits, rel=0.02)
        assert results[f"{name}_tokens"] == targets
    assert results["before_eval_loss"] != results["eval_loss"] and len(kept) > 3


def test_what_is_trained_on_is_not_retained_and_counted(finished):
    results, trained = results_of(finished), held_out(texts_of(ENGLISH)).count(False)
    assert results["retain_documents_trained_on"] == trained == results["ledger"]["documents_train"]
    [ledger] = results["retain_sources"].values()
    assert ledger["documents"] == CHINESE_RETAINED + 1 + 88
    assert ledger["documents_duplicate"] == trained + 1  # and the Chinese article that is there twice
    assert ledger["documents_held_out"] == CHINESE_RETAINED + 88 - trained and ledger["documents_train"] == 0
    assert ledger["tokens_read"] == ledger["tokens_held_out"] + ledger["tokens_duplicate"] + ledger["tokens_dropped"]


def test_the_table_and_the_start_are_shown_and_a_finished_run_again(
    recipe, weights, retained, cache_dir, finished, capsys
):
    recipe.main(run(weights, cache_dir, finished, "--retain", str(retained)))
    printed, results = capsys.readouterr().out, results_of(finished)
    assert "is finished; nothing to train" in printed
    table = {line.split("  ")[0]: line for line in printed.splitlines() if "->" in line}
    assert table.keys() == {"held out", "retained"}
    for name, prefix in (("held out", "eval"), ("retained", "retain")):
        assert f"{results[f'before_{prefix}_loss']:.4f} -> {results[f'{prefix}_loss']:.4f}" in table[name]


def test_the_start_is_shown_next_to_chance(recipe, weights, cache_dir, tmp_path, capsys):
    recipe.main(run(weights, cache_dir, tmp_path, "--max_steps", "1"))
    start = results_of(tmp_path)["before_eval_loss"]
    assert f"before training: {start:.4f} nats a token; by chance ln(512) = 6.2383" in capsys.readouterr().out
    assert not [name for name in results_of(tmp_path) if "retain" in name]


def test_interrupted_and_resumed_equals_uninterrupted(
    recipe, weights, retained, cache_dir, finished, tmp_path, monkeypatch
):
    """Losses to the last bit, and the figures of before training, which cannot be measured any more."""
    step = PretrainingTrainer.training_step

    def until_step_5(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    flags = run(weights, cache_dir, tmp_path, "--retain", str(retained))
    monkeypatch.setattr(PretrainingTrainer, "training_step", until_step_5)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(flags)
    monkeypatch.setattr(PretrainingTrainer, "training_step", step)
    recipe.main(flags)
    assert losses(tmp_path) == losses(finished)
    figures = {name: value for name, value in results_of(finished).items() if "eval_" in name or "retain" in name}
    figures = {name: value for name, value in figures.items() if "runtime" not in name and "second" not in name}
    assert len(figures) > 15 and {name: results_of(tmp_path)[name] for name in figures} == figures


def test_a_branch_equals_the_run_or_measures_its_other_documents_where_it_begins(
    recipe, weights, retained, cache_dir, finished, tmp_path
):
    """What it measures is what a run that starts from the checkpoint's weights measures before its first step."""
    flags = ["--retain", str(retained), "--branch_from", str(finished / "checkpoint-3")]
    recipe.main(run(weights, cache_dir, tmp_path / "same", *flags))
    assert losses(tmp_path / "same") == losses(finished)
    for name in ("eval_loss", "retain_loss", "before_eval_loss", "before_retain_loss"):
        assert results_of(tmp_path / "same")[name] == results_of(finished)[name]

    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts_of(ENGLISH)[:40]))
    recipe.main(run(weights, cache_dir, tmp_path / "branch", *flags, "--data", str(other), "--max_steps", "4"))
    start = ["--data", str(other), "--max_steps", "1", "--retain", str(retained)]
    recipe.main(run(finished / "checkpoint-3", cache_dir, tmp_path / "start", *start))
    for name in ("before_eval_loss", "before_retain_loss"):
        assert results_of(tmp_path / "branch")[name] == pytest.approx(results_of(tmp_path / "start")[name], abs=1e-6)
    assert "Held-out losses up to that step" in (tmp_path / "branch" / "report.html").read_text(encoding="utf-8")


def test_another_retained_set_or_other_weights_are_another_run(
    recipe, weights, cache_dir, finished, retained, tmp_path
):
    with pytest.raises(InputError, match="data.retained: .* in the folder"):
        recipe.main(run(weights, cache_dir, finished))
    other = changed_weights(weights, tmp_path / "other", lambda name, tensor: tensor * 1.01)
    with pytest.raises(InputError, match="model.weights: .* in the folder"):
        recipe.main(run(other, cache_dir, finished, "--retain", str(retained)))


def changed_weights(weights: Path, folder: Path, change) -> Path:
    shutil.copytree(weights, folder)
    tensors = load_file(folder / "model.safetensors")
    changed = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder


def refused_before_training(recipe, folder: Path, flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe.main(flags)
    assert not list(folder.glob("checkpoint-*")) and not (folder / "all_results.json").exists()


def test_shuffled_weights_are_stopped(recipe, weights, cache_dir, tmp_path):
    torch.manual_seed(0)
    wrong = changed_weights(
        weights, tmp_path / "wrong", lambda _, tensor: tensor.flatten()[torch.randperm(tensor.numel())].view_as(tensor)
    )
    refused_before_training(
        recipe, tmp_path / "run", run(wrong, cache_dir, tmp_path / "run"), r"start at \d.*ln\(512\) = 6.24.*tokenizer"
    )


def loss_by_frequency(folder: Path) -> float:
    """Return nats a token of the held-out articles, by the counts of the training articles' tokens, plus one each."""
    tokenizer, texts = AutoTokenizer.from_pretrained(folder), texts_of(ENGLISH)
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    out = held_out(texts)
    counts = Counter(range(IDS)) + Counter(i for text, kept in zip(ids, out, strict=True) if not kept for i in text)
    kept = [i for text, kept in zip(ids, out, strict=True) if kept for i in text]
    rows = (len(kept) - 1) // ROW
    return math.log(counts.total()) - sum(math.log(counts[i]) for i in kept[1 : rows * ROW + 1]) / (rows * ROW)


def test_weights_that_know_less_than_token_frequency_are_continued_only_if_the_user_says_so(
    recipe, weights, cache_dir, tmp_path, capsys
):
    """A last norm of 0 makes all logits 0, and the loss ln(512); a small one keeps a little of what was learnt."""

    def faded(name: str, factor: float) -> Path:
        return changed_weights(
            weights, tmp_path / name, lambda key, tensor: tensor * factor if key == "model.norm.weight" else tensor
        )

    nothing, frequency = faded("nothing", 0.0), loss_by_frequency(weights)
    message = rf"start at 6\.24 .*frequency alone gives {frequency:.2f} .*--accept_weak_weights"
    refused_before_training(recipe, tmp_path / "run", run(nothing, cache_dir, tmp_path / "run"), message)
    short = ["--max_steps", "1"]
    recipe.main(run(nothing, cache_dir, tmp_path / "run", "--accept_weak_weights", *short))
    printed = capsys.readouterr().out
    assert "warning: the loaded weights start at 6.24" in printed and results_of(tmp_path / "run")["steps"] == 1
    assert f"by token frequency alone {frequency:.4f}" in printed

    recipe.main(run(faded("less", 0.35), cache_dir, tmp_path / "little", *short))
    assert 0.7 * math.log(IDS) < results_of(tmp_path / "little")["before_eval_loss"] < frequency
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["openwebtext_continue", "low_memory_16gb"])
def test_a_published_model_needs_no_owner(weights, cache_dir, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # so the run ends where the weights would be fetched
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))  # for 3 checkpoints, never written
    with pytest.raises(InputError, match="cannot fetch model Qwen/Qwen2.5-0.5B:"):
        load_recipe(name).main(run(Path("qwen2.5-0.5b"), cache_dir, tmp_path, "--optim", "adamw_torch"))


def test_ids_of_another_tokenizer_of_the_same_size_are_stopped(recipe, weights, cache_dir, tmp_path):
    """A token store that names no tokenizer, as PaddleNLP's: its ids are all in the vocabulary, and mean other text."""
    tokenizer = AutoTokenizer.from_pretrained(weights)
    other = np.random.default_rng(0).permutation(IDS)
    documents = [other[tokenizer(text)["input_ids"]].tolist() for text in texts_of(ENGLISH)]
    store_of_tokens(tmp_path, documents, end=[tokenizer.eos_token_id])
    (tmp_path / "tokens.hashes.npy").unlink()
    flags = run(weights, cache_dir, tmp_path / "run", "--data", str(tmp_path / "tokens.bin"))
    refused_before_training(recipe, tmp_path / "run", flags, "ids are from another tokenizer")


def test_the_same_ids_unpermuted_train(recipe, weights, cache_dir, tmp_path):
    """So that the test above fails for the reason it gives."""
    tokenizer = AutoTokenizer.from_pretrained(weights)
    store_of_tokens(tmp_path, [tokenizer(t)["input_ids"] for t in texts_of(ENGLISH)], end=[tokenizer.eos_token_id])
    (tmp_path / "tokens.hashes.npy").unlink()
    flags = run(weights, cache_dir, tmp_path / "run", "--data", str(tmp_path / "tokens.bin"), "--max_steps", "1")
    recipe.main(flags)
    results = results_of(tmp_path / "run")
    assert results["ledger"]["tokens_trained"] == 256 and results["before_eval_loss"] < 0.7 * math.log(IDS)


def test_text_with_another_tokenizer_is_stopped(recipe, weights, cache_dir, tmp_path):
    train_tokenizer(texts_of(CHINESE), IDS).save_pretrained(tmp_path / "other")
    flags = run(weights, cache_dir, tmp_path / "run", "--tokenizer", str(tmp_path / "other"))
    refused_before_training(recipe, tmp_path / "run", flags, "from another tokenizer")


def test_a_store_of_another_tokenizer_is_refused_by_its_sidecar(recipe, weights, cache_dir, tmp_path):
    recipe.main(run(weights, tmp_path / "cache", tmp_path / "run", "--max_steps", "1"))
    [store] = (tmp_path / "cache").glob("*/tokens.bin")
    train_tokenizer(texts_of(CHINESE), IDS).save_pretrained(tmp_path / "other")
    flags = run(weights, cache_dir, tmp_path / "again", "--data", str(store), "--tokenizer", str(tmp_path / "other"))
    refused_before_training(recipe, tmp_path / "again", flags, "made with another tokenizer")


def test_missing_weights_are_refused(recipe, weights, cache_dir, tmp_path):
    wrong = changed_weights(weights, tmp_path / "wrong", lambda _, tensor: tensor)
    tensors = load_file(wrong / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, wrong / "model.safetensors", {"format": "pt"})
    flags = run(wrong, cache_dir, tmp_path / "run")
    refused_before_training(recipe, tmp_path / "run", flags, "1 tensors of Qwen2.* model.norm.weight")


def test_a_tokenizer_larger_than_the_embedding_is_refused(recipe, weights, cache_dir, tmp_path):
    train_tokenizer(texts_of(ENGLISH), IDS + 1).save_pretrained(tmp_path / "larger")
    flags = run(weights, cache_dir, tmp_path / "run", "--tokenizer", str(tmp_path / "larger"))
    refused_before_training(recipe, tmp_path / "run", flags, "embedding has 512 rows, the tokenizer 513 ids")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "./no/such"], "--model ./no/such: no such folder"),
        (["--model", "qwen2.5-0.5"], "not a hub id like owner/name.*qwen2.5-0.5b, "),
        (["--model", "no/such.gguf"], "no/such.gguf: no such file"),
        (["--retain", "no/such.jsonl"], "no such file"),
        (["--tokenizer", "train"], "know the ids of their own tokenizer only"),
        (["--context_length", "256"], "the model knows 128 positions"),
        (["--data_weights", "1", "2"], "gives 2 weights for 1 sources"),
    ],
)
def test_bad_input_is_one_clear_error(recipe, weights, cache_dir, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        recipe.main(run(weights, cache_dir, tmp_path / "run", *flags))
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_retained_set_that_is_all_trained_on_is_refused(recipe, weights, cache_dir, tmp_path):
    english = texts_of(ENGLISH)
    trained = [text for text, out in zip(english, held_out(english), strict=True) if not out][:5]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in trained))
    flags = run(weights, cache_dir, tmp_path / "run", "--retain", str(tmp_path / "same.jsonl"))
    refused_before_training(recipe, tmp_path / "run", flags, "--retain: 0 tokens in documents that are not trained on")


def test_from_scratch_is_random_with_the_guides_hyperparameters(recipe, weights, cache_dir, tmp_path):
    """The config alone is read. Learning rate: warm-up over 30 steps to 3e-5, then a straight line to 3e-6."""
    config = tmp_path / "config"
    shutil.copytree(weights, config)
    (config / "model.safetensors").unlink()
    short = ["--max_steps", "40", "--warmup_steps", "30", "--eval_strategy", "no"]
    flags = run(config, cache_dir, tmp_path / "run", "--from_scratch", *short)
    rate = flags.index("--learning_rate")
    recipe.main(flags[:rate] + flags[rate + 2 :])
    results = results_of(tmp_path / "run")
    assert results["before_eval_loss"] == pytest.approx(math.log(IDS), rel=0.02)  # and it is not stopped
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    line = [3e-6 + 2.7e-5 * (1 - step / 10) for step in range(10)]
    assert rates == pytest.approx([3e-5 * step / 30 for step in range(30)] + line)
    arguments = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert (arguments.weight_decay, arguments.max_grad_norm) == (0.01, 1.0)
    assert recipe.FROM_SCRATCH["warmup_steps"] * recipe.FROM_SCRATCH["max_steps"] == 30
    assert recipe.FROM_SCRATCH["max_steps"] * recipe.FROM_SCRATCH["tokens_per_step"] == 10_240_000
    assert recipe.DATA["context_length"] == 1024


def test_a_warm_up_as_long_as_the_run_is_refused(recipe, weights, cache_dir, tmp_path):
    flags = run(weights, cache_dir, tmp_path / "run", "--from_scratch", "--warmup_steps", "3", "--max_steps", "3")
    with pytest.raises(InputError, match="--warmup_steps 3: none of the 3 steps is left"):
        recipe.main(flags)


def test_pretrained_beats_from_scratch_at_equal_tokens(recipe, weights, cache_dir, finished, retained, tmp_path):
    recipe.main(run(weights, cache_dir, tmp_path, "--from_scratch", "--warmup_steps", "1"))
    assert results_of(tmp_path)["ledger"]["tokens_trained"] == results_of(finished)["ledger"]["tokens_trained"]
    assert results_of(tmp_path)["eval_loss"] > results_of(finished)["eval_loss"] + 1


def test_the_default_is_openwebtext(recipe, weights, cache_dir, tmp_path, monkeypatch):
    """Its files are read from the one folder that they lie in."""
    folder = tmp_path / "openwebtext" / "plain_text"
    folder.mkdir(parents=True)
    asked, lines = [], ENGLISH.read_text(encoding="utf-8").splitlines(keepends=True)
    for part in range(2):
        (folder / f"{part}.jsonl").write_text("".join(lines[part::2]), encoding="utf-8")

    def download(name, where, verify):
        asked.append(name)
        return sorted(folder.iterdir())

    monkeypatch.setattr(recipe, "download", download)
    flags = run(weights, cache_dir, tmp_path / "run", "--max_steps", "1")
    data = flags.index("--data")
    recipe.main(flags[:data] + flags[data + 2 :])
    assert asked == ["openwebtext"] and results_of(tmp_path / "run")["ledger"]["documents"] == len(lines)


def test_isolated_rows_and_muon(recipe, weights, retained, cache_dir, tmp_path):
    flags = run(weights, cache_dir, tmp_path, "--retain", str(retained), "--packing", "isolated", "--optimizer", "muon")
    recipe.main(flags)
    results = results_of(tmp_path)
    assert results["retain_tokens"] < results["retain_sources"]["retained"]["rows_held_out"] * ROW  # first ones ignored
    assert results["eval_loss"] < results["before_eval_loss"] + 0.5


@pytest.mark.parametrize("model", [None, "weights"])
def test_the_plan_is_of_the_model_and_loads_nothing(recipe, weights, tmp_path, model, capsys):
    """Offline: Qwen2.5-0.5B's 494,032,768 parameters (its model card: 0.49B), or those of another model's config."""
    if model is not None:
        shutil.copy(weights / "config.json", tmp_path)
    recipe.main(
        ["--plan", "--plan_json", *([] if model is None else ["--model", str(tmp_path)]), "--context_length", "128"]
    )
    expected = 494_032_768 if model is None else AutoModelForCausalLM.from_pretrained(weights).num_parameters()
    printed = capsys.readouterr().out
    assert f"{expected:,} parameters" in printed and "total_gib" in json.loads(printed.splitlines()[-1])


def test_a_probe_keeps_nothing(recipe, weights, cache_dir, tmp_path, capsys):
    recipe.main(run(weights, cache_dir, tmp_path / "run", "--plan", "--probe", "--plan_json"))
    assert "tokens_per_second" in json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not list((tmp_path / "run").glob("*"))
