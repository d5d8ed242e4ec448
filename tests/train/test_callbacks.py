"""What a run shows while it goes on: a bar in a terminal, plain lines elsewhere."""

import json
import math
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, small_run
from terminal import said_in_terminal
from transformers import TrainerControl

from common.model.attention import set_attention
from common.model.from_config import keep_residual_in_bf16, planned_model
from common.model.fused_loss import use_fused_loss
from common.train import callbacks
from common.train.callbacks import SampleCallback, bar_text, on_one_line
from common.train.metrics import Stopwatch

LOGS = {"loss": 3.14159, "tokens_per_second_per_device": 451_000.0, "memory_peak_gib": 11.04, "mfu": 0.355}


def test_what_stands_behind_the_bar():
    assert bar_text(LOGS, 1.9114) == "loss 3.142, 1.911 bits/byte, 451,000 tokens/s/device, 36% MFU, 11.0 GiB"
    whole = bar_text(LOGS, 1.9114)
    for room, kept in ((71, 71), (70, 61), (60, 52), (40, 27), (12, 10), (5, 10)):  # whole parts, and always the loss
        assert bar_text(LOGS, 1.9114, room) == whole[:kept]
    without = {name: value for name, value in LOGS.items() if name != "mfu"}
    assert bar_text(without, math.nan) == "loss 3.142, 451,000 tokens/s/device, 11.0 GiB"


def test_a_sample_is_one_line_with_the_letters_as_they_are():
    """The ideographic space begins each paragraph of a Chinese novel; an escape sequence acts on no terminal."""
    assert on_one_line("\u3000\u3000第一章\n'它'\t说\x1b[2J") == "\u3000\u3000第一章\\n'它'\\t说\\x1b[2J"


def test_the_time_left_does_not_count_the_first_step(monkeypatch, capsys):
    """By hand: a first step of 20 s, then 2 s each. Of 10 steps, 7 are left after the third: 14 s."""
    now = [1000.0]
    monkeypatch.setattr(callbacks.time, "time", lambda: now[0])
    monkeypatch.setattr(callbacks, "shows_bars", lambda: False)
    screen, args = callbacks.ScreenCallback(), SimpleNamespace(disable_tqdm=True)
    state = SimpleNamespace(global_step=0, max_steps=10, is_world_process_zero=True)
    screen.on_train_begin(args, state, None)
    logs = LOGS | {"learning_rate": 1e-3, "tokens_seen": 1, "tflops_per_device": 1.0, "memory_allocated_gib": 1.0}
    for seconds in (20, 2, 2):
        now[0] += seconds
        state.global_step += 1
        screen.on_step_end(args, state, None)
        screen.on_log(args, state, None, logs)
    assert [line.rpartition("left ")[2] for line in capsys.readouterr().out.splitlines()] == ["?", "0:00:16", "0:00:14"]


def shown(cache_dir, tmp_path, columns: int | None) -> str:
    """Return what a run prints; ``columns``: of its terminal, None for a pipe."""
    flags = [flag for flag in small_run(cache_dir, tmp_path) if flag not in ("--disable_tqdm", "true")]
    command = [sys.executable, str(ROOT / "recipes" / "wiki_zh_scratch.py"), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if columns is None:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr
    return said_in_terminal(command, columns, environment)


def test_a_pipe_gets_plain_lines_and_no_bars_of_training(cache_dir, tmp_path):
    text = shown(cache_dir, tmp_path, None)
    assert text.count("\nstep ") == 6 and "held out   step 3" in text
    assert "it/s" not in text and "Writing model shards" not in text and "gemm_4bit" not in text


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("columns", [pytest.param(160, marks=pytest.mark.heavy), 50])
def test_a_terminal_gets_one_bar_with_the_figures_that_fit(cache_dir, tmp_path, columns):
    text = shown(cache_dir, tmp_path, columns)
    assert "]the first step took" not in text, "messages stand above the bar"
    bars = [part for part in re.split(r"[\r\n]", text.replace("\x1b[A", "")) if re.search(r"\d/6, [\d:?]+ left", part)]
    assert all(len(part) <= columns and ("|" in part) == (columns == 160) for part in bars), bars
    assert any("6/6" in part and "loss" in part for part in bars)
    assert ("GiB" in bars[-1]) == (columns == 160) and "bits/byte" in bars[-1]
    assert "\nstep " not in text and "Writing model shards" not in text and "held out   step 3" in text


def early_steps(eval_steps: int, max_steps: int, monkeypatch, **changes) -> tuple[list[int], Stopwatch]:
    """Return the steps of a run after which a text is generated, before any evaluation; each takes 10 ms."""
    interval, sampled = Stopwatch(), []
    callback = SampleCallback(None, None, None, ["first", "second"], interval)

    def sample(_, args, state, model, prompts):
        time.sleep(0.01)
        sampled.append(state.global_step)
        assert prompts == ["first"]

    monkeypatch.setattr(SampleCallback, "_sample", sample)
    args = SimpleNamespace(eval_strategy="steps", **changes)
    for step in range(1, max_steps + 1):
        state = SimpleNamespace(global_step=step, eval_steps=eval_steps, max_steps=max_steps)
        callback.on_step_end(args, state, TrainerControl())
    return sampled, interval


def test_the_first_texts_come_early_and_do_not_count_as_training(monkeypatch):
    steps, interval = early_steps(200, 300, monkeypatch)
    assert steps == [25, 50, 100] and 0.03 <= interval.paused_seconds < 3
    assert early_steps(3, 6, monkeypatch)[0] == [1]
    assert early_steps(500, 40, monkeypatch)[0] == [5, 10, 20], "the only evaluation is at the end"
    assert early_steps(1, 6, monkeypatch)[0] == []


def test_early_texts_are_kept_and_change_no_loss(wiki, cache_dir, tmp_path, monkeypatch):
    wiki.main(small_run(cache_dir, tmp_path / "with"))
    monkeypatch.setattr(callbacks, "EARLY_SAMPLES", ())
    wiki.main(small_run(cache_dir, tmp_path / "without"))
    steps, losses = [], []
    for name in ("with", "without"):
        lines = (tmp_path / name / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        steps.append([json.loads(line)["step"] for line in lines])
        history = json.loads((tmp_path / name / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        losses.append([entry.get("loss", entry.get("eval_loss")) for entry in history])
    assert steps == [[1, 3, 3, 3, 6, 6, 6], [3, 3, 3, 6, 6, 6]] and losses[0] == losses[1]


class WithNumbers:
    """A tokenizer whose text is the numbers of its ids."""

    def __call__(self, text: str, **_) -> dict:
        return {"input_ids": [5, 6, 7]}

    def decode(self, ids: torch.Tensor, **_) -> str:
        return str(ids.tolist())


def test_a_sample_compiles_nothing_nor_does_the_step_after_it():
    """A layer for each new length would be compiled, and the training's layers again."""
    compiled = []

    def counted(graph, inputs):
        compiled.append(graph)
        return graph.forward

    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=32)
    model = planned_model(dict(model_type="qwen3", num_key_value_heads=1, **shape), 512, 32).to_empty(device="cpu")
    model.init_weights()
    set_attention(model, "auto", False, torch.device("cpu"))
    use_fused_loss(model)
    keep_residual_in_bf16(model)
    for layer in model.model.layers:
        layer.compile(backend=counted)
    tokenizer = WithNumbers()
    counts, texts = [], []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            ids = torch.randint(1, 512, (2, 32))
            model.train()
            model(input_ids=ids, labels=ids, shift_labels=ids).loss.backward()
            counts.append(len(compiled))
            texts += callbacks.generate_samples(model, tokenizer, ["x"], 1, torch.device("cpu"))
        counts.append(len(compiled))
    assert counts[0] > 0 and set(counts) == {counts[0]} and texts[0]
