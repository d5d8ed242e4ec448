"""Every YAML: read by accelerate's launcher as it stands, key by key, and with a header that helps."""

import json
import os
import re
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from conftest import ROOT
from transformers import TrainingArguments

from common.console import InputError
from common.distributed.launch import read_launch
from common.distributed.workarounds import COMPILE_SETTINGS, RECOMPUTE_TAKEN_OVER, take_over_recompute
from common.train.setting import launch_of_yaml

FOLDER = ROOT / "accelerate_configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
JSONS = sorted(FOLDER.glob("*.json"))


@pytest.fixture(autouse=True)
def from_the_repository(monkeypatch):
    """The launch lines are meant for its folder: deepspeed_config_file is a path from there."""
    monkeypatch.chdir(ROOT)


def read(path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def header(path) -> str:
    return path.read_text(encoding="utf-8").split("compute_environment")[0]


def launched(config: dict, folder, *flags: str):
    """Return what accelerate's launcher makes of a configuration: its arguments, after everything was read."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    parsed = launch_command_parser().parse_args(["--config_file", str(path), *flags, "recipe.py"])
    return _validate_launch_command(parsed)[0]


def test_there_are_configs():
    one = "cpu single_gpu fp16 fp8"
    several = "cpu_2proc cpu_fsdp2 ddp multi_node fsdp2_context_parallel fsdp2_ulysses zero1 zero2 zero3"
    divided = "hsdp tensor_parallel fsdp2_tensor_parallel expert_parallel"
    saving = "fsdp2 fsdp2_recompute fsdp2_offload zero2_recompute zero3_offload"
    assert {path.stem for path in CONFIGS} == {*f"{one} {several} {divided} {saving}".split()}
    assert {path.stem for path in JSONS} == {"zero2_recompute", "zero3_offload"}


def changed(value):
    """Return another value of the same kind."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else f"{value}x"


# What the launcher does not hand on, and who reads it instead: workarounds.expert_parallel_size.
READ_BY_US = {"parallelism_config_ep_size"}
# What the launcher reads by ways of its own.
STRATEGIES = {"DEEPSPEED": "use_deepspeed", "FSDP": "use_fsdp", "MULTI_GPU": "multi_gpu"}
SECTIONS = ("deepspeed_config", "fsdp_config", "fp8_config", "dynamo_config", "parallelism_config")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_launcher_reads_every_key(path, tmp_path):
    """Change each value: what the launcher hands to the processes must change with it. It drops what it does not know
    in a section, and rdzv_backend and same_network of the top level, without a word."""
    config = read(path)
    for name, value in config.items():
        if name in SECTIONS:
            for key, inner in value.items():
                other = launched(config | {name: value | {key: changed(inner)}}, tmp_path)
                assert getattr(other, key) == changed(inner), f"{name}.{key} is dropped"
        elif name == "distributed_type":
            flags = {flag: getattr(launched(config, tmp_path), flag) for flag in STRATEGIES.values()}
            assert flags == {flag: flag == STRATEGIES.get(value) for flag in flags}
        elif name == "mixed_precision":
            assert launched(config, tmp_path).mixed_precision == value
        elif name != "compute_environment":
            other = launched(config | {name: changed(value)}, tmp_path)
            assert getattr(other, name) == changed(value), f"{name} is dropped"
    several = {"cpu_2proc": 2, "cpu_fsdp2": 2, "fsdp2_context_parallel": 2, "multi_node": 16}
    several |= {"fsdp2_ulysses": 2, "hsdp": 4, "tensor_parallel": 2, "fsdp2_tensor_parallel": 4, "expert_parallel": 2}
    assert config["num_processes"] == several.get(path.stem, 1)


def test_dropped_keys_would_be_found(tmp_path):
    config = read(FOLDER / "ddp.yaml")
    assert launched(config | {"rdzv_backend": "c10d"}, tmp_path).rdzv_backend == "static"
    config["dynamo_config"]["dynamo_misspelt"] = True
    assert getattr(launched(config, tmp_path), "dynamo_misspelt", None) is True  # kept, but no flag of that name:
    known = {action.dest for action in launch_command_parser()._actions}
    assert "dynamo_misspelt" not in known
    for path in CONFIGS:
        for section in SECTIONS:
            assert set(read(path).get(section, {})) - READ_BY_US <= known
            assert not known & READ_BY_US, "the launcher knows it now: expert_parallel_size can go"


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_deepspeed_knows_every_key_of_a_json(path):
    """pydantic models forbid unknown keys in the ZeRO section; the others are compared with DeepSpeed's names."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.activation_checkpointing import config as recompute
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    content = json.loads(path.read_text(encoding="utf-8"))
    DeepSpeedZeroConfig(**content["zero_optimization"])
    named = {value for module in (constants, recompute) for value in vars(module).values() if isinstance(value, str)}
    assert {*content, *content["activation_checkpointing"]} - {"bf16", "zero_optimization"} <= named
    own = read(path.with_suffix(".yaml"))["deepspeed_config"]
    assert own["deepspeed_config_file"] == f"accelerate_configs/{path.name}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_says_when_and_how(path):
    text = header(path)
    assert f"accelerate launch --config_file accelerate_configs/{path.name}" in text
    assert "emory" in text and re.search("Measured|Tested on", text)
    assert all(line.startswith("#") for line in text.splitlines()) and len(text.splitlines()) <= 6
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120
    pages = re.findall(r"(?:benchmarks|docs)/[\w./-]+\w", text)
    assert any(page.startswith("benchmarks/") for page in pages) and all((ROOT / page).exists() for page in pages)


def environment_by(monkeypatch, path) -> dict[str, str]:
    """Return what ``accelerate launch`` adds to the environment of the processes that it starts for a YAML."""
    made = []
    for launcher, prepare in (
        ("simple_launcher", lambda arguments: prepare_simple_launcher_cmd_env(arguments)[1]),
        ("multi_gpu_launcher", prepare_multi_gpu_env),
        ("deepspeed_launcher", lambda arguments: prepare_deepspeed_cmd_env(arguments)[1]),
    ):
        monkeypatch.setattr(
            f"accelerate.commands.launch.{launcher}", lambda arguments, how=prepare: made.append(how(arguments))
        )
    monkeypatch.setattr("accelerate.utils.launch.is_fp8_available", lambda: True)  # torchao need not be here
    launch_command(launch_command_parser().parse_args(["--config_file", str(path), "recipe.py"]))
    [environment] = made
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}


STRATEGY_OF_OTHERS = {"cpu": "single", "single_gpu": "single", "fp16": "single", "fp8": "single"}
STRATEGY_OF_OTHERS |= {"cpu_2proc": "ddp", "ddp": "ddp", "multi_node": "ddp", "cpu_fsdp2": "fsdp2", "hsdp": "fsdp2"}
STRATEGY_OF_OTHERS |= {"tensor_parallel": "fsdp2", "expert_parallel": "fsdp2"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_launch_is_what_its_yaml_says(path, monkeypatch):
    """Read from the environment that accelerate's launcher makes; the planner reads the YAML itself, and agrees."""
    strategy = STRATEGY_OF_OTHERS.get(path.stem, path.stem.split("_")[0])
    processes = 1 if strategy == "single" else 8
    monkeypatch.setattr("common.distributed.workarounds.launcher_flags", lambda: ["--config_file", str(path), "x.py"])
    for name in COMPILE_SETTINGS:
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name.upper()}", "")  # for monkeypatch to take back
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name.upper()}")
    for name, value in (environment_by(monkeypatch, path) | {"WORLD_SIZE": str(processes)}).items():
        monkeypatch.setenv(name, value)
    launch = read_launch()
    assert launch.launched and launch.strategy == strategy
    planned = launch_of_yaml(str(path), processes)
    # Of one machine, although the YAML may be for several; and which process this is.
    others = dict(launched=True, local_processes=1, use_cpu=launch.use_cpu, recompute_settings=())
    assert replace(planned, **others) == replace(launch, recompute_settings=())
    assert launch.replicas == (2 if path.stem == "hsdp" else 1)
    recomputes = path.stem.endswith("recompute") or path.stem == "zero3_offload"
    assert (launch.recompute is not None) == recomputes
    assert launch.offloads == path.stem.endswith("offload")
    assert launch.row_pieces == (2 if path.stem in ("fsdp2_context_parallel", "fsdp2_ulysses") else 1)
    assert launch.tensor_parallel == (2 if "tensor" in path.stem else 1)
    assert launch.expert_parallel == (2 if path.stem == "expert_parallel" else 1)
    assert (launch.building_device is not None) == (
        path.stem == "hsdp" or path.stem.endswith(("tensor_parallel", "expert_parallel"))
    )
    assert launch.row_readers == processes // launch.row_pieces // launch.tensor_parallel


def parsed(**flags) -> TrainingArguments:
    return TrainingArguments(output_dir="unused", **read_launch().defaults(), **flags)


def test_deepspeeds_json_owns_recompute_and_precision(monkeypatch):
    path = str(FOLDER / "zero2_recompute.json")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what the launcher says without mixed_precision in a YAML
    launch = read_launch()
    assert launch.defaults()["bf16"] and not launch.defaults()["fp16"]
    training = parsed()
    take_over_recompute(launch, training)
    assert training.gradient_checkpointing and getattr(training, "activation_checkpointing", True)
    with pytest.raises(InputError, match=f"--gradient_checkpointing and activation_checkpointing in {path} both"):
        take_over_recompute(launch, parsed(gradient_checkpointing=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"activation_checkpointing": {"cpu_checkpointing": true}}', "cpu_checkpointing would be ignored"),
        ("{", "not JSON"),
        (None, "A relative path starts at the folder of the launch"),
    ],
)
def test_a_json_that_cannot_be_followed_is_refused(monkeypatch, tmp_path, content, message):
    if content is not None:
        (tmp_path / "z.json").write_text(content)
    training = parsed()
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "z.json"))
    with pytest.raises(InputError, match=message):
        take_over_recompute(read_launch(), training)


def test_fsdps_key_owns_recompute(monkeypatch):
    assert read_launch().recompute is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    monkeypatch.setenv(RECOMPUTE_TAKEN_OVER, "")  # for monkeypatch to take back
    take_over_recompute(read_launch(), training := SimpleNamespace(gradient_checkpointing=False))
    assert training.gradient_checkpointing
    assert not FullyShardedDataParallelPlugin(fsdp_version=2).activation_checkpointing, "accelerate would do it, too"
    again = read_launch()  # as in a second run of a notebook
    take_over_recompute(again, training := SimpleNamespace(gradient_checkpointing=False))
    assert training.gradient_checkpointing and "fsdp_config" in again.recompute
    with pytest.raises(InputError, match="fsdp_activation_checkpointing in the YAML's fsdp_config both"):
        take_over_recompute(again, SimpleNamespace(gradient_checkpointing=True))
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "true")
    with pytest.raises(InputError, match="checkpointing_offload: true in the YAML's fsdp_config: .*to false"):
        take_over_recompute(again, SimpleNamespace(gradient_checkpointing=False))


STAND_INS = {
    "scontrol": 'printf "node7\\nnode8\\n"',
    # One after the other what Slurm starts on the two machines.
    "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
    "accelerate": 'printf "%s|" "$@"; echo',
}


@pytest.mark.skipif(os.name == "nt", reason="Slurm runs on Linux")
def test_the_slurm_script_starts_one_launcher_a_machine(tmp_path):
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "123456"}
    environment |= {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    command = ["bash", str(FOLDER / "slurm.sh"), "accelerate_configs/fsdp2.yaml", "recipes/wiki_zh_scratch.py"]
    command += ["--data", "a b.jsonl"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split("|")[:-1] for line in done.stdout.splitlines()]
    for rank, words in enumerate(lines):
        arguments = launch_command_parser().parse_args(words[1:])
        assert (arguments.num_machines, arguments.num_processes, arguments.machine_rank) == (2, 8, rank)
        assert (arguments.main_process_ip, arguments.main_process_port) == ("node7", 23456)
        assert arguments.config_file == "accelerate_configs/fsdp2.yaml"
        assert arguments.training_script_args == ["--data", "a b.jsonl"]
    assert len(lines) == 2
    assert subprocess.run(command[:3], env=environment, capture_output=True).returncode == 2
