"""Functions are given to torch.compile when they are called, and a run that compiles nothing never imports inductor."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, small_run

from common import late_compile

PROGRAM = """
import runpy, sys
runpy.run_path("recipes/wiki_zh_scratch.py", run_name="__main__")
print("IMPORTED", [name for name in ("torch._inductor.compile_fx", "deepspeed", "swanlab") if name in sys.modules])
"""


@pytest.fixture
def given(monkeypatch) -> list:
    """What was given to torch.compile, with its settings."""
    given = []

    def compile_now(function, **settings):
        given.append((function.__name__, settings))
        return lambda number: function(number) + 0.5

    monkeypatch.setattr(late_compile, "compile_now", compile_now)
    return given


def test_a_function_is_compiled_at_its_first_call_and_once(given):
    @late_compile.compiled_late(dynamic=False)
    def double(number):
        return 2 * number

    plain = late_compile.compiled_late(abs)
    assert given == [] and double.__name__ == "double"
    assert (double(3), double(4), plain(-3)) == (6.5, 8.5, 3.5)
    assert given == [("double", {"dynamic": False}), ("abs", {})]


def test_torchs_own_is_back_after_the_imports_and_after_one_that_fails():
    own = torch.compile
    with pytest.raises(ImportError), late_compile.compiling_late():
        assert torch.compile is late_compile.compiled_late
        raise ImportError
    assert torch.compile is own


@pytest.mark.heavy
def test_a_run_on_a_cpu_imports_neither_inductor_nor_deepspeed(cache_dir, tmp_path):
    flags = small_run(cache_dir, tmp_path, "--max_steps", "1")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, *flags]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert "IMPORTED []" in done.stdout, done.stdout + done.stderr
