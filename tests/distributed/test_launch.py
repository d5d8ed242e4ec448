"""Batch arithmetic and what the preflight refuses."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.dataclasses import FP8BackendType
from torch._inductor.runtime.cache_dir_utils import cache_dir as torch_cache_dir
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import common.distributed.hardware as hardware
import common.distributed.launch as launch
from common.console import InputError
from common.distributed.hardware import check_bf16, check_compiler, check_cuda_device, check_fp8, compiled_code_folder
from common.distributed.launch import Launch, check_launch, lost_process, precision_of, read_launch
from common.distributed.strategy import DDP, FSDP2, SINGLE, ZERO2, ZERO3
from common.distributed.workarounds import compile_settings, launcher_flags, take_over_compile
from common.train.batch import set_batch
from common.train.combinations import choose_optimizer

ROOT = Path(__file__).resolve().parent.parent.parent


def batch_of(per_device=16, accumulation=0):
    sizes = dict(per_device_train_batch_size=per_device, per_device_eval_batch_size=per_device)
    return SimpleNamespace(**sizes, gradient_accumulation_steps=accumulation)


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 16), (2, 8), (16, 1)])
def test_accumulation_is_derived_from_the_tokens_a_step(processes, accumulation):
    training = batch_of()
    assert set_batch(Launch(processes=processes), training, 131_072, 512) == 256
    assert training.gradient_accumulation_steps == accumulation


def test_an_explicit_accumulation_wins_and_is_said(capsys):
    training = batch_of(per_device=1, accumulation=3)
    assert set_batch(Launch(), training, 131_072, 512) == 3
    assert "1,536 tokens a step" in capsys.readouterr().out


@pytest.mark.parametrize(("processes", "micro_batch", "accumulation"), [(8, 16, 2), (32, 8, 1), (3, 16, 5)])
def test_a_process_with_fewer_rows_than_a_micro_batch_takes_them_at_once(processes, micro_batch, accumulation):
    training = batch_of(per_device=16 if processes != 3 else 17)
    tokens_per_step = 8 * 16 * 2 * 512 if processes != 3 else 3 * 80 * 512
    assert set_batch(Launch(processes=processes), training, tokens_per_step, 512) % processes == 0
    assert training.per_device_train_batch_size == micro_batch
    assert training.gradient_accumulation_steps == accumulation


@pytest.mark.parametrize("tokens_per_step", [131_073, 17 * 512, 0, -512])
def test_a_batch_that_is_not_whole_is_refused_with_one_that_is(tokens_per_step):
    with pytest.raises(InputError, match=r"cannot be divided among 1 processes into micro-batches of about") as error:
        set_batch(Launch(), batch_of(), tokens_per_step, 512)
    suggested = int(str(error.value).split("Use --tokens_per_step ")[1].split(",")[0].rstrip("."))
    set_batch(Launch(), batch_of(), suggested, 512)


FUSED, OFFLOADED = "adamw_torch_fused", Launch(strategy=FSDP2, offload_parameters=True)


@pytest.mark.parametrize(
    ("wanted", "launched", "optim", "chosen", "said"),
    [
        ("auto", Launch(), FUSED, "muon", ""),
        ("muon", Launch(strategy=FSDP2), OptimizerNames.ADAMW_TORCH, "muon", ""),
        ("adamw", Launch(), FUSED, "adamw", ""),
        ("auto", Launch(strategy=ZERO2), FUSED, "adamw", "not Muon: DeepSpeed's ZeRO cuts up the matrices"),
        ("auto", OFFLOADED, FUSED, "adamw", "not Muon: its matrix products would run on the CPU"),
        ("auto", Launch(), "adamw_8bit", "adamw", "not Muon: --optim adamw_8bit names another one"),
    ],
)
def test_the_optimizer_is_muon_where_it_can_be(wanted, launched, optim, chosen, said, capsys):
    assert choose_optimizer(wanted, launched, SimpleNamespace(optim=optim)) == chosen
    printed = capsys.readouterr().out
    assert said in printed and bool(said) == bool(printed)


@pytest.mark.parametrize(
    ("launched", "optim"), [(Launch(strategy=ZERO2), FUSED), (OFFLOADED, FUSED), (Launch(), "paged_adamw_8bit")]
)
def test_muon_where_it_cannot_be_is_refused(launched, optim):
    with pytest.raises(InputError, match=r"--optimizer muon: .* Use --optimizer adamw"):
        choose_optimizer("muon", launched, SimpleNamespace(optim=optim))


@pytest.mark.parametrize(("device", "missing"), [("cpu", "C\\+\\+ compiler"), ("cuda", "Triton")])
def test_compiling_without_a_compiler_is_refused_with_the_flag_that_works(monkeypatch, device, missing):
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    check_compiler("no", torch.device(device))
    with pytest.raises(InputError, match=f"needs (a )?{missing}.*\n.*--dynamo_backend no"):
        check_compiler("INDUCTOR", torch.device(device))


def test_compiling_for_other_devices_needs_their_triton_and_is_a_prototype_on_apples(monkeypatch):
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install triton-ascend.*\n.*--dynamo_backend no"):
        check_compiler("inductor", SimpleNamespace(type="npu"))
    with pytest.raises(InputError, match="early prototype.*\n.*--dynamo_backend no"):
        check_compiler("inductor", torch.device("mps"))
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: "found")
    check_compiler("inductor", SimpleNamespace(type="npu"))
    check_compiler("inductor", torch.device("xpu"))


def test_compiled_code_is_kept_beside_the_tokens_unless_the_user_says_where(monkeypatch, tmp_path):
    """What is set is what torch asks for."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.chdir(tmp_path)
    assert compiled_code_folder("no", 1, "cache") is None and compiled_code_folder("aot_eager", 1, "cache") is None
    assert compiled_code_folder("inductor", 2, "cache") == "torch's own folder"
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert compiled_code_folder("INDUCTOR", 1, "cache") == str(tmp_path / "cache" / "compiled") == torch_cache_dir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert compiled_code_folder("inductor", 1, "cache") == "/elsewhere" == torch_cache_dir()


def test_bf16_that_an_accelerator_only_emulates_is_refused(monkeypatch):
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: "Intel(R) Iris(R) Xe")
    with pytest.raises(InputError, match="Iris.* has no bf16.*\n.*--mixed_precision fp16"):
        check_bf16(torch.device("xpu"), "bf16")
    check_bf16(torch.device("xpu"), "fp16")
    check_bf16(torch.device("mps"), "bf16")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_yaml_owns_the_precision(monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    defaults = read_launch().defaults()
    assert (defaults["bf16"], defaults["fp16"]) == (precision == "bf16", precision == "fp16")
    assert defaults["use_cpu"]  # there is no accelerator in the tests


def arguments(**changes):
    defaults = dict(world_size=1, n_gpu=0, use_cpu=True, bf16=False, fp16=False, device=torch.device("cpu"))
    defaults["mixed_precision"] = "no"
    defaults |= dict(gradient_checkpointing=False, deepspeed_plugin=None)
    return SimpleNamespace(**defaults | changes)


def test_processes_that_train_alone_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    launched = read_launch()
    assert (launched.processes, launched.strategy) == (2, DDP)
    with pytest.raises(InputError, match="2 independent models"):
        check_launch(launched, arguments())
    check_launch(launched, arguments(world_size=2))
    # An FSDP plugin on CPUs, without use_cpu in TrainingArguments: the same two trainings, and no other error.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="2 independent models"):
        check_launch(read_launch(), arguments(use_cpu=False))


def test_context_parallelism_on_cpus_is_refused_with_what_works_there():
    launch = Launch(processes=2, strategy=FSDP2, context_parallel=2)
    with pytest.raises(InputError, match="cp_size 2 on CPUs: .* On CPUs, accelerate_configs/fsdp2_ulysses.yaml"):
        check_launch(launch, arguments(world_size=2))


def test_data_parallel_is_refused():
    with pytest.raises(InputError, match="--num_processes 2"):
        check_launch(Launch(), arguments(n_gpu=2))


def test_a_flag_against_the_yaml_is_refused_naming_both(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(InputError, match="says mixed_precision no, the recipe's flags say bf16"):
        check_launch(read_launch(), arguments(bf16=True))


ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # torch's CUDA 13 wheels


def test_a_card_without_code_in_the_wheels_is_refused():
    with pytest.raises(InputError, match="(?s)capability 7.0.*whl/cu126"):
        check_cuda_device("Tesla V100", (7, 0), ARCHITECTURES, "fp16")
    for capability in [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0)]:
        check_cuda_device("a card", capability, ARCHITECTURES, "fp16")
    check_cuda_device("Tesla V100", (7, 0), ["sm_70", *ARCHITECTURES], "fp16")


def test_bf16_on_a_card_without_it_is_refused():
    with pytest.raises(InputError, match="Tesla T4.*has no bf16.*\n.*--mixed_precision fp16"):
        check_cuda_device("Tesla T4", (7, 5), ARCHITECTURES, "bf16")
    check_cuda_device("Tesla T4", (7, 5), ARCHITECTURES, "fp16")
    check_cuda_device("NVIDIA A100", (8, 0), ARCHITECTURES, "bf16")


def test_idle_devices_are_mentioned(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ARCHITECTURES)
    check_launch(Launch(), arguments(device=torch.device("cuda"), n_gpu=1, use_cpu=False))
    assert "--num_processes 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        "/x/bin/python /x/bin/accelerate launch",
        "/x/bin/python -m accelerate.commands.accelerate_cli launch",
        "/x/bin/python -m accelerate.commands.launch",
        "/x/bin/python /x/bin/accelerate-launch",
    ],
)
def test_the_launchers_flags_are_read_off_its_command_line(monkeypatch, command):
    class Parent:
        def __init__(self, words):
            self.cmdline = lambda: words

    flags = ["--config_file", "zero2.yaml", "recipe.py", "launch"]
    parents = [Parent(["/x/bin/python", "watch.py", "launch"]), Parent([*command.split(), *flags]), Parent(["init"])]
    monkeypatch.setattr("common.distributed.workarounds.psutil.Process.parents", lambda self: parents)
    assert launcher_flags() == flags
    monkeypatch.setattr("common.distributed.workarounds.psutil.Process.parents", lambda self: [parents[0], parents[2]])
    assert launcher_flags() is None


def test_deepspeed_runs_take_over_what_the_launcher_was_told_about_compiling(monkeypatch):
    """accelerate launch hands dynamo_config on to every kind of process but DeepSpeed's."""
    yaml = f"{ROOT}/accelerate_configs/zero2.yaml"
    told = compile_settings(["--config_file", yaml, "--num_processes", "8", "recipe.py", "--sample"])
    assert told["ACCELERATE_DYNAMO_BACKEND"] == "INDUCTOR"
    assert told["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] == "True"
    told = compile_settings(["--config_file", yaml, "--dynamo_backend", "no", "recipe.py", "--dynamo_backend", "x"])
    assert told["ACCELERATE_DYNAMO_BACKEND"] == "no"  # the recipe's own flags are its own
    uncompiled = f"{ROOT}/accelerate_configs/cpu.yaml"
    assert compile_settings(["--config_file", uncompiled, "r.py"])["ACCELERATE_DYNAMO_BACKEND"] in ("no", "NO")
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    monkeypatch.setattr("common.distributed.workarounds.launcher_flags", lambda: ["--config_file", yaml, "recipe.py"])
    take_over_compile()
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ  # not under DeepSpeed
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name in told:
        monkeypatch.setenv(name, "")  # to be taken back after the test
        monkeypatch.delenv(name)
    take_over_compile()
    assert os.environ["ACCELERATE_DYNAMO_BACKEND"] == "INDUCTOR"


# As the launcher says what fp8.yaml says.
FP8 = {"ACCELERATE_FP8_BACKEND": "AO", "ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER": "False"}


@pytest.mark.parametrize(
    ("strategy", "capability", "environment", "message"),
    [
        (SINGLE, (9, 0), FP8, None),
        (DDP, (9, 0), FP8, None),
        (SINGLE, (9, 0), FP8 | {"ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER": "0"}, None),  # as the launcher's flag
        (SINGLE, (9, 0), FP8 | {"ACCELERATE_FP8_BACKEND": "ao"}, None),  # likewise
        (SINGLE, (8, 6), FP8, "8.9 or more .*CUDA has 8.6. Use another YAML, or --mixed_precision bf16"),
        (FSDP2, (9, 0), FP8, None),
        (ZERO3, (9, 0), FP8, "fp8 under zero3: .*bf16 with this YAML"),
        (SINGLE, (9, 0), FP8 | {"ACCELERATE_FP8_BACKEND": "TE"}, "backend TE: .*Use fp8.yaml"),
        (SINGLE, (9, 0), {"ACCELERATE_FP8_BACKEND": "AO"}, "accelerate's default: .*never trained. Use fp8.yaml"),
    ],
)
def test_fp8_is_for_cards_that_have_it_and_settings_that_train(strategy, capability, environment, message, monkeypatch):
    for name in FP8:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    training = SimpleNamespace(device=torch.device("cuda"))
    if message is None:
        check_fp8(strategy, training)
        assert FP8BackendType(os.environ["ACCELERATE_FP8_BACKEND"]) == FP8BackendType.AO
        return
    with pytest.raises(InputError, match=message):
        check_fp8(strategy, training)


def test_the_yamls_fp8_reaches_accelerate_through_trainers_arguments(monkeypatch, tmp_path):
    """TrainingArguments have no flag for it: everything but the layers' products is bf16."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    monkeypatch.setattr(launch, "check_fp8", lambda strategy, training: None)
    launched = read_launch()
    training = TrainingArguments(output_dir=str(tmp_path), **launched.defaults())
    assert training.bf16 and training.mixed_precision == "bf16"
    check_launch(launched, training)
    assert precision_of(training) == "fp8"

    class Found(Exception):
        pass

    def accelerator(**arguments):
        raise Found(arguments["mixed_precision"])

    monkeypatch.setattr("transformers.trainer.Accelerator", accelerator)
    with pytest.raises(Found, match="fp8"):
        Trainer(torch.nn.Linear(2, 2), training)


# The environment that the launcher leaves -> strategy, offloading of states and parameters, recompute.
ENVIRONMENTS = [
    ({}, SINGLE, (False, False), None),
    ({"WORLD_SIZE": "4"}, DDP, (False, False), None),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, ZERO2, (False, False), None),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, FSDP2, (False, False), None),
    ({"ACCELERATE_USE_FSDP": "true"}, "fsdp1", (False, False), None),
    (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
        FSDP2,
        (True, True),
        None,
    ),
    (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
        FSDP2,
        (False, False),
        "fsdp_activation_checkpointing in the YAML's fsdp_config",
    ),
    (
        {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": f"{ROOT}/accelerate_configs/zero3_offload.json",
        },
        ZERO3,
        (True, True),
        f"activation_checkpointing in {ROOT}/accelerate_configs/zero3_offload.json",
    ),
    (
        {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": f"{ROOT}/accelerate_configs/zero2_recompute.json",
        },
        ZERO2,
        (False, False),
        f"activation_checkpointing in {ROOT}/accelerate_configs/zero2_recompute.json",
    ),
]


@pytest.mark.parametrize(("environment", "strategy", "offloaded", "recompute"), ENVIRONMENTS)
def test_what_the_launcher_decided_is_read(monkeypatch, environment, strategy, offloaded, recompute):
    monkeypatch.setattr(launch, "remove_dead_locks", lambda: None)
    monkeypatch.setattr(launch, "take_over_compile", lambda: None)
    for name in ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = read_launch()
    assert found.strategy == strategy
    assert (found.offload_optimizer, found.offload_parameters) == offloaded
    assert found.recompute == recompute


@pytest.mark.parametrize(
    ("strategy", "states", "gradients", "parameters", "stage"),
    [
        (SINGLE, False, False, False, 0),
        (DDP, False, False, False, 0),
        ("zero1", True, False, False, 1),
        (ZERO2, True, True, False, 2),
        (ZERO3, True, True, True, 3),
        (FSDP2, True, True, True, 0),
    ],
)
def test_what_a_strategy_shards(strategy, states, gradients, parameters, stage):
    """As https://arxiv.org/abs/1910.02054, figure 1, has it."""
    strategy = launch.Strategy(strategy)
    assert (strategy.shards_states, strategy.shards_gradients, strategy.shards_parameters) == (
        states,
        gradients,
        parameters,
    )
    assert strategy.zero_stage == stage and strategy.is_deepspeed == (stage > 0)


def test_another_process_that_is_gone_is_told_from_other_errors():
    """With gloo's and NCCL's own words; a single process has no other one to lose."""
    two = Launch(processes=2, process=1)
    for words in ("Connection closed by peer [127.0.0.1]:4242", "Watchdog caught collective operation timeout: x"):
        assert lost_process(RuntimeError(words), two).startswith("process 1: another process of this run is gone")
        assert lost_process(RuntimeError(words), Launch()) is None
    assert lost_process(RuntimeError("size mismatch"), two) is None
