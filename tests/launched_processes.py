"""Several processes that see what accelerate's launcher would tell them, over gloo on the CPU.

A launch costs seconds for each process; here they are forked from one that has imported everything, and make several
runs one after the other.
"""

import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


# Layer by layer, as the YAMLs that compile; by a backend that needs no compiler.
COMPILED = {"ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true"}


def check_compiled() -> None:
    """Fail if the launcher asked for compiled layers and there are none: a layer has some 50 operations."""
    from torch._dynamo.utils import counters

    if "ACCELERATE_DYNAMO_BACKEND" in os.environ:
        assert counters["stats"]["calls_captured"] > 50, counters


def zero(stage: int) -> dict[str, str]:
    """Return what the launcher says of DeepSpeed's ZeRO, with everything else left to the recipe."""
    said = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    said |= {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto", "ACCELERATE_GRADIENT_CLIPPING": "auto"}
    said |= {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}  # as zero3.yaml
    return said | {"ACCELERATE_DYNAMO_BACKEND": "NO"}


def in_launched_processes(processes: int, check, folder: Path, **environment: str) -> None:
    """Run ``check(rank, folder)``, a function of a test module, in processes that a launcher would have started.

    Args:
        environment: what the launcher says beside ranks and sizes.

    Raises:
        AssertionError: with the traceback and the output of the first process that failed.
    """
    folder = Path(folder)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny"])
    port = str(20_000 + (os.getpid() * 7 + len(list(folder.iterdir()))) % 20_000)
    children = []
    for rank in range(processes):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_MIXED_PRECISION": "no"}
        own = {name: str(value) for name, value in own.items()} | environment
        children.append(context.Process(target=_run, args=(rank, check, folder, own)))
    for child in children:
        child.start()
    while any(child.is_alive() for child in children):
        if any(child.exitcode for child in children):  # the others would wait for the one that failed
            for child in children:
                child.kill()
        time.sleep(0.05)
    for rank in range(processes):
        problem = folder / f"problem.{rank}"
        assert not problem.exists(), problem.read_text() + (folder / f"output.{rank}").read_text()[-3000:]
    assert [child.exitcode for child in children] == [0] * processes


def _run(rank: int, check, folder: Path, environment: dict[str, str]) -> None:
    import torch

    os.environ |= environment
    torch.set_num_threads(1)
    output = os.open(folder / f"output.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 0
    try:
        check(rank, folder)
    except BaseException:
        (folder / f"problem.{rank}").write_text(traceback.format_exc())
        code = 1
    sys.stdout.flush()
    os._exit(code)  # gloo's threads may outlive the interpreter


def meet_again() -> None:
    """Call this in all processes before a further run: the last one has ended the group, and its port is taken."""
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
