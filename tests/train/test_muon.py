"""Muon against its formulas by hand, one matrix at a time, in fp64; sharded by FSDP2; experts one by one."""

from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM
from two_processes import in_two_processes

from common.distributed.strategy import whole
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


def test_the_updates_of_a_layers_matrices_are_those_by_hand_and_adamw_has_the_rest():
    model, decayed = model_and_decayed()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: torch.randn(3, *parameter.shape) for name, parameter in model.named_parameters()}
    rest = {name: torch.nn.Parameter(value.clone()) for name, value in start.items() if "_proj.weight" not in name}
    assert sum("_proj.weight" in name for name in start) == 7 * 3
    adamw = torch.optim.AdamW(
        [{"params": [value], "weight_decay": 0.1 if name in decayed else 0.0} for name, value in rest.items()],
        lr=0.01, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    optimizer = MuonWithAdamW(model, decayed, **SETTINGS)
    for step in range(3):
        for name, parameter in [*model.named_parameters(), *rest.items()]:
            parameter.grad = gradients[name][step].clone()
        optimizer.step()
        adamw.step()
    for name, parameter in model.named_parameters():
        right = rest[name] if name in rest else muon_by_hand(start[name], list(gradients[name])).float()
        torch.testing.assert_close(
            parameter, right, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_orthogonalized_is_torchs_own_iteration():
    from torch.optim._muon import _zeropower_via_newtonschulz

    matrix = torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
    theirs = _zeropower_via_newtonschulz(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7)  # in bf16: three digits
    assert (orthogonalized(matrix[None])[0] - theirs).norm() < 0.05 * theirs.norm()


def test_a_state_of_before_the_row_moments_continues_with_the_momentum_at_its_height():
    model, decayed = model_and_decayed()
    optimizer = MuonWithAdamW(model, decayed, **SETTINGS)
    train(model, [optimizer], steps=1)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        if state.pop("row_moment", None) is not None:
            state["step"] = torch.zeros(())  # as it was then
    optimizer.load_state_dict(saved)
    train(model, [optimizer], steps=1)
    states = [state for state in optimizer.state.values() if "momentum_buffer" in state]
    assert states and all(state["step"] == 101 and state["row_moment"].sum() > 0 for state in states)


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
    """Return one matrix after steps with ``gradients``, in fp64: Nesterov's momentum, Newton-Schulz and NorMuon's rows.

    As published; the momentum rises from 0.85 to 0.95 in 100 steps.
    """
    weight, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    row_squares = torch.zeros(len(weight), dtype=torch.float64)
    for step, gradient in enumerate(gradients):
        beta = 0.85 + 0.1 * min(1, step / 100)
        momentum = beta * momentum + (1 - beta) * gradient.double()
        x = (1 - beta) * gradient.double() + beta * momentum
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        row_squares = 0.95 * row_squares + 0.05 * (x * x).mean(1)
        even = x / row_squares.sqrt()[:, None]
        x = even * (x.norm() / even.norm())
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


def divided_run(rank: int, folder: Path) -> None:
    """Matrices of one shape, divided by rows and by columns: they must not be taken for alike."""
    model, decayed = model_and_decayed()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for number, (name, parameter) in enumerate(list(model.named_parameters())):
        if parameter.ndim == 2:
            module = model.get_submodule(name.rpartition(".")[0])
            module.weight = torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(number % 2)]))
    model.tie_weights()
    whole_model, _ = model_and_decayed()
    optimizer = MuonWithAdamW(model, decayed, **SETTINGS)
    whole_gradients = MuonWithAdamW(whole_model, decayed, **SETTINGS)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for one, other in zip(model.parameters(), whole_model.parameters(), strict=True):
            other.grad = torch.randn(other.shape, generator=generator)
            divided = isinstance(one, DTensor)
            one.grad = distribute_tensor(other.grad, mesh, one.placements) if divided else other.grad.clone()
        optimizer.step()
        whole_gradients.step()
    for one, other in zip(model.parameters(), whole_model.parameters(), strict=True):
        torch.testing.assert_close(whole(one.detach()), other.detach(), rtol=1e-5, atol=1e-6)


def test_divided_matrices_are_updated_as_whole_ones(tmp_path):
    in_two_processes(divided_run, tmp_path)
