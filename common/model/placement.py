"""Tensor and expert parallelism: a model that is divided among processes while it is loaded.

One process of each machine builds or loads the whole model in main memory and writes it to a folder; then every process
reads its own part. transformers can also build a divided model from nothing, but then every process draws the *same*
random numbers for its part. transformers' plan of a family says how each matrix is divided:

    q, k, v, gate, up       by rows: each process computes some heads, some inner numbers
    o, down                 by columns: the results of all processes are added up
    embedding, head         by vocabulary

Expert parallelism, with FSDP2: each process has some of the experts of every layer, whole. It sends the tokens of its
rows to the processes that have their experts, and gets the results back. Everything else is sharded by FSDP2. If there
are more processes than divide the experts, every group of them has all experts, sharded by FSDP2 between the groups.

Sources: https://huggingface.co/docs/transformers/perf_infer_gpu_multi,
https://huggingface.co/docs/transformers/expert_parallelism
"""

import copy
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from accelerate.utils import gather_object
from packaging import version
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.console import InputError, say
from common.distributed.launch import Launch
from common.model.counts import experts_per_token, number_of_experts

DIVIDES_SINCE = "5.24"  # transformers; tried with this release
# How a plan may divide the head: its loss is computed from each process's part of the vocabulary.
HEAD_STYLES = ("colwise_gather_output", "colwise")
EXPERTS_STYLE = "ep_dispatch_experts"  # of a plan that sends tokens to the processes that have their experts


def check_expert_plan(model: PreTrainedModel, expert_parallel: int) -> None:
    """Refuse a model whose experts cannot be divided among ``expert_parallel`` processes. It may be on the meta device.

    Raises:
        InputError: with what works.
    """
    if expert_parallel == 1:
        return
    check_version("expert parallelism")
    config, name = model.config.get_text_config(), type(model).__name__
    experts = number_of_experts(config)
    if not experts:
        raise InputError(f"expert parallelism: {name} has no experts. Use fsdp2.yaml.")
    if EXPERTS_STYLE not in (config.base_model_ep_plan or {}).values():
        raise InputError(
            f"expert parallelism: transformers has no plan that divides the experts of {name}. Use fsdp2.yaml."
        )
    if experts % expert_parallel:
        raise InputError(
            f"expert parallelism: {experts} experts of {name} cannot be divided among {expert_parallel} processes. Use "
            "a parallelism_config_ep_size that divides them, or fsdp2.yaml."
        )


def check_version(what: str) -> None:
    """Raise InputError if transformers is too old to divide a model while it is loaded."""
    if version.parse(transformers.__version__) < version.parse(DIVIDES_SINCE):
        raise InputError(f"{what}: needs transformers {DIVIDES_SINCE}, here is {transformers.__version__}.")


def check_plan(model: PreTrainedModel, tensor_parallel: int) -> None:
    """Refuse a model that cannot be divided among ``tensor_parallel`` processes. It may be on the meta device.

    Raises:
        InputError: with what works.
    """
    if tensor_parallel == 1:
        return
    check_version("tensor parallelism")
    config, name = model.config.get_text_config(), type(model).__name__
    instead = "Use fsdp2.yaml"
    if not config.base_model_tp_plan:
        raise InputError(f"tensor parallelism: transformers has no plan that divides {name}. {instead}.")
    if model.tp_plan.get("lm_head") not in HEAD_STYLES:
        raise InputError(f"tensor parallelism: transformers' plan leaves the head of {name} whole. {instead}.")
    if experts_per_token(config):
        raise InputError(f"tensor parallelism: experts ({name}) were not tried with it here. {instead}.")
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % tensor_parallel or key_heads % tensor_parallel:
        raise InputError(
            f"tensor parallelism: {heads} heads and {key_heads} key-value heads of {name} cannot be divided among "
            f"{tensor_parallel} processes. {instead}, or a --parallelism_config_tp_size that divides both."
        )


def place_model(model: PreTrainedModel, launch: Launch, folder: str, seed: int) -> PreTrainedModel:
    """Return ``model`` divided among processes, if the launch asks for it; otherwise ``model`` itself.

    Args:
        model: whole in the first process of each machine, without memory in the others.
        folder: where the whole weights are kept until all processes have read their part.
        seed: of random numbers from here on, such as dropout. Only one process drew the weights, and processes that
            share a row must draw the same numbers from now on.

    Raises:
        InputError: the model cannot be divided so.
    """
    if launch.building_device is None:
        return model
    torch.manual_seed(seed)
    if not launch.divided:
        give_memory(model)  # FSDP2 sends out the weights of the first process when training starts
        return model
    check_plan(model, launch.tensor_parallel)
    check_expert_plan(model, launch.expert_parallel)
    own = None
    if model.device.type != "meta":
        Path(folder).mkdir(parents=True, exist_ok=True)
        own = tempfile.mkdtemp(prefix="whole-model-", dir=folder)
        say(f"dividing the model among {launch.processes} processes")
    try:
        if own is not None:
            model.save_pretrained(own)
        places = gather_object([own])  # of all processes; those of a machine are next to each other
        first = launch.process // launch.local_processes * launch.local_processes
        divided = _divided(model, launch, places[first])
        torch.distributed.barrier()
    finally:
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)
    torch.manual_seed(seed)
    return divided


def give_memory(model: PreTrainedModel) -> None:
    """Give the parameters of a model without memory some that is never written to, so that it is not used up either.

    Accelerate (1.15) finds the parameters of an optimizer by their address, and on the meta device all have the same.
    """
    if model.device.type != "meta":
        return
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, device="cpu")
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=parameter.requires_grad))
    model.tie_weights()


def _divided(model: PreTrainedModel, launch: Launch, folder: str) -> PreTrainedModel:
    from transformers.distributed import DistributedConfig  # the sizes are new: DIVIDES_SINCE

    config = copy.deepcopy(model.config)
    # As in model_from_config: the embedding of a padding token would get no gradient.
    config.pad_token_id = config.get_text_config().pad_token_id = None
    sizes = DistributedConfig(
        tp_size=launch.tensor_parallel, fsdp_size=launch.shards, ep_size=launch.expert_parallel,
        fsdp_mixed_precision=launch.precision == "bf16",
    )  # fmt: skip
    divided = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, distributed_config=sizes, trust_remote_code=False
    )
    for name in ("pad_token_id", "eos_token_id"):
        setattr(divided.config, name, getattr(model.config, name))
    divided.generation_config = model.generation_config
    return divided
