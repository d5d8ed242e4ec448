"""AdamW on bf16 weights against torch's AdamW and bitsandbytes' own, steps inside backward, and resuming."""

import copy

import pytest
import torch

from common.model.memory import NUMBERS_A_BLOCK
from common.train import low_memory_adamw
from common.train.low_memory_adamw import LowMemoryAdamW

bitsandbytes = pytest.importorskip("bitsandbytes")
SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
# bitsandbytes has other kernels for CPUs than for GPUs. A GPU is tested, too, if there is one.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks so small that a parameter of some thousand numbers has several, the last one partial."""
    monkeypatch.setattr(low_memory_adamw, "CHUNK", 16 * NUMBERS_A_BLOCK)


def parameters(device: str, dtype=torch.float32) -> list[torch.nn.Parameter]:
    """Of three sizes: several chunks and a partial block; one whole chunk; too small for 8 bits."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(130, 77), (64, 64), (50,)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def train(optimizer, weights, steps=10, first=0) -> None:
    for step in range(first, first + steps):
        for number, weight in enumerate(weights):
            generator = torch.Generator().manual_seed(1000 * step + number)
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("device", DEVICES)
def test_with_32_bits_and_fp32_weights_it_is_torchs_adamw(device):
    ours, theirs = parameters(device), parameters(device)
    train(LowMemoryAdamW(ours, state_bits=32, **SETTINGS), ours)
    train(torch.optim.AdamW(theirs, **SETTINGS), theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_with_8_bits_and_fp32_weights_it_is_that_of_bitsandbytes(device):
    """Equal to the bit, weights and states, although ours goes chunk by chunk."""
    ours, theirs = parameters(device), parameters(device)
    optimizers = LowMemoryAdamW(ours, **SETTINGS), bitsandbytes.optim.AdamW8bit(theirs, **SETTINGS)
    for optimizer, weights in zip(optimizers, (ours, theirs), strict=True):
        train(optimizer, weights)
    for one, other in list(zip(ours, theirs, strict=True))[:2]:
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        state, reference = optimizers[0].state[one], optimizers[1].state[other]
        assert state["exp_avg"].dtype == torch.uint8 and torch.equal(state["exp_avg"], reference["state1"])
        assert torch.equal(state["exp_avg_sq_scale"], reference["absmax2"])
    # The states of the third parameter are in fp32, and ours uses torch's AdamW for it. It decays weights before the
    # update, bitsandbytes' CUDA kernel after it. In 10 steps they differ by 10 x lr x decay x the update (about lr).
    late_decay = 10 * SETTINGS["lr"] * SETTINGS["weight_decay"] * SETTINGS["lr"] if device == "cuda" else 0.0
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-5, atol=1e-6 + late_decay)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state_bits", [8, 32])
def test_bf16_weights_follow_fp32_ones_on_average_only_if_rounded_stochastically(device, state_bits):
    """A weight of 1 goes down by 1e-5 in each of 400 steps, to 0.996. The next number below 1 in bf16 is 0.9961."""
    ends = {}
    for stochastic in (True, False):
        weight = torch.nn.Parameter(torch.ones(64, 128, device=device, dtype=torch.bfloat16))
        optimizer = LowMemoryAdamW([weight], lr=1e-5, state_bits=state_bits, stochastic=stochastic)
        for _ in range(400):
            weight.grad = torch.full_like(weight, 0.5)
            optimizer.step()
        ends[stochastic] = weight.detach().double()
    assert ends[False].eq(1).all()
    # The variance of 400 draws of 1e-5 x 1/256 is that of a weight; 8,192 weights; 8-bit averages are off by some 1%.
    assert abs(ends[True].mean().item() - (1 - 400 * 1e-5)) < 5 * (400 * 1e-5 / 256 / 8192) ** 0.5 + 0.02 * 400 * 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_inside_backward_are_the_same_and_hold_one_gradient_at_a_time(device, dtype):
    torch.manual_seed(0)
    outside = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4))).to(device, dtype)
    outside[3].weight = outside[0].weight  # tied: complete only when both ends have given
    inside = copy.deepcopy(outside)
    optimizers = [LowMemoryAdamW(outside.parameters(), **SETTINGS)]
    optimizers.append(LowMemoryAdamW(inside.parameters(), in_backward=True, **SETTINGS))
    held = []
    for parameter in inside.parameters():
        parameter.register_hook(lambda _: held.append(sum(p.grad is not None for p in inside.parameters())))
    for step in range(5):
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(device, dtype)
        norms = []
        for model, optimizer in zip((outside, inside), optimizers, strict=True):
            model(inputs).float().square().mean().backward()
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(optimizers[1].grad_norm, norms[0].float(), rtol=1e-2, atol=0)
        assert norms[1] == 0  # nothing was left
    assert held and max(held) == 0
    for one, other in zip(outside.parameters(), inside.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state_bits", [8, 32])
def test_a_run_continued_from_a_saved_state_is_equal_to_the_bit(device, state_bits, tmp_path):
    whole = parameters(device, torch.bfloat16)
    optimizer = LowMemoryAdamW(whole, state_bits=state_bits, seed=3, **SETTINGS)
    train(optimizer, whole, steps=4)
    torch.save({"weights": whole, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(optimizer, whole, steps=4, first=4)

    saved = torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=False)
    resumed = [torch.nn.Parameter(weight.detach().to(device)) for weight in saved["weights"]]
    optimizer = LowMemoryAdamW(resumed, state_bits=state_bits, seed=3, **SETTINGS | dict(lr=1.0))
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.param_groups[0]["lr"] == SETTINGS["lr"]
    train(optimizer, resumed, steps=4, first=4)
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one, other)


def test_another_seed_rounds_differently():
    ends = []
    for seed in (0, 1):
        weights = parameters("cpu", torch.bfloat16)
        train(LowMemoryAdamW(weights, seed=seed, **SETTINGS), weights, steps=1)
        ends.append(weights[0])
    assert not torch.equal(*ends)


def test_other_groups_are_refused():
    saved = LowMemoryAdamW(parameters("cpu"), **SETTINGS).state_dict()
    with pytest.raises(ValueError, match="other parameter groups"):
        LowMemoryAdamW(parameters("cpu")[:2], **SETTINGS).load_state_dict(saved)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_large_parameter_takes_no_second_copy(monkeypatch):
    """2**28 numbers take 0.5 GiB in bf16. A step may take a few chunks of 64 MiB, but no fp32 copy of 1 GiB."""
    monkeypatch.setattr(low_memory_adamw, "CHUNK", 1 << 24)
    weight = torch.nn.Parameter(torch.zeros(1 << 14, 1 << 14, device="cuda", dtype=torch.bfloat16))
    optimizer = LowMemoryAdamW([weight], **SETTINGS)
    for step in range(2):
        weight.grad = torch.ones_like(weight)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        if step > 0:  # the first one makes the states
            assert torch.cuda.max_memory_allocated() - before < 6 * 2**26


def test_the_largest_seed_that_trainer_takes_works():
    parameter = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    LowMemoryAdamW([parameter], lr=0.1, state_bits=32, seed=2**32 - 1).step()
    assert parameter.max() < 1
