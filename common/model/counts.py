"""Parameters of a model, FLOPs a token, and the peak FLOP/s of known devices: for the MFU (model FLOPs utilization)."""

import re

import torch
from transformers import PreTrainedModel

# Dense 16-bit tensor-core peak in TFLOP/s, from the vendors' data sheets. The first entry that is among the words of
# the device's name counts. V100 and T4 have fp16 only. A device that is not listed gets no MFU, not a guessed one.
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "H200": 989, "GH200": 989, "H20": 148,
    "B200": 2250, "B300": 2250, "A100": 312, "A800": 312, "A40": 149.7, "A30": 165, "A10G": 70, "A10": 125,
    "L40S": 362, "L40": 181, "L4": 121, "RTX 4090": 165.2, "RTX 3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip


def flops_per_token(model: PreTrainedModel, context_length: int) -> int:
    """Return the FLOPs of training on one token: forward counts once, backward twice, 2 FLOPs per multiply-add.

    The sum of two terms:

        6 x parameters of matrix products (with the head; 4 x those that are frozen, as under LoRA)
        12 x layers x attention width x context_length, where the attention width is heads x head size

    Attention is counted in full, not halved for causality. Recompute is not counted.

    Source: PaLM, appendix B, https://arxiv.org/abs/2204.02311
    """
    config = model.config.get_text_config()
    width = config.num_attention_heads * head_size(model)
    products = 4 * matmul_parameters(model) + 2 * matmul_parameters(model, trained=True)
    return products + 12 * config.num_hidden_layers * width * context_length


def head_size(model: PreTrainedModel) -> int:
    """Return how many numbers a query head of ``model`` has."""
    config = model.config.get_text_config()
    given = getattr(config, "head_dim", None)
    return config.hidden_size // config.num_attention_heads if given is None else given


def peak_tflops(device: torch.device, half_precision: bool) -> float | None:
    """Return the device's peak in TFLOP/s; None if it is not known, or if the run is not in 16 bit."""
    if device.type != "cuda" or not half_precision:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def parameter_report(model: PreTrainedModel) -> dict[str, int]:
    """Count parameters: all (``total``), those of the embedding and an untied head (``embedding``), and the rest."""
    total = sum(map(numbers_of, model.parameters()))
    ends = sum(map(numbers_of, embedding_and_head(model)))
    return {"total": total, "embedding": ends, "rest": total - ends}


def numbers_of(parameter: torch.nn.Parameter) -> int:
    """Return how many numbers ``parameter`` holds: twice its elements if bitsandbytes packed two into each byte."""
    packed = getattr(parameter, "quant_state", None)
    return shape_of_parameter(parameter).numel() if packed is None else packed.shape.numel()


def shape_of_parameter(parameter: torch.nn.Parameter) -> torch.Size:
    """Return the shape of the whole ``parameter``, which ZeRO-3 leaves empty between its uses."""
    return getattr(parameter, "ds_shape", parameter.shape)


def layer_matrices(model: PreTrainedModel, stacks: bool = False) -> dict[str, torch.nn.Parameter]:
    """Return the matrices of the layers by name, in the order of ``named_parameters``.

    This is the one place that says which parameters these are, trained or frozen: those with two dimensions. Not among
    them: tables that are looked up (token and position embeddings), the head, and vectors (norms and biases). Of GPT-2:

        wte, wpe, lm_head                                       no
        c_attn.weight, c_proj.weight, c_fc.weight               yes
        ln_1.weight, c_attn.bias                                no

    Args:
        stacks: also return parameters with more than two dimensions, such as the experts of a layer,
            (experts, rows, columns), which are a matrix for each expert.
    """
    others = {id(parameter) for parameter in [*embeddings(model), model.get_output_embeddings().weight]}
    found = {}
    for name, parameter in model.named_parameters():
        dimensions = len(shape_of_parameter(parameter))
        if id(parameter) not in others and (dimensions == 2 or (stacks and dimensions > 2)):
            found[name] = parameter
    return found


def embeddings(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Return the weights of all embeddings of ``model``: of tokens, and of positions where they are learnt."""
    return [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]


def embedding_and_head(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Return the weights of the token embedding and of the head: one if they are tied, or if there is no head."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(module.weight): module.weight for module in modules if module is not None}.values())


def matmul_parameters(model: PreTrainedModel, trained: bool = False) -> int:
    """Count the parameters of matrix products: the matrices of the layers, and the head.

    Args:
        trained: count only those that are trained.
    """
    parameters = [*layer_matrices(model, stacks=True).values(), model.get_output_embeddings().weight]
    return sum(numbers_of(parameter) for parameter in parameters if parameter.requires_grad or not trained)
