"""The loss of a transformers model without the logits of all rows, computed inside the model's own forward.

    use_fused_loss(model)         # once, before the model is wrapped by peft, Trainer, Accelerate, DDP, FSDP, DeepSpeed
    loss = model(**batch).loss    # fused whenever labels are given; without labels the model returns logits as before

How it works. In nearly every causal model of transformers, forward ends like this:

    logits = self.lm_head(hidden)                      # rows x vocabulary: too large to hold
    logits = logits * self.logit_scale                 # Cohere; Granite divides; Gemma caps by a tanh
    loss = self.loss_function(logits, labels, ...)
    loss += self.router_aux_loss_coef * aux_loss       # mixtures of experts

This code stays as it is. Two parts of the model are changed. The head becomes a linear layer with the same parameters,
which returns DeferredLogits when there are labels: they hold no logits, only the hidden states and the scale and cap
that the model applies. And ``loss_function``, which transformers allows to set on a model, computes the loss from them,
chunk by chunk. Masks and caches stay the model's own. If a model does anything to its logits but scale and cap them,
DeferredLogits raises an error that names it.

Mixtures of experts. The router's loss is added in training only, row by row (see router_loss.py). Of the output,
``aux_loss`` is then this part of ``loss``, and ``router_logits`` are, instead of logits that nobody needs any more, the
numbers of tokens sent to each expert, one tensor (experts,) a layer. In evaluation, ``loss`` is that of the tokens.

Why inside the model. The product is computed in the head's forward, so the hooks run that gather the weight (FSDP,
ZeRO-3), reduce its gradient (DDP) or cast (autocast). Parameter names, checkpoints and ``generate`` do not change. Two
other ways are worse: to rewrite forward for each family, as Liger and cut-cross-entropy do, means work for every new
model; to call body and head from the training loop skips the hooks of the wrappers.
"""

from functools import wraps
from types import MethodType

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from common.console import InputError
from common.distributed.strategy import local
from common.model.counts import experts_per_token
from common.model.linear_cross_entropy import CHUNK_BYTES, divided_vocabulary, fused_linear_cross_entropy
from common.model.router_loss import router_part, take_coefficient


def use_fused_loss(model: PreTrainedModel, chunk_bytes: int = CHUNK_BYTES) -> None:
    """Make ``model`` compute its loss in chunks of ``chunk_bytes`` in every forward pass with labels.

    Loss and gradients are those of transformers, also with ``num_items_in_batch``, ``shift_labels`` and labels of -100;
    only the router's loss of a mixture of experts is that of router_loss.py. In a forward pass with labels, ``logits``
    are DeferredLogits.

    Raises:
        InputError: the model is wrapped already, its head is not a plain linear layer, or it has a loss of its own.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or "forward" in vars(model):
        raise InputError(f"{name}: give the loss to the transformers model itself, before anything wraps it.")
    head = model.get_output_embeddings()
    # FSDP2 makes a class of its own from a module's.
    if type(head) is not torch.nn.Linear and type(head).__bases__ != (FSDPModule, torch.nn.Linear):
        raise InputError(f"{name}: its head is {type(head).__name__}; the fused loss needs torch.nn.Linear.")
    if model.loss_function is not ForCausalLMLoss:
        raise InputError(f"{name}: its loss is {model.loss_function.__name__}; the fused loss is ForCausalLMLoss.")
    model.router_coefficient = take_coefficient(model)  # 0 if the model adds no router loss
    take_over_head(head, chunk_bytes)
    model.loss_function = loss_of_deferred_logits
    model.forward = MethodType(_deferring_when_labelled(type(model).forward), model)


def take_over_head(head: torch.nn.Linear, chunk_bytes: int) -> None:
    """Make ``head`` a DeferringHead that stays the same object: FSDP2 and tensor parallelism may hold on to it."""
    head.chunk_bytes, head.deferring = chunk_bytes, False
    # Tensor parallelism has set a forward on the object, which gathers the logits of all parts of the vocabulary.
    head.gathered_logits = vars(head).pop("forward", None)
    own = type(head)
    head.__class__ = DeferringHead if own is torch.nn.Linear else type(own.__name__, (DeferringHead, own), {})


class DeferringHead(torch.nn.Linear):
    """A linear layer that returns DeferredLogits instead of logits while ``deferring`` is true.

    Attributes:
        gathered_logits: returns the logits of a head that is divided by vocabulary; None for one that is not.
    """

    def __call__(self, hidden, *loss_arguments):
        if self.deferring and not loss_arguments:
            return DeferredLogits(self, hidden)  # without the hooks, which would gather the weight (ZeRO-3) in vain
        return super().__call__(hidden, *loss_arguments)

    @torch.compiler.disable  # FSDP2's regional compilation would compile the head with its chunks and its kernel
    def forward(self, hidden, targets=None, scale=1.0, soft_cap=None, ignore_index=-100, num_items=None):
        """Return logits, or the loss if there are ``targets`` of shape hidden.shape[:-1]."""
        if targets is not None:
            vocabulary = divided_vocabulary(self.weight) if isinstance(self.weight, DTensor) else None
            return fused_linear_cross_entropy(
                hidden.reshape(-1, hidden.shape[-1]),
                local(self.weight),
                targets.reshape(-1).to(hidden.device),
                None if self.bias is None else local(self.bias),
                vocabulary=vocabulary,
                scale=scale,
                soft_cap=soft_cap,
                ignore_index=ignore_index,
                num_items=num_items,
                chunk_bytes=self.chunk_bytes,
            )
        return super().forward(hidden) if self.gathered_logits is None else self.gathered_logits(hidden)


class DeferredLogits:
    """Logits that are not computed yet: scale * x of x = head(hidden), or soft_cap * tanh(scale * x / soft_cap).

    Supports what models do between head and loss: scaling, capping, casting. Everything else raises InputError.
    """

    def __init__(self, head: DeferringHead, hidden: torch.Tensor, scale: float = 1.0, soft_cap: float | None = None):
        self.head, self.hidden, self.scale, self.soft_cap = head, hidden, scale, soft_cap
        self.dtype = hidden.dtype  # Accelerate reads it, to cast outputs to fp32

    def __mul__(self, factor):
        if not isinstance(factor, int | float):
            self._refuse(f"multiplies them by a {type(factor).__name__}")
        soft_cap = None if self.soft_cap is None else self.soft_cap * factor
        return DeferredLogits(self.head, self.hidden, self.scale * factor, soft_cap)

    __rmul__ = __mul__

    def __truediv__(self, divisor):
        return self * (1 / divisor)

    def tanh(self):
        if self.soft_cap is not None:
            self._refuse("caps them twice")
        return DeferredLogits(self.head, self.hidden, self.scale, soft_cap=1.0)

    def float(self):
        return self  # the loss is computed in fp32 anyway

    def contiguous(self):
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.tanh:
            return args[0].tanh()
        cls._refuse(f"calls {getattr(function, '__name__', function)} on them")

    def __getitem__(self, index):
        self._refuse("takes a part of them")

    def __add__(self, other):
        self._refuse("adds to them")

    __radd__ = __sub__ = __rsub__ = __add__

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        self._refuse(f"uses their .{name}")

    @staticmethod
    def _refuse(what: str):
        raise InputError(
            f"the fused loss never holds the logits, but this model {what}. Train it without use_fused_loss, or, if "
            "this was your own code: call the model without labels to get logits."
        )


@torch.compiler.disable  # the graph ends here; unrolling the chunks in it gains nothing
def loss_of_deferred_logits(
    logits, labels, vocab_size=None, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_
):
    """Return the loss that ``transformers.loss.loss_utils.ForCausalLMLoss`` returns, for DeferredLogits.

    The arguments are those of ForCausalLMLoss; ``vocab_size`` is not needed.
    """
    if not isinstance(logits, DeferredLogits):
        raise InputError(
            "the model's head was replaced after use_fused_loss (by peft or resize_token_embeddings): leave the head "
            "out of target_modules and modules_to_save, and resize before."
        )
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return logits.head(logits.hidden, shift_labels, logits.scale, logits.soft_cap, ignore_index, num_items_in_batch)


def _deferring_when_labelled(forward):
    @wraps(forward)
    def deferring_forward(self, *args, labels=None, **kwargs):
        self.get_output_embeddings().deferring = labels is not None
        output = forward(self, *args, labels=labels, **kwargs)
        if labels is not None and self.router_coefficient and self.training:
            targets = kwargs.get("shift_labels")
            targets = labels[:, 1:] if targets is None else targets
            num_items, chosen = kwargs.get("num_items_in_batch"), experts_per_token(self.config)
            logits = output.router_logits
            output.aux_loss, sent = router_part(self.router_coefficient, logits, targets, num_items, chosen)
            output.loss, output.router_logits = output.loss + output.aux_loss, tuple(sent)
        return output

    return deferring_forward
