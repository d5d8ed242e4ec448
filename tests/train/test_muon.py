"""Muon against torch.optim.Muon, which takes one matrix at a time; and sharded by FSDP2."""

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
SETTINGS = dict(lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


def model_and_decayed():
    torch.manual_seed(0)
    shape = dict(QWEN2)
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
    model, decayed = model_and_decayed()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    train(model, [MuonWithAdamW(model, decayed, **SETTINGS)])
    found = {name: parameter.full_tensor() for name, parameter in model.state_dict().items()}
    if rank == 0:
        torch.save(found, folder / "sharded.pt")


def test_sharded_by_fsdp2_it_updates_the_same(tmp_path):
    in_two_processes(sharded_run, tmp_path)
    alone, decayed = model_and_decayed()
    train(alone, [MuonWithAdamW(alone, decayed, **SETTINGS)])
    found = torch.load(tmp_path / "sharded.pt")
    for name, parameter in alone.state_dict().items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-4, atol=1e-5)
