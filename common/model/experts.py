"""Mixtures of experts: experts in the precision of the computation, and how evenly tokens are sent to them.

transformers computes all experts of a layer by one grouped matrix product (``experts_implementation="grouped_mm"``, its
default). That product is not known to autocast: it is in the dtype of the weights. Under single_gpu.yaml and ddp.yaml,
where the weights are fp32 and autocast casts for each operation, experts would be computed in fp32, one after the
other, without tensor cores; torch.compile would not even take the product up. And the sum that the layers add to, the
residual stream, would become fp32 again after each layer. ``grouped`` below is the same function with weights and
tokens in autocast's dtype. FSDP2 and DeepSpeed cast the weights themselves: there nothing changes.
Source: https://github.com/pytorch/pytorch/issues/174763

No token is dropped. An expert takes all tokens that are sent to it, because transformers' experts have no capacity.
"""

import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from common.model.counts import experts_per_token

GROUPED = "grouped"  # our own implementation of experts, registered with transformers beside its own
OF_TRANSFORMERS = "grouped_mm"


class InDtype:
    """A module of experts whose weights are read in another dtype; everything else is the module's."""

    def __init__(self, experts: torch.nn.Module, dtype: torch.dtype):
        self.experts, self.dtype = experts, dtype

    def __getattr__(self, name):
        value = getattr(self.experts, name)
        return value.to(self.dtype) if isinstance(value, torch.Tensor) else value


def grouped_experts(
    experts: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return for each token the weighted sum of the results of its experts: (tokens, hidden size).

    Args:
        hidden_states: (tokens, hidden size).
        top_k_index, top_k_weights: of the experts of each token, (tokens, experts of a token).
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        experts, hidden_states = InDtype(experts, dtype), hidden_states.to(dtype)
    return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)


def use_grouped_experts(model: PreTrainedModel) -> None:
    """Have the experts of ``model`` computed by ``grouped_experts`` where transformers computes them by its own."""
    if has_grouped_experts(model):
        ALL_EXPERTS_FUNCTIONS.register(GROUPED, grouped_experts)
        model.set_experts_implementation(GROUPED)


def has_grouped_experts(model: PreTrainedModel) -> bool:
    """Whether transformers computes the experts of ``model`` by one grouped matrix product."""
    implementation = getattr(model.config.get_text_config(), "_experts_implementation", None)
    grouped = implementation in (OF_TRANSFORMERS, GROUPED) and model._can_set_experts_implementation()
    return grouped and experts_per_token(model.config) > 0


def busiest_and_idlest(sent: torch.Tensor, chosen: int) -> tuple[float, float]:
    """Return the largest and the smallest share of a layer's tokens that one of its experts gets, over all layers.

    If all experts of a layer get alike, each gets ``chosen / experts`` of the tokens.

    Args:
        sent: the tokens sent to each expert of each layer, (layers, experts).
        chosen: experts that a token is sent to.
    """
    shares = sent * chosen / sent.sum(1, keepdim=True)
    return shares.max().item(), shares.min().item()
