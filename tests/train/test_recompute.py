"""Recompute, of all layers or of some, changes no gradient: compiled, sharded, with the fused loss."""

from pathlib import Path

import pytest
import torch
from accelerate.utils import compile_regions
from accelerate.utils.other import compile_regions_deepspeed, compile_regions_fsdp2
from conftest import losses, small_run
from test_fused_loss import assert_same_gradients, batch, gradients, tiny_model
from torch._dynamo import lookup_backend
from torch.distributed.fsdp import fully_shard
from transformers import HfArgumentParser, TrainingArguments
from two_processes import in_two_processes

from common.model.fused_loss import use_fused_loss

RECOMPUTE = ["--gradient_checkpointing", "true"]
FLAGS = [  # of all layers, and of every second one
    RECOMPUTE,
    [*RECOMPUTE, "--gradient_checkpointing_kwargs", '{"every_n_layers": 2}'],
]


class Counter:
    """Count how often the layers' MLPs are computed."""

    def __init__(self, model):
        self.calls = [0] * len(model.model.layers)
        for index, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, index=index: self.count(index))

    @torch.compiler.disable
    def count(self, index: int) -> None:
        self.calls[index] += 1


@pytest.mark.parametrize("flags", FLAGS, ids=["all layers", "every second"])
@pytest.mark.parametrize("compiler", [None, compile_regions, compile_regions_deepspeed], ids=["eager", "ddp", "zero"])
def test_recompute_changes_no_gradient(flags, compiler):
    [training] = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses([*flags, "--use_cpu", "true"])
    arguments = dict(training.gradient_checkpointing_kwargs or {})  # as Trainer takes them apart
    plain, recomputed = tiny_model(), tiny_model()
    for model in (plain, recomputed):
        use_fused_loss(model)
        model.train()
    recomputed.gradient_checkpointing_enable(None, every_n_layers=arguments.pop("every_n_layers", 1))
    assert not arguments
    counter = Counter(recomputed) if compiler is None else None  # a hook in the layers would keep them from compiling
    compiled = recomputed
    if compiler is not None:  # one of the two compilers works in place and returns nothing
        result = compiler(recomputed, backend="aot_eager", dynamic=False)
        compiled = recomputed if result is None else result
    for model in (plain, compiled):
        model(**batch(), num_items_in_batch=torch.tensor(23)).loss.backward()
    assert_same_gradients(gradients(recomputed), gradients(plain))
    if counter is not None:
        assert counter.calls == ([2, 2] if len(flags) == 2 else [2, 1])


def check_sharded(rank: int, folder: Path) -> None:
    """In each of two processes: recompute by transformers, the rest as accelerate does it, in its order."""
    batches, items = [batch(seed=0), batch(seed=1, ignored=12)], torch.tensor(23 + 18)
    alone = tiny_model()
    for inputs in batches:
        alone(**inputs, num_items_in_batch=items).loss.backward()
    graphs = []

    def backend(graph, inputs, **settings):
        graphs.append("".join(module.code for module in graph.modules() if isinstance(module, torch.fx.GraphModule)))
        return lookup_backend("aot_eager")(graph, inputs, **settings)

    for compiled in (False, True):
        model = tiny_model()
        use_fused_loss(model)
        model.gradient_checkpointing_enable()
        counter = None if compiled else Counter(model)
        if compiled:
            compile_regions_fsdp2(model, backend=backend, dynamic=False)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        model.train()
        (2 * model(**batches[rank], num_items_in_batch=items).loss).backward()
        assert_same_gradients({n: grad.full_tensor() for n, grad in gradients(model).items()}, gradients(alone))
        assert counter is None or counter.calls == [2, 2]
    whole = [graph for graph in graphs if "scaled_dot_product_attention" in graph and "silu" in graph]
    assert len(whole) == 1, "a layer, attention and MLP, is one graph: the same for all of them"


def test_sharded_by_fsdp2_recompute_changes_no_gradient(tmp_path):
    in_two_processes(check_sharded, tmp_path)


@pytest.mark.heavy
def test_a_run_with_recompute_has_the_same_losses(wiki, cache_dir, tmp_path):
    short = ["--max_steps", "3", "--eval_strategy", "no", "--save_strategy", "no"]
    wiki.main(small_run(cache_dir, tmp_path / "plain", *short))
    for number, flags in enumerate(FLAGS):
        wiki.main(small_run(cache_dir, tmp_path / str(number), *short, *flags))
        assert losses(tmp_path / str(number)) == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
