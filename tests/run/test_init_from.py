"""The row at which a run with --init_from starts. tests/system/test_equivalence.py: weights under every strategy."""

import json

import pytest
import torch
from conftest import losses, small_run
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from common.arguments import SharedArguments
from common.console import InputError
from common.run.init_from import load_start, rows_before

IDENTITY = {"data": {"documents": ["a"]}, "training": {"seed": 1}}


@pytest.mark.parametrize(
    "state",
    [
        {"log_history": [{"loss": 2.0, "tokens_seen": 64}, {"tokens_seen": 128}, {"eval_loss": 2.0}]},
        {"global_step": 4, "loss": 2.0, "tokens_seen": 128},  # as explicit_loop.py writes it
    ],
)
def test_the_rows_trained_on_are_those_of_the_last_log(tmp_path, state):
    (tmp_path / "run.json").write_text(json.dumps(IDENTITY))
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    shared = SharedArguments(init_from=str(tmp_path), context_length=16)
    assert rows_before(IDENTITY, shared) == 8
    assert rows_before(IDENTITY | {"training": {"seed": 2}}, shared) == 0
    assert rows_before(IDENTITY, SharedArguments(context_length=16)) == 0, "without --init_from"


@pytest.mark.parametrize("fewer", ["0.05", "0.03"])
def test_a_run_whose_rows_are_all_trained_on_is_refused(wiki, cache_dir, tmp_path, fewer):
    flags = ["--num_train_epochs", "0.05", "--max_steps", "-1", "--eval_strategy", "no", "--save_strategy", "no"]
    wiki.main(small_run(cache_dir, tmp_path / "first", *flags))
    flags[1] = fewer
    with pytest.raises(InputError, match="trained on .* rows, and .* are asked for in all. .*--num_train_epochs"):
        wiki.main(small_run(cache_dir, tmp_path / "second", *flags, "--init_from", str(tmp_path / "first")))


MIXTURE = dict(
    model_type="mixtral", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=True,
)  # fmt: skip
CONSTANT = "--lr_scheduler_type constant --lr_scheduler_kwargs {} --warmup_steps 0 --eval_strategy no".split()


def test_a_mixture_of_experts_continues_and_its_weights_are_taken_over(wiki, cache_dir, tmp_path):
    """transformers saves experts under other names than the model has, and Trainer alone would not load them."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MIXTURE))
    flags = ["--model", str(tmp_path / "model"), *CONSTANT, "--learning_rate", "1e-3"]
    wiki.main(small_run(cache_dir, tmp_path / "whole", *flags))
    for steps in ("3", "6"):
        wiki.main(small_run(cache_dir, tmp_path / "halves", *flags, "--max_steps", steps))
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    whole, halves = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in whole
    assert all(torch.equal(halves[name], tensor) for name, tensor in whole.items())

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MIXTURE | {"vocab_size": 4096}))
    load_start(model, str(tmp_path / "whole"))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    more = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**MIXTURE | dict(vocab_size=4096, num_local_experts=6))
    )
    with pytest.raises(InputError, match="the checkpoint is of another model"):
        load_start(more, str(tmp_path / "whole"))
