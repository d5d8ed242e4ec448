"""Run every GPU YAML on the same job: speed, scaling, memory, and how far its losses are from those of one GPU.

    python benchmarks/multi_gpu.py --data zh.jsonl --tokenizer qwen2.5-tokenizer
    python benchmarks/multi_gpu.py --job 0.5B --data en.jsonl --yamls single_gpu ddp 'zero*' --num_processes 2
    python benchmarks/multi_gpu.py --data zh.jsonl --folder runs --plan --plot losses.png

Each YAML is launched once, in a process of its own, on all visible GPUs or --num_processes of them. YAMLs for one GPU
run on the first. The launched script is the recipe up to the end of training; it neither evaluates nor saves. Tokens
are made before the first run. A row of the table is printed when its run is done. A run that failed or was not done in
time has what it logged until then, and the end of its output is shown. The other runs continue. With --folder, runs are
kept. A kept run is read and not repeated if its flags, commit, versions and device are the same.

Scaling is strong scaling: all runs take the same steps of the same tokens, and the recipe divides them among the cards.
With more cards, each card has fewer rows whose computation can hide its communication. Scaling is tokens a second and
GPU, relative to the baseline. The baseline is the first run that logged a step: single_gpu.yaml's, if it is among the
runs and fits (with --job 7B it does not fit and is left out). The deviation is the largest relative difference, over
all steps, between a run's loss and the baseline's.

Tokens a second and MFU are medians over the steps after the fifth. The loss is read at every step, which costs a little
speed. The peak is that of the process with the highest peak.
"""

import common.console  # noqa: F401  # isort: skip  # before the libraries that it keeps quiet

import argparse
import fnmatch
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from accelerate.utils import gather_object
from launching import ROOT, circumstances, launcher, load_recipe, one_gpu
from launching import run as run_command

from common.distributed.workarounds import compile_settings
from common.io import append_lines
from common.model.memory import CONTEXT_BYTES
from common.system import GIB
from common.train.trainer import PretrainingTrainer

BASELINE = "single_gpu"
ONE_GPU = (BASELINE, "fp16", "fp8")
NOT_HERE = ("cpu", "cpu_2proc", "cpu_fsdp2", "multi_node", "fsdp2_context_parallel", "fsdp2_ulysses", "hsdp")
NOT_HERE += ("tensor_parallel", "fsdp2_tensor_parallel", "expert_parallel")
WARM_STEPS = 5
HISTORY_FILE, KEPT_FILE = "history.jsonl", "kept.json"

# What is trained: recipe and its flags, rows of a micro-batch, steps, YAMLs. AdamW, because every strategy has it.
JOBS = {
    "123M": (
        "wiki_zh_scratch.py --model swanlab-wiki --tokenizer Qwen/Qwen2-0.5B --learning_rate 1e-3 "
        "--tokens_per_step 131072",
        128,
        60,
        ["*"],
    ),
    "0.5B": (  # Qwen2.5-0.5B's shape
        "openwebtext_continue.py --from_scratch --learning_rate 5e-4 --context_length 2048 --tokens_per_step 131072 "
        "--held_out_fraction 0.01",
        16,
        60,
        ["*"],
    ),
    "7B": (  # Llama-2-7B's shape; with --tokenizer train also its vocabulary
        "wiki_zh_scratch.py --model llama-2-7b --vocabulary_size 32000 --learning_rate 1e-4 --context_length 4096 "
        "--tokens_per_step 131072 --held_out_fraction 0.02",
        1,
        12,
        ["fsdp2*", "zero2_recompute", "zero3_offload"],  # those that fit two cards of 80 GB, by --plan
    ),
}
HEADS = [
    "YAML",
    "GPUs",
    "tokens/s per GPU",
    "MFU",
    "strong scaling",
    "peak GiB",
    "predicted",
    "first loss",
    "last loss",
    "deviation",
    "s to first step",
]


class TrainingOnly(PretrainingTrainer):
    """Train, write each log as it comes, and end the process. It does not evaluate, sample or save the model."""

    def train(self, **kwargs) -> None:
        super().train(**kwargs)
        self.accelerator.end_training()  # as the recipes end
        sys.exit()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "loss" not in logs:
            return
        with self.clock.interval.paused():
            logs = {**self.state.log_history[-1], "memory_peak_gib": max(gather_object([logs["memory_peak_gib"]]))}
            if self.is_world_process_zero():
                append_lines(Path(self.args.output_dir, HISTORY_FILE), [logs])


def work(until: str, recipe: str, flags: list[str]) -> None:
    """Run a recipe in this process until its "data" are tokenized or its "training" is done.

    To stop there, one of the recipe's functions is replaced by an exit, or its Trainer by one that ends the process.
    """
    module = load_recipe(recipe)
    if until == "data":
        module.build_rows = lambda *_: sys.exit()  # the first step after tokenizing
    else:
        module.PretrainingTrainer = TrainingOnly
    module.main(flags)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:
        return work(argv[1], argv[2], argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=list(JOBS), default="123M")
    parser.add_argument("--data", nargs="+", help="as the recipe's; default: what the recipe downloads")
    parser.add_argument("--tokenizer", help="as the recipe's")
    parser.add_argument("--cache_dir", default=str(ROOT / "data" / "cache"), help="as the recipe's")
    parser.add_argument("--yamls", nargs="+", help="names or patterns, such as 'zero*'; default: all that fit the job")
    parser.add_argument("--num_processes", type=int, default=torch.accelerator.device_count())
    parser.add_argument("--steps", type=int, help="steps, instead of the job's")
    parser.add_argument("--rows", type=int, help="rows of a micro-batch, instead of the job's")
    parser.add_argument("--limit", type=float, default=300, help="seconds a YAML may take")
    parser.add_argument("--folder", help="keep the runs here, and read the runs kept before")
    parser.add_argument("--plan", action="store_true", help="also show the memory that --plan predicts")
    parser.add_argument("--plot", help="write the losses of all runs to this picture")
    parser.add_argument("--launcher", default="", help="more flags of accelerate launch, such as '--dynamo_backend no'")
    parser.add_argument("--recipe", default="", help="more flags of the recipe")
    arguments = parser.parse_args(argv)
    if arguments.num_processes < 1:
        sys.exit("no accelerator here. To try this script on CPUs: --num_processes 1 --yamls cpu --recipe --sample")
    if arguments.steps is not None and arguments.steps <= WARM_STEPS:
        sys.exit(f"--steps {arguments.steps}: the first {WARM_STEPS} do not count for the rates. Use more.")
    names = chosen(arguments.yamls or JOBS[arguments.job][-1])
    if not names:
        sys.exit(f"--yamls {arguments.yamls}: none of {', '.join(chosen(['*']))}")
    prepare(arguments)
    print("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|", flush=True)
    histories: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary).resolve() / arguments.job
        for name in names:
            histories[name], failure, output = run(name, arguments, folder / name)
            predicted = plan(name, arguments) if arguments.plan else None
            print(row(name, gpus(name, arguments), histories, predicted, failure), flush=True)
            if failure:
                print(f"{name}:\n{output[-3000:]}", file=sys.stderr, flush=True)
    if arguments.plot:
        plot(histories, arguments)
    about, logged = circumstances(), baseline_of(histories)
    print(f"\n{arguments.job}, {about['device']}, torch {torch.__version__}, commit {about['commit']}", end="")
    print(f"; the baseline is {logged}.yaml" if logged else "")


def chosen(patterns: list[str]) -> list[str]:
    """Return the names of the YAMLs that match, the baseline first; those in NOT_HERE only by their full name."""
    every = sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml"))
    found = [
        name
        for name in every
        if name in patterns or (name not in NOT_HERE and any(fnmatch.fnmatch(name, p) for p in patterns))
    ]
    return sorted(found, key=lambda name: name != BASELINE)


def gpus(name: str, arguments: argparse.Namespace) -> int:
    return 1 if name in ONE_GPU else arguments.num_processes


def baseline_of(histories: dict[str, list[dict]]) -> str | None:
    """Return the first run that logged a step."""
    return next((name for name, history in histories.items() if by_step(history)), None)


def job_flags(arguments: argparse.Namespace) -> list[str]:
    """Return the job's recipe and all flags."""
    recipe, rows, steps, _ = JOBS[arguments.job]
    flags = f"{recipe} --optimizer adamw --per_device_train_batch_size {arguments.rows or rows}".split()
    flags += ["--max_steps", str(arguments.steps or steps)]
    flags += ["--tokenizer", arguments.tokenizer] if arguments.tokenizer else []
    flags += ["--data", *arguments.data] if arguments.data else []
    flags += ["--cache_dir", arguments.cache_dir]
    flags += "--logging_steps 1 --eval_strategy no --max_eval_rows 32 --save_strategy no".split()
    return flags + "--swanlab off --disable_tqdm true".split() + arguments.recipe.split()


def prepare(arguments: argparse.Namespace) -> None:
    """Tokenize the job's data, so that no run spends its time on it."""
    command = [*launcher("cpu.yaml"), __file__, "--worker", "data", *job_flags(arguments)]
    if arguments.folder:  # where there is room
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        output, failure = run_command([*command, "--output_dir", folder], one_gpu(CUDA_VISIBLE_DEVICES=""), cwd=ROOT)
    if failure:
        sys.exit(f"the data of the job could not be prepared:\n{output[-3000:]}")


def run(name: str, arguments: argparse.Namespace, folder: Path) -> tuple[list[dict], str, str]:
    """Train with a YAML; return its logs, how it failed ("" if it did not), and its output."""
    kept = folder / KEPT_FILE
    history = folder / HISTORY_FILE
    launched = [*arguments.launcher.split(), "--num_processes", str(gpus(name, arguments))]
    flags = job_flags(arguments)
    described = {"launcher": launched, "flags": flags, **circumstances()}
    if folder.exists():
        there = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        different = [key for key, value in described.items() if there.get(key) != value]
        if not different:
            return logged_in(history), "", ""
        why = f"other {', '.join(different)}" if there else "it was not finished, and is not continued"
        print(f"note: {folder} is run again: {why}", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    command = [*launcher(f"{name}.yaml"), *launched, __file__, "--worker", "training", *flags]
    command += ["--output_dir", str(folder)]
    environment = one_gpu() if name in ONE_GPU else dict(os.environ)
    output, failure = run_command(command, environment, arguments.limit, cwd=ROOT)
    if not failure:
        kept.write_text(json.dumps(described), encoding="utf-8")
    return logged_in(history), failure, output


def logged_in(path: Path) -> list[dict]:
    """Return the complete lines of a history. A killed run may leave half a line."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def plan(name: str, arguments: argparse.Namespace) -> float | None:
    """Return the GiB that --plan predicts for torch's allocator, or None, with a note, if there is no plan."""
    recipe, *flags = job_flags(arguments)
    with tempfile.TemporaryDirectory() as folder:
        config = planned_yaml(name, arguments.launcher.split(), Path(folder))
        command = [sys.executable, str(ROOT / "recipes" / recipe), *flags, "--plan", "--plan_config", str(config)]
        command += ["--plan_json", "--plan_processes", str(gpus(name, arguments))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"note: no plan for {name}: {done.stderr[-1000:]}", file=sys.stderr, flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])["total_gib"] - CONTEXT_BYTES / GIB


def planned_yaml(name: str, flags: list[str], folder: Path) -> Path:
    """Write a copy of the YAML into ``folder``, compiled or not as the launcher's ``flags`` say; return its path."""
    path = ROOT / "accelerate_configs" / f"{name}.yaml"
    compiled = compile_settings(["--config_file", str(path), *flags, "script.py"])
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["dynamo_config"] = {"dynamo_backend": compiled["ACCELERATE_DYNAMO_BACKEND"]}
    planned = folder / path.name
    planned.write_text(yaml.safe_dump(config), encoding="utf-8")
    return planned


def by_step(history: list[dict], key: str = "loss") -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in history if "loss" in entry and key in entry}


def warm_median(history: list[dict], key: str) -> float | None:
    values = [value for step, value in by_step(history, key).items() if step > WARM_STEPS]
    return statistics.median(values) if values else None


def row(
    name: str, gpus: int, histories: dict[str, list[dict]], predicted: float | None = None, failure: str = ""
) -> str:
    """Return a line of the table. ``histories`` are the logs of all runs so far."""
    history = histories[name]
    baseline = histories.get(baseline_of(histories), [])
    losses = by_step(history)
    baseline_losses = by_step(baseline)
    if failure:
        name += f", {failure}, after step {max(losses, default=0)}"
    if not losses:
        return f"| {name} | {gpus}" + " | -" * (len(HEADS) - 2) + " |"
    rate, reference = (warm_median(logs, "tokens_per_second_per_device") for logs in (history, baseline))
    mfu = warm_median(history, "mfu")
    common_steps = losses.keys() & baseline_losses.keys()
    deviations = [abs(losses[step] / baseline_losses[step] - 1) for step in common_steps]
    peak = max(by_step(history, "memory_peak_gib").values())
    cells = [
        name,
        gpus,
        "-" if rate is None else f"{rate:,.0f}",
        "-" if mfu is None else f"{mfu:.1%}",
        "-" if rate is None or reference is None else f"{rate / reference:.0%}",
        f"{peak:.1f}",
        "-" if predicted is None else f"{predicted:.1f} ({predicted / peak - 1:+.0%})",
        f"{losses[min(losses)]:.4f}",
        f"{losses[max(losses)]:.4f}",
        f"{max(deviations):.3%}" if deviations else "-",
        f"{min(by_step(history, 'train_seconds').values()):.1f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def plot(histories: dict[str, list[dict]], arguments: argparse.Namespace) -> None:
    """Draw the losses of all runs in one plot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss in training")
    for name, history in histories.items():
        losses = by_step(history)
        axes.plot(list(losses), list(losses.values()), linewidth=1, label=f"{name} on {gpus(name, arguments)}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(arguments.plot, dpi=120)


if __name__ == "__main__":
    main()
