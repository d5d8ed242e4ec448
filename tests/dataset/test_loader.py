"""Loader workers: signals, shared memory, and that a long run leaves no file, thread or process open."""

import json
import multiprocessing
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
from conftest import ROOT
from tiny import ENVIRONMENT, load_recipe, tiny_run

from common.console import InputError
from common.dataset import loader
from common.dataset.loader import check_shared_memory

MIB = 2**20


def training(workers, prefetch=None):
    return SimpleNamespace(
        dataloader_num_workers=workers, dataloader_prefetch_factor=prefetch, per_device_train_batch_size=8,
        per_device_eval_batch_size=64,
    )  # fmt: skip


def test_a_shared_memory_that_is_too_small_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "SHARED_MEMORY", str(tmp_path))
    needed = 4 * 3 * 64 * 512 * 32 + 2**20  # workers x batches x rows x tokens x bytes, and one MiB
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    check_shared_memory(training(4), 512)
    check_shared_memory(training(0), 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(InputError, match=r"12 batches ready.*13.0 MiB.*--shm-size"):
        check_shared_memory(training(4), 512)


def slow_worker(ready):
    loader.leave_signals_to_the_parent(lambda worker: ready.put(worker), 3)
    time.sleep(60)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="only Linux says who sent a signal")
def test_a_worker_obeys_its_parent_only():
    """A signal from another process, such as the launcher, is ignored. Its parent ends it at once, while it works."""
    processes = multiprocessing.get_context("fork")
    ready = processes.Queue()
    worker = processes.Process(target=slow_worker, args=(ready,))
    worker.start()
    assert ready.get(timeout=10) == 3
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert not worker.is_alive()


@pytest.mark.heavy
def test_in_a_container_with_little_shared_memory(cache_dir, tmp_path):
    """In a mount namespace of its own, where /dev/shm has 64 KiB."""
    flags = tiny_run(cache_dir, tmp_path / "run", "--dataloader_num_workers", "2", "--max_steps", "2")
    command = [sys.executable, str(ROOT / "recipes" / "wiki_zh_scratch.py"), *flags]
    mounted = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$0" "$@"']
    done = subprocess.run([*mounted, *command], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and "0.1 MiB are free there" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def in_use() -> dict[str, float]:
    process = psutil.Process()
    return {
        "files": process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
        "threads": threading.active_count(),
        "children": len(process.children(recursive=True)),
        "bytes": process.memory_info().rss,
    }


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", [0, 2])
def test_two_thousand_steps_leave_nothing_open(cache_dir, tmp_path, workers):
    """Measured at each of 20 saves, and after the end."""
    recipe, seen = load_recipe("wiki_zh_scratch"), []

    class Measured(recipe.PretrainingTrainer):
        def _save_checkpoint(self, *args, **kwargs):
            super()._save_checkpoint(*args, **kwargs)
            self.run.end_save()  # a thread writes it
            seen.append(in_use())

    recipe.PretrainingTrainer = Measured
    flags = ["--max_steps", "2000", "--eval_steps", "100", "--save_steps", "100", "--logging_steps", "100"]
    recipe.main(tiny_run(cache_dir, tmp_path / "warm", "--max_steps", "2"))
    seen.clear()
    before = in_use()
    recipe.main(tiny_run(cache_dir, tmp_path / "run", *flags, "--dataloader_num_workers", str(workers)))
    after = in_use()
    assert len(seen) == 20
    for name in ("files", "threads", "children"):
        assert seen[-1][name] <= seen[2][name], name
        assert after[name] <= before[name] + (name == "files"), name  # the lock of the folder stays open
    early, late = (statistics.median(point["bytes"] for point in part) for part in (seen[4:8], seen[16:]))
    print("resources:", json.dumps({"workers": workers, "first": seen[2], "last": seen[-1], "after": after}))
    print(f"resources: {(late - early) / MIB:.2f} MiB more after 1,200 steps")
    assert late - early < 8 * MIB
