"""Make every run that needs four or eight GPUs of one machine, in one call, the most important first.

    python benchmarks/many_cards.py --cards 4 --data zh.jsonl en.jsonl --tokenizer qwen2.5-tokenizer --folder runs
    python benchmarks/many_cards.py --cards 8 --data zh.jsonl en.jsonl --tokenizer qwen2.5-tokenizer --folder runs
    python benchmarks/many_cards.py --cards 2 --rehearse --folder runs    # on CPU processes; --cards 4 for hybrid

Most runs are multi_gpu.py's: 30 steps of one job under each YAML, with the memory that --plan predicts. The pipeline
has a recipe of its own. The last run kills one process in the middle and continues on half as many cards. The output of
each is printed and kept in --folder/NAME.log. A run that fails or takes longer than --limit does not stop the others. A
second call goes on where the first ended: multi_gpu.py reads the runs that it kept.

Eight cards also run the shapes of PaddleNLP's table (8 x A100 80 GB, rows of 4,096, tokens a second and card):
Llama-2-7B 3,755, Llama-2-13B 1,976. Source: PaddleNLP's llm/docs/pretrain.rst.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from launching import ROOT, launcher, run

STEPS, KILLED_AT = 30, 12
ON_CPUS = "--mixed_precision no --dynamo_backend no"
SAMPLE = f"--data {ROOT / 'data' / 'sample_zh.jsonl'} --tokenizer train --vocabulary_size 1000 --context_length 64"
SAMPLE += " --tokens_per_step 1024 --max_eval_rows 4"
TINY = dict(
    model_type="qwen2", hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
TINY_EXPERTS = TINY | dict(
    model_type="qwen3_moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
    output_router_logits=True, router_aux_loss_coef=0.01,
)  # fmt: skip


def runs_of(cards: int) -> dict[str, list[str]]:
    """Return the arguments of multi_gpu.py for every run with so many cards, by name."""
    half = cards // 2
    two_by = f"--parallelism_config_dp_shard_size {half}"
    hybrid = ["--launcher", f"--parallelism_config_dp_replicate_size 2 {two_by}"]
    plain = ["single_gpu", "ddp", "fsdp2", "zero2", "zero3"]
    found = {}
    for job in ("123M", "0.5B"):
        found[job] = ["--job", job, "--yamls", *plain]
        if half > 1:  # copies on one card each are ddp
            found[f"{job}, hybrid"] = ["--job", job, "--yamls", "hsdp", *hybrid]
        found[f"{job}, tensor 2 x shard"] = ["--job", job, "--yamls", "fsdp2_tensor_parallel", "--launcher", two_by]
        found[f"{job}, context 2 x shard"] = ["--job", job, "--yamls", "fsdp2_context_parallel", "--launcher", two_by]
    all_cards = ["--launcher", f"--parallelism_config_dp_shard_size {cards}"]
    experts = ["--recipe", "--model qwen3-moe-a60m"]
    found["experts"] = ["--job", "123M", "--yamls", "single_gpu", "fsdp2", "expert_parallel", *all_cards, *experts]
    found["7B"] = ["--job", "7B", "--yamls", "fsdp2", "zero3", "zero2_recompute"]
    found["7B, tensor 2 x shard"] = ["--job", "7B", "--yamls", "fsdp2_tensor_parallel", "--launcher", two_by]
    tensor = f"--parallelism_config_tp_size {cards} --parallelism_config_dp_shard_size 1"
    found["7B, tensor"] = ["--job", "7B", "--yamls", "tensor_parallel", "--launcher", tensor]
    if cards == 8:
        large = ["--job", "7B", "--yamls", "fsdp2", "fsdp2_recompute", "--recipe", "--model llama-2-13b"]
        found["13B"] = large
        weak = ["--job", "123M", "--yamls", "ddp", "fsdp2", "--recipe", f"--tokens_per_step {131_072 * cards}"]
        found["123M, weak scaling"] = weak
    return found


def multi_gpu(name: str, wanted: list[str], arguments: argparse.Namespace) -> list[str]:
    """Return the command of a run of multi_gpu.py."""
    steps = 8 if arguments.rehearse else 12 if "7B" in wanted else STEPS
    command = [sys.executable, str(ROOT / "benchmarks" / "multi_gpu.py"), *wanted, "--steps", str(steps), "--plan"]
    command += ["--num_processes", str(arguments.cards), "--folder", str(arguments.folder / name.replace(" ", "_"))]
    if arguments.rehearse:
        command = with_more(command, "--launcher", ON_CPUS)
        small = f"{SAMPLE} --model {arguments.folder / ('tiny_experts' if name == 'experts' else 'tiny')}"
        return [*with_more(command, "--recipe", small), "--rows", "2", "--limit", str(arguments.limit)]
    return [*command, "--data", *arguments.data, *(["--tokenizer", arguments.tokenizer] if arguments.tokenizer else [])]


def with_more(command: list[str], flag: str, words: str) -> list[str]:
    """Return ``command`` with ``words`` added to the value of ``flag``, given as one word to argparse."""
    command = list(command)
    value = words
    if flag in command:
        place = command.index(flag)
        value = f"{command[place + 1]} {words}"
        del command[place : place + 2]
    return [*command, f"{flag}={value}"]


def recipe_run(yaml: str, cards: int, recipe: str, flags: str, arguments: argparse.Namespace) -> list[str]:
    """Return the command of a recipe that is launched by itself."""
    words = [*(ON_CPUS.split() if arguments.rehearse else []), "--num_processes", str(cards)]
    own = f"--sample {SAMPLE}" if arguments.rehearse else f"--cache_dir {arguments.folder / 'cache'}"
    command = [*launcher(yaml), *words, str(ROOT / "recipes" / recipe), *flags.split(), *own.split()]
    if not arguments.rehearse:
        command += ["--data", *arguments.data]
    return [*command, "--max_steps", str(STEPS), "--logging_steps", "1"]


def kill_and_continue(arguments: argparse.Namespace) -> str:
    """Train under FSDP2, kill one process in the middle, continue on half as many; return what happened."""
    folder = arguments.folder / "killed"
    flags = f"--output_dir {folder} --save_steps 5 --eval_strategy no --swanlab off"
    yaml = "cpu_fsdp2.yaml" if arguments.rehearse else "fsdp2.yaml"
    command = recipe_run(yaml, arguments.cards, "wiki_zh_scratch.py", flags, arguments)
    with (arguments.folder / "killed.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        ends = time.time() + arguments.limit
        while step_of(folder) < KILLED_AT and process.poll() is None and time.time() < ends:
            time.sleep(0.2)
        workers = [
            each for each in psutil.Process(process.pid).children(recursive=True) if "--output_dir" in each.cmdline()
        ]
        if not workers:
            process.kill()
            return f"no process to kill at step {step_of(folder)}; see killed.log"
        os.kill(workers[-1].pid, signal.SIGKILL)
        killed = step_of(folder)
        process.wait(arguments.limit)
    command = recipe_run(yaml, max(1, arguments.cards // 2), "wiki_zh_scratch.py", flags, arguments)
    output, failure = run(command, dict(os.environ), arguments.limit, cwd=ROOT)
    (arguments.folder / "continued.log").write_text(output, encoding="utf-8")
    return f"killed at step {killed} on {arguments.cards}, then {failure or 'finished'} at step {step_of(folder)}"


def step_of(folder: Path) -> int:
    """Return the step that a run's status.json names; 0 if there is none."""
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError):
        return 0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, required=True)
    parser.add_argument("--data", nargs="+", help="as the recipe's")
    parser.add_argument("--tokenizer", help="as the recipe's")
    parser.add_argument("--folder", type=Path, required=True, help="where runs and outputs are kept")
    parser.add_argument("--only", nargs="*", help="names of runs; default: all")
    parser.add_argument("--limit", type=float, default=420, help="seconds a run may take")
    parser.add_argument("--rehearse", action="store_true", help="on CPU processes, with the bundled sample")
    arguments = parser.parse_args(argv)
    if not (arguments.data or arguments.rehearse):
        sys.exit("--data: the text to train on is needed, or --rehearse.")
    arguments.folder = arguments.folder.resolve()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.rehearse:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        for name, shape in (("tiny", TINY), ("tiny_experts", TINY_EXPERTS)):
            (arguments.folder / name).mkdir(exist_ok=True)
            (arguments.folder / name / "config.json").write_text(json.dumps(shape))
    commands = {name: multi_gpu(name, wanted, arguments) for name, wanted in runs_of(arguments.cards).items()}
    for stages in sorted({2, arguments.cards}):
        flags = f"--pipeline_processes {stages} --output_dir {arguments.folder / f'pipeline_{stages}'}"
        commands[f"pipeline {stages}"] = recipe_run(
            "ddp.yaml", arguments.cards, "explicit_pipeline.py", flags, arguments
        )
    for name, command in commands.items():
        if arguments.only and name not in arguments.only:
            continue
        began = time.time()
        output, failure = run(command, dict(os.environ), arguments.limit, cwd=ROOT)
        (arguments.folder / f"{name}.log").write_text(output, encoding="utf-8")
        print(f"## {name}: {failure or 'done'}, {time.time() - began:.0f} s\n{output[-3000:]}", flush=True)
    if not arguments.only or "kill" in arguments.only:
        print(f"## kill: {kill_and_continue(arguments)}", flush=True)


if __name__ == "__main__":
    main()
