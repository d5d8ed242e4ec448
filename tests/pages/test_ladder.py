"""benchmarks/ladder.py without a GPU: its fit against a law that made the numbers."""

import csv
import dataclasses
import importlib.util
import sys

import pytest
from conftest import ROOT

from common.model.scaling import BUNDLED_LAW, LossLaw

sys.path.insert(0, str(ROOT / "benchmarks"))  # as for a script there
spec = importlib.util.spec_from_file_location("ladder", ROOT / "benchmarks" / "ladder.py")
ladder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ladder)


def bits_of(size: float, megabytes: float, steps: float) -> float:
    return 0.6 + 0.8 / size**0.4 + 2.5 / megabytes**0.35 + 500 / steps**1.5


def rows_of_a_law():
    """Runs of a law, each also at a worse learning rate. The large ones make half as many steps."""
    rows = []
    for size in (8, 16, 32, 64, 128):
        for megabytes in (50, 200, 800):
            tokens, tokens_per_step = megabytes * 10**6 // 4, 32_768 if size < 50 else 65_536
            bits = bits_of(size, megabytes, tokens / tokens_per_step)
            run = {"size": f"{size}M", "tokens": tokens, "parameters": size * 1e6, "text": "made up"}
            run |= {"text_bytes": megabytes * 1e6, "passes": 1.0, "tokens_per_step": tokens_per_step}
            rows += [{**run, "rate": 1.0, "bits_per_byte": bits}, {**run, "rate": 2.0, "bits_per_byte": bits + 0.05}]
    return rows


def test_the_fit_finds_the_law_that_made_the_runs():
    law, predicted = ladder.fit(rows_of_a_law())
    assert law.error < 0.001 and len(predicted) == 15
    found = (law.irreducible, law.a, law.alpha, law.b, law.beta, law.c)
    assert found == pytest.approx((0.6, 0.8, 0.4, 2.5, 0.35, 500), rel=0.002)
    assert law.bits_per_byte(256e6, 1600e6, 3000) == pytest.approx(bits_of(256, 1600, 3000), rel=0.001)
    assert (law.parameters, law.trained, law.most_passes) == ([8e6, 128e6], [50e6, 800e6], 1)
    assert law.steps == pytest.approx([12.5e6 / 65_536, 200e6 / 32_768])


def test_too_few_runs_are_no_ladder():
    with pytest.raises(SystemExit, match="needs at least 8"):
        ladder.fit(rows_of_a_law()[:14])


def test_a_run_with_other_settings_is_another_run():
    plain = {"size": "8M", "tokens": 16e6, "rate": 1.0}
    changed = plain | {"change": {"weight_decay": 0.3}}
    rows = [each | {"wanted": each} for each in (plain, changed)]
    assert [[ladder.is_made(each, row) for row in rows] for each in (plain, changed)] == [[True, False], [False, True]]


def test_the_law_that_comes_with_the_project_is_the_fit_of_its_rows():
    """Each is predicted by all others. The run of ten minutes has too many passes, and is not among them."""
    results = ROOT / "benchmarks" / "results"
    with (results / "ladder_h200_2026-11-30.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["rate"]]  # neither the tutorial nor its model
    numbers = ("rate", "parameters", "tokens", "tokens_per_step", "passes", "text_bytes", "bits_per_byte")
    rows = [row | {name: float(row[name]) for name in numbers} | {"text": "a text"} for row in rows]
    law, predicted = ladder.fit(rows)
    bundled = LossLaw.read(str(BUNDLED_LAW))
    assert dataclasses.replace(law, text=bundled.text) == bundled
    missed = [abs(row["predicted"] / row["bits_per_byte"] - 1) for row in predicted]
    assert len(missed) == 17 and max(missed) < 0.035
    assert max(row["tokens"] for row in rows) == 308_019_200 and max(row["passes"] for row in predicted) < 4


def test_the_table_has_a_column_for_each_rate():
    bits = bits_of(8, 50, 12.5e6 / 32_768)
    assert f"| 8M | 12.5M | {bits:.4f} | {bits + 0.05:.4f} |" in ladder.rates_table(rows_of_a_law())
