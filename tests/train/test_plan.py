"""--plan: what it prints, what it advises, and that it loads nothing."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load_recipe, small_run
from test_memory import model_of
from transformers import AutoConfig, Trainer, TrainerControl, TrainingArguments

from common.arguments import SharedArguments
from common.console import InputError, duration_in_words
from common.distributed.launch import Launch, read_launch
from common.distributed.strategy import DDP
from common.model.memory import Setting
from common.model.scaling import LossLaw
from common.train.advice import advice
from common.train.combinations import choose_optimizer
from common.train.probe import StepTimer, probe_in_words
from common.train.setting import launch_of_yaml, setting_of_run, yaml_to_plan

CONFIGS = ROOT / "accelerate_configs"
# The recipe's model by hand. A layer: q and o 768x768, k and v 768x384, three 768x2048, two norms, norms of q and k.
BODY = 12 * (2 * 768 * 768 + 2 * 768 * 384 + 3 * 768 * 2048 + 2 * 768 + 2 * 64) + 768
PARAMETERS = 151_680 * 768 + BODY  # with a vocabulary of 151,646, if the tokenizer is not known
COUNT = 32_768 * 768 + BODY


def test_a_plan_ends_in_a_sentence_and_with_plan_json_in_json_and_loads_nothing(tmp_path):
    """With a tokenizer and data that do not exist."""
    flags = [
        "--plan",
        "--plan_json",
        "--tokenizer",
        "no/such",
        "--data",
        "no/such",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    where = ["--plan_config", str(CONFIGS / "zero2.yaml"), "--plan_processes", "8", "--plan_memory_gib", "80"]
    command = [sys.executable, str(ROOT / "recipes" / "wiki_zh_scratch.py"), *flags, *where]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *_, sentence, figures = done.stdout.splitlines()
    planned = json.loads(figures)
    spare = f"{80 - planned['total_gib']:.2f}"
    assert sentence == f"It fits 80 GiB with {spare} to spare. How long it takes: --plan --probe."
    names = {"parameters_gib", "gradients_gib", "optimizer_gib", "activations_gib", "logits_gib", "framework_gib"}
    assert set(planned) == names | {"fits", "total_gib"}
    assert planned["fits"] is True
    assert planned["total_gib"] == pytest.approx(sum(planned[name] for name in names), abs=0.01)
    assert planned["parameters_gib"] == pytest.approx(2 * PARAMETERS / 2**30, abs=0.001)
    assert "zero2 on 8 card(s), 16 rows of 512 tokens" in done.stdout, "all of a step's, on an eighth of the cards"
    assert not (tmp_path / "out").exists()
    assert "planned for a vocabulary of 151,646; no/such is not loaded for a plan" in done.stdout


def test_what_does_not_fit_gets_switches_that_make_it_fit(wiki, capsys):
    flags = ["--plan", "--plan_config", str(CONFIGS / "single_gpu.yaml"), "--plan_memory_gib", "6"]
    wiki.main([*flags, "--per_device_train_batch_size", "64"])
    printed = capsys.readouterr().out
    missing = float(re.search(r"  total +(\S+)\n", printed)[1]) - 6
    assert f"It does not fit 6 GiB: {missing:.2f} GiB are missing on each card." in printed
    assert "the cheapest first:\n  --per_device_train_batch_size 16\n" in printed
    launch = f"accelerate launch --config_file {CONFIGS / 'single_gpu.yaml'} recipes/wiki_zh_scratch.py"
    assert printed.endswith(f"The whole command:\n  {launch} --per_device_train_batch_size 16\n")


@pytest.mark.parametrize(
    ("recipe", "flags", "limit", "command"),
    [  # as benchmarks/README.md has them: 3B needs 13.6 GiB stepping in backward
        ("low_memory_16gb", "--model Qwen/Qwen2.5-3B --data a.txt", 15.5,
         "recipes/low_memory_16gb.py --data a.txt --model Qwen/Qwen2.5-3B --step_in_backward --max_grad_norm 0 "
         "--tokens_per_step 2048"),
        ("openwebtext_continue", "--model Qwen/Qwen2.5-7B --data a.txt --plan_processes 8", 80,
         "--num_processes 8 recipes/openwebtext_continue.py --data a.txt --model Qwen/Qwen2.5-7B"),
    ],
)  # fmt: skip
def test_the_advice_ends_in_a_command_whose_plan_fits(recipe, flags, limit, command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = load_recipe(recipe)
    module.main(["--plan", "--plan_memory_gib", str(limit), *flags.split()])
    printed = capsys.readouterr().out
    whole = printed.split("The whole command:\n")[1].splitlines()[0]
    assert set(command.split()) <= set(whole.split()) and "--plan" not in whole
    planned = planned_again(module, whole, limit, capsys)
    assert planned["fits"] is True


def planned_again(module, command: str, limit: float, capsys) -> dict:
    """Return the figures of --plan for a command that was printed."""
    launcher, _, flags = command.partition(f" recipes/{module.RECIPE} ")
    words = dict(zip(shlex.split(launcher)[2::2], shlex.split(launcher)[3::2], strict=True))
    flags = [*shlex.split(flags), "--plan", "--plan_json", "--plan_memory_gib", str(limit)]
    flags += ["--plan_config", words["--config_file"], "--plan_processes", words.get("--num_processes", "1")]
    module.main(flags)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_on_a_t4_the_plan_names_what_fits_with_commands_that_do(capsys, monkeypatch):
    """14.7 GiB in fp16, where 1.5B as a whole do not fit: 16 bytes a parameter and more are over 23 GiB."""
    monkeypatch.chdir(ROOT)
    module = load_recipe("low_memory_16gb")
    t4 = ["--plan_config", "accelerate_configs/fp16.yaml", "--plan_memory_gib", "14.7"]
    module.main(["--plan", *t4, "--data", "my notes.txt", "--encoding", "gb18030"])
    printed = capsys.readouterr().out
    assert "It does not fit 14.7 GiB" in printed
    named = re.findall(r"^  (.+) \((.+) GiB\):\n    (.+)$", printed, flags=re.MULTILINE)
    assert [what for what, _, _ in named] == [
        "all parameters of Qwen/Qwen2.5-0.5B",
        "adapters beside Qwen/Qwen2.5-3B",
        "adapters beside, in 4 bits, Qwen/Qwen2.5-7B",
    ]
    for _, need, command in named:
        assert "fp16.yaml" in command and "--data 'my notes.txt' --encoding gb18030" in command
        planned = planned_again(module, command, 14.7, capsys)
        assert planned["fits"] is True and f"{planned['total_gib']:.2f}" == need


def test_a_recipe_from_scratch_names_no_other_weights(wiki, capsys):
    wiki.main("--plan --plan_memory_gib 2 --target_parameters 1B".split())
    printed = capsys.readouterr().out
    assert "does not fit" in printed and "Qwen" not in printed


YAMLS, ROWS = "accelerate_configs/", "--per_device_train_batch_size "


@pytest.mark.parametrize(
    ("name", "processes", "limit", "expected"),
    [
        ("0.5B", 1, 40, [ROWS + "8"]),  # half of 41.7 GiB that are activations and 9.5 that stay
        ("7B", 8, 60, [ROWS + "4", YAMLS + "zero2.yaml"]),
        ("7B", 8, 30, [YAMLS + "fsdp2.yaml", ROWS + "2"]),
        ("7B", 1, 80, [ROWS + "1", "--recompute all: activations are computed twice"]),
        ("7B", 1, 50, [ROWS + "1", "--recompute all", "--optimizer adamw --optim adamw_8bit"]),
    ],
)
def test_the_advice_is_the_cheapest_that_fits(name, processes, limit, expected):
    found = advice(model_of(name), Setting(16, 2048, processes=processes), limit)
    assert len(found) == len(expected)
    assert all(switch.startswith(start) for switch, start in zip(found, expected, strict=True))


QWEN = dict(model_type="qwen2", max_position_embeddings=32_768)
SIZES = {
    "3B": QWEN
    | dict(hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36, num_attention_heads=16)
    | dict(num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True),
    "7B": QWEN
    | dict(hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28)
    | dict(num_key_value_heads=4, vocab_size=152_064, tie_word_embeddings=False),
}
ZERO_3 = "{distributed_type: DEEPSPEED, deepspeed_config: {zero_stage: 3}, mixed_precision: bf16, num_processes: 1}"
# Qwen2.5-7B. A layer: queries and their output with one bias, keys and values with biases, the MLP, two norms.
END = 152_064 * 3584
LAYER = (2 * 3584 * 3584 + 3584) + 2 * (3584 * 512 + 512) + 3 * 3584 * 18_944 + 2 * 3584
ALL = 2 * END + 28 * LAYER + 3584
# A token in a layer, in bf16: the residual stream twice, two norms' results, queries and the attention's result, keys
# and values, three tensors of the MLP.
SAVED = 2 * (2 * 3584 + 2 * 3584 + 2 * 3584 + 2 * 512 + 3 * 18_944)
NOT_COMPILED = 17 * 3584  # the factor that memory.py says is fitted


@pytest.mark.parametrize(
    ("name", "parameters", "gradients", "optimizer", "exchanged", "saved"),
    [
        # All in bf16; an eighth of fp32 gradients, masters and two moments. The bucket comes when the logits are gone.
        ("zero2", 2 * ALL, 4 * ALL / 8, 12 * ALL / 8, 0, SAVED),
        # The parameters divided, too, and 1e9 of them gathered, and a bucket of 500M numbers that is always there.
        ("zero3", 2 * ALL / 8, 4 * ALL / 8, 12 * ALL / 8, 2 * 1.5e9, SAVED + NOT_COMPILED),
        # The parameters are the masters, in fp32; gathered in bf16: embedding, head and two layers.
        ("fsdp2", 4 * ALL / 8, 4 * ALL / 8, 8 * ALL / 8, 2 * (2 * END + 2 * LAYER), SAVED),
    ],
)
def test_7b_on_eight_cards_by_hand(
    name, parameters, gradients, optimizer, exchanged, saved, config_of, tmp_path, capsys
):
    path = CONFIGS / f"{name}.yaml"
    if name == "zero3":
        path = tmp_path / "zero3.yaml"
        path.write_text(ZERO_3)
    load_recipe("openwebtext_continue").main(
        [
            *("--plan", "--plan_json", "--model", config_of("7B"), "--plan_config", str(path)),
            *"--plan_processes 8 --plan_memory_gib 80 --context_length 2048 --per_device_train_batch_size 1".split(),
        ]
    )
    printed = capsys.readouterr().out
    assert "7,615,616,512 parameters" in printed and ALL == 7_615_616_512  # as its model card says: 7.61B
    found = json.loads(printed.splitlines()[-1])
    by_hand = {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": 28 * 2048 * saved,
        "logits": 2 * 2048 * 152_064 + 4 * END + 4 * 2048 * 3584,  # bf16; fp32 gradients of head and input
        "framework": exchanged + 0.6 * 2**30,
    }
    for part, expected in by_hand.items():
        assert found[f"{part}_gib"] == pytest.approx(expected / 2**30, abs=0.001), part
    assert found["total_gib"] == pytest.approx(sum(by_hand.values()) / 2**30, abs=0.002) and found["fits"] is True


@pytest.fixture
def config_of(tmp_path):
    """Return a function that returns a folder with the config of a size, and nothing else."""

    def folder(size: str) -> str:
        AutoConfig.for_model(**SIZES[size]).save_pretrained(tmp_path / size)
        return str(tmp_path / size)

    return folder


IN_BACKWARD = "--step_in_backward --max_grad_norm 0 --tokens_per_step 2048"


@pytest.mark.parametrize(
    ("size", "flags", "limit", "expected"),
    [
        ("3B", "", 15.5, [IN_BACKWARD]),
        ("3B", "", 10, ["--method lora"]),
        ("3B", "", 5, ["--method qlora"]),
        ("3B", "--plan_processes 2", 15.5, ["--method lora"]),
        ("3B", "--gradient_checkpointing false --optim adamw_torch", 15.5, [
            "--recompute all", "--optimizer adamw --optim adamw_8bit", IN_BACKWARD]),
        ("7B", "--method lora", 15.5, ["--method qlora"]),
        ("7B", "--method qlora", 15.5, []),
    ],
)  # fmt: skip
def test_the_16_gb_recipe_is_told_its_own_switches(size, flags, limit, expected, config_of, capsys):
    """And not YAMLs that it refuses. Without --plan_config it is single_gpu.yaml, in bf16."""
    recipe = load_recipe("low_memory_16gb")
    model = ["--model", config_of(size)]
    recipe.main(["--plan", "--plan_json", *model, "--plan_memory_gib", str(limit), *flags.split()])
    lines = capsys.readouterr().out.splitlines()
    named = [line.strip() for line in lines if line.startswith("  --") or line.startswith("  accelerate_configs")]
    assert [name.startswith(start) for name, start in zip(named, expected, strict=True)] == [True] * len(expected)
    assert json.loads(lines[-1])["fits"] is (not expected)


@pytest.mark.parametrize(
    ("flags", "parameters", "gradients", "optimizer"),
    [
        ("", 2 * 1_543_714_304, 2 * 1_543_714_304, "8 bits"),
        ("--step_in_backward --tokens_per_step 2048 --max_grad_norm 0", 2 * 1_543_714_304, 0, "8 bits"),
        ("--weights fp32 --optim adamw_torch", 4 * 1_543_714_304, 4 * 1_543_714_304, 8 * 1_543_714_304),
        ("--method lora", 2 * 1_543_714_304 + 4 * 18_464_768, 4 * 18_464_768, 2 * (1 + 4 / 256) * 18_464_768),
        ("--method qlora", "4 bits", 4 * 18_464_768, 2 * (1 + 4 / 256) * 18_464_768),
    ],
)
def test_the_16_gb_recipes_default_by_hand(flags, parameters, gradients, optimizer, capsys):
    """Qwen2.5-1.5B: 1,543,714,304 parameters; adapters of rank 16: 28 x 16 x 41,216 (in and out of seven matrices)."""
    small = 28 * (1536 + 2 * 256 + 2 * 1536) + 1536  # biases and norms: below 4,096 numbers each, states in fp32
    if optimizer == "8 bits":
        optimizer = 2 * (1 + 4 / 256) * (1_543_714_304 - small) + 8 * small
    if parameters == "4 bits":
        ends = 151_936 * 1536
        packed = (1_543_714_304 - ends - small) * (4 + 8 / 64 + 32 / (64 * 256)) / 8
        parameters = 2 * (ends + small) + packed + 4 * 18_464_768 + 2 * 2 * 1536 * 8960  # the largest, unpacked twice
    load_recipe("low_memory_16gb").main(["--plan", "--plan_json", *flags.split()])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["parameters_gib"] == pytest.approx(parameters / 2**30, abs=0.001)
    assert found["gradients_gib"] == pytest.approx(gradients / 2**30, abs=0.001)
    assert found["optimizer_gib"] == pytest.approx(optimizer / 2**30, abs=0.001)


@pytest.mark.parametrize("flag", ["--plan_config x.yaml", "--plan_processes 8", "--plan_memory_gib 80"])
@pytest.mark.parametrize("recipe", ["wiki_zh_scratch", "low_memory_16gb", "openwebtext_continue", "explicit_loop"])
def test_what_only_a_plan_reads_is_refused_without_it(recipe, flag):
    with pytest.raises(InputError, match=f"{flag.split()[0]} .*: it would be ignored. With --plan"):
        load_recipe(recipe).main(flag.split())
    if recipe != "explicit_loop":  # which has no --plan
        with pytest.raises(InputError, match="the probe runs as it is launched"):
            load_recipe(recipe).main(["--plan", "--probe", *flag.split()])


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2.yaml", "configs/fsdp.yaml"])
def test_a_yaml_that_is_not_there_gets_the_name_that_may_be_meant(name, wiki):
    with pytest.raises(InputError, match=r"no such file. Did you mean accelerate_configs/fsdp2.yaml\?"):
        wiki.main(["--plan", "--plan_config", name])


def test_a_trained_tokenizer_has_the_vocabulary_that_was_asked_for(wiki, capsys):
    wiki.main(["--sample", "--plan"])
    assert "vocabulary of 4,096 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "value", "least"),
    [
        ("--plan_processes", "0", 1),
        ("--context_length", "0", 1),
        ("--per_device_train_batch_size", "-1", 0),
        ("--tokens_per_step", "0", 1),
        ("--target_parameters", "0", 1),
        ("--target_parameters", "0.2", 1),
        ("--plan_memory_gib", "-1.0", 0.01),
    ],
)
def test_numbers_below_the_least_are_refused(wiki, flag, value, least):
    with pytest.raises(InputError, match=f"{flag} {value}: must be at least {least}"):
        wiki.main(["--plan", "--sample", flag, value])


def test_a_step_of_less_than_a_row_for_each_card_is_refused(wiki):
    with pytest.raises(InputError, match="step 1,000 cannot be divided among 8 .* Use --tokens_per_step 4096.$"):
        wiki.main("--plan --sample --tokens_per_step 1000 --context_length 512 --plan_processes 8".split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--plan_processes 3", "65,536 cannot be divided among 3 processes .* Use --tokens_per_step 73728"),
        ("--context_length 500", "65,536 cannot be divided among 1 processes"),
        ("--plan_memory_gib 80 --tokens_per_step 66048", "into micro-batches of about 128 rows"),  # 129 = 3 x 43 rows
    ],
)
def test_a_step_that_a_launch_would_not_divide_is_refused(wiki, flags, message):
    with pytest.raises(InputError, match=message):
        wiki.main(["--plan", *flags.split()])


@pytest.mark.parametrize(
    ("flags", "processes"),
    [
        ("", 3),  # 65,536 tokens are 128 rows, 42.67 for each of three cards
        ("--per_device_train_batch_size 8", 3),
        ("--tokens_per_step 130048 --per_device_train_batch_size 16", 2),  # 127 rows each: a prime
    ],
)
def test_a_step_that_a_launch_could_not_divide_is_refused_with_its_words(wiki, monkeypatch, flags, processes):
    """As a launch of so many processes; the step that the refusal names is planned."""
    monkeypatch.setattr("common.train.preflight.check_launch", lambda *_: None)  # this process sees only itself
    refused = []
    for planned in (True, False):
        monkeypatch.setattr(wiki, "read_launch", lambda planned=planned: Launch() if planned else ranks(processes))
        more = ["--plan", "--plan_processes", str(processes)] if planned else []
        with pytest.raises(InputError, match="cannot be divided among . processes") as error:
            wiki.main([*more, *flags.split()])
        refused.append(str(error.value))
    assert refused[0] == refused[1]
    works = re.search("Use --tokens_per_step ([0-9]+)", refused[0])[1]
    wiki.main(["--plan", "--plan_processes", str(processes), *flags.split(), "--tokens_per_step", works])


def ranks(processes: int) -> Launch:
    """Return the launch of one of so many processes under ddp.yaml, which does not wait for the others."""
    return Launch(launched=True, strategy=DDP, processes=processes, local_processes=processes, use_cpu=True)


def test_accumulation_without_a_micro_batch_is_refused_as_at_the_launch(wiki):
    with pytest.raises(InputError, match="_accumulation_steps 4 with as many rows at once as fit: .*Leave it out"):
        wiki.main("--plan --gradient_accumulation_steps 4".split())


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        ("single_gpu", "--plan_processes 8", "distributed_type NO is for one process, and these are 8. .*ddp.yaml"),
        (
            "fsdp2_context_parallel",
            "--plan_processes 3",
            "1 x 1 x 2 processes .* x cp., and these are 3. Use --num_pro",
        ),
        ("tensor_parallel", "--plan_processes 3", "these are 3. Use --num_processes 2. In a plan, --plan_processes"),
        ("tensor_parallel", "--plan_processes 1", "these are 1. Use --num_processes 2. In a plan"),
        ("hsdp", "--plan_processes 3", "2 x 2 x 1 processes .*these are 3. Use --num_processes 4, or 2 with --paralle"),
        ("hsdp", "--plan_processes 5", "2 x 2 x 1 processes .*, and these are 5. Use --num_processes 4. In a plan"),
        ("hsdp", "--plan_processes 2", "dp_replicate_size 2 with dp_shard_size 1: .*Use accelerate_configs/ddp.yaml"),
        ("expert_parallel", "--plan_processes 3", "ep_size 2 does not divide the 3 processes of .*dp_shard_size"),
        ("expert_parallel", "--plan_processes 4", "Qwen3ForCausalLM has no experts. Use fsdp2.yaml"),
        ("fsdp2_context_parallel", "--packing isolated", "--packing isolated under context parallelism"),
        ("fsdp2_ulysses", "--context_length 511", "--context_length 511: 2 cards share each row as 2 equal pieces"),
        ("zero2", "--optimizer muon", "--optimizer muon: DeepSpeed's ZeRO cuts up the matrices"),
    ],
)
def test_a_plan_is_refused_as_its_launch_would_be(wiki, config, flags, message):
    with pytest.raises(InputError, match=message):
        wiki.main(["--plan", "--plan_config", str(CONFIGS / f"{config}.yaml"), *flags.split()])


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("num_processes: 6", "2 x 2 x 1 processes .*, and these are 6. Use .*dp_shard_size 3 before the recipe"),
        ("parallelism_config_tp_size: 0", "hsdp.yaml: parallelism_config_tp_size 0: must be at least 1"),
        ("parallelism_config_dp_replicate_size: 0", "dp_replicate_size 0: must be at least 1"),
        (
            "parallelism_config_sp_size: 3",
            "parallelism_config_sp_size 3 with dp_replicate_size above 1: not tried here",
        ),
    ],
)
def test_sizes_of_a_yaml_that_do_not_fit_each_other_are_refused_in_one_line(wiki, tmp_path, size, message):
    name = size.split(":")[0]
    lines = [line for line in (CONFIGS / "hsdp.yaml").read_text().splitlines() if not line.strip().startswith(name)]
    inside = lines.index("parallelism_config:") + 1 if name.startswith("parallelism") else len(lines)
    lines.insert(inside, f"  {size}" if inside < len(lines) else size)
    (tmp_path / "hsdp.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match=message) as error:
        wiki.main(["--plan", "--plan_config", str(tmp_path / "hsdp.yaml")])
    assert "\n" not in str(error.value)


def test_a_plan_for_other_cards_than_the_yamls_says_which_flag_its_launch_needs(wiki, capsys):
    """hsdp.yaml is for 2 x 2 cards."""
    config = ["--plan", "--plan_config", str(CONFIGS / "hsdp.yaml"), "--plan_processes"]
    wiki.main([*config, "8"])
    needed = "note: planned with dp_shard_size 4, as 8 cards are 2 x 4 x 1. The YAML says 2: launch with --parallelism"
    assert needed in capsys.readouterr().out
    wiki.main([*config, "4"])
    assert "note: planned with dp_shard_size" not in capsys.readouterr().out


def test_a_model_whose_heads_ulysses_cannot_divide_is_refused_before_anything_is_loaded(wiki, tmp_path):
    """14 heads and 2 key-value heads, among 4."""
    (tmp_path / "four.yaml").write_text(
        (CONFIGS / "fsdp2_ulysses.yaml").read_text().replace("sp_size: 2", "sp_size: 4")
    )
    cards = ["--plan_config", str(tmp_path / "four.yaml"), "--plan_processes", "4"]
    with pytest.raises(InputError, match="sp_size 4: Qwen2ForCausalLM has 14 heads and 2 key-value heads"):
        wiki.main(["--plan", "--model", "qwen2.5-0.5b", *cards])


def test_a_model_that_cards_cannot_divide_is_refused_as_its_run_would_be(wiki, tmp_path):
    """103M has 12 heads and 6 key-value heads."""
    (tmp_path / "four.yaml").write_text(
        (CONFIGS / "tensor_parallel.yaml").read_text().replace("tp_size: 2", "tp_size: 4")
    )
    divided = ["--plan", "--plan_config", str(CONFIGS / "tensor_parallel.yaml")]
    wiki.main(divided)
    with pytest.raises(InputError, match="no plan that divides GPT2LMHeadModel. Use fsdp2.yaml"):
        wiki.main([*divided, "--model", "gpt3-6.7b"])
    with pytest.raises(InputError, match="12 heads and 6 key-value heads of Qwen3ForCausalLM .* among 4 processes"):
        wiki.main(["--plan", "--plan_config", str(tmp_path / "four.yaml"), "--plan_processes", "4"])


@pytest.mark.parametrize(
    ("config", "limit", "launcher"),
    [
        ("fsdp2_tensor_parallel", 12.3, "--num_processes 8 --parallelism_config_dp_shard_size 4 recipes/"),
        ("fsdp2_ulysses", 12.9, "--num_processes 8 --parallelism_config_dp_shard_size 4 "),
        ("hsdp", 23, "--num_processes 8 --parallelism_config_dp_shard_size 4 recipes/"),
        ("expert_parallel", 1.17, "--num_processes 8 --parallelism_config_dp_shard_size 8 recipes/"),
    ],
)
def test_the_command_divides_the_cards_as_planned_and_is_not_refused(wiki, capsys, config, limit, launcher):
    """The YAMLs are for fewer cards. With tensor or expert parallelism, a launch refuses to compile."""
    cards = ["--plan_config", str(CONFIGS / f"{config}.yaml"), "--plan_processes", "8", "--plan_memory_gib", str(limit)]
    wiki.main(["--plan", *cards, "--model", "qwen3-moe-a60m" if config == "expert_parallel" else "qwen2.5-7b"])
    command = capsys.readouterr().out.splitlines()[-1]
    assert launcher in command and command.count("--recompute") == 1


@pytest.mark.parametrize(("config", "a_parameter"), [("fsdp2_offload", 16), ("zero3_offload", 18), ("zero3", None)])
def test_the_plan_says_what_main_memory_offloading_takes(wiki, capsys, monkeypatch, config, a_parameter):
    """By hand: the bytes a parameter that the YAMLs name, however many cards share them."""
    monkeypatch.chdir(ROOT)
    wiki.main(["--plan", "--plan_json", "--plan_config", str(CONFIGS / f"{config}.yaml"), "--plan_processes", "4"])
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    if a_parameter is None:
        assert "main memory" not in printed and "main_memory_gib" not in found
    else:
        assert found["main_memory_gib"] == pytest.approx(a_parameter * COUNT / 2**30, abs=0.001)
        assert "of all cards together, for what is offloaded" in printed


def test_rows_left_open_are_those_that_fit_the_planned_card(wiki, capsys):
    """benchmarks/README.md has 17.9 GiB for 128 rows and 10.7 for 64, beside what CUDA graphs keep."""
    for memory, rows in (("40", 128), ("24", 64)):
        wiki.main(["--plan", "--plan_config", str(CONFIGS / "single_gpu.yaml"), "--plan_memory_gib", memory])
        assert f" {rows} rows of 512 tokens at once" in capsys.readouterr().out


def test_a_plan_knows_what_is_recomputed(wiki, capsys):
    """Under a YAML that switches recompute on, and under one that does not."""
    needs = {}
    for config in ("single_gpu", "fsdp2_recompute"):
        for choice in ("", "--recompute keep_products", "--recompute 2", "--recompute all"):
            yaml = str(CONFIGS / f"{config}.yaml")
            wiki.main(["--plan", "--plan_json", "--plan_config", yaml, *choice.split()])
            printed = capsys.readouterr().out
            needs[config, choice] = json.loads(printed.splitlines()[-1])["activations_gib"]
            kind = choice.removeprefix("--recompute ").removesuffix("all")
            expected = f"recompute {kind}".strip() if choice or config == "fsdp2_recompute" else "compiled"
            assert f", {expected}\n" in printed
    for config in ("single_gpu", "fsdp2_recompute"):
        some = [needs[config, f"--recompute {choice}"] for choice in ("keep_products", "2", "all")]
        assert some == sorted(some, reverse=True) and len(set(some)) == 3
    assert needs["single_gpu", ""] > needs["single_gpu", "--recompute keep_products"]
    assert needs["fsdp2_recompute", ""] == needs["fsdp2_recompute", "--recompute all"]


def test_no_advice_where_nothing_helps():
    assert advice(model_of("7B"), Setting(1, 4096), 4) == []


@pytest.mark.parametrize(
    ("config", "strategy"), [("cpu", "single"), ("ddp", "ddp"), ("zero2", "zero2"), ("fsdp2", "fsdp2")]
)
def test_every_yaml_is_understood(config, strategy):
    launch = launch_of_yaml(str(CONFIGS / f"{config}.yaml"))
    assert launch.strategy == strategy
    assert launch.compiled == (config != "cpu")
    assert choose_optimizer("auto", launch, TrainingArguments()) == ("adamw" if config == "zero2" else "muon")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2"),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "true"}
         | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
        ({}, "ddp"),
    ],
)  # fmt: skip
def test_the_strategy_of_a_run_on_two_cards(environment, expected, monkeypatch):
    """As at run time, for --probe and for the advice when memory runs out."""
    monkeypatch.setattr("common.distributed.launch.take_over_compile", lambda: None)  # no launcher is above a test
    for name, value in (environment | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    launch = replace(read_launch(), optimizer="adamw")
    for name in (*environment, "WORLD_SIZE"):  # TrainingArguments would look for the other process
        monkeypatch.delenv(name)
    setting = setting_of_run(model_of("0.5B"), launch, TrainingArguments(use_cpu=True), 2048)
    assert (setting.strategy, setting.processes, setting.optimizer) == (expected, 2, "adamw")


@pytest.mark.parametrize("content", [None, "just text", "a: [", "distributed_type: TPU"])
def test_a_yaml_that_is_none_is_one_clear_error(tmp_path, content):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match="--plan_config .*config.yaml: "):
        launch_of_yaml(str(path))


def test_the_probe_trains_three_steps_and_keeps_nothing(wiki, cache_dir, tmp_path, capsys):
    flags = small_run(cache_dir, tmp_path / "out", "--plan", "--probe", "--plan_json", "--max_steps", "100")
    wiki.main(flags)
    printed = capsys.readouterr().out
    *_, sentence, figures = printed.splitlines()
    found = json.loads(figures)
    passes = f"{found['passes']:.3g} passes over the rows"
    assert f"takes {duration_in_words(found['hours'] * 3600)} for {passes} on this CPU" in sentence
    assert f"{found['memory_peak_gib']:.2f} GiB of main memory at the peak" in sentence
    assert "step 3/100" in printed and "step 4/100" not in printed
    assert found["hours"] == pytest.approx(100 * 256 / found["tokens_per_second"] / 3600, rel=0.05, abs=1e-4)
    assert 0 < found["passes"] < 1 and found["memory_peak_gib"] > 0
    assert f"memory: {found['total_gib']:.2f} GiB a process planned" in printed, "one number, in all places"
    assert not list((tmp_path / "out").glob("*"))


def test_a_probe_with_a_ladder_forecasts_the_end_of_the_run(wiki, cache_dir, tmp_path, capsys):
    ladder = str(ROOT / "benchmarks" / "results" / "ladder_h200_2026-11-30.json")
    flags = ["--plan", "--probe", "--plan_json", "--max_steps", "100", "--ladder", ladder]
    wiki.main(small_run(cache_dir, tmp_path / "out", *flags))
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    law = LossLaw.read(ladder)
    assert found["forecast"]["extrapolated"] and "the law is extrapolated" in printed
    assert found["forecast"]["bits_per_byte"] > found["forecast"]["twice_the_passes"] > law.irreducible


def test_a_ladder_that_would_be_ignored_is_refused(wiki, tmp_path):
    with pytest.raises(InputError, match="--ladder fit.json: it would be ignored"):
        wiki.main(["--sample", "--ladder", "fit.json", "--output_dir", str(tmp_path)])


def test_a_step_is_timed_with_the_fetching_of_its_batch():
    timer, control = StepTimer(stop_after=1), TrainerControl()
    timer.on_train_begin()
    time.sleep(0.2)  # the batch
    timer.on_step_end(None, None, control)
    assert timer.seconds[0] >= 0.2 and control.should_training_stop


def test_a_probe_that_is_stopped_keeps_nothing_either(wiki, cache_dir, tmp_path, monkeypatch):
    """A signal asks for a checkpoint, whatever the save strategy is."""

    def signalled(*_, **__) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StepTimer, "on_step_begin", signalled)
    with pytest.raises(SystemExit) as stopped:
        wiki.main(small_run(cache_dir, tmp_path / "out", "--plan", "--probe", "--max_steps", "100"))
    assert stopped.value.code == 143
    assert not list((tmp_path / "out").glob("*"))


def test_running_out_of_memory_ends_in_advice(wiki, cache_dir, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(Trainer, "training_step", full)
    with pytest.raises(InputError) as error:
        wiki.main(small_run(cache_dir, tmp_path))
    assert str(error.value).startswith("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.\nPlanned: ")
    assert "4 rows of 64 tokens" in str(error.value)


def test_a_probe_on_a_card_says_whether_it_fits_and_what_the_plan_said(monkeypatch):
    """An hour and 40 minutes on 16 GiB: 9.75 at the peak and 0.6 outside leave 5.65."""
    monkeypatch.setattr("common.train.probe.card_bytes", lambda device: 16 * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Some Card")
    found = {"memory_peak_gib": 9.75, "total_gib": 10.5, "tokens_per_second": 1234.5, "hours": 1.667, "passes": 2.0}
    sentence = probe_in_words(found, torch.device("cuda"))
    assert "9.75 GiB at the peak, and some 0.6 outside of torch (--plan: 10.50 in all)" in sentence
    assert "fits 16 GiB with 5.65 to spare" in sentence
    assert "takes an hour and 40 minutes for 2 passes over the rows on Some Card" in sentence
    monkeypatch.setattr("common.train.probe.card_bytes", lambda device: 10 * 2**30)
    assert "0.35 GiB more than the card's 10 GiB" in probe_in_words(found, torch.device("cuda"))


@pytest.mark.parametrize(
    "flags", ["--tokens_per_step 768 --per_device_train_batch_size 5", "--gradient_accumulation_steps 1"]
)
def test_the_plan_of_a_launch_is_what_the_launch_says_itself(wiki, cache_dir, tmp_path, capsys, monkeypatch, flags):
    """Six rows a step, at most 5 at once: 3, twice. One micro-batch a step, by a flag that wins."""
    monkeypatch.setattr("common.distributed.launch.launched", lambda: True)
    words = small_run(
        cache_dir, tmp_path / "out", *flags.split(), "--tokens_per_step", "768", "--vocabulary_size", "512"
    )
    words = [*words, *flags.split()]
    wiki.main([*words, "--plan", "--plan_json"])
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])["total_gib"]
    wiki.main([*words, "--plan", "--probe", "--plan_json"])
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["total_gib"] == planned
    assert f"memory: {planned:.2f} GiB a process planned" in printed


def test_without_a_launch_the_plan_is_for_the_yaml_of_such_a_card(wiki, capsys, monkeypatch):
    """ddp.yaml for several cards; fp16.yaml where the card here has no bf16, as a T4."""
    for flags, name in (([], "single_gpu"), (["--plan_processes", "4"], "ddp")):
        wiki.main(["--sample", "--plan", *flags])
        assert re.search(rf"planned for .*{name}.yaml: .* mixed precision bf16", capsys.readouterr().out)
    shared, launch, t4 = SharedArguments(plan=True), read_launch(), SimpleNamespace(device=torch.device("cuda"))
    for capability, name in (((7, 5), "fp16.yaml"), ((8, 0), "single_gpu.yaml")):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, found=capability: found)
        assert yaml_to_plan(shared, launch, t4).endswith(name)
