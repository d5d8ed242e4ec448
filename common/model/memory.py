"""What a run will need of the device's memory: predicted before anything is loaded.

The prediction adds up what is there at the peak of a step: in the loss of the last micro-batch or, if there is one
micro-batch only, whose gradients come later, maybe at the beginning or at the end of backward:

    parameters, gradients, optimizer states     bytes a parameter, divided as the strategy divides them
    activations                                 bytes a token and layer that the backward pass needs
    logits                                      a chunk of them with the fused loss, 12 bytes each without

The factors follow from what each operation saves; only the three for uncompiled layers are fitted. Of 74 measured peaks
(H100 and H200, 123M to 7B parameters, eager and compiled, one and two cards) 72 are within 5%
(tests/model/test_memory.py); fsdp2_offload on one card needed 10% more, zero3_offload with 0.5B 8% less.
"""

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from common.model.counts import numbers_of, shape_of_parameter
from common.model.from_config import hands_on_bf16
from common.model.linear_cross_entropy import CHUNK_BYTES
from common.system import GIB

CONTEXT_BYTES = 0.6 * GIB  # CUDA context and libraries, outside of torch's allocator; assumed, not measured
BUCKET_PARAMETERS = 5e8  # DeepSpeed's default reduce_bucket_size
LIVE_PARAMETERS = 1e9  # DeepSpeed's default stage3_max_live_parameters
EIGHT_BIT_BYTES = 2 * (1 + 4 / 256)  # of both states: a byte a number, an fp32 scale for 256
# Of a number: half a byte, an 8-bit scale for 64, an fp32 one for 256 of these.
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Setting:
    """What decides how much memory a model needs on each card."""

    rows: int  # of a micro-batch
    context_length: int
    strategy: str = "single"  # single, ddp, zero1, zero2, zero3, fsdp2
    processes: int = 1
    precision: str = "bf16"  # no, fp16, bf16, fp8: of the computation
    compiled: bool = True
    recompute: bool = False
    fused_loss: bool = True
    optimizer: str = "adamw"  # adamw, muon, adamw_8bit (Trainer's); rounding_32bit, rounding_8bit (LowMemoryAdamW)
    in_backward: bool = False  # the optimizer's step
    accumulated: bool = True  # several micro-batches a step
    bf16_stream: bool = True  # what keep_residual_in_bf16 does; plain Trainer does not
    method: str | None = None  # of recipes/low_memory_16gb.py: full, lora, qlora; None: another recipe
    offload_optimizer: bool = False
    offload_parameters: bool = False


@dataclass(frozen=True)
class Need:
    """Bytes on each card, by what they are for."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    framework: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def as_json(self, limit_gib: float | None) -> dict:
        named = {f"{name}_gib": round(value / GIB, 3) for name, value in vars(self).items()}
        total = round(self.total / GIB, 3)
        return {"fits": None if limit_gib is None else total <= limit_gib, "total_gib": total, **named}


def predict(model: PreTrainedModel, setting: Setting) -> Need:
    """Return what training ``model`` needs on each card. The model may be on the meta device."""
    half = 4 if setting.precision == "no" else 2
    divided = setting.strategy.startswith("zero") or setting.strategy == "fsdp2"
    autocast = half == 2 and not divided and model.get_input_embeddings().weight.itemsize == 4
    cast = setting.bf16_stream and setting.precision in ("bf16", "fp8") and hands_on_bf16(model)
    residual = 4 if half == 4 or (autocast and not cast) else 2
    parameters, gradients, states, buffers = bytes_by_strategy(model, setting, half)
    framework = buffers + CONTEXT_BYTES
    activations = activation_bytes(model, setting, residual, half, autocast)
    copies = copy_bytes(model, setting, half) if autocast and setting.precision != "fp8" else 0.0
    logits = logit_bytes(model, setting, half, copied=autocast)
    layer = 0.0  # what one layer's activations take, which come back when the logits are gone
    if setting.recompute:
        layer = activation_bytes(model, replace(setting, recompute=False), residual, half, autocast) / _layers(model)
    bucket = bucket_bytes(setting, half)
    first, last = gradients_in_backward(model, gradients, setting.in_backward)
    if setting.accumulated and not setting.in_backward:
        waiting = first if bucket and _tied(model) else 0.0
        activations += copies + max(0.0, layer + bucket + waiting - logits)
        return Need(parameters, gradients, states, activations, logits, framework)
    again = layer if setting.recompute else copies
    moments = [
        Need(parameters, 0.0, states, activations + copies, logits, framework),
        Need(parameters, first, states, activations + again, 0.0, framework + bucket),
        Need(parameters, last, states, layer, 0.0, framework + bucket),
    ]
    return max(moments, key=lambda need: need.total)


def bytes_by_strategy(model: PreTrainedModel, setting: Setting, half: int) -> tuple[float, float, float, float]:
    """Return the bytes on each card of parameters, gradients, optimizer states, and of buffers to exchange them.

    Args:
        half: bytes a number of the computation. Under ZeRO the parameters are in it, and their masters in fp32 count as
            optimizer states.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters, states = parameter_bytes(model, setting.method == "qlora"), optimizer_bytes(model, setting.optimizer)
    gradients, n = sum(map(stored_bytes, trained)), setting.processes
    buffers = gradients if setting.strategy == "ddp" else 0.0
    if setting.strategy.startswith("zero"):
        stage, count = int(setting.strategy[-1]), sum(map(numbers_of, model.parameters()))
        masters = 4 * sum(map(numbers_of, trained))
        parameters = half * count / (n if stage == 3 else 1)
        gradients = masters / (1 if stage == 1 else n)
        states = (states + (masters if half == 2 else 0)) / n
        if stage == 3:  # what is gathered, and a bucket of gradients that is there whole from the start
            buffers = half * (min(count, LIVE_PARAMETERS) + BUCKET_PARAMETERS)
    elif setting.strategy == "fsdp2":
        parameters, gradients, states = parameters / n, gradients / n, states / n
        ends, count = _ends(model), sum(map(numbers_of, model.parameters()))
        buffers = half * (ends + 2 * (count - ends) / _layers(model))  # gathered: both ends, two layers
    if setting.offload_optimizer:
        gradients = states = 0.0
    return 0.0 if setting.offload_parameters else parameters, gradients, states, buffers


def bucket_bytes(setting: Setting, half: int) -> float:
    """Return the bytes of DeepSpeed's bucket of gradients under ZeRO-1 and 2, in which ZeRO-1 has them in fp32.

    It is made with the first gradient of a backward, in a size that no model's changes, and is gone at the end.
    """
    return BUCKET_PARAMETERS * {"zero1": 4, "zero2": half}.get(setting.strategy, 0)


def gradients_in_backward(model: PreTrainedModel, gradients: float, in_backward: bool) -> tuple[float, float]:
    """Return the bytes of gradients at the beginning and at the end of the only backward of a step.

    At the beginning there is the head's: tied, it waits for the embedding's, and the two are there before they are
    added up; untied, and used ``in_backward``, it goes at once. At the end there are all, or the embedding's alone.
    """
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    of_head, of_embedding = (numbers_of(p) * p.itemsize * p.requires_grad for p in (head, embedding))
    tied = _tied(model)
    last = (of_embedding if in_backward else gradients) + (of_head if tied else 0.0)
    return of_head if tied or not in_backward else 0.0, last


def parameter_bytes(model: PreTrainedModel, four_bits: bool) -> float:
    """Return the bytes of all parameters; ``four_bits``: as if the frozen matrices of the layers were in NF4.

    The largest of these is there unpacked, too.
    """
    ends = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    total, largest = 0.0, 0
    for parameter in model.parameters():
        packed = four_bits and is_matrix(parameter) and not parameter.requires_grad and id(parameter) not in ends
        total += NF4_BYTES * numbers_of(parameter) if packed else stored_bytes(parameter)
        largest = max(largest, numbers_of(parameter) if packed else 0)
    return total + 2 * 2 * largest  # unpacked to half precision for its product, twice, as measured


def optimizer_bytes(model: PreTrainedModel, optimizer: str) -> float:
    """Return the bytes of the optimizer's states for all trained parameters."""
    ends = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = id(model.get_output_embeddings().weight)
    total = 0.0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if optimizer == "muon" and is_matrix(parameter) and id(parameter) not in ends | {head}:
            total += 4 * numbers_of(parameter)  # one momentum
        elif optimizer == "rounding_8bit" and numbers_of(parameter) >= 4096:
            total += EIGHT_BIT_BYTES * numbers_of(parameter)
        elif optimizer == "adamw_8bit" and id(parameter) not in ends and numbers_of(parameter) >= 4096:
            total += EIGHT_BIT_BYTES * numbers_of(parameter)  # embeddings stay in fp32 by Trainer, small ones, too
        else:
            total += 8 * numbers_of(parameter)
    return total


def activation_bytes(model: PreTrainedModel, setting: Setting, residual: int, half: int, autocast: bool) -> float:
    """Return the bytes of all layers' activations, or of their inputs alone if they are recomputed.

    Saved of each token in each layer: its input and what attention adds to it, two norms' results, queries, keys and
    values, the attention's result, and the MLP's: two or three (gated) tensors as wide as it. In FP8, compiled, what
    norms and the MLP's activation hand to a product is made again in backward.

    Args:
        residual: bytes a number of the residual stream: 4 where autocast leaves the embedding's result in fp32.
        half: bytes a number of everything else.
        autocast: the parameters are in fp32, the products in half precision.
    """
    config, tokens = model.config.get_text_config(), setting.rows * setting.context_length
    if setting.recompute:
        return residual * config.hidden_size * tokens * _layers(model)
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries, keys = heads * head_size, (getattr(config, "num_key_value_heads", None) or heads) * head_size
    width, tensors = mlp_width(model)
    again = setting.compiled and setting.precision == "fp8"
    numbers = (0 if again else 2 * config.hidden_size) + 2 * queries + 2 * keys + width * (tensors - again)
    a_token = (residual + half) * config.hidden_size + half * numbers
    if not setting.compiled:  # norms in fp32, activation functions, copies: so many bytes for each of hidden_size
        a_token += (27 if residual == 4 else 23 if autocast else 17) * config.hidden_size
    return a_token * tokens * _layers(model)


def copy_bytes(model: PreTrainedModel, setting: Setting, half: int) -> float:
    """Return the bytes of the copies in half precision that autocast makes of fp32 matrices, and keeps till backward.

    The fused head's own is in logit_bytes.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = model.get_output_embeddings().weight
    matrices = [p for p in model.parameters() if is_matrix(p) and id(p) not in embeddings | {id(head)}]
    matrices += [] if setting.fused_loss else [head]
    return half * sum(numbers_of(parameter) for parameter in matrices if parameter.itemsize == 4)


def mlp_width(model: PreTrainedModel) -> tuple[int, int]:
    """Return how wide a token's MLP is, and how many tensors of that width it saves: three if it is gated, else two."""
    config = model.config.get_text_config()
    gated = any("gate_proj" in name or "gate_up" in name for name, _ in model.named_parameters())
    experts = getattr(config, "num_experts_per_tok", None)
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    if experts:
        width = experts * (getattr(config, "moe_intermediate_size", None) or width)
        width += getattr(config, "shared_expert_intermediate_size", None) or 0
    return width, 3 if gated else 2


def logit_bytes(model: PreTrainedModel, setting: Setting, half: int, copied: bool) -> float:
    """Return what logits and loss take at the peak; ``copied``: autocast makes a copy of the head's weight."""
    head, tokens = model.get_output_embeddings().weight, setting.rows * setting.context_length
    vocabulary, hidden = shape_of_parameter(head)
    if not setting.fused_loss:  # in half precision, in fp32, the softmax and its gradient's copy
        return 12 * tokens * vocabulary
    weight, chunk = vocabulary * hidden, min(CHUNK_BYTES, half * tokens * vocabulary)
    if not head.requires_grad:
        return chunk + 4 * tokens * hidden
    # Its gradient in fp32 is there with the logits first, then with its copy in the head's own precision.
    largest = max(chunk + (half * weight if copied else 0), head.itemsize * weight if head.itemsize < 4 else 0)
    return largest + 4 * weight + 4 * tokens * hidden


def is_matrix(parameter: torch.nn.Parameter) -> bool:
    return len(shape_of_parameter(parameter)) == 2


def stored_bytes(parameter: torch.nn.Parameter) -> int:
    """Return the bytes of the whole ``parameter`` as it is stored, packed or not."""
    return shape_of_parameter(parameter).numel() * parameter.itemsize


def _layers(model: PreTrainedModel) -> int:
    return model.config.get_text_config().num_hidden_layers


def _tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def _ends(model: PreTrainedModel) -> int:
    """Count the parameters of embedding and head."""
    ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    return sum({id(weight): numbers_of(weight) for weight in ends}.values())
