"""Which parameters are matrices of the layers, against lists by hand; Muon, planner and FLOPs take the same ones."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.training_args import OptimizerNames

from common.model.counts import flops_per_token, layer_matrices, matmul_parameters, parameter_report
from common.model.memory import Setting, copy_bytes, optimizer_bytes, optimizer_name, state_bits
from common.train.muon import MuonWithAdamW

WIDTH, VOCABULARY = 32, 100
SMALL = dict(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY)
LINEAR = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEAR += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
SHAPES = {  # a model's config, and the names of a layer's matrices
    "gpt2": (
        dict(model_type="gpt2", n_embd=WIDTH, n_layer=2, n_head=4, vocab_size=VOCABULARY, bos_token_id=0),
        [f"transformer.h.{{}}.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
    ),
    "llama": (dict(model_type="llama", **SMALL), [f"model.layers.{{}}.{name}.weight" for name in LINEAR]),
    "qwen2": (dict(model_type="qwen2", **SMALL), [f"model.layers.{{}}.{name}.weight" for name in LINEAR]),
}


def model_of(shape: dict):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", SHAPES)
def test_matrices_of_the_layers_are_those_of_the_list_for_muon_planner_and_flops(family, tied):
    shape, names = SHAPES[family]
    model = model_of(shape | dict(tie_word_embeddings=tied))
    expected = [name.format(layer) for layer in range(2) for name in names]
    matrices = layer_matrices(model)
    assert list(matrices) == expected == list(layer_matrices(model, stacks=True))
    parameters = dict(model.named_parameters())
    assert all(matrices[name] is parameters[name] for name in expected)

    numbers = sum(parameters[name].numel() for name in expected)
    every = sum(parameter.numel() for parameter in parameters.values())
    assert matmul_parameters(model) == numbers + WIDTH * VOCABULARY
    assert optimizer_bytes(model, "muon") == 8 * every - 4 * numbers
    assert copy_bytes(model, Setting(1, 16), 2) == 2 * numbers

    optimizer = MuonWithAdamW(model, expected, lr=0.1, weight_decay=0.1)
    [by_muon] = [group["params"] for group in optimizer.param_groups if group["matrices"]]
    assert [id(parameter) for parameter in by_muon] == [id(parameters[name]) for name in expected]


def test_experts_are_stacks_of_matrices_and_only_counted_if_asked_for():
    shape = SMALL | dict(num_local_experts=4, num_experts_per_tok=2)
    model = model_of(dict(model_type="mixtral", **shape))
    experts = {name for name, parameter in model.named_parameters() if parameter.dim() == 3}
    assert len(experts) == 2 * 2, "transformers keeps the experts of a layer in two tensors"
    assert set(layer_matrices(model, stacks=True)) - set(layer_matrices(model)) == experts


PUBLISHED = {  # GFLOP a token at 4,096 tokens a row, total and active parameters: by hand from the shapes
    "Mixtral-8x7B": (dict(model_type="mixtral", vocab_size=32_000), 82.9, 46.70e9, 12.88e9),
    "Qwen3-30B-A3B": (
        dict(
            model_type="qwen3_moe", vocab_size=151_936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
            num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        ),
        27.9, 30.53e9, 3.35e9,
    ),
    "Qwen1.5-MoE-A2.7B": (dict(model_type="qwen2_moe", vocab_size=151_936), None, 14.32e9, 2.69e9),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_that_a_token_does_not_meet_are_not_counted(name):
    shape, gflops, total, active = PUBLISHED[name]
    model = model_of(shape)
    counts = parameter_report(model)
    assert (counts["total"], counts["active"]) == (pytest.approx(total, rel=1e-3), pytest.approx(active, rel=2e-3))
    if gflops is not None:
        assert flops_per_token(model, 4096) / 1e9 == pytest.approx(gflops, abs=0.05)


def test_flops_of_shared_experts_and_router_by_hand():
    shape = SMALL | dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, num_key_value_heads=4)
    model = model_of(dict(model_type="qwen2_moe", shared_expert_intermediate_size=24, **shape))
    attention, experts, shared = 4 * WIDTH * WIDTH, 2 * 3 * WIDTH * 16, 3 * WIDTH * 24
    routers = 8 * WIDTH + WIDTH  # of the experts, and of the shared expert
    layer = attention + experts + shared + routers
    assert matmul_parameters(model) == 2 * layer + WIDTH * VOCABULARY
    assert flops_per_token(model, 64) == 6 * (2 * layer + WIDTH * VOCABULARY) + 12 * 2 * WIDTH * 64


def test_what_is_no_matrix_stays_away_from_muon():
    """Mamba's convolution and decay rates, and routers, whatever their dimensions."""
    model = model_of(dict(model_type="mamba", hidden_size=WIDTH, num_hidden_layers=1, vocab_size=VOCABULARY))
    names = {name.split("mixer.")[-1] for name in layer_matrices(model, stacks=True)}
    assert names == {f"{part}_proj.weight" for part in ("in", "x", "dt", "out")}


def test_matrices_that_zero3_has_emptied_are_found():
    """After its first step, ZeRO-3 leaves of each parameter only ``ds_shape``."""
    model = model_of(SHAPES["llama"][0])
    expected = list(layer_matrices(model))
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0, device="meta")
    assert list(layer_matrices(model)) == expected


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("adamw_torch_fused", 32), ("adamw", 32), ("muon", 32), ("rounding_32bit", 32), ("paged_adamw_32bit", 32),
        ("adamw_8bit", 8), ("paged_adamw_8bit", 8), ("adamw_bnb_8bit", 8), ("rounding_8bit", 8),
        ("adamw_torch_4bit", 4),
    ],
)  # fmt: skip
def test_the_bits_of_an_optimizers_states_are_in_its_name(name, bits):
    assert state_bits(name) == bits


def test_the_name_of_optim_is_a_string_whatever_transformers_made_of_it():
    for optim in ("adamw_8bit", OptimizerNames("adamw_bnb_8bit")):
        assert type(optimizer_name(SimpleNamespace(optim=optim))) is str
