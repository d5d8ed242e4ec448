"""benchmarks/ladder.py without a GPU: its fit against a law that made the numbers."""

import importlib.util
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # as for a script there
spec = importlib.util.spec_from_file_location("ladder", ROOT / "benchmarks" / "ladder.py")
ladder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ladder)


def rows_of_a_law():
    """Runs whose bits are 0.6 + 0.8 / M^0.4 + 2.5 / MB^0.35, each also at a worse learning rate."""
    rows = []
    for size in (8, 16, 32, 64, 128):
        for megabytes in (50, 200, 800):
            bits = 0.6 + 0.8 / size**0.4 + 2.5 / megabytes**0.35
            run = {"size": f"{size}M", "tokens": megabytes * 10**6 // 4, "body": size * 1e6, "text": "made up"}
            run |= {"text_bytes": megabytes * 1e6, "passes": 1.0}
            rows += [{**run, "rate": 1.0, "bits_per_byte": bits}, {**run, "rate": 2.0, "bits_per_byte": bits + 0.05}]
    return rows


def test_the_fit_finds_the_law_that_made_the_runs():
    law, predicted = ladder.fit(rows_of_a_law())
    assert law.error < 0.003 and len(predicted) == 15
    assert (law.irreducible, law.alpha, law.beta) == pytest.approx((0.6, 0.4, 0.35), rel=0.05)
    assert law.bits_per_byte(256e6, 1600e6) == pytest.approx(0.6 + 0.8 / 256**0.4 + 2.5 / 1600**0.35, rel=0.005)


def test_too_few_runs_are_no_ladder():
    with pytest.raises(SystemExit, match="needs at least 6"):
        ladder.fit(rows_of_a_law()[:10])


def test_the_table_has_a_column_for_each_rate():
    bits = 0.6 + 0.8 / 8**0.4 + 2.5 / 50**0.35
    assert f"| 8M | 12.5M | {bits:.4f} | {bits + 0.05:.4f} |" in ladder.rates_table(rows_of_a_law())
