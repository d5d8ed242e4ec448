"""Isolated rows against the same documents trained one by one; which attention is set, and what is refused."""

import numpy as np
import pytest
import torch
from conftest import store_of_tokens
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from common.console import InputError
from common.dataset.packing import IGNORED_TARGET, JoinedRows, PackedRows, collate_rows, document_positions
from common.model.attention import (
    block_mask,
    causal_attention,
    check_targets_hidden,
    document_attention,
    generating,
    repeating_attention,
    set_attention,
)

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000)
QWEN2 = dict(model_type="qwen2", intermediate_size=64, num_key_value_heads=2, **SHAPE)
GEMMA3 = dict(  # sliding windows, shorter than the documents, in every other layer
    model_type="gemma3_text", intermediate_size=64, num_key_value_heads=2, head_dim=8, sliding_window=4, **SHAPE
)
GPT2 = dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=1000, n_positions=64)
BLOOM = dict(model_type="bloom", n_layer=2, n_head=4, hidden_size=32, vocab_size=1000)


def model_of(shape: dict, attention: str | None = "sdpa"):
    torch.manual_seed(0)
    shape = dict(shape)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, attn_implementation=attention)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_heads_are_repeated_where_no_fused_kernel_has_grouped_heads(monkeypatch, capsys):
    """As on a T4, where torch would take the kernel that holds all scores. The logits are the same."""
    ids = torch.arange(24).view(2, 12) * 7 % 1000
    grouped, repeated = model_of(QWEN2), model_of(QWEN2)
    set_attention(grouped, "auto", False, torch.device("cpu"))
    expected = grouped(input_ids=ids).logits
    real = torch._fused_sdp_choice
    monkeypatch.setattr(
        torch, "_fused_sdp_choice",
        lambda *inputs, enable_gqa: SDPBackend.MATH.value if enable_gqa else real(*inputs),
    )  # fmt: skip
    capsys.readouterr()
    set_attention(repeated, "auto", False, torch.device("cpu"))
    assert "flash kernel, with keys and values repeated for every query head" in capsys.readouterr().out
    assert AttentionInterface()["causal"] is repeating_attention
    torch.testing.assert_close(repeated(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
    set_attention(model_of(QWEN2 | dict(num_key_value_heads=4)), "auto", False, torch.device("cpu"))
    assert AttentionInterface()["causal"] is causal_attention  # as many heads of each


def test_a_device_without_a_choice_of_kernels_trains_with_the_plain_one(monkeypatch, capsys):
    """As on Apple's GPUs, where torch does not answer the question."""

    def no_answer(*inputs, enable_gqa):
        raise NotImplementedError("Could not run 'aten::_fused_sdp_choice' with arguments from the 'MPS' backend.")

    monkeypatch.setattr(torch, "_fused_sdp_choice", no_answer)
    set_attention(model_of(QWEN2), "auto", False, torch.device("cpu"))
    assert "attention: causal, by torch's math kernel\n" in capsys.readouterr().out
    assert AttentionInterface()["causal"] is causal_attention


def test_positions_begin_at_0_in_every_document():
    starts = np.array([False, False, True, True, False, True])
    assert document_positions(starts).tolist() == [0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", [QWEN2, GEMMA3, GPT2], ids=lambda shape: shape["model_type"])
def test_isolated_rows_have_the_loss_and_gradients_of_their_documents_one_by_one(tmp_path, shape, attention):
    generator = np.random.default_rng(0)
    documents = [generator.integers(1, 1000, length).tolist() for length in (9, 1, 30, 3, 14, 2, 7)]
    store = store_of_tokens(tmp_path, documents)
    context_length = 16
    rows = JoinedRows([PackedRows(store, np.ones(len(documents), bool), context_length, isolated=True)])
    batch = collate_rows([rows[row] for row in range(len(rows))])
    model = model_of(shape, attention).eval()

    packed = model(**batch, use_cache=False, num_items_in_batch=1).loss
    packed.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    unpacked, targets = torch.zeros(()), 0
    for row in range(len(rows)):  # a document that crosses a row's border is trained in two parts
        window = rows.sources[0].window(row * context_length, context_length + 1)
        starts = [0, *(np.flatnonzero(rows.sources[0].starts_in(row * context_length, context_length + 1)[1:]) + 1)]
        for begin, end in zip(starts, [*starts[1:], context_length + 1], strict=True):
            part = torch.from_numpy(window[begin:end])[None]
            if part.shape[1] > 1:  # a document that begins with the row's last target has no input in it
                logits = model(input_ids=part[:, :-1], use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits[0], part[0, 1:], reduction="sum")
                unpacked, targets = unpacked + loss, targets + part.shape[1] - 1
    unpacked.backward()

    assert targets == int((batch["shift_labels"] != IGNORED_TARGET).sum())
    assert packed.item() == pytest.approx(unpacked.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [QWEN2, GEMMA3, GPT2], ids=lambda shape: shape["model_type"])
def test_architectures_that_isolate_pass_the_check(shape):
    model = model_of(shape)
    check_targets_hidden(model, isolated=True)
    assert model.training


def test_an_architecture_that_mixes_documents_is_refused():
    model = model_of(BLOOM, "eager")
    check_targets_hidden(model, isolated=False)
    with pytest.raises(InputError, match="--packing isolated: BloomForCausalLM lets documents"):
        check_targets_hidden(model, isolated=True)


BERT = dict(intermediate_size=64, max_position_embeddings=64, **SHAPE)
ENCODERS = ["bert", "electra", "roformer", "rembert", "bert-generation", "megatron-bert", "ernie"]


@pytest.mark.parametrize("family", ENCODERS)
def test_a_model_that_sees_its_targets_is_refused_and_trains_as_a_decoder(family):
    with pytest.raises(InputError, match='see the tokens that it is to predict.* Write "is_decoder": true'):
        set_attention(model_of(dict(model_type=family, **BERT), None), "auto", False, torch.device("cpu"))
    check_targets_hidden(model_of(dict(model_type=family, is_decoder=True, **BERT), None), isolated=False)


CAUSAL = {
    "gpt2": {}, "opt": dict(ffn_dim=64), "bloom": {}, "gpt_neox": {}, "falcon": {}, "gemma2": dict(head_dim=8),
    "phi": {}, "cohere": {}, "mamba": {}, "rwkv": {}, "mixtral": dict(num_key_value_heads=2, num_local_experts=4),
}  # fmt: skip


@pytest.mark.parametrize("family", CAUSAL)
def test_causal_models_pass_and_draw_no_random_numbers(family):
    """Mixtral's experts get other batches of tokens when one changes; the others' logits move by rounding only."""
    shape = SHAPE | dict(bos_token_id=0, eos_token_id=0, pad_token_id=None) | CAUSAL[family]
    model, before = model_of(dict(model_type=family, **shape), None), torch.get_rng_state()
    check_targets_hidden(model, isolated=False)
    assert torch.equal(torch.get_rng_state(), before) and model.training


def test_one_layer_that_looks_ahead_is_enough():
    model = model_of(QWEN2)
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def looking_ahead(hidden_states, **kwargs):
        return forward(hidden_states + 0.1 * hidden_states.mean(1, keepdim=True), **kwargs)

    attention.forward = looking_ahead
    with pytest.raises(InputError, match="Qwen2ForCausalLM: its logits change with tokens after them"):
        check_targets_hidden(model, isolated=False)


def test_sizes_that_do_not_fit_are_one_line():
    shape = dict(model_type="gptj", n_embd=64, n_layer=1, n_head=4, vocab_size=1000)  # rotary_dim is 64, heads of 16
    with pytest.raises(InputError, match="GPTJForCausalLM cannot compute a row; do its sizes fit?"):
        check_targets_hidden(model_of(shape, "eager"), isolated=False)


CPU = torch.device("cpu")
LLAMA = dict(model_type="llama", intermediate_size=64, num_key_value_heads=4, **SHAPE)
MISTRAL = dict(model_type="mistral", intermediate_size=64, num_key_value_heads=2, sliding_window=4, **SHAPE)
WHOLE_MISTRAL = MISTRAL | {"sliding_window": None}


@pytest.mark.parametrize("shape", [QWEN2, LLAMA, GPT2, WHOLE_MISTRAL], ids=lambda shape: shape["model_type"])
def test_causal_attention_is_sdpa_that_does_not_look_for_borders(shape, capsys, monkeypatch):
    model, ids = model_of(shape).eval(), torch.randint(0, 1000, (2, 20))
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    set_attention(model, "auto", False, CPU)
    assert "attention: causal, by torch's flash kernel" in capsys.readouterr().out
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: 1 / 0)
    found = model(input_ids=ids, labels=ids, use_cache=False).loss
    found.backward()
    assert found.item() == expected.item()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


FALCON = dict(model_type="falcon", **SHAPE)


@pytest.mark.parametrize("shape", [GEMMA3, MISTRAL, BLOOM, FALCON], ids=lambda shape: shape["model_type"])
def test_models_with_windows_and_old_classes_keep_their_attention(shape):
    model = model_of(shape, "eager" if shape is BLOOM else "sdpa")
    before = model.config._attn_implementation
    set_attention(model, "auto", False, CPU)
    assert model.config._attn_implementation == before


def test_isolated_rows_on_a_cpu_get_a_full_mask_and_a_message_says_so(capsys):
    model = model_of(QWEN2)
    set_attention(model, "auto", True, CPU)
    assert model.config._attn_implementation == "sdpa"
    assert "sdpa with a full mask, exact but slow; no flex attention, because" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "isolated", "message"),
    [
        ("documents", True, "documents: used automatically where it fits"),
        ("nonsense", False, "--attn_implementation nonsense"),
        ("flash_attention_2", False, "--attn_implementation flash_attention_2"),
        ("flash_attention_2", True, "batches of one row only, and would mix them up"),
    ],
)
def test_attention_that_does_not_work_is_refused(wanted, isolated, message):
    with pytest.raises(InputError, match=message):
        set_attention(model_of(QWEN2), wanted, isolated, CPU)


@torch.no_grad()
def test_the_block_mask_keeps_documents_apart():
    """Flex attention, uncompiled on a CPU, against sdpa with the full mask that transformers makes."""
    starts = np.array([[0, 5, 6, 40], [0, 130, 131, 180]])
    marks = np.zeros((2, 200), bool)
    for row, places in enumerate(starts):
        marks[row, places] = True
    positions = torch.from_numpy(np.stack([document_positions(row) for row in marks]))
    ids, model = torch.randint(0, 1000, (2, 200)), model_of(QWEN2 | {"max_position_embeddings": 200}).eval()
    expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    AttentionInterface.register("documents", document_attention)
    model.set_attn_implementation("documents")
    with torch.compiler.set_stance("force_eager"):
        mask = block_mask(positions)
        found = model(input_ids=ids, position_ids=positions, use_cache=False, document_mask=mask).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(InputError, match="does not pass document_mask on"):
            model(input_ids=ids, position_ids=positions, use_cache=False)


def test_generating_understands_padding_and_restores_the_attention():
    model = model_of(QWEN2).eval()
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    settings = dict(attention_mask=(ids > 0).long(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **settings)
    set_attention(model, "auto", False, CPU)
    with generating(model):
        assert torch.equal(model.generate(ids, **settings), expected)
    assert model.config._attn_implementation == "causal"
