"""Every YAML for GPUs on the same job: speed, scaling, memory, and how far its losses are from those of one GPU.

    python benchmarks/multi_gpu.py --data zh.jsonl --tokenizer qwen2.5-tokenizer
    python benchmarks/multi_gpu.py --job 0.5B --data en.jsonl --yamls single_gpu ddp 'zero*' --num_processes 2
    python benchmarks/multi_gpu.py --data zh.jsonl --folder runs --plan --plot losses.png

Each YAML is launched once, in a process of its own, on all visible GPUs or --num_processes of them; those for one GPU
on the first. All take the same steps on the same rows: the recipe divides its tokens a step among the cards. A row of
the table is printed when its run is done; a failed one shows the end of its log, and the rest goes on. With --folder
the runs are kept, and those that are there already are read, not run again, if their flags are the same.

Tokens a second and MFU are medians over the steps after the fifth; the loss is read at every step, which costs a little
speed. Scaling is tokens a second and GPU over single_gpu.yaml's. The deviation is the largest of all steps' losses,
relative to the first run's in the table, which is single_gpu.yaml if it is among them.
"""

import argparse
import fnmatch
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from common.memory import CONTEXT_BYTES, GIB

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "single_gpu"
ONE_GPU = (BASELINE, "fp16")
NOT_HERE = ("cpu", "cpu_2proc", "multi_node", "fsdp2_context_parallel")
WARM_STEPS = 5

# What is trained: recipe and its flags, rows of a micro-batch, steps. AdamW, which every strategy has.
JOBS = {
    "123M": ("wiki_zh_scratch.py --learning_rate 1e-3 --tokens_per_step 131072", 128, 60),
    "0.5B": (  # Qwen2.5-0.5B's shape
        "openwebtext_continue.py --from_scratch --learning_rate 5e-4 --context_length 2048 --tokens_per_step 131072 "
        "--held_out_fraction 0.01",
        16,
        60,
    ),
    "7B": (  # Llama-2-7B's; with --tokenizer train its vocabulary, too
        "wiki_zh_scratch.py --model llama-2-7b --vocabulary_size 32000 --learning_rate 1e-4 --context_length 4096 "
        "--tokens_per_step 32768 --held_out_fraction 0.02",
        1,
        12,
    ),
}
HEADS = [
    "YAML",
    "GPUs",
    "tokens/s per GPU",
    "MFU",
    "scaling",
    "peak GiB",
    "predicted",
    "first loss",
    "last loss",
    "deviation",
    "s to first step",
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=list(JOBS), default="123M")
    parser.add_argument("--data", nargs="+", help="as the recipe's; without it, what the recipe downloads")
    parser.add_argument("--tokenizer", help="as the recipe's")
    parser.add_argument("--cache_dir", default=str(ROOT / "data" / "cache"), help="as the recipe's")
    parser.add_argument("--yamls", nargs="+", default=["*"], help="names or patterns, such as 'zero*'")
    parser.add_argument("--num_processes", type=int, default=torch.accelerator.device_count())
    parser.add_argument("--steps", type=int, help="instead of the job's")
    parser.add_argument("--rows", type=int, help="of a micro-batch, instead of the job's")
    parser.add_argument("--limit", type=float, default=300, help="seconds a YAML may take")
    parser.add_argument("--folder", help="keep the runs here, and read those that are there")
    parser.add_argument("--plan", action="store_true", help="also what --plan predicts of the memory")
    parser.add_argument("--plot", help="write the losses of all runs to this picture")
    parser.add_argument("--launcher", default="", help="more flags of accelerate launch, such as '--dynamo_backend no'")
    parser.add_argument("--recipe", default="", help="more flags of the recipe")
    arguments = parser.parse_args(argv)
    if arguments.num_processes < 1:
        sys.exit("no accelerator here. To try this script out on CPUs: --num_processes 1 --yamls cpu --recipe --sample")
    if arguments.steps is not None and arguments.steps <= WARM_STEPS:
        sys.exit(f"--steps {arguments.steps}: the first {WARM_STEPS} are left out of the rates. Use more.")
    names = chosen(arguments.yamls)
    if not names:
        sys.exit(f"--yamls {arguments.yamls}: none of {', '.join(chosen(['*']))}")
    print("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|", flush=True)
    histories: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary).resolve() / arguments.job
        for name in names:
            histories[name], end = run(name, arguments, folder / name)
            baseline = histories[names[0]]
            print(row(name, gpus(name, arguments), histories[name], baseline, plan(name, arguments)), flush=True)
            if end:
                print(end, file=sys.stderr, flush=True)
    if arguments.plot:
        plot(histories, arguments)
    about = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{arguments.job}, {about}, torch {torch.__version__}, deviation from {names[0]}.yaml")


def chosen(patterns: list[str]) -> list[str]:
    """Return the names of the YAMLs that match, the baseline first; the CPU's only if named."""
    every = sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml"))
    found = [
        name
        for name in every
        if name in patterns or (name not in NOT_HERE and any(fnmatch.fnmatch(name, p) for p in patterns))
    ]
    return sorted(found, key=lambda name: name != BASELINE)


def gpus(name: str, arguments: argparse.Namespace) -> int:
    return 1 if name in ONE_GPU else arguments.num_processes


def job_flags(arguments: argparse.Namespace) -> list[str]:
    """Return recipe and flags of the job."""
    recipe, rows, steps = JOBS[arguments.job]
    flags = f"recipes/{recipe} --optimizer adamw --per_device_train_batch_size {arguments.rows or rows}".split()
    flags += ["--max_steps", str(arguments.steps or steps)]
    flags += ["--tokenizer", arguments.tokenizer] if arguments.tokenizer else []
    return flags + arguments.recipe.split()


def run(name: str, arguments: argparse.Namespace, folder: Path) -> tuple[list[dict], str]:
    """Launch the recipe with a YAML; return its logs, and the end of what it printed if it failed."""
    state, kept = folder / "trainer_state.json", folder.with_suffix(".flags")
    flags = [*arguments.launcher.split(), "--num_processes", str(gpus(name, arguments)), *job_flags(arguments)]
    flags += ["--data", *arguments.data] if arguments.data else []
    if kept.exists() and json.loads(kept.read_text(encoding="utf-8")) != flags:
        sys.exit(f"{folder} is a run with other flags ({kept}). Use another --folder.")
    if state.exists():
        return json.loads(state.read_text(encoding="utf-8"))["log_history"], ""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", f"accelerate_configs/{name}.yaml"]
    command += [*flags, "--output_dir", str(folder), "--cache_dir", arguments.cache_dir]
    command += "--logging_steps 1 --eval_strategy no --max_eval_rows 32 --save_strategy no".split()
    command += "--swanlab off --disable_tqdm true".split()
    environment = dict(os.environ)
    if name in ONE_GPU:  # with several visible, Trainer would take them all, the slow way
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    folder.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(flags), encoding="utf-8")
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=arguments.limit,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        output, failed = done.stdout, done.returncode != 0
    except subprocess.TimeoutExpired as error:
        output, failed = (error.stdout or b"").decode(errors="replace") + "\nnot done in time", True
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"] if state.exists() else []
    own = output.split('Traceback (most recent call last):\n  File "<frozen runpy>')[0]  # before the launcher's
    return history, f"{name}:\n{own[-3000:]}" if failed or not history else ""


def plan(name: str, arguments: argparse.Namespace) -> float | None:
    """Return the GiB that the recipe's --plan predicts for torch's allocator, or None if it was not asked for."""
    if not arguments.plan:
        return None
    command = [sys.executable, *job_flags(arguments), "--plan", "--plan_config", f"accelerate_configs/{name}.yaml"]
    command += ["--plan_processes", str(gpus(name, arguments))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])["total_gib"] - CONTEXT_BYTES / GIB


def by_step(history: list[dict], key: str = "loss") -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in history if "loss" in entry and key in entry}


def warm_median(history: list[dict], key: str) -> float | None:
    values = [value for step, value in by_step(history, key).items() if step > WARM_STEPS]
    return statistics.median(values) if values else None


def row(name: str, gpus: int, history: list[dict], baseline: list[dict], predicted: float | None = None) -> str:
    """Return a line of the table; ``baseline`` are the logs of its first run."""
    losses, theirs = by_step(history), by_step(baseline)
    rate = warm_median(history, "tokens_per_second_per_device")
    if rate is None:
        return f"| {name} | {gpus} | failed" + " |" * (len(HEADS) - 2)
    mfu, deviations = warm_median(history, "mfu"), [abs(losses[s] / theirs[s] - 1) for s in losses.keys() & theirs]
    peak = max(by_step(history, "memory_peak_gib").values())
    cells = [
        name,
        gpus,
        f"{rate:,.0f}",
        "-" if mfu is None else f"{mfu:.1%}",
        f"{rate / warm_median(baseline, 'tokens_per_second_per_device'):.0%}" if theirs else "-",
        f"{peak:.1f}",
        "-" if predicted is None else f"{predicted:.1f} ({predicted / peak - 1:+.0%})",
        f"{losses[min(losses)]:.4f}",
        f"{losses[max(losses)]:.4f}",
        f"{max(deviations):.3%}" if deviations else "-",
        f"{min(by_step(history, 'train_seconds').values()):.1f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def plot(histories: dict[str, list[dict]], arguments: argparse.Namespace) -> None:
    """Draw the losses of all runs over each other."""
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
