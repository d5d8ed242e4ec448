"""Weights of a family that comes with code of its own -> a folder in the format of a family that transformers has.

    python data/convert_weights.py FOLDER OUT      # FOLDER as downloaded: config.json, weights, tokenizer

    Qwen 1 (Qwen-1_8B, 7B, 14B, 72B)    -> qwen2    w1 and w2 of the MLP are Qwen2's up and gate
    Baichuan-7B, Baichuan2-7B           -> llama    Baichuan 2 has rows of length 1 in its head: written so, once
    ChatGLM2-6B, ChatGLM3-6B            -> glm      rotary embeddings on the first half of each head, as in GLM-4

The logits are those of the original up to the length that it was trained with (a test computes the original's formulas
on small weights). Weights are read and written file by file, so the memory needed is that of one file. The code in
FOLDER is not run. Then: recipes/openwebtext_continue.py --model OUT. What transformers has no family for is refused.
docs/families.md lists all families.

Sources: modeling_qwen.py of Qwen/Qwen-7B, modeling_baichuan.py of baichuan-inc/Baichuan2-7B-Base, modeling_chatglm.py
of THUDM/chatglm3-6b.
"""

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SpmConverter, TikTokenConverter, import_protobuf

from common.console import InputError, say
from common.hub import WEIGHT_FILES
from common.io import write_json
from common.model_folder import refuse_pointers

QKV = "self_attn.{}_proj"  # one matrix there, three here
ATTENTION_AND_MLP = {"self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}
# Buffers that follow from the config; some published files have them.
COMPUTED = ("inv_freq", ".masked_bias", ".attn.bias", ".logn_tensor")
# How Qwen 1 cuts text before BPE. Source: tokenization_qwen.py of Qwen/Qwen-7B
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))]
# Ids after those of the SentencePiece model. Source: tokenization_chatglm.py of THUDM/chatglm3-6b
CHATGLM_SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
CHATGLM_SPECIAL += ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]  # these four are of ChatGLM3 only


@dataclass(frozen=True)
class Layout:
    """How a family names its weights, and what they are in the family of ``config``.

    Attributes:
        config: of the new folder.
        layer: how the names of a layer's weights begin, before the number of the layer.
        in_layer: the rest of such a name -> the rest of the new one; QKV for queries, keys and values in one.
        outside: names outside of the layers -> new names.
        unit_head: the rows of the head are divided by their lengths.
        special_tokens: that the tokenizer has beside those of its file.
    """

    config: PretrainedConfig
    layer: str
    in_layer: dict[str, str]
    outside: dict[str, str]
    unit_head: bool = False
    special_tokens: list[str] = field(default_factory=list)

    def renamed(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the new tensors that the tensor called ``name`` becomes, by name.

        Raises:
            InputError: the family has no such name.
        """
        if name in self.outside:
            if self.unit_head and self.outside[name] == "lm_head.weight":
                tensor = torch.nn.functional.normalize(tensor.float()).to(tensor.dtype)
            return {self.outside[name]: tensor}
        found = re.fullmatch(rf"{re.escape(self.layer)}(\d+)\.(.+)", name)
        if found is None or found[2] not in self.in_layer:
            raise InputError(f"{name}: not a weight of this family. Is the folder that of another one?")
        new = f"model.layers.{found[1]}.{self.in_layer[found[2]]}"
        if "{}" not in new:
            return {new: tensor}
        config = self.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        sizes = [size * config.num_attention_heads, *[size * config.num_key_value_heads] * 2]
        if tensor.shape[0] != sum(sizes):
            raise InputError(f"{name}: has {tensor.shape[0]} rows. Queries, keys and values of the config: {sizes}.")
        return {new.format(part): rows for part, rows in zip("qkv", tensor.split(sizes), strict=True)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="The folder as downloaded.")
    parser.add_argument("out", type=Path, help="The folder to write. It must not exist.")
    arguments = parser.parse_args(argv)
    folder, out = arguments.folder, arguments.out
    layout = layout_of(folder)
    files = files_of_weights(folder)
    if out.exists():
        raise InputError(f"{out}: exists already. Name a folder that does not.")
    partial = out.with_name(f"{out.name}.partial")  # what an interrupted call leaves does not look complete
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    total, layout.config.dtype = convert(files, partial, layout)
    layout.config.save_pretrained(partial)
    tokenizer = tokenizer_of(folder, layout)
    if tokenizer is None:
        said = "It has no tokenizer file that is known here: give one with --tokenizer."
    else:
        tokenizer.save_pretrained(partial)
        said = f"Its tokenizer has {len(tokenizer):,} tokens."
    partial.rename(out)
    say(f"{out}: {total:,} parameters as {layout.config.model_type}. {said} Next: --model {out}")


def layout_of(folder: Path) -> Layout:
    """Return the layout of the weights in ``folder``.

    Raises:
        InputError: there is no config, or transformers has no family for what it describes.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: has no config.json that can be read ({error}).") from None
    family = config.get("model_type")
    if "quantization_config" in config or config.get("quantization_bit"):
        raise InputError(f"{folder}: its weights are quantized. Give the original.")
    try:
        if family == "qwen":
            return qwen(config)
        if family == "baichuan":
            return baichuan(config)
        if family == "chatglm":
            return chatglm(config)
    except KeyError as error:
        raise InputError(f"{folder}/config.json: says nothing of {error}, which every {family} config has.") from None
    raise InputError(
        f"{folder}: model_type {family} is not converted here. Known: qwen (Qwen 1), baichuan (7B), chatglm (2 and 3). "
        "docs/families.md says what else there is."
    )


def qwen(config: dict) -> Layout:
    heads = config["num_attention_heads"]
    if config["kv_channels"] * heads != config["hidden_size"] or config["rotary_pct"] != 1 or not config["no_bias"]:
        raise InputError("a Qwen 1 config unlike the published ones (kv_channels, rotary_pct, no_bias).")
    names = {"attn.c_attn.weight": f"{QKV}.weight", "attn.c_attn.bias": f"{QKV}.bias"}
    names |= {"attn.c_proj.weight": "self_attn.o_proj.weight", "mlp.c_proj.weight": "mlp.down_proj.weight"}
    names |= {"mlp.w1.weight": "mlp.up_proj.weight", "mlp.w2.weight": "mlp.gate_proj.weight"}
    names |= {"ln_1.weight": "input_layernorm.weight", "ln_2.weight": "post_attention_layernorm.weight"}
    new = AutoConfig.for_model(
        "qwen2",
        architectures=["Qwen2ForCausalLM"],
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"] // 2,  # Qwen 1 counts w1 and w2 together
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=config["seq_length"],  # beyond, Qwen 1 changes its attention when it generates
        rms_norm_eps=config["layer_norm_epsilon"],
        rope_theta=config["rotary_emb_base"],
        tie_word_embeddings=False,
    )
    ends = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
    return Layout(new, "transformer.h.", names, with_weight(ends), special_tokens=QWEN_SPECIAL)


def baichuan(config: dict) -> Layout:
    if "max_position_embeddings" not in config or config["hidden_size"] == 5120:
        raise InputError(
            "Baichuan 13B (1 and 2) has ALiBi instead of rotary embeddings, and transformers has no family with ALiBi "
            "and this MLP. Baichuan-7B and Baichuan2-7B can be converted."
        )
    names = {name: name for name in ATTENTION_AND_MLP | NORMS} | {"self_attn.W_pack.weight": f"{QKV}.weight"}
    copied = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    copied += ("hidden_act", "rms_norm_eps", "max_position_embeddings")
    new = AutoConfig.for_model(
        "llama",
        architectures=["LlamaForCausalLM"],
        num_key_value_heads=config["num_attention_heads"],
        tie_word_embeddings=False,
        **{name: config[name] for name in copied},
    )
    ends = {name: name for name in ("model.embed_tokens", "model.norm", "lm_head")}
    first = config["architectures"] == ["BaiChuanForCausalLM"]  # Baichuan 2 writes it with a small c
    return Layout(new, "model.layers.", names, with_weight(ends), unit_head=not first)


def chatglm(config: dict) -> Layout:
    if "multi_query_group_num" not in config:
        raise InputError(
            "ChatGLM-6B (1) reads a prompt in both directions and counts positions twice: transformers has no family "
            "for it. ChatGLM2-6B and ChatGLM3-6B can be converted."
        )
    switches = dict(rmsnorm=True, post_layer_norm=True, multi_query_attention=True, add_qkv_bias=True)
    switches |= dict(add_bias_linear=False, apply_residual_connection_post_layernorm=False)
    unlike = [name for name, value in switches.items() if config[name] != value]
    if unlike or config.get("rope_ratio", 1) != 1 or config.get("pre_seq_len"):
        raise InputError(
            f"a ChatGLM config unlike those of chatglm2-6b and chatglm3-6b ({', '.join([*unlike, 'rope_ratio'])}): "
            "the -32k and -128k models stretch positions, each in its own way, and are not converted here."
        )
    names = {f"self_attention.query_key_value.{kind}": f"{QKV}.{kind}" for kind in ("weight", "bias")}
    names |= {"self_attention.dense.weight": "self_attn.o_proj.weight"} | {name: name for name in NORMS}
    names |= {"mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight", "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight"}
    new = AutoConfig.for_model(
        "glm",
        architectures=["GlmForCausalLM"],
        vocab_size=config["padded_vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["ffn_hidden_size"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["multi_query_group_num"],
        head_dim=config["kv_channels"],
        max_position_embeddings=config["seq_length"],
        rms_norm_eps=config["layernorm_epsilon"],
        rope_theta=10_000.0,
        partial_rotary_factor=0.5,
        attention_bias=True,
        tie_word_embeddings=False,
        eos_token_id=2,
        pad_token_id=0,
    )
    ends = {"transformer.embedding.word_embeddings": "model.embed_tokens", "transformer.output_layer": "lm_head"}
    ends |= {"transformer.encoder.final_layernorm": "model.norm"}
    return Layout(new, "transformer.encoder.layers.", names, with_weight(ends), special_tokens=CHATGLM_SPECIAL)


def with_weight(modules: dict[str, str]) -> dict[str, str]:
    return {f"{old}.weight": f"{new}.weight" for old, new in modules.items()}


def files_of_weights(folder: Path) -> list[Path]:
    """Return the files with weights: safetensors if there are any, else those that torch saved.

    Raises:
        InputError: there are none, or an index names one that is not there.
    """
    refuse_pointers(folder, ["*.safetensors", "*.bin"])
    files = sorted(path for glob in WEIGHT_FILES for path in folder.glob(glob))
    if not files:
        files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise InputError(f"{folder}: has neither *.safetensors nor pytorch_model*.bin.")
    index = folder / f"{'model.safetensors' if files[0].suffix == '.safetensors' else 'pytorch_model.bin'}.index.json"
    if index.exists():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        absent = sorted(named - {path.name for path in files})
        if absent:
            raise InputError(f"{folder}: {len(absent)} of {len(named)} files are missing, {absent[0]} the first.")
        files = [path for path in files if path.name in named]
    return files


def read_weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    if path.suffix == ".safetensors":
        yield from load_file(path).items()
    else:  # weights_only: nothing in the file is run
        yield from torch.load(path, map_location="cpu", weights_only=True).items()


def convert(files: list[Path], out: Path, layout: Layout) -> tuple[int, torch.dtype]:
    """Write each of ``files`` under the new names to ``out``; return the number of parameters, and their dtype.

    Raises:
        InputError: weights are missing, or have another shape than the config says.
    """
    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(layout.config).state_dict()
    weight_map, total, dtype = {}, 0, torch.float32
    for number, path in enumerate(files, start=1):
        tensors = {}
        for name, tensor in read_weights(path):
            if not name.endswith(COMPUTED):
                tensors |= layout.renamed(name, tensor)
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        for key, tensor in tensors.items():
            if key not in wanted or tensor.shape != wanted[key].shape:
                shape = tuple(wanted[key].shape) if key in wanted else "no such weight"
                raise InputError(f"{path}: {key} is {tuple(tensor.shape)}; by the config it is {shape}.")
            weight_map[key], dtype = name, tensor.dtype
            total += tensor.numel()
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / name, {"format": "pt"})
        say(f"{path.name} -> {name}")
    missing = sorted(wanted.keys() - weight_map.keys())
    if missing:
        raise InputError(f"{len(missing)} weights are in none of the files, {missing[0]} the first. Download it again.")
    if len(files) > 1:
        write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return total, dtype


def tokenizer_of(folder: Path, layout: Layout) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer of ``folder``, which gives the ids of the original; None if there is no file of one."""
    ranks, pieces = folder / "qwen.tiktoken", folder / "tokenizer.model"
    if ranks.exists():
        converter = TikTokenConverter(str(ranks), QWEN_PATTERN, extra_special_tokens=layout.special_tokens)
        tokenizer = converter.converted()
        tokenizer.normalizer = normalizers.NFC()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    if pieces.exists():
        tokenizer = sentencepiece_tokenizer(pieces)
        tokenizer.add_special_tokens(layout.special_tokens)
        ends = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)
    return None


def sentencepiece_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a SentencePiece BPE model, by its own settings.

    Raises:
        InputError: there is no protobuf, or one that does not go with the sentencepiece package.
    """
    try:
        model = import_protobuf().ModelProto()
    except Exception as error:  # ImportError, or an error of protobuf's own
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: needs protobuf to be read: pip install -U protobuf ({reason})") from None
    model.ParseFromString(path.read_bytes())
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    return SpmConverter.build_tokenizer_from_spm_proto(model, vocabulary)


if __name__ == "__main__":
    main()
