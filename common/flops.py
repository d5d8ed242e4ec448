"""FLOPs a token, and the peak FLOP/s of known devices, for model FLOPs utilisation (MFU)."""

import re

import torch
from transformers import PreTrainedModel

from common.model import matmul_parameters

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
