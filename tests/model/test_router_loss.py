"""The router's loss against plain transformers, given one row at a time; the same for every split of a step."""

import json

import pytest
import torch
from conftest import small_run
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from common.console import InputError
from common.model.fused_loss import use_fused_loss

COEFFICIENT, IGNORED = 0.5, -100
SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, vocab_size=128, max_position_embeddings=64, moe_intermediate_size=16, num_experts_per_tok=2,
    output_router_logits=True, pad_token_id=None, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
FAMILIES = {
    "mixtral": dict(num_local_experts=4, router_aux_loss_coef=COEFFICIENT),
    "qwen2_moe": dict(num_experts=4, shared_expert_intermediate_size=16, router_aux_loss_coef=COEFFICIENT),
    "qwen3_moe": dict(num_experts=4, router_aux_loss_coef=COEFFICIENT),
    "olmoe": dict(num_experts=4, router_aux_loss_coef=COEFFICIENT),
    "gpt_oss": dict(num_local_experts=4, router_aux_loss_coef=COEFFICIENT),
    "granitemoe": dict(num_local_experts=4, router_aux_loss_coef=COEFFICIENT),
    "jetmoe": dict(num_local_experts=4, kv_channels=8, aux_loss_coef=COEFFICIENT),
}


def model_of(family: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | FAMILIES[family])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def rows_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    """Five rows of which one has few targets, and the last one none: it only completes a batch."""
    ids, targets = torch.randint(1, 128, (2, 5, 16), generator=torch.Generator().manual_seed(1))
    targets[1, 3:], targets[4] = IGNORED, IGNORED
    return ids, targets


def by_transformers(family: str, ids: torch.Tensor, targets: torch.Tensor) -> tuple[float, dict]:
    """Plain transformers, row by row: all nats / all targets, plus coefficient x router loss, weighted by targets."""
    model, count = model_of(family), targets.ne(IGNORED).sum()
    loss = 0.0
    for row, wanted in zip(ids, targets, strict=True):
        output = model(input_ids=row[None], use_cache=False)
        logits, share = output.logits[0].float(), wanted.ne(IGNORED).sum() / count
        nats = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
        loss = loss + nats / count + COEFFICIENT * output.aux_loss * share
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_transformers_for_every_split_of_a_step(family):
    ids, targets = rows_and_targets()
    expected, expected_gradients = by_transformers(family, ids, targets)
    for rows in (5, 2, 1):
        model = model_of(family)
        use_fused_loss(model)
        total = 0.0
        for part, wanted in zip(ids.split(rows), targets.split(rows), strict=True):
            batch = dict(input_ids=part, labels=wanted, shift_labels=wanted, use_cache=False)
            loss = model(**batch, num_items_in_batch=targets.ne(IGNORED).sum()).loss
            loss.backward()
            total += loss.item()
        assert total == pytest.approx(expected, rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected_gradients[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_held_out_loss_has_no_router_loss_and_the_config_keeps_its_coefficient():
    ids, targets = rows_and_targets()
    model = model_of("mixtral").eval()
    logits = model(input_ids=ids, use_cache=False).logits
    use_fused_loss(model)
    loss = model(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False).loss
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.config.router_aux_loss_coef == COEFFICIENT


def test_a_router_loss_of_another_formula_is_refused():
    shape = SMALL | dict(is_moe=True, num_experts=16, router_aux_loss_coef=COEFFICIENT)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("doge", **shape))
    with pytest.raises(InputError, match='DogeForCausalLM: its router loss .* "output_router_logits": false'):
        use_fused_loss(model)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    shape = {
        name: SMALL[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    shape |= dict(model_type="mixtral", num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    shape |= dict(output_router_logits=True, router_aux_loss_coef=COEFFICIENT)
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


def test_a_run_logs_the_same_for_every_micro_batch_and_evaluation_batch(
    wiki, mixtral, cache_dir, tmp_path, monkeypatch, capsys
):
    logs, routed, route = [], [], MixtralTopKRouter.forward

    def watched(router, hidden):
        results = route(router, hidden)
        if router.training:
            routed.append(results[2])  # (tokens, 2): the experts of each token
        return results

    monkeypatch.setattr(MixtralTopKRouter, "forward", watched)
    for rows, eval_rows in ((4, 5), (1, 2)):
        flags = (
            f"--per_device_train_batch_size {rows} --per_device_eval_batch_size {eval_rows} --optimizer muon".split()
        )
        wiki.main(small_run(cache_dir, tmp_path / str(rows), "--model", str(mixtral), *flags))
        logs.append(json.loads((tmp_path / str(rows) / "trainer_state.json").read_text())["log_history"])
    compared = ("loss", "router_loss", "busiest_expert", "idlest_expert", "grad_norm", "eval_loss")
    for one, other in zip(*logs, strict=True):
        assert {name: one[name] for name in compared if name in one} == pytest.approx(
            {name: other[name] for name in compared if name in other}, rel=1e-4
        )
    steps = [entry for entry in logs[0] if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    assert all(COEFFICIENT * 2 <= entry["router_loss"] < COEFFICIENT * 4 for entry in steps)  # 2 of 4 experts
    # Two layers a step, and four rows at once, then one: as many routes as there are tokens in six steps.
    for entry, layers in zip(steps, (routed[at : at + 2] for at in range(0, 12, 2)), strict=True):
        shares = [chosen.eq(expert).sum().item() / (4 * 64) for chosen in layers for expert in range(4)]
        assert (entry["busiest_expert"], entry["idlest_expert"]) == pytest.approx((max(shares), min(shares)))
    last = f"experts {steps[-1]['idlest_expert']:.1%} to {steps[-1]['busiest_expert']:.1%} of the tokens"
    assert last in capsys.readouterr().out
    report = (tmp_path / "1" / "report.html").read_text()
    assert "of the tokens since the last log; none is dropped" in report
    assert "share of a layer&#x27;s tokens that one expert gets" in report
    results = json.loads((tmp_path / "1" / "all_results.json").read_text())
    assert results["parameters"]["active"] < results["parameters"]["total"]
    assert "active parameters, met by a token" in report and f"{results['parameters']['active']:,}" in report
