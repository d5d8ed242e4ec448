"""What the 16 GB recipe refuses before anything is loaded, and what it proposes instead."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from common.arguments import SharedArguments
from common.console import InputError
from common.distributed.launch import Launch
from common.distributed.strategy import DDP, FSDP2, ZERO3
from common.train.low_memory import (
    check_bitsandbytes,
    check_method,
    check_step_in_backward,
    compute_dtype,
    optimizer_for,
    trained_dtype,
)
from common.train.low_memory_adamw import LowMemoryAdamW

SHARED = SharedArguments(optimizer="adamw", context_length=128, tokens_per_step=256)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def settings(**changed) -> SimpleNamespace:
    """What TrainingArguments say on one card, as far as it is asked here."""
    usual = dict(
        optim="adamw_torch", bf16=False, fp16=False, device=CPU, deepspeed_plugin=None, world_size=1, max_grad_norm=0.0,
        per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-3, adam_beta1=0.9,
        adam_beta2=0.95, adam_epsilon=1e-8, seed=5,
    )  # fmt: skip
    return SimpleNamespace(**usual | changed)


@pytest.fixture
def card(monkeypatch):
    """Pretend that the device is a card of some compute capability, by default a V100's."""

    def of(capability=(7, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some card")

    return of


def test_bitsandbytes_without_a_gpu_is_refused_with_the_switch_that_works():
    with pytest.raises(InputError, match="--optim adamw_8bit: bitsandbytes needs a GPU, .* cpu.* --optim adamw_torch$"):
        check_method("full", "auto", Launch(), SHARED, settings(optim="adamw_8bit"))
    with pytest.raises(InputError, match="--method qlora: bitsandbytes needs a GPU.*: --method lora --optim"):
        check_method("qlora", "auto", Launch(), SHARED, settings(optim="paged_adamw_8bit"))
    check_method("full", "auto", Launch(), SHARED, settings())
    check_method("lora", "auto", Launch(), SHARED, settings())


def test_bitsandbytes_that_is_not_installed_is_refused_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'bitsandbytes>=0.50,<0.51'\. Without bitsandbytes: --optim x"):
        check_bitsandbytes("--optim y", "--optim x", CUDA)


@pytest.mark.parametrize("capability", [(5, 2), (3, 7)])
def test_a_card_too_old_for_bitsandbytes_is_refused(card, capability):
    card(capability)
    message = rf"no code for Some card \(compute capability {capability[0]}\.{capability[1]}, at least 6\.0"
    with pytest.raises(InputError, match=message):
        check_bitsandbytes("--optim adamw_8bit", "--optim adamw_torch", CUDA)


@pytest.mark.parametrize("error", [RuntimeError("Configured CUDA binary not found at x.so\nlong help"), OSError()])
def test_bitsandbytes_without_its_library_for_this_cuda_version_is_refused(card, monkeypatch, error):
    """As bitsandbytes does it: the import works, and the first call raises."""
    pytest.importorskip("bitsandbytes")

    def fail(*_, **__):
        raise error

    card()
    monkeypatch.setattr("bitsandbytes.functional.quantize_blockwise", fail)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    expected = "Configured CUDA binary not found at x.so" if str(error) else "OSError"
    with pytest.raises(InputError, match=rf"does not work here \({expected}\).* python -m bitsandbytes\. Without"):
        check_bitsandbytes("--optim adamw_8bit", "--optim adamw_torch", CUDA)


def test_bitsandbytes_that_cannot_be_imported_is_refused(card, monkeypatch):
    pytest.importorskip("bitsandbytes")
    card()
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(InputError, match="does not work here"):
        check_bitsandbytes("--optim adamw_8bit", "--optim adamw_torch", CUDA)


@pytest.mark.parametrize(
    ("method", "optim", "why"),
    [
        ("qlora", "adamw_8bit", "weights in 4 bits cannot be gathered and saved"),
        ("full", "adamw_8bit", "8-bit states are not saved rightly"),
        ("lora", "paged_adamw_8bit", "8-bit states are not saved rightly"),
        ("lora", "adamw_torch", "keeps all of the model on one card"),
        ("full", "adamw_torch", "keeps all of the model on one card"),
    ],
)
@pytest.mark.parametrize("strategy", [FSDP2, ZERO3])
def test_sharding_is_refused_with_the_yamls_that_work(method, optim, why, strategy):
    with pytest.raises(InputError, match=rf"--method {method} --optim {optim} under FSDP or .*{why}.*single_gpu\.yaml"):
        check_method(method, "auto", Launch(strategy=strategy, processes=2), SHARED, settings(optim=optim))


def test_several_cards_under_ddp_are_not_refused():
    check_method("lora", "auto", Launch(strategy=DDP, processes=2), SHARED, settings(world_size=2))


def test_flags_that_would_be_ignored_are_refused():
    for method in ("lora", "qlora"):
        with pytest.raises(InputError, match=f"--weights fp32: with --method {method} .*Leave it out"):
            check_method(method, "fp32", Launch(), SHARED, settings())
    with pytest.raises(InputError, match="--tokenizer train: .* Leave it out"):
        check_method("full", "auto", Launch(), SharedArguments(optimizer="adamw", tokenizer="train"), settings())
    with pytest.raises(InputError, match="--optimizer muon: here it is AdamW"):
        check_method("full", "auto", Launch(), SharedArguments(optimizer="muon"), settings())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(world_size=2), "averaged over processes. Use one process"),
        (dict(deepspeed_plugin=object()), "averaged over processes. Use one process"),
        (dict(gradient_accumulation_steps=4), "4 micro-batches .* Use --tokens_per_step 256 and no --gradient_acc"),
        (dict(max_grad_norm=1.0), "--max_grad_norm 1 comes too late. Use --max_grad_norm 0"),
        (dict(fp16=True), "the fp16 scaler.* --mixed_precision bf16"),
    ],
)
def test_what_a_step_inside_backward_excludes_is_refused_by_its_flag(changed, message):
    check_step_in_backward(settings(), SHARED)
    with pytest.raises(InputError, match=f"^--step_in_backward: .*{message}.*leave the flag out"):
        check_step_in_backward(settings(**changed), SHARED)


def test_accumulation_that_is_derived_later_is_refused_too():
    """Under --plan, where gradient_accumulation_steps is still 0."""
    check_step_in_backward(settings(gradient_accumulation_steps=0), SHARED)
    with pytest.raises(InputError, match="2 micro-batches"):
        shared = SharedArguments(context_length=128, tokens_per_step=512)
        check_step_in_backward(settings(gradient_accumulation_steps=0), shared)


def test_the_dtypes_follow_the_precision():
    assert compute_dtype(settings(bf16=True)) == torch.bfloat16 and compute_dtype(settings(fp16=True)) == torch.float16
    assert trained_dtype("auto", settings(bf16=True)) == torch.bfloat16
    assert trained_dtype("auto", settings(fp16=True)) == trained_dtype("auto", settings()) == torch.float32
    assert trained_dtype("fp32", settings(bf16=True)) == torch.float32
    with pytest.raises(InputError, match="--weights bf16: with mixed_precision fp16 the masters are fp32"):
        trained_dtype("bf16", settings(fp16=True))


@pytest.mark.parametrize(
    ("dtype", "in_backward", "optim", "bits"),
    [
        (torch.bfloat16, False, "adamw_8bit", 8),
        (torch.float32, True, "adamw_torch", 32),
        (None, True, "adamw_torch_fused", 32),
        (torch.float32, False, "adafactor", None),
        (None, False, "paged_adamw_8bit", None),
    ],
)
def test_bf16_weights_and_steps_inside_backward_have_an_optimizer_of_their_own(dtype, in_backward, optim, bits):
    found = optimizer_for(dtype, in_backward, settings(optim=optim))
    if bits is None:
        assert found is None
        return
    kind, arguments = found
    assert kind is LowMemoryAdamW and arguments["state_bits"] == bits and arguments["in_backward"] is in_backward
    kind([torch.nn.Parameter(torch.ones(3))], **arguments)


def test_another_optimizer_for_bf16_weights_is_refused():
    for optim in ("adafactor", "paged_adamw_8bit"):
        with pytest.raises(InputError, match=f"--optim {optim}: weights in bf16.* Use --optim adamw_8bit"):
            optimizer_for(torch.bfloat16, False, settings(optim=optim))
