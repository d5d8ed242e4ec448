"""Ulysses: rows divided among two processes on CPUs, attention by heads, are the rows of one process."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import load_recipe, losses, small_run
from launched_processes import COMPILED, FSDP2, check_compiled, in_launched_processes, meet_again
from test_sharding import CONSTANT, MUON, assert_same_run
from transformers import AutoConfig
from two_processes import in_two_processes

from common.console import InputError
from common.distributed.context_parallel import check_parallelism
from common.distributed.launch import Launch
from common.distributed.strategy import FSDP2 as SHARDED
from common.distributed.ulysses import check_heads, group_of_rows, heads_of_rows, pieces_of_heads, pieces_of_rows
from common.model.attention import full_mask

ASKED = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "2"}
RUNS = {
    "cross": [*CONSTANT, "--learning_rate", "1e-3"],
    "isolated": [*CONSTANT, "--learning_rate", "1e-3", "--packing", "isolated"],
    "muon": [*MUON, "--packing", "isolated"],  # with recompute
}


def check_exchange(rank: int, folder: Path) -> None:
    """Attention over divided rows is torch's own over whole ones, and so are the gradients."""
    launch = Launch(processes=2, process=rank, sequence_parallel=2)
    group = group_of_rows(launch)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 6, 8, generator=generator).requires_grad_()  # (rows, heads, tokens, size)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]])  # of the second row, two documents
    weights = torch.randn(2, 6, 4, 8, generator=generator)
    expected = F.scaled_dot_product_attention(query, key, value, full_mask(positions)).transpose(1, 2)
    grads = torch.autograd.grad((expected * weights).sum(), (query, key, value))

    mine = slice(3 * rank, 3 * rank + 3)
    pieces = [part[:, :, mine].detach().requires_grad_() for part in (query, key, value)]
    heads = [heads_of_rows(piece, group) for piece in pieces]
    assert torch.equal(heads[0], query[:, 2 * rank : 2 * rank + 2])
    found = pieces_of_heads(F.scaled_dot_product_attention(*heads, full_mask(positions)).transpose(1, 2), group)
    torch.testing.assert_close(found, expected[:, mine])
    for piece, grad in zip(torch.autograd.grad((found * weights[:, mine]).sum(), pieces), grads, strict=True):
        torch.testing.assert_close(piece, grad[:, :, mine])


def test_attention_by_heads_is_attention_over_whole_rows(tmp_path):
    in_two_processes(check_exchange, tmp_path)


def test_a_mask_of_documents_by_hand():
    seen = full_mask(torch.tensor([[0, 1, 0, 1]]))[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_each_process_has_its_piece_and_the_tokens_keep_their_positions():
    ids = torch.arange(16).view(2, 8)
    batch = {"input_ids": ids, "shift_labels": ids + 1, "labels": ids + 1}
    second = pieces_of_rows(Launch(processes=4, process=3, sequence_parallel=2), batch)
    assert second["input_ids"].tolist() == [[4, 5, 6, 7], [12, 13, 14, 15]]
    assert second["position_ids"].tolist() == [[4, 5, 6, 7]] * 2
    assert torch.equal(second["labels"], second["input_ids"] + 1) and torch.equal(batch["input_ids"], ids)
    isolated = pieces_of_rows(Launch(processes=2, process=1, sequence_parallel=2), batch | {"position_ids": ids % 3})
    assert torch.equal(isolated["position_ids"], (ids % 3)[:, 4:])


def launch(**changes) -> Launch:
    return Launch(**dict(strategy=SHARDED, processes=2, sequence_parallel=2) | changes)


class A:
    """A model of which nothing but its heads is known."""

    def __init__(self, heads: int, key_heads: int):
        self.config = AutoConfig.for_model("llama", num_attention_heads=heads, num_key_value_heads=key_heads)


def test_what_was_not_tried_is_refused_with_what_works():
    check_parallelism(launch(), 512, isolated=True)
    check_parallelism(launch(processes=8, shards=4), 512, isolated=True)
    for wrong, length, words in (
        (dict(strategy=Launch().strategy), 512, "with single: not tried here. Use --config_file .*fsdp2_ulysses.yaml"),
        (dict(precision="fp16"), 512, "with fp16"),
        (dict(context_parallel=2), 512, "with context parallelism"),
        (dict(tensor_parallel=2), 512, "tp_size 2 with sequence parallelism"),
        (dict(processes=8), 512, "1 x 1 x 2 processes .*dp_shard x sp.* these are 8. Use .*dp_shard_size 4"),
        ({}, 511, "--context_length 511: 2 cards share each row as 2 equal pieces. Use 512"),
    ):
        with pytest.raises(InputError, match=words):
            check_parallelism(launch(**wrong), length, isolated=True)
    with pytest.raises(InputError, match="sp_size 2: A has 4 heads and 1 key-value heads"):
        check_heads(A(4, 1), launch())
    check_heads(A(4, 2), launch())
    check_heads(A(4, 1), launch(sequence_parallel=1))


def test_a_recipe_that_does_not_know_of_it_is_refused(wiki, cache_dir, tmp_path, monkeypatch):
    """As a copy of a recipe from before: attention would see pieces of rows only."""
    recipe = load_recipe("wiki_zh_scratch")
    set_attention = recipe.set_attention
    monkeypatch.setattr(recipe, "set_attention", lambda *arguments, launch: set_attention(*arguments))
    trainer = recipe.PretrainingTrainer

    def made(model, training, shared, rows, order, launch, *more):
        divided = Launch(strategy=SHARDED, processes=2, sequence_parallel=2, rows_per_step=launch.rows_per_step)
        return trainer(model, training, shared, rows, order, divided, *more)

    monkeypatch.setattr(recipe, "PretrainingTrainer", made)
    with pytest.raises(InputError, match="this recipe does not hand launch.sequence_parallel on"):
        recipe.main(small_run(cache_dir, tmp_path))


def check_runs(rank: int, folder: Path) -> None:
    recipe = load_recipe("wiki_zh_scratch")
    lengths = []

    class Watched(recipe.PretrainingTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            lengths.append(inputs["input_ids"].shape[1])
            return super().compute_loss(model, inputs, *args, **kwargs)

    recipe.PretrainingTrainer = Watched
    halves = ("isolated", [*RUNS["isolated"], "--max_steps", "3"])
    for name, flags in (halves, *RUNS.items()):
        recipe.main(small_run(folder / "cache", folder / f"divided {name}", *flags))
        meet_again()
    check_compiled()
    assert set(lengths) == {32}  # of rows of 64 tokens
    (folder / f"lengths.{rank}").write_text(json.dumps(lengths))


@pytest.mark.heavy
@pytest.mark.parametrize("compiled", [{}, COMPILED], ids=["not compiled", "compiled"])
def test_runs_with_divided_rows_are_those_of_one_process_and_continue(wiki, cache_dir, tmp_path, compiled):
    (tmp_path / "cache").symlink_to(cache_dir)
    for name, flags in RUNS.items():
        wiki.main(small_run(cache_dir, tmp_path / name, *flags))
    in_launched_processes(2, check_runs, tmp_path, **FSDP2, **ASKED, **compiled)
    for name in RUNS:
        assert_same_run(tmp_path / f"divided {name}", tmp_path / name)
    assert losses(tmp_path / "isolated") != pytest.approx(losses(tmp_path / "cross"), rel=1e-4)
    text = (tmp_path / "output.0").read_text()
    assert f"continuing from {tmp_path}/divided isolated/checkpoint-3" in text and "(Ulysses)" in text
