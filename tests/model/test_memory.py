"""Predicted memory against peaks measured on H100s and H200s (torch.cuda.max_memory_allocated)."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.model.memory import CONTEXT_BYTES, Setting, activation_bytes, mlp_width, optimizer_bytes, predict
from common.model.presets import PRESETS
from common.system import GIB

QWEN2 = dict(model_type="qwen2", num_key_value_heads=2, tie_word_embeddings=True)
SHAPES = {
    "123M": QWEN2
    | dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, vocab_size=151_680),
    "0.5B": QWEN2
    | dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, vocab_size=151_936),
    "7B": dict(
        model_type="llama", hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
        tie_word_embeddings=False, vocab_size=32_000, dtype="bfloat16",
    ),
}  # fmt: skip
SHAPES["experts"] = PRESETS["qwen3-moe-a60m"] | dict(vocab_size=32_768)
SHAPES["7B in fp32"] = SHAPES["7B"] | dict(dtype="float32")
OLD = dict(bf16_stream=False)  # measured before keep_residual_in_bf16 existed
TUTORIAL = dict(compiled=False, fused_loss=False, **OLD)
MOVED = dict(offload_optimizer=True, offload_parameters=True)
ONCE = dict(accumulated=False)
EIGHT_BIT = dict(context_length=4096, optimizer="adamw_8bit")
# GiB. Unless said otherwise below, measured on 2026-11-22 with torch 2.11: on one card by benchmarks/gpu.py and the
# recipe at commits 983c6e9, 13bb85c, 435ba6a and a few others of that day; the tutorials on two cards with plain
# Trainer, in the first measurements of this project. Others:
#     ZeRO-1, and ZeRO-2 uncompiled with 128 rows, two cards: buckets of 50M numbers, a tenth of DeepSpeed's default
#     two cards, compiled, with 128 rows, 0.5B or 7B: 2026-11-25, commits 68bf142 and 72d4b01
#     one card with the residual stream in bf16, or FP8: 2026-11-26, commit 453b047 and later
#     the last ones, on two H200s: 2026-11-26, commits e72ad4a and d8d72f2; the last three: 2026-11-30
MEASURED = [
    ("123M", Setting(64, 512, **OLD), 11.13),
    ("123M", Setting(128, 512, **OLD), 18.67),
    ("123M", Setting(64, 512), 10.72),
    ("123M", Setting(128, 512), 17.86),
    ("123M", Setting(64, 512, optimizer="muon"), 10.55),
    ("123M", Setting(64, 512, compiled=False), 14.91),
    ("123M", Setting(128, 512, optimizer="muon", accumulated=False), 17.23),
    ("123M", Setting(128, 512, "ddp", 2, accumulated=False), 17.86),
    ("123M", Setting(128, 512, "zero1", 2, accumulated=False), 17.05),
    ("123M", Setting(64, 512, optimizer="muon", **OLD), 10.96),
    ("123M", Setting(64, 512, compiled=False, **OLD), 15.69),
    ("123M", Setting(32, 512, compiled=False, **OLD), 9.6),
    ("123M", Setting(32, 512, **TUTORIAL), 35.89),
    ("123M", Setting(32, 512, "zero2", compiled=False), 8.7),
    ("123M", Setting(32, 512, "fsdp2", compiled=False), 8.6),
    ("123M", Setting(32, 512, "ddp", 2, **TUTORIAL), 36.4),
    ("123M", Setting(32, 512, "zero2", 2, **TUTORIAL), 33.9),
    ("123M", Setting(32, 512, "fsdp2", 2, **TUTORIAL), 33.9),
    ("0.5B", Setting(8, 2048, **OLD), 25.73),
    ("0.5B", Setting(16, 2048, **OLD), 41.41),
    ("0.5B", Setting(8, 2048), 25.05),
    ("0.5B", Setting(15, 2048), 38.17),
    ("0.5B", Setting(16, 2048), 40.05),
    ("0.5B", Setting(16, 2048, "ddp", 2), 41.87),
    ("0.5B", Setting(16, 2048, "zero1", 2), 38.08),
    ("0.5B", Setting(16, 2048, "zero3", 2, compiled=False), 49.44),
    ("123M", Setting(32, 512, "zero3", compiled=False), 9.6),
    ("123M", Setting(64, 512, "zero3", 2, compiled=False), 13.8),
    ("123M", Setting(32, 512, "zero3", compiled=False, recompute=True, **MOVED), 2.95),
    ("0.5B", Setting(1, 2048, compiled=False, accumulated=False, fused_loss=False), 12.95),
    ("0.5B", Setting(8, 2048, **TUTORIAL), 60.63),
    ("0.5B", Setting(8, 2048, "ddp", 2, **TUTORIAL), 62.5),
    ("0.5B", Setting(8, 2048, "zero2", 2, **TUTORIAL), 53.2),
    ("0.5B", Setting(8, 2048, "fsdp2", 2, **TUTORIAL), 53.0),
    ("123M", Setting(32, 512, precision="fp16"), 7.4),
    ("123M", Setting(32, 512, "fsdp2"), 7.0),
    ("123M", Setting(32, 512, "zero1", compiled=False), 8.9),
    ("123M", Setting(32, 512, "zero2", compiled=False, recompute=True), 4.0),
    ("123M", Setting(64, 512, "zero1", 2, compiled=False), 13.3),
    ("123M", Setting(64, 512, "zero2", 2, compiled=False), 12.8),
    ("123M", Setting(128, 512, "zero2", 2, compiled=False, accumulated=False), 22.7),
    ("123M", Setting(128, 512, "fsdp2", 2, accumulated=False), 16.5),
    ("123M", Setting(128, 512, "zero2", 2, accumulated=False), 16.59),
    ("0.5B", Setting(16, 2048, "zero2", 2), 36.23),
    ("0.5B", Setting(16, 2048, "fsdp2", 2), 35.61),
    ("7B in fp32", Setting(1, 4096, "fsdp2", 2), 67.87),
    ("7B in fp32", Setting(4, 4096, "zero2", 2, recompute=True, accumulated=False), 68.06),
    ("123M", Setting(4, 8192, **OLD), 11.1),
    ("123M", Setting(4, 4096, "fsdp2", 2, compiled=False), 7.8),  # halves of rows of 8,192: context parallelism
    ("0.5B", Setting(1, 2048, compiled=False, accumulated=False, fused_loss=False, **OLD), 13.11),
    ("0.5B", Setting(1, 1024, compiled=False, accumulated=False, fused_loss=False, **OLD), 9.84),
    ("7B", Setting(1, **EIGHT_BIT), 55.58),
    ("7B", Setting(1, precision="fp8", **EIGHT_BIT), 51.04),
    ("123M", Setting(128, 512, precision="fp8", **OLD), 14.18),
    ("0.5B", Setting(16, 2048, precision="fp8", **OLD), 31.08),
    ("7B", Setting(4, recompute=True, **EIGHT_BIT), 45.73),
    ("7B", Setting(4, recompute=True, **EIGHT_BIT, **TUTORIAL), 49.01),
    ("123M", Setting(128, 512, "zero3", 2, **ONCE), 17.87),
    ("123M", Setting(128, 512, "fsdp2", 2, recompute=True, **ONCE), 3.35),
    ("123M", Setting(128, 512, "fsdp2", 2, **MOVED, **ONCE), 15.82),
    ("123M", Setting(128, 512, "zero3", 2, recompute=True, **MOVED, **ONCE), 3.68),
    ("123M", Setting(128, 512, "ddp", 2, optimizer="muon", **ONCE), 17.69),
    ("123M", Setting(128, 512, "fsdp2", 2, optimizer="muon", **ONCE), 16.42),
    ("123M", Setting(128, 512, "zero2", 2, recompute=True, **ONCE), 4.22),
    ("0.5B", Setting(16, 2048, "zero3", 2), 37.14),
    ("0.5B", Setting(16, 2048, "zero2", 2, recompute=True), 8.71),
    ("0.5B", Setting(16, 2048, "fsdp2", 2, recompute=True), 7.24),
    ("0.5B", Setting(16, 2048, "fsdp2", 2, **MOVED), 31.91),
    ("7B in fp32", Setting(4, 4096, "fsdp2", 2), 117.04),
    ("7B in fp32", Setting(4, 4096, "zero3", 2), 126.13),
    ("7B in fp32", Setting(4, 4096, "zero2", 2, recompute=True), 70.18),
    ("7B in fp32", Setting(8, 4096, "fsdp2", 2, recompute=True), 64.30),
    ("0.5B", Setting(16, 2048, recompute=True), 11.40),
    ("0.5B", Setting(16, 2048, recompute=True, recomputed="keep_products"), 29.61),
    ("experts", Setting(128, 512), 21.6),
]


def model_of(name: str):
    shape = dict(SHAPES[name])
    dtype = getattr(torch, shape.pop("dtype", "float32"))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=dtype)


@pytest.fixture(scope="module")
def models():
    return {name: model_of(name) for name in SHAPES}


@pytest.mark.parametrize(("name", "setting", "measured_gib"), MEASURED)
def test_the_prediction_is_within_5_percent_of_the_measured_peak(models, name, setting, measured_gib):
    predicted = (predict(models[name], setting).total - CONTEXT_BYTES) / GIB
    assert predicted == pytest.approx(measured_gib, rel=0.05)


@pytest.mark.parametrize(
    ("optimizer", "bytes_a_matrix_parameter"), [("adamw", 8), ("muon", 4), ("adamw_8bit", 2 + 8 / 256)]
)
def test_optimizer_states_by_hand(models, optimizer, bytes_a_matrix_parameter):
    model = models["123M"]
    layer = 512 * 512 + 2 * 512 * 128 + 512 * 512 + 3 * 512 * 2048
    vectors = 12 * (512 + 2 * 128 + 2 * 512) + 512  # biases of q, k, v; norms; all smaller than 4,096
    expected = 12 * layer * bytes_a_matrix_parameter + 8 * (vectors + 151_680 * 512)
    assert optimizer_bytes(model, optimizer) == expected


def test_parameters_that_zero3_has_emptied_count_in_full(models):
    """After its first step, ZeRO-3 leaves of each parameter only ``ds_shape``."""
    setting, emptied = Setting(16, 512, "zero3", 2), model_of("123M")
    for parameter in emptied.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0, device="meta")
    assert emptied.get_output_embeddings().weight.numel() == 0
    assert predict(emptied, setting) == predict(models["123M"], setting)


def test_frozen_parameters_need_neither_gradients_nor_states():
    model = model_of("123M")
    whole = predict(model, Setting(1, 512))
    for parameter in model.model.layers.parameters():
        parameter.requires_grad_(False)
    frozen = predict(model, Setting(1, 512))
    assert frozen.parameters == whole.parameters
    assert frozen.gradients == 4 * (151_680 * 512 + 512) and frozen.optimizer == 2 * frozen.gradients


def test_a_mixture_of_experts_counts_the_experts_that_a_token_meets():
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256)
    activations = {}
    for experts in (1, 2):
        config = AutoConfig.for_model("mixtral", num_local_experts=4, num_experts_per_tok=experts, **shape)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        activations[experts] = predict(model, Setting(1, 128)).activations
    an_expert = 3 * 128 + 3 * 64  # its three tensors of the MLP's width, and three of the layer's
    assert activations[2] - activations[1] == 2 * 128 * 2 * an_expert  # layers, tokens, bytes


# By hand, of a token in a layer of Qwen2.5-0.5B, in bf16: 896 wide, 14 heads of 64 and 2 of keys and values, MLP 4864.
EVERYTHING = 2 * (4 * 896 + 2 * 896 + 2 * 128 + 3 * 4864)  # residual twice, two norms, q and attention, k and v, MLP
RESULT = 2 * 896 + 4 * 14  # of attention, and a sum in fp32 a head
RECOMPUTED = {  # with the layer's input
    "all": 2 * 896,
    "2": (2 * 896 + EVERYTHING) / 2,
    "3": (8 * 2 * 896 + 16 * EVERYTHING) / 24,
    "keep_attention": 2 * 896 + RESULT,
    "keep_products": 2 * 896 + RESULT + 2 * (896 + 2 * 128 + 896 + 2 * 4864),  # q, k, v, output, and two of the MLP
}


def test_cards_that_compute_a_layer_together_have_parts_of_it_by_hand(models):
    """Of Qwen2.5-0.5B: the residual stream and the norms are whole on each card."""
    two = Setting(4, 512, "fsdp2", 2, tensor=2)
    whole, parts = 2 * (4 * 896), 2 * (2 * 896 + 2 * 128 + 3 * 4864)
    assert whole + parts == EVERYTHING
    assert activation_bytes(models["0.5B"], two, 2, 2, False) == 24 * 4 * 512 * (whole + parts / 2)
    one = replace(two, tensor=1)
    assert predict(models["0.5B"], two).parameters == predict(models["0.5B"], one).parameters, "halves, either way"
    assert predict(models["0.5B"], two).logits < predict(models["0.5B"], one).logits


@pytest.mark.parametrize("recomputed", RECOMPUTED)
def test_what_recompute_keeps_by_hand(models, recomputed):
    tokens = 16 * 2048
    found = activation_bytes(models["0.5B"], Setting(16, 2048, recompute=True, recomputed=recomputed), 2, 2, False)
    assert found == pytest.approx(24 * tokens * RECOMPUTED[recomputed])
    whole = activation_bytes(models["0.5B"], Setting(16, 2048), 2, 2, False)
    assert whole == 24 * tokens * EVERYTHING > found


def test_each_choice_of_recompute_needs_less_than_the_one_before(models):
    settings = [Setting(16, 2048)]
    choices = ("keep_products", "2", "keep_attention", "all")
    settings += [Setting(16, 2048, recompute=True, recomputed=choice) for choice in choices]
    needs = [predict(models["0.5B"], setting).total for setting in settings]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == len(needs)


def test_an_mlp_whose_width_differs_by_layer_counts_with_its_mean():
    """As Gemma 3n's config has it."""
    with torch.device("meta"):
        shape = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_key_value_heads=2, **shape))
    model.config.__dict__["intermediate_size"] = [128, 256]
    assert mlp_width(model) == (192, 3)
