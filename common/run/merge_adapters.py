"""Merge adapters into the model that they were trained with, and save one ordinary model."""

import json
import shutil
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from common.console import InputError, say
from common.model.adapters import MERGED
from common.model.pretrained import files_fingerprint, model_without_memory, pretrained_model, weights_fingerprint
from common.run.checkpoints import checkpoints, move_into, problem_of, unfinished, why_not_written
from common.run.folder import RESULTS_FILE, RUN_FILE
from common.run.lock import lock_folder, read_status
from common.system import GIB

ADAPTER = "adapter_model.safetensors"
WHOLE = "config.json"  # is moved into the merged checkpoint last
AGAIN = "merge with the same command"


def is_merged(run_folder: str) -> bool:
    """Whether the newest adapter of the run in ``run_folder`` is merged, and the merged checkpoint whole."""
    adapter, merged = Path(run_folder) / ADAPTER, Path(run_folder) / MERGED / WHOLE
    return merged.exists() and merged.stat().st_mtime >= adapter.stat().st_mtime


def save_merged(place: str, run_folder: str) -> str:
    """Merge the adapter of the finished run in ``run_folder`` into the weights at ``place``; return the new folder.

    A merged checkpoint that is there is written over only when all of this is checked and the new one is whole.

    The weights are loaded into main memory without quantization, in the dtype that they had in the run.

    Args:
        place: a local folder with the base model's weights.

    Raises:
        InputError: the run is not finished, main memory or the disk is too small, or the adapter was trained with other
            weights.
    """
    run = Path(run_folder)
    _lock = lock_folder(run_folder) if run.is_dir() else None  # held until this function returns, or by a run longer
    _check_finished(run)
    described = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))["model"]
    dtype = getattr(torch, described["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(run_folder)
    _check_memory(place, run_folder, dtype)
    base = pretrained_model(place, tokenizer, 1, dtype)
    if not _trained_with(base, place, described):
        raise InputError(
            f"--model {place}: the adapter in {run_folder} was trained with other weights than these. Give the "
            f"weights of the run; those in {run / MERGED} have the adapter in them already."
        )
    merged = _merge(base, run_folder)
    merged.to(dtype)  # a trained embedding is in fp32
    aside = unfinished(run, MERGED)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        merged.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    except Exception as error:  # a full disk raises other exceptions in other libraries
        problem = why_not_written(error, run, "writing the merged checkpoint")
        if problem is None:
            raise
        shutil.rmtree(aside, ignore_errors=True)
        raise InputError(f"{run}: {problem}. The adapter and the results are saved; {AGAIN}.") from None
    move_into(aside, run / MERGED, last=WHOLE)
    return str(run / MERGED)


def _check_finished(run: Path) -> None:
    """Raise InputError unless the run in the folder ``run`` is finished, and was not continued since then."""
    # Only one process merges, so nothing here may wait for the other processes.
    newest = max((step for step, path in checkpoints(run) if problem_of(path) is None), default=0)
    results = run / RESULTS_FILE
    whole = results.exists() and (run / ADAPTER).exists()
    steps = json.loads(results.read_text(encoding="utf-8")).get("steps", 0) if whole else 0
    status = read_status(run)
    if whole and newest <= steps and (status is None or status["state"] == "finished"):
        return
    reached = f"its newest checkpoint is of step {newest}" if newest else "it has no whole checkpoint"
    raise InputError(
        f"{run}: no finished run of LoRA, {reached}. Its learning rate has not decayed to the end. Finish the run with "
        "the same command without --merge_only, or end it early: give --max_steps the step of its newest checkpoint."
    )


def _trained_with(base: PreTrainedModel, place: str, described: dict) -> bool:
    """Whether ``base``, loaded from ``place``, has the weights of the run that is ``described`` in its run.json."""
    if described["method"] == "lora":
        return weights_fingerprint(base) == described["weights"]
    if "files" in described:  # of QLoRA, whose loaded weights are in 4 bits
        return files_fingerprint(place) == described["files"]
    return weights_fingerprint(base.get_input_embeddings()) == described["embedding"]  # runs before "files" was there


def _check_memory(place: str, run_folder: str, dtype: torch.dtype) -> None:
    """Raise InputError if main memory is too small for all weights of the model at ``place`` in ``dtype``."""
    needed = model_without_memory(place).num_parameters() * dtype.itemsize / GIB
    free = psutil.virtual_memory().available / GIB
    name = str(dtype).removeprefix("torch.")
    say(f"merging needs {needed:.1f} GiB of main memory for all weights in {name}; {free:.1f} GiB are free")
    if free < needed:
        raise InputError(
            f"{run_folder}: the adapter is saved, but not merged: {needed:.1f} GiB of main memory are needed, "
            f"{free:.1f} free. Free some memory, or copy the folder to a larger machine. Then {AGAIN} and "
            "--merge_only."
        )


def _merge(base: PreTrainedModel, run_folder: str) -> PreTrainedModel:
    """Return ``base`` with the adapter in ``run_folder`` added to its weights."""
    adapted = PeftModel.from_pretrained(base, run_folder)
    embedding_was_trained = getattr(base.get_input_embeddings(), "modules_to_save", None)
    if embedding_was_trained and base.config.tie_word_embeddings:
        # Only the embedding was trained, not the output layer. They have different values now, so untie them.
        head = base.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = False
    return adapted.merge_and_unload()
