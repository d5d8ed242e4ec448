"""--plan --minutes: against measured runs, arithmetic by hand, and the command that it prints."""

import csv
import json
import math
import re
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from common.arguments import SharedArguments
from common.console import InputError
from common.model.scaling import BUNDLED_LAW, LossLaw, counted_bytes, in_short
from common.train.time_budget import (
    Candidate,
    Outcome,
    Speed,
    Text,
    candidates,
    outcome,
    speed_of_card,
    text_of,
    whole_rows,
)

RESULTS = ROOT / "benchmarks" / "results" / "ladder_h200_2026-11-30.csv"
LAW = LossLaw.read(str(BUNDLED_LAW))
HERE = SimpleNamespace(device=torch.device("cpu"))
H200 = speed_of_card("NVIDIA H200", HERE)
TEXT = Text(148.5e6)


def rows_of(commit: str) -> list[dict]:
    """The runs of a commit that were alone on an H200. The speeds were fitted on those of 03723a0."""
    with RESULTS.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["alone"] == "yes" and row["body"]]
    return [row for row in rows if row["commit"] == commit and row["run"] == "ladder.py"]


def of_recipe(**given) -> SharedArguments:
    """Return the arguments of the recipe, some of them as if they were given."""
    shared = SharedArguments(tokenizer="train", vocabulary_size=32_768, tokens_per_step=65_536, context_length=512)
    for name, value in given.items():
        setattr(shared, name, value)
    shared.given = given
    return shared


@pytest.fixture(scope="module")
def sizes(wiki) -> list[Candidate]:
    return candidates(wiki.MODEL, of_recipe())


def by_size(sizes: list[Candidate], minutes: float, law=LAW, speed=H200, text=TEXT) -> dict[str, Outcome]:
    return {size.target_parameters: outcome(size, minutes, law, speed, text) for size in sizes}


def best_of(found: dict[str, Outcome]) -> str:
    return min(found, key=lambda size: found[size].bits_per_byte)


def test_the_speeds_are_those_of_the_runs():
    rows = rows_of("03723a0")
    assert len(rows) == 5
    for row in rows:
        per_second, flops = float(row["tokens_per_second"]), float(row["tflops"]) * 1e12
        expected = H200.tokens_per_second(flops / per_second, int(row["tokens_per_step"]))
        assert expected == pytest.approx(per_second, rel=0.03), row["size"]


def test_runs_on_an_h200_are_forecast_from_their_time_alone(sizes):
    """42M, 66M and 103M at 45 seconds, of which 42M was the best, and 66M and 103M at three minutes."""
    found = by_size(sizes, 0.75)
    assert best_of(found) in ("26M", "32M", "42M")
    assert found["42M"].bits_per_byte < (1 + LAW.error) * found[best_of(found)].bits_per_byte
    runs = [row for row in rows_of("03723a0") if row["size"] in ("42M", "64M", "100M")]
    for row in [*runs, *rows_of("e528d21"), *rows_of("e217c9d")]:
        if int(row["tokens_per_step"]) < 20_000:
            continue
        own = by_size(sizes, float(row["seconds"]) / 60)[row["size"]]
        assert own.parameters == int(row["parameters"])
        assert own.tokens == pytest.approx(float(row["tokens"]), rel=0.05)
        assert own.passes == pytest.approx(float(row["passes"]), rel=0.05)
        assert own.bits_per_byte == pytest.approx(float(row["bits_per_byte"]), rel=0.02)
    assert best_of(by_size(sizes, 3)) == "64M"


def test_more_time_larger_models(sizes):
    named = [best_of(by_size(sizes, minutes)) for minutes in (0.25, 0.75, 3, 10)]
    assert named == sorted(named, key=lambda size: int(size[:-1]))


def test_passes_beyond_those_measured_buy_nothing(sizes):
    """103M reached 1.2602 after 7.9 passes in ten minutes, and 1.2345 after 2.7 in three. The law says 4% less."""
    found = by_size(sizes, 580 / 60)["100M"]
    assert found.passes > 7 and "0 to 3.88 passes" in found.measured
    longer = by_size(sizes, 580)["100M"]
    bits = LAW.irreducible + LAW.a / 103.043328**LAW.alpha + LAW.b / (counted_bytes(148.5e6, 3.8836) / 1e6) ** LAW.beta
    assert longer.bits_per_byte == pytest.approx(bits, rel=1e-4)
    assert 0.95 * 1.2602 < found.bits_per_byte < 1.2602


def test_an_outcome_by_hand(sizes):
    """A step of 100M: 0.5 s, and 65,536 tokens x 675 MFLOP at 100 TFLOP/s."""
    law = LossLaw(1.0, 2.0, 1.0, 3.0, 1.0, 10.0, 0.01, "a text", [1e6, 2e8], [1e6, 1e9], [100, 9999], 3)
    slow = Speed(100e12, 0.5, "a card")
    found = by_size(sizes, 10, law, slow, Text(50e6))["100M"]
    assert found.parameters == 103_043_328
    products = 103_043_328 - 12 * (2 * 768 + 2 * 64) - 768  # norms are no products; the head is the embedding
    seconds = 0.5 + 65_536 * (6 * products + 12 * 12 * 768 * 512) / 100e12
    steps = int(600 / seconds)
    assert (found.steps, found.tokens) == (steps, steps * 65_536)
    assert found.passes == pytest.approx(steps * 65_536 * 3.80 / 50e6)
    assert found.extrapolated and found.measured == "0 to 3 passes"
    bits = 1 + 2 / 103.043328 + 3 / (steps * 65_536 * 3.80 / 1e6) + 10 / steps**1.5
    trained = 50 * (1 + 15.4 * (1 - math.exp(-2 / 15.4)))  # MB: three passes count
    assert found.bits_per_byte == pytest.approx(1 + 2 / 103.043328 + 3 / trained + 10 / steps**1.5)
    unlimited = by_size(sizes, 10, law, slow, Text())["100M"]
    assert unlimited.passes == 1 and unlimited.bits_per_byte == pytest.approx(bits)
    limited = by_size(sizes, 10, law, slow, Text(50e6, most_tokens=1e6))["100M"]
    assert limited.passes == pytest.approx(steps * 65_536 / 1e6), "--max_data_tokens"


def test_what_the_law_says_decides(sizes):
    """If only parameters count, the largest is named; if only steps do, the smallest; if only bytes do, the fastest.

    16M reads the most bytes a second: 8M makes smaller steps, and has shorter tokens.
    """
    only = dict(a=0.0, b=0.0, c=0.0)
    for buys, size in ({"a": 1.0}, "350M"), ({"b": 1.0}, "16M"), ({"c": 1.0}, "8M"):
        assert best_of(by_size(sizes, 5, replace(LAW, **(only | buys)), H200, Text())) == size


def test_flags_of_the_command_line_count(wiki, tmp_path):
    (tmp_path / "one.txt").write_bytes(b"a" * 1000)
    (tmp_path / "two.txt.gz").write_bytes(b"a" * 100)
    given = of_recipe(vocabulary_size=8_192, tokens_per_step=16_384, data=[str(tmp_path / "*.*")])
    assert {size.tokens_per_step for size in candidates(wiki.MODEL, given)} == {16_384}
    assert text_of(given) == Text(1000 + 3 * 100)
    given.max_data_tokens = 5_000
    assert text_of(given) == Text(1300, 5_000)
    given.data = [str(tmp_path / "one.txt"), "owner/name"]
    assert text_of(given) == Text(None, 10_000) and text_of(of_recipe()) == Text()
    qwen2 = [size.target_parameters for size in candidates(wiki.MODEL, of_recipe(tokenizer="Qwen/Qwen2-0.5B"))]
    assert "8M" not in qwen2 and "100M" in qwen2, "of 8M, the embedding of 151,646 words leaves nothing"


def test_the_printed_command_is_that_of_the_size(wiki, tmp_path, capsys):
    text = tmp_path / "my text.jsonl"
    text.touch()
    with text.open("r+b") as file:
        file.truncate(148_534_493)
    flags = ["--data", str(text), "--learning_rate", "4e-3"]
    wiki.main(["--plan", "--minutes", "0.75", "--plan_card", "H200", "--plan_json", *flags])
    *_, command, figures = capsys.readouterr().out.splitlines()
    found = json.loads(figures)
    words = shlex.split(command)
    launcher = "accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/wiki_zh_scratch.py".split()
    chosen = ["--target_parameters", found["target_parameters"], "--max_steps", str(found["steps"])]
    assert words == [*launcher, *flags[:2], "--learning_rate", "0.004", *chosen]
    assert found["law_error"] == LAW.error and found["minutes"] == 0.75
    wiki.main([*words[5:], "--plan", "--plan_memory_gib", "140"])
    printed = capsys.readouterr().out
    assert f"{found['parameters']:,} parameters" in printed and "It fits 140 GiB" in printed


def test_the_command_of_rows_that_do_not_divide_the_rules_step_names_the_step(wiki, capsys):
    """Rows of 500 tokens: a launch refuses 32,768 tokens a step, and takes 64 rows of them."""
    wiki.main("--plan --minutes 3 --plan_card h200 --context_length 500 --packing best_fit".split())
    printed = capsys.readouterr().out
    words = shlex.split(printed.splitlines()[-1])
    assert int(words[words.index("--tokens_per_step") + 1]) % 500 == 0
    assert "of the recipe's own settings, without --context_length, --packing." in printed
    assert [whole_rows(8_192, length) for length in (512, 500, 16_384, 6_000)] == [8_192, 8_000, 16_384, 6_000]


def test_many_passes_over_little_text_are_said_in_numbers_to_read(wiki, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(b"a" * 260_000)
    wiki.main(["--plan", "--minutes", "10", "--plan_card", "H200", "--data", str(tmp_path / "text.txt")])
    printed = capsys.readouterr().out
    assert "10 minutes on one H200 (measured), about 0.26 MB of text:" in printed
    chosen = re.search(r"> .*? ([\d.]+) passes", printed)
    assert f"note: {float(chosen[1]):,.0f} passes over the same text. Those after the first 3.88 count" in printed
    assert "More text would help most. --target_parameters auto fits a model to so little." in printed
    assert in_short(999.6) == "1,000" and in_short(3.8836) == "3.88"


def test_another_card_is_said_to_be_assumed_and_fp16_gets_its_yaml(wiki, capsys):
    wiki.main(["--plan", "--minutes", "30", "--plan_card", "T4"])
    printed = capsys.readouterr().out
    assert "one T4 (assumed: 42% of its peak, as measured on an H200), text that is enough for one pass" in printed
    assert "accelerate_configs/fp16.yaml" in printed
    assert speed_of_card("NVIDIA H100 80GB HBM3", HERE).flops == H200.flops
    assert "assumed" not in H200.card


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--minutes 3", "--minutes 3: it would be ignored"),
        ("--plan_card H100", "--plan_card H100: it would be ignored"),
        ("--plan --minutes 0 --plan_card H100", "--minutes 0: must be 0.1 to 100,000"),
        ("--plan --minutes 1e9 --plan_card H100", "must be 0.1 to 100,000"),
        ("--plan --minutes 3 --plan_card H100 --tokens_per_step 100", "not whole rows of 512 tokens. .* 512"),
        ("--plan --minutes 3", "no accelerator here.*--plan_card H200.*--target_parameters auto"),
        ("--plan --minutes 3 --plan_card Foo", "speed of Foo is not known; known are .*H100"),
        ("--plan --minutes 3 --plan_card H100 --target_parameters 30M", "--target_parameters with --minutes"),
        ("--plan --minutes 3 --plan_card H100 --max_steps 10", "--max_steps with --minutes, which chooses it"),
        ("--plan --minutes 3 --plan_card H100 --plan_memory_gib 8", "--plan_memory_gib with --minutes, which plans"),
        ("--plan --probe --minutes 3 --plan_card H100", "--probe measures the card that is here"),
        ("--plan --minutes 3 --plan_card H100 --tokenizer train --vocabulary_size 9000000", "no size up to 350M has"),
        ("--plan --minutes 3 --plan_card H100 --data no/such.txt", "no/such.txt: no such file"),
        ("--plan --minutes 3 --plan_card H100 --ladder no.json", "--ladder no.json: not a fit.json"),
    ],
)
def test_what_would_be_ignored_or_is_not_known_is_one_line(wiki, flags, message):
    with pytest.raises(InputError) as error:
        wiki.main(flags.split())
    assert re.search(message, str(error.value)), error.value


def test_with_a_probe_the_measured_speed_counts(wiki, cache_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wiki, "MODEL", wiki.SAMPLE_MODEL)
    data = str(ROOT / "data" / "sample_zh.jsonl")
    flags = f"--plan --probe --minutes 100 --plan_json --data {data} --vocabulary_size 4096 --context_length 64"
    flags += " --tokens_per_step 256 --per_device_train_batch_size 4 --optimizer adamw --swanlab off"
    flags += f" --max_eval_rows 5 --cache_dir {cache_dir} --output_dir {tmp_path / 'out'}"
    wiki.main(flags.split())
    lines = capsys.readouterr().out.splitlines()
    probed, found = (json.loads(line) for line in lines if line.startswith("{"))
    flops = 6 * (4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768) + 4096 * 256) + 12 * 4 * 256 * 64
    speed = Speed(probed["tokens_per_second"] * flops, 0.0, "")
    given = of_recipe(vocabulary_size=4096, tokens_per_step=256, context_length=64)
    expected = by_size(candidates(wiki.SAMPLE_MODEL, given), 100, LAW, speed)[found["target_parameters"]]
    assert found["tokens_per_second"] == pytest.approx(expected.tokens_per_second, rel=0.01)
    assert found["extrapolated"] and "measured by the probe" in found["card"]
    assert not list((tmp_path / "out").glob("*"))
