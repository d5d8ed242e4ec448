"""--init_from: a checkpoint written under one strategy goes on under another, with another number of processes.

What a plain relaunch continues exactly, optimizer and schedule included: checkpoints of one process or DDP, and of
FSDP2, each with any number of processes, and DeepSpeed's with the same number.
Everything else goes on by --init_from: weights in fp32 and the next row; optimizer and schedule begin anew.
"""

import contextlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from common.arguments import SharedArguments
from common.console import InputError, say
from common.distributed.launch import Launch
from common.run.checkpoints import problem_of
from common.run.folder import DECIDING_ROWS, RUN_FILE


def writer_of(checkpoint: str) -> tuple[str, int | None]:
    """Return who wrote a checkpoint: "plain", "fsdp2", or "zero" with its number of processes."""
    path = Path(checkpoint)
    if shards := list(path.glob("global_step*/*_optim_states.pt")):
        return "zero", len(shards)
    sharded = list(path.glob("pytorch_model_fsdp*")) or (path / "optimizer.bin").exists()
    return ("fsdp2" if sharded else "plain"), None


def check_resumable(checkpoint: str, launch: Launch) -> None:
    """Raise InputError if this launch cannot read the optimizer's states in ``checkpoint``."""
    kind, processes = writer_of(checkpoint)
    now = "plain"
    if launch.strategy.is_deepspeed:
        now = "zero"
    elif launch.strategy.is_fsdp:
        now = "fsdp2"
    if kind == now and processes in (None, launch.processes):
        return
    wrote = {"plain": "one process or DDP", "fsdp2": "FSDP2", "zero": f"DeepSpeed on {processes} processes"}[kind]
    raise InputError(
        f"{checkpoint} was written under {wrote}; {launch.strategy} on {launch.processes} processes cannot read its "
        f"optimizer's states. Launch as before, or go on with its weights: --init_from {checkpoint} --output_dir NEW"
    )


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    """Return the weights in a checkpoint or output folder: fp32 from DeepSpeed's own files where there are some.

    Raises:
        InputError: there are none, or the checkpoint is not whole.
    """
    path = Path(folder)
    problem = problem_of(path) if path.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") else None
    if problem is not None:
        raise InputError(
            f"--init_from {folder}: {problem}. Give a whole checkpoint. (One that other software wrote: under a name "
            f"that does not begin with {PREFIX_CHECKPOINT_DIR}-.)"
        )
    if writer_of(folder)[0] == "zero":  # its safetensors are in the precision of the computation
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(None):  # it prints every step
            return get_fp32_state_dict_from_zero_checkpoint(folder)
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise InputError(f"--init_from {folder}: no model*.safetensors there. Give a checkpoint-N or an output folder.")
    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:  # cut off, or removed by its own run, which goes on and prunes
        raise InputError(f"--init_from {folder}: its weights cannot be read ({error}).") from None


def load_start(model: PreTrainedModel, folder: str) -> None:
    """Put the weights of ``folder`` into ``model``.

    Raises:
        InputError: a tensor is missing, has another shape, or is not the model's.
    """
    weights = weights_of(folder)
    own = model.state_dict()
    shared = {name for name, tensor in own.items() if name not in weights and _is_tied(tensor, own, weights)}
    missing, unknown = own.keys() - weights.keys() - shared, weights.keys() - own.keys()
    other = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if missing or unknown or other:
        raise InputError(
            f"--init_from {folder}: another model. Missing: {sorted(missing)[:3]}, unknown: {sorted(unknown)[:3]}, of "
            f"another shape: {sorted(other)[:3]}. Give the shape and tokenizer that the checkpoint was trained with."
        )
    model.load_state_dict(weights, strict=False)
    half = {str(tensor.dtype) for tensor in weights.values()} - {"torch.float32"}
    say(f"weights from {folder}{f', in {half.pop()} there' if half else ''}; optimizer and schedule begin anew")


def _is_tied(tensor: torch.Tensor, own: dict, weights: dict) -> bool:
    """Whether ``tensor`` is the same memory as another one that ``weights`` has, as a tied head is."""
    return any(own[name].data_ptr() == tensor.data_ptr() for name in weights if name in own)


def rows_before(identity: dict, shared: SharedArguments) -> int:
    """Return how many rows the run of --init_from was trained on, if its order of rows is this run's; otherwise 0.

    Args:
        identity: this run's, as in run.json.
    """
    folder = shared.init_from
    if not folder:
        return 0
    path = Path(folder)
    run = next((place / RUN_FILE for place in (path, path.parent) if (place / RUN_FILE).exists()), None)
    state = path / "trainer_state.json"
    if run is None or not state.exists():
        say(f"{folder} does not say which rows it was trained on: training begins at the first row")
        return 0
    was = json.loads(run.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(identity))
    names = [*[("data", name) for name in ("documents", "tokenizer", *DECIDING_ROWS)], ("training", "seed")]
    names.append(("training", "data_seed"))
    differ = [name for section, name in names if was[section].get(name) != now[section].get(name)]
    if differ:
        say(f"{folder} was trained on other rows ({', '.join(differ)} differ): training begins at the first row")
        return 0
    found = json.loads(state.read_text(encoding="utf-8"))
    history = [found, *found.get("log_history", [])]  # explicit_loop.py has its last entry only
    seen = max((entry["tokens_seen"] for entry in history if "tokens_seen" in entry), default=0)
    rows = seen // shared.context_length
    say(f"training begins after the {rows:,} rows that {folder} was trained on")
    return rows
