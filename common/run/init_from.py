"""--init_from: continue from a checkpoint under another strategy.

A plain relaunch continues exactly, with optimizer and schedule, on any number of processes, if the checkpoint is of the
same kind: one process or DDP; FSDP2, tensor or expert parallelism; DeepSpeed (ZeRO-3: on the same number). In all other
cases --init_from takes over the weights, in fp32, and the place in the order of rows; optimizer and schedule start
anew.
"""

import contextlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from common.arguments import SharedArguments
from common.console import InputError, say
from common.distributed.launch import Launch
from common.run.checkpoints import named_as_in, problem_of, reading, saved_weights
from common.run.divided_states import SHARDS, whole_weights
from common.run.folder import RUN_FILE
from common.run.identity import DECIDING_ROWS

PARTS_OF = "FSDP2, tensor or expert parallelism, in parts"


def writer_of(checkpoint: str) -> tuple[str, int | None]:
    """Return what wrote a checkpoint: ("zero", number of processes), or "fsdp2", "parts", "plain" and None.

    "parts" is of FSDP2, tensor or expert parallelism: every process wrote its own part.
    """
    path = Path(checkpoint)
    shards = list(path.glob("global_step*/*_optim_states.pt"))  # DeepSpeed writes one for each process
    if shards:
        return "zero", len(shards)
    if (path / SHARDS).exists():
        return "parts", None
    sharded = list(path.glob("pytorch_model_fsdp*")) or (path / "optimizer.bin").exists()
    return ("fsdp2" if sharded else "plain"), None


def check_resumable(checkpoint: str, launch: Launch) -> None:
    """Check that this launch can read the optimizer's states in ``checkpoint``.

    Raises:
        InputError: it was written under another strategy, or by ZeRO-3 on another number of processes.
    """
    kind, processes = writer_of(checkpoint)
    if launch.strategy.is_deepspeed:
        readable = ("zero",)
    elif launch.divided:
        readable = ("parts",)
    elif launch.strategy.is_fsdp:
        readable = ("fsdp2", "parts")
    else:
        readable = ("plain",)
    # DeepSpeed (0.19) reads ZeRO-3's converted states with the first group's weight decay for all parameters, and one
    # count of steps that every part raises: load_hp_checkpoint_state_from_checkpoint_dir_stage3. No run would be exact.
    inexact = kind == "zero" and launch.strategy.zero_stage == 3 and processes != launch.processes
    if kind in readable and not inexact:
        return
    zero = f"DeepSpeed on {processes} processes" if inexact else "DeepSpeed"
    wrote = {"plain": "one process or DDP", "fsdp2": "FSDP2", "zero": zero, "parts": PARTS_OF}[kind]
    raise InputError(
        f"{checkpoint} was written under {wrote}; {launch.strategy} on {launch.processes} processes cannot read its "
        f"optimizer's states. Launch as before, or continue from its weights: --init_from {checkpoint} --output_dir NEW"
    )


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    """Return the weights in a checkpoint or output folder: tensor name -> tensor.

    A checkpoint of DeepSpeed gives the fp32 weights of its optimizer. All others give the tensors as they were saved.

    Raises:
        InputError: there are no weights, they cannot be read, or the checkpoint is not whole.
    """
    path = Path(folder)
    problem = problem_of(path) if path.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") else None
    if problem is not None:
        raise InputError(
            f"--init_from {folder}: {problem}. Give a whole checkpoint. If other software wrote it, rename the folder "
            f"so that its name does not begin with {PREFIX_CHECKPOINT_DIR}-."
        )
    if writer_of(folder)[0] == "zero":  # its model.safetensors has the weights in the precision of the forward pass
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(None):  # the library prints a line for each of its steps
            return get_fp32_state_dict_from_zero_checkpoint(folder)
    if not list(path.glob("model*.safetensors")) and (path / SHARDS).exists():
        with reading(path, "the weights"):
            return whole_weights(path)
    if not list(path.glob("model*.safetensors")):
        raise InputError(f"--init_from {folder}: no model*.safetensors there. Give a checkpoint-N or an output folder.")
    try:
        return saved_weights(path)
    except (OSError, SafetensorError) as error:  # cut off, or pruned meanwhile by the run it belongs to
        raise InputError(f"--init_from {folder}: its weights cannot be read ({error}).") from None


def load_start(model: PreTrainedModel, folder: str) -> None:
    """Load the weights in ``folder``, a checkpoint or output folder, into ``model``.

    Raises:
        InputError: a tensor is missing, has another shape, or does not belong to the model.
    """
    if model.device.type == "meta":
        return  # another process has the weights, and checks them
    weights = named_as_in(model, weights_of(folder))
    own = model.state_dict()
    shared = {name for name, tensor in own.items() if name not in weights and _is_tied(tensor, own, weights)}
    missing = own.keys() - weights.keys() - shared
    unknown = weights.keys() - own.keys()
    other = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if missing or unknown or other:
        raise InputError(
            f"--init_from {folder}: the checkpoint is of another model. Missing tensors: {sorted(missing)[:3]}, "
            f"unknown: {sorted(unknown)[:3]}, of another shape: {sorted(other)[:3]}. Use the shape and the tokenizer "
            "that the checkpoint was trained with."
        )
    model.load_state_dict(weights, strict=False)
    low_precision = {str(tensor.dtype) for tensor in weights.values()} - {"torch.float32"}
    stored = f" (stored in {', '.join(sorted(low_precision))})" if low_precision else ""
    say(f"weights from {folder}{stored}; optimizer and schedule start anew")


def _is_tied(tensor: torch.Tensor, own: dict, weights: dict) -> bool:
    """Whether ``tensor`` shares its memory with a tensor that is in ``weights``, as a tied output layer does."""
    return any(own[name].data_ptr() == tensor.data_ptr() for name in weights if name in own)


def rows_before(identity: dict, shared: SharedArguments) -> int:
    """Return how many rows the checkpoint of --init_from was trained on, if this run has the same order of rows.

    Without --init_from, return 0. If the order differs or is unknown, say so and return 0: this run then starts at its
    first row.

    Args:
        identity: the identity of this run, as in run.json.
    """
    folder = shared.init_from
    if not folder:
        return 0
    path = Path(folder)
    run = next((place / RUN_FILE for place in (path, path.parent) if (place / RUN_FILE).exists()), None)
    state = path / "trainer_state.json"
    if run is None or not state.exists():
        say(f"{folder} does not say which rows it was trained on. Training starts at the first row.")
        return 0
    was = json.loads(run.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(identity))  # with the types that JSON gives back, as in ``was``
    names = [("data", name) for name in ("documents", "tokenizer", *DECIDING_ROWS)]
    names += [("training", "seed"), ("training", "data_seed")]
    different = [name for section, name in names if was[section].get(name) != now[section].get(name)]
    if different:
        say(f"{folder} was trained on other rows ({', '.join(different)} differ). Training starts at the first row.")
        return 0
    found = json.loads(state.read_text(encoding="utf-8"))
    history = [found, *found.get("log_history", [])]  # explicit_loop.py writes no log_history, only its last entry
    tokens_seen = max((entry["tokens_seen"] for entry in history if "tokens_seen" in entry), default=0)
    rows = tokens_seen // shared.context_length
    say(f"training starts after the {rows:,} rows that {folder} was trained on")
    return rows
