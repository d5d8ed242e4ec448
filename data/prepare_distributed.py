"""Documents -> token stores, by many tasks on one or many machines: for corpora too large for one machine.

    python data/prepare_distributed.py --input corpus/ --tokenizer DIR --output tokens/corpus --tasks 4
    python data/prepare_distributed.py --input corpus/ --tokenizer DIR --output tokens/corpus --tasks 256 \
        --executor slurm --partition cpu --time 04:00:00 --cpus_per_task 4
    python data/prepare_distributed.py --input corpus/ --tokenizer DIR --output tokens/corpus --tasks 64 --executor ray

Every task writes one shard into the output folder. Train on all of them as one store with ``--data tokens/corpus``. The
tasks are run by datatrove (pip install 'datatrove>=0.10,<0.11'; the executor ray also needs ray). The folder must be on
a file system that all machines share. After an interruption, launch again: finished tasks are not repeated. At the end
the shards are checked against each other, and the last line of output is JSON, as in data/prepare.py.

Each task gets whole files, so that every file is read once and the order of documents is kept. If there are few files,
or one is very large, every task reads all files and takes every n-th document. This works for every format, but pays
off only up to some dozen tasks; for more, split the file first (split -n l/256). The files are read with common.corpus,
not with datatrove's readers, which skip empty and malformed documents without counting them.

One thing differs from data/prepare.py: exact copies stay in the shards. A recipe leaves them out and counts them.
"""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from common.command_line import OneLineErrors
from common.console import InputError, say
from common.corpus.sources import resolve_sources
from common.run.disk import check_path
from common.system import usable_cores
from common.tokens.shards import WORK_FOLDER, plan_shards, report_shards, write_shard

INSTALL = "pip install 'datatrove>=0.10,<0.11'"


def local_executor(arguments: argparse.Namespace, step: partial, logs: str):
    from datatrove.executor import LocalPipelineExecutor

    return LocalPipelineExecutor([step], arguments.tasks, arguments.workers, logs)


def run_locally(executor, workers: int) -> None:
    """Run the unfinished tasks of a LocalPipelineExecutor, ``workers`` at a time.

    Replaces: its run(), whose pool waits for ever for the task of a worker that was killed (datatrove 0.10).

    Raises:
        BrokenProcessPool: a worker was killed. The others are ended, too.
        RuntimeError: a task failed.
    """
    ranks = [*executor.get_incomplete_ranks()]
    if not ranks:
        return
    # Workers that are ended leave a semaphore, and Python warns of it after our last word.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    # spawn is the only way of starting processes that also works on Windows and macOS
    spawning = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(ranks)), spawning)
    try:
        tasks = [pool.submit(executor._run_for_rank, rank, rank % workers) for rank in ranks]
        for number, task in enumerate(as_completed(tasks), start=1):
            task.result()
            say(f"{number} of {len(ranks)} tasks are finished")
    finally:  # after a failure, the other workers are ended: their tasks are done again
        for worker in multiprocessing.active_children():
            worker.terminate()
            worker.join()
        pool.shutdown(cancel_futures=True)  # no worker is left: this closes its queues


def ray_executor(arguments: argparse.Namespace, step: partial, logs: str):
    import ray
    from datatrove.executor import RayPipelineExecutor

    ray.init(ignore_reinit_error=True)
    return RayPipelineExecutor(
        [step],
        arguments.tasks,
        arguments.workers,
        logging_dir=logs,
        cpus_per_task=arguments.cpus_per_task,
        mem_per_cpu_gb=arguments.memory_per_cpu_gb,
    )


def slurm_executors(arguments: argparse.Namespace, step: partial, folder: str, logs: str):
    """Return the executor of the last step, the check; it first submits the tasks, and waits for them."""
    from datatrove.executor import SlurmPipelineExecutor

    if not arguments.partition:
        raise InputError("--executor slurm: needs --partition.")
    settings = dict(
        time=arguments.time,
        partition=arguments.partition,
        cpus_per_task=arguments.cpus_per_task,
        mem_per_cpu_gb=arguments.memory_per_cpu_gb,
        qos=None,
        env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',  # the commands of this Python environment
        sbatch_args=dict(pair.split("=", 1) for pair in arguments.sbatch),
    )
    tasks = SlurmPipelineExecutor(
        [step], arguments.tasks, workers=arguments.workers, job_name="tokenize", logging_dir=logs, **settings
    )
    report = partial(report_shards, folder=folder, began=time.time())
    return SlurmPipelineExecutor(
        [report],
        1,
        job_name="check_shards",
        depends=tasks,
        skip_completed=False,
        logging_dir=f"{logs}-check",
        **settings,
    )


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    began = time.time()
    try:
        import datatrove  # noqa: F401
    except ImportError:
        raise InputError(f"running the tasks needs datatrove, which is not installed: {INSTALL}") from None
    folder = os.path.abspath(arguments.output)
    check_path(folder, "--output")
    plan_shards(
        folder,
        resolve_sources(arguments.input, arguments.encoding),
        arguments.tokenizer,
        arguments.end_token,
        arguments.text_field,
        arguments.skip_malformed,
        arguments.tasks,
    )
    logs = str(Path(folder, WORK_FOLDER, "tokenize"))
    cores = usable_cores()
    if arguments.executor == "local" and arguments.workers == -1:
        arguments.workers = min(arguments.tasks, cores)
    threads = max(1, cores // arguments.workers) if arguments.executor == "local" else arguments.cpus_per_task
    step = partial(write_shard, folder=folder, threads=threads)
    if arguments.executor == "slurm":
        slurm_executors(arguments, step, folder, logs).run()
        say(f"submitted. The last job checks the shards and prints their counts; the logs are in {logs}*/slurm_logs")
        return
    try:
        if arguments.executor == "local":
            run_locally(local_executor(arguments, step, logs), arguments.workers)
        else:
            ray_executor(arguments, step, logs).run()
    except BrokenProcessPool:
        raise InputError(
            f"a worker was killed, by the system if memory ran out: see {logs}/logs. What is finished is kept, and "
            f"the same command continues; with fewer tasks at a time, they need less memory: --workers "
            f"{max(1, arguments.workers // 2)}"
        ) from None
    except RuntimeError as error:
        raise InputError(f"{error}\nA task failed; its log is in {logs}/logs. Fix this and launch again.") from None
    report_shards(None, 0, 1, folder, began)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineErrors(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", required=True, help="Files, folders, globs, data set ids.")
    parser.add_argument("--tokenizer", required=True, help="A folder, or a ModelScope or Hugging Face id.")
    parser.add_argument("--output", required=True, help="Folder of the shards.")
    parser.add_argument("--tasks", type=int, required=True, help="How many shards.")
    parser.add_argument(
        "--executor", choices=["local", "slurm", "ray"], default="local", help="What runs the tasks (local)."
    )
    parser.add_argument("--workers", type=int, default=-1, help="Tasks at a time (local: one for each core; else all).")
    parser.add_argument("--text_field", help="Field of the text, or a template like '{title}\\n\\n{text}'.")
    parser.add_argument("--encoding", help="Of text that is not UTF-8: gb18030 for Chinese text in GBK.")
    parser.add_argument("--skip_malformed", action="store_true", help="Skip and count malformed documents.")
    parser.add_argument("--end_token", help="End-of-document token, for a tokenizer that defines none.")
    parser.add_argument("--cpus_per_task", type=int, default=1, help="On Slurm and Ray (1).")
    parser.add_argument("--memory_per_cpu_gb", type=int, default=4, help="On Slurm and Ray (4).")
    parser.add_argument("--partition", help="Partition of Slurm.")
    parser.add_argument("--time", default="24:00:00", help="Time limit of a Slurm task (24:00:00).")
    parser.add_argument(
        "--sbatch", nargs="*", default=[], metavar="NAME=VALUE", help="More settings for Slurm: account=x qos=y."
    )
    arguments = parser.parse_args(argv)
    if arguments.workers != -1 and arguments.workers < 1:
        parser.error(f"--workers {arguments.workers}: must be at least 1")
    if any("=" not in pair for pair in arguments.sbatch):
        parser.error(f"--sbatch {' '.join(arguments.sbatch)}: must be NAME=VALUE, without dashes")
    return arguments


if __name__ == "__main__":
    main()
