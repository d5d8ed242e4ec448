"""What a launch decided, and in which precision sums are made under it."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.other import compile_regions_deepspeed
from test_fused_loss import assert_same_gradients, batch, gradients, tiny_model
from torch._dynamo import lookup_backend

from common.distributed.launch import Launch
from common.distributed.strategy import DDP, FSDP2, ZERO2
from common.distributed.workarounds import add_up_in_fp32, gather_layers_whole, reduce_in_fp32
from common.model.fused_loss import use_fused_loss


def test_micro_batches_are_added_up_in_fp32():
    """DeepSpeed is told so unless its JSON has its own data types; FSDP2 synchronizes each micro-batch."""
    plugin = SimpleNamespace(deepspeed_config={})
    training = SimpleNamespace(deepspeed_plugin=plugin, accelerator_config=SimpleNamespace())
    add_up_in_fp32(Launch(strategy=ZERO2), training)
    assert plugin.deepspeed_config == {"data_types": {"grad_accum_dtype": "fp32"}}
    assert not vars(training.accelerator_config)
    plugin.deepspeed_config = {"data_types": {"grad_accum_dtype": "bf16"}}
    add_up_in_fp32(Launch(strategy=ZERO2), training)
    assert plugin.deepspeed_config == {"data_types": {"grad_accum_dtype": "bf16"}}
    for strategy, settings in ((DDP, {}), (FSDP2, {"gradient_accumulation_kwargs": {"sync_each_batch": True}})):
        training = SimpleNamespace(deepspeed_plugin=None, accelerator_config=SimpleNamespace())
        add_up_in_fp32(Launch(strategy=strategy), training)
        assert vars(training.accelerator_config) == settings


@pytest.mark.parametrize(
    ("precision", "computed"),
    [("bf16", torch.bfloat16), ("fp8", torch.bfloat16), ("fp16", torch.float16), ("no", None)],
)
def test_fsdp2_adds_up_in_fp32_and_returns_the_loss_as_it_is(precision, computed):
    plugin = SimpleNamespace(mixed_precision_policy=None)
    reduce_in_fp32(SimpleNamespace(mixed_precision=precision, state=SimpleNamespace(fsdp_plugin=plugin)))
    policy = plugin.mixed_precision_policy
    if computed is None:
        assert policy is None
    else:
        assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (computed, torch.float32, None)
    reduce_in_fp32(SimpleNamespace(mixed_precision=precision, state=SimpleNamespace()))  # another strategy


@pytest.fixture(autouse=True)
def views():
    """torch's own setting, before and after a test that changes it; nothing is compiled."""
    with torch._functorch.config.patch(recompute_views=False):
        yield lambda: torch._functorch.config.recompute_views


def zero_plugin(stage: int, **zero) -> SimpleNamespace:
    return SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": zero})


@pytest.mark.parametrize("compiled", [False, True])
def test_zero3_gathers_whole_layers(views, compiled):
    """Compiled, DeepSpeed's linear layer is left out, whoever asked for it: torch 2.11 has wrong gradients then.

    No run here can show that: it takes that release.
    """
    two, three, model = zero_plugin(2), zero_plugin(3, memory_efficient_linear=True), tiny_model()
    gather_layers_whole(None, tiny_model(), compiled)
    gather_layers_whole(two, tiny_model(), compiled)
    assert two == zero_plugin(2) and not views()
    gather_layers_whole(three, model, compiled)
    zero = three.deepspeed_config["zero_optimization"]
    assert zero["leaf_module"] == {"classes": [type(model.model.layers[0]).__name__]}
    assert (zero["memory_efficient_linear"], views()) == ((False, True) if compiled else (True, False))


def shared_linear(model) -> None:
    first, second = model.model.layers
    second.mlp.up_proj = first.mlp.up_proj


def shared_with_the_end(model) -> None:
    model.model.norm.weight = model.model.layers[0].input_layernorm.weight


def no_names(model) -> None:
    model._no_split_modules = None


@pytest.mark.parametrize(
    ("change", "own", "why"),
    [
        (shared_linear, {}, "share parameters"),
        (shared_with_the_end, {}, "share parameters"),
        (no_names, {}, "share parameters"),
        (lambda model: None, {"leaf_module": {"classes": ["Mine"]}}, "own leaf_module"),
    ],
)
def test_what_zero3_does_not_gather_whole_is_not_compiled(views, capsys, change, own, why):
    """DeepSpeed reduces a layer's gradients at once: what another layer adds to a shared one would be lost."""
    model, plugin = tiny_model(), zero_plugin(3, **own)
    change(model)
    gather_layers_whole(plugin, model, compiled=True)
    assert plugin == zero_plugin(3, **own) and not views()
    printed = capsys.readouterr().out
    assert "not compiled: " in printed and why in printed
    compile_regions_deepspeed(model, backend="aot_eager", dynamic=False)
    model.compile(backend="aot_eager", dynamic=False)
    assert not any("forward" in vars(module) or module._compiled_call_impl for module in model.modules())


def test_the_first_layers_hooks_come_in_time_after_a_frozen_embedding():
    """Seen: without a gradient for the layer's input, DeepSpeed lets its parameters go before backward is done."""
    model = tiny_model()
    model.get_input_embeddings().weight.requires_grad_(False)
    gather_layers_whole(zero_plugin(3), model, compiled=False)
    assert model.get_input_embeddings()(torch.tensor([[1]])).requires_grad


@pytest.mark.parametrize("regional", [True, False])
def test_zero3_compiles_whole_layers_and_not_the_hooks_around_them(regional):
    plain, compiled, graphs, seen = tiny_model(), tiny_model(), [], []
    for model in (plain, compiled):
        use_fused_loss(model)
        model.config.use_cache = False  # as Trainer
    gather_layers_whole(zero_plugin(3), compiled, compiled=True)
    for layer in compiled.model.layers:
        layer.register_forward_pre_hook(lambda *_: seen.append(torch.compiler.is_compiling()))

    def backend(graph, inputs, **settings):
        graphs.append(graph.code)
        return lookup_backend("aot_eager")(graph, inputs, **settings)

    if regional:
        compile_regions_deepspeed(compiled, backend=backend, dynamic=False)
    else:
        compiled.compile(backend=backend, dynamic=False)
    for model in (plain, compiled):
        model(**batch(), num_items_in_batch=torch.tensor(23)).loss.backward()
    assert_same_gradients(gradients(compiled), gradients(plain))
    assert seen == [False, False] and sum("silu" in graph and "attention" in graph for graph in graphs) == 1
