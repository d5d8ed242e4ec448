"""Sizes by name and by number."""

import pytest
from transformers import AutoConfig

from common.arguments import SharedArguments
from common.console import InputError
from common.model.from_config import planned_model
from common.model.presets import PRESETS, ModelSize, parameter_count, shape_of_config, shape_with

QWEN2 = dict(
    model_type="qwen2", hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


def shape_of(model: str | None, target_parameters: str | None, vocabulary_size: int) -> dict:
    """Return the shape that a recipe builds whose own is QWEN2."""
    return ModelSize(QWEN2, model, target_parameters, SharedArguments()).shape(vocabulary_size)


@pytest.mark.parametrize(
    ("name", "vocabulary_rows", "published"),
    [  # parameters of the published checkpoints
        ("smollm2-135m", 49_152, 134_515_008),
        ("qwen2.5-0.5b", 151_936, 494_032_768),
        ("qwen2.5-1.5b", 151_936, 1_543_714_304),
        ("qwen2.5-3b", 151_936, 3_085_938_688),
        ("qwen2.5-7b", 152_064, 7_615_616_512),
        ("llama-2-7b", 32_000, 6_738_415_616),
    ],
)
def test_presets_are_the_models_they_are_named_after(name, vocabulary_rows, published):
    shape = shape_of(name.upper(), None, vocabulary_rows)
    assert shape == PRESETS[name]
    assert planned_model(shape, vocabulary_rows, 512).num_parameters() == published


@pytest.mark.parametrize("target", ["30M", "120M", "0.35B", "1.3B", "7b"])
def test_a_number_gives_a_sensible_shape_of_about_that_size(target, capsys):
    vocabulary_rows = 32_000 if target == "30M" else 151_680
    shape = shape_of(None, target, vocabulary_rows)
    count = planned_model(shape, vocabulary_rows, 512).num_parameters()
    assert count == pytest.approx(parameter_count(target), rel=0.05)
    assert 40 <= shape["hidden_size"] / shape["num_hidden_layers"] <= 130
    assert shape["hidden_size"] == 64 * shape["num_attention_heads"]
    assert shape["num_attention_heads"] % shape["num_key_value_heads"] == 0
    embedding = vocabulary_rows * shape["hidden_size"]
    assert (
        f"size: {count:,} parameters = {embedding:,} embedding + {count - embedding:,} others"
        in capsys.readouterr().out
    )


def test_the_recipes_own_shape_is_found_again():
    """123M was chosen by hand in the tutorial; of that size ours is as deep and as wide within a step."""
    shape = shape_with(123_295_232, QWEN2, 151_680)
    assert abs(shape["hidden_size"] - 512) <= 64


@pytest.mark.parametrize(
    ("model", "target", "message"),
    [
        ("qwen2.5-0.5b", "1B", "Leave one out"),
        ("qwen9-1b", None, "not a folder, not an id like owner/name, and not of smollm2-135m, qwen2.5-0.5b"),
        (None, "many", "not a number such as 120M"),
        (None, "-5M", "not a number"),
        (None, "1M", "the nearest has"),
    ],
)
def test_what_cannot_be_is_refused(model, target, message):
    with pytest.raises(InputError, match=message):
        shape_of(model, target, 151_680)


def test_a_family_with_other_names_for_its_sizes_is_refused():
    with pytest.raises(InputError, match="does not name its sizes as Llama"):
        shape_with(10**8, dict(model_type="gpt2", n_embd=768), 50_257)


def test_a_folder_with_a_damaged_config_is_one_clear_error(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="has no config that transformers can read"):
        shape_of(str(tmp_path), None, 1000)


def test_a_local_config_gives_its_shape_but_not_its_vocabulary(tmp_path):
    AutoConfig.for_model(**QWEN2, vocab_size=777, max_position_embeddings=99, rope_theta=5e5).save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path), None, 1000)
    assert not {"vocab_size", "max_position_embeddings", "transformers_version", "architectures"} & shape.keys()
    built = planned_model(shape, 1000, 64)
    assert built.config.vocab_size == 1024 and built.config.max_position_embeddings == 64
    assert built.num_parameters() == planned_model(QWEN2, 1000, 64).num_parameters()
    assert shape_of_config(built.config) == shape
