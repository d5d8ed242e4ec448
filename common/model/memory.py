"""Predict the device memory that a run will need, before anything is loaded.

The prediction adds up what is there at the peak of a step. With several micro-batches, the peak is in the loss of the
last one. With a single micro-batch, whose gradients come later, it may also be at the beginning or at the end of
backward. The parts:

    parameters, gradients, optimizer states     bytes a parameter, divided as the strategy divides them
    activations                                 bytes a token and layer that the backward pass needs
    logits                                      a chunk of them with the fused loss, 12 bytes each without

The factors follow from what each operation saves; only the three for uncompiled layers are fitted. Of 74 measured peaks
(H100 and H200, 123M to 7B parameters, eager and compiled, one and two cards), 72 are within 5%
(tests/model/test_memory.py). The other two: fsdp2_offload on one card needed 10% more, zero3_offload with 0.5B 8% less.
"""

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, TrainingArguments

from common.distributed.strategy import DDP, SINGLE, Strategy
from common.model.counts import (
    embedding_and_head,
    embeddings,
    experts_per_token,
    head_size,
    layer_matrices,
    numbers_of,
    shape_of_parameter,
)
from common.model.from_config import hands_on_bf16
from common.model.linear_cross_entropy import CHUNK_BYTES
from common.system import GIB

CONTEXT_BYTES = 0.6 * GIB  # CUDA context and libraries, outside of torch's allocator; assumed, not measured
BUCKET_PARAMETERS = 5e8  # DeepSpeed's default reduce_bucket_size
LIVE_PARAMETERS = 1e9  # DeepSpeed's default stage3_max_live_parameters
# 8-bit states by bitsandbytes: a byte for each number of the two averages, an fp32 scale for each block of 256.
NUMBERS_A_BLOCK = 256
EIGHT_BIT_BYTES = 2 * (1 + 4 / NUMBERS_A_BLOCK)
SMALLEST_IN_8_BITS = 4096  # numbers; the states of smaller parameters stay in fp32
# 4-bit weights by bitsandbytes: half a byte a number, an 8-bit scale for 64 numbers, an fp32 scale for 256 of these.
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Setting:
    """What decides how much memory a model needs on each card."""

    rows: int  # of a micro-batch
    context_length: int
    strategy: Strategy = SINGLE  # or its name
    processes: int = 1
    copies: int = 1  # of the model under FSDP2, each sharded by processes / copies
    tensor: int = 1  # processes that compute each layer together, with parts of its matrices
    expert: int = 1  # processes among which the experts of a layer are divided
    precision: str = "bf16"  # no, fp16, bf16, fp8: of the computation
    compiled: bool = True
    recompute: bool = False
    recomputed: str = "all"  # what of it: a value of --recompute
    fused_loss: bool = True
    optimizer: str = "adamw"  # adamw, muon, adamw_8bit (Trainer's); rounding_32bit, rounding_8bit (LowMemoryAdamW)
    in_backward: bool = False  # the optimizer steps inside backward
    accumulated: bool = True  # several micro-batches a step
    bf16_stream: bool = True  # keep_residual_in_bf16 was called; plain Trainer does not call it
    method: str | None = None  # of recipes/low_memory_16gb.py: full, lora, qlora; None: another recipe
    offload_optimizer: bool = False
    offload_parameters: bool = False
    graphs: bool = False  # forward, backward and Muon's updates are CUDA graphs

    def __post_init__(self):
        object.__setattr__(self, "strategy", Strategy(self.strategy))


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
        """Return the parts and their total in GiB, and whether the total is within ``limit_gib``."""
        named = {f"{name}_gib": round(value / GIB, 3) for name, value in vars(self).items()}
        total = round(self.total / GIB, 3)
        return {"fits": None if limit_gib is None else total <= limit_gib, "total_gib": total, **named}


def optimizer_name(training: TrainingArguments) -> str:
    """Return the value of ``--optim``, which is a string or an enum of transformers."""
    return getattr(training.optim, "value", training.optim)


def state_bits(optimizer: str) -> int:
    """Return the bits a number of an optimizer's states: 8, 4, or 32.

    Args:
        optimizer: a value of ``--optim`` (paged_adamw_8bit: 8), or of ``Setting.optimizer`` (rounding_8bit: 8).
    """
    for bits in (8, 4):
        if f"{bits}bit" in optimizer:
            return bits
    return 32


def predict(model: PreTrainedModel, setting: Setting) -> Need:
    """Return what training ``model`` needs on each card. The model may be on the meta device."""
    number_bytes = 4 if setting.precision == "no" else 2  # of the computation
    # DeepSpeed and FSDP2 cast the parameters themselves. Elsewhere, autocast makes a copy of fp32 parameters.
    casts = setting.strategy.is_deepspeed or setting.strategy.is_fsdp
    autocast = number_bytes == 2 and not casts and model.get_input_embeddings().weight.itemsize == 4
    cast = setting.bf16_stream and setting.precision in ("bf16", "fp8") and hands_on_bf16(model)
    residual_bytes = 4 if number_bytes == 4 or (autocast and not cast) else 2
    parameters, gradients, states, buffers = bytes_by_strategy(model, setting, number_bytes)
    framework = buffers + CONTEXT_BYTES
    activations = activation_bytes(model, setting, residual_bytes, number_bytes, autocast)
    copies = copy_bytes(model, setting, number_bytes) if autocast and setting.precision != "fp8" else 0.0
    logits = logit_bytes(model, setting, number_bytes, copied=autocast)
    kept = replace(setting, recompute=False)
    one_layer = activation_bytes(model, kept, residual_bytes, number_bytes, autocast) / _layers(model)
    # With recompute, backward makes the activations of one layer again, when the logits are gone.
    layer = 0.0
    if setting.recompute:
        layer = one_layer - setting.rows * setting.context_length * kept_bytes(model, setting, number_bytes)
    if setting.graphs:  # they keep their memory: an evaluation has its own, and Muon the directions of its updates
        framework += logits + one_layer
        if setting.optimizer == "muon":
            framework += 4 * sum(map(numbers_of, layer_matrices(model).values()))
    bucket = bucket_bytes(setting, number_bytes)
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


def bytes_by_strategy(model: PreTrainedModel, setting: Setting, number_bytes: int) -> tuple[float, float, float, float]:
    """Return the bytes on each card of parameters, gradients, optimizer states, and of buffers to exchange them.

    Args:
        number_bytes: bytes a number of the computation. Under ZeRO the parameters are kept in it, and their fp32
            masters count as optimizer states.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters = parameter_bytes(model, setting.method == "qlora")
    states = optimizer_bytes(model, setting.optimizer)
    gradients = sum(map(stored_bytes, trained))
    count, processes = sum(map(numbers_of, model.parameters())), setting.processes
    buffers = gradients if setting.strategy == DDP else 0.0
    if setting.strategy.is_deepspeed:
        masters = 4 * sum(map(numbers_of, trained))
        parameters = number_bytes * count / (processes if setting.strategy.shards_parameters else 1)
        gradients = masters / (processes if setting.strategy.shards_gradients else 1)
        states = (states + (masters if number_bytes == 2 else 0)) / processes
        if setting.strategy.shards_parameters:
            # Gathered parameters, and a bucket of gradients, which is there from the start.
            buffers = number_bytes * (min(count, LIVE_PARAMETERS) + BUCKET_PARAMETERS)
    elif setting.strategy.is_fsdp:
        shards = max(1, processes // setting.copies)
        parameters, gradients, states = parameters / shards, gradients / shards, states / shards
        ends = sum(map(numbers_of, embedding_and_head(model)))
        gathered = ends + 2 * (count - ends) / _layers(model)  # both ends, two layers
        buffers = number_bytes * gathered / setting.tensor
    if setting.offload_optimizer:
        gradients = states = 0.0
    return 0.0 if setting.offload_parameters else parameters, gradients, states, buffers


def main_memory_bytes(model: PreTrainedModel, setting: Setting) -> float:
    """Return the bytes of main memory, of all cards together, that hold what ``setting`` offloads; 0 if nothing is.

    Parameters, gradients and states are divided among the cards, so all of them hold one whole: with AdamW 16 bytes a
    parameter under FSDP2, 18 under ZeRO-3 in half precision.
    """
    whole = replace(setting, processes=1, offload_optimizer=False, offload_parameters=False)
    parameters, gradients, states, _ = bytes_by_strategy(model, whole, 4 if setting.precision == "no" else 2)
    offloaded = parameters if setting.offload_parameters else 0.0
    return offloaded + (gradients + states if setting.offload_optimizer else 0.0)


def bucket_bytes(setting: Setting, number_bytes: int) -> float:
    """Return the bytes of DeepSpeed's bucket of gradients under ZeRO-1, which has it in fp32, and under ZeRO-2.

    Its size does not depend on the model. DeepSpeed makes it with the first gradient of a backward pass and frees it at
    the end of the pass.
    """
    if setting.strategy.zero_stage not in (1, 2):
        return 0.0
    return BUCKET_PARAMETERS * (number_bytes if setting.strategy.shards_gradients else 4)


def gradients_in_backward(model: PreTrainedModel, gradients: float, in_backward: bool) -> tuple[float, float]:
    """Return the bytes of gradients at the beginning and at the end of the only backward pass of a step.

    At the beginning there is the head's gradient. If the head is tied, it waits for the embedding's gradient, and both
    are there before they are added. If it is not tied, the optimizer that steps ``in_backward`` uses it and frees it at
    once. At the end there are all gradients, or with ``in_backward`` only the embedding's.
    """
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    of_head, of_embedding = (numbers_of(p) * p.itemsize * p.requires_grad for p in (head, embedding))
    tied = _tied(model)
    last = (of_embedding if in_backward else gradients) + (of_head if tied else 0.0)
    return of_head if tied or not in_backward else 0.0, last


def parameter_bytes(model: PreTrainedModel, four_bits: bool) -> float:
    """Return the bytes of all parameters.

    Args:
        four_bits: count the frozen matrices of the layers as if they were in NF4, and the largest of them once more,
            unpacked.
    """
    matrices = layer_matrices(model).values() if four_bits else []
    packed = {id(parameter) for parameter in matrices if not parameter.requires_grad}
    total, largest = 0.0, 0
    for parameter in model.parameters():
        if id(parameter) in packed:
            total += NF4_BYTES * numbers_of(parameter)
            largest = max(largest, numbers_of(parameter))
        else:
            total += stored_bytes(parameter)
    return total + 2 * 2 * largest  # unpacked to half precision for its product, twice, as measured


def optimizer_bytes(model: PreTrainedModel, optimizer: str) -> float:
    """Return the bytes of the optimizer's states for all trained parameters.

    Args:
        optimizer: see ``Setting.optimizer``.
    """
    matrices = {id(parameter) for parameter in layer_matrices(model, stacks=True).values()}
    in_fp32 = set()  # Trainer has bitsandbytes keep the states of embeddings in fp32; LowMemoryAdamW does not
    if optimizer == "adamw_8bit":
        in_fp32 = {id(parameter) for parameter in embeddings(model)}
    total = 0.0
    for parameter in model.parameters():
        count = numbers_of(parameter)
        if not parameter.requires_grad:
            continue
        if optimizer == "muon" and id(parameter) in matrices:
            total += 4 * count  # one momentum
        elif state_bits(optimizer) == 8 and count >= SMALLEST_IN_8_BITS and id(parameter) not in in_fp32:
            total += EIGHT_BIT_BYTES * count
        else:
            total += 8 * count
    return total


def activation_bytes(
    model: PreTrainedModel, setting: Setting, residual_bytes: int, number_bytes: int, autocast: bool
) -> float:
    """Return the bytes of the activations of all layers, or of their inputs and what recompute keeps beside.

    Saved of each token in each layer: its input, the sum after attention, the results of two norms, queries, keys and
    values, the result of attention, and two tensors as wide as the MLP, or three if it is gated. In FP8, compiled, the
    results of norms and of the MLP's activation function are not saved but made again in backward. With experts, three
    tensors of the layer's width for each expert that a token meets: what it is given, sorted by expert and before, and
    what it returns.

    Args:
        residual_bytes: bytes a number of the residual stream; 4 where autocast leaves the embedding's result in fp32.
        number_bytes: bytes a number of everything else.
        autocast: the parameters are in fp32, the matrix products in half precision.
    """
    config, tokens = model.config.get_text_config(), setting.rows * setting.context_length
    if setting.recompute:
        kept = residual_bytes * config.hidden_size + kept_bytes(model, setting, number_bytes)
        again = len(range(0, _layers(model), every_layers(setting)))
        others = (_layers(model) - again) / _layers(model)
        if others:
            others *= activation_bytes(model, replace(setting, recompute=False), residual_bytes, number_bytes, autocast)
        return kept * tokens * again + others
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    queries, keys = heads * head_size(model), key_heads * head_size(model)
    width, tensors = mlp_width(model)
    again = setting.compiled and setting.precision == "fp8"
    numbers = (2 * queries + 2 * keys + width * (tensors - again)) / setting.tensor
    numbers += 0 if again else 2 * config.hidden_size
    numbers += 3 * experts_per_token(config) * config.hidden_size
    a_token = (residual_bytes + number_bytes) * config.hidden_size + number_bytes * numbers
    if not setting.compiled:  # norms in fp32, activation functions, copies: so many bytes for each of hidden_size
        a_token += (27 if residual_bytes == 4 else 23 if autocast else 17) * config.hidden_size
    return a_token * tokens * _layers(model)


def every_layers(setting: Setting) -> int:
    """Return 2 if every second layer is recomputed, 1 if all are."""
    return int(setting.recomputed) if setting.recomputed.isdecimal() else 1


def kept_bytes(model: PreTrainedModel, setting: Setting, number_bytes: int) -> float:
    """Return the bytes of a token in a recomputed layer that are kept beside the layer's input.

    Of the results of attention, which come with a sum in fp32 a head; and of matrix products: queries, keys and values,
    the output of attention, and the first of an MLP (two if it is gated). Not compiled, also that of the MLP's last
    product, which nobody needs again.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = (number_bytes * heads * head_size(model) + 4 * heads) / setting.tensor
    if setting.recomputed == "keep_attention":
        return attention
    if setting.recomputed != "keep_products":
        return 0.0
    width, tensors = mlp_width(model)
    numbers = ((heads + 2 * key_heads) * head_size(model) + width * (tensors - 1)) / setting.tensor
    numbers += config.hidden_size
    return attention + number_bytes * (numbers + (0 if setting.compiled else config.hidden_size))


def copy_bytes(model: PreTrainedModel, setting: Setting, number_bytes: int) -> float:
    """Return the bytes of the half-precision copies that autocast makes of fp32 matrices and keeps until backward.

    The copy that the fused head makes of its own weight is part of ``logit_bytes``.
    """
    matrices = list(layer_matrices(model, stacks=True).values())
    if not setting.fused_loss:
        matrices.append(model.get_output_embeddings().weight)
    return number_bytes * sum(numbers_of(parameter) for parameter in matrices if parameter.itemsize == 4)


def mlp_width(model: PreTrainedModel) -> tuple[int, int]:
    """Return the width of the MLP that a token meets, and how many tensors of that width it saves.

    Three tensors if the MLP is gated, else two. With experts, the width is that of all experts that a token meets.
    """
    config = model.config.get_text_config()
    gated = any("gate_proj" in name or "gate_up" in name for name, _ in model.named_parameters())
    experts = experts_per_token(config)
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    if isinstance(width, list | tuple):  # one for each layer, as in Gemma 3n
        width = round(sum(width) / len(width))
    if experts:
        width = experts * (getattr(config, "moe_intermediate_size", None) or width)
        width += shared_width(model)
    return width, 3 if gated else 2


def shared_width(model: PreTrainedModel) -> int:
    """Return the width of the experts of a layer that every token meets."""
    shared = [
        shape_of_parameter(parameter)[-1]
        for name, parameter in model.named_parameters()
        if "shared_expert" in name and name.endswith("down_proj.weight")  # (hidden size, width)
    ]
    return max(shared, default=0)


def logit_bytes(model: PreTrainedModel, setting: Setting, number_bytes: int, copied: bool) -> float:
    """Return the bytes of logits and loss at their peak.

    Args:
        number_bytes: bytes a number of the computation.
        copied: autocast makes a copy of the head's weight.
    """
    head, tokens = model.get_output_embeddings().weight, setting.rows * setting.context_length
    vocabulary, hidden = shape_of_parameter(head)
    vocabulary /= setting.tensor
    if not setting.fused_loss:  # in half precision, in fp32, and the softmax with its gradient's copy
        return 12 * tokens * vocabulary
    weight, chunk = vocabulary * hidden, min(CHUNK_BYTES, number_bytes * tokens * vocabulary)
    if not head.requires_grad:
        return chunk + 4 * tokens * hidden
    # The head's gradient is in fp32. First it is there together with the logits, then with its copy in the precision of
    # the head.
    with_logits = chunk + (number_bytes * weight if copied else 0)
    with_copy = head.itemsize * weight if head.itemsize < 4 else 0
    return max(with_logits, with_copy) + 4 * weight + 4 * tokens * hidden


def stored_bytes(parameter: torch.nn.Parameter) -> int:
    """Return the bytes of the whole ``parameter`` as it is stored, packed or not."""
    return shape_of_parameter(parameter).numel() * parameter.itemsize


def _layers(model: PreTrainedModel) -> int:
    return model.config.get_text_config().num_hidden_layers


def _tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight
