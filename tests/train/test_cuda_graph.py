"""CUDA graphs: gradients and steps are those of launching every kernel. On a CPU, a stand-in runs what was recorded."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import common.train.cuda_graph as cuda_graph
import common.train.muon as muon
from common.console import InputError
from common.model.memory import Setting, predict
from common.train.cuda_graph import MicroBatchGraph, lacking, use_graph
from common.train.muon import MuonWithAdamW

SHAPE = dict(
    model_type="qwen2", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=100, tie_word_embeddings=True,
)  # fmt: skip
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class RunAgain:
    """Stands for Recorded on a CPU: the function itself, on the tensors that it was recorded with."""

    def __init__(self, function, given):
        self.function, self.given = function, {name: tensor.clone() for name, tensor in given.items()}

    def fits(self, given):
        return all(self.given[name].shape == tensor.shape for name, tensor in given.items())

    def __call__(self, **given):
        for name, tensor in given.items():
            self.given[name].copy_(tensor)
        return self.function(**self.given)


def model_of(shape=SHAPE):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    model.unused = torch.nn.Parameter(torch.ones(3))  # has no gradient, and must stay without one
    return model


def forward_backward(model, batch, num_items):
    loss = model(input_ids=batch["ids"], labels=batch["ids"], num_items_in_batch=num_items).loss
    loss.backward()
    return loss.detach()


def train(model, run, optimizer, device="cpu", steps=8, micro_batches=2):
    """Train; leave out the fifth step as one that was judged bad; the last micro-batch is shorter."""
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        for micro_batch in range(micro_batches):
            rows = 1 if (step, micro_batch) == (steps - 1, micro_batches - 1) else 2
            ids = torch.randint(0, 100, (rows, 16), generator=generator).to(device)
            losses.append(run(model, {"ids": ids}, torch.tensor(60, device=device)))
        if step == 4:
            model.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses).cpu()


def both(device, monkeypatch=None):
    """Return losses and models of a run that launches every kernel, and of one with graphs."""
    plain = model_of().to(device)
    graphed = copy.deepcopy(plain)
    decayed = [name for name, parameter in plain.named_parameters() if parameter.dim() >= 2]
    settings = dict(lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    first = train(plain, forward_backward, MuonWithAdamW(plain, decayed, **settings), device)
    optimizer = MuonWithAdamW(graphed, decayed, graphs=True, **settings)
    second = train(graphed, MicroBatchGraph(forward_backward), optimizer, device)
    assert len(optimizer.recorded) == 4  # shapes: queries and outputs, keys and values, gate and up, down
    return first, second, plain, graphed


def test_gradients_and_updates_are_those_without_graphs(monkeypatch):
    monkeypatch.setattr(cuda_graph, "Recorded", RunAgain)
    monkeypatch.setattr(muon, "Recorded", RunAgain)
    first, second, plain, graphed = both("cpu")
    torch.testing.assert_close(second, first, rtol=1e-6, atol=0)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(graphed.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)
    assert torch.equal(graphed.unused, torch.ones(3))


@GPU
def test_graphs_on_a_gpu_train_as_without_them():
    first, second, plain, graphed = both("cuda")
    torch.testing.assert_close(second, first, rtol=1e-4, atol=0)
    began = model_of().cuda()
    for name, parameter in plain.named_parameters():
        # Muon computes in bf16: the last digit of a gradient can move a single number by a quarter of a step.
        differs = (graphed.get_parameter(name) - parameter).norm()
        assert differs <= 0.08 * (parameter - began.get_parameter(name)).norm(), name


@GPU
def test_what_cannot_be_recorded_runs_as_it_is(capsys):
    def waits(model, batch, num_items):
        batch["ids"].sum().item()
        return forward_backward(model, batch, num_items)

    model = model_of().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = train(model, MicroBatchGraph(waits), optimizer, "cuda")
    torch.testing.assert_close(losses[-1], losses[-1].nan_to_num())
    assert "without a CUDA graph" in capsys.readouterr().out


def test_a_loaded_state_is_not_what_the_graphs_know(monkeypatch):
    monkeypatch.setattr(cuda_graph, "Recorded", RunAgain)
    monkeypatch.setattr(muon, "Recorded", RunAgain)
    model = model_of()
    decayed = [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]
    optimizer = MuonWithAdamW(model, decayed, lr=0.01, weight_decay=0.0, graphs=True)
    train(model, forward_backward, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.recorded


@pytest.mark.parametrize(
    "setting, needed",
    [
        (dict(processes=2), "one process"),
        (dict(compiled=False), "a compiled model"),
        (dict(recompute=True), "no recompute"),
        (dict(method="qlora"), "no adapters"),
        (dict(in_backward=True), "an optimizer that steps after backward"),
    ],
)
def test_where_a_graph_is_not_possible_it_is_not_used_and_refused_if_asked_for(setting, needed):
    model, setting, card = model_of(), Setting(4, 64, **setting), torch.device("cuda")
    assert lacking(model, setting) == [needed]
    assert not use_graph("auto", model, setting, card)
    with pytest.raises(InputError, match=f"--cuda_graph yes: it needs {needed}"):
        use_graph("yes", model, setting, card)


def test_a_dense_model_on_one_card_uses_them_and_experts_do_not():
    model, setting = model_of(), Setting(4, 64)
    assert use_graph("auto", model, setting, torch.device("cuda"))
    assert not use_graph("no", model, setting, torch.device("cuda"))
    assert not use_graph("auto", model, setting, torch.device("cpu"))
    experts = model_of({**SHAPE, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2})
    assert lacking(experts, setting) == ["a model without experts"]


def test_the_plan_counts_what_graphs_keep():
    model = model_of()
    without = predict(model, Setting(4, 64, optimizer="muon")).total
    matrices = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    assert predict(model, Setting(4, 64, optimizer="muon", graphs=True)).total >= without + 4 * matrices


def test_a_step_is_made_also_where_muon_cannot_be_recorded(monkeypatch, capsys):
    def fail(function, given):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(muon, "Recorded", fail)
    plain, other = model_of(), model_of()
    decayed = [name for name, parameter in plain.named_parameters() if parameter.dim() >= 2]
    settings = dict(lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    train(plain, forward_backward, MuonWithAdamW(plain, decayed, **settings))
    train(other, forward_backward, MuonWithAdamW(other, decayed, graphs=True, **settings))
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)
    assert capsys.readouterr().out.count("Muon without CUDA graphs") == 1
