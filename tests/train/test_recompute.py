"""Recompute, of all layers, of some, or of cheap operations, changes no gradient: compiled, sharded, fused loss."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.utils import compile_regions
from accelerate.utils.other import compile_regions_deepspeed, compile_regions_fsdp2
from conftest import load_recipe, losses, small_run
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from launched_processes import FSDP2, in_launched_processes, zero
from test_fused_loss import assert_same_gradients, batch, gradients, tiny_model
from torch._dynamo import lookup_backend
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from two_processes import in_two_processes

from common.console import InputError
from common.distributed.launch import Launch
from common.model.fused_loss import use_fused_loss
from common.model.recompute import choose_recompute, keep_results

CHOICES = ["all", "2", "keep_attention", "keep_products"]
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION, ACTIVATION = "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::silu"
# By hand: how often the two layers' attention, activation function and matrix products are computed in a step. A layer
# has 7 products in forward and 14 in backward. Recompute ends with the last thing that backward needs, so it leaves out
# each layer's last product. The head's products, fused with the loss, are not counted: they are the same in all.
EXPECTED = {
    "no": (2, 2, 2 * 21),
    "all": (4, 4, 2 * 27),
    "2": (3, 3, 21 + 27),
    "keep_attention": (2, 4, 2 * 27),
    "keep_products": (2, 4, 2 * 21),
}


class Operations(TorchDispatchMode):
    """Count what is really computed, by name."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counted[function.name().split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def recomputing(recomputed: str, compiled: bool = False, model=None):
    """Return a model that recomputes as ``--recompute`` says, switched on as Trainer does it."""
    training = TrainingArguments(use_cpu=True)
    launch = choose_recompute(None if recomputed == "no" else recomputed, Launch(), training)
    model = tiny_model() if model is None else model
    keep_results(model, launch.recomputed, compiled)
    arguments = dict(training.gradient_checkpointing_kwargs or {})
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable(None, every_n_layers=arguments.pop("every_n_layers", 1))
    assert not arguments
    model.train()
    return model


def backward(model) -> Counter:
    """Take one step's gradients; return what was computed, by name."""
    with Operations() as operations:
        model(**batch(), num_items_in_batch=torch.tensor(23)).loss.backward()
    return operations.counted


def test_what_is_kept_is_not_computed_again():
    plain = use_fused_loss_of(recomputing("no"))
    counted = {"no": backward(plain)}
    of_the_head = counted["no"]["aten::mm"] + counted["no"]["aten::addmm"] - EXPECTED["no"][2]
    for recomputed in CHOICES:
        model = use_fused_loss_of(recomputing(recomputed))
        counted[recomputed] = backward(model)
        assert_same_gradients(gradients(model), gradients(plain))
    for recomputed, (attention, activation, products) in EXPECTED.items():
        found = counted[recomputed]
        assert (found[ATTENTION], found[ACTIVATION]) == (attention, activation), recomputed
        assert found["aten::mm"] + found["aten::addmm"] - of_the_head == products, recomputed


def use_fused_loss_of(model):
    use_fused_loss(model)
    return model


@pytest.mark.parametrize("recomputed", CHOICES)
@pytest.mark.parametrize("compiler", [compile_regions, compile_regions_deepspeed], ids=["ddp", "zero"])
def test_compiled_recompute_changes_no_gradient(recomputed, compiler):
    plain, model = use_fused_loss_of(recomputing("no")), use_fused_loss_of(recomputing(recomputed, compiled=True))
    in_backward = []  # of each graph of a backward pass, how often it computes attention

    def note(graph, inputs):
        # It may also be an argument: of an operation that keeps the random state.
        in_backward.append(sum(FORWARD in (node.target, *node.args) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        bw_compiler=note,
        partition_fn=min_cut_rematerialization_partition,
    )
    result = compiler(model, backend=backend, dynamic=False)
    compiled = model if result is None else result  # one of the two compilers works in place and returns nothing
    for each in (plain, compiled):
        each(**batch(), num_items_in_batch=torch.tensor(23)).loss.backward()
    assert_same_gradients(gradients(model), gradients(plain))
    assert max(in_backward) == (1 if recomputed in ("all", "2") else 0)


@pytest.mark.parametrize(
    ("wanted", "given", "words"),
    [
        ("0", {}, "--recompute 0: all, keep_attention, keep_products, or a number from 1"),
        ("some", {}, "--recompute some: all"),
        ("2", {"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "both say what is recomputed"),
    ],
)
def test_a_choice_that_is_none_is_refused(wanted, given, words):
    with pytest.raises(InputError, match=words):
        choose_recompute(wanted, Launch(), TrainingArguments(use_cpu=True, **given))


def test_the_flag_narrows_down_what_the_yaml_switches_on():
    training = TrainingArguments(use_cpu=True)
    by_yaml = choose_recompute("2", Launch(recompute="the key"), training)
    assert (by_yaml.recompute, by_yaml.recomputed) == ("the key, --recompute 2", "2")
    assert training.gradient_checkpointing and training.gradient_checkpointing_kwargs == {"every_n_layers": 2}
    assert choose_recompute(None, Launch(), TrainingArguments(use_cpu=True)).recompute is None
    flags = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"every_n_layers": 3})
    by_transformers = choose_recompute(None, Launch(), TrainingArguments(use_cpu=True, **flags))
    assert (by_transformers.recompute, by_transformers.recomputed) == ("--gradient_checkpointing", "3")


DROPOUT = dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=99, attn_pdrop=0.1, resid_pdrop=0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(attn_implementation="eager"), "attention of GPT2LMHeadModel here .eager. is no single operation"),
        ({}, "with attn_pdrop 0.1: dropout after attention would differ"),
    ],
)
def test_results_that_cannot_be_kept_are_refused(changes, words):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**DROPOUT), **changes)
    for recomputed in ("keep_attention", "keep_products"):
        with pytest.raises(InputError, match=words):
            keep_results(model, recomputed, compiled=True)
    keep_results(model, "all", compiled=True)


def test_flex_attention_that_is_compiled_by_itself_is_refused():
    model = tiny_model()
    model.config._attn_implementation = "documents"
    with pytest.raises(InputError, match="flex attention, .* Use a YAML with dynamo_config"):
        keep_results(model, "keep_products", compiled=False)
    keep_results(model, "keep_products", compiled=True)


class Calls:
    """Count how often the layers' MLPs are computed."""

    def __init__(self, model):
        self.calls = [0] * len(model.model.layers)
        for index, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, index=index: self.count(index))

    @torch.compiler.disable
    def count(self, index: int) -> None:
        self.calls[index] += 1


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

    for compiled, recomputed in ((False, "all"), (False, "keep_products"), (True, "all"), (True, "keep_products")):
        model = tiny_model()
        use_fused_loss(model)
        keep_results(model, recomputed, compiled)
        model.gradient_checkpointing_enable()
        counter = None if compiled else Calls(model)
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
    assert len(whole) == 2, "a layer, attention and MLP, is one graph: the same for all of them"


@pytest.mark.heavy
def test_sharded_by_fsdp2_recompute_changes_no_gradient(tmp_path):
    in_two_processes(check_sharded, tmp_path)


@pytest.mark.heavy
def test_a_run_with_recompute_has_the_same_losses(wiki, cache_dir, tmp_path):
    short = ["--max_steps", "3", "--eval_strategy", "no", "--save_strategy", "no"]
    wiki.main(small_run(cache_dir, tmp_path / "plain", *short))
    for flags in ("--gradient_checkpointing true", *[f"--recompute {choice}" for choice in CHOICES]):
        wiki.main(small_run(cache_dir, tmp_path / flags, *short, *flags.split()))
        assert losses(tmp_path / flags) == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)


def check_choice(rank: int, folder: Path) -> None:
    choice = os.environ["CHOICE"]
    flags = ["--recompute", choice, "--per_device_train_batch_size", "2", *SHORT]
    load_recipe("wiki_zh_scratch").main(small_run(folder / "cache", folder / choice, *flags))


SHORT = ["--max_steps", "3", "--eval_strategy", "no", "--save_strategy", "no", "--optimizer", "adamw"]


@pytest.mark.heavy
@pytest.mark.parametrize("strategy", [{}, FSDP2, zero(2), zero(3)], ids=["ddp", "fsdp2", "zero2", "zero3"])
def test_recompute_on_two_processes_has_the_losses_of_one(wiki, cache_dir, tmp_path, strategy):
    (tmp_path / "cache").symlink_to(cache_dir)
    wiki.main(small_run(cache_dir, tmp_path / "plain", *SHORT))
    for choice in CHOICES:  # each in new processes: DeepSpeed keeps a group of those that have ended
        in_launched_processes(2, check_choice, tmp_path, CHOICE=choice, **strategy)
        said = (tmp_path / "output.0").read_text()
        assert f"recompute: yes (--recompute {choice})" in said
        assert losses(tmp_path / choice) == pytest.approx(losses(tmp_path / "plain"), rel=2e-5)
