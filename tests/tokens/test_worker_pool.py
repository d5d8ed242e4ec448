"""Worker processes that tokenize: the results of threads, and nothing left of them whatever happens."""

import ctypes
import errno
import gc
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, texts_of
from filelock import FileLock
from test_encoding import word_level, wrapped

from common.console import InputError
from common.corpus.documents import CorpusCounts
from common.tokens import batches, worker_pool
from common.tokens.megatron import COLUMNS, PAIR
from common.tokens.train_tokenizer import train_tokenizer
from common.tokens.worker_pool import LEAST_PROCESSES, MANY_ITEMS, in_order
from common.tokens.writer import write_token_store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads tokenize")
TEXTS = [text for language in ("zh", "en") for text in texts_of(ROOT / "data" / f"sample_{language}.jsonl")[:60]]


def workers_now() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.fixture(autouse=True)
def no_worker_is_left():
    before = workers_now()
    yield
    assert workers_now() == before


def test_results_come_in_order_from_several_processes():
    def work(number: int) -> tuple[int, int]:
        time.sleep(0.02 * (number % 3))  # later items are done before earlier ones
        return number, os.getpid()

    results = list(in_order(work, range(40), 4))
    assert [number for number, _ in results] == list(range(40))
    used = {pid for _, pid in results}
    assert 1 < len(used) <= 4 and os.getpid() not in used


@pytest.mark.parametrize(("items", "workers"), [(MANY_ITEMS - 1, 9), (40, LEAST_PROCESSES - 1)])
def test_little_work_and_few_cores_are_for_threads(items, workers):
    assert set(in_order(lambda _: os.getpid(), range(items), workers)) == {os.getpid()}


def test_as_many_processes_as_find_something_to_do():
    def slowly():
        for number in range(20):
            yield number
            time.sleep(0.05)  # each item is done before the next one is there

    assert len(set(in_order(lambda _: os.getpid(), slowly(), 16))) <= MANY_ITEMS


def test_a_bounded_number_waits():
    """The first item takes long. The others are done meanwhile, but not all of them are read."""
    drawn = []
    work = lambda number: time.sleep(0.5 * (number == 0))  # noqa: E731
    results = in_order(work, (drawn.append(number) or number for number in range(200)), 4)
    next(results)
    assert len(drawn) <= 2 * 4 + 1
    assert len(list(results)) == 199


def python_tokenizer():
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


TOKENIZERS = {
    "tiktoken": lambda: train_tokenizer(TEXTS, 600),
    "tokenizers": lambda: wrapped(word_level()),
    "transformers (Python)": python_tokenizer,
}


@pytest.mark.parametrize("engine", TOKENIZERS)
def test_a_store_is_the_same_byte_for_byte(engine, tmp_path, monkeypatch, capfd):
    """Of every engine; with duplicates dropped and with a limit, which ends the work in the middle."""
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 2_000)
    tokenizer = TOKENIZERS[engine]()
    started = []
    fork = os.fork
    monkeypatch.setattr(os, "fork", lambda: started.append(1) or fork())
    for name, options in {"dropped": dict(drop_duplicates=True), "limited": dict(max_tokens=9_000)}.items():
        for workers in (1, 4):
            counts = CorpusCounts()
            documents = [*TEXTS, *TEXTS[:20]]
            prefix = tmp_path / f"{name}{workers}"
            options["cache_dir"] = tmp_path
            write_token_store(documents, counts, tokenizer, prefix, {}, 0, workers, **options)
            assert bool(started) == (workers == 4)
        started.clear()
        for suffix in (*PAIR, *COLUMNS, ".json"):
            one, four = ((tmp_path / f"{name}{workers}{suffix}").read_bytes() for workers in (1, 4))
            assert one == four and one
    said = capfd.readouterr()
    assert said.out.count(f"with {engine}") == 4
    assert not said.err  # the library tokenizers warns of a fork


def test_an_error_of_the_user_is_the_same_line():
    def work(number: int) -> int:
        if number == 13:
            raise InputError("--flag 13: must be below 13.\x1b")
        return number

    results = in_order(work, range(40), 4)
    assert list(islice(results, 13)) == list(range(13))
    with pytest.raises(InputError) as error:
        next(results)
    assert str(error.value) == str(error.value.code) == "--flag 13: must be below 13.\\x1b"


def test_an_error_of_ours_has_its_traceback():
    def work(number: int) -> float:
        return 1 / (5 - number)

    with pytest.raises(RuntimeError, match="(?s)in a process that tokenizes.*1 / .*ZeroDivisionError"):
        list(in_order(work, range(40), 4))


def test_a_killed_process_is_one_clear_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 2_000)

    def documents():
        for number, text in enumerate(TEXTS):
            if number == 80:
                for worker in workers_now():
                    worker.kill()
            yield text

    prefix = tmp_path / "store" / "tokens"
    error = "one of 4 processes that tokenize was killed by SIGKILL .*memory runs out.*: taskset -c 0-1 COMMAND$"
    with pytest.raises(InputError, match=error):
        write_token_store(documents(), CorpusCounts(), train_tokenizer(TEXTS, 300), prefix, {}, workers=4)
    assert [path.name for path in prefix.parent.iterdir()] == ["tokens.lock"]


def test_a_process_that_crashes_is_the_same_error():
    def work(number: int) -> int:
        return number if number < 20 else ctypes.string_at(0)

    with pytest.raises(InputError, match="processes that tokenize was killed by SIGSEGV"):
        list(in_order(work, range(40), 4))


def test_a_worker_has_no_file_of_its_parent_open(tmp_path):
    """Otherwise a lock of the parent would stay locked, and a worker would not see that its parent has ended."""

    def work(_: int) -> list[bool]:
        found = []
        for number in range(3, 1024):
            with suppress(OSError):
                found.append(stat.S_ISSOCK(os.fstat(number).st_mode))
        return found

    with open(tmp_path / "file", "w"):
        assert all(found == [True] for found in in_order(work, range(40), 4))


def test_the_warning_of_python_about_threads_reaches_nobody(monkeypatch):
    """As Python 3.12 warns; and ours is the only process that goes on here."""
    fork = os.fork

    def warning_fork() -> int:
        pid = fork()
        if pid:
            warnings.warn("This process is multi-threaded", DeprecationWarning, stacklevel=2)
        return pid

    monkeypatch.setattr(os, "fork", warning_fork)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(in_order(str, range(20), 4)) == [str(number) for number in range(20)]
    stop.set()
    thread.join()


def test_a_limit_on_processes_leaves_fewer_of_them(monkeypatch, capsys):
    fork = os.fork
    most = 2
    started = []

    def limited() -> int:
        if len(started) == most:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(1)
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    assert len(set(in_order(lambda _: time.sleep(0.01) or os.getpid(), range(40), 4))) == 2
    assert "note: 2 processes tokenize, because the system starts no more of them" in capsys.readouterr().out
    most = 0
    started.clear()
    with pytest.raises(InputError, match="starts no process for tokenizing.*taskset -c 0-2 COMMAND"):
        list(in_order(str, range(40), 4))


def test_signals_and_the_variable_of_tokenizers_are_as_before(monkeypatch):
    for value in (None, "true"):
        if value is not None:
            monkeypatch.setenv(worker_pool.PARALLELISM, value)
        found = os.environ.get(worker_pool.PARALLELISM)
        assert set(in_order(lambda _: os.environ[worker_pool.PARALLELISM], range(9), 4)) == {"false"}
        assert os.environ.get(worker_pool.PARALLELISM) == found
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_parents_gpu_is_left_alone():
    """CUDA cannot be used after a fork, not even to free a tensor that is garbage in the worker."""
    tensor = torch.ones(1000, device="cuda")
    garbage = [tensor]
    garbage.append(garbage)
    del garbage, tensor
    assert list(in_order(lambda _: gc.collect() >= 0, range(20), 4)) == [True] * 20
    assert torch.ones(5, device="cuda").sum().item() == 5


LAUNCH = """
import atexit, os, signal, sys, time
from pathlib import Path
from filelock import FileLock
from common.tokens.worker_pool import in_order

def work(number):
    Path({folder!r}, str(os.getpid())).touch()
    time.sleep(600)

atexit.register(lambda: print("the parent's exit handler"))
lock = FileLock({folder!r} + "/lock")
with lock:
    for _ in in_order(work, range(40), 4):
        pass
"""


@pytest.fixture
def launched(tmp_path):
    """A process with four workers that work for ten minutes; and the process ids of these."""
    (tmp_path / "pids").mkdir()
    folder = str(tmp_path / "pids")
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH.format(folder=folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while len(pids := [path.name for path in Path(folder).iterdir() if path.name != "lock"]) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    yield process, [psutil.Process(int(pid)) for pid in pids]
    process.kill()
    process.communicate()


def all_end(workers: list[psutil.Process], seconds: float = 10) -> bool:
    """Whether all of ``workers`` end; some containers keep what is left of processes whose parent has ended."""
    until = time.monotonic() + seconds
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_a_killed_parent_leaves_no_process_and_no_lock(launched, tmp_path):
    process, workers = launched
    process.kill()
    assert all_end(workers)
    with FileLock(tmp_path / "pids" / "lock", timeout=5):
        pass
    assert process.communicate() == ("", "")


@pytest.mark.parametrize("to_all", [True, False])
def test_ctrl_c_ends_all_with_one_line(launched, to_all):
    """A terminal sends it to all processes; some launchers to the parent only."""
    process, workers = launched
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert err.startswith("stopped by Ctrl-C: ") and err.count("\n") == 1
    assert out == "the parent's exit handler\n" and all_end(workers)


@pytest.mark.parametrize("to_all", [True, False])
def test_sigterm_ends_all_in_silence(launched, to_all):
    process, workers = launched
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == -signal.SIGTERM and all_end(workers)


def test_signals_to_a_worker_alone_are_its_parents(launched):
    process, workers = launched
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        workers[0].send_signal(getattr(signal, name))
    time.sleep(0.2)
    assert all(worker.is_running() for worker in workers) and process.poll() is None
