"""The recipe as a user runs it, in this process and on the CPU."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch._dynamo
from conftest import ROOT, losses, small_run
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from common.arguments import SharedArguments
from common.console import InputError
from common.dataset.mixture import TrainingOrder
from common.dataset.packing import JoinedRows
from common.train.trainer import PretrainingTrainer


@pytest.fixture(scope="module")
def finished(wiki, cache_dir, tmp_path_factory):
    """A run left alone: 6 steps."""
    folder = tmp_path_factory.mktemp("run") / "alone"
    wiki.main(small_run(cache_dir, folder))
    return folder


def results_of(folder) -> dict:
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))


def test_help_fits_a_screen(wiki, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        wiki.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 40
    assert all(flag in printed for flag in ("--sample", "--tokens_per_step", "--learning_rate"))


@pytest.mark.parametrize("flag", ["--no_such_flag", "--max_step=2", "--learning_rat=1"])
def test_an_unknown_or_abbreviated_flag_is_refused(wiki, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        wiki.main(["--sample", flag])
    assert stop.value.code == 2
    assert "unknown flags: " + flag in capsys.readouterr().err


def test_every_step_is_logged_in_full(finished):
    history = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    for entry in steps:
        assert {"loss", "grad_norm", "learning_rate", "tokens_seen", "tokens_per_second_per_device"} <= entry.keys()
        assert {"tflops_per_device", "memory_allocated_gib", "memory_peak_gib"} <= entry.keys()
        assert "mfu" not in entry  # the peak of a CPU is not known
        assert entry["tokens_seen"] == entry["step"] * 256
        assert entry["loss"] != round(entry["loss"], 4)
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [3, 6]


def test_the_schedule_is_stable_and_then_falls_to_zero(finished):
    """Six steps: 3% of them, rounded up to one, warm up from 0; the last 30%, two, are half a cosine from 1e-3 to 0."""
    history = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    decay = [1e-3 * (1 + math.cos(math.pi * step / 2)) / 2 for step in range(2)]
    assert rates == pytest.approx([0.0, 1e-3, 1e-3, 1e-3, *decay])


def test_mfu_is_the_achieved_share_of_the_peak(wiki, cache_dir, tmp_path, monkeypatch):
    """A device of 0.5 TFLOP/s; the sample model by hand: 6 FLOPs a matrix parameter, 12 x layers x width x context."""
    monkeypatch.setattr("common.train.metrics.peak_tflops", lambda device, half_precision: 0.5)
    wiki.main(small_run(cache_dir, tmp_path, "--max_steps", "2"))
    layer = 256 * 256 + 2 * 256 * 128 + 256 * 256 + 3 * 256 * 768  # q, k and v of 2 of 4 heads, o, MLP
    flops = 6 * (4096 * 256 + 4 * layer) + 12 * 4 * 256 * 64
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    for entry in (entry for entry in history if "loss" in entry):
        tflops = entry["tokens_per_second_per_device"] * flops / 1e12
        assert entry["tflops_per_device"] == pytest.approx(tflops)
        assert entry["mfu"] == pytest.approx(tflops / 0.5)


def test_a_loss_of_nan_is_shown(wiki, cache_dir, tmp_path):
    """Not averaged away, not hidden by evaluation or samples, and not the end of the run."""
    wiki.main(small_run(cache_dir, tmp_path, "--learning_rate", "1e30", "--max_grad_norm", "0"))
    assert math.isnan(losses(tmp_path)[6]) and math.isnan(results_of(tmp_path)["eval_loss"])


def test_the_results_add_up(finished):
    results = results_of(finished)
    ledger = results["ledger"]
    assert ledger["tokens_read"] == ledger["tokens_train"] + ledger["tokens_held_out"] + ledger["tokens_dropped"]
    assert ledger["tokens_trained"] == 6 * 256
    assert ledger["documents"] == len((ROOT / "data" / "sample_zh.jsonl").read_text(encoding="utf-8").splitlines())
    assert math.isclose(results["eval_perplexity"], math.exp(results["eval_loss"]))
    assert results["train_loss"] == pytest.approx(sum(losses(finished).values()) / 6)
    assert results["effective_tokens_per_second"] == pytest.approx(6 * 256 / results["train_seconds"])
    for name in ("train_results.json", "eval_results.json", "loss_curve.png", "samples.jsonl", "run.json"):
        assert (finished / name).stat().st_size > 0


def test_the_folder_is_an_ordinary_checkpoint(finished):
    generator = pipeline("text-generation", str(finished))
    assert generator("地球", max_new_tokens=4)[0]["generated_text"].startswith("地球")
    assert (finished / "generation_config.json").exists() and (finished / "model.safetensors").exists()
    assert json.loads((finished / "config.json").read_text()).get("pad_token_id") is None  # see model_from_config


def test_the_held_out_loss_is_that_of_the_saved_model(wiki, finished, cache_dir):
    """Loss and bits per byte computed again from the checkpoint, document text and all, by other means."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    arguments = SharedArguments(held_out_fraction=0.05, context_length=64, cache_dir=str(cache_dir))
    [source] = wiki.resolve_sources([str(ROOT / "data" / "sample_zh.jsonl")])
    rows = wiki.build_rows({source.name: wiki.tokenize(source, tokenizer, arguments)}, arguments).held_out
    nats, target_bytes = 0.0, b""
    for index in range(5):
        ids, targets = rows[index]["input_ids"], rows[index]["shift_labels"]
        with torch.no_grad():
            log_probabilities = model(ids[None]).logits[0].double().log_softmax(-1)
        nats -= log_probabilities[torch.arange(64), targets].sum().item()
        target_bytes += tokenizer.decode(targets, skip_special_tokens=True).encode()
    results = results_of(finished)
    assert results["eval_loss"] == pytest.approx(nats / (5 * 64), rel=1e-5)
    # A character cut by the end of a row decodes to another number of bytes here.
    assert results["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / len(target_bytes), rel=0.02)
    assert results["eval_tokens"] == 5 * 64


def test_a_finished_run_is_shown_and_not_trained_again(wiki, finished, cache_dir, capsys):
    files = [path for path in finished.iterdir() if path.name != ".lock"]
    before = {path: path.stat().st_mtime_ns for path in files}
    wiki.main(small_run(cache_dir, finished))
    assert "is finished; nothing to train" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir() if path.name != ".lock"} == before


def test_another_recipe_in_the_folder_is_refused(wiki, finished, cache_dir):
    with pytest.raises(InputError, match=r"training.learning_rate: 0.00\d+ in the folder, 0.5 now"):
        wiki.main(small_run(cache_dir, finished, "--learning_rate", "0.5"))


def test_interrupted_and_resumed_equals_uninterrupted(wiki, finished, cache_dir, tmp_path):
    """kill -9 after the first checkpoint, then the same command again: the same losses to the last bit."""
    folder = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "recipes" / "wiki_zh_scratch.py"), *small_run(cache_dir, folder)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    deadline = time.time() + 240
    while not (folder / "checkpoint-3" / "trainer_state.json").exists():
        assert process.poll() is None and time.time() < deadline, "the run ended before its first checkpoint"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "all_results.json").exists()
    wiki.main(small_run(cache_dir, folder))
    assert losses(folder) == losses(finished)
    same = ("eval_loss", "train_loss", "ledger", "steps")
    assert {name: results_of(folder)[name] for name in same} == {name: results_of(finished)[name] for name in same}


def test_a_rate_that_may_change_is_applied_logged_and_recorded(wiki, cache_dir, tmp_path):
    """Half a run at one rate, the rest at another: run.json and the log agree, and what cannot change is refused."""
    constant = "--lr_scheduler_type constant --lr_scheduler_kwargs {} --warmup_steps 0".split()
    flags = small_run(cache_dir, tmp_path, *constant)
    wiki.main([*flags, "--max_steps", "3"])
    for refused, reason in (
        ("--optim sgd", "other optimizer"),
        ("--target_parameters 2.5M --vocabulary_size 4096", "other model"),
    ):
        with pytest.raises(InputError, match=f"cannot change: .*{reason}"):
            wiki.main([*flags, *refused.split(), "--allow_changes", "training.optim", "model", "data.optimizer"])
    with pytest.raises(InputError, match="\n  --allow_changes training.learning_rate$"):
        wiki.main([*flags, "--learning_rate", "3e-4"])
    wiki.main([*flags, "--learning_rate", "3e-4", "--allow_changes", "training.learning_rate"])
    history = json.loads((tmp_path / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert rates == [1e-3] * 3 + [3e-4] * 3
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["training"]["learning_rate"] == 3e-4


def test_a_run_with_muon_resumes_exactly_and_is_another_run_than_one_with_adamw(wiki, finished, cache_dir, tmp_path):
    flags = small_run(cache_dir, tmp_path, "--optimizer", "muon")
    wiki.main(flags)
    alone = losses(tmp_path)
    assert alone != losses(finished)
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "all_results.json").unlink()
    wiki.main(flags)
    assert losses(tmp_path) == alone
    with pytest.raises(InputError, match="data.optimizer: 'muon' in the folder, 'adamw' now"):
        wiki.main(small_run(cache_dir, tmp_path))


def test_a_longer_run_continues_a_finished_one(wiki, cache_dir, tmp_path):
    wiki.main(small_run(cache_dir, tmp_path, "--max_steps", "2"))
    wiki.main(small_run(cache_dir, tmp_path, "--max_steps", "3"))
    assert list(losses(tmp_path)) == [1, 2, 3]
    assert results_of(tmp_path)["ledger"]["tokens_trained"] == 3 * 256


def test_passes_end_in_one_partial_step(wiki, cache_dir, tmp_path):
    """Two passes over n rows are ceil(2 n / rows a step) steps, and trained tokens are exactly two passes."""
    wiki.main(
        small_run(
            cache_dir, tmp_path, *"--max_steps -1 --num_train_epochs 0.02 --eval_strategy no --save_strategy no".split()
        )
    )
    results = results_of(tmp_path)
    rows = (results["ledger"]["tokens_train"] - 1) // 64
    trained_rows = round(0.02 * rows)
    assert results["ledger"]["tokens_trained"] == trained_rows * 64
    assert results["steps"] == -(-trained_rows // 4)
    assert trained_rows % 4, "the case must have a partial last step"


def test_a_run_that_ended_in_a_partial_step_continues_at_the_next_row(wiki, cache_dir, tmp_path, monkeypatch):
    """No row is skipped or repeated, and a run cannot be asked for less than it has done."""
    visited, rows_of = [], JoinedRows.__getitems__

    def rows_noted(rows, indexes):
        visited.extend((rows.documents, index) for index in indexes)
        return rows_of(rows, indexes)

    monkeypatch.setattr(JoinedRows, "__getitems__", rows_noted)
    flags = "--max_steps -1 --eval_strategy no --save_strategy steps --save_steps 2".split()
    for passes in ("0.013", "0.02"):
        wiki.main(small_run(cache_dir, tmp_path, *flags, "--num_train_epochs", passes))
    rows = (results_of(tmp_path)["ledger"]["tokens_train"] - 1) // 64
    trained = [index for documents, index in visited if documents > 100 and index >= 0]
    order = TrainingOrder([rows], 42)
    expected = order.rows_at(np.arange(round(0.02 * rows))).tolist()
    assert round(0.013 * rows) % 4 and round(0.02 * rows) > round(0.013 * rows)
    assert trained == expected
    assert results_of(tmp_path)["ledger"]["tokens_trained"] == len(expected) * 64
    wiki.main(small_run(cache_dir, tmp_path, *flags, "--num_train_epochs", "0.02"))  # finished: only shown
    assert len([index for documents, index in visited if documents > 100 and index >= 0]) == len(expected)
    with pytest.raises(InputError, match="more than is asked for now"):
        wiki.main(small_run(cache_dir, tmp_path, *flags, "--num_train_epochs", "0.01"))


def test_a_mixture_is_trained_by_its_weights_and_resumes(wiki, cache_dir, tmp_path, capsys):
    """Three quarters Chinese, one quarter English, exact to a row; stopped after 3 steps and continued, the same."""
    both = [str(ROOT / "data" / f"sample_{language}.jsonl") for language in ("zh", "en")]
    flags = ["--data", *both, "--data_weights", "3", "1"]
    wiki.main(small_run(cache_dir, tmp_path / "alone", *flags))
    results = results_of(tmp_path / "alone")
    trained = {name: source["rows_trained"] for name, source in results["sources"].items()}
    assert trained == {"sample_zh": 18, "sample_en": 6}
    assert results["ledger"]["tokens_trained"] == 24 * 64
    for name in ("documents", "tokens_read", "tokens_train", "tokens_dropped", "rows_trained", "bytes_read"):
        assert results["ledger"][name] == sum(source[name] for source in results["sources"].values())
    assert "sample_en: 25.00% of the rows trained on" in capsys.readouterr().out

    # The schedule depends on the number of steps; a constant one lets the two halves be compared.
    flags += ["--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", "{}", "--warmup_steps", "0"]
    wiki.main(small_run(cache_dir, tmp_path / "whole", *flags))
    for steps in ("3", "6"):
        wiki.main(small_run(cache_dir, tmp_path / "halves", *flags, "--max_steps", steps))
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert results_of(tmp_path / "halves")["sources"] == results_of(tmp_path / "whole")["sources"]


def test_a_split_in_order_has_a_test_after_training(wiki, cache_dir, tmp_path):
    wiki.main(small_run(cache_dir, tmp_path, "--split", "90,5,5", "--packing", "isolated", "--max_steps", "1"))
    results = results_of(tmp_path)
    ledger = results["ledger"]
    assert ledger["documents"] == 263 == ledger["documents_train"] + 13 + 13
    assert (ledger["documents_held_out"], ledger["documents_test"]) == (13, 13)
    # 5 rows each, less the targets that begin a document, and nearly the loss of a model that knows nothing.
    assert 300 < results["test_tokens"] <= 320 and 300 < results["eval_tokens"] <= 320
    assert results["test_loss"] == pytest.approx(math.log(4096), rel=0.05)
    assert results["test_loss"] != results["eval_loss"]


def test_duplicates_are_left_out_and_counted(wiki, cache_dir, tmp_path):
    sample = (ROOT / "data" / "sample_zh.jsonl").read_text(encoding="utf-8")
    (tmp_path / "twice.jsonl").write_text(sample + sample, encoding="utf-8")
    flags = ["--data", str(tmp_path / "twice.jsonl"), "--max_steps", "1", "--eval_strategy", "no"]
    wiki.main(small_run(cache_dir, tmp_path / "run", *flags))
    ledger = results_of(tmp_path / "run")["ledger"]
    assert (ledger["documents"], ledger["documents_duplicate"]) == (526, 263)
    wiki.main(small_run(cache_dir, tmp_path / "kept", *flags, "--keep_duplicates"))
    kept = results_of(tmp_path / "kept")["ledger"]
    assert kept["documents_duplicate"] == kept["tokens_duplicate"] == 0
    assert kept["documents_held_out"] == 2 * ledger["documents_held_out"]
    assert kept["tokens_read"] == ledger["tokens_read"] == 2 * ledger["tokens_duplicate"]


def test_accumulation_does_not_change_the_losses(wiki, finished, cache_dir, tmp_path):
    wiki.main(small_run(cache_dir, tmp_path, "--per_device_train_batch_size", "1"))
    for step, loss in losses(tmp_path).items():
        assert loss == pytest.approx(losses(finished)[step], rel=2e-5)


def test_swanlab_offline_needs_nothing_and_asks_nothing(cache_dir, tmp_path):
    flags = small_run(cache_dir, tmp_path / "run", "--swanlab", "auto", "--max_steps", "1")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SWANLAB")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "wiki_zh_scratch.py"), *flags],
        env=environment | {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "SwanLab: offline" in done.stdout
    assert any((tmp_path / "run" / "swanlog").rglob("*"))
    assert (tmp_path / "run" / "all_results.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "no/such/file.jsonl"], "no such file"),
        (["--text_field", "body"], r"no field 'body'; the fields are \['text', 'title'\]"),
        (["--data_weights", "1", "2"], "gives 2 weights for 1 sources"),
        (["--data_weights", "0"], "0.0: must be above 0"),
        (["--split", "949"], "give two or three shares"),
        (["--context_length", "100000", "--tokens_per_step", "400000"], "less than one row"),
        (["--tokens_per_step", "100"], "cannot be divided"),
        (["--held_out_fraction", "2"], "must lie between 0 and 1"),
        (["--tokenizer", "./no/such/folder"], "no such folder"),
        (["--bf16", "true", "--fp16", "false"], "the recipe's flags say bf16"),
        (["--label_smoothing_factor", "0.1"], "shift the targets a second time"),
        (["--auto_find_batch_size", "true"], "--auto_find_batch_size: not with these recipes"),
        (["--report_to", "swanlab"], "its own flag, --swanlab"),
        (["--resume_from_checkpoint", "x"], "resumes by itself"),
        (["--train_sampling_strategy", "sequential"], "--train_sampling_strategy: not with these recipes"),
        (["--max_eval_rows", "0"], "--max_eval_rows 0: must be at least 1"),
        (["--context_length", "0"], "--context_length 0: must be at least 1"),
        (["--max_steps", "0"], "trains on no row"),
        (["--max_steps", "-1", "--num_train_epochs", "0"], "trains on no row"),
        (["--save_only_model", "true"], "cannot be resumed exactly"),
        (["--hub_token", "hunter2"], "--hub_token: not with these recipes, it would be saved"),
    ],
)
def test_bad_input_is_one_clear_error(wiki, cache_dir, tmp_path, monkeypatch, flags, message):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(InputError, match=message):
        wiki.main(small_run(cache_dir, tmp_path / "run", *flags))
    assert not (tmp_path / "run" / "run.json").exists()


def test_an_error_is_printed_without_a_traceback_of_ours(cache_dir, tmp_path):
    flags = small_run(cache_dir, tmp_path, "--data", "missing.jsonl")
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "wiki_zh_scratch.py"), *flags], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "missing.jsonl: no such file" in done.stderr and "Traceback" not in done.stderr


def test_a_compiled_run_has_the_losses_and_the_names_of_any_other(wiki, finished, cache_dir, tmp_path, monkeypatch):
    """By regions, as the YAMLs ask; aot_eager compiles everything but needs no C++ compiler."""
    for name, value in (("BACKEND", "AOT_EAGER"), ("USE_REGIONAL_COMPILATION", "true"), ("USE_DYNAMIC", "false")):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
    compiled, counters = [], torch._dynamo.utils.counters
    counters.clear()
    evaluate = PretrainingTrainer.evaluate

    def counted(self, *args, **kwargs):
        results = evaluate(self, *args, **kwargs)
        compiled.append(counters["stats"]["unique_graphs"])
        return results

    monkeypatch.setattr(PretrainingTrainer, "evaluate", counted)
    wiki.main(small_run(cache_dir, tmp_path))
    assert losses(tmp_path) == pytest.approx(losses(finished), rel=1e-5)
    assert len(compiled) == 2 and compiled[0] == compiled[1] > 0, "nothing is compiled after the first evaluation"
    with safe_open(tmp_path / "checkpoint-6" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "_orig_mod" in name]  # noqa: SIM118


def test_a_size_is_worked_out_for_the_tokenizer_that_is_given(wiki, finished, cache_dir, tmp_path, capsys):
    """With Qwen2's 151,646 ids there is no model of this size: the embedding alone is larger."""
    flags = ["--tokenizer", str(finished), "--target_parameters", "5M", "--max_steps", "1", "--save_strategy", "no"]
    wiki.main([*small_run(cache_dir, tmp_path, *flags), "--eval_strategy", "no"])
    assert capsys.readouterr().out.count("size: ") == 1
    parameters = sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    assert parameters == pytest.approx(5e6, rel=0.05)


def test_a_continued_run_saves_and_logs_as_it_is_asked_now(wiki, cache_dir, tmp_path):
    wiki.main(small_run(cache_dir, tmp_path, "--max_steps", "2", "--save_steps", "2", "--eval_strategy", "no"))
    now = ["--save_steps", "1", "--logging_steps", "2", "--save_total_limit", "9", "--eval_strategy", "no"]
    wiki.main(small_run(cache_dir, tmp_path, "--max_steps", "4", *now))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (2, 3, 4)}
