"""Work on many items, in order, by threads or by worker processes.

Threads share one lock of Python. Tokenizing holds it for a third to 44% of the time, so threads keep two to three cores
busy. Where there are more cores and enough items, processes work instead. They are made by fork, as torch's DataLoader
and ``datasets.map(num_proc)`` make theirs: a worker starts in milliseconds, and has the encoder without copying it.
"""

import ctypes
import gc
import os
import signal
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import chain, islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

from common.console import InputError, say

LEAST_PROCESSES = 4  # fewer workers are threads
MANY_ITEMS = 8  # fewer are done by threads before processes would have paid off
PARALLELISM = "TOKENIZERS_PARALLELISM"  # the environment variable of the library tokenizers
PR_SET_PDEATHSIG = 1  # of prctl(2)


def in_order(work: Callable, items: Iterable, workers: int) -> Iterator:
    """Yield ``work(item)`` in the order of the items, computed by ``workers`` threads, or processes on Linux.

    At most twice as many items as workers wait, so that reading does not run ahead and fill the memory. Close the
    iterator to end the workers.

    Args:
        work: in a process, it must not use the GPU, print, or change anything outside; its result must be picklable.

    Raises:
        InputError: ``work`` raised it; or a worker process was killed.
        RuntimeError: ``work`` raised another exception in a process; the message holds its traceback.
    """
    items = iter(items)
    first = []
    if workers >= LEAST_PROCESSES and sys.platform == "linux":
        first = list(islice(items, MANY_ITEMS))
    engine = _in_processes if len(first) == MANY_ITEMS else _in_threads
    items = chain(first, items)
    del first  # not kept in memory until the end
    yield from engine(work, items, workers)


def _in_threads(work: Callable, items: Iterable, workers: int) -> Iterator:
    """Do as ``in_order`` by threads. The encoders release Python's lock for most of their work."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _in_processes(work: Callable, items: Iterable, workers: int) -> Iterator:
    """Do as ``in_order`` by processes."""
    with closing(_Workers(work, workers)) as pool:
        given = taken = 0
        for item in items:
            pool.give(given, item)
            given += 1
            while pool.is_done(taken) or given - taken > 2 * workers:
                yield pool.take(taken)
                taken += 1
        while taken < given:
            yield pool.take(taken)
            taken += 1


class _Workers:
    """Processes that compute ``work(item)``: as many as find something to do, at most ``most``.

    This process has no thread for them. It looks for results when it gives an item away, and when it needs a result.
    A worker has one item at a time, so neither side waits for the other to read from a full pipe.
    """

    def __init__(self, work: Callable, most: int):
        self._work, self._most = work, most
        self._pids: dict[Connection, int] = {}  # of all workers, which are named by our end of their pipe
        self._idle: list[Connection] = []
        self._busy: dict[Connection, int] = {}  # a worker -> the number of its item
        self._done: dict[int, tuple] = {}  # the number of an item -> its result and exception, one of which is None

    def give(self, number: int, item: object) -> None:
        """Give item ``number`` to a worker; wait for one if all are busy."""
        self._receive(timeout=0)
        if not self._idle and len(self._pids) < self._most:
            self._start_worker()
        while not self._idle:
            self._receive(timeout=None)
        worker = self._idle.pop()
        self._busy[worker] = number
        try:
            worker.send(item)
        except OSError:
            raise self._why_it_ended(worker) from None

    def is_done(self, number: int) -> bool:
        return number in self._done

    def take(self, number: int) -> object:
        """Return what item ``number`` has become, or raise what it raised; wait for it."""
        while number not in self._done:
            self._receive(timeout=None)
        result, error = self._done.pop(number)
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """End all workers, whatever they do."""
        for pid in self._pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for worker in list(self._pids):
            worker.close()
            self._exit_code(worker)

    def _receive(self, timeout: float | None) -> None:
        """Take in the results that are there; without a ``timeout``, wait for at least one."""
        for worker in wait(list(self._busy), timeout):
            try:
                self._done[self._busy[worker]] = worker.recv()
            except (EOFError, OSError):
                raise self._why_it_ended(worker) from None
            del self._busy[worker]
            self._idle.append(worker)

    def _start_worker(self) -> None:
        ours, theirs = Pipe()
        with theirs:
            try:
                self._pids[ours] = _fork(self._work, theirs)
            except OSError as error:  # a limit on processes (ulimit -u, a container's), or no memory
                ours.close()
                if not self._pids:
                    raise InputError(
                        f"the system starts no process for tokenizing ({error}). Raise its limit on processes or free "
                        "memory; or tokenize without them, on three cores: taskset -c 0-2 COMMAND"
                    ) from None
                self._most = len(self._pids)
                say(f"note: {self._most} processes tokenize, because the system starts no more of them ({error})")
                return
        self._idle.append(ours)

    def _why_it_ended(self, worker: Connection) -> InputError:
        """Return the error for a worker that has closed its pipe, which it does only by ending."""
        workers = len(self._pids)
        code = self._exit_code(worker)
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            reason = " (the system does this when memory runs out)" if code == -signal.SIGKILL else ""
            how = f"was killed by {signal.Signals(-code).name}{reason}"
        return InputError(
            f"one of {workers} processes that tokenize {how}. Launch again; if memory runs out, give it more, or let "
            f"fewer cores tokenize, with less memory: taskset -c 0-{max(1, workers // 2) - 1} COMMAND"
        )

    def _exit_code(self, worker: Connection) -> int | None:
        """Wait for the end of a worker; return its exit code, -9 after SIGKILL, or None if nobody knows it."""
        pid = self._pids.pop(worker)
        with suppress(ChildProcessError):  # SIGCHLD is ignored here
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fork(work: Callable, connection: Connection) -> int:
    """Start a worker that serves ``connection``; return its process id."""
    # The worker keeps all signals blocked: Ctrl-C, SIGTERM and the like are for its parent, who then ends it.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    parallelism = os.environ.get(PARALLELISM)
    try:
        # In the worker, tokenizers must not wait for threads that only the parent has. It warns of that if unset.
        os.environ[PARALLELISM] = "false"
        with warnings.catch_warnings():
            # Python 3.12 warns that this process has threads. A worker calls nothing that waits for one of them.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            _serve(work, connection)
    finally:
        if parallelism is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = parallelism
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return pid


def _serve(work: Callable, connection: Connection) -> None:
    """Be a worker: compute what comes through ``connection`` until the other end is closed; never return."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # end with the parent, also in the middle of work
        gc.freeze()  # do not destroy what is the parent's, such as tensors on a GPU
        _close_files(connection.fileno())
        while True:
            connection.send(_outcome(work, connection.recv()))
    finally:  # also if the parent is gone; without the parent's exit handlers
        os._exit(1)


def _close_files(kept: int) -> None:
    """Close all open files but the terminal's and ``kept``.

    The parent's locks would stay locked as long as a worker has their files open. Other workers would not see the end
    of the parent.
    """
    listed = "/proc/self/fd"
    numbers = map(int, os.listdir(listed)) if os.path.isdir(listed) else range(os.sysconf("SC_OPEN_MAX"))
    for number in numbers:
        if number > 2 and number != kept:
            with suppress(OSError):  # that of the listing itself is closed already
                os.close(number)


def _outcome(work: Callable, item: object) -> tuple:
    """Return the result of ``work(item)`` and None, or None and the exception."""
    try:
        return work(item), None
    except InputError as error:
        return None, error
    except BaseException:  # not every exception can be pickled
        return None, RuntimeError(f"in a process that tokenizes:\n{traceback.format_exc()}")
