"""One output folder, one run: what the run is, where it stopped, and whether it is finished."""

import json
import math
import shutil
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from common.arguments import SharedArguments
from common.messages import InputError, say

RUN_FILE, RESULTS_FILE = "run.json", "all_results.json"
# What decides the losses. Anything else (logging, saving, micro-batch) may change at a relaunch; the number of steps,
# too, which moves the learning-rate schedule: PretrainingTrainer says so.
DECIDING = [
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "seed", "data_seed", "bf16", "fp16",
]  # fmt: skip
DECIDING_ROWS = [
    "context_length", "packing", "held_out_fraction", "split", "keep_duplicates", "data_weights",
]  # fmt: skip


def run_identity(recipe: str, model: dict, data: dict, arguments: SharedArguments, training: TrainingArguments) -> dict:
    """Describe a run by what decides its losses, as JSON types."""
    rows = {name: getattr(arguments, name) for name in DECIDING_ROWS}
    values = training.to_dict()
    return {
        "recipe": recipe,
        "model": model,
        "data": data | rows,
        "training": {name: values[name] for name in DECIDING},
    }


def claim_output_folder(folder: str, identity: dict) -> None:
    """Make ``folder`` this run's, or check that it already is.

    Raises:
        InputError: another run's checkpoints or results are in it; every difference is named.
    """
    path = Path(folder) / RUN_FILE
    identity = json.loads(json.dumps(identity))
    worth_keeping = bool(_checkpoints(folder)) or (Path(folder) / RESULTS_FILE).exists()
    if worth_keeping and path.exists():
        _refuse_another_run(folder, _read_json(path), identity)
    elif worth_keeping:
        raise InputError(
            f"{folder} holds checkpoints or results but no {RUN_FILE}: not a run of these recipes. Choose another "
            "--output_dir."
        )
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(identity, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)


def check_folder(folder: str, recipe: str, arguments: SharedArguments, training: TrainingArguments) -> str:
    """Return what ``folder`` holds of this run, by what is known before data and model are.

    Raises:
        InputError: another recipe's run, or one with other flags, is in it.
    """
    path = Path(folder) / RUN_FILE
    checkpoints = sorted(step for step, _ in _checkpoints(folder))
    if not path.exists() or not (checkpoints or (Path(folder) / RESULTS_FILE).exists()):
        return f"{folder}, a new run"
    known = json.loads(json.dumps(run_identity(recipe, {}, {}, arguments, training)))
    was = _read_json(path)
    was = {"recipe": was.get("recipe"), "training": was.get("training"), "model": {}} | {
        "data": {name: was.get("data", {}).get(name) for name in DECIDING_ROWS}
    }
    _refuse_another_run(folder, was, known)
    return f"{folder}, " + (f"to be continued from step {checkpoints[-1]}" if checkpoints else "with results")


def _refuse_another_run(folder: str, was: dict, now: dict) -> None:
    if differences := _differences(was, now):
        raise InputError(
            f"{folder} holds another run; relaunching there continues it, and these differ:\n"
            + "\n".join(f"  {name}: {old!r} in the folder, {new!r} now" for name, old, new in differences)
            + "\nGo back to the old values, or choose another --output_dir."
        )


def check_disk_space(folder: str, parameters: int, training: TrainingArguments) -> None:
    """Raise InputError if the checkpoints that will be kept, and the one being written, do not fit the disk.

    A checkpoint takes 12 bytes a parameter (weights and two AdamW states in float32), the final model 4. Without a
    limit on checkpoints, and with steps that are not counted yet (max_steps -1), it is asked again later.
    """
    if training.save_strategy == "no":
        checkpoints = 0
    elif training.save_total_limit is None and training.max_steps < 0:
        checkpoints = 2
    elif training.save_total_limit is None:
        interval = training.save_steps if training.save_steps >= 1 else training.save_steps * training.max_steps
        checkpoints = math.ceil(training.max_steps / interval)
    else:
        checkpoints = training.save_total_limit + 1
    needed, free = parameters * (12 * checkpoints + 4), shutil.disk_usage(_existing(folder)).free
    # A continued run's checkpoints are there already, and make room for the next ones.
    free += sum(file.stat().st_size for _, path in _checkpoints(folder) for file in path.rglob("*") if file.is_file())
    if free < needed:
        raise InputError(
            f"{folder}: {free / 2**30:.2f} GiB to be had, {needed / 2**30:.2f} needed for {checkpoints} checkpoints of "
            f"{parameters * 12 / 2**30:.2f} and the model. Make room, choose another --output_dir, or keep fewer "
            "checkpoints: --save_total_limit 1, or --save_strategy no."
        )


def _existing(folder: str) -> Path:
    """Return ``folder``, or the nearest folder above it that there is."""
    path = Path(folder).absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def last_checkpoint(folder: str) -> str | None:
    """Return the newest whole checkpoint of ``folder``, or None, the same on every process.

    Half-written ones are passed over, and named: Trainer writes ``trainer_state.json`` last, so a checkpoint without a
    readable one was cut off while saving.

    Raises:
        InputError: the main process has a checkpoint that this one does not see.
    """
    [checkpoint] = broadcast_object_list([_newest_whole_checkpoint(folder)])
    if checkpoint is not None and not Path(checkpoint).exists():
        raise InputError(f"{checkpoint} is not on this machine: --output_dir must be shared by all machines.")
    return checkpoint


def _newest_whole_checkpoint(folder: str) -> str | None:
    for step, path in sorted(_checkpoints(folder), reverse=True):
        try:
            if json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"] == step:
                say(f"continuing from {path}")
                return str(path)
        except (OSError, ValueError, KeyError):
            pass
        say(f"passing over {path}: half-written")
    return None


def finished_results(folder: str, max_steps: int, tokens: int) -> dict | None:
    """Return the results of a run that made its ``max_steps`` steps or trained its ``tokens``, else None."""
    path = Path(folder) / RESULTS_FILE
    results = _read_json(path) if path.exists() else {}
    reached = results.get("steps") == max_steps or results.get("ledger", {}).get("tokens_trained") == tokens
    [results] = broadcast_object_list([results if reached and "eval_loss" in results else None])
    return results


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}). Repair or remove it, or choose another --output_dir.") from None


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
