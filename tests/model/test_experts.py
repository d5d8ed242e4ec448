"""Experts against a loop over them by hand: in autocast's precision, compiled, and with no token dropped."""

import pytest
import torch
from torch.nn.functional import linear, silu
from transformers import AutoConfig, AutoModelForCausalLM

from common.model.attention import set_attention
from common.model.counts import parameter_report, parameters_in_words
from common.model.experts import GROUPED, InDtype, busiest_and_idlest, use_grouped_experts
from common.model.from_config import planned_model
from common.model.presets import PRESETS

SHAPE = dict(
    hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, vocab_size=64,
)  # fmt: skip


def experts_of_a_layer() -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SHAPE))
    use_grouped_experts(model)
    assert model.config._experts_implementation == GROUPED
    return model.model.layers[0].mlp.experts


def by_hand(experts, tokens, chosen, weights) -> torch.Tensor:
    """Token after token, expert after expert."""
    rows = []
    for token, numbers, shares in zip(tokens, chosen.tolist(), weights, strict=True):
        row = 0.0
        for number, share in zip(numbers, shares, strict=True):
            gate, up = linear(token, experts.gate_up_proj[number]).chunk(2)
            row = row + share * linear(silu(gate) * up, experts.down_proj[number])
        rows.append(row)
    return torch.stack(rows)


def tokens_and_routes(even: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return 24 tokens, the two experts of each and their weights. Not ``even``: all tokens go to experts 2 and 0."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randn(24, 32, generator=draw)
    chosen = torch.rand(24, 4, generator=draw).topk(2).indices if even else torch.tensor([2, 0]).expand(24, 2)
    return tokens, chosen, torch.rand(24, 2, generator=draw)


@pytest.mark.parametrize("even", [True, False])
def test_every_token_gets_all_of_its_experts_however_many_others_want_them(even):
    experts, (tokens, chosen, weights) = experts_of_a_layer(), tokens_and_routes(even)
    torch.testing.assert_close(experts(tokens, chosen, weights), by_hand(experts, tokens, chosen, weights))


def test_autocast_computes_experts_in_bf16_and_their_gradients_stay_in_fp32():
    experts, (tokens, chosen, weights) = experts_of_a_layer(), tokens_and_routes(even=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = experts(tokens, chosen, weights)
        expected = by_hand(experts, tokens, chosen, weights)  # linear is one of autocast's operations
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=2e-3)
    exact = by_hand(experts, tokens, chosen, weights)
    assert 1e-5 < (found.float() - exact).abs().max() < 1e-2, "bf16, and not fp32"
    found.float().sum().backward()
    gradient = experts.gate_up_proj.grad
    experts.zero_grad()
    exact.sum().backward()
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, experts.gate_up_proj.grad, rtol=5e-2, atol=5e-2)


def test_compiled_experts_are_one_grouped_product_each_without_a_loop():
    """transformers' own function would leave the graph for a loop over experts in fp32."""
    experts, (tokens, chosen, weights) = experts_of_a_layer(), tokens_and_routes(even=True)
    called = []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(experts, backend=backend, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(tokens, chosen, weights), experts(tokens, chosen, weights))
    assert sum("grouped_mm" in name for name in called) == 2
    assert not any("fallback" in name for name in called)


def test_only_tensors_change_their_dtype():
    experts = experts_of_a_layer()
    seen = InDtype(experts, torch.bfloat16)
    assert seen.gate_up_proj.dtype == torch.bfloat16 and experts.gate_up_proj.dtype == torch.float32
    assert seen.num_experts == 4 and seen.act_fn is experts.act_fn


def test_a_dense_model_and_one_with_a_loop_of_its_own_stay_as_they_are():
    for kind, more in (("llama", {}), ("jetmoe", dict(num_local_experts=4, kv_channels=8))):
        config = AutoConfig.for_model(kind, **SHAPE | more)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        use_grouped_experts(model)
        assert getattr(model.config, "_experts_implementation", None) != GROUPED


def test_a_saved_config_does_not_name_our_implementation(tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SHAPE))
    use_grouped_experts(model)
    set_attention(model, "auto", False, torch.device("cpu"))
    model.save_pretrained(tmp_path)
    assert GROUPED not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._experts_implementation == "grouped_mm"


def test_shares_of_tokens():
    sent = torch.tensor([[6.0, 2.0, 4.0, 4.0], [4.0, 4.0, 7.0, 1.0]])  # 8 tokens, two experts each
    assert busiest_and_idlest(sent, 2) == pytest.approx((7 / 8, 1 / 8))


def test_the_preset_has_about_60m_active_parameters():
    """By hand: 12 layers of 8 experts, of which a token meets two."""
    attention = 512 * (512 + 256 + 256 + 512) + 2 * 64  # q, k, v, o; norms of queries and keys
    layer = attention + 2 * 512 + 8 * 512  # norms, router
    expert = 3 * 512 * 896
    rest = 32_768 * 512 + 512 + 12 * layer
    model = planned_model(PRESETS["qwen3-moe-a60m"], 32_768, 512)
    counts = parameter_report(model)
    assert counts["total"] == rest + 12 * 8 * expert == 158_398_464
    assert counts["active"] == rest + 12 * 2 * expert == 59_308_032
    assert "active, met by a token: 59,308,032 (2 of 8 experts a layer, none drops a token)" in parameters_in_words(
        model
    )
