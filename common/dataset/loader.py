"""Worker processes of the data loader: signals, random state, shared memory."""

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread

import torch
from transformers import TrainingArguments

from common.console import InputError

SHARED_MEMORY = "/dev/shm"  # Linux passes batches from workers to the training process through it
BATCH_BYTES_PER_TOKEN = 4 * 8  # input_ids, shift_labels, labels and position_ids, each int64
SPARE_BYTES = 2**20  # for the workers' semaphores, and because each tensor takes whole pages
PREFETCH_FACTOR = 2  # torch's default: batches that each worker prepares ahead


def leave_signals_to_the_parent(then: Callable[[int], None] | None, worker: int) -> None:
    """Make a worker process ignore signals that are meant for its parent. Called first in each worker.

    A terminal or a job scheduler signals all processes. A worker must not end before its parent, which saves a
    checkpoint first. SIGINT and SIGUSR1 are ignored. SIGTERM ends the worker only if its parent sent it, because torch
    closes its workers that way. Only Linux says who sent a signal: elsewhere every SIGTERM ends the worker.

    Args:
        then: called with ``worker``, the worker's number, at the end.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_when_the_parent_says_so, daemon=True).start()
    if then is not None:
        then(worker)


def _end_when_the_parent_says_so() -> None:
    """Wait for a SIGTERM of the parent, then end this process."""
    sender = None
    while sender != os.getppid():
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
    os._exit(0)


def keep_apart(prepared):
    """Give a loader that Accelerate has prepared its own random state, and workers that ignore signals; return it.

    A loader draws a random number each time it starts. A resumed run starts it in the middle, an uninterrupted run does
    not. If the number came from the training's random state, all dropout after it would differ between the two.
    """
    loader = prepared.base_dataloader  # the same settings on the wrapper around it have no effect
    loader.generator = torch.Generator()
    loader.worker_init_fn = partial(leave_signals_to_the_parent, loader.worker_init_fn)
    return prepared


def check_shared_memory(training: TrainingArguments, context_length: int) -> None:
    """Raise InputError if the batches that workers prepare ahead do not fit in the shared memory.

    Otherwise a worker that finds it full would die of a bus error in the middle of the run.
    """
    workers = training.dataloader_num_workers
    if workers == 0 or not Path(SHARED_MEMORY).is_dir():
        return
    rows = max(training.per_device_train_batch_size, training.per_device_eval_batch_size)
    ahead = PREFETCH_FACTOR if training.dataloader_prefetch_factor is None else training.dataloader_prefetch_factor
    ready = workers * (ahead + 1)  # batches; one more is being made
    needed = ready * rows * context_length * BATCH_BYTES_PER_TOKEN + SPARE_BYTES
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise InputError(
            f"--dataloader_num_workers {workers}: the workers keep {ready} batches ready in {SHARED_MEMORY}, which "
            f"take {needed / 2**20:.1f} MiB, but only {free / 2**20:.1f} MiB are free there (docker's default is 64). "
            "Start the container with --shm-size 2g or --ipc host, or use --dataloader_num_workers 0: reading rows "
            "from a memory map takes hardly any time."
        )
