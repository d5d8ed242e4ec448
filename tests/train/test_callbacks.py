"""What a run shows while it goes on: a bar in a terminal, plain lines elsewhere."""

import math
import os
import subprocess
import sys

import pytest
from conftest import ROOT, small_run

from common.train.callbacks import bar_text

LOGS = {"loss": 3.14159, "tokens_per_second_per_device": 451_000.0, "memory_peak_gib": 11.04, "mfu": 0.355}


def test_what_stands_behind_the_bar():
    assert bar_text(LOGS, 1.9114) == "loss 3.142, 1.911 bits/byte, 451,000 tokens/s/device, 36% MFU, 11.0 GiB"
    without = {name: value for name, value in LOGS.items() if name != "mfu"}
    assert bar_text(without, math.nan) == "loss 3.142, 451,000 tokens/s/device, 11.0 GiB"


def shown(cache_dir, tmp_path, columns: int | None) -> str:
    """Return what a run prints; ``columns``: of its terminal, None for a pipe."""
    flags = [flag for flag in small_run(cache_dir, tmp_path) if flag not in ("--disable_tqdm", "true")]
    command = [sys.executable, str(ROOT / "recipes" / "wiki_zh_scratch.py"), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if columns is None:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(command, stdout=follower, stderr=follower, stdin=follower, env=environment)
    os.close(follower)
    output = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # Linux says so at the end
            break
        if not chunk:
            break
        output += chunk
    assert process.wait() == 0, output.decode(errors="replace")
    return output.decode(errors="replace")


def test_a_pipe_gets_plain_lines_and_no_bars_of_training(cache_dir, tmp_path):
    text = shown(cache_dir, tmp_path, None)
    assert text.count("\nstep ") == 6 and "held out   step 3" in text
    assert "it/s" not in text and "Writing model shards" not in text and "gemm_4bit" not in text


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_a_terminal_gets_one_bar_with_the_figures(cache_dir, tmp_path):
    text = shown(cache_dir, tmp_path, 160)
    assert "]the first step took" not in text, "messages stand above the bar"
    assert "6/6" in text and "bits/byte" in text and "tokens/s/device" in text
    assert "\nstep " not in text and "Writing model shards" not in text and "held out   step 3" in text
