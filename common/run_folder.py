"""One output folder, one run: what the run is, where it stopped, and whether it is finished."""

import json
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from common.messages import InputError, say

RUN_FILE = "run.json"
# What decides the losses. Anything else (logging, saving, micro-batch, number of steps) may change at a relaunch.
DECIDING = [
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "seed", "bf16", "fp16",
]  # fmt: skip


def run_identity(recipe: str, model: dict, data: dict, training: TrainingArguments) -> dict:
    """Describe a run by what decides its losses, as JSON types."""
    arguments = training.to_dict()
    return {"recipe": recipe, "model": model, "data": data, "training": {name: arguments[name] for name in DECIDING}}


def claim_output_folder(folder: str, identity: dict) -> None:
    """Make ``folder`` this run's, or check that it already is.

    Raises:
        InputError: another run's results are in it; every difference is named.
    """
    path = Path(folder) / RUN_FILE
    identity = json.loads(json.dumps(identity))
    if path.exists():
        differences = _differences(json.loads(path.read_text(encoding="utf-8")), identity)
        if differences:
            raise InputError(
                f"{folder} holds another run; relaunching there continues it, and these differ:\n"
                + "\n".join(f"  {name}: {was!r} in the folder, {now!r} now" for name, was, now in differences)
                + "\nGo back to the old values, or choose another --output_dir."
            )
    elif _checkpoints(folder):
        raise InputError(f"{folder} holds checkpoints but no {RUN_FILE}: not a run of these recipes. Choose another.")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(identity, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def last_checkpoint(folder: str) -> str | None:
    """Return the newest whole checkpoint of ``folder``, or None; say which half-written ones are passed over.

    Trainer writes ``trainer_state.json`` last, so a checkpoint without a readable one was cut off while saving.
    """
    for step, path in sorted(_checkpoints(folder), reverse=True):
        try:
            if json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"] == step:
                say(f"continuing from {path}")
                return str(path)
        except (OSError, ValueError, KeyError):
            pass
        say(f"passing over {path}: half-written")
    return None


def finished_results(folder: str, max_steps: int) -> dict | None:
    """Return the results of a run that already made its ``max_steps`` steps, else None."""
    path = Path(folder) / "all_results.json"
    if not path.exists():
        return None
    results = json.loads(path.read_text(encoding="utf-8"))
    return results if results.get("steps") == max_steps and "eval_loss" in results else None


def _checkpoints(folder: str) -> list[tuple[int, Path]]:
    found = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return [(int(step), path) for path in found if (step := path.name.rpartition("-")[2]).isdigit()]


def _differences(was: dict, now: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    """Return (dotted name, old value, new value) of every leaf that differs."""
    found = []
    for name in sorted({*was, *now}):
        old, new = was.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append((f"{prefix}{name}", old, new))
    return found
