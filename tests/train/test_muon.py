"""Muon against torch.optim.Muon, which takes one matrix at a time; and sharded by FSDP2. Experts one by one."""

from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM
from two_processes import in_two_processes

from common.train.muon import MuonWithAdamW, orthogonalized

QWEN2 = dict(
    model_type="qwen2", hidden_size=32, intermediate_size=65, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=100, tie_word_embeddings=True,
)  # fmt: skip
MIXTRAL = QWEN2 | dict(
    model_type="mixtral", intermediate_size=64, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False
)
SETTINGS = dict(lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


def model_and_decayed(shape=QWEN2):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    return model, [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]


def train(model, optimizers, steps=4):
    ids = torch.randint(0, 100, (steps, 2, 16), generator=torch.Generator().manual_seed(1))
    for step in range(steps):
        model(input_ids=ids[step], labels=ids[step]).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def reference_optimizers(model):
    """torch.optim.Muon for the matrices of the layers, torch.optim.AdamW for the rest."""
    layers = [parameter for name, parameter in model.named_parameters() if ".layers." in name and parameter.dim() == 2]
    embedding = [model.get_input_embeddings().weight]
    rest = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    muon = torch.optim.Muon(layers, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    return [
        muon,
        torch.optim.AdamW(embedding, weight_decay=0.1, **adamw),
        torch.optim.AdamW(rest, weight_decay=0.0, **adamw),
    ]


def test_the_updates_are_those_of_torch():
    ours, decayed = model_and_decayed()
    train(ours, [MuonWithAdamW(ours, decayed, **SETTINGS)])
    theirs, _ = model_and_decayed()
    train(theirs, reference_optimizers(theirs))
    start, _ = model_and_decayed()
    for (name, parameter), other, before in zip(
        ours.named_parameters(), theirs.parameters(), start.parameters(), strict=True
    ):
        moved = (other - before).norm()
        assert moved > 0, name
        # torch iterates in bf16 (three digits), ours on a CPU in fp32; small singular values amplify the difference.
        assert (parameter - other).norm() < 0.12 * moved, name


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 16, 64), (2, 64, 16)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalized(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.3 and values.max() < 1.3


def test_a_matrix_without_gradient_stays_as_it_is():
    model, decayed = model_and_decayed()
    optimizer = MuonWithAdamW(model, decayed, **SETTINGS)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("broken", [False, True])
def test_the_scaler_skips_a_step_with_infinite_gradients(broken):
    """With fused AdamW, as on a GPU: the scaler would call a fused AdamW all the same."""
    model, decayed = model_and_decayed()
    optimizer, scaler = MuonWithAdamW(model, decayed, fused=True, **SETTINGS), torch.amp.GradScaler("cpu")
    ids = torch.arange(16)[None]
    scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
    if broken:
        model.model.norm.weight.grad[0] = torch.inf
    before = [parameter.clone() for parameter in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    same = [torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)]
    assert all(same) if broken else not any(same[:2])


def test_a_run_continued_from_a_saved_state_is_the_same(tmp_path):
    whole, decayed = model_and_decayed()
    optimizer = MuonWithAdamW(whole, decayed, **SETTINGS)
    train(whole, [optimizer], steps=2)
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(whole, [optimizer], steps=2)

    resumed, decayed = model_and_decayed()
    saved = torch.load(tmp_path / "state.pt")
    resumed.load_state_dict(saved["model"])
    optimizer = MuonWithAdamW(resumed, decayed, **SETTINGS)
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, [optimizer], steps=2)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def sharded_run(rank: int, folder: Path) -> None:
    for shape in (QWEN2, MIXTRAL):  # three experts: two on one process, one on the other
        model, decayed = model_and_decayed(shape)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        train(model, [MuonWithAdamW(model, decayed, **SETTINGS)])
        found = {name: parameter.full_tensor() for name, parameter in model.state_dict().items()}
        if rank == 0:
            torch.save(found, folder / f"{shape['model_type']}.pt")


def test_sharded_by_fsdp2_it_updates_the_same(tmp_path):
    in_two_processes(sharded_run, tmp_path)
    for shape in (QWEN2, MIXTRAL):
        alone, decayed = model_and_decayed(shape)
        train(alone, [MuonWithAdamW(alone, decayed, **SETTINGS)])
        found = torch.load(tmp_path / f"{shape['model_type']}.pt")
        for name, parameter in alone.state_dict().items():
            torch.testing.assert_close(found[name], parameter, rtol=1e-4, atol=1e-5)


def muon_by_hand(weight: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return one matrix after steps with ``gradients``: Nesterov's momentum and Newton-Schulz as published, fp64."""
    weight, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient.double()
        x = 0.05 * gradient.double() + 0.95 * momentum
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * 0.2 * max(weight.shape) ** 0.5 * x
    return weight


LAYOUTS = {  # a family, and the matrices of an expert as its forward takes them from gate_up_proj
    "mixtral": (dict(num_local_experts=3), lambda stack: stack.chunk(2, 1)),
    "qwen3_moe": (dict(num_experts=3, moe_intermediate_size=24, head_dim=8), lambda stack: stack.chunk(2, 1)),
    "llama4_text": (dict(num_local_experts=3, head_dim=8, intermediate_size_mlp=48), lambda stack: stack.chunk(2, 2)),
    "gpt_oss": (dict(num_local_experts=3, head_dim=8), lambda stack: (stack[..., ::2], stack[..., 1::2])),
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_every_experts_own_matrix_is_updated_as_by_muon_alone(family):
    more, parts_of = LAYOUTS[family]
    model, decayed = model_and_decayed(QWEN2 | dict(model_type=family, num_hidden_layers=1) | more)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: torch.randn(3, *parameter.shape) for name, parameter in model.named_parameters()}
    optimizer = MuonWithAdamW(model, decayed, **SETTINGS)
    for step in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name][step].clone()
        optimizer.step()

    matrices = 0
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            split = parts_of if "gate_up" in name else lambda stack: (stack,)
            for found, start, *steps in zip(*map(split, (parameter, before[name], *gradients[name])), strict=True):
                for expert in range(3):
                    expected = muon_by_hand(start[expert], [step[expert] for step in steps])
                    torch.testing.assert_close(found[expert].double(), expected, rtol=1e-4, atol=1e-5, msg=name)
                    matrices += 1
    assert matrices == 3 * 3, "gate, up and down of three experts"


def test_routers_norms_and_the_biases_of_experts_go_to_adamw():
    more = dict(num_local_experts=3, head_dim=8)
    model, decayed = model_and_decayed(QWEN2 | dict(model_type="gpt_oss", num_hidden_layers=1) | more)
    optimizer = MuonWithAdamW(model, decayed, **SETTINGS)
    by_muon = {id(parameter) for group in optimizer.param_groups if group["matrices"] for parameter in group["params"]}
    names = {
        name.removeprefix("model.layers.0.") for name, parameter in model.named_parameters() if id(parameter) in by_muon
    }
    attention = {f"self_attn.{part}_proj.weight" for part in "qkvo"}
    assert names == attention | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
