"""Loader workers: kept from signals that are for their parent, and from a shared memory that is too small for them."""

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

SHARED_MEMORY = "/dev/shm"
NUMBERS = 4 * 8  # bytes of a token in a batch: ids, targets twice, positions, as int64


def leave_signals_to_the_parent(then: Callable[[int], None] | None, worker: int) -> None:
    """Start a loader's worker: a signal to all processes of a terminal or a job must not end it before its parent.

    SIGTERM counts when it comes from the parent, which closes its workers so. (Who sent it can be known on Linux;
    elsewhere it ends the worker.) ``then``: what else is to be done.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_obey_the_parent, daemon=True).start()
    if then is not None:
        then(worker)


def _obey_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def keep_apart(prepared):
    """Return a loader that Accelerate has prepared, apart from the training: in its random state, and in signals.

    A loader draws a number whenever it starts, as it does in a run that is continued, but not in one left alone at the
    same step: from the training's random state, all dropout behind it would differ.
    """
    loader = prepared.base_dataloader  # settings of the wrapper around it have no effect
    loader.generator = torch.Generator()
    loader.worker_init_fn = partial(leave_signals_to_the_parent, loader.worker_init_fn)
    return prepared


def check_shared_memory(training: TrainingArguments, context_length: int) -> None:
    """Raise InputError if the batches that workers hold ready do not fit /dev/shm, through which Linux passes them.

    A worker that finds it full dies of a bus error in the middle of the run.
    """
    workers = training.dataloader_num_workers
    if workers == 0 or not Path(SHARED_MEMORY).is_dir():
        return
    rows = max(training.per_device_train_batch_size, training.per_device_eval_batch_size)
    ready = workers * ((training.dataloader_prefetch_factor or 2) + 1)
    needed = ready * rows * context_length * NUMBERS
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise InputError(
            f"--dataloader_num_workers {workers}: the workers hold {ready} batches ready in {SHARED_MEMORY}, "
            f"{needed / 2**20:.1f} MiB, and {free / 2**20:.1f} are free there (docker gives 64 unless told). Start the "
            "container with --shm-size 2g or --ipc host, or use --dataloader_num_workers 0: rows are read from a "
            "memory map, which hardly takes time."
        )
