"""Forward and backward of a micro-batch as one CUDA graph, where the CPU cannot launch kernels as fast as they end.

A layer's forward and backward take about a hundred kernels, and Python needs 2 to 3 ms to launch them. A small model on
a fast card computes them in less time, and the card waits. A CUDA graph holds all launches of a micro-batch. The card
replays them without the CPU: the same kernels on the same addresses of weights, gradients and batch.

Source: https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from common.console import InputError, in_one_line, say
from common.distributed.launch import Launch
from common.model.counts import experts_per_token
from common.model.memory import Setting

LARGEST = 1 << 28  # parameters of a model for which a graph is recorded unasked; larger ones gain too little
EAGER = 3  # micro-batches, and steps of the optimizer, before a graph is recorded: they compile, and choose kernels


def lacking(model: PreTrainedModel, setting: Setting) -> list[str]:
    """Return what ``setting`` lacks for micro-batches that are CUDA graphs, in words; [] if they are possible.

    Recompute reads random states, which cannot be done during a capture. Exchanges of gradients among processes have
    streams of their own. Mixtures of experts and quantized weights need numbers from the card.
    """
    reasons = {
        "one process": setting.processes > 1,
        "a compiled model": not setting.compiled,
        "no recompute": setting.recompute,
        "a model without experts": experts_per_token(model.config.get_text_config()) > 0,
        "no adapters": setting.method in ("lora", "qlora"),
        "an optimizer that steps after backward": setting.in_backward,
    }
    return [needed for needed, lacks in reasons.items() if lacks]


def use_graph(wanted: str, model: PreTrainedModel, setting: Setting, device: torch.device) -> bool:
    """Whether micro-batches are to be CUDA graphs.

    Args:
        wanted: --cuda_graph: "auto" (where they are possible and the model is not large), "yes" or "no".

    Raises:
        InputError: "yes" where they are not possible.
    """
    missing = lacking(model, setting) + ([] if device.type == "cuda" else ["a CUDA card"])
    if wanted == "yes" and missing:
        raise InputError(f"--cuda_graph yes: it needs {', '.join(missing)}. Leave the flag out.")
    return not missing and (wanted == "yes" or (wanted == "auto" and model.num_parameters() <= LARGEST))


def optimizer_graphs(wanted: str, model: PreTrainedModel, launch: Launch, device: torch.device) -> bool:
    """Whether Muon's updates are to be CUDA graphs: as ``wanted``, on one CUDA card (several were never tried)."""
    possible = device.type == "cuda" and launch.processes == 1
    return possible and (wanted == "yes" or (wanted == "auto" and model.num_parameters() <= LARGEST))


class Recorded:
    """A function of tensors as one CUDA graph.

    All graphs share one pool of memory for what is computed on the way. So a result is valid until the next graph runs.
    """

    pool = None

    def __init__(self, function: Callable, given: dict[str, torch.Tensor]):
        """Record ``function(**given)``, which runs nothing.

        Raises:
            RuntimeError: ``function`` waits for the card, or does something else that cannot be recorded.
        """
        self.given = {name: tensor.clone() for name, tensor in given.items()}
        if Recorded.pool is None:
            Recorded.pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()  # what the function has used until now; the pool has memory of its own
        self.graph = torch.cuda.CUDAGraph()
        # Only calls of this thread could spoil the capture, not those of a loader's or a saving thread.
        with torch.cuda.graph(self.graph, pool=Recorded.pool, capture_error_mode="thread_local"):
            self.result = function(**self.given)

    def fits(self, given: dict[str, torch.Tensor]) -> bool:
        """Whether the tensors have the shapes of those that the graph was recorded with."""
        return all(self.given[name].shape == tensor.shape for name, tensor in given.items())

    def __call__(self, **given: torch.Tensor):
        for name, tensor in given.items():
            self.given[name].copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.result


class MicroBatchGraph:
    """Run forward and backward of micro-batches: the first few as they are, all later ones as one CUDA graph.

    Gradients are added up in the same tensors in every step. An optimizer that sets ``grad`` to None finds them again,
    emptied, at the next micro-batch.
    """

    def __init__(self, forward_backward: Callable[..., torch.Tensor]):
        """``forward_backward(model, batch, num_items)`` returns the loss, without gradient."""
        self.forward_backward = forward_backward
        self.eager = EAGER
        self.recorded: Recorded | None = None

    def __call__(self, model: torch.nn.Module, batch: dict, num_items: torch.Tensor) -> torch.Tensor:
        """Return the loss of ``batch`` and add its gradients."""
        given = {**batch, "num_items": num_items}
        if self.eager <= 0:
            self._take_gradients()
        if self.eager == 0:
            self._record(model, given)
        self.eager -= 1
        if self.recorded is not None and self.recorded.fits(given):
            return self.recorded(**given).clone()
        loss = self.forward_backward(model, batch, num_items)
        self.parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        self.gradients = [parameter.grad for parameter in self.parameters]
        return loss

    def _take_gradients(self) -> None:
        """At the first micro-batch of a step: put the gradients' tensors back, with zeros."""
        if self.parameters[0].grad is not self.gradients[0]:
            torch._foreach_zero_(self.gradients)
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient

    def _record(self, model: torch.nn.Module, given: dict) -> None:
        """Record the graph. If that fails, say why: all micro-batches then run as they are."""

        def run(num_items, **batch):
            return self.forward_backward(model, batch, num_items)

        try:
            self.recorded = Recorded(run, given)
        except RuntimeError as error:
            return say(f"note: without a CUDA graph, which cannot be recorded for this model: {in_one_line(error)}")
        say("from here on, forward and backward of a micro-batch are one CUDA graph (--cuda_graph no: without)")
