"""--plan: what it prints, what it advises, and that it loads nothing."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, small_run
from test_memory import model_of
from transformers import Trainer

from common.advice import advice
from common.memory import Setting
from common.messages import InputError
from common.plan import setting_of_yaml

CONFIGS = ROOT / "accelerate_configs"


def test_the_last_line_is_json_and_nothing_is_loaded(tmp_path):
    """With a tokenizer and data that do not exist."""
    flags = ["--plan", "--tokenizer", "no/such", "--data", "no/such", "--output_dir", str(tmp_path / "out")]
    where = ["--plan_config", str(CONFIGS / "zero2.yaml"), "--plan_processes", "8", "--plan_memory_gib", "80"]
    command = [sys.executable, str(ROOT / "recipes" / "wiki_zh_scratch.py"), *flags, *where]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout.splitlines()[-1])
    names = {"parameters_gib", "gradients_gib", "optimizer_gib", "activations_gib", "logits_gib", "framework_gib"}
    assert set(planned) == names | {"fits", "total_gib"}
    assert planned["fits"] is True
    assert planned["total_gib"] == pytest.approx(sum(planned[name] for name in names), abs=0.01)
    assert planned["parameters_gib"] == pytest.approx(2 * 123_295_232 / 2**30, abs=0.001)
    assert "zero2 on 8 card(s), 16 rows of 512 tokens" in done.stdout
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_gets_switches_that_make_it_fit(wiki, capsys):
    wiki.main(["--plan", "--plan_config", str(CONFIGS / "single_gpu.yaml"), "--plan_memory_gib", "6"])
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["fits"] is False
    assert "the cheapest first:\n  --per_device_train_batch_size 16\n{" in printed


YAMLS, ROWS = "accelerate_configs/", "--per_device_train_batch_size "


@pytest.mark.parametrize(
    ("name", "processes", "limit", "expected"),
    [
        ("0.5B", 1, 40, [ROWS + "8"]),  # half of 41.7 GiB that are activations and 9.5 that stay
        ("7B", 8, 60, [ROWS + "4", YAMLS + "zero2.yaml"]),
        ("7B", 8, 30, [YAMLS + "fsdp2.yaml", ROWS + "2"]),
        ("7B", 1, 80, [ROWS + "1", "--gradient_checkpointing true: activations are computed twice"]),
        ("7B", 1, 50, [ROWS + "1", "--gradient_checkpointing true", "--optimizer adamw --optim adamw_8bit"]),
    ],
)
def test_the_advice_is_the_cheapest_that_fits(name, processes, limit, expected):
    found = advice(model_of(name), Setting(16, 2048, processes=processes), limit)
    assert len(found) == len(expected)
    assert all(switch.startswith(start) for switch, start in zip(found, expected, strict=True))


def test_a_trained_tokenizer_has_the_vocabulary_that_was_asked_for(wiki, capsys):
    wiki.main(["--sample", "--plan"])
    assert "vocabulary of 4,096 rows" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--plan_processes", "--context_length", "--per_device_train_batch_size"])
def test_numbers_below_one_are_refused(wiki, flag):
    with pytest.raises(InputError, match=f"{flag} 0: must be at least 1"):
        wiki.main(["--plan", flag, "0"])


def test_no_advice_where_nothing_helps():
    assert advice(model_of("7B"), Setting(1, 4096), 4) == []


@pytest.mark.parametrize(
    ("config", "strategy"), [("cpu", "single"), ("ddp", "ddp"), ("zero2", "zero2"), ("fsdp2", "fsdp2")]
)
def test_every_yaml_is_understood(config, strategy):
    setting = setting_of_yaml(str(CONFIGS / f"{config}.yaml"), Setting(4, 512, optimizer="muon"))
    assert setting.strategy == strategy
    assert setting.compiled == (config != "cpu")
    assert setting.optimizer == ("adamw" if config == "zero2" else "muon")


@pytest.mark.parametrize("content", [None, "just text", "a: [", "distributed_type: TPU"])
def test_a_yaml_that_is_none_is_one_clear_error(tmp_path, content):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match="--plan_config .*config.yaml: "):
        setting_of_yaml(str(path), Setting(4, 512))


def test_the_probe_trains_three_steps_and_keeps_nothing(wiki, cache_dir, tmp_path, capsys):
    flags = small_run(cache_dir, tmp_path / "out", "--plan", "--probe", "--max_steps", "100")
    wiki.main(flags)
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert "step 3/100" in printed and "step 4/100" not in printed
    assert found["hours"] == pytest.approx(100 * 256 / found["tokens_per_second"] / 3600, rel=0.05, abs=1e-4)
    assert 0 < found["passes"] < 1 and found["peak_gib"] > 0 and found["predicted_gib"] > 0
    assert not list((tmp_path / "out").glob("*"))


def test_running_out_of_memory_ends_in_advice(wiki, cache_dir, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(Trainer, "training_step", full)
    with pytest.raises(InputError) as error:
        wiki.main(small_run(cache_dir, tmp_path))
    assert str(error.value).startswith("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.\nPredicted: ")
    assert "4 rows of 64 tokens" in str(error.value)
