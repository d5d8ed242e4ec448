"""The rules of a size, and the law of the ladder, against arithmetic by hand."""

import json
import math

import pytest

from common.arguments import SharedArguments
from common.console import InputError
from common.model.scaling import (
    BUNDLED_LAW,
    LossLaw,
    counted_bytes,
    defaults_for,
    learning_rates_for,
    passes_for,
    read_law,
    tokens_per_step_for,
    vocabulary_for,
)


@pytest.mark.parametrize(
    ("parameters", "vocabulary", "tokens_per_step"),
    [
        (8e6, 8_192, 16_384),
        (16e6, 16_384, 32_768),
        (42e6, 32_768, 32_768),
        (1e8, 32_768, 65_536),
        (4e8, 32_768, 131_072),
    ],
)
def test_vocabulary_and_batch_follow_from_the_size(parameters, vocabulary, tokens_per_step):
    assert vocabulary_for(parameters) == vocabulary
    assert tokens_per_step_for(parameters) == tokens_per_step


def test_learning_rates_grow_as_the_root_of_the_batch():
    assert learning_rates_for(65_536) == {"muon": 5e-3, "adamw": 1e-3}
    assert learning_rates_for(4 * 65_536) == {"muon": 1e-2, "adamw": 2e-3}
    assert learning_rates_for(32_768)["muon"] == pytest.approx(5e-3 / math.sqrt(2), rel=0.02)  # two digits
    assert learning_rates_for(512) == learning_rates_for(16_384) == {"muon": 2.5e-3, "adamw": 5e-4}


def test_passes_give_twenty_tokens_a_parameter_within_limits():
    assert passes_for(10e6, 50_000_000, 16_384) == 4
    assert passes_for(10e6, 1_000_000_000, 16_384) == 1
    assert passes_for(100e6, 1_000_000, 65_536) == 8


def test_later_passes_count_less_by_the_papers_formula():
    assert counted_bytes(100.0, 0.5) == 50
    assert counted_bytes(100.0, 1) == 100
    for passes in (2, 4, 16):  # equation 5 of arXiv 2305.16264, with repetitions = passes - 1
        assert counted_bytes(100.0, passes) == pytest.approx(100 + 100 * 15.4 * (1 - math.exp(-(passes - 1) / 15.4)))


def test_the_flags_of_a_size_say_whether_they_were_measured(capsys):
    found = defaults_for("30M")
    assert found["vocabulary_size"] == 16_384 and found["num_train_epochs"] == 0
    assert "extrapolated" not in capsys.readouterr().out
    defaults_for("1B")
    assert "this is extrapolated" in capsys.readouterr().out


def test_a_law_forecasts_by_its_formula_and_says_when_it_extrapolates():
    law = LossLaw(0.5, 2.0, 0.5, 3.0, 0.25, 8.0, 0.01, "a text", [1e6, 100e6], [1e6, 1e9], [2, 500], 2.0)
    found = law.forecast(4e6, 16e6, 1, 100)
    assert found["bits_per_byte"] == pytest.approx(0.5 + 2 / 2 + 3 / 2 + 8 / 1000)
    assert found["twice_the_parameters"] == pytest.approx(0.5 + 2 / 8**0.5 + 3 / 2 + 8 / 1000)
    assert found["twice_the_text"] == pytest.approx(0.5 + 1 + 3 / 32**0.25 + 8 / 200**1.5)
    assert found["twice_the_text"] < found["twice_the_passes"] < found["bits_per_byte"]
    assert not found["extrapolated"] and found["measured"] == ""
    outside = law.forecast(200e6, 16e6, 2.5, 1000)
    assert outside["extrapolated"]
    assert outside["measured"] == "1M to 100M parameters, 2 to 500 steps, 0 to 2 passes"


def test_passes_beyond_those_measured_count_as_nothing():
    law = LossLaw(0.5, 2.0, 0.5, 3.0, 0.25, 0.0, 0.01, "a text", [1e6, 100e6], [1e6, 1e9], [2, 500], 2.0)
    two = law.forecast(4e6, 16e6, 2, 100)
    assert law.forecast(4e6, 16e6, 9, 100)["bits_per_byte"] == two["bits_per_byte"] == two["twice_the_passes"]
    assert two["twice_the_text"] < two["bits_per_byte"]


def test_a_model_larger_than_its_text_makes_fewer_passes():
    """8 passes at most; with more parameters than the text has tokens 4, or what makes 1,600 steps of the run."""
    assert passes_for(90e6, 100_000_000, 65_536) == 8 and passes_for(110e6, 100_000_000, 65_536) == 4
    assert passes_for(103e6, 20_000_000, 65_536) == pytest.approx(1600 * 65_536 / 20e6)
    assert passes_for(103e6, 10_000_000, 65_536) == 8
    assert passes_for(103e6, 20_000_000, 32_768) == 4, "1,600 steps of --tokens_per_step 32768 are 2.6 passes"


def test_a_law_is_read_where_it_counts():
    plan, probe = SharedArguments(plan=True), SharedArguments(plan=True, probe=True)
    assert read_law(None, probe) is None
    assert read_law(None, plan, minutes=3) == read_law(str(BUNDLED_LAW), probe) == LossLaw.read(str(BUNDLED_LAW))
    with pytest.raises(InputError, match="--ladder .*: it would be ignored"):
        read_law(str(BUNDLED_LAW), plan)


def test_a_file_that_is_no_law_is_refused(tmp_path):
    for content in ("{}", "[1]", "no JSON", json.dumps({"irreducible": 1})):
        (tmp_path / "fit.json").write_text(content)
        with pytest.raises(InputError, match="not a fit.json"):
            LossLaw.read(str(tmp_path / "fit.json"))
