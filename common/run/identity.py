"""What a run is: all that decides what it trains, as run.json keeps it; and what of it may change at a relaunch."""

import json
from collections.abc import Sequence
from dataclasses import fields

from transformers import PreTrainedTokenizerBase, TrainingArguments

from common.arguments import SharedArguments
from common.console import InputError
from common.dataset.rows import Rows
from common.distributed.launch import Launch, precision_of
from common.tokens.tokenizer import tokenizer_fingerprint
from common.trainer_fields import deciding_fields, default_of

RUN_FILE = "run.json"
# Shared flags that run.json has under their own names. The others are there by what they make (documents, tokenizer,
# rows a step, optimizer), or stand below.
SHARED_NOT_DECIDING = {
    "allow_changes": "what may change",
    "attn_implementation": "the same numbers, up to rounding",
    "cache_dir": "where tokens are kept",
    "cuda_graph": "the same numbers",
    "data": "run.json has the documents",
    "encoding": "run.json has the documents",
    "end_token": "run.json has the tokenizer",
    "eval_tasks": "what is measured, not what is trained",
    "eval_tasks_every": "when to measure",
    "init_from": "run.json has it where the recipe reads it",
    "language": "what is shown",
    "max_bad_steps": "when a run gives up",
    "max_eval_rows": "what is measured, not what is trained; the results have the number of tokens",
    "on_loss_spike": "bad_steps.jsonl has the steps that were left out",
    "on_save_error": "what a full disk does",
    "optimizer": "run.json has the one that was chosen",
    "plan": "a plan trains nothing",
    "plan_config": "a plan trains nothing",
    "plan_json": "a plan trains nothing",
    "plan_memory_gib": "a plan trains nothing",
    "plan_processes": "a plan trains nothing",
    "probe": "a probe keeps nothing",
    "recompute": "the same numbers, computed twice",
    "save_minutes": "when to save",
    "skip_malformed": "run.json has the documents",
    "swanlab": "what is logged where",
    "text_field": "run.json has the documents",
    "tokenizer": "run.json has the tokenizer",
    "tokens_per_step": "run.json has the rows of a step",
    "vocabulary_size": "run.json has the tokenizer",
}
DECIDING_ROWS = [each.name for each in fields(SharedArguments) if each.init and each.name not in SHARED_NOT_DECIDING]
BY_YAML = "with a YAML of another precision, --init_from the checkpoint into a new --output_dir"
# What a run cannot be continued with -> why. --allow_changes takes any other name.
FIXED = {
    "recipe": "each recipe has checkpoints of its own",
    "model": "the checkpoint has the weights of the other model",
    "data.tokenizer": "the same ids would be other text",
    "data.context_length": "the model is made for it",
    "data.held_out_fraction": "documents that were trained on would be held out",
    "data.split": "documents that were trained on would be held out",
    "data.retained": "what was measured before is of the other documents",
    "data.init_from": "the run has started from it already",
    "data.branch_from": "the run has branched off already",
    "data.optimizer": "the checkpoint has the states of the other optimizer",
    "data.launch": "the checkpoint has the states of the other launch",
    "training.bf16": BY_YAML,
    "training.fp16": BY_YAML,
    "training.fp8": BY_YAML,
    "training.optim": "the checkpoint has the states of the other optimizer",
    "training.optim_args": "the checkpoint has the states of the other optimizer",
    "training.optim_target_modules": "the checkpoint has the states of the other optimizer",
}
OTHER_ORDER = ("training.seed", "training.data_seed", "data.documents", "data.data_weights", "data.keep_duplicates")
ROWS_OF_ITS_OWN = "best_fit"  # cross and isolated have the same rows
BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")  # schedules that keep the rate itself as a state
RATE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")


def has_other_order(name: str, was: object, now: object) -> bool:
    """Whether rows are others, or in another order, if ``name`` in run.json ``was`` something else."""
    return name in OTHER_ORDER or (name == "data.packing" and ROWS_OF_ITS_OWN in (was, now))


def run_identity(
    recipe: str,
    model: dict,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    launch: Launch,
    shared: SharedArguments,
    training: TrainingArguments,
    more_data: dict,
) -> dict:
    """Describe a run by what decides its losses, as JSON types.

    Args:
        recipe: the file's name.
        model: what the model is built from: a shape, or the fingerprint of weights.
        more_data: what else of this recipe decides what is trained on, and how.
    """
    data = {
        "documents": rows.fingerprints,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "rows_per_step": launch.rows_per_step,
        **more_data,
        **deciding_rows(shared),
    }
    return {"recipe": recipe, "model": model, "data": data, "training": deciding_training(training)}


def deciding_rows(shared: SharedArguments) -> dict:
    """Return the shared flags that decide what is trained on."""
    return {name: getattr(shared, name) for name in DECIDING_ROWS}


def deciding_training(training: TrainingArguments) -> dict:
    """Return the fields of TrainingArguments that decide how it is trained on."""
    values = training.to_dict()
    deciding = {name: values[name] for name in deciding_fields()}
    if precision_of(training) == "fp8":  # which TrainingArguments call bf16
        deciding["fp8"] = True
    return deciding


def check_changes(folder: str, was: dict, now: dict, allow_changes: Sequence[str]) -> list[tuple[str, object, object]]:
    """Return what differs and may; refuse what may not."""
    found = changes(was, now)
    reasons = {name: why_fixed(name, was, now) for name, _, _ in found}
    fixed = {name: reason for name, reason in reasons.items() if reason is not None}
    refused = [change for change in found if change[0] in fixed or not _allowed(change[0], allow_changes)]
    if not refused:
        return found
    lines = []
    for name, old, new in refused:
        cannot = f" (cannot change: {fixed[name]})" if name in fixed else ""
        lines.append(f"  {name}: {old!r} in the folder, {new!r} now{cannot}")
    message = (
        f"{folder} holds another run; relaunching there continues it, and these differ:\n"
        + "\n".join(lines)
        + "\nGo back to the old values, or choose another --output_dir"
    )
    changeable = [name for name, _, _ in refused if name not in fixed]
    if fixed and changeable:
        message += f". Once what cannot change is back, --allow_changes {' '.join(changeable)} takes the rest"
    elif changeable:
        message += f", or continue with the new ones:\n  --allow_changes {' '.join(changeable)}"
    raise InputError(message)


def changes(was: dict, now: dict) -> list[tuple[str, object, object]]:
    """Return (dotted name, old value, new value) of all that differs between two runs, as run.json has them."""
    # A run that was started before a field was there, or before it was recorded, has trained with the field's default.
    defaults = {each.name: default_of(each) for each in fields(TrainingArguments)}
    recorded = {name: defaults.get(name) for name in now.get("training", {})} | was.get("training", {})
    return differences(was | {"training": recorded}, {"training": {}} | now)


def known_early(was: dict, recipe: str, shared: SharedArguments, training: TrainingArguments) -> tuple[dict, dict]:
    """Return what is known of a run before its data and model are, as run.json has it: in ``was``, and of this run."""
    now = {"recipe": recipe, "data": deciding_rows(shared), "training": deciding_training(training)}
    was = {
        "recipe": was.get("recipe"),
        "data": {name: was.get("data", {}).get(name) for name in DECIDING_ROWS},
        "training": was.get("training", {}),
    }
    return was, json.loads(json.dumps(now))


def why_fixed(name: str, was: dict, now: dict) -> str | None:
    """Return why a run cannot be continued with another ``name``, a dotted name in run.json; None if it can."""
    for fixed, reason in FIXED.items():
        if _allowed(name, [fixed]):
            return reason
    if name == "data.documents" and now.get("data", {}).get("split") is not None:
        return FIXED["data.split"]
    schedules = [identity.get("training", {}).get("lr_scheduler_type") for identity in (was, now)]
    if name.startswith("training.") and name.split(".")[1] in RATE and any(kind in BY_EVALUATION for kind in schedules):
        return "the checkpoint has the rate that this schedule has come to"
    return None


def _allowed(name: str, allow_changes: Sequence[str]) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in allow_changes)


def differences(was: dict, now: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    """Return (dotted name, old value, new value) of every leaf that differs."""
    found = []
    for name in sorted({*was, *now}):
        old, new = was.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append((f"{prefix}{name}", old, new))
    return found
