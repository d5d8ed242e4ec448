"""What a checkpoint has of model and optimizer: copied while training waits, written by a thread while it goes on.

Everything else in a checkpoint is small, and written at once: schedule, random states, the log, the guard.

    launch                  weights                     states of the optimizer
    one process, DDP        model.safetensors           optimizer.pt        copied and written by the main process
    FSDP2                   model.safetensors, *.bin    optimizer.bin       gathered and written by the main process
    tensor parallelism      model.safetensors, shards/  shards/             each process its part; weights also gathered
    SHARDED_STATE_DICT      shards/                     shards/             each process its part, nothing is gathered
    DeepSpeed, adapters     by DeepSpeed, by peft                           training waits for it
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, TRAINING_ARGS_NAME

from common.console import is_main_process
from common.distributed.launch import Launch
from common.distributed.strategy import local
from common.run.copies import Copies
from common.run.divided_states import each_once, gathered, own_parts, write_parts
from common.run.folder import Run


class Saving:
    """Collects, for one checkpoint after the other, the functions that will write this process's files.

    Attributes:
        left: these functions; None outside of a save, and where the libraries write at once.
    """

    def __init__(self, launch: Launch, training: TrainingArguments, run: Run):
        self.launch, self.training, self.run = launch, training, run
        self.copies = Copies()
        self.left: list[Callable[[], None]] | None = None
        self._in_background = False
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def begin(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Begin to collect; return whether the files may be written while training goes on.

        They may not where a library writes them at once, or where main memory has no room for copies.
        """
        if self.launch.strategy.is_deepspeed or not isinstance(model, PreTrainedModel):
            return False
        self.left = []
        needed, sharers = self._needed_bytes(model, optimizer)
        gathers = self.launch.strategy.is_fsdp and not self.launch.saves_parts
        self._in_background = self.copies.have_room(needed, sharers, again=not gathers)
        return self._in_background

    def end(self) -> list[Callable[[], None]]:
        """Return the functions, to be called in this order."""
        left, self.left = self.left, None
        return left or []

    def leave_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str) -> None:
        """Leave the model's files to be written to ``folder``. All processes must call this."""
        weights = None
        if self.launch.saves_parts and self.launch.saves_whole_weights:
            weights = each_once(gathered(get_model_state_dict(model)), model)
        elif self.launch.strategy.is_fsdp and not self.launch.saves_parts:
            twice = gathered(get_model_state_dict(model))
            weights = each_once(twice, model)
            self._leave(torch.save, twice, Path(folder) / f"{FSDP_MODEL_NAME}.bin")  # what accelerate reads
        elif not self.launch.saves_parts and is_main_process():
            weights = self._copied("weights", model.state_dict())
        if self._in_background and self._tokenizer is None:
            self._tokenizer = copy.deepcopy(tokenizer)  # two threads cannot use one at the same time
        tokenizer = self._tokenizer if self._in_background else tokenizer
        self._leave(write_model, as_it_is_now(model), weights, tokenizer, self.training, folder)

    def leave_states(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: str) -> None:
        """Leave the optimizer's states, and parts of the weights, to be written. All processes must call this."""
        if self.launch.saves_parts:
            parts = self._copied("parts", own_parts(model, optimizer))
            self.left.insert(0, partial(write_parts, parts, Path(folder), self.run.group))  # all processes together
        elif self.launch.strategy.is_fsdp:
            states = gathered(get_optimizer_state_dict(model, optimizer))
            self._leave(torch.save, states, Path(folder) / OPTIMIZER_NAME_BIN)
        elif is_main_process():
            self._leave(torch.save, self._copied("states", optimizer.state_dict()), Path(folder) / OPTIMIZER_NAME)

    def _leave(self, write: Callable, *arguments) -> None:
        """Leave ``write(*arguments)`` to the main process."""
        if is_main_process():
            self.left.append(partial(write, *arguments))

    def _copied(self, name: str, state: dict) -> dict:
        return self.copies.take(name, state) if self._in_background else state

    def _needed_bytes(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
        """Return the bytes that this process copies, and how many processes of this machine copy as much."""
        states = [value for state in optimizer.state.values() for value in state.values()]
        tensors = [*model.parameters(), *(value for value in states if isinstance(value, torch.Tensor))]
        if self.launch.saves_parts:
            return sum(local(tensor).nbytes for tensor in tensors), self.launch.local_processes
        whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return (whole if is_main_process() else 0), 1


def as_it_is_now(model: PreTrainedModel) -> PreTrainedModel:
    """Return ``model`` with a config of its own, for a thread to save: training, and saving itself, change configs.

    Its parameters are those of ``model``. (copy.copy would have FSDP2 make a new model.)
    """
    shell = object.__new__(type(model))
    vars(shell).update(vars(model))
    shell.config = copy.deepcopy(model.config)
    if getattr(shell.config, "distributed_config", None) is not None:
        shell.config.distributed_config = None  # transformers (5.24) would gather the weights: here they come gathered
    return shell


def write_model(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    training: TrainingArguments,
    folder: str,
) -> None:
    """Write a model and its tokenizer to ``folder``, as Trainer does in a checkpoint.

    Args:
        model: from ``as_it_is_now``.
        weights: None, if they are not written here: then only the configuration is.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    if weights is not None:
        model.save_pretrained(folder, state_dict=weights)
    else:
        model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    torch.save(training, Path(folder) / TRAINING_ARGS_NAME)
