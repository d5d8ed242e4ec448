"""Models from a config; parameter counts and FLOPs by hand."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import common.model.from_config as model_module
from common.console import InputError
from common.model.counts import flops_per_token, matmul_parameters, parameter_report, peak_tflops
from common.model.from_config import device_to_build_on, keep_residual_in_bf16, model_from_config
from common.model.presets import PRESETS
from common.tokens.train_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["地球是太阳系中的一颗行星。"], 300)


def test_the_tutorials_model():
    """123.3M parameters, 77.6M of them embedding, with Qwen2's 151,646 tokens padded to 151,680 rows."""
    shape = PRESETS["swanlab-wiki"]
    config = AutoConfig.for_model(**shape, vocab_size=151_680)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # A layer: q 512x512, k and v 512x128, o 512x512, all but o with bias; three 512x2048; two norms. A last norm.
    matrices = 512 * 512 + 2 * 512 * 128 + 512 * 512 + 3 * 512 * 2048
    layer = matrices + (512 + 128 + 128) + 2 * 512
    embedding = 151_680 * 512
    assert parameter_report(model) == {
        "total": embedding + 12 * layer + 512,
        "embedding": embedding,
        "rest": 12 * layer + 512,
        "active": embedding + 12 * layer + 512,
    }
    assert round(parameter_report(model)["total"] / 1e6, 1) == 123.3
    assert matmul_parameters(model) == embedding + 12 * matrices
    # 6 x 123.2M + 12 x 12 layers x 512 x 512
    assert flops_per_token(model, 512) == 6 * (embedding + 12 * matrices) + 12 * 12 * 512 * 512


def test_an_untied_head_counts_once_and_a_position_table_never(tokenizer):
    shape = dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=False)
    model = model_from_config(shape, tokenizer, context_length=16)
    layer = 32 * 96 + 32 * 32 + 2 * 32 * 128
    assert matmul_parameters(model) == 2 * layer + model.config.vocab_size * 32
    assert parameter_report(model)["embedding"] == 2 * model.config.vocab_size * 32


def test_the_vocabulary_is_padded_and_the_model_is_float32(tokenizer):
    shape = dict(model_type="qwen2", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = model_from_config({**shape, "num_key_value_heads": 1}, tokenizer, context_length=16)
    assert model.config.vocab_size % 128 == 0 and 0 <= model.config.vocab_size - len(tokenizer) < 128
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert model.config.max_position_embeddings == 16


def test_the_end_token_is_embedded_like_any_other(tokenizer):
    """If it were the padding token, its zero vector at the start of a row would give gradients of 1e10 and more."""
    shape = dict(model_type="qwen2", hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=2)
    model = model_from_config({**shape, "num_key_value_heads": 1}, tokenizer, context_length=16)
    embedding = model.get_input_embeddings()
    assert embedding.padding_idx is None and embedding.weight[tokenizer.eos_token_id].norm() > 0
    row = torch.tensor([[tokenizer.eos_token_id, 5, 6, 7]])
    model(row, labels=row).loss.backward()
    assert torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm() < 100


def test_the_residual_stream_is_in_bf16_where_autocast_is_and_nowhere_else(tokenizer):
    shape = dict(model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    model, stream = model_from_config(shape, tokenizer, 64), []
    keep_residual_in_bf16(model)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, inputs, hidden: stream.append(hidden.dtype))
    ids = torch.arange(64)[None]
    whole = model(input_ids=ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        half = model(input_ids=ids, labels=ids).loss
    half.backward()
    assert stream == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert half.item() == pytest.approx(whole.item(), rel=1e-3)
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_weight_decay_leaves_norms_and_biases_out(tokenizer, tmp_path):
    shape = dict(model_type="qwen2", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = model_from_config({**shape, "num_key_value_heads": 1}, tokenizer, context_length=16)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to="none"))
    decayed = set(trainer.get_decay_parameter_names(model))
    assert decayed == {name for name, parameter in model.named_parameters() if parameter.dim() == 2}


def test_a_shape_that_transformers_refuses_is_one_clear_error(tokenizer):
    with pytest.raises(InputError, match="^model_type no-such-model: transformers .* does not know it"):
        model_from_config({"model_type": "no-such-model"}, tokenizer, 16)
    small = dict(model_type="llama", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(InputError, match="^rope_scaling.rope_type far: .* default, linear, .* into the config.$"):
        model_from_config({**small, "rope_scaling": {"rope_type": "far", "factor": 2.0}}, tokenizer, 16)
    with pytest.raises(InputError, match="^MODEL .* transformers cannot build it .ZeroDivisionError"):
        model_from_config({**small, "head_dim": 0}, tokenizer, 16)


def test_the_peak_of_a_device_is_known_or_none(monkeypatch):
    names = {
        "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989, "NVIDIA H20": 148,
        "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A10": 125, "NVIDIA A10G": 70, "NVIDIA L4": 121, "NVIDIA L40S": 362,
        "Tesla T4": 65, "Tesla V100-SXM2-16GB": 125, "Some new card": None,
        "NVIDIA RTX A4000": None, "NVIDIA RTX A1000": None, "AMD Instinct MI300X": 1307.4, "AMD Instinct MI210": None,
        "AMD Instinct MI250X/MI250": 191.5,
    }  # fmt: skip
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_tflops(torch.device("cuda"), half_precision=True) == peak, name
    assert peak_tflops(torch.device("cuda"), half_precision=False) is None
    assert peak_tflops(torch.device("cpu"), half_precision=True) is None


@pytest.mark.parametrize(("card", "others", "device"), [(100, True, "meta"), (2, True, "cpu"), (100, False, "cpu")])
def test_a_model_is_built_on_the_card_if_it_is_small_there_on_every_process(monkeypatch, card, others, device):
    """The meta device stands for a card; ``card`` is its memory divided by the model's size in float32."""
    config = AutoConfig.for_model("gpt2", n_embd=16, n_head=2, n_layer=1, vocab_size=100)
    size = 4 * AutoModelForCausalLM.from_config(config).num_parameters()
    monkeypatch.setattr(model_module, "card_bytes", lambda device: card * size)
    monkeypatch.setattr(model_module, "gather_object", lambda mine: [*mine, others])
    assert device_to_build_on(config, SimpleNamespace(device=torch.device("meta"))).type == device
