"""Adapters and the model they belong to -> one ordinary model."""

import json
import shutil
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from common.console import InputError, say
from common.model.adapters import MERGED
from common.model.pretrained import model_without_memory, pretrained_model, weights_fingerprint
from common.run.checkpoints import UNFINISHED, move_into, newest_whole, no_space_left
from common.run.folder import RESULTS_FILE, RUN_FILE, lock_folder
from common.system import GIB


def save_merged(place: str, run_folder: str) -> str:
    """Add the adapter of the finished run in ``run_folder`` to the weights at ``place``; return the plain checkpoint.

    They are loaded unquantized, into main memory, in the dtype that the run had them in.

    Raises:
        InputError: the run is not finished, main memory is too small, or the adapter was trained beside other weights.
    """
    run = Path(run_folder)
    if not ((run / RESULTS_FILE).exists() and (run / "adapter_config.json").exists()):
        found = newest_whole(run_folder)  # one process merges: asking the others would wait for them
        raise InputError(
            f"{run_folder}: no finished run of LoRA, only {Path(found).name if found else 'part of one, or nothing'}. "
            "The learning rate of a part has not come down. Finish it by the same command without --merge_only, or end "
            "it where it is, with --max_steps of its checkpoint."
        )
    _lock = lock_folder(run_folder)  # until the end of this function, or of the run that calls it
    described = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))["model"]
    dtype, tokenizer = getattr(torch, described["dtype"]), AutoTokenizer.from_pretrained(run_folder)
    needed = model_without_memory(place).num_parameters() * dtype.itemsize / GIB
    free = psutil.virtual_memory().available / GIB
    say(f"merging takes {needed:.1f} GiB of main memory, for all weights in {described['dtype']}; {free:.1f} are free")
    if free < needed:
        raise InputError(
            f"{run_folder}: the adapter is there, but not merged: {needed:.1f} GiB of main memory are needed, "
            f"{free:.1f} free. Make room, or copy the folder to a machine that has it; then the same command with "
            "--merge_only"
        )
    base = pretrained_model(place, tokenizer, 1, dtype)
    if weights_fingerprint(base.get_input_embeddings()) != described["embedding"]:
        raise InputError(f"--model {place}: not the weights that the adapter in {run_folder} was trained beside.")
    adapted = PeftModel.from_pretrained(base, run_folder)
    if getattr(base.get_input_embeddings(), "modules_to_save", None) and base.config.tie_word_embeddings:
        # Only the input side was trained: from now on they are two.
        head = base.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = False
    merged = adapted.merge_and_unload()
    merged.to(dtype)  # a trained embedding is in fp32
    aside = run / UNFINISHED / MERGED  # half of it never has the name of the whole
    shutil.rmtree(aside, ignore_errors=True)
    try:
        merged.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    except Exception as error:  # any other than a full disk goes on up
        if not no_space_left(error, run):
            raise
        shutil.rmtree(aside, ignore_errors=True)
        raise InputError(
            f"{run}: no space left while writing the merged checkpoint ({error}). Make room, and merge by the same "
            "command with --merge_only; the adapter and the results are saved."
        ) from None
    move_into(aside, run / MERGED)
    return str(run / MERGED)
