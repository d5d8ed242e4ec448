"""data/convert_weights.py on small weights: transformers' logits are those of the original's published formulas.

The formulas are written here in plain torch, from modeling_qwen.py, modeling_baichuan.py and modeling_chatglm.py.
"""

import base64
import importlib.util
import json
import math
import unicodedata

import pytest
import tiktoken
import torch
from conftest import ROOT
from safetensors.torch import save_file
from torch.nn.functional import linear, normalize, silu
from transformers import AutoModelForCausalLM
from transformers.convert_slow_tokenizer import import_protobuf

from common.console import InputError
from common.model.pretrained import pretrained_model
from common.tokens.tokenizer import load_tokenizer

spec = importlib.util.spec_from_file_location("convert_weights", ROOT / "data" / "convert_weights.py")
convert_weights = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert_weights)

HIDDEN, HEADS, SIZE, WIDTH, LAYERS, VOCABULARY, LENGTH = 32, 4, 8, 48, 2, 320, 24
QWEN = dict(
    model_type="qwen", architectures=["QWenLMHeadModel"], vocab_size=VOCABULARY, hidden_size=HIDDEN, kv_channels=SIZE,
    num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=2 * WIDTH, layer_norm_epsilon=1e-6,
    rotary_emb_base=10_000, rotary_pct=1.0, no_bias=True, seq_length=LENGTH, use_logn_attn=True, use_dynamic_ntk=True,
)  # fmt: skip
BAICHUAN = dict(
    model_type="baichuan", architectures=["BaiChuanForCausalLM"], vocab_size=VOCABULARY, hidden_size=HIDDEN,
    num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=WIDTH, rms_norm_eps=1e-6, hidden_act="silu",
    max_position_embeddings=LENGTH,
)  # fmt: skip
BAICHUAN2 = BAICHUAN | dict(architectures=["BaichuanForCausalLM"], z_loss_weight=0)
CHATGLM = dict(
    model_type="chatglm", architectures=["ChatGLMModel"], padded_vocab_size=VOCABULARY, hidden_size=HIDDEN,
    num_layers=LAYERS, num_attention_heads=HEADS, multi_query_group_num=2, kv_channels=SIZE, ffn_hidden_size=WIDTH,
    layernorm_epsilon=1e-5, seq_length=LENGTH, rmsnorm=True, post_layer_norm=True, multi_query_attention=True,
    add_qkv_bias=True, add_bias_linear=False, apply_residual_connection_post_layernorm=False,
)  # fmt: skip


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon)


def turned(x: torch.Tensor, dimensions: int, pairs: list[tuple[int, int]]) -> torch.Tensor:
    """Turn each pair (i, j) of ``x`` (positions, heads, size) by its position / 10000^(2 n / dimensions)."""
    result = x.clone()
    for number, (i, j) in enumerate(pairs):
        angle = torch.arange(len(x), dtype=torch.float64) / 10_000 ** (2 * number / dimensions)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        result[..., i] = x[..., i] * cos - x[..., j] * sin
        result[..., j] = x[..., j] * cos + x[..., i] * sin
    return result


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of (positions, heads, size); several heads may share keys and values."""
    share = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // share].T / math.sqrt(q.shape[2])
        scores += torch.full_like(scores, -torch.inf).triu(1)
        out[:, head] = scores.softmax(-1) @ v[:, head // share]
    return out.flatten(1)


HALVES = [(i, i + SIZE // 2) for i in range(SIZE // 2)]  # Qwen 1, Baichuan: pairs from the two halves of a head
NEIGHBOURS = [(i, i + 1) for i in range(0, SIZE // 2, 2)]  # ChatGLM: neighbours, in the first half of a head only


def qwen_logits(w: dict, ids: torch.Tensor) -> torch.Tensor:
    x = w["transformer.wte.weight"][ids]
    for layer in range(LAYERS):
        own = {name.removeprefix(f"transformer.h.{layer}."): tensor for name, tensor in w.items()}
        y = norm(x, own["ln_1.weight"], 1e-6)
        q, k, v = linear(y, own["attn.c_attn.weight"], own["attn.c_attn.bias"]).view(-1, 3, HEADS, SIZE).unbind(1)
        y = attention(turned(q, SIZE, HALVES), turned(k, SIZE, HALVES), v)
        x = x + linear(y, own["attn.c_proj.weight"])
        y = norm(x, own["ln_2.weight"], 1e-6)
        y = linear(y, own["mlp.w1.weight"]) * silu(linear(y, own["mlp.w2.weight"]))
        x = x + linear(y, own["mlp.c_proj.weight"])
    return linear(norm(x, w["transformer.ln_f.weight"], 1e-6), w["lm_head.weight"])


def baichuan_logits(w: dict, ids: torch.Tensor, unit_head: bool) -> torch.Tensor:
    x = w["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        own = {name.removeprefix(f"model.layers.{layer}."): tensor for name, tensor in w.items()}
        y = norm(x, own["input_layernorm.weight"], 1e-6)
        q, k, v = linear(y, own["self_attn.W_pack.weight"]).view(-1, 3, HEADS, SIZE).unbind(1)
        y = attention(turned(q, SIZE, HALVES), turned(k, SIZE, HALVES), v)
        x = x + linear(y, own["self_attn.o_proj.weight"])
        y = norm(x, own["post_attention_layernorm.weight"], 1e-6)
        y = silu(linear(y, own["mlp.gate_proj.weight"])) * linear(y, own["mlp.up_proj.weight"])
        x = x + linear(y, own["mlp.down_proj.weight"])
    head = w["lm_head.weight"]
    return linear(norm(x, w["model.norm.weight"], 1e-6), normalize(head) if unit_head else head)


def chatglm_logits(w: dict, ids: torch.Tensor) -> torch.Tensor:
    x = w["transformer.embedding.word_embeddings.weight"][ids]
    for layer in range(LAYERS):
        own = {name.removeprefix(f"transformer.encoder.layers.{layer}."): tensor for name, tensor in w.items()}
        y = norm(x, own["input_layernorm.weight"], 1e-5)
        qkv = linear(y, own["self_attention.query_key_value.weight"], own["self_attention.query_key_value.bias"])
        q, k, v = (part.view(len(ids), -1, SIZE) for part in qkv.split([HEADS * SIZE, 2 * SIZE, 2 * SIZE], -1))
        y = attention(turned(q, SIZE // 2, NEIGHBOURS), turned(k, SIZE // 2, NEIGHBOURS), v)
        x = x + linear(y, own["self_attention.dense.weight"])
        y = norm(x, own["post_attention_layernorm.weight"], 1e-5)
        gate, up = linear(y, own["mlp.dense_h_to_4h.weight"]).chunk(2, -1)
        x = x + linear(silu(gate) * up, own["mlp.dense_4h_to_h.weight"])
    return linear(norm(x, w["transformer.encoder.final_layernorm.weight"], 1e-5), w["transformer.output_layer.weight"])


def qwen_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {"transformer.wte.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shapes |= {"transformer.ln_f.weight": (HIDDEN,), "transformer.rotary_emb.inv_freq": (SIZE // 2,)}
    for layer in range(LAYERS):
        own = {"ln_1.weight": (HIDDEN,), "ln_2.weight": (HIDDEN,), "attn.c_proj.weight": (HIDDEN, HIDDEN)}
        own |= {"attn.c_attn.weight": (3 * HIDDEN, HIDDEN), "attn.c_attn.bias": (3 * HIDDEN,)}
        own |= {"mlp.w1.weight": (WIDTH, HIDDEN), "mlp.w2.weight": (WIDTH, HIDDEN)}
        own |= {"mlp.c_proj.weight": (HIDDEN, WIDTH)}
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in own.items()}
    return shapes


def baichuan_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shapes |= {"model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        own = {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
        own |= {"self_attn.W_pack.weight": (3 * HIDDEN, HIDDEN), "self_attn.o_proj.weight": (HIDDEN, HIDDEN)}
        own |= {"self_attn.rotary_emb.inv_freq": (SIZE // 2,), "mlp.down_proj.weight": (HIDDEN, WIDTH)}
        own |= {"mlp.gate_proj.weight": (WIDTH, HIDDEN), "mlp.up_proj.weight": (WIDTH, HIDDEN)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return shapes


def chatglm_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {"transformer.embedding.word_embeddings.weight": (VOCABULARY, HIDDEN)}
    shapes |= {"transformer.output_layer.weight": (VOCABULARY, HIDDEN)}
    shapes |= {"transformer.encoder.final_layernorm.weight": (HIDDEN,), "transformer.rotary_pos_emb.inv_freq": (2,)}
    rows = (HEADS + 2 * 2) * SIZE
    for layer in range(LAYERS):
        own = {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
        own |= {"self_attention.query_key_value.weight": (rows, HIDDEN), "self_attention.query_key_value.bias": (rows,)}
        own |= {"self_attention.dense.weight": (HIDDEN, HIDDEN)}
        own |= {"mlp.dense_h_to_4h.weight": (2 * WIDTH, HIDDEN), "mlp.dense_4h_to_h.weight": (HIDDEN, WIDTH)}
        shapes |= {f"transformer.encoder.layers.{layer}.{name}": shape for name, shape in own.items()}
    return shapes


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Large enough that every part, such as an angle or a bias, changes the logits by far more than rounding does."""
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def folder_with(folder, config: dict, weights: dict[str, torch.Tensor], in_bin_files: bool):
    """Write a folder as published: one file of safetensors, or two files of torch with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {}}), encoding="utf-8")
    if not in_bin_files:
        save_file(weights, folder / "model.safetensors")
        return folder
    names, index = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("config", "shapes", "formula", "family", "in_bins"),
    [
        (QWEN, qwen_shapes, qwen_logits, "qwen2", False),
        (BAICHUAN, baichuan_shapes, lambda w, ids: baichuan_logits(w, ids, unit_head=False), "llama", True),
        (BAICHUAN2, baichuan_shapes, lambda w, ids: baichuan_logits(w, ids, unit_head=True), "llama", True),
        (CHATGLM, chatglm_shapes, chatglm_logits, "glm", True),
    ],
    ids=["qwen", "baichuan", "baichuan2", "chatglm"],
)
def test_the_logits_are_those_of_the_published_formulas(tmp_path, capsys, config, shapes, formula, family, in_bins):
    weights = random_weights(shapes())
    folder = folder_with(tmp_path / "published", config, weights, in_bins)
    convert_weights.main([str(folder), str(tmp_path / "mine")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", dtype=torch.float64).eval()
    assert model.config.model_type == family and model.config.max_position_embeddings == LENGTH
    ids = torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(1))
    expected = formula({name: tensor.double() for name, tensor in weights.items()}, ids)
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    # The head of Baichuan 2 is divided in fp32, and transformers computes angles and norms in fp32.
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    buffers = sum(tensor.numel() for name, tensor in weights.items() if name.endswith("inv_freq"))
    count = sum(tensor.numel() for tensor in weights.values()) - buffers
    assert f"{count:,} parameters as {family}" in capsys.readouterr().out and model.num_parameters() == count


def test_qwens_tokenizer_gives_the_ids_of_tiktoken(tmp_path):
    """Its file of ranks, read by tiktoken with Qwen's pattern after NFC, as tokenization_qwen.py does."""
    words = [bytes([byte]) for byte in range(256)]
    for text in ("th", "he", "the", " the", "地", "地球", "12", "\u00e9"):
        encoded = text.encode()
        words += [encoded[:end] for end in range(2, len(encoded) + 1) if encoded[:end] not in words]
    lines = [f"{base64.b64encode(word).decode()} {rank}" for rank, word in enumerate(words)]
    folder = folder_with(tmp_path / "published", QWEN, random_weights(qwen_shapes()), in_bin_files=False)
    (folder / "qwen.tiktoken").write_text("\n".join(lines), encoding="ascii")
    convert_weights.main([str(folder), str(tmp_path / "mine")])
    tokenizer = load_tokenizer(str(tmp_path / "mine"))
    ranks = {word: rank for rank, word in enumerate(words)}
    pattern = convert_weights.QWEN_PATTERN
    published = tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in ("the earth, the 1234", "地球是圆的\n\n  the", "cafe\u0301 I'll"):
        assert tokenizer(text)["input_ids"] == published.encode(unicodedata.normalize("NFC", text))
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id == len(words)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|extra_0|>"]) == [
        len(words) + n for n in (1, 2, 3)
    ]


def test_a_sentencepiece_tokenizer_merges_by_score_and_falls_back_to_bytes(tmp_path):
    """Ids by hand: "ab" before "bc" by its score, an unknown letter as its bytes, ChatGLM's own tokens after."""
    proto = import_protobuf()
    model = proto.ModelProto()
    pieces = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3)] + [(f"<0x{byte:02X}>", 0, 6) for byte in range(256)]
    pieces += [("ab", -1, 1), ("bc", -2, 1), ("▁", -3, 1), ("a", -4, 1), ("b", -5, 1), ("c", -6, 1)]
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    folder = folder_with(tmp_path / "published", CHATGLM, random_weights(chatglm_shapes()), in_bin_files=True)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    convert_weights.main([str(folder), str(tmp_path / "mine")])
    tokenizer = load_tokenizer(str(tmp_path / "mine"))
    ids = {piece: number for number, (piece, _, _) in enumerate(pieces)}
    assert tokenizer("abc  bcab")["input_ids"] == [ids[piece] for piece in ("ab", "c", "▁", "▁", "bc", "ab")]
    assert tokenizer("d")["input_ids"] == [ids["<0x64>"]]
    assert tokenizer.eos_token_id == 2 and tokenizer.bos_token_id == 1
    assert tokenizer.convert_tokens_to_ids(["[MASK]", "[gMASK]", "sop"]) == [len(pieces) + n for n in (0, 1, 3)]
    model = pretrained_model(str(tmp_path / "mine"), tokenizer, LENGTH)  # as a recipe loads it
    assert model.config.model_type == "glm" and model.config.eos_token_id == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BAICHUAN2 | dict(hidden_size=5120), "Baichuan 13B .* has ALiBi"),
        ({k: v for k, v in BAICHUAN2.items() if k != "max_position_embeddings"}, "Baichuan 13B"),
        (dict(model_type="chatglm", num_layers=28, position_encoding_2d=True), "ChatGLM-6B .* both directions"),
        (CHATGLM | dict(rope_ratio=50), "stretch positions"),
        (CHATGLM | dict(quantization_bit=4), "quantized"),
        (QWEN | dict(no_bias=False), "unlike the published ones"),
        (dict(model_type="yuan"), "model_type yuan is not converted here"),
        ({k: v for k, v in QWEN.items() if k != "kv_channels"}, "says nothing of 'kv_channels'"),
    ],
)
def test_what_cannot_be_converted_is_one_line(tmp_path, config, message):
    folder = folder_with(tmp_path / "published", config, {"x": torch.zeros(1)}, in_bin_files=False)
    with pytest.raises(InputError, match=message) as refused:
        convert_weights.main([str(folder), str(tmp_path / "mine")])
    assert "\n" not in str(refused.value) and not (tmp_path / "mine").exists()


def test_weights_that_are_missing_or_of_another_model_are_one_line(tmp_path):
    weights = random_weights(qwen_shapes())
    folder = folder_with(tmp_path / "lacks", QWEN, {k: v for k, v in weights.items() if "ln_f" not in k}, False)
    with pytest.raises(InputError, match="1 weights are in none of the files, model.norm.weight the first"):
        convert_weights.main([str(folder), str(tmp_path / "mine")])
    assert not (tmp_path / "mine").exists()
    folder = folder_with(tmp_path / "other", QWEN, weights | {"transformer.h.0.gate": torch.zeros(1)}, False)
    with pytest.raises(InputError, match="transformer.h.0.gate: not a weight of this family"):
        convert_weights.main([str(folder), str(tmp_path / "mine")])
    folder = folder_with(tmp_path / "wide", QWEN | dict(vocab_size=100), weights, False)
    with pytest.raises(InputError, match=r"is \(320, 32\); by the config it is \(100, 32\)"):
        convert_weights.main([str(folder), str(tmp_path / "mine")])
    folder = folder_with(tmp_path / "shards", BAICHUAN, random_weights(baichuan_shapes()), True)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(InputError, match="1 of 2 files are missing, pytorch_model-00002-of-00002.bin the first"):
        convert_weights.main([str(folder), str(tmp_path / "mine")])
