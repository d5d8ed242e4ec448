"""Rows shared by several cards: who reads which, what is refused, and how torch cuts them. Attention over the pieces
needs GPUs: its losses are in benchmarks/README.md."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import load_recipe, small_run
from transformers import AutoConfig, AutoModelForCausalLM
from two_processes import in_two_processes

from common.console import InputError
from common.distributed.context_parallel import check_parallelism, divided_rows
from common.distributed.launch import Launch, read_launch
from common.model.attention import set_attention
from common.train.batch import set_batch
from common.train.setting import launch_of_yaml

YAML = "accelerate_configs/fsdp2_context_parallel.yaml"


def asked(monkeypatch, processes=1, process=0, **sizes) -> Launch:
    """Return what a process reads of an environment as the launcher leaves it."""
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("RANK", str(process))
    for kind, size in sizes.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", str(size))
    return read_launch()


def test_without_a_parallelism_config_every_process_reads_its_own_rows(monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")  # left over, not asked for
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    launch = read_launch()
    assert launch.context_parallel == 1 and launch.row_readers == 8 and launch.reads_rows
    check_parallelism(launch, 511, isolated=True)


def test_processes_that_share_a_row_count_as_one_reader(monkeypatch, capsys):
    launches = [asked(monkeypatch, processes=8, process=process, dp_shard=4, cp=2) for process in range(4)]
    assert launches[0].row_readers == 4
    assert [launch.reads_rows for launch in launches] == [True, False, True, False]
    sizes = dict(per_device_train_batch_size=4, per_device_eval_batch_size=4)
    training = SimpleNamespace(**sizes, gradient_accumulation_steps=0)
    monkeypatch.setenv("RANK", "0")  # the process that prints
    assert set_batch(launches[0], training, 131_072, 4096) == 32
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (4, 2)
    assert "4 rows x 4 processes x 4096 tokens x 2 accumulated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sizes", "processes", "length", "isolated", "words"),
    [
        (dict(tp=2), 4, 512, False, "1 x 1 x 2 processes .dp_replicate x dp_shard x tp., .* Use .*dp_shard_size 2"),
        (dict(tp=2, cp=2), 4, 512, False, "tp_size 2 with context parallelism: not tried"),
        (dict(tp=2, dp_replicate=2), 4, 512, False, "tp_size 2 with dp_replicate_size above 1"),
        (dict(ep=2, dp_shard=2, tp=2), 4, 512, False, "ep_size 2 with tensor parallelism: not tried"),
        (dict(ep=2, dp_shard=2, dp_replicate=2), 4, 512, False, "ep_size 2 with dp_replicate_size above 1"),
        (dict(ep=2, dp_shard=2, cp=2), 4, 512, False, "ep_size 2 with context parallelism: not tried"),
        (dict(ep=2), 2, 512, False, "ep_size 2 does not divide the 1 processes of parallelism_config_dp_shard_size"),
        (dict(ep=3, dp_shard=4), 4, 512, False, "ep_size 3 does not divide the 4 .*PARALLELISM_CONFIG_EP_SIZE"),
        (dict(ep=2, dp_shard=2), 8, 512, False, "these are 8. Use --parallelism_config_dp_shard_size 8"),
        (dict(sp=2), 2, 512, False, "sp_size 2 with ddp: not tried here. Use .*fsdp2_ulysses.yaml"),
        (dict(cp=2), 8, 512, False, "1 x 1 x 2 processes .* these are 8. Use --parallelism_config_dp_shard_size 4"),
        (
            dict(cp=2, dp_shard=2),
            3,
            512,
            False,
            "Use --num_processes 4, or 2 with --parallelism_config_dp_shard_size 1",
        ),
        (dict(tp=4, dp_shard=2), 3, 512, False, "these are 3. Use --num_processes 8.$"),
        (dict(dp_replicate=2, dp_shard=2), 8, 512, False, "--parallelism_config_dp_shard_size 4"),
        (
            dict(dp_replicate=2),
            2,
            512,
            False,
            "dp_replicate_size 2 with dp_shard_size 1: .*Use accelerate_configs/ddp.yaml",
        ),
        (dict(cp=2), 2, 510, False, "--context_length 510: 2 cards share each row as 4 equal pieces. Use 512"),
        (dict(cp=2), 2, 512, True, "--packing isolated under context parallelism"),
    ],
)
def test_what_cannot_work_is_refused_with_what_does(monkeypatch, sizes, processes, length, isolated, words):
    launch = asked(monkeypatch, processes=processes, **sizes)
    with pytest.raises(InputError, match=words):
        check_parallelism(launch, length, isolated)


def test_the_yaml_and_two_machines_of_it_pass(monkeypatch):
    launch = asked(monkeypatch, processes=2, dp_replicate=1, dp_shard=1, cp=2)
    check_parallelism(launch, 8192, isolated=False)
    launch = asked(monkeypatch, processes=8, dp_replicate=2, dp_shard=4, cp=1)
    check_parallelism(launch, 511, isolated=True)


def test_what_was_not_tried_with_tensor_or_expert_parallelism_is_refused():
    for wrong, words in (
        (dict(precision="fp16"), "fp16: .*--mixed_precision bf16"),
        (dict(compiler="inductor"), "torch.compile: .*--dynamo_backend no"),
        (dict(offload_parameters=True), "parameters in main memory: .*--fsdp_offload_params false"),
    ):
        with pytest.raises(InputError, match=f"parallelism_config_tp_size 2 with {words}"):
            check_parallelism(Launch(processes=2, tensor_parallel=2, **wrong), 512, False)
        with pytest.raises(InputError, match=f"parallelism_config_ep_size 2 with .*{words}"):
            check_parallelism(Launch(processes=2, shards=2, expert_parallel=2, **wrong), 512, False)


def test_groups_of_tensor_parallelism_are_neighbours_and_read_the_same_rows(monkeypatch):
    launches = [asked(monkeypatch, processes=4, process=process, dp_shard=2, tp=2) for process in range(4)]
    assert [launch.reads_rows for launch in launches] == [True, False, True, False] and launches[0].row_readers == 2
    assert launches[0].dimensions == "2 shards x 2 tensor parallel" and Launch().dimensions == ""


def test_processes_that_divide_experts_read_rows_of_their_own(monkeypatch):
    launches = [asked(monkeypatch, processes=4, process=process, dp_shard=4, ep=2) for process in range(4)]
    assert all(launch.reads_rows and launch.row_readers == 4 for launch in launches)
    assert launches[0].dimensions == "4 shards, experts divided among 2"
    check_parallelism(launches[0], 511, isolated=True)
    with pytest.raises(InputError, match="parallelism_config_ep_size two: not a number"):
        asked(monkeypatch, processes=4, dp_shard=4, ep="two")


TINY = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=99,
)


@pytest.mark.parametrize(
    ("kind", "wanted", "words"),
    [
        ("qwen2", "eager", "here Qwen2ForCausalLM has eager attention. Use fsdp2.yaml"),
        ("gemma3_text", "auto", "here Gemma3ForCausalLM has sdpa attention with windows"),
    ],
)
def test_another_attention_is_refused(kind, wanted, words):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY))
    with pytest.raises(InputError, match=words):
        set_attention(model, wanted, False, torch.device("cpu"), context_parallel=True)


def test_the_plan_counts_half_a_row_on_each_card():
    launch = launch_of_yaml(YAML, processes=2)
    assert (launch.row_pieces, launch.processes, launch.strategy, launch.compiled) == (2, 2, "fsdp2", False)


def test_a_recipes_plan_says_that_cards_share_a_row(capsys):
    flags = f"--plan --plan_config {YAML} --plan_processes 2 --context_length 32768 --tokens_per_step 131072"
    load_recipe("wiki_zh_scratch").main([*flags.split(), "--per_device_train_batch_size", "1"])
    printed = capsys.readouterr().out
    assert (
        "(2 cards share each row of 32,768 tokens)" in printed and "1 rows of 16384 tokens at once on each" in printed
    )


def test_what_processes_with_the_same_rows_evaluate_counts_once(wiki, cache_dir, tmp_path, monkeypatch):
    """This one is the second of its group: the first one's nats and targets are the evaluation's, and only they."""
    monkeypatch.setattr(Launch, "reads_rows", False)
    monkeypatch.setattr("common.train.trainer.gather_object", lambda mine: [*mine, (300.0, 100)])
    wiki.main(small_run(cache_dir, tmp_path, "--max_steps", "2", "--eval_strategy", "no"))
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert (results["eval_loss"], results["eval_tokens"]) == (3.0, 100)


def test_torch_cuts_rows_into_pieces_that_belong_together(tmp_path):
    in_two_processes(cut_rows, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for part in parts:
        assert all(tensor.shape == (3, 8) for tensor in part.values())
        assert torch.equal(part["input_ids"] % 100, part["position_ids"])  # each token keeps its place in the row
        assert torch.equal(part["shift_labels"], part["input_ids"] + 1)
    places = torch.cat([part["position_ids"][0] for part in parts])
    assert sorted(places.tolist()) == list(range(16))
    sums = [int(part["position_ids"][0].sum()) for part in parts]
    assert sums[0] == sums[1]  # a piece of the front with one of the back: equal work for causal attention


def cut_rows(rank: int, folder: Path) -> None:
    from torch.distributed.tensor.experimental import context_parallel

    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    accelerator = SimpleNamespace(maybe_context_parallel=partial(context_parallel, mesh))
    ids = torch.arange(16).repeat(3, 1) + 100 * torch.arange(3)[:, None]
    inputs = {"input_ids": ids, "shift_labels": ids + 1, "labels": (ids + 1).clone()}
    with divided_rows(accelerator, inputs)():
        torch.save({name: inputs[name].clone() for name in inputs if name != "labels"}, folder / f"{rank}.pt")
