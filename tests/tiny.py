"""A run small enough to be killed a hundred times: a model of 140,000 numbers, and a record of everything it does."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401
import peft  # noqa: F401
import torch
from conftest import ROOT, load_recipe, small_run

import common.run.results  # noqa: F401  (imported before the fork, all is there at once)
from common.distributed.strategy import whole

with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
SHAPE = dict(
    model_type="qwen2", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=True, vocab_size=4096, attention_dropout=0.1,
)  # fmt: skip


def tiny_run(cache_dir: Path, output_dir: Path, *flags: str) -> list[str]:
    """Return the flags of a tiny run; its config is in the cache. It has dropout, so that it needs its random state."""
    folder = Path(cache_dir) / "tiny"
    folder.mkdir(exist_ok=True)
    if not (folder / "config.json").exists():
        partial = folder / f"{os.getpid()}.partial"
        partial.write_text(json.dumps(SHAPE))
        partial.replace(folder / "config.json")
    own = "--save_total_limit 2 --eval_steps 25 --save_steps 5 --attn_implementation eager".split()
    return small_run(cache_dir, output_dir, "--model", str(folder), *own, *flags)


def run_recorded(argv: list[str], record: Path, moments: Path | None = None) -> None:
    """Run the recipe; append to ``record`` a line a step: loss, rate, hashes of batches, random state and weights.

    ``moments``: a file to which "step", "save" and "evaluate" are written as they begin, for whoever aims at them.
    """
    recipe = load_recipe("wiki_zh_scratch")

    def note(moment: str) -> None:
        if moments is not None:
            with open(moments, "a") as file:
                file.write(f"{moment}\n")

    class Recorded(recipe.PretrainingTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            self.seen = getattr(self, "seen", [])
            self.seen.append(digest(inputs["input_ids"], inputs["shift_labels"]))
            return super().training_step(model, inputs, *args, **kwargs)

        def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, *args, **kwargs):
            if self.seen:
                entry = {"step": self.state.global_step, "loss": tr_loss.item(), "batches": self.seen, "rank": rank()}
                entry |= {"rate": self.lr_scheduler.get_last_lr(), "random": digest(torch.get_rng_state())}
                entry |= {"weights": digest(*model.state_dict().values()), "grad_norm": float(grad_norm)}
                with open(f"{record}.{rank()}", "a") as file:
                    file.write(json.dumps(entry) + "\n")
                self.seen = []
            note("step")
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kwargs)

        def _save_checkpoint(self, *args, **kwargs):
            note("save")
            super()._save_checkpoint(*args, **kwargs)

        def evaluate(self, *args, **kwargs):
            note("evaluate")
            return super().evaluate(*args, **kwargs)

        def save_model(self, output_dir=None, _internal_call=False):
            if not _internal_call:
                note("end")
            super().save_model(output_dir, _internal_call)

    recipe.PretrainingTrainer = Recorded
    recipe.main(argv)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def digest(*tensors: torch.Tensor) -> str:
    """Return the same digits for the same numbers, however they are divided among processes."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in map(whole, tensors):
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def recorded(record: Path, rank: int = 0) -> dict[int, list[dict]]:
    """Return the entries of every step, as often as it was made. A line that a kill cut off was not finished."""
    steps: dict[int, list[dict]] = {}
    for line in Path(f"{record}.{rank}").read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        steps.setdefault(entry["step"], []).append(entry)
    return steps


def start(argv: list[str], folder: Path) -> multiprocessing.Process:
    """Run in a process of its own, forked from one that has imported everything, so that it starts at once.

    In ``folder`` are then ``record.0``, ``moments`` and ``log``.
    """
    os.environ |= {name: ENVIRONMENT[name] for name in ("OMP_NUM_THREADS", "PYTHONPATH")}  # for the one that forks
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tiny"])
    child = processes.Process(target=_run_forked, args=(argv, folder))
    child.start()
    return child


def _run_forked(argv: list[str], folder: Path) -> None:
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    run_recorded(argv, folder / "record", folder / "moments")


def wait_for(folder: Path, moment: str, child: multiprocessing.Process, count: int = 1) -> bool:
    """Wait until ``moment`` began ``count`` times; False if the process ended before."""
    moments = folder / "moments"
    while not moments.exists() or moments.read_text().split().count(moment) < count:
        if not child.is_alive():
            return False
        time.sleep(0.001)
    return True


if __name__ == "__main__":
    run_recorded(sys.argv[2:], Path(sys.argv[1]), Path(f"{sys.argv[1]}.moments") if rank() == 0 else None)
