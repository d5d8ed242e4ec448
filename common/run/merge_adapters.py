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
from common.model.pretrained import model_without_memory, pretrained_model, weights_fingerprint
from common.run.checkpoints import UNFINISHED, move_into, newest_whole, no_space_left
from common.run.folder import RESULTS_FILE, RUN_FILE
from common.run.lock import lock_folder
from common.system import GIB


def save_merged(place: str, run_folder: str) -> str:
    """Merge the adapter of the finished run in ``run_folder`` into the weights at ``place``; return the new folder.

    The weights are loaded into main memory without quantization, in the dtype that they had in the run.

    Args:
        place: a local folder with the base model's weights.

    Raises:
        InputError: the run is not finished, main memory or the disk is too small, or the adapter was trained with other
            weights.
    """
    run = Path(run_folder)
    if not ((run / RESULTS_FILE).exists() and (run / "adapter_config.json").exists()):
        # Only one process merges, so this must not be a function that waits for the other processes.
        checkpoint = newest_whole(run_folder)
        found = Path(checkpoint).name if checkpoint else "part of one, or nothing"
        raise InputError(
            f"{run_folder}: no finished run of LoRA, only {found}. Its learning rate has not decayed to the end. "
            "Finish the run with the same command without --merge_only, or end it early: give --max_steps the step of "
            "its newest checkpoint."
        )
    _lock = lock_folder(run_folder)  # held until this function returns; a run that calls this holds it longer
    described = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))["model"]
    dtype = getattr(torch, described["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(run_folder)
    _check_memory(place, run_folder, dtype)
    base = pretrained_model(place, tokenizer, 1, dtype)
    if weights_fingerprint(base.get_input_embeddings()) != described["embedding"]:
        raise InputError(f"--model {place}: the adapter in {run_folder} was trained with other weights than these.")
    merged = _merge(base, run_folder)
    merged.to(dtype)  # a trained embedding is in fp32
    unfinished = run / UNFINISHED / MERGED  # the folder gets its final name when it is whole
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        merged.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    except Exception as error:  # a full disk raises other exceptions in other libraries
        if not no_space_left(error, run):
            raise
        shutil.rmtree(unfinished, ignore_errors=True)
        raise InputError(
            f"{run}: no space left while writing the merged checkpoint ({error}). The adapter and the results are "
            "saved. Make room, and merge with the same command and --merge_only."
        ) from None
    move_into(unfinished, run / MERGED)
    return str(run / MERGED)


def _check_memory(place: str, run_folder: str, dtype: torch.dtype) -> None:
    """Raise InputError if main memory is too small for all weights of the model at ``place`` in ``dtype``."""
    needed = model_without_memory(place).num_parameters() * dtype.itemsize / GIB
    free = psutil.virtual_memory().available / GIB
    name = str(dtype).removeprefix("torch.")
    say(f"merging needs {needed:.1f} GiB of main memory for all weights in {name}; {free:.1f} GiB are free")
    if free < needed:
        raise InputError(
            f"{run_folder}: the adapter is saved, but not merged: {needed:.1f} GiB of main memory are needed, "
            f"{free:.1f} free. Free some memory, or copy the folder to a larger machine. Then use the same command "
            "with --merge_only."
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
