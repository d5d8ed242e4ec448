"""LoRA on random models: what is trained, which targets are refused; unpacking the weights of a .gguf file."""

import os
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.console import InputError
from common.model.adapters import ALL_LINEAR, add_adapters, unpacked_gguf
from common.run import merge_adapters
from common.run.merge_adapters import save_merged

SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
LINEAR = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"  # of Qwen2


def random_model(kind="qwen2", **changed):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | dict(num_key_value_heads=2) | changed))


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("tied", [True, False])
def test_beside_all_linear_layers_but_the_head(tied, capsys):
    model = add_adapters(random_model(tie_word_embeddings=tied), 4, [ALL_LINEAR], train_embedding=False)
    sizes = [(32, 32)] * 4 + [(32, 64)] * 3  # in and out of q, k, v, o; of gate, up, down, in either order
    by_hand = 2 * 4 * sum(map(sum, sizes))  # layers, rank
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == by_hand
    assert not any("head" in name or "embed" in name for name in trained(model))
    assert f"LoRA: {by_hand:,} parameters are trained, rank 4 beside down_proj, gate_proj, k" in capsys.readouterr().out


def test_gpt2_whose_linear_layers_have_another_class(capsys):
    model = random_model("gpt2", n_embd=32, n_layer=2, n_head=2)
    names = trained(add_adapters(model, 4, ["c_attn"], train_embedding=False))
    assert len(names) == 2 * 2 and all(".attn.c_attn.lora_" in name for name in names)
    assert capsys.readouterr().out.strip().endswith("beside c_attn")


def test_the_embedding_is_trained_in_fp32_if_the_flag_says_so():
    model = add_adapters(random_model().bfloat16(), 4, ["q_proj"], train_embedding=True)
    assert [name for name in trained(model) if "lora" not in name] == [
        "base_model.model.model.embed_tokens.modules_to_save.default.weight"
    ]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    "targets", ["query", "q_proj query", "lm_head", "embed_tokens", "0.q_proj", "all-linear q_proj"]
)
def test_targets_that_match_nothing_are_refused_and_those_that_exist_are_listed(targets):
    wrong = targets.removeprefix("q_proj ").removesuffix(" q_proj")
    message = f"^--lora_targets: Qwen2ForCausalLM has no linear layers {wrong} beside its head. It has: {LINEAR}. Or"
    with pytest.raises(InputError, match=message):
        add_adapters(random_model(), 4, targets.split(), train_embedding=False)


@pytest.mark.parametrize("rank", [0, -1])
def test_adapters_that_train_nothing_are_refused(rank):
    with pytest.raises(InputError, match=f"--lora_rank {rank}: must be at least 1"):
        add_adapters(random_model(), rank, [ALL_LINEAR], train_embedding=False)


def test_a_gguf_file_is_unpacked_once_and_another_file_of_its_name_again(weights, tmp_path, monkeypatch, capsys):
    """A half-unpacked folder, as an interruption leaves it, is not taken for a whole one."""
    gguf = pytest.importorskip("gguf")
    from test_pretrained import write_gguf

    model, tokenizer = AutoModelForCausalLM.from_pretrained(weights), AutoTokenizer.from_pretrained(weights)
    path, cache = tmp_path / "small.gguf", tmp_path / "cache"
    cache.mkdir()
    write_gguf(gguf, path, model, tokenizer)
    unpack = (str(path), tokenizer, 64, torch.float32, str(cache))
    with monkeypatch.context() as interrupted:
        interrupted.setattr(type(tokenizer), "save_pretrained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            unpacked_gguf(*unpack)
    first = unpacked_gguf(*unpack)
    expected = model.state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(first).state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert AutoTokenizer.from_pretrained(first).get_vocab() == tokenizer.get_vocab()
    capsys.readouterr()
    assert unpacked_gguf(*unpack) == first and "unpacked" not in capsys.readouterr().out
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    write_gguf(gguf, path, model, tokenizer)
    os.utime(path, ns=(1, 1))
    second = AutoModelForCausalLM.from_pretrained(unpacked_gguf(*unpack))
    assert torch.equal(second.model.norm.weight, model.model.norm.weight)


def test_merging_a_folder_without_a_run_is_refused(weights, tmp_path):
    with pytest.raises(InputError, match="no finished run of LoRA"):
        save_merged(str(weights), str(tmp_path))


def test_merging_says_how_much_memory_it_needs_before_it_uses_it(weights, tmp_path, monkeypatch):
    for name in ("all_results.json", "adapter_config.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / "run.json").write_text('{"model": {"dtype": "bfloat16"}}', encoding="utf-8")
    AutoTokenizer.from_pretrained(weights).save_pretrained(tmp_path)
    numbers = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(weights).parameters())
    monkeypatch.setattr(merge_adapters, "_check_finished", lambda run: None)  # this folder is no whole run
    monkeypatch.setattr(merge_adapters, "GIB", numbers)
    monkeypatch.setattr(merge_adapters.psutil, "virtual_memory", lambda: SimpleNamespace(available=1.5 * numbers))
    with pytest.raises(InputError, match=r"not merged: 2\.0 GiB of main memory are needed, 1\.5 free.*--merge_only"):
        save_merged(str(weights), str(tmp_path))
