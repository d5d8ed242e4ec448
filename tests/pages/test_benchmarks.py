"""The benchmarks' tables and jobs, without a GPU."""

import argparse
import copy
import csv
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time

import psutil
import pytest
import torch
from conftest import ROOT, small_run, store_of_tokens
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from common.dataset.packing import JoinedRows, PackedRows
from common.distributed.launch import Launch
from common.model.from_config import planned_model
from common.model.fused_loss import use_fused_loss

sys.path.insert(0, str(ROOT / "benchmarks"))  # as for a script there
import launching
import trainers


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


data, gpu, learning, low_memory = load("data"), load("gpu"), load("learning"), load("low_memory")
scaling, multi_gpu, equivalence = load("scaling"), load("multi_gpu"), load("equivalence")
token_store, saves, many_cards = load("token_store"), load("saves"), load("many_cards")


# A stand-in for torch's launcher, whose worker is in a session of its own and outlives a signal to the launcher.
LAUNCHER = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
open(sys.argv[1], "w").write(str(worker.pid))
print("launched", flush=True)
time.sleep(300)
"""


def gone(process: int) -> bool:
    return not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE


def test_a_run_that_takes_too_long_leaves_no_process_behind(tmp_path):
    output, failure = launching.run([sys.executable, "-c", LAUNCHER, str(tmp_path / "pid")], dict(os.environ), 3)
    assert (output, failure) == ("launched\n", "not done after 3 s")
    assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_control_c_and_termination_end_the_worker_too(tmp_path, number):
    def interrupt():
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        signal.pthread_kill(threading.main_thread().ident, number)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        launching.run([sys.executable, "-c", LAUNCHER, str(tmp_path / "pid")], dict(os.environ))
    assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(("visible", "first"), [(None, "0"), ("3,5", "3"), ("", ""), ("GPU-1a,GPU-2b", "GPU-1a")])
def test_what_is_for_one_gpu_sees_one(monkeypatch, visible, first):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launching.one_gpu()["CUDA_VISIBLE_DEVICES"] == first


def test_all_launches_for_one_gpu_hide_the_others(monkeypatch, tmp_path):
    seen = []

    def record(command, environment, *_, **__):
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
        return "", "failed"

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    for module, name in ((launching, "run"), (learning, "run"), (multi_gpu, "run_command")):
        monkeypatch.setattr(module, name, record)
    gpu.launch("123M recipe", gpu.VARIANTS["123M recipe"], False, "", 1)
    low_memory.launch("T4: 0.5B", low_memory.VARIANTS["T4: 0.5B"], [], False, 1)
    learning.launch("tutorial", [])
    for yaml in ("single_gpu", "fp16", "ddp"):
        multi_gpu.run(yaml, multi_gpu_arguments(tmp_path), tmp_path / yaml)
    assert seen == ["2"] * 5 + ["2,3"]


def test_a_failed_worker_says_why(tmp_path):
    """Its own last error, not the traceback that the launcher adds; out of memory before all."""
    worker = "print('ValueError: mine'); print('bye')"
    launcher = f"""import subprocess, sys
subprocess.run([sys.executable, "-c", "{worker}"])
print('Traceback (most recent call last):\\n  File "<frozen runpy>", line 1\\nCalledProcessError: x', file=sys.stderr)
sys.exit(1)"""
    assert launching.result_of([sys.executable, "-c", launcher], str(tmp_path), dict(os.environ)) == "ValueError: mine"
    own = 'Traceback (most recent call last):\n  File "<frozen runpy>", line 1\nValueError: no such YAML'
    assert launching.error_in(launching.without_launchers_traceback(own)) == "ValueError: no such YAML"
    assert launching.error_in("torch.OutOfMemoryError: CUDA out of memory.\nRuntimeError: x").endswith("of memory.")


@pytest.mark.parametrize("module", [gpu, low_memory, saves])
def test_the_table_is_printed_when_a_benchmark_is_stopped(monkeypatch, capsys, module):
    names, failure = list(module.VARIANTS)[:3], iter(["Error: x", KeyboardInterrupt])

    def launch(*_):
        if isinstance(said := next(failure), str):
            return said
        raise said

    monkeypatch.setattr(module, "launch", launch)
    with pytest.raises(KeyboardInterrupt):
        module.main(["--variants", *names])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"| {names[0]} ") and "failed: Error: x" in line for line in lines)


@pytest.mark.parametrize("recipe", ["wiki_zh_scratch.py", "explicit_pipeline.py"])
def test_a_rehearsal_of_many_cards_trains_the_small_model(recipe, tmp_path, wiki, capsys):
    """On CPU processes: 103M parameters would take minutes a step."""
    rehearsal = argparse.Namespace(rehearse=True, folder=tmp_path)
    command = many_cards.recipe_run("ddp.yaml", 2, recipe, f"--output_dir {tmp_path}", rehearsal)
    assert "--sample" in command and command.index("--sample") < command.index("--vocabulary_size")
    if recipe == "wiki_zh_scratch.py":
        flags = command[command.index(str(ROOT / "recipes" / recipe)) + 1 :]
        wiki.main([*flags, "--plan"])
        assert 2e6 < int(re.search(r"([\d,]+) parameters", capsys.readouterr().out)[1].replace(",", "")) < 5e6


def test_the_table_of_data_names_failures_and_keeps_the_rest(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}\n" * 10)  # so that of 100 tokens 10 are end tokens
    row = dict(seconds=2.0, cpu_seconds=3.0, kept=90, read=100, disk=400, peak_mb=50.0)
    rows = {("group_texts", 2): row, ("whole_chunks", 2): "Traceback\nError: x", ("ours", 2): row}
    found = data.table(rows | {("whole_chunks", 1): row | {"read": None, "kept": 45}}, str(tmp_path / "x.jsonl"))
    assert found.startswith("100 tokens")
    assert "whole_chunks, num_proc=2       failed: Error: x" in found
    assert "ours, 2 cores                       2.0      3.0          50   1.00          4.0       50   10.00%" in found
    assert "whole_chunks, num_proc=1            2.0      3.0          45    nan          4.4       50   50.00%" in found
    assert 10 < data.peak_mb() < 1e5


def test_a_layer_that_is_not_trained_is_noticed():
    """As when the parameters are exchanged after the optimizer was made of them."""
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", num_key_value_heads=1, **shape))
    before, optimizer = gpu.first_rows(model), torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    for parameter in model.model.layers[1].parameters():
        parameter.grad = None
    optimizer.step()
    with pytest.raises(AssertionError, match="no matrix of layer 1"):
        gpu.check_all_trained(model, optimizer, before)
    gpu.check_all_trained(model, optimizer, [before[0], [row + 1 for row in before[1]]])
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach() + 1)
    with pytest.raises(AssertionError, match="the optimizer has"):
        gpu.check_all_trained(model, optimizer, before)


def test_the_variants_are_whole_batches_and_have_their_baseline():
    for name, described in gpu.VARIANTS.items():
        rows_per_step = described["tokens_per_step"] / described["context_length"]
        assert rows_per_step % described["rows"] == 0, name
        assert f"{described['job']} tutorial" in gpu.VARIANTS


@pytest.mark.parametrize(("job", "parameters"), [("123M", 123_295_232), ("0.5B", 494_032_768), ("7B", 6_738_415_616)])
def test_the_shapes_are_the_models_they_stand_for(job, parameters):
    """Qwen2.5-0.5B has 494,032,768 parameters and Llama-2-7B 6,738,415,616, by their published checkpoints."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**gpu.JOBS[job]["shape"]))
    assert model.num_parameters() == parameters


def test_the_rows_are_of_the_wanted_length(tmp_path):
    rows = gpu.random_rows(gpu.VARIANTS["0.5B recipe, isolated"], tmp_path)
    assert len(rows) >= 2 * 131_072 // 2048 and rows[0]["input_ids"].shape == (2048,)
    starts = sum(int((rows[row]["position_ids"] == 0).sum()) for row in range(len(rows)))
    assert 300 < len(rows) * 2048 / starts < 500  # documents of 500 tokens, cut once more at the end of each row


def test_strategies_are_chosen_with_the_baseline_first():
    every = multi_gpu.chosen(["*"])
    assert every[0] == "single_gpu" and {"zero3_offload", "fsdp2", "fp16"} < set(every)
    assert not {*multi_gpu.NOT_HERE} & set(every)
    assert multi_gpu.chosen(["zero?", "cpu"]) == ["cpu", "zero1", "zero2", "zero3"]


def test_a_strategys_row_has_medians_of_warm_steps_and_the_largest_deviation():
    history = [
        dict(
            step=step,
            loss=10.0 - step,
            tokens_per_second_per_device=1000.0 * step,
            memory_peak_gib=step / 2,
            mfu=0.3,
            train_seconds=30.7 + step,
        )
        for step in range(1, 9)
    ]
    baseline = [
        dict(step=step, loss=loss, tokens_per_second_per_device=8000.0)
        for step, loss in ((1, 9.0), (2, 10.0), (3, 7.0), (9, 1.0))
    ]
    histories = {"single_gpu": baseline, "ddp": [*history, {"eval_loss": 1.0}], "zero3": [], "zero2": history[:6]}
    row = multi_gpu.row("ddp", 2, histories, predicted=5.0)
    assert row == "| ddp | 2 | 7,000 | 30.0% | 88% | 4.0 | 5.0 (+25%) | 9.0000 | 2.0000 | 20.000% | 31.7 |"
    failed = multi_gpu.row("zero3", 2, histories, failure="failed")
    assert "| zero3, failed, after step 0 |" in failed and failed.count("|") == row.count("|")
    late = multi_gpu.row("zero2", 2, histories, failure="not done after 9 s")
    assert late.startswith("| zero2, not done after 9 s, after step 6 | 2 | 6,000 | 30.0% | 75% |")
    assert multi_gpu.baseline_of({"single_gpu": [], "ddp": history}) == "ddp"


def multi_gpu_arguments(cache_dir, **changes) -> argparse.Namespace:
    given = dict(job="123M", data=None, tokenizer=None, num_processes=2, steps=None, rows=None, launcher="", recipe="")
    return argparse.Namespace(**{**given, "cache_dir": str(cache_dir), "limit": 60, **changes})


def stand_in(lines: int, status: int) -> list[str]:
    """Return a command that logs ``lines`` steps into --output_dir and half of the next, and ends with ``status``."""
    script = f"""import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
text = "".join(json.dumps(dict(step=step, loss=9.0)) + "\\n" for step in range(1, {lines} + 1))
(folder / "history.jsonl").write_text(text + '{{"step": ')
print("the end")
sys.exit({status})"""
    return [sys.executable, "-c", script]


def test_a_failed_strategy_has_what_it_logged_and_only_a_finished_one_is_kept(monkeypatch, tmp_path, capsys):
    arguments, folder = multi_gpu_arguments(tmp_path), tmp_path / "123M" / "ddp"
    monkeypatch.setattr(multi_gpu, "launcher", lambda _: stand_in(3, 1))
    history, failure, output = multi_gpu.run("ddp", arguments, folder)
    assert (len(history), failure, output) == (3, "failed", "the end\n")
    monkeypatch.setattr(multi_gpu, "launcher", lambda _: stand_in(4, 0))
    assert len(multi_gpu.run("ddp", arguments, folder)[0]) == 4  # again, as it failed
    monkeypatch.setattr(multi_gpu, "launcher", lambda _: stand_in(5, 0))
    assert len(multi_gpu.run("ddp", arguments, folder)[0]) == 4  # read
    monkeypatch.setattr(multi_gpu, "circumstances", lambda: launching.circumstances() | {"commit": "another"})
    assert len(multi_gpu.run("ddp", arguments, folder)[0]) == 5
    assert "run again: other commit" in capsys.readouterr().err


def test_a_worker_ends_with_the_data_or_with_training(cache_dir, tmp_path):
    """As launched: no evaluation, no samples, no model; every step's log is in a file."""
    flags = small_run(cache_dir, tmp_path, "--eval_strategy", "no", "--save_strategy", "no")
    with pytest.raises(SystemExit) as end:
        multi_gpu.main(["--worker", "data", "wiki_zh_scratch.py", *flags])
    assert not end.value.code and list(cache_dir.glob("sample_zh-*/tokens.bin"))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with pytest.raises(SystemExit) as end:
        multi_gpu.main(["--worker", "training", "wiki_zh_scratch.py", *flags])
    assert not end.value.code
    history = multi_gpu.logged_in(tmp_path / "history.jsonl")
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "tokens_per_second_per_device", "memory_peak_gib"} <= entry.keys() for entry in history)
    assert not {"model.safetensors", "samples.jsonl", "all_results.json"} & {path.name for path in tmp_path.iterdir()}


def test_a_plan_follows_the_launcher_and_its_failure_loses_nothing(tmp_path, capsys):
    compiled = multi_gpu.planned_yaml("zero2_recompute", [], tmp_path).read_text(encoding="utf-8")
    eager = multi_gpu.planned_yaml("zero2_recompute", ["--dynamo_backend", "no"], tmp_path).read_text(encoding="utf-8")
    assert "dynamo_backend: INDUCTOR" in compiled and "INDUCTOR" not in eager
    assert multi_gpu.plan("ddp", multi_gpu_arguments(tmp_path, recipe="--nonsense")) is None
    assert "no plan for ddp" in capsys.readouterr().err
    assert multi_gpu.plan("ddp", multi_gpu_arguments(tmp_path)) > 10


def test_7b_has_yamls_that_fit():
    assert multi_gpu.chosen(multi_gpu.JOBS["7B"][-1]) == [
        "fsdp2", "fsdp2_offload", "fsdp2_recompute", "zero2_recompute", "zero3_offload",
    ]  # fmt: skip


def test_the_table_has_ratios_and_names_failures():
    row = dict(tokens_per_second=100_000.0, mfu=0.1, peak_gib=30.0, first_step_seconds=2.0, kernels=None)
    row["planned_gib"] = None
    table = gpu.table(
        {
            "123M tutorial": row,
            "123M recipe": row | {"tokens_per_second": 450_000.0, "kernels": {"loss": 0.25, "idle": 0.5}},
            "7B recipe": "CUDA out of memory",
            "7B recipe, FP8": row | {"mfu": None},
        }
    )
    assert "| 7B recipe, FP8 | 1 | 100,000 | - | 30.0 |" in table
    assert "| 123M recipe | 64 | 450,000 | 10.0% | 30.0 | 2.0 | 4.50 |" in table
    assert "| 7B recipe | 1 | failed: CUDA out of memory |" in table
    assert "| 123M recipe | 25.0% | 50.0% |" in table


def test_seconds_to_a_goal_lie_on_a_line_between_points():
    points = [{"seconds": 1.0}, {"seconds": 10.0, "bits_per_byte": 3.0}, {"seconds": 20.0, "bits_per_byte": 2.0}]
    assert learning.seconds_to(points, 2.25) == 17.5
    assert learning.seconds_to(points, 3.5) == 10.0
    assert learning.seconds_to(points, 1.0) is None


@pytest.mark.parametrize(
    "module", [data, equivalence, gpu, learning, low_memory, multi_gpu, saves, scaling, token_store]
)
def test_help_is_printed(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0 and "usage" in capsys.readouterr().out


def test_the_stalls_of_two_saves_are_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    row = saves.work(saves.VARIANTS["tiny"], 6, str(tmp_path))
    assert row["parameters"] * 12 < row["checkpoint_gb"] * 1e9 < row["parameters"] * 12 + 100_000
    assert 0 < row["stall_seconds"] <= row["seconds_until_whole"] and row["first_stall_seconds"] > 0
    assert "| tiny | 0.00 |" in saves.table({"tiny": row}) and "failed: x" in saves.table({"tiny, waits": "x"})


def test_the_tutorial_drops_what_is_no_whole_chunk(tmp_path):
    store = store_of_tokens(tmp_path, [[1] * 1030, [2] * 511, [3] * 512])
    chunks = learning.chunks_of_the_tutorial(store, torch.tensor([True, True, True]).numpy())
    assert [chunk["input_ids"].unique().tolist() for chunk in chunks] == [[1], [1], [3]]
    assert all(len(chunk["input_ids"]) == 512 for chunk in chunks)


def test_the_ends_of_documents_are_no_targets(tmp_path):
    """By hand: a model that gives each of 64 tokens the same probability pays 6 bits for each of the others."""
    store = store_of_tokens(tmp_path, [[1, 2, 3]] * 9, end=[63])
    rows = JoinedRows([PackedRows(store, torch.ones(9, dtype=bool).numpy(), 7)])
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", num_key_value_heads=1, **shape))
    torch.nn.init.zeros_(model.lm_head.weight)
    targets = [target for row in range(5) for target in rows[row]["shift_labels"].tolist() if target != 63]
    assert len(rows) == 5 and 20 < len(targets) < 35
    found = learning.held_out_nats(model, rows, end=63, at_once=2)
    assert found == pytest.approx(len(targets) * torch.tensor(64.0).log().item(), rel=1e-5)


def test_a_benchmarks_trainer_makes_its_step_and_records_nothing(tmp_path):
    """By hand: plain SGD moves the weights by the rate times the gradient of the mean loss of the step's rows."""
    store = store_of_tokens(tmp_path, [[1, 2, 3]] * 9, end=[63])
    rows = JoinedRows([PackedRows(store, torch.ones(9, dtype=bool).numpy(), 7)])
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", num_key_value_heads=1, **shape))
    expected = copy.deepcopy(model)
    training = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    use_fused_loss(model)
    trainer = trainers.trainer_on(rows, rows, model, training, Launch(optimizer="adamw", rows_per_step=4))
    step = [rows[row] for row in trainer.order.rows_of_step(1)]
    trainer.train()

    ids, targets = (torch.stack([row[name] for row in step]) for name in ("input_ids", "shift_labels"))
    torch.nn.functional.cross_entropy(expected(ids).logits.flatten(0, 1), targets.flatten()).backward()
    for parameter, moved in zip(expected.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(moved, parameter - 0.5 * parameter.grad)
    assert not any((tmp_path / "run").iterdir())  # Trainer itself makes the folder


def test_a_corpus_is_known_by_its_documents(tmp_path):
    first, same, other = (
        learning.documents_fingerprint([store_of_tokens(tmp_path, documents)])
        for documents in ([[1, 2]], [[1, 2]], [[1, 3]])
    )
    assert first == same != other


def learnt(name: str, **changes) -> dict:
    points = [{"step": 1, "seconds": 1.0}, {"step": 9, "seconds": 9.0, "bits_per_byte": 2.0}]
    row = dict(name=name, points=points, tokens_per_step=512, tokens=1e6, parameters=1e6, tokens_per_second=1e3)
    return row | {"circumstances": {**launching.circumstances(), "data": "d", **changes}}


def test_learning_goes_on_after_a_failed_run_and_mixes_nothing(monkeypatch, tmp_path, capsys):
    def launch(name, _):
        if name == "recipe":
            return "Error: x"
        (tmp_path / f"{name}.json").write_text(json.dumps(learnt(name)))
        return ""

    monkeypatch.setattr(learning, "launch", launch)
    flags = ["--data", "x", "--tokenizer", "y", "--output", str(tmp_path), "--runs"]
    learning.main([*flags, "recipe", "tutorial"])
    printed = capsys.readouterr().out
    assert "| recipe | failed: Error: x |" in printed and "| tutorial | 1.0M |" in printed
    (tmp_path / "2e_3.json").write_text(json.dumps(learnt("2e-3", data="another")))
    with pytest.raises(SystemExit, match='do not compare.*data: {"tutorial": "d", "2e-3": "another"}'):
        learning.main(flags)
    (tmp_path / "2e_3.json").write_text(json.dumps(learnt("2e-3", commit="another")))
    with pytest.raises(SystemExit, match="does not compare.*commit"):  # before anything is run
        learning.main([*flags, "tutorial"])


@pytest.mark.parametrize(
    ("size", "parameters"), [("1.5B", 1_543_714_304), ("3B", 3_085_938_688), ("7B", 7_615_616_512)]
)
def test_the_16_gb_shapes_are_those_of_qwen2_5(size, parameters):
    """By their published checkpoints."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**low_memory.SHAPES[size]))
    assert model.num_parameters() == parameters


def test_every_saving_of_the_16_gb_table_is_switched_off_alone():
    for size in ("0.5B", "1.5B"):
        base = low_memory.VARIANTS[f"bf16: {size}"]
        for name, off in low_memory.WITHOUT.items():
            described = low_memory.VARIANTS[f"bf16: {size} without {name}"]
            assert {key for key in base if base[key] != described[key]} == off.keys() and len(off) == 1
    for name, described in low_memory.VARIANTS.items():
        scaler = described["card"] == "T4"
        assert not (scaler and (described["in_backward"] or described["weights"] == "bfloat16" == described["method"]))
        assert name.startswith(described["card"] + ": " + described["size"])


def test_the_16_gb_table_says_what_was_refused_and_what_failed():
    row = dict(
        parameters=3.09e9, trained=3.09e9, allocated_gib=13.5, reserved_gib=14.2, predicted_gib=13.9,
        prediction_error=0.03, tokens_per_second=5000.0, fits=True,
    )  # fmt: skip
    found = low_memory.table({"bf16: 3B": row, "bf16: 1.5B": row | {"fits": False}, "T4: 0.5B": "Error: x"})
    assert "| bf16: 3B | 3.09B | 3,090M | 13.50 | 14.20 | 13.90 | +3.0% | 5,000 | yes |" in found
    assert "no, refused" in found and "| T4: 0.5B | failed: Error: x |" in found


def test_losses_are_compared_with_the_first_run():
    row = dict(loss=3.0, bits_per_byte=1.1, tokens=8e6, tokens_per_second=1e5, allocated_gib=2.0)
    names = list(low_memory.LOSS_RUNS)
    found = low_memory.loss_table({names[0]: row, names[1]: row | {"loss": 3.03}, names[2]: "out of memory"})
    assert "| +1.00% |" in found and "failed: out of memory" in found


def test_layers_quantized_on_the_spot_are_those_that_transformers_quantizes_at_loading(tmp_path):
    """The table's QLoRA models against the recipe's."""
    pytest.importorskip("bitsandbytes")
    from common.model.adapters import four_bits

    shape = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, vocab_size=512)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", num_key_value_heads=1, **shape))
    model.save_pretrained(tmp_path)
    low_memory.quantize_layers(model, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four_bits(torch.float32))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.train()(ids).logits, loaded.train()(ids).logits, rtol=0, atol=0)
    packed = sum(hasattr(parameter, "quant_state") for parameter in model.parameters())
    assert packed == sum(hasattr(parameter, "quant_state") for parameter in loaded.parameters()) == 2 * 7


def test_traffic_of_a_step_by_hand():
    """1,000 parameters on 4 cards: three quarters of each gather or scatter leave a card."""
    assert scaling.bytes_sent("ddp", 1000, 4) == 0.75 * 2 * 4000
    assert scaling.bytes_sent("zero1", 1000, 4, accumulation=8) == 0.75 * (2000 + 2000)
    assert scaling.bytes_sent("zero2", 1000, 4, accumulation=8) == 0.75 * (8 * 2000 + 2000)
    assert scaling.bytes_sent("zero3", 1000, 4, accumulation=8) == 0.75 * 8 * (4000 + 2000)
    assert scaling.bytes_sent("fsdp2", 1000, 4, accumulation=8) == 0.75 * 8 * (4000 + 4000)


def test_traffic_between_machines_by_hand():
    """1,000 parameters on 16 cards of two machines, 8 micro-batches; a ring enters and leaves a machine once."""
    ways = {way.name: way for way in scaling.WAYS}
    assert scaling.bytes_exchanged(ways["ddp"], 1000, 16, 8) == (15 / 16 * 8000, 15 / 16 * 8000)
    assert scaling.bytes_exchanged(ways["ddp"], 1000, 8, 8) == (7 / 8 * 8000, 0)
    # Copies: shards within a machine in each micro-batch, and half of an all-reduce between two machines, once.
    assert scaling.bytes_exchanged(ways["hsdp"], 1000, 16, 8) == (7 / 8 * 8 * 8000, 1 / 2 * 8000)


def test_the_first_of_the_fastest_is_named():
    sent = {"ddp": 400.0, "zero1": 100.0, "fsdp2": 50.0}
    steps = [scaling.Step(way, 1, 0.0, 2.0, 1.0, sent[way.name]) for way in scaling.WAYS[:3]]
    assert scaling.fastest(steps, network=100.0).way.name == "zero1"  # 4, 2 and 2 seconds
    assert scaling.fastest(steps, network=1000.0).way.name == "ddp"  # all are bound by computing


def test_the_shapes_of_the_large_table_have_their_published_numbers_of_parameters():
    published = {"qwen2.5-32b": 32_763_876_352, "llama-3.1-70b": 70_553_706_496, "llama-2-13b": 13_015_864_320}
    for name, parameters in published.items():
        assert planned_model(*scaling.LARGE[name], 2048).num_parameters() == parameters


def tables_of(printed: str) -> list[str]:
    return [part.strip() for part in printed.split("\n\n") if part.startswith("| ")]


GUIDE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_the_tables_of_the_scaling_guide_are_the_scripts(capsys, monkeypatch):
    monkeypatch.setattr(scaling, "print_large", lambda: None)
    scaling.main([])
    tables = tables_of(capsys.readouterr().out)
    assert len(tables) == 3 and all(table in GUIDE for table in tables)
    model = planned_model(*scaling.LARGE["qwen2.5-0.5b"], 2048)
    assert scaling.large_row("qwen2.5-0.5b", model, 256) in GUIDE.splitlines()


@pytest.mark.heavy
def test_the_large_table_of_the_scaling_guide_is_the_scripts(capsys):
    scaling.print_large()
    [table] = tables_of(capsys.readouterr().out)
    assert table in GUIDE


def test_the_table_of_equivalence_is_the_one_that_was_measured():
    """Every row of the newest file; and the file has rows of the script's runs, in their order."""
    newest = max((ROOT / "benchmarks" / "results").glob("equivalence_cpu_*.csv"))
    with newest.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [head.replace(" ", "_") for head in equivalence.HEADS]
    for row in rows:
        assert f"| {' | '.join(row[name] for name in names)} |" in GUIDE
        assert int(row["killed_at_step"]) >= equivalence.KILLED_AT > int(row["continued_after"]) > 0
        assert float(row["loss_differs_by"]) < 2e-5 and float(row["norm_differs_by"]) < 1e-3
    measured = [(row["strategy"], int(row["processes"])) for row in rows]
    assert len(rows) > 20
    assert measured == [key for key in [(run.strategy, run.processes) for run in equivalence.RUNS] if key in measured]


def test_a_run_that_lacks_a_step_does_not_pass_for_an_equal_one():
    whole = {step: {"loss": 2.0} for step in range(1, equivalence.STEPS + 1)}
    assert equivalence.difference({**whole, 7: {"loss": 2.02}}, whole, "loss") == pytest.approx(0.01)
    with pytest.raises(RuntimeError, match="were logged, not 1 to 30"):
        equivalence.difference({step: entry for step, entry in whole.items() if step != 7}, whole, "loss")


@pytest.mark.heavy
def test_a_killed_run_of_the_equivalence_table_continues(capsys):
    equivalence.main(["--only", "one process", "fsdp2, checkpoints"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 2 and all(line.count("|") == 11 and "failed" not in line for line in lines)
