"""Pretrained weights: which are loaded, which are refused, and how a run may start."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from common.console import InputError
from common.model.presets import shape_named
from common.model.pretrained import (
    check_start,
    find_model,
    model_without_memory,
    pretrained_model,
    random_model,
    weights_fingerprint,
)
from common.tokens.tokenizer import load_tokenizer
from common.tokens.train_tokenizer import train_tokenizer

SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
TEXT = "The outer shell of the Earth is broken into a set of rigid pieces that move slowly over weaker rock."


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 5, 300)


@pytest.fixture
def folder(tokenizer, tmp_path) -> Path:
    """A model saved like Qwen's: in bf16, tied, with the end token as padding token."""
    torch.manual_seed(1)
    end = tokenizer.eos_token_id
    config = Qwen2Config(
        vocab_size=384,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=end,
        pad_token_id=end,
        **SHAPE,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    torch.nn.init.normal_(model.get_input_embeddings().weight)  # transformers has set that of the padding token to 0
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_the_weights_are_those_of_the_file_in_float32(folder, tokenizer):
    model = pretrained_model(str(folder), tokenizer, 64)
    stored = load_file(folder / "model.safetensors")
    loaded = dict(model.named_parameters())
    assert loaded.keys() == stored.keys() and len(stored) == 2 * 12 + 2
    for name, tensor in stored.items():
        assert loaded[name].dtype == torch.float32 and torch.equal(loaded[name], tensor.float()), name


def test_the_end_token_is_trained_though_it_is_the_padding_token(folder, tokenizer):
    """Untied, because in a tied model the row gets a gradient from the head anyway."""
    edit(folder / "config.json", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    model = pretrained_model(str(folder), tokenizer, 64)
    row = torch.tensor([[tokenizer.eos_token_id, 5, 6, 7]])
    model(row, labels=row).loss.backward()
    assert model.get_input_embeddings().weight.grad[tokenizer.eos_token_id].abs().sum() > 0


def test_a_random_model_needs_only_the_config(folder, tokenizer):
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    model = random_model(find_model(str(folder), weights=False), tokenizer, 64)
    parameters = dict(model.named_parameters())
    assert {name: tensor.shape for name, tensor in parameters.items()} == {n: t.shape for n, t in stored.items()}
    assert {tensor.dtype for tensor in parameters.values()} == {torch.float32}
    matrix = "model.layers.0.mlp.up_proj.weight"
    assert parameters[matrix].std().item() == pytest.approx(0.02, rel=0.1)  # Qwen2's initializer_range
    assert not torch.allclose(parameters[matrix], stored[matrix].float(), atol=1e-3)
    with pytest.raises(InputError, match="not a causal language model that transformers can load"):
        pretrained_model(str(folder), tokenizer, 64)


def test_weights_that_are_not_in_the_file_are_refused_by_name(folder, tokenizer):
    weights = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in weights.items() if ".1.mlp." not in n}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"3 tensors of Qwen2ForCausalLM are not in it .*layers\.1\.mlp\.down_proj"):
        pretrained_model(str(folder), tokenizer, 64)


def test_weights_under_other_names_are_refused(folder, tokenizer):
    """A model that was saved inside a wrapper: transformers would start all weights at random."""
    weights = load_file(folder / "model.safetensors")
    save_file({f"module.wrapped.{name}": tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"\d\d tensors of Qwen2ForCausalLM are not in it"):
        pretrained_model(str(folder), tokenizer, 64)


def test_superfluous_weights_are_named(folder, tokenizer, capsys):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"value_head.weight": torch.ones(2)}, folder / "model.safetensors")
    pretrained_model(str(folder), tokenizer, 64)
    assert "has no place for, left out: value_head.weight" in capsys.readouterr().out


def test_weights_of_another_shape_are_refused(folder, tokenizer):
    edit(folder / "config.json", intermediate_size=96)
    with pytest.raises(InputError, match="not a causal language model that transformers can load"):
        pretrained_model(str(folder), tokenizer, 64)


def test_a_damaged_file_is_one_clear_error(folder, tokenizer):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="not a causal language model that transformers can load"):
        pretrained_model(str(folder), tokenizer, 64)


@pytest.mark.parametrize("build", [pretrained_model, random_model])
def test_a_tokenizer_larger_than_the_embedding_is_refused(folder, build):
    tokenizer = train_tokenizer([TEXT] * 5, 300)
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(384 - len(tokenizer))])
    build(str(folder), tokenizer, 64)  # 384 ids for 384 rows
    tokenizer.add_tokens(["<one_more>"])
    with pytest.raises(InputError, match=r"384 rows, the tokenizer 385 ids.*resize_token_embeddings\(385\)"):
        build(str(folder), tokenizer, 64)


def test_more_positions_than_the_model_knows_are_refused(folder, tokenizer):
    with pytest.raises(InputError, match="--context_length 65: the model knows 64 positions"):
        pretrained_model(str(folder), tokenizer, 65)


def test_quantized_weights_are_refused(folder, tokenizer):
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match="quantized and cannot be trained"):
        pretrained_model(str(folder), tokenizer, 64)


def test_a_model_that_is_no_causal_language_model_is_refused(tokenizer, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model", "vocab_size": 384}', encoding="utf-8")
    with pytest.raises(InputError, match="clip_vision_model: transformers has no causal language model of this family"):
        random_model(str(tmp_path), tokenizer, 64)


def test_a_contradictory_generation_config_does_not_end_the_run_at_its_first_checkpoint(
    folder, tokenizer, tmp_path, capsys
):
    edit(folder / "generation_config.json", do_sample=False, temperature=0.6, top_p=0.9)  # as Llama 2 was published
    model = pretrained_model(str(folder), tokenizer, 64)
    assert "replaced by the default" in capsys.readouterr().out
    model.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").generation_config.temperature != 0.6


def test_the_fingerprint_is_of_the_numbers(folder, tokenizer):
    model = pretrained_model(str(folder), tokenizer, 64)
    before = weights_fingerprint(model)
    assert before == weights_fingerprint(pretrained_model(str(folder), tokenizer, 64))
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.k_proj.bias")[3] += 1e-3
    assert weights_fingerprint(model) != before


@pytest.mark.parametrize("loss", [11.93, 9.0, 15.0, math.nan, math.inf])
def test_a_start_near_random_is_refused(loss):
    with pytest.raises(InputError, match=r"ln\(151,936\) = 11\.93.*another tokenizer"):
        check_start(loss, 7.5, 151_936, accepted=False)


@pytest.mark.parametrize(("loss", "by_frequency"), [(2.9, 7.5), (5.5, 7.5), (8.3, 7.5), (9.4, 9.5)])
def test_a_start_well_below_random_or_below_token_frequency_is_not(loss, by_frequency):
    check_start(loss, by_frequency, 151_936, accepted=False)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_start_that_is_not_finite_is_refused_even_if_weak_weights_are_accepted(loss):
    with pytest.raises(InputError) as refused:
        check_start(loss, 7.5, 151_936, accepted=True)
    assert "--accept_weak_weights" not in str(refused.value)


@pytest.mark.parametrize(("name", "message"), [("no/such.gguf", "no such file"), ("./nowhere", "no such folder")])
def test_a_missing_model_is_refused(name, message):
    with pytest.raises(InputError, match=f"--model {name}: {message}"):
        find_model(name, weights=True)


def test_a_model_without_config_or_on_no_hub(tokenizer, tmp_path):
    with pytest.raises(InputError, match="not a causal language model"):
        pretrained_model(str(tmp_path), tokenizer, 64)


def test_gguf_without_its_package_is_refused_with_the_line_that_installs_it(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("common.model.pretrained.is_gguf_available", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'gguf>="):
        find_model(str(tmp_path / "model.gguf"), weights=True)


def test_model_and_tokenizer_of_a_gguf_file_are_those_that_were_written(folder, tokenizer, tmp_path):
    """Written in float32 by the format's own package: weights and ids are the same, and the model can be saved."""
    gguf = pytest.importorskip("gguf")
    source = pretrained_model(str(folder), tokenizer, 64)
    path = tmp_path / "tiny.gguf"
    write_gguf(gguf, path, source, tokenizer)
    place = find_model(str(path), weights=True)
    own_tokenizer = load_tokenizer(place)
    assert own_tokenizer(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert own_tokenizer.eos_token_id == tokenizer.eos_token_id
    model = pretrained_model(place, own_tokenizer, 64)
    expected = source.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert model.get_input_embeddings().padding_idx is None
    model.save_pretrained(tmp_path / "saved_again")
    assert os.path.getsize(tmp_path / "saved_again" / "model.safetensors") > 1000
    assert not torch.equal(random_model(place, own_tokenizer, 64).lm_head.weight, model.lm_head.weight)


def write_gguf(gguf, path: Path, model, tokenizer) -> None:
    config = model.config
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    described = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [tokenizer.convert_ids_to_tokens(number) for number in range(len(tokenizer))]
    tokens += [f"<unused_{number}>" for number in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in described["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.named_parameters():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("known", [True, False], ids=["of a family that transformers has", "of none"])
def test_code_in_a_checkpoint_does_not_run_and_nobody_is_asked(folder, tokenizer, monkeypatch, known):
    """A checkpoint may bring its own Python files; transformers would ask at the terminal whether to run them."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    ran = folder / "ran"
    code = f"open({str(ran)!r}, 'w')\nraise RuntimeError('the checkpoint ran its code')\n"
    (folder / "own.py").write_text(code, encoding="utf-8")
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    edit(folder / "config.json", auto_map=names, model_type="qwen2" if known else "strangers")
    edit(folder / "tokenizer_config.json", auto_map=names)
    if known:  # transformers' own classes are taken
        pretrained_model(str(folder), tokenizer, 64)
        shape_named(str(folder))
        assert load_tokenizer(str(folder)).get_vocab() == tokenizer.get_vocab()
    else:
        for load in (
            lambda: pretrained_model(str(folder), tokenizer, 64),
            lambda: model_without_memory(str(folder)),
            lambda: shape_named(str(folder)),
        ):
            with pytest.raises(InputError, match="custom code"):
                load()
    assert not ran.exists()
