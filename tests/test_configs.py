"""Every YAML: read by accelerate's launcher as it stands, and with a header that helps."""

import argparse

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def test_there_are_configs():
    assert {"cpu", "single_gpu", "ddp", "zero2", "fsdp2"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_launcher_knows_every_key(path):
    """Top level: accelerate raises on unknown keys. Sections: it drops them, so they are compared with its flags."""
    load_config_from_file(str(path))
    flags = {action.dest for action in launch_command_parser()._actions if not isinstance(action, argparse._HelpAction)}
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["num_processes"] == 1, "the launcher fails without it; --num_processes overrides it"
    for section in ("deepspeed_config", "fsdp_config"):
        assert set(content.get(section, {})) <= flags


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_has_its_launch_line(path):
    header = path.read_text(encoding="utf-8").split("compute_environment")[0]
    assert f"accelerate launch --config_file accelerate_configs/{path.name}" in header
    assert "emory" in header or "fit" in header
    assert "# Tested: " in header
