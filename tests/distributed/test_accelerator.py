"""Devices that are not here, by what their modules of torch would say."""

import platform
from types import SimpleNamespace

import pytest
import torch

from common.distributed import accelerator
from common.model.counts import peak_tflops

CPU, CUDA, MPS, XPU = map(torch.device, ("cpu", "cuda", "mps", "xpu"))
GIB = 2**30


def no_answer(*_):
    raise RuntimeError("Allocator for mps is not a DeviceAllocator.")  # torch 2.11 and 2.12 on Apple's GPUs


@pytest.fixture
def npu(monkeypatch) -> torch.device:
    """An Ascend card, of which only the module is there; its random state is a number."""
    module = SimpleNamespace(
        state=torch.tensor([7]),
        get_device_name=lambda device: "Ascend910B3",
        get_device_properties=lambda device: SimpleNamespace(total_memory=64 * GIB),
        get_rng_state=lambda device: module.state,
        set_rng_state=lambda state, device: setattr(module, "state", state),
        is_bf16_supported=lambda: True,
    )
    known = torch.get_device_module
    monkeypatch.setattr(torch, "get_device_module", lambda device: module if device in (card, "npu") else known(device))
    card = SimpleNamespace(type="npu", module=module)
    return card


@pytest.fixture
def apple(monkeypatch) -> torch.device:
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M2 Max")
    monkeypatch.setattr(torch.backends.mps, "get_core_count", lambda: 38)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 2 * GIB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * GIB)
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.accelerator, name, no_answer)
    return MPS


def test_names(apple, npu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card of {device}")
    assert accelerator.device_name(CUDA) == "card of cuda"
    assert accelerator.device_name(apple) == "Apple M2 Max"
    assert accelerator.device_name(npu) == "Ascend910B3"
    assert accelerator.device_name(CPU) == f"cpu, {platform.machine()}"


def test_memory_of_a_card(apple, npu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    cards = (CUDA, npu, apple, CPU)
    assert [accelerator.card_bytes(card) for card in cards] == [80 * GIB, 64 * GIB, None, None]


def test_memory_in_use_where_torch_accelerator_has_no_answer(apple):
    assert accelerator.memory_gib(apple) == {"memory_allocated_gib": 2, "memory_peak_gib": 3}
    accelerator.reset_peak_memory(apple)


def test_memory_in_use_of_a_card_is_that_of_torch_accelerator(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: 5 * GIB)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 6 * GIB)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", asked.append)
    assert accelerator.memory_gib(CUDA) == {"memory_allocated_gib": 5, "memory_peak_gib": 6}
    accelerator.reset_peak_memory(CUDA)
    assert asked == [CUDA]


def test_memory_in_use_on_a_cpu_is_the_processes():
    before = accelerator.memory_gib(CPU)
    held = torch.ones(64 * 2**20)  # 256 MiB
    after = accelerator.memory_gib(CPU)
    assert after["memory_allocated_gib"] - before["memory_allocated_gib"] == pytest.approx(0.25, abs=0.1)
    assert after["memory_peak_gib"] >= after["memory_allocated_gib"] - 0.01 and held.numel()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB, max allowed: 9.07 GB)."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory_is_known_by_class_or_by_metals_words(error, expected):
    assert accelerator.ran_out_of_memory(error) is expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 4), True)])
def test_bf16_that_is_only_emulated_does_not_count(monkeypatch, npu, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert accelerator.computes_in_bf16(CUDA) is expected
    assert [accelerator.computes_in_bf16(device) for device in (CPU, MPS, XPU, npu)] == [False, False, False, True]


def test_only_cards_with_memory_of_their_own_have_pinned_copies(npu):
    assert not accelerator.pins_memory(CPU) and not accelerator.pins_memory(MPS)
    assert all(accelerator.pins_memory(device) for device in (CUDA, XPU, npu))


def test_the_random_state_of_a_device_is_kept_and_continued(npu):
    kept = accelerator.RandomState(npu).state_dict()
    with accelerator.torch_random_states_kept(npu):
        npu.module.state = torch.tensor([8])
        on_cpu = torch.rand(1)
    assert npu.module.state.item() == 7
    npu.module.state = torch.tensor([9])
    accelerator.RandomState(npu).load_state_dict(kept)
    assert npu.module.state.item() == 7 and torch.equal(torch.rand(1), on_cpu)


@pytest.mark.parametrize(
    ("name", "cores", "peak"),
    [("Apple M1", 8, 2.6), ("Apple M1 Max", 32, 10.4), ("Apple M2", 10, 3.6), ("Apple M3 Max", 40, 14.3),
     ("Apple M4", 10, 4.04), ("Apple M9", 10, None)],
)  # fmt: skip
def test_the_peak_of_apples_gpus_follows_from_their_cores(monkeypatch, name, cores, peak):
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: name)
    monkeypatch.setattr(torch.backends.mps, "get_core_count", lambda: cores)
    assert peak_tflops(MPS, half_precision=True) == (peak and pytest.approx(peak, rel=0.01))


def test_the_peak_of_an_ascend_card(npu):
    assert peak_tflops(npu, half_precision=True) == pytest.approx(20 * 2 * 16**3 * 1.8e9 / 1e12, rel=1e-3)
