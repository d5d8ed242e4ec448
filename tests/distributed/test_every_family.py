"""Every family of PaddleNLP's table under every strategy that takes it: two processes have the losses of one.

docs/coming_from.md has the table. Which families a strategy refuses is asked of the checks that refuse them.
"""

import json
import os
import re
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import ROOT, load_recipe, losses, small_run
from launched_processes import FSDP2, in_launched_processes, meet_again, zero
from test_explicit_pipeline import small_pipeline
from test_families import FAMILIES
from test_sharding import CONSTANT, parallel
from transformers import AutoConfig, AutoModelForCausalLM

import common.distributed.pipeline as pipelines
from common.console import InputError
from common.distributed.launch import Launch
from common.distributed.strategy import FSDP2 as SHARDED
from common.model.attention import set_attention
from common.model.placement import check_expert_plan, check_plan

# Rows of the table: a family of PaddleNLP -> one of test_families, or of those after it. Baichuan 2, ChatGLM and Qwen 1
# are converted into Llama, GLM and Qwen2.
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # processes would draw other numbers than one
SHAPES = {
    **{name: FAMILIES[name] for name in ("llama-2", "qwen2", "mistral", "gemma", "glm", "bloom", "qwen3")},
    "opt": FAMILIES["opt"] | dict(dropout=0.0),
    "gpt2": FAMILIES["gpt2"] | NO_DROPOUT,
    **{name: FAMILIES[name] for name in ("mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v2", "deepseek-v3")},
}
NO_ROUTER_LOSS = {"output_router_logits": False}
ULYSSES = FSDP2 | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "2"}
EXPERTS = parallel(1, 2) | {"PARALLELISM_CONFIG_EP_SIZE": "2"}
STRATEGIES = {  # columns of the table -> what the launcher says, and the recipe's flags
    "data": ({}, []),
    "sharding 1": (zero(1), []),
    "sharding 2": (zero(2), []),
    "sharding 3": (zero(3), []),
    "FSDP2": (FSDP2, []),
    "tensor": (parallel(2), []),
    "sequence": (ULYSSES, []),
    "experts": (EXPERTS, []),
    "pipeline": ({}, []),
    "recompute": (FSDP2, ["--recompute", "all"]),  # what is kept otherwise must be one operation: not in Bloom
}


def built(family: str):
    config = AutoConfig.for_model(**SHAPES[family], vocab_size=64, bos_token_id=None, eos_token_id=1, pad_token_id=None)
    return AutoModelForCausalLM.from_config(config)


def takes(family: str, strategy: str) -> bool:
    """Whether ``strategy`` trains ``family`` on two processes: what the project's own checks say."""
    divided = Launch(strategy=SHARDED, processes=2, sequence_parallel=2)
    checks = {
        "tensor": lambda model: check_plan(model, 2),
        "experts": lambda model: check_expert_plan(model, 2),
        "pipeline": lambda model: pipelines.divide_layers(model, 2),
        "sequence": lambda model: set_attention(model, "auto", False, model.device, divided),
    }
    try:
        with patch("common.model.attention.group_of_rows"):  # it wants the processes
            checks.get(strategy, lambda model: None)(built(family))
    except InputError:
        return False
    return True


def flags_of(folder: Path, family: str, strategy: str) -> list[str]:
    model = f"{family} no router loss" if strategy == "sequence" else family
    flags = [*CONSTANT, "--max_eval_rows", "1", "--optimizer", "adamw", "--learning_rate", "1e-3", "--max_steps", "3"]
    if strategy == "pipeline":  # whose recipes do not read these two, nor --model
        return [flag for flag in flags if flag not in ("--eval_strategy", "no")]
    return [*flags, "--model", str(folder / model), "--save_strategy", "no"]


def recipe_for(folder: Path, family: str, strategy: str, processes: int):
    """Return the recipe that trains ``family``, which the pipeline's recipe cannot take from a flag."""
    if strategy != "pipeline":
        return load_recipe("wiki_zh_scratch")
    recipe = load_recipe("explicit_pipeline" if processes > 1 else "explicit_loop")
    recipe.SAMPLE_MODEL = SHAPES[family]
    return recipe


def check_families(rank: int, folder: Path) -> None:
    strategy = os.environ["STRATEGY"]
    for family in json.loads((folder / "families").read_text()):
        recipe = recipe_for(folder, family, strategy, 2)
        rows = {"sequence": "4", "tensor": "4", "pipeline": "1"}.get(strategy, "2")
        flags = [*flags_of(folder, family, strategy), *STRATEGIES[strategy][1], "--per_device_train_batch_size", rows]
        small = small_pipeline if strategy == "pipeline" else small_run
        recipe.main(small(folder / "cache", folder / f"{family} on two", *flags))
        meet_again()


def logged(folder: Path) -> list[float]:
    """Return the losses of a run of either kind of recipe."""
    if (folder / "log.jsonl").exists():
        entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        return [entry["loss"] for entry in entries if "loss" in entry]
    return [*losses(folder).values()]


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_have_the_losses_of_one(cache_dir, tmp_path, strategy):
    families = [family for family in SHAPES if takes(family, strategy)]
    (tmp_path / "cache").symlink_to(cache_dir)
    for family in families:
        for name, shape in ((family, SHAPES[family]), (f"{family} no router loss", SHAPES[family] | NO_ROUTER_LOSS)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text(json.dumps(shape))
        recipe = recipe_for(tmp_path, family, strategy, 1)
        recipe.main(small_run(cache_dir, tmp_path / f"{family} alone", *flags_of(tmp_path, family, strategy)))
    environment, _ = STRATEGIES[strategy]
    one_run_each = strategy.startswith("sharding")  # DeepSpeed keeps a group of processes that has ended
    for group in [[family] for family in families] if one_run_each else [families]:
        (tmp_path / "families").write_text(json.dumps(group))
        in_launched_processes(2, check_families, tmp_path, STRATEGY=strategy, **environment)
    found = {family: logged(tmp_path / f"{family} on two") for family in families}
    for family in families:
        assert len(found[family]) == 3
        assert found[family] == pytest.approx(logged(tmp_path / f"{family} alone"), rel=2e-5), family


PAGE = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8").split("## PaddleNLP's parallel strategies")[1]
PAGE = PAGE.split("\n## ")[0]
COLUMNS = ("data", "tensor", "sequence", "pipeline", "experts")


def test_the_table_says_what_is_refused():
    rows = re.findall(r"^\| [^|]+ \| `([\w-]+)` \| ((?:yes|no) /.*) \|$", PAGE, flags=re.MULTILINE)
    assert {family for family, _ in rows} == set(SHAPES)
    for family, cells in rows:
        here = [cell.split(" / ")[0] for cell in cells.split(" | ")]
        assert here == ["yes" if takes(family, strategy) else "no" for strategy in COLUMNS], family


def test_the_tests_that_the_tables_name_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) == 13
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), name
    for yaml in re.findall(r"`(\w+\.yaml)`", PAGE):
        assert (ROOT / "accelerate_configs" / yaml).exists(), yaml
