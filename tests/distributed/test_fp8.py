"""FP8 on several processes, emulated on CPUs: the run of one process, continued, with layers that are in FP8."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import load_recipe, losses, small_run
from launched_processes import FSDP2, in_launched_processes, meet_again
from safetensors.torch import load_file
from test_equivalence import logs
from test_sharding import CONSTANT, results

import common.distributed.launch as launch
from common.console import InputError
from common.distributed.launch import Launch, check_fp8_alone
from common.distributed.strategy import FSDP2 as SHARDED

ASKED = {"ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_FP8_BACKEND": "AO"}
ASKED |= {"ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER": "false"}
FLAGS = [*CONSTANT, "--learning_rate", "1e-3", "--per_device_train_batch_size", "2"]
UNCLIPPED = ["--max_grad_norm", "0"]


def check_runs(rank: int, folder: Path) -> None:
    """Train in two halves, with products that torchao emulates: rounded to FP8 as on a GPU."""
    import torchao.float8
    from torchao.float8.float8_linear import Float8Linear

    torchao.float8.Float8LinearConfig = partial(torchao.float8.Float8LinearConfig, emulate=True)
    launch.check_fp8 = lambda *_: None  # it would refuse the CPU
    recipe = load_recipe("wiki_zh_scratch")

    class Watched(recipe.PretrainingTrainer):
        def training_step(self, *arguments):
            found = sum(isinstance(module, Float8Linear) for module in self.model.modules())
            assert found == 4 * 7 - 1, "all products of the layers but the first"
            return super().training_step(*arguments)

    recipe.PretrainingTrainer = Watched
    for name, flags in (("unclipped", [*UNCLIPPED, "--max_steps", "3"]), ("unclipped", UNCLIPPED), ("clipped", [])):
        recipe.main(small_run(folder / "cache", folder / f"{name} {os.environ['NAME']}", *FLAGS, *flags))
        meet_again()


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_fp8_on_two_processes_is_fp8_on_one_and_continues(wiki, cache_dir, tmp_path, strategy):
    """The scale of a product is that of a micro-batch, so both take micro-batches of the same rows.

    FSDP2 clips by a norm that is summed up from two halves: another order of additions, in fp32. It differs in the
    fifth digit, because torch's kernel for CPUs adds up long tensors one number after the other, and FP8 makes more of
    it in every step. Without clipping, nothing differs.
    """
    pytest.importorskip("torchao.float8")
    (tmp_path / "cache").symlink_to(cache_dir)
    wiki.main(small_run(cache_dir, tmp_path / "fp32", *FLAGS, *UNCLIPPED))
    for processes, name in ((1, "one"), (2, "two")):
        in_launched_processes(processes, check_runs, tmp_path, NAME=name, **strategy, **ASKED)
    one, two = (losses(tmp_path / f"unclipped {name}") for name in ("one", "two"))
    assert one == two
    fp32 = losses(tmp_path / "fp32")
    assert two == pytest.approx(fp32, rel=0.02) and two != pytest.approx(fp32, rel=1e-5)
    folders = [tmp_path / f"unclipped {name}" for name in ("one", "two")]
    assert results(folders[0])["eval_loss"] == results(folders[1])["eval_loss"]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert json.loads((folders[1] / "run.json").read_text())["training"]["fp8"] is True
    assert "continuing from" in (tmp_path / "output.0").read_text()

    one, two = (logs(tmp_path / f"clipped {name}") for name in ("one", "two"))
    assert two[1]["loss"] == one[1]["loss"] and two[1]["grad_norm"] == pytest.approx(one[1]["grad_norm"], rel=1e-4)
    for step, entry in two.items():
        assert entry["loss"] == pytest.approx(one[step]["loss"], rel=1e-3 if strategy else 1e-7), step


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        (dict(context_parallel=2), "2 context parallel"),
        (dict(sequence_parallel=2), "2 sequence parallel"),
        (dict(tensor_parallel=2), "2 tensor parallel"),
        (dict(replicas=2, shards=2), "2 copies x 2 shards"),
        (dict(offload_parameters=True), "parameters in main memory"),
        (dict(loaded_by_one=True), "fsdp_cpu_ram_efficient_loading"),
    ],
)
def test_what_was_not_tried_with_fp8_is_refused(beside, words):
    check_fp8_alone(Launch(strategy=SHARDED, processes=2))
    with pytest.raises(InputError, match=f"fp8 with {words}: not tried here. Use ddp.yaml or fsdp2.yaml"):
        check_fp8_alone(Launch(strategy=SHARDED, processes=2, **beside))
