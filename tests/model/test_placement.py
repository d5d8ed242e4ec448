"""What can be divided among processes, and a model that one process has for all."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.console import InputError
from common.distributed.launch import Launch
from common.distributed.strategy import DDP
from common.model.from_config import model_on
from common.model.placement import check_expert_plan, check_plan, give_memory, place_model
from common.train.combinations import check_combinations

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, intermediate_size=64)


def on_meta(kind: str, **more):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY | more))


@pytest.mark.parametrize(
    ("kind", "more", "tensor_parallel", "words"),
    [
        ("gpt2", {}, 2, "no plan that divides GPT2LMHeadModel. Use fsdp2.yaml"),
        ("opt", dict(ffn_dim=64, word_embed_proj_dim=32), 2, "no plan that divides OPTForCausalLM"),
        ("bloom", {}, 2, "no plan that divides BloomForCausalLM"),
        ("mixtral", dict(num_key_value_heads=2), 2, r"experts \(MixtralForCausalLM\) were not tried"),
        ("qwen2", dict(num_key_value_heads=2), 4, "4 heads and 2 key-value heads of Qwen2ForCausalLM .* 4 processes"),
        ("llama", dict(num_attention_heads=3, hidden_size=48), 2, "3 heads and 3 key-value heads"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(kind, more, tensor_parallel, words):
    model = on_meta(kind, **more)
    check_plan(model, 1)
    with pytest.raises(InputError, match=words):
        check_plan(model, tensor_parallel)


EXPERTS = dict(num_key_value_heads=2, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, pad_token_id=None)
LATENT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4,
    n_group=2, topk_group=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "more", "processes", "words"),
    [
        ("llama", {}, 2, "expert parallelism: LlamaForCausalLM has no experts. Use fsdp2.yaml"),
        (
            "jetmoe",
            dict(num_local_experts=4, kv_channels=8),
            2,
            "no plan that divides the experts of JetMoeForCausalLM",
        ),
        ("doge", dict(is_moe=True, num_experts=16), 2, "no plan that divides the experts of DogeForCausalLM"),
        (
            "mixtral",
            dict(num_local_experts=6),
            4,
            "6 experts of MixtralForCausalLM cannot be divided among 4 processes",
        ),
    ],
)
def test_experts_that_cannot_be_divided_are_refused_by_name(kind, more, processes, words):
    model = on_meta(kind, **EXPERTS | more)
    check_expert_plan(model, 1)
    with pytest.raises(InputError, match=words):
        check_expert_plan(model, processes)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("mixtral", dict(num_local_experts=4)), ("qwen2_moe", dict(num_experts=4)), ("qwen3_moe", dict(num_experts=4)),
        ("olmoe", dict(num_experts=4)), ("deepseek_v2", LATENT), ("deepseek_v3", LATENT),
    ],
)  # fmt: skip
def test_families_whose_experts_can_be_divided_pass(kind, more):
    check_expert_plan(on_meta(kind, **EXPERTS | more), 2)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral", "gemma2", "phi3", "olmo2", "glm4"])
def test_families_with_a_plan_pass(kind):
    check_plan(on_meta(kind, num_key_value_heads=2, head_dim=8, pad_token_id=None), 2)


def test_one_process_of_each_machine_has_the_weights():
    places = [Launch(processes=4, local_processes=2, process=rank, tensor_parallel=2) for rank in range(4)]
    assert [place.building_device.type for place in places] == ["cpu", "meta", "cpu", "meta"]
    sent_out = [Launch(processes=4, local_processes=2, process=rank, loaded_by_one=True) for rank in range(4)]
    assert [place.building_device.type for place in sent_out] == ["cpu", "meta", "meta", "meta"]
    places = [Launch(processes=4, local_processes=2, process=rank, expert_parallel=2) for rank in range(4)]
    assert [place.building_device.type for place in places] == ["cpu", "meta", "cpu", "meta"]
    assert Launch(processes=4, strategy=DDP).building_device is None
    model = on_meta("qwen2")
    assert place_model(model, Launch(), "unused", 1) is model


def test_a_model_without_memory_keeps_its_buffers_and_ties():
    config = AutoConfig.for_model("qwen2", **TINY, num_key_value_heads=2, tie_word_embeddings=True)
    whole = AutoModelForCausalLM.from_config(config)
    model = model_on(torch.device("meta"), config, torch.float32)
    assert model.device.type == "meta"
    assert torch.equal(model.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)
    give_memory(model)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    assert 0 not in addresses and len({*addresses}) == len(addresses) == len([*whole.parameters()])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)


def test_adapters_are_refused(tmp_path):
    from transformers import TrainingArguments

    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(InputError, match="adapters under a model that one process loads for all"):
        check_combinations(Launch(processes=2, tensor_parallel=2, optimizer="adamw"), training, "lora")
