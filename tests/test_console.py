"""Libraries are quiet about what is not the user's to fix, and about nothing else."""

import ast
import logging
import os
import signal
import subprocess
import sys
import unicodedata
import warnings

import pytest
from conftest import ROOT

from common.console import MESSAGES, InputError, LeftOut, printable, quiet_libraries, say


def test_importing_a_recipe_says_nothing():
    """As a process of its own: what peft, bitsandbytes and DeepSpeed say is said once, while they load."""
    code = "import runpy; runpy.run_path('recipes/wiki_zh_scratch.py', run_name='imported')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("WANDB_MODE", None)  # transformers speaks of it; a test of trackers may have set it
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0 and done.stdout == "" and done.stderr == ""


@pytest.mark.parametrize("name", MESSAGES)
def test_only_the_named_messages_are_left_out(name):
    heard = []
    logger = logging.getLogger(name)
    handler = logging.Handler()
    handler.emit = heard.append
    logger.addHandler(handler)
    quiet_libraries()
    quiet_libraries()
    try:
        assert sum(isinstance(known, LeftOut) for known in logger.filters) == 1
        logger.warning(MESSAGES[name][0] + " and so on")
        assert not heard
        logger.warning("something else")
        logger.error("broken: %s", 1)
        assert [record.getMessage() for record in heard] == ["something else", "broken: 1"]
    finally:
        logger.removeHandler(handler)


def test_only_the_named_warnings_are_left_out():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quiet_libraries()
        # As in torch/_inductor/compile_fx.py and torch/distributed/distributed_c10d.py of torch 2.13.
        warnings.warn(
            "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. Consider",
            stacklevel=1,
        )
        warnings.warn("barrier(): using the device under current context. You can specify", stacklevel=1)
        # As in PreTrainedModel.gradient_checkpointing_enable of transformers 5.24.
        warnings.warn(
            "`gradient_checkpointing_enable` is deprecated and will be removed in v6. Use", FutureWarning, stacklevel=1
        )
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["something else"]


def test_everything_is_heard_on_request(monkeypatch):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    known = list(logger.filters)
    logger.filters.clear()
    monkeypatch.setenv("PRETRAINING_VERBOSE", "1")
    quiet_libraries()
    assert not logger.filters
    logger.filters.extend(known)


def test_printable():
    """Truth: Python's ``isprintable`` and Unicode's category of control characters."""
    for character in map(chr, range(sys.maxunicode + 1)):
        shown = printable(character)
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") and character not in "\n\t":
            assert shown.isascii() and shown.isprintable() and ast.literal_eval(f"'{shown}'") == character
        elif shown != character:  # marks that turn the direction of writing, "Trojan Source"
            assert unicodedata.bidirectional(character) in "LRE RLE PDF LRO RLO LRI RLI FSI PDI".split()
    text = "今天\n\tnaïve 👩\u200d👧 \u3000é"
    assert printable(text) == text
    assert printable("\x1b]0;title\x07 \x1b[2J\x9b1m\r") == r"\x1b]0;title\x07 \x1b[2J\x9b1m\r"


def test_messages_and_errors_are_printable(capsys):
    say("note: a\x1b[31m.txt, \udcff")
    assert capsys.readouterr().out == "note: a\\x1b[31m.txt, \\udcff\n"
    assert str(InputError("no field '\x1b[2J'")) == r"no field '\x1b[2J'"


def said_at_the_end(code: str, **more: str) -> subprocess.CompletedProcess:
    names = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "RANK")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": str(ROOT)} | more
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("launcher", [{}, {"ACCELERATE_MIXED_PRECISION": "no"}, {"TORCHELASTIC_RUN_ID": "7"}])
def test_an_error_says_that_the_launchers_traceback_says_no_more(launcher):
    """The message is what str() gives, without it: other messages quote it."""
    code = "from common.console import InputError\nraise InputError('no such file')"
    done = said_at_the_end(code, **launcher)
    follows = "(The launcher's own traceback follows. It says no more than that this process ended.)"
    assert done.stderr.splitlines() == ["no such file", *([follows] if launcher else [])] and done.returncode == 1
    assert str(InputError("no such file")) == "no such file"


def test_ctrl_c_outside_training_is_one_line():
    done = said_at_the_end("import common\nraise KeyboardInterrupt")
    sentence = "stopped by Ctrl-C: what was finished is saved, and the same command continues"
    assert done.stderr == f"{sentence}\n" and done.returncode == -signal.SIGINT
    done = said_at_the_end("import common\nraise KeyboardInterrupt", ACCELERATE_MIXED_PRECISION="no")
    assert done.stderr == f"{sentence} (a traceback here is the launcher's own)\n"
    assert "Traceback" in said_at_the_end("import common\nraise ValueError").stderr


WORK = """
import common
import sys, time
from common.console import say
from common.progress import Progress
from tqdm.auto import tqdm
say("begins")
bar = tqdm(total=300)
with Progress("working", 300, " steps") as progress:
    for step in range(300):
        say(f"step {step}")
        print("to stderr", file=sys.stderr, flush=True)
        bar.update(1)
        progress.update(1)
        time.sleep(0.005)
bar.close()
open(sys.argv[1], "w").write("finished")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("unbuffered", [[], ["-u"]], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("end", ["terminal", "pipe"])
def test_work_goes_on_when_nobody_can_read_what_it_prints(end, unbuffered, tmp_path):
    """The terminal is closed, or ``| tee`` ends, while the work prints in every way that a run does."""
    import pty

    leader, follower = pty.openpty() if end == "terminal" else os.pipe()
    command = [sys.executable, *unbuffered, "-c", WORK, str(tmp_path / "done")]
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env=os.environ | {"PYTHONPATH": str(ROOT)})
    os.close(follower)
    seen = b""
    while b"step 3" not in seen:
        seen += os.read(leader, 65536)
    os.close(leader)
    assert process.wait(60) == 0
    assert (tmp_path / "done").read_text() == "finished"


def test_another_error_of_writing_is_raised(tmp_path):
    """A full disk: /dev/full of Linux."""
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    command = f"{sys.executable} -c 'import common; print(1, flush=True)' > /dev/full"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode != 0 and "No space left" in done.stderr
