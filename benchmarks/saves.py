"""Measure how long a checkpoint stops training on one GPU: written while training waits, and while it goes on.

    python benchmarks/saves.py --folder /a/folder/on/the/disk                # all variants, some 10 minutes on an H200
    python benchmarks/saves.py --variants 'tiny*' --steps 6                  # on a CPU

Each variant trains on random tokens in a process of its own, and saves twice. A stall is the time from the end of one
step to the moment at which training goes on. The first save also takes the memory that the copies are kept in. "waits"
is the way of a machine whose main memory has no room for a copy: everything is written before training goes on. Files
are synced, so the seconds until a checkpoint is whole are the disk's.
"""

import argparse
import fnmatch
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from gpu import JOBS, random_rows
from launching import circumstances, compact, launcher, one_gpu, result_of
from trainers import trainer_on
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainingArguments, set_seed

from common.distributed.launch import read_launch
from common.distributed.workarounds import shard_on_cpus
from common.model.attention import set_attention
from common.model.from_config import keep_residual_in_bf16
from common.model.fused_loss import use_fused_loss

TINY = dict(JOBS["123M"]["shape"], hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=4096)
SHAPES = {
    "tiny": dict(JOBS["123M"], shape=TINY, context_length=64, tokens_per_step=256, rows=4),
    "0.5B": dict(JOBS["0.5B"], rows=16),
    "7B": dict(JOBS["7B"], rows=1),  # weights in bf16, 8-bit AdamW: 4 bytes a parameter in a checkpoint
}
ONE, PARTS = "single_gpu.yaml", ["--fsdp_state_dict_type", "SHARDED_STATE_DICT"]
VARIANTS = {
    "tiny, waits": dict(job="tiny", yaml="cpu.yaml", waits=True),
    "tiny": dict(job="tiny", yaml="cpu.yaml"),
    "0.5B, waits": dict(job="0.5B", yaml=ONE, waits=True),
    "0.5B": dict(job="0.5B", yaml=ONE),
    "0.5B, FSDP2, waits": dict(job="0.5B", yaml="fsdp2.yaml", waits=True),
    "0.5B, FSDP2": dict(job="0.5B", yaml="fsdp2.yaml"),
    "0.5B, FSDP2, SHARDED_STATE_DICT": dict(job="0.5B", yaml="fsdp2.yaml", flags=PARTS),
    "7B, 8-bit AdamW, waits": dict(job="7B", yaml=ONE, waits=True),
    "7B, 8-bit AdamW": dict(job="7B", yaml=ONE),
}


class Clock(TrainerCallback):
    """Time the steps, the stalls of saves, and how long checkpoints are written in the background.

    The first save is at a third of the steps, the second at two thirds, when the first checkpoint is whole.
    """

    def __init__(self, trainer, steps: int):
        self.trainer, self.save, self.save_at = trainer, trainer._save_checkpoint, (steps // 3, 2 * steps // 3)
        trainer._save_checkpoint = self.timed_save
        self.alone, self.beside, self.stalls, self.whole = [], [], [], []  # seconds
        self.began_saving = None

    def timed_save(self, *arguments) -> None:
        began = self.began_saving = now()
        self.save(*arguments)
        self.stalls.append(now() - began)
        self.last = now()

    def on_train_begin(self, *_, **__):
        self.last = now()

    def on_step_end(self, args, state, control, **_):
        seconds = now() - self.last
        writing = self.trainer.run._saving is not None and not self.trainer.run._saving.done()
        if state.global_step > 2:  # warm
            (self.beside if writing else self.alone).append(seconds)
        control.should_save = state.global_step in self.save_at
        if state.global_step + 1 in (self.save_at[1], args.max_steps):
            self.trainer.run.end_save()
        self.last = now()


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def work(described: dict, steps: int, folder: str) -> dict:
    """Train one variant in this process; return its row of the table."""
    set_seed(0)
    job, launch = SHAPES[described["job"]], read_launch()
    rows_per_step = job["tokens_per_step"] // job["context_length"]
    training = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=job["rows"],
        gradient_accumulation_steps=rows_per_step // job["rows"], optim=job.get("optim", "adamw_torch_fused"),
        learning_rate=1e-5, logging_steps=1000, report_to="none", save_strategy="no", save_total_limit=1,
        disable_tqdm=True, **launch.defaults(),
    )  # fmt: skip
    shard_on_cpus(launch, training)
    shape = {**job["shape"], "max_position_embeddings": job["context_length"]}
    with torch.device(training.device):
        dtype = getattr(torch, job.get("dtype", "float32"))
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=dtype)
    data, parameters = random_rows(job, folder), model.num_parameters()
    set_attention(model, "auto", False, training.device)
    use_fused_loss(model)
    keep_residual_in_bf16(model)
    trainer = trainer_on(data, data, model, training, replace(launch, rows_per_step=rows_per_step, optimizer="adamw"))
    if described.get("waits"):
        trainer.saving.copies.have_room = lambda *_, **__: False
    clock = Clock(trainer, steps)
    trainer.add_callback(clock)
    finish = trainer.run._end_checkpoint

    def timed_end(*arguments) -> None:
        finish(*arguments)
        clock.whole.append(time.perf_counter() - clock.began_saving)

    trainer.run._end_checkpoint = timed_end
    trainer.train()
    trainer.run.release()
    [checkpoint] = Path(folder).glob("checkpoint-*")
    written = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    return {
        "parameters": parameters, "checkpoint_gb": written / 1e9, "first_stall_seconds": clock.stalls[0],
        "stall_seconds": clock.stalls[1], "seconds_until_whole": clock.whole[1],
        "step_seconds": statistics.median(clock.alone),
        "step_seconds_beside": statistics.median(clock.beside) if clock.beside else None,
    }  # fmt: skip


def table(found: dict[str, dict | str]) -> str:
    """Return ``found`` as a Markdown table."""
    lines = ["| variant | GB | first stall s | stall s | whole after s | step s | step s, while written |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, row in found.items():
        if isinstance(row, str):
            lines.append(f"| {name} | failed: {row} | | | | | |")
            continue
        beside = "-" if row["step_seconds_beside"] is None else f"{row['step_seconds_beside']:.2f}"
        lines.append(
            f"| {name} | {row['checkpoint_gb']:.2f} | {row['first_stall_seconds']:.2f} | {row['stall_seconds']:.2f} "
            f"| {row['seconds_until_whole']:.1f} | {row['step_seconds']:.2f} | {beside} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu_variants = [name for name in VARIANTS if not name.startswith("tiny")]
    parser.add_argument("--variants", nargs="+", default=gpu_variants, help="names or patterns, such as '0.5B*'")
    parser.add_argument("--steps", type=int, default=24, help="of each variant, at least 6")
    parser.add_argument("--folder", help="where checkpoints are written; removed at the end")
    parser.add_argument("--limit", type=float, default=300, help="seconds a variant may take")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.steps < 6:
        sys.exit(f"--steps {arguments.steps}: at least 6, for two warm ones and two saves.")
    if arguments.worker:
        result = work(VARIANTS[arguments.worker], arguments.steps, arguments.folder)
        Path(arguments.folder, "result.json").write_text(json.dumps(result))
        return
    chosen = [name for name in VARIANTS if any(fnmatch.fnmatch(name, pattern) for pattern in arguments.variants)]
    if not chosen:
        sys.exit(f"--variants {arguments.variants}: none of {', '.join(VARIANTS)}")
    print(json.dumps(circumstances()), flush=True)
    found = {}
    try:
        for name in chosen:
            found[name] = launch(name, VARIANTS[name], arguments)
            print(name, compact(found[name]), file=sys.stderr, flush=True)
    finally:  # also after Ctrl-C: print what was measured before it
        print(table(found), flush=True)


def launch(name: str, described: dict, arguments: argparse.Namespace) -> dict | str:
    """Run a variant in a process of its own; return its row, or an error message."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        command = [*launcher(described["yaml"]), "--num_processes", "1", *described.get("flags", [])]
        if described["yaml"] != "cpu.yaml":
            command += ["--dynamo_backend", "no"]
        command += [__file__, "--worker", name, "--folder", folder, "--steps", str(arguments.steps)]
        return result_of(command, folder, one_gpu(), arguments.limit)


if __name__ == "__main__":
    main()
