"""Every YAML for GPUs on the same job: speed, memory, and how far its losses are from those of one GPU.

    python benchmarks/strategies.py --data zh.jsonl --tokenizer qwen2.5-tokenizer
    python benchmarks/strategies.py --data zh.jsonl --tokenizer qwen2.5-tokenizer --yamls 'zero*' --num_processes 2

With --folder the runs are kept: those that are there already are read, not run again.

Each YAML is launched once, in a process of its own, with recipes/wiki_zh_scratch.py (123M parameters, AdamW for all) on
all visible GPUs; those for one GPU on the first. Its row is printed when it is done; a failed one shows the end of its
log, and the rest goes on. Tokens a second and MFU are medians over the steps after the fifth; the loss is read at every
step, which costs a little speed. The deviation is the largest of all steps' losses, relative to single_gpu.yaml's.
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

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "single_gpu"
ONE_GPU = (BASELINE, "fp16")
NOT_HERE = ("cpu", "cpu_2proc", "multi_node")
WARM_STEPS = 5
HEADS = [
    "YAML",
    "GPUs",
    "tokens/s per GPU",
    "MFU",
    "peak GiB",
    "first loss",
    "last loss",
    "deviation",
    "s to first step",
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", help="as the recipe's; without it, what the recipe downloads")
    parser.add_argument("--tokenizer", help="as the recipe's")
    parser.add_argument("--cache_dir", default=str(ROOT / "data" / "cache"), help="as the recipe's")
    parser.add_argument("--yamls", nargs="+", default=["*"], help="names or patterns, such as 'zero*'")
    parser.add_argument("--num_processes", type=int, default=torch.accelerator.device_count())
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=32, help="of a micro-batch")
    parser.add_argument("--limit", type=float, default=240, help="seconds a YAML may take")
    parser.add_argument("--folder", help="keep the runs here, and read those that are there")
    parser.add_argument("--launcher", default="", help="more flags of accelerate launch, such as '--dynamo_backend no'")
    parser.add_argument("--recipe", default="", help="more flags of the recipe")
    arguments = parser.parse_args(argv)
    if arguments.num_processes < 1:
        sys.exit("no accelerator here. To try this script out on CPUs: --num_processes 1 --yamls cpu --recipe --sample")
    names = chosen(arguments.yamls)
    if not names:
        sys.exit(f"--yamls {arguments.yamls}: none of {', '.join(chosen(['*']))}")
    print("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|", flush=True)
    baseline: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            history, end = run(name, arguments, Path(arguments.folder or temporary) / name)
            if name == names[0]:  # single_gpu.yaml, where it is among them
                baseline = losses(history)
            gpus = 1 if name in ONE_GPU else arguments.num_processes
            print(row(name, gpus, history, baseline), flush=True)
            if end:
                print(end, file=sys.stderr, flush=True)
    about = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{about}, torch {torch.__version__}, {arguments.steps} steps, deviation from {names[0]}.yaml")


def chosen(patterns: list[str]) -> list[str]:
    """Return the names of the YAMLs that match, the baseline first; the CPU's only if named."""
    every = sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml"))
    found = [
        name
        for name in every
        if name in patterns or (name not in NOT_HERE and any(fnmatch.fnmatch(name, p) for p in patterns))
    ]
    return sorted(found, key=lambda name: name != BASELINE)


def run(name: str, arguments: argparse.Namespace, folder: Path) -> tuple[list[dict], str]:
    """Launch the recipe with a YAML; return its logs, and the end of what it printed if it failed."""
    state = folder / "trainer_state.json"
    if state.exists():
        return json.loads(state.read_text(encoding="utf-8"))["log_history"], ""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", f"accelerate_configs/{name}.yaml"]
    command += ["--num_processes", str(1 if name in ONE_GPU else arguments.num_processes), *arguments.launcher.split()]
    command += ["recipes/wiki_zh_scratch.py", "--output_dir", str(folder), "--cache_dir", arguments.cache_dir]
    command += ["--data", *arguments.data] if arguments.data else []
    command += ["--tokenizer", arguments.tokenizer] if arguments.tokenizer else []
    command += ["--max_steps", str(arguments.steps), "--per_device_train_batch_size", str(arguments.rows)]
    command += "--optimizer adamw --learning_rate 1e-3 --logging_steps 1 --eval_strategy no --max_eval_rows 32".split()
    command += "--save_strategy no --swanlab off --disable_tqdm true".split() + arguments.recipe.split()
    environment = dict(os.environ)
    if name in ONE_GPU:  # with several visible, Trainer would take them all, the slow way
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=arguments.limit,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        output, failed = done.stdout, done.returncode != 0
    except subprocess.TimeoutExpired as error:
        output, failed = (error.stdout or b"").decode(errors="replace") + "\nnot done in time", True
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"] if state.exists() else []
    return history, f"{name}:\n{output[-3000:]}" if failed or not history else ""


def losses(history: list[dict]) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def row(name: str, gpus: int, history: list[dict], baseline: dict[int, float]) -> str:
    """Return a line of the table."""
    found = losses(history)
    first = next((entry for entry in history if "loss" in entry), None)
    warm = [entry for entry in history if "loss" in entry and entry["step"] > WARM_STEPS]
    if not warm:
        return f"| {name} | {gpus} | failed" + " |" * (len(HEADS) - 2)
    shared = [abs(found[step] / baseline[step] - 1) for step in found.keys() & baseline.keys()]
    mfu = [entry["mfu"] for entry in warm if "mfu" in entry]
    cells = [
        name,
        gpus,
        f"{statistics.median(entry['tokens_per_second_per_device'] for entry in warm):,.0f}",
        f"{statistics.median(mfu):.1%}" if mfu else "-",
        f"{max(entry['memory_peak_gib'] for entry in warm):.1f}",
        f"{found[min(found)]:.4f}",
        f"{found[max(found)]:.4f}",
        f"{max(shared):.4%}" if shared else "-",
        f"{first['train_seconds']:.1f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
