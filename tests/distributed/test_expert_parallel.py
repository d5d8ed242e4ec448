"""Experts divided among processes: what each of them holds, and that the run is the one of a single process."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import losses, small_run
from launched_processes import FSDP2, in_launched_processes, meet_again
from safetensors.torch import load_file
from test_sharding import CONSTANT, MUON, assert_same_run, numbers, watched_recipe
from transformers import AutoConfig, AutoModelForCausalLM

import common.model.placement as placement
from common.distributed.launch import Launch
from common.distributed.strategy import local
from common.model.counts import is_expert

SHAPE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=4096, num_experts_per_tok=2)
GROUPED = SHAPE | dict(num_key_value_heads=2, output_router_logits=True, router_aux_loss_coef=0.05)
LATENT = dict(  # DeepSeek's attention, and experts that all tokens meet; its router has no loss
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4,
    n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=32, intermediate_size=64, first_k_dense_replace=1,
    n_group=2, topk_group=1,
)  # fmt: skip
MODELS = {
    "mixtral": dict(model_type="mixtral", intermediate_size=48, num_local_experts=4, **GROUPED),
    "qwen3": dict(
        model_type="qwen3_moe", intermediate_size=64, moe_intermediate_size=32, num_experts=4, head_dim=16,
        tie_word_embeddings=True, **GROUPED,
    ),
    "qwen2": dict(
        model_type="qwen2_moe", intermediate_size=64, moe_intermediate_size=32, num_experts=4,
        shared_expert_intermediate_size=32, **GROUPED,
    ),
    "deepseek": dict(model_type="deepseek_v3", **SHAPE, **LATENT),
}  # fmt: skip


def parallel(experts: int, shards: int) -> dict[str, str]:
    """Return what the launcher says of the YAML's parallelism_config, and what is read from the YAML itself."""
    sizes = {"PARALLELISM_CONFIG_EP_SIZE": str(experts), "PARALLELISM_CONFIG_DP_SHARD_SIZE": str(shards)}
    return FSDP2 | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"} | sizes


def runs(folder: Path) -> dict[str, list[str]]:
    """Return the flags of runs by name. They end with evaluation and a saved model."""
    model = {name: ["--model", str(folder / name)] for name in MODELS}
    return {
        "mixtral, clipped": [*model["mixtral"], *CONSTANT, "--learning_rate", "1e-3", "--max_grad_norm", "0.5"],
        "qwen3, muon, recompute": [*model["qwen3"], *MUON],
        "deepseek, isolated": [*model["deepseek"], *CONSTANT, "--packing", "isolated", "--learning_rate", "1e-3"],
        "qwen2, short": [*model["qwen2"], *CONSTANT, "--learning_rate", "1e-3", "--max_steps", "2"],
    }


@pytest.fixture(scope="module")
def alone(wiki, cache_dir, tmp_path_factory) -> Path:
    """A folder with the runs of one process, a cache of tokens, and models to begin with."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "cache").symlink_to(cache_dir)
    for name, shape in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(shape))
    for name, flags in runs(folder).items():
        wiki.main(small_run(cache_dir, folder / name, *flags))
    return folder


def logs(folder: Path) -> list[dict]:
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry for entry in history if "loss" in entry]


def assert_same_logs(found: Path, expected: Path) -> None:
    """Gradient norms, of which experts have a part on other processes, and what the router did."""
    compared = ("loss", "router_loss", "busiest_expert", "idlest_expert", "grad_norm")
    for one, other in zip(logs(found), logs(expected), strict=True):
        assert {name: one[name] for name in compared if name in one} == pytest.approx(
            {name: other[name] for name in compared if name in other}, rel=2e-4
        )


def check_divided(rank: int, folder: Path) -> None:
    """Every run of ``runs``; the one with Muon in two halves."""
    processes, experts = int(os.environ["WORLD_SIZE"]), int(os.environ["PARALLELISM_CONFIG_EP_SIZE"])
    halves = [*runs(folder)["qwen3, muon, recompute"], "--max_steps", "3"]
    for name, flags in [("qwen3, muon, recompute", halves), *runs(folder).items()]:
        recipe, trainers, devices = watched_recipe()
        own = ["--per_device_train_batch_size", str(4 // processes), "--per_device_eval_batch_size", "4"]
        recipe.main(small_run(folder / "cache", folder / f"divided {name}", *flags, *own))
        meet_again()
        assert devices == ["cpu" if rank == 0 else "meta"]
        [trainer] = trainers
        whole, here = numbers(trainer.model)
        assert here < 1.02 * whole / processes
        stacks = [each for name, each in trainer.model.named_parameters() if is_expert_stack(trainer.model, name, each)]
        assert stacks and all(local(each).shape[0] == 4 // processes for each in stacks)
        assert all(local(each).shape[1:] == each.shape[1:] for each in stacks), "an expert is whole where it is"
        assert all(each.device_mesh.mesh_dim_names[-1] == "ep" for each in stacks)
        assert all(each.device_mesh.size(-1) == experts for each in stacks)
        (folder / f"divided {name} {rank}.json").write_text(json.dumps(trainer.seen))


def is_expert_stack(model, name: str, parameter: torch.nn.Parameter) -> bool:
    return parameter.dim() == 3 and is_expert(model, name, parameter)


@pytest.mark.heavy
@pytest.mark.parametrize("processes", [2, 4])
def test_divided_experts_train_as_whole_ones(wiki, alone, cache_dir, tmp_path, processes):
    for name in ("cache", *MODELS):
        (tmp_path / name).symlink_to(alone / name)
    in_launched_processes(processes, check_divided, tmp_path, **parallel(2, processes))
    for name in runs(alone):
        found = tmp_path / f"divided {name}"
        assert_same_run(found, alone / name)
        assert_same_logs(found, alone / name)
        seen = [json.loads((tmp_path / f"divided {name} {rank}.json").read_text()) for rank in range(processes)]
        assert len({str(each) for each in seen}) == processes  # each reads rows of its own
    text = (tmp_path / "output.0").read_text()
    assert f"continuing from {tmp_path}/divided qwen3, muon, recompute/checkpoint-3" in text and "sample" in text

    # The saved model is an ordinary one, with the names of the hub: plain transformers computes the same with it.
    folders = [tmp_path / "divided mixtral, clipped", alone / "mixtral, clipped"]
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in load_file(folders[0] / "model.safetensors")
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.arange(1, 33)[None]).logits
        for folder in folders
    ]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)

    # Weights go over to one process; the truth is one process that does the same.
    for start, folder in ((tmp_path / "divided mixtral, clipped", "back"), (alone / "mixtral, clipped", "stayed")):
        flags = [*runs(alone)["mixtral, clipped"], "--init_from", str(start / "checkpoint-6"), "--max_steps", "2"]
        wiki.main(small_run(cache_dir, tmp_path / folder, *flags))
    assert losses(tmp_path / "back") == pytest.approx(losses(tmp_path / "stayed"), rel=2e-5)


def check_other_sizes(rank: int, folder: Path) -> None:
    recipe, _, _ = watched_recipe()
    flags = [*runs(folder)["qwen3, muon, recompute"], "--max_steps", os.environ["STEPS"], "--save_steps", "2"]
    recipe.main(small_run(folder / "cache", folder / "sizes", *flags, "--per_device_train_batch_size", "1"))


@pytest.mark.heavy
def test_a_run_with_divided_experts_continues_exactly_on_other_sizes(alone, tmp_path):
    """4 groups of one expert each, then 2 processes, then 2 groups of 2: experts that FSDP2 divides once more."""
    for name in ("cache", "qwen3"):
        (tmp_path / name).symlink_to(alone / name)
    for processes, experts, steps in ((4, 4, "2"), (2, 2, "4"), (4, 2, "6")):
        in_launched_processes(processes, check_other_sizes, tmp_path, STEPS=steps, **parallel(experts, processes))
    assert losses(tmp_path / "sizes") == pytest.approx(losses(alone / "qwen3, muon, recompute"), rel=2e-5)


def check_bf16(rank: int, folder: Path) -> None:
    recipe, trainers, _ = watched_recipe()
    flags = [*runs(folder)["mixtral, clipped"], "--per_device_train_batch_size", "2"]
    recipe.main(small_run(folder / "cache", folder / "bf16", *flags, "--max_steps", "3"))
    [trainer] = trainers
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


@pytest.mark.heavy
def test_in_bf16_the_weights_stay_in_fp32_and_the_losses_are_nearly_those_of_fp32(alone, tmp_path):
    for name in ("cache", "mixtral"):
        (tmp_path / name).symlink_to(alone / name)
    in_launched_processes(2, check_bf16, tmp_path, **parallel(2, 2) | {"ACCELERATE_MIXED_PRECISION": "bf16"})
    whole = losses(alone / "mixtral, clipped")
    for step, loss in losses(tmp_path / "bf16").items():
        assert loss != whole[step] and loss == pytest.approx(whole[step], rel=2e-3)


@pytest.mark.parametrize(("precision", "in_half"), [("bf16", True), ("no", False), (None, False)])
def test_weights_are_loaded_in_fp32_and_gradients_added_up_in_it(monkeypatch, tmp_path, precision, in_half):
    """Loaded in bf16, or without this setting, gradients would be added up in bf16, without a word."""
    asked = []

    def loaded(folder, **settings):
        asked.append(settings)
        return AutoModelForCausalLM.from_config(settings["config"])

    monkeypatch.setattr(placement.AutoModelForCausalLM, "from_pretrained", loaded)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS["mixtral"]))
    launch = Launch(processes=4, shards=4, expert_parallel=2, precision=precision)
    placement._divided(model, launch, str(tmp_path))
    [settings] = asked
    sizes = settings["distributed_config"]
    assert settings["dtype"] == torch.float32 and sizes.fsdp_mixed_precision is in_half
    assert (sizes.fsdp_size, sizes.tp_size, sizes.ep_size, sizes.efsdp_size) == (4, 1, 2, 2)
