"""Train the same small run under every strategy on 1, 2 and 4 CPU processes, kill each in the middle, and continue it.

    python benchmarks/equivalence.py                                  # the table of docs/scaling.md
    python benchmarks/equivalence.py --only ddp fsdp2 --csv equivalence.csv

Every run has 30 steps of 4 rows of 64 tokens, in fp32, saves every 5 steps, and starts from the same random weights.
All its processes are killed (SIGKILL) as soon as step 12 is made. The same command then continues from the last
checkpoint. Its losses and gradient norms, before the kill and after it, are compared with those of one process that was
left alone. Processes add up numbers in another order, so the last digits differ.

The processes are forked from this one and get what accelerate's launcher tells its processes for that YAML. To launch
each would take most of the time.
"""

import common.console  # noqa: F401  # isort: skip  # before the libraries that it keeps quiet

import argparse
import csv
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from launching import ROOT, circumstances, load_recipe

STEPS, KILLED_AT, LIMIT = 30, 12, 900
ON_CPUS = ["--mixed_precision", "no", "--dynamo_backend", "no"]
FLAGS = f"--sample --max_steps {STEPS} --context_length 64 --tokens_per_step 256 --learning_rate 1e-3 --logging_steps 1"
FLAGS += (
    f" --eval_steps {STEPS} --save_steps 5 --max_eval_rows 4 --optimizer adamw --weight_decay 0.1 --disable_tqdm true"
)
EXPERTS = dict(
    model_type="mixtral", hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
    router_aux_loss_coef=0.05,
)  # fmt: skip
HEADS = ["strategy", "processes", "first loss", "last loss", "first norm", "last norm", "loss differs by"]
HEADS += ["norm differs by", "killed at step", "continued after"]


@dataclass(frozen=True)
class Run:
    """A row of the table: a YAML or recipe, on so many processes, of so many rows at once."""

    strategy: str
    processes: int
    yaml: str
    launcher: str = ""
    recipe: str = "wiki_zh_scratch.py"
    more: str = ""  # flags of the recipe
    experts: bool = False
    rows: int | None = None  # None: all of a process at once

    def flags(self, work: Path, output: Path) -> list[str]:
        """Return the recipe's flags."""
        rows = max(1, 4 // self.processes) if self.rows is None else self.rows
        words = [*FLAGS.split(), *self.more.split(), "--per_device_train_batch_size", str(rows)]
        words += ["--swanlab", "off"] if self.recipe == "wiki_zh_scratch.py" else []
        words += ["--model", str(work / "experts")] if self.experts else []
        return [*words, "--cache_dir", str(work / "cache"), "--output_dir", str(output)]

    def environment(self) -> dict[str, str]:
        """Return what accelerate's launcher tells the processes that it starts."""
        words = ["--config_file", str(ROOT / "accelerate_configs" / self.yaml), *ON_CPUS, "--main_process_port", "0"]
        words += ["--num_processes", str(self.processes)] if self.yaml != "cpu.yaml" else []
        parsed = launch_command_parser().parse_args([*words, *self.launcher.split(), self.recipe])
        arguments, defaults, _ = _validate_launch_command(parsed)
        if arguments.use_deepspeed:
            arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
            told = prepare_deepspeed_cmd_env(arguments)[1]
        elif arguments.use_fsdp or arguments.multi_gpu:
            told = prepare_multi_gpu_env(arguments)
        else:
            told = prepare_simple_launcher_cmd_env(arguments)[1]
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(arguments.main_process_port), "OMP_NUM_THREADS": "1"}
        # What its DeepSpeed launcher leaves out, and a size that it does not know.
        told |= {"ACCELERATE_DYNAMO_BACKEND": "NO"}
        return told | ({"PARALLELISM_CONFIG_EP_SIZE": "2"} if self.experts and self.processes > 1 else {})


def by_shards(shards: int, **sizes: int) -> str:
    """Return the launcher's flags for ``shards`` processes that divide the model, and other sizes."""
    named = {"dp_shard": shards, **sizes}
    return " ".join(f"--parallelism_config_{name}_size {size}" for name, size in named.items())


PARTS = "--fsdp_state_dict_type SHARDED_STATE_DICT"
PIPELINE = dict(yaml="cpu_2proc.yaml", recipe="explicit_pipeline.py", rows=1)
RUNS = [
    Run("one process", 1, "cpu.yaml"),
    *(Run("ddp", processes, "cpu_2proc.yaml") for processes in (2, 4)),
    *(Run(f"zero{stage}", processes, f"zero{stage}.yaml") for stage in (1, 2, 3) for processes in (1, 2, 4)),
    *(Run("fsdp2", processes, "cpu_fsdp2.yaml") for processes in (1, 2, 4)),
    Run("fsdp2, recompute", 2, "cpu_fsdp2.yaml", "--fsdp_activation_checkpointing true"),
    Run("fsdp2, checkpoints in parts", 2, "cpu_fsdp2.yaml", PARTS),
    Run("hsdp, 2 x 2", 4, "hsdp.yaml"),
    Run("tensor parallel", 2, "tensor_parallel.yaml"),
    Run("tensor parallel x fsdp2, 2 x 2", 4, "fsdp2_tensor_parallel.yaml"),
    Run("ulysses", 2, "fsdp2_ulysses.yaml", rows=4),
    Run("experts: one process", 1, "cpu.yaml", experts=True),
    *(Run("experts: divided", n, "expert_parallel.yaml", by_shards(n), experts=True) for n in (2, 4)),
    Run("explicit_loop.py, ddp", 2, "cpu_2proc.yaml", recipe="explicit_loop.py"),
    Run("explicit_loop.py, fsdp2", 2, "cpu_fsdp2.yaml", recipe="explicit_loop.py"),
    Run("pipeline, 1F1B", 2, **PIPELINE),
    Run("pipeline, 1F1B", 4, **PIPELINE),
    Run("pipeline x data, interleaved, 2 x 2", 4, more="--pipeline_processes 2 --stages_per_process 2", **PIPELINE),
]


def work_as(rank: int, one: Run, told: dict[str, str], flags: list[str], log: Path) -> None:
    """Be one of the processes that the launcher starts, and end."""
    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": one.processes, "LOCAL_WORLD_SIZE": one.processes}
    os.environ |= told | {name: str(value) for name, value in sizes.items()}
    torch.set_num_threads(1)
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    status = 0
    try:
        load_recipe(one.recipe).main(flags)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)  # gloo's threads may outlive the interpreter


def started(one: Run, folder: Path, log: str) -> list[multiprocessing.Process]:
    """Start the processes of a run; what each prints is in ``folder``."""
    told, flags, context = (
        one.environment(),
        one.flags(folder.parent, folder / "run"),
        multiprocessing.get_context("fork"),
    )
    ranks = range(one.processes)
    made = [context.Process(target=work_as, args=(rank, one, told, flags, folder / f"{log}.{rank}")) for rank in ranks]
    for process in made:
        process.start()
    return made


def train(one: Run, folder: Path, killed: bool) -> tuple[int, int]:
    """Train to the end; return the step at which all processes were killed before that, and the one it continued from.

    Raises:
        RuntimeError: with the end of the output, if the run failed, or ended before it could be killed.
    """
    output, at = folder / "run", 0
    if killed:
        processes = started(one, folder, "killed")
        while step_of(output) < KILLED_AT and all(process.is_alive() for process in processes):
            time.sleep(0.01)
        early = not all(process.is_alive() for process in processes)
        for process in processes:
            process.kill()
            process.join()
        if early:
            raise RuntimeError(f"it ended before it was killed: {(folder / 'killed.0').read_text()[-1500:]}")
        at = step_of(output)
    saved = [int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")]
    processes, ends = started(one, folder, "output"), time.time() + LIMIT
    while any(process.is_alive() for process in processes):
        if time.time() > ends or any(process.exitcode for process in processes):  # the others would wait for it
            for process in processes:
                process.kill()
        time.sleep(0.01)
    failed = [rank for rank, process in enumerate(processes) if process.exitcode]
    if failed:
        raise RuntimeError("\n".join((folder / f"output.{rank}").read_text()[-1500:] for rank in failed))
    return at, max(saved, default=0)


def step_of(output: Path) -> int:
    """Return the last step that a run has made, as its files say; 0 if there is none."""
    try:
        made = json.loads((output / "status.json").read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError):
        made = 0
    return max([made, *logged(output)])


def logged(output: Path) -> dict[int, dict]:
    """Return what a run logged of each step, after its end, or so far if its recipe has a loop of its own."""
    own, of_trainer = output / "log.jsonl", output / "trainer_state.json"
    if own.exists():
        text = own.read_text(encoding="utf-8")
        entries = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    elif of_trainer.exists():
        entries = json.loads(of_trainer.read_text(encoding="utf-8"))["log_history"]
    else:
        entries = []
    return {entry["step"]: entry for entry in entries if "loss" in entry}


def difference(found: dict[int, dict], expected: dict[int, dict], name: str) -> float:
    """Return the largest relative difference of ``name`` over all steps.

    Raises:
        RuntimeError: a step is missing.
    """
    if not found.keys() == expected.keys() == set(range(1, STEPS + 1)):
        raise RuntimeError(f"steps {sorted(found)} were logged, not 1 to {STEPS}")
    return max(abs(found[step][name] / expected[step][name] - 1) for step in expected)


def cells(one: Run, found: dict[int, dict], expected: dict[int, dict], at: int, after: int) -> list[str]:
    """Return a row of the table."""
    first, last = found[1], found[STEPS]
    figures = [f"{entry[name]:.6f}" for name in ("loss", "grad_norm") for entry in (first, last)]
    differ = [f"{difference(found, expected, name):.1e}" for name in ("loss", "grad_norm")]
    return [one.strategy, str(one.processes), *figures, *differ, str(at), str(after)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="the beginnings of strategies; default: all")
    parser.add_argument("--csv", type=Path, help="also write the rows here, with commit and versions")
    arguments = parser.parse_args(argv)
    wanted = tuple(arguments.only) if arguments.only else ("",)
    alone: dict[bool, dict[int, dict]] = {}
    rows = []
    print("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|", flush=True)
    with suppress(ImportError):
        import deepspeed  # noqa: F401  # once, before the forks
    for recipe in {each.recipe for each in RUNS}:
        load_recipe(recipe)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "experts").mkdir()
        (work / "experts" / "config.json").write_text(json.dumps(EXPERTS))
        for number, one in enumerate(each for each in RUNS if each.strategy.startswith(wanted)):
            folder = work / str(number)
            folder.mkdir()
            try:
                if one.experts not in alone:
                    left_alone = work / f"alone {one.experts}"
                    left_alone.mkdir()
                    train(Run("", 1, "cpu.yaml", experts=one.experts), left_alone, killed=False)
                    alone[one.experts] = logged(left_alone / "run")
                at, after = train(one, folder, killed=True)
                row = cells(one, logged(folder / "run"), alone[one.experts], at, after)
            except RuntimeError as error:
                row = [one.strategy, str(one.processes), f"failed: {error}", *[""] * (len(HEADS) - 3)]
            rows.append(row)
            print("| " + " | ".join(row) + " |", flush=True)
    if arguments.csv:
        write_csv(arguments.csv, rows, sys.argv[1:] if argv is None else argv)


def write_csv(path: Path, rows: list[list[str]], argv: list[str]) -> None:
    """Write the table with what its figures depend on."""
    about = circumstances()
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")]
    command = " ".join(["python benchmarks/equivalence.py", *argv[: argv.index("--csv")]])
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        names = ["commit", "date", "device", "torch", "transformers", "accelerate", "deepspeed", "command"]
        table.writerow([*(head.replace(" ", "_") for head in HEADS), *names])
        fixed = [about["commit"], date.today().isoformat(), about["device"], *versions, command.strip()]
        table.writerows([*row, *fixed] for row in rows)


if __name__ == "__main__":
    main()
