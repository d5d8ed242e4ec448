"""Pipeline stages of a model: the cut, what it refuses, and the arithmetic beside it.

The run itself is in test_explicit_pipeline.py. The truth is the whole model, or a number by hand.
"""

import time
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.console import InputError
from common.distributed.launch import Launch
from common.distributed.pipeline import (
    PassesOn,
    Stopwatch,
    bubble_by_formula,
    counted_once,
    cut,
    divide_launch,
    divide_layers,
    keep_only,
    tied_weight,
)
from common.distributed.strategy import DDP, FSDP2, SINGLE

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
TOKENS = dict(vocab_size=64, bos_token_id=None, eos_token_id=1, pad_token_id=None)


def build(model_type: str, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **TOKENS | SMALL | settings))


def cuts(model, stages: int) -> list:
    layers = divide_layers(model, stages)
    return [cut(model, layers[stage], stage == 0, stage == stages - 1) for stage in range(stages)]


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("qwen2", {"tie_word_embeddings": True}),
        ("llama", {}),
        ("qwen3", {"head_dim": 8}),
        ("cohere", {"logit_scale": 0.5}),  # logits are scaled in the model's own forward
        ("mistral", {"sliding_window": 4}),
        ("gpt_neox", {}),
    ],
)
def test_stages_one_after_the_other_are_the_model(model_type, settings, stages):
    """Logits and gradients; and every parameter is in one stage, with its name in the whole model."""
    model = build(model_type, **settings)
    parts = cuts(model, stages)
    tied = settings.get("tie_word_embeddings", model.config.tie_word_embeddings)
    own = [dict(part.named_parameters()) for part in parts]
    names = [name for parameters in own for name in parameters]
    expected = {name for name, _ in model.named_parameters()} | ({"lm_head.weight"} if tied else set())
    assert sorted(names) == sorted(expected)
    for parameters in own:
        assert all(parameter is model.get_parameter(name) for name, parameter in parameters.items())

    ids = torch.randint(64, (2, 16))
    rows = {"position_ids": torch.arange(16).expand(2, 16), "use_cache": False}
    model(input_ids=ids, **rows).logits.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    passed = {"input_ids": ids}
    for part in parts[:-1]:
        passed = {"inputs_embeds": part.base_model(**passed, **rows).last_hidden_state}
    parts[-1](**passed, **rows).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("granite", {"embedding_multiplier": 12.0}, "its stages do not compute what the whole model computes"),
        ("gpt2", {}, "GPT2LMHeadModel: transformers has no pipeline plan for it"),
        ("mixtral", {"num_local_experts": 4}, "MixtralForCausalLM: the loss of its router is over the layers of all"),
    ],
)
def test_a_family_that_would_train_wrongly_is_refused(model_type, settings, message):
    with pytest.raises(InputError, match=message):
        divide_layers(build(model_type, **settings), 2)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(InputError, match="5 stages for 4 layers: each stage needs at least one"):
        divide_layers(build("qwen2"), 5)


@pytest.mark.parametrize(("layers", "vocabulary"), [(12, 64), (12, 1000), (12, 20_000), (7, 2000), (3, 64)])
@pytest.mark.parametrize("stages", [2, 3])
def test_the_largest_stage_is_as_small_as_it_can_be(layers, vocabulary, stages):
    """Against all ways to cut; a layer more or less than the best is not worth another rule."""
    model = build("llama", num_hidden_layers=layers, vocab_size=vocabulary, tie_word_embeddings=False)
    of_layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel() / of_layer

    def largest(counts) -> float:
        return max(*counts[:-1], counts[-1] + head)

    ways = [
        [end - begin for begin, end in zip((0, *borders), (*borders, layers), strict=True)]
        for borders in combinations(range(1, layers), stages - 1)
    ]
    found = divide_layers(model, stages)
    assert [number for own in found for number in own] == list(range(layers))
    assert largest([len(own) for own in found]) <= min(map(largest, ways)) + 1


def waiting_share(processes: int, micro_batches: int) -> float:
    """Return the idle share of 1F1B, played through: a forward and a backward take one unit of time each."""
    done: dict[tuple, int] = {}  # (kind, stage, micro-batch) -> when it was done
    left = []
    for stage in range(processes):
        warmup = min(micro_batches, processes - stage)
        forwards = [("F", stage, i) for i in range(micro_batches)]
        backwards = [("B", stage, i) for i in range(micro_batches)]
        turns = forwards[:warmup]
        for i, backward in enumerate(backwards):
            turns += [backward, *forwards[warmup + i : warmup + i + 1]]
        left.append(turns)
    time_ = 0
    while any(left):
        started = []
        for turns in left:
            if not turns:
                continue
            kind, stage, i = turns[0]
            before = [("F", stage - 1, i)] if kind == "F" else [("B", stage + 1, i), ("F", stage, i)]
            if all(done.get(each, time_ + 1) <= time_ for each in before if 0 <= each[1] < processes):
                started.append(turns.pop(0))
        time_ += 1
        done |= dict.fromkeys(started, time_)
    return 1 - 2 * micro_batches / time_


@pytest.mark.parametrize(("processes", "micro_batches"), [(2, 2), (2, 4), (2, 16), (4, 4), (4, 8), (4, 10), (8, 64)])
def test_the_formula_is_the_waiting_of_the_schedule(processes, micro_batches):
    assert bubble_by_formula(processes, micro_batches) == pytest.approx(waiting_share(processes, micro_batches))


def test_interleaving_divides_the_waiting():
    assert bubble_by_formula(4, 8) == pytest.approx(3 / 11)
    assert bubble_by_formula(4, 8, 2) == pytest.approx(3 / 19)
    with pytest.raises(InputError, match="9 micro-batches a step: the interleaved schedule needs 4 rounds"):
        bubble_by_formula(2, 9, 2)


@pytest.mark.parametrize(
    ("launch", "size", "stages", "message"),
    [
        (Launch(strategy=SINGLE), 0, 1, "single, 1 processes: a pipeline needs at least two processes"),
        (Launch(strategy=FSDP2, processes=2), 0, 1, "strategy fsdp2"),
        (Launch(strategy=DDP, processes=2, tensor_parallel=2), 0, 1, "nothing else that divides the model"),
        (Launch(strategy=DDP, processes=2, precision="fp16"), 0, 1, "mixed_precision fp16: a pipeline trains in bf16"),
        (Launch(strategy=DDP, processes=2, precision="fp8"), 0, 1, "mixed_precision fp8"),
        (Launch(strategy=DDP, processes=4), 3, 1, "4 processes cannot be divided into pipelines of 3"),
        (Launch(strategy=DDP, processes=4), 1, 1, "4 processes cannot be divided into pipelines of 1"),
        (Launch(strategy=DDP, processes=4), 2, 0, "--stages_per_process 0: must be at least 1"),
    ],
)
def test_a_launch_that_is_none_for_pipelines_is_refused(launch, size, stages, message):
    with pytest.raises(InputError, match=message):
        divide_launch(launch, size, stages)


def test_rows_are_read_by_pipelines_not_by_processes():
    launch = Launch(strategy=DDP, processes=8)
    assert [divide_launch(launch, size, 1).row_readers for size in (0, 8, 4, 2)] == [1, 1, 2, 4]


def test_a_tied_matrix_is_counted_once_and_an_untied_one_wherever_it_is():
    for tied in (True, False):
        model = build("qwen2", tie_word_embeddings=tied)
        parts = cuts(model, 3)
        grids = [SimpleNamespace(position=position, ends=[None, "both"][position != 1]) for position in range(3)]
        copies = [tied_weight([part], grid) for part, grid in zip(parts, grids, strict=True)]
        matrix = model.get_input_embeddings().weight
        assert [copy is matrix for copy in copies] == [tied, False, tied]
        counted = [
            parameter
            for part, grid in zip(parts, grids, strict=True)
            for parameter in counted_once([part], grid).values()
        ]
        assert len(counted) == len(list(model.parameters()))
        assert {id(parameter) for parameter in counted} == {id(parameter) for parameter in model.parameters()}


def test_an_optimizer_keeps_its_groups_and_the_parameters_of_its_stages():
    model = build("qwen2", tie_word_embeddings=True)
    parts = torch.nn.ModuleList(cuts(model, 2)[1:])
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    keep_only(optimizer, parts)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    kept = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in kept} == {id(parameter) for parameter in parts.parameters()}
    assert all(parameter.dim() == 1 for parameter in optimizer.param_groups[1]["params"])


def test_a_module_of_another_stage_returns_what_it_is_given_first():
    assert PassesOn()("hidden", "mask", position_ids=None) == "hidden"


def test_a_stopwatch_adds_up_and_starts_again():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch:
            time.sleep(0.02)
        time.sleep(0.05)
    assert 0.04 <= watch.seconds() < 0.09
    assert watch.seconds() == 0
