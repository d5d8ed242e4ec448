"""FLOPs a token, and the peak FLOP/s of known devices, for model FLOPs utilisation (MFU)."""

import re

import torch
from transformers import (
    PreTrainedModel,
)

# Dense 16-bit tensor-core peak, TFLOP/s, from the vendors' data sheets; the first that is among the words of the
# device's name counts. V100 and T4 have fp16 only. A device that is not listed gets no MFU rather than a guessed one.
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "H200": 989, "GH200": 989, "H20": 148,
    "B200": 2250, "B300": 2250, "A100": 312, "A800": 312, "A40": 149.7, "A30": 165, "A10G": 70, "A10": 125,
    "L40S": 362, "L40": 181, "L4": 121, "RTX 4090": 165.2, "RTX 3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip


def flops_per_token(model: PreTrainedModel, context_length: int) -> int:
    """Return the FLOPs of training on one token: forward 1 and backward 2 parts, 2 FLOPs per multiply-add.

    6 x matrix-product parameters (head included; 4 x those that are frozen, as beside LoRA) + 12 x layers x attention
    width x context_length, where the attention width is heads x head size. Attention is counted in full, not halved
    for causality, and recomputation is not counted. Source: PaLM, appendix B, https://arxiv.org/abs/2204.02311
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    products = 4 * matmul_parameters(model) + 2 * matmul_parameters(model, trained=True)
    return products + 12 * config.num_hidden_layers * width * context_length


def peak_tflops(device: torch.device, half_precision: bool) -> float | None:
    """Return the device's peak in TFLOP/s, or None where it is not known or the run is not in 16 bit."""
    if device.type != "cuda" or not half_precision:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def parameter_report(model: PreTrainedModel) -> dict[str, int]:
    """Count parameters: all, those of the token embedding (and an untied head), and the rest."""
    total = sum(map(numbers_of, model.parameters()))
    ends = {id(module.weight): module.weight.numel() for module in _embedding_and_head(model)}
    return {"total": total, "embedding": sum(ends.values()), "rest": total - sum(ends.values())}


def numbers_of(parameter: torch.nn.Parameter) -> int:
    """Return how many numbers ``parameter`` holds: more than elements if bitsandbytes packed two in a byte."""
    packed = getattr(parameter, "quant_state", None)
    return shape_of_parameter(parameter).numel() if packed is None else packed.shape.numel()


def shape_of_parameter(parameter: torch.nn.Parameter) -> torch.Size:
    """Return the shape of the whole ``parameter``: ZeRO-3 leaves it empty between its uses."""
    return getattr(parameter, "ds_shape", parameter.shape)


def matmul_parameters(model: PreTrainedModel, trained: bool = False) -> int:
    """Count the parameters that take part in matrix products: no look-up tables, norms or biases, but the head.

    Args:
        trained: only those that are.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = model.get_output_embeddings().weight
    body = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in embeddings | {id(head)}]
    return sum(numbers_of(p) for p in [*body, head] if p.requires_grad or not trained)


def _embedding_and_head(model: PreTrainedModel) -> list[torch.nn.Module]:
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [module for module in modules if module is not None]
