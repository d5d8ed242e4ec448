"""Sizes by name and by number."""

import json

import pytest
from transformers import AutoConfig

from common.arguments import SharedArguments
from common.console import InputError
from common.model.from_config import planned_model
from common.model.presets import (
    PRESETS,
    ModelSize,
    PretrainedSize,
    parameter_count,
    shape_of_config,
    shape_with,
)

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


def test_gpt3_has_the_parameters_of_its_paper():
    """12 d^2 a layer for the matrices, 13 d for biases and norms; embeddings of tokens and positions; the last norm."""
    built = planned_model(PRESETS["gpt3-6.7b"], 50_257, 2048)
    assert built.num_parameters() == 32 * (12 * 4096**2 + 13 * 4096) + (50_304 + 2048) * 4096 + 2 * 4096


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


def test_the_size_of_a_run_is_printed_once_for_each_vocabulary(capsys):
    size = ModelSize(QWEN2, None, "32M", SharedArguments(tokenizer="train", vocabulary_size=8192))
    size.planned(context_length=32)
    assert size.shape(8192)["model_type"] == "qwen2"
    assert capsys.readouterr().out.count("size: ") == 1
    size.shape(8064)  # a small text: the tokenizer has fewer tokens than were asked for
    assert capsys.readouterr().out.count("size: ") == 1


def test_the_recipes_own_shape_is_found_again():
    """123M was chosen by hand in the tutorial; of that size ours is as deep and as wide within a step."""
    shape = shape_with(123_295_232, QWEN2, 151_680)
    assert abs(shape["hidden_size"] - 512) <= 64


@pytest.mark.parametrize(
    ("model", "target", "message"),
    [
        ("qwen2.5-0.5b", "1B", "Leave one out"),
        ("qwen9-1b", None, "not a folder, not an id like owner/name, and not of swanlab-wiki, smollm2-135m"),
        (None, "many", "many: not a number. Write it as 30M, .* or auto; K, M"),
        (None, "-5M", "--target_parameters -5M: must be at least 1"),
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


def test_a_familys_own_padding_token_may_be_beyond_the_vocabulary():
    """GLM's is 151,329. The embedding has as many rows as the tokenizer needs all the same."""
    glm = dict(model_type="glm", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    built = planned_model(glm | dict(num_key_value_heads=2, head_dim=16), 1000, 64)
    assert built.get_input_embeddings().weight.shape == (1024, 64)


def test_the_recipes_own_shape_is_built_without_flags():
    assert shape_of(None, None, 1000) == QWEN2


@pytest.mark.parametrize(
    ("tokenizer", "target", "guessed", "embedding_rows"),
    [
        ("Qwen/Qwen2-0.5B", None, False, 151_680),  # its 151,646 tokens, in whole multiples of 128
        ("train", None, False, 5120),  # of --vocabulary_size 5000
        ("my/own", None, True, 151_680),
        ("my/own", "120M", True, None),  # the shape depends on the vocabulary
    ],
)
def test_the_size_is_known_before_a_tokenizer_is_loaded_if_its_vocabulary_is(
    tokenizer, target, guessed, embedding_rows, capsys
):
    size = ModelSize(QWEN2, None, target, SharedArguments(tokenizer=tokenizer, vocabulary_size=5000))
    assert size.guessed is guessed
    planned = size.planned(512)
    if embedding_rows is None:
        assert planned is None
    else:
        assert planned.get_input_embeddings().weight.shape == (embedding_rows, 512)
        assert planned.get_input_embeddings().weight.is_meta
    capsys.readouterr()
    assert size.planned(512, for_plan=True) is not None
    assert (f"{tokenizer} is not loaded for a plan" in capsys.readouterr().out) is guessed


def test_published_weights_have_a_known_size_and_others_on_a_hub_do_not(tmp_path):
    assert PretrainedSize("Qwen/Qwen2.5-0.5B").planned(512).num_parameters() == 494_032_768
    assert PretrainedSize("owner/not-fetched").planned(512) is None
    AutoConfig.for_model(**QWEN2, vocab_size=777).save_pretrained(tmp_path)
    assert PretrainedSize(str(tmp_path)).planned(512).config.vocab_size == 777


@pytest.mark.parametrize(("given", "wanted"), [({}, 32), ({"context_length": 512}, 512)])
def test_the_rows_are_no_longer_than_the_model_in_a_folder_has_positions(given, wanted, tmp_path, capsys):
    """Unless the command line says how long: that is refused later, and not changed."""
    AutoConfig.for_model(**QWEN2, max_position_embeddings=32).save_pretrained(tmp_path)
    shared = SharedArguments(context_length=512)
    shared.given = given
    for model in (str(tmp_path), "Qwen/Qwen2.5-0.5B", str(tmp_path / "none")):
        PretrainedSize(model).shorten_rows(shared)
        assert shared.context_length == wanted
    assert ("note: rows of 32 tokens, not 512" in capsys.readouterr().out) is (not given)


def folder_of(tmp_path, **config) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(tmp_path)


SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
CODE = {"AutoConfig": "configuration.Config"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(model_type="mamba2", hidden_size=64, num_heads=8, head_dim=16), "mamba2 has no attention heads"),
        (dict(model_type="rwkv", hidden_size=64), "rwkv has no attention heads"),
        (
            dict(model_type="qwen2", **SMALL | dict(hidden_size=64.0)),
            "read .TypeError: Field 'hidden_size' expected int, got float",
        ),
        (dict(model_type="qwen2", num_key_value_heads=3, **SMALL), "4 attention heads are not a multiple of 3"),
        (dict(model_type="qwen2", **SMALL | dict(num_hidden_layers=0)), "qwen2: 0 layers. Write 1 or more"),
        (dict(model_type="llama", **SMALL | dict(num_hidden_layers=-1)), "llama: -1 layers. Write 1 or more"),
        (dict(model_type="qwen2", attention_dropout=2.0, **SMALL), "attention_dropout 2.0: must be at least 0, and"),
        (dict(model_type="llama", hidden_act="nonsense", **SMALL), "^hidden_act nonsense: .* knows .*gelu, .*silu, "),
        (
            dict(model_type="llama", rope_scaling=dict(rope_type="far", factor=2.0), **SMALL),
            "rope_type far: .*default, li",
        ),
        (
            dict(model_type="llama", rope_scaling=dict(type="far", factor=2.0), **SMALL),
            "^rope_.*type far: .*, yarn, .*the config",
        ),
        (
            dict(model_type="llama", rope_parameters=dict(rope_type=None), **SMALL),
            "^rope_.*type None: .*knows default, ",
        ),
        (dict(model_type="llama", rope_scaling=dict(type="linear"), **SMALL), "Missing required keys .*'factor'"),
        (dict(model_type="qwen2", layer_types=["odd"] * 2, **SMALL), "layer_types odd: .* full_attention, sliding_att"),
        (dict(model_type="qwen2", layer_types=["full_attention"], **SMALL), "num_hidden_layers. .2. must be equal to"),
        (dict(model_type="qwen22", **SMALL), "model_type qwen22: .* does not know it. It knows .*qwen2.* and others"),
        (dict(model_type="t5", d_model=64), "model_type t5: transformers has no causal language model"),
        (dict(model_type="vit", hidden_size=64), "model_type vit: transformers has no causal language model"),
        (dict(model_type="qwen", auto_map=CODE), "custom code.* Qwen 1 is Qwen2 .*convert_weights.py"),
        (dict(model_type="chatglm", auto_map=CODE), "ChatGLM 2 and 3 are GLM .*convert_weights.py"),
        (dict(model_type="baichuan", auto_map=CODE), "Baichuan 7B .* is Llama .*convert_weights.py"),
        (dict(model_type="yuan", auto_map=CODE), "Yuan 2 has no place"),
        (dict(model_type="minimind", auto_map=CODE), "MiniMind has no place .*convert_model"),
        (dict(model_type="telechat", auto_map=CODE), "transformers has no place for telechat"),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else None,
)
def test_a_config_that_cannot_train_is_refused_before_anything_is_tokenized(tmp_path, config, message):
    shared = SharedArguments(tokenizer="train", vocabulary_size=300)
    size = ModelSize(QWEN2, folder_of(tmp_path, **config), None, shared)
    with pytest.raises(InputError, match=message) as refused:
        size.planned(context_length=32)
    assert "\n" not in str(refused.value)


def test_of_a_config_with_a_sub_config_its_text_model_is_taken(tmp_path, capsys):
    text = dict(model_type="gemma3_text", head_dim=16, vocab_size=4096, num_key_value_heads=2, **SMALL)
    vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=28)
    folder = folder_of(tmp_path, model_type="gemma3", text_config=text, vision_config=vision | dict(patch_size=14))
    model = planned_model(shape_of(folder, None, 500), 500, context_length=32)
    assert "its text model alone is built and trained: gemma3_text" in capsys.readouterr().out
    size = ModelSize(QWEN2, folder, None, SharedArguments())
    size.planned(context_length=32)
    assert size.shape(500)["model_type"] == "gemma3_text"
    assert capsys.readouterr().out.count("its text model alone") == 1, "of a run that plans it and then builds it"
    assert model.get_input_embeddings().weight.shape == (512, 64) and model.config.max_position_embeddings == 32
    assert not [name for name, _ in model.named_parameters() if "vision" in name]
    with pytest.raises(InputError, match="gemma3 is more than a language model.* model_type gemma3_text"):
        planned_model(dict(model_type="gemma3", text_config=text), 500, context_length=32)
    with pytest.raises(InputError, match="gemma3 is more than a language model"):
        PretrainedSize(folder).planned(context_length=32)
