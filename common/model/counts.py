"""Parameters of a model, FLOPs a token, and the peak FLOP/s of known devices: for the MFU (model FLOPs utilization)."""

import re

import torch
from transformers import PretrainedConfig, PreTrainedModel

from common.distributed.accelerator import device_name

# What the configs of mixtures of experts call the number of experts of a layer, and of those that a token is sent to.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
# Parts of the names of parameters that choose experts. A shared expert may have a gate, too.
ROUTERS = {"gate", "router", "shared_expert_gate"}

# Dense 16-bit peak of the matrix units in TFLOP/s, from the vendors' data sheets. The first entry that is among the
# words of the device's name counts. V100 and T4 have fp16 only. A device that is not listed gets no MFU, not a guessed
# one. AMD: https://www.amd.com/en/products/accelerators/instinct.html; half of an MI250X is a device of its own.
# Ascend: matrix cores x a product of 16 x 16 x 16 a cycle x their clock, all from CANN's data/platform_config/*.ini.
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "H200": 989, "GH200": 989, "H20": 148,
    "B200": 2250, "B300": 2250, "A100": 312, "A800": 312, "A40": 149.7, "A30": 165, "A10G": 70, "A10": 125,
    "L40S": 362, "L40": 181, "L4": 121, "RTX 4090": 165.2, "RTX 3090": 71, "V100": 125, "T4": 65,
    "MI300X": 1307.4, "MI325X": 1307.4, "MI250X": 191.5,
    "Ascend910B2": 353.9, "Ascend910B2C": 353.9, "Ascend910B3": 294.9, "Ascend910B4": 245.8,
}  # fmt: skip
# Of one core of Apple's GPUs, by generation: 128 multiply-adds a cycle, as fast in 16 bit as in 32. Apple gives M1 and
# M2 whole (8 cores: 2.6; 10 cores: 3.6), M3 and M4 follow from their clocks of 1.398 and 1.578 GHz.
# Source: https://www.apple.com/newsroom, https://github.com/philipturner/metal-benchmarks
APPLE_TFLOPS_A_CORE = {"M1": 0.325, "M2": 0.36, "M3": 0.358, "M4": 0.404}
# The bundled sample (README.md): 3,737 tokens/s of 4.2M parameters on two cores, times 6 FLOPs, evaluation included.
CPU_FLOPS_A_CORE = 47e9


def flops_per_token(model: PreTrainedModel, context_length: int) -> int:
    """Return the FLOPs of training on one token: forward counts once, backward twice, 2 FLOPs per multiply-add.

    The sum of two terms:

        6 x parameters of matrix products that a token meets (with the head; 4 x those that are frozen, as under LoRA)
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
    if device.type == "cpu" or not half_precision:
        return None
    peaks = PEAK_TFLOPS
    if device.type == "mps":
        cores = torch.backends.mps.get_core_count()
        peaks = {generation: cores * peak for generation, peak in APPLE_TFLOPS_A_CORE.items()}
    return peak_by_name(device_name(device), peaks)


def peak_by_name(name: str, peaks: dict[str, float] = PEAK_TFLOPS) -> float | None:
    """Return the peak of the first entry of ``peaks`` that is among the words of a device's name; None without one."""
    return next((peak for known, peak in peaks.items() if re.search(rf"\b{known}\b", name, re.IGNORECASE)), None)


def parameter_report(model: PreTrainedModel) -> dict[str, int]:
    """Count parameters: all (``total``), those of the embedding and an untied head (``embedding``), and the rest.

    ``active`` are those that a token meets: fewer than ``total`` if each token is sent to a few of many experts.
    """
    total = sum(map(numbers_of, model.parameters()))
    ends = sum(map(numbers_of, embedding_and_head(model)))
    active = sum(met_numbers(model, name, parameter) for name, parameter in model.named_parameters())
    return {"total": total, "embedding": ends, "rest": total - ends, "active": active}


def parameters_in_words(model: PreTrainedModel) -> str:
    """Return ``parameter_report`` as text."""
    counts = parameter_report(model)
    text = "{total:,} = {embedding:,} embedding + {rest:,} others".format(**counts)
    if counts["active"] == counts["total"]:
        return text
    met = f"{experts_per_token(model.config)} of {number_of_experts(model.config)} experts a layer, none drops a token"
    return f"{text}; active, met by a token: {counts['active']:,} ({met})"


def experts_per_token(config: PretrainedConfig) -> int:
    """Return the experts of a layer that a token is sent to, without shared ones; 0 for a dense model."""
    return _first_number(config, EXPERTS_PER_TOKEN)


def number_of_experts(config: PretrainedConfig) -> int:
    """Return the experts of a layer, without shared ones; 0 for a dense model."""
    return _first_number(config, EXPERTS)


def is_router(name: str) -> bool:
    """Whether the parameter called ``name`` belongs to a router."""
    return not ROUTERS.isdisjoint(name.split("."))


def is_expert(model: PreTrainedModel, name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether ``parameter`` belongs to experts that tokens are sent to: not to all tokens, as shared experts do."""
    shape = shape_of_parameter(parameter)
    stacked = len(shape) == 3 and shape[0] == number_of_experts(model.config) and min(shape) > 1
    return not is_router(name) and (stacked or "experts" in name.split("."))


def met_numbers(model: PreTrainedModel, name: str, parameter: torch.nn.Parameter) -> int:
    """Return how many numbers of ``parameter`` a token meets: of stacked experts, those that it is sent to."""
    experts, met = number_of_experts(model.config), experts_per_token(model.config)
    if not (experts and met and is_expert(model, name, parameter)):
        return numbers_of(parameter)
    return numbers_of(parameter) * min(met, experts) // experts


def _first_number(config: PretrainedConfig, names: tuple[str, ...]) -> int:
    """Return the first of ``names`` that the text config has: a number, or the largest of a list; else 0."""
    text = config.get_text_config()
    for name in names:
        value = getattr(text, name, None)
        if value:
            return max(value) if isinstance(value, list | tuple) else value
    return 0


def cpu_flops(cores: int) -> float:
    """Return about how many FLOP/s of a training step so many CPU cores make together."""
    return CPU_FLOPS_A_CORE * cores


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
    them: tables that are looked up (token and position embeddings), the head, vectors (norms and biases, also the
    biases of all experts in one tensor), routers, and the decay rates of state-space models. Of GPT-2:

        wte, wpe, lm_head                                       no
        c_attn.weight, c_proj.weight, c_fc.weight               yes
        ln_1.weight, c_attn.bias                                no

    Args:
        stacks: also return the experts of a layer, (experts, rows, columns), which are a matrix for each expert.
    """
    found = {}
    for name, parameter in multiplied(model).items():
        dimensions = len(shape_of_parameter(parameter))
        stack = dimensions == 3 and is_expert(model, name, parameter)
        if not is_router(name) and (dimensions == 2 or (stacks and stack)):
            found[name] = parameter
    return found


def multiplied(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of the layers that tokens are multiplied by: matrices, routers, experts, convolutions."""
    others = {id(parameter) for parameter in [*embeddings(model), model.get_output_embeddings().weight]}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in others
        and len(shape_of_parameter(parameter)) > 1
        and not name.endswith(("bias", "A_log"))
    }


def embeddings(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Return the weights of all embeddings of ``model``: of tokens, and of positions where they are learnt."""
    return [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]


def embedding_and_head(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Return the weights of the token embedding and of the head: one if they are tied, or if there is no head."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(module.weight): module.weight for module in modules if module is not None}.values())


def matmul_parameters(model: PreTrainedModel, trained: bool = False) -> int:
    """Count the parameters of matrix products that a token meets: those of the layers, and the head.

    Args:
        trained: count only those that are trained.
    """
    parameters = multiplied(model) | {"head": model.get_output_embeddings().weight}
    return sum(
        met_numbers(model, name, parameter)
        for name, parameter in parameters.items()
        if parameter.requires_grad or not trained
    )


def _named(model: PreTrainedModel) -> list[tuple[str, torch.nn.Parameter]]:
    return list(model.named_parameters())
