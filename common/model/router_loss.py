"""The router's loss of a mixture of experts, the same however a step is split into micro-batches and processes.

A router that sends all tokens to a few experts wastes the others. transformers' models therefore add a loss to that of
the tokens, if their config has ``output_router_logits: true``:

    coefficient * experts * sum over experts of (share of the tokens sent to it) * (mean probability given to it)

It is a product of two means over the micro-batch. Added to a sum that is divided by the targets of a whole step, it
counts once for each micro-batch and each process, and its value depends on which rows happen to be together.

Here it is computed for each row by itself, by the same formula, and averaged over the rows of the step. A row weighs as
much as it has targets, so that a row without any, which only completes a batch, counts nothing:

    loss of a step = sum over its rows of (nats + coefficient * targets * router loss of the row) / targets of the step

Experts are so balanced within each row. Source: the sequence-wise loss of DeepSeek-V3, https://arxiv.org/abs/2412.19437,
section 2.1.2. (To balance them over a whole step would need the routes of all micro-batches before the first backward
pass: https://arxiv.org/abs/2501.11873.)
"""

import torch
from transformers import PreTrainedModel

from common.console import InputError
from common.model.attention import generating
from common.model.counts import experts_per_token

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # what models call their coefficient; JetMoe the second


def take_coefficient(model: PreTrainedModel) -> float:
    """Return the coefficient of the router loss of ``model`` and set the model's own to 0; 0 if it has no such loss.

    The model's forward then adds nothing to the loss. Its config stays as it is.

    Raises:
        InputError: the router loss of ``model`` follows another formula.
    """
    config = model.config.get_text_config()
    name = next((name for name in COEFFICIENTS if hasattr(model, name)), None)
    if name is None or not getattr(config, "output_router_logits", False):
        return 0.0
    coefficient = getattr(model, name)
    if coefficient:
        check_formula(model)
    setattr(model, name, 0.0)
    return coefficient


@torch.no_grad()
def check_formula(model: PreTrainedModel) -> None:
    """Raise InputError unless ``router_losses`` of one row is the router loss that ``model`` itself computes."""
    if model.device.type == "meta":  # planned only
        return
    was_training = model.training
    model.eval()
    ids = torch.arange(1, 17, device=model.device)[None] % model.config.get_text_config().vocab_size
    try:
        with generating(model):
            output = model(input_ids=ids, use_cache=False)
        ours, _ = router_losses(output.router_logits, 1, experts_per_token(model.config))
        same = torch.allclose(ours[0], output.aux_loss.float(), rtol=1e-2)
    except Exception:  # router logits of other shapes, or none; each model raises its own
        same = False
    model.train(was_training)
    if not same:
        raise InputError(
            f"{type(model).__name__}: its router loss is not the usual one, and would change with the micro-batch. "
            'Write "output_router_logits": false in its config to train without it.'
        )


def router_losses(router_logits: tuple[torch.Tensor, ...], rows: int, chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the router loss of each row, and the tokens that it sent to each expert.

    The loss is without the coefficient, over all layers: float32, (rows,). A row that uses all experts alike has a loss
    of ``chosen``. The numbers of tokens are float32, (layers, rows, experts).

    Args:
        router_logits: of each layer with experts, (rows * tokens, experts).
        chosen: experts that a token is sent to.
    """
    experts = router_logits[0].shape[-1]
    given = torch.zeros(rows, experts, device=router_logits[0].device)  # sums of the probabilities given to each expert
    sent, tokens = [], 0
    for logits in router_logits:
        probabilities = logits.reshape(rows, -1, experts).softmax(-1)
        routes = probabilities.topk(chosen, dim=-1).indices.flatten(1)
        sent.append(torch.zeros_like(given).scatter_add(1, routes, torch.ones_like(routes, dtype=given.dtype)))
        given = given + probabilities.float().sum(1)
        tokens += probabilities.shape[1]
    sent = torch.stack(sent)
    return experts * (sent.sum(0) / tokens * given / tokens).sum(1), sent


def router_part(
    coefficient: float,
    router_logits: tuple[torch.Tensor, ...],
    targets: torch.Tensor,
    num_items: torch.Tensor | int | None,
    chosen: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the router adds to the loss of a micro-batch, and the tokens sent to each expert: (layers, experts).

    Rows without targets count in neither.

    Args:
        targets: (rows, tokens), -100 where there is none.
        num_items: the targets of the whole step. None: those of this micro-batch.
        chosen: experts that a token is sent to.
    """
    of_rows = targets.ne(-100).sum(1)
    losses, sent = router_losses(router_logits, len(targets), chosen)
    part = coefficient * (losses * of_rows).sum() / (of_rows.sum() if num_items is None else num_items)
    return part, (sent * of_rows.gt(0)[:, None]).sum(1)
