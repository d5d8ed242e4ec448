"""Weights and optimizer states of a model that processes share: each writes and reads its own part, or one has all.

torch.distributed.checkpoint (DCP) writes one file a process and an index of all parts, ``.metadata``, last. It reads
them on any number of processes, divided in any way.
"""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from common.console import is_main_process

SHARDS = "shards"  # the folder of a checkpoint to which every process writes its own part of weights and states
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)  # not by the number of a group, which may change


def own_parts(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict:
    """Return this process's parts of weights and optimizer states, as ``write_parts`` takes them. All must call this.

    They are the tensors that training changes, not copies.
    """
    state = {"model": each_once(get_model_state_dict(model), model)}
    state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=BY_NAME)
    return in_one_piece(state)


def write_parts(state: dict, path: Path, group: torch.distributed.ProcessGroup | None) -> None:
    """Write what ``own_parts`` returned to ``path``. All processes must call this, also from a thread of their own.

    The folder must be a fresh one: torch would leave the parts of an earlier save, and load them without a word.

    Args:
        group: of all processes, on CPUs, used by nobody else meanwhile; None if there is one process only.
    """
    there = (path / SHARDS).exists()
    if group is not None:
        torch.distributed.barrier(group)  # nobody begins before all have looked
    if there:
        raise FileExistsError(path / SHARDS)
    try:
        dcp.save(state, checkpoint_id=path / SHARDS, process_group=group)
    except CheckpointException as error:  # torch's, on all processes, around that of the process which failed
        raise next(iter(error.failures.values()))[0] from None


def load_weights(model: PreTrainedModel, path: Path) -> None:
    """Read the weights that ``write_parts`` wrote, on any number of processes, into ``model``."""
    read = _read("model", each_once(get_model_state_dict(model), model), path)
    set_model_state_dict(model, read, options=StateDictOptions(strict=False))  # a shared matrix has a second name


def load_states(model: PreTrainedModel, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Read the optimizer's states that ``write_parts`` wrote, on any number of processes, into ``optimizer``."""
    state = _read("optimizer", get_optimizer_state_dict(model, optimizer, options=BY_NAME), path)
    set_optimizer_state_dict(model, optimizer, state, options=BY_NAME)


def _read(what: str, kept: dict, path: Path) -> dict:
    read = in_one_piece(kept)
    dcp.load({what: read}, checkpoint_id=path / SHARDS)
    return in_one_piece(read, placed_like=kept)


def whole_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the whole weights that processes wrote in parts to the checkpoint ``path``, read by this process alone."""
    parts = dcp.FileSystemReader(path / SHARDS).read_metadata().state_dict_metadata
    weights = {}
    for name, entry in parts.items():
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata):
            weights[name.removeprefix("model.")] = torch.empty(entry.size, dtype=entry.properties.dtype)
    dcp.load({"model": weights}, checkpoint_id=path / SHARDS, no_dist=True)
    return weights


def in_one_piece(state: dict, placed_like: dict | None = None) -> dict:
    """Return ``state`` with every part one contiguous piece, or, after that, placed like another state again.

    A dimension that both FSDP2 and tensor parallelism divide lies in several pieces (_StridedShard). torch's
    checkpoints (2.13) take any part for one piece, and would save it so without an error.
    """

    def place(value, like=None):
        if not isinstance(value, DTensor):
            return value
        pieces = [Shard(place.dim) if isinstance(place, _StridedShard) else place for place in value.placements]
        return value.redistribute(placements=pieces if like is None else like.placements)

    return tree_map(place, state) if placed_like is None else tree_map(place, state, placed_like)


def gathered(state: dict) -> dict:
    """Return the whole of a divided state to the main process, as copies in main memory. All must call this.

    The others get the same keys, and nothing of the tensors. One tensor after the other is whole on the devices.
    """

    def gather(value):
        if not isinstance(value, torch.Tensor):
            return value
        if isinstance(value, DTensor):  # offloaded parts go to the devices first, which gather
            value = value.to(value.device_mesh.device_type).full_tensor()
        return value.detach().to("cpu", copy=True) if is_main_process() else None

    return tree_map(gather, state)


def gathered_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the whole weights of a divided model to the main process, in main memory; to others an empty dict."""
    weights = gathered(get_model_state_dict(model))
    return weights if is_main_process() else {}


def each_once(weights: dict[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return weights with a matrix that embedding and head share only once.

    transformers tells shared matrices by their address, and gathered ones have each its own: it would write them twice.
    """
    again = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    return {name: tensor for name, tensor in weights.items() if name not in again}
