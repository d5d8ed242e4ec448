"""The model in training, as lm_eval calls a model. Imports lm_eval, which may not be installed: see eval_tasks.py."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object
from lm_eval.models.huggingface import HFLM
from transformers import Trainer

from common.distributed.workarounds import without_autocast
from common.model.attention import generating
from common.train.callbacks import computing
from common.train.interruption import EvaluationStopped, Interruption

LOGITS_AT_ONCE = 2**27  # of a batch: 512 MiB in fp32, and as much again for their logarithms
GENERATED_AT_ONCE = 32  # texts; their caches grow with the model


class LiveModel(HFLM):
    """lm_eval's own Hugging Face model around the one that trains, with the work divided among the processes.

    Every process runs the harness on all documents. Where the model is called, each process computes a block of the
    requests, and all of them get all answers. So every process knows the same scores, and a signal to any process ends
    the evaluation in all of them.

    Attributes:
        cut: requests so far that are longer than the model reads. lm_eval leaves out their first tokens.
    """

    def __init__(self, trainer: Trainer, interruption: Interruption):
        """Take ``trainer``'s model. lm_eval gives tokenizers a padding token; the one that is saved stays as it is."""
        tokenizer = copy.deepcopy(trainer.processing_class)
        super().__init__(pretrained=trainer.model, tokenizer=tokenizer, batch_size=GENERATED_AT_ONCE)
        self.interruption = interruption if trainer.is_in_train else None  # afterwards, a signal ends the process
        self.processes, self.process = trainer.args.world_size, trainer.args.process_index
        self.cut = 0

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None) -> list[tuple[float, bool]]:
        """Replaces: batches of as many rows, however long they are, and nobody who may end it.

        Args:
            requests: (texts, ids of the context, ids of the continuation) each.
        """
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise ValueError(f"an answer has {longest:,} tokens, and the model reads {self.max_length:,}")
        self.cut += sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        return self._in_blocks(requests, self._in_batches)

    def _in_batches(self, requests: list) -> list[tuple[float, bool]]:
        """Compute the answers to ``requests``, in batches of at most LOGITS_AT_ONCE logits, longest rows first."""
        lengths = [min(len(context) + len(continuation), self.max_length) for _, context, continuation in requests]
        # Requests that differ in their last token only are neighbours: lm_eval computes them once.
        order = sorted(range(len(requests)), key=lambda i: (-lengths[i], [*requests[i][1], *requests[i][2]]))
        answers: list = [None] * len(requests)
        vocabulary = self.config.get_text_config().vocab_size
        done = 0
        while done < len(order):
            rows = max(1, LOGITS_AT_ONCE // (lengths[order[done]] * vocabulary))
            chosen = order[done : done + rows]
            self._stop_if_asked()
            self.batch_size_per_gpu = len(chosen)
            found = super()._loglikelihood_tokens([requests[i] for i in chosen], disable_tqdm=True)
            if any(math.isnan(log_probability) for log_probability, _ in found):
                raise ValueError("the model gives NaN")  # of which the first choice would be taken, and often be right
            for i, answer in zip(chosen, found, strict=True):
                answers[i] = answer
            done += rows
        self.batch_size_per_gpu = GENERATED_AT_ONCE
        return answers

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        """Replaces: all texts on one process."""
        return self._in_blocks(requests, super().generate_until)

    def _model_generate(self, *args, **kwargs) -> torch.Tensor:
        self._stop_if_asked()
        return super()._model_generate(*args, **kwargs)

    def _in_blocks(self, requests: list, compute: Callable[[list], list]) -> list:
        """Return ``compute(requests)``, of which every process computes a block.

        Raises:
            EvaluationStopped: a process was asked to end.
            RuntimeError: ``compute`` failed in a process.
        """
        first, end = (len(requests) * each // self.processes for each in (self.process, self.process + 1))
        answers, problem = [], None
        try:
            if end > first:
                answers = compute(requests[first:end])
        except EvaluationStopped:
            pass  # told to the others below
        except Exception as error:  # the others would wait for the answers for ever
            problem = f"{type(error).__name__}: {error}"
        blocks = gather_object([(answers, problem)])
        if self.interruption is not None:
            self.interruption.check_evaluation(self.device, self.processes)
        problems = [problem for _, problem in blocks if problem is not None]
        if problems:
            raise RuntimeError(problems[0])
        return [answer for block, _ in blocks for answer in block]

    def _stop_if_asked(self) -> None:
        """Raise EvaluationStopped if this process was asked to end. The others learn of it when answers are shared."""
        if self.interruption is not None and any(self.interruption.wishes()[:-2]):  # the last two are of saves
            raise EvaluationStopped


@contextmanager
def live_model(trainer: Trainer, interruption: Interruption) -> Iterator[LiveModel]:
    """Lend ``trainer``'s model to lm_eval, as whoever loads the saved model gets it: no dropout, in its own dtype.

    Adapters and the layers beside them have two dtypes: then it computes in the precision of training.
    """
    model = trainer.model
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    precision = without_autocast(model) if len(dtypes) == 1 else computing(trainer.args)
    was_training = model.training
    try:
        with generating(model), precision, torch.no_grad():
            yield LiveModel(trainer, interruption)
    finally:
        model.train(was_training)
