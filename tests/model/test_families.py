"""Every family of models: built, trained for two steps with fused loss and our attention, saved, loaded."""

import numpy as np
import pytest
import torch
from conftest import store_of_tokens
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from common.arguments import SharedArguments
from common.dataset.mixture import training_order
from common.dataset.packing import JoinedRows, PackedRows, collate_rows
from common.dataset.rows import Rows
from common.distributed.launch import Launch
from common.model.attention import set_attention
from common.model.counts import parameter_report
from common.model.from_config import hands_on_bf16, keep_residual_in_bf16, model_from_config
from common.model.fused_loss import use_fused_loss
from common.model.memory import Setting, predict
from common.run.folder import Run
from common.tokens.train_tokenizer import train_tokenizer
from common.train.trainer import PretrainingTrainer

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
GATED = SMALL | dict(intermediate_size=64, num_key_value_heads=2)
EXPERTS = dict(num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.01)
LATENT = dict(  # DeepSeek's attention
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1,
    n_group=2, topk_group=1,
)  # fmt: skip
FAMILIES = {
    "llama-2": dict(model_type="llama", **GATED | dict(num_key_value_heads=4)),
    "llama-3": dict(model_type="llama", rope_theta=500_000.0, **GATED),
    "llama-3.1": dict(
        model_type="llama", **GATED,
        rope_parameters=dict(
            rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8,
        ),
    ),
    "mistral": dict(model_type="mistral", sliding_window=8, **GATED),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True, **GATED),
    "qwen3": dict(model_type="qwen3", head_dim=8, **GATED),
    "gemma": dict(model_type="gemma", head_dim=8, **GATED),
    "gemma2": dict(model_type="gemma2", head_dim=8, sliding_window=8, **GATED),
    "gemma3": dict(model_type="gemma3_text", head_dim=8, sliding_window=8, **GATED),
    "bloom": dict(model_type="bloom", hidden_size=32, n_layer=2, n_head=4),
    "opt": dict(model_type="opt", ffn_dim=64, word_embed_proj_dim=32, **SMALL),
    "gpt2": dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, **EXPERTS, **GATED),
    "qwen2-moe": dict(
        model_type="qwen2_moe", num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        **EXPERTS, **GATED,
    ),
    "deepseek-v2": dict(model_type="deepseek_v2", **SMALL, intermediate_size=64, **LATENT),
    "deepseek-v3": dict(model_type="deepseek_v3", **SMALL, intermediate_size=64, **LATENT),
    "qwen3-moe": dict(
        model_type="qwen3_moe", num_experts=4, moe_intermediate_size=32, head_dim=8, **EXPERTS, **GATED,
    ),
    "glm": dict(model_type="glm", head_dim=8, **GATED),
    "glm4": dict(model_type="glm4", head_dim=8, attention_bias=True, **GATED),
    "olmo2": dict(model_type="olmo2", **GATED),
    "smollm3": dict(model_type="smollm3", tie_word_embeddings=True, **GATED),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the quick brown fox jumps over the lazy dog"], 300)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    generator = np.random.default_rng(0)
    documents = [generator.integers(1, 250, length).tolist() for length in (40, 7, 90, 33)]
    store = store_of_tokens(tmp_path_factory.mktemp("store"), documents)
    return JoinedRows([PackedRows(store, np.ones(len(documents), bool), 16)])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_saves_and_loads(family, tokenizer, rows, tmp_path):
    torch.manual_seed(0)
    model = model_from_config(FAMILIES[family], tokenizer, context_length=16)
    batch = collate_rows([rows[row] for row in range(4)])
    output = model.eval()(**batch, use_cache=False, num_items_in_batch=64)
    router = getattr(output, "aux_loss", None)  # added by transformers, and in training only by us
    plain = (output.loss if router is None else output.loss - 0.01 * router).item()
    set_attention(model, "auto", False, torch.device("cpu"))
    use_fused_loss(model)
    fused = model(**batch, use_cache=False, num_items_in_batch=64).loss.item()
    assert fused == pytest.approx(plain, rel=1e-5)

    training = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.01,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    launch = Launch(optimizer="muon", rows_per_step=4)
    order = training_order(rows, training, launch.rows_per_step)
    trainer = PretrainingTrainer(
        model, training, SharedArguments(), Rows(rows, rows, None, {}, []), order, launch, Run(str(tmp_path)), tokenizer
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    logits = loaded(input_ids=batch["input_ids"], use_cache=False).logits
    with torch.no_grad():
        expected = model.eval()(input_ids=batch["input_ids"], use_cache=False).logits
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_is_in_bf16_in_all_layers_or_in_none(family, tokenizer):
    model, stream = model_from_config(FAMILIES[family], tokenizer, context_length=16), []
    keep_residual_in_bf16(model)
    for layer in (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)):
        layer.register_forward_hook(lambda layer, inputs, out: stream.append(out[0] if type(out) is tuple else out))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(16)[None], use_cache=False)
    assert {hidden.dtype for hidden in stream} == {torch.bfloat16 if hands_on_bf16(model) else torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_planner_and_the_parameter_report_know_the_family(family, tokenizer):
    model = model_from_config(FAMILIES[family], tokenizer, context_length=16)
    assert predict(model, Setting(2, 16)).total > 0
    assert parameter_report(model)["total"] == model.num_parameters()
