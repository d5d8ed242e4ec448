"""Pipeline parallelism: a decoder cut into stages, one or several a process, that pass on what they compute.

torch.distributed.pipelining has the schedules, and ``recipes/explicit_pipeline.py`` the loop. Here is what would train
wrongly without a message: the cut, its check, and the files of the model at the end. transformers' own ``pp_size`` is
for inference, and its ``save_pretrained`` would write the tensors of one process only (5.24).
"""

import copy
import json
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import DynamoBackend, TorchDynamoPlugin, gather_object
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.console import InputError, is_main_process, say
from common.distributed.accelerator import random_state, set_random_state
from common.distributed.launch import Launch
from common.distributed.strategy import DDP
from common.io import write_json


def divide_launch(launch: Launch, pipeline_processes: int, stages_per_process: int) -> Launch:
    """Return ``launch`` with its processes divided into pipelines of ``pipeline_processes`` (0: all in one pipeline).

    Raises:
        InputError: the launch, or the number of its processes, is not for pipelines.
    """
    if launch.strategy != DDP or launch.tensor_parallel * launch.context_parallel * launch.sequence_parallel > 1:
        raise InputError(
            f"strategy {launch.strategy}, {launch.processes} processes: a pipeline needs at least two processes, and "
            "nothing else that divides the model. Use accelerate_configs/cpu_2proc.yaml, or ddp.yaml with "
            "--num_processes 2."
        )
    if launch.precision not in (None, "no", "bf16"):
        raise InputError(f"mixed_precision {launch.precision}: a pipeline trains in bf16 or fp32 (no).")
    size = pipeline_processes if pipeline_processes > 0 else launch.processes
    if size < 2 or launch.processes % size:
        raise InputError(
            f"--pipeline_processes {pipeline_processes}: {launch.processes} processes cannot be divided into pipelines "
            f"of {size}. Use a divisor of {launch.processes} from 2 on, or leave it out: then all are one pipeline."
        )
    if stages_per_process < 1:
        raise InputError(f"--stages_per_process {stages_per_process}: must be at least 1.")
    return replace(launch, pipeline_parallel=size)


class Grid:
    """The processes as a grid: those of a column are a pipeline, those of a row are replicas of the same stages.

    Attributes:
        device: of this process.
        processes: of a pipeline.
        position: of this process in its pipeline, from 0.
        replica: its pipeline, from 0.
        pipeline, replicas: the process groups of its column and its row.
        ends: the first and the last process of its pipeline, which share a tied embedding; None in between.
    """

    def __init__(self, device: torch.device, processes: int, replicas: int):
        self.device, self.processes = device, processes
        mesh = init_device_mesh(device.type, (processes, replicas), mesh_dim_names=("pipeline", "replicas"))
        self.position, self.replica = mesh.get_local_rank("pipeline"), mesh.get_local_rank("replicas")
        self.pipeline, self.replicas = mesh.get_group("pipeline"), mesh.get_group("replicas")
        ends, _ = dist.new_subgroups_by_enumeration(mesh.mesh[[0, -1]].T.tolist())
        self.ends = ends if self.position in (0, processes - 1) else None
        # NCCL connects a group when it is first used, and waits for all of it: not in the middle of a schedule.
        dist.all_reduce(torch.zeros(1, device=device), group=self.pipeline)


def bubble_by_formula(processes: int, micro_batches: int, stages_per_process: int = 1) -> float:
    """Return the share of a step in which a process has nothing to do, if all stages are equally much work.

    The first micro-batch reaches the last process after ``processes`` - 1 stages, and the last one's gradients come
    back through as many: so much waiting, beside ``stages_per_process`` x ``micro_batches`` of work.

    Source: https://arxiv.org/abs/2104.04473, section 2.2 (there relative to the work, here to the whole step).

    Raises:
        InputError: the interleaved schedule cannot deal out so many micro-batches. It goes through the stages of a
            process in rounds of equal length, of as many micro-batches as there are processes or a few more.
    """
    rounds = max(1, micro_batches // processes)
    if stages_per_process > 1 and micro_batches % rounds:
        raise InputError(
            f"{micro_batches} micro-batches a step: the interleaved schedule needs {rounds} rounds of equal length. "
            f"Use a multiple of {processes}: --tokens_per_step, or another --per_device_train_batch_size."
        )
    waiting = processes - 1
    return waiting / (stages_per_process * micro_batches + waiting)


def divide_layers(model: PreTrainedModel, stages: int) -> list[range]:
    """Return which layers each stage gets: equally many, but fewer for the last stage, which has the head. Say so.

    The head counts as so many layers as it has times the parameters of a layer. Example: 12 layers and a head as large
    as 4 of them, 2 stages: 8 layers, and 4 with the head.

    Raises:
        InputError: this family cannot be cut, or there are fewer layers than stages.
    """
    _, _, layers = _plan(model)
    if len(layers) < stages:
        raise InputError(f"{stages} stages for {len(layers)} layers: each stage needs at least one. Use fewer stages.")
    of_layer = sum(parameter.numel() for parameter in layers[0].parameters())
    head = model.get_output_embeddings().weight.numel() / of_layer
    last = max(1, round((len(layers) + head) / stages - head))
    share, rest = divmod(len(layers) - last, stages - 1)
    counts = [*(share + (stage < rest) for stage in range(stages - 1)), last]
    divided = [range(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)]
    check_cut(model, divided)
    said = ", ".join(map(str, counts))
    say(f"stages: {stages}, of {said} layers; the last one has the head, as much work as {head:.1f} layers")
    return divided


def cut(model: PreTrainedModel, layers: range, first: bool, last: bool) -> PreTrainedModel:
    """Return a stage of ``model``: the same model, in which the modules of other stages only pass on their input.

    Its tensors are those of ``model``, and its parameters have the names that they have there. What belongs to which
    stage says the model's own plan (``pp_plan``): embeddings are of the first stage, the last norm and the head of the
    last one. Modules without parameters that are not in the plan, such as rotary positions, are in every stage.

    Args:
        layers: the layers of this stage, by number.
        first, last: whether it is the first or the last stage.
    """
    tensors = [*model.parameters(), *model.buffers()]
    part = copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})
    before, after, own_layers = _plan(part)
    foreign = [*([] if first else before), *([] if last else after)]
    for name in foreign:
        part.set_submodule(name, PassesOn())
    for number in range(len(own_layers)):
        if number not in layers:
            own_layers[number] = PassesOn()
    return part


def keep_only(optimizer: Optimizer, parts: torch.nn.Module) -> Optimizer:
    """Return ``optimizer``, made for a whole model and not used yet, with the parameters of ``parts`` only."""
    kept = {id(parameter) for parameter in parts.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in kept]
    return optimizer


def compile_layers(parts: Iterable[PreTrainedModel], plugin: TorchDynamoPlugin) -> None:
    """Compile the layers of ``parts``, each by itself, if the YAML's dynamo_config says so."""
    if plugin.backend == DynamoBackend.NO:
        return
    layers = [layer for part in parts for layer in _plan(part)[2] if not isinstance(layer, PassesOn)]
    for layer in layers:
        layer.compile(**plugin.to_kwargs())


class PassesOn(torch.nn.Identity):
    """Stands where another stage has a module: returns what it is given first."""

    def forward(self, hidden, *arguments, **named):
        return hidden


def _plan(model: PreTrainedModel) -> tuple[list[str], list[str], torch.nn.ModuleList]:
    """Return the names of the modules before the layers and after them, and the layers, by the plan of ``model``."""
    name = type(model).__name__
    plan = model.pp_plan if model.pp_plan else {}
    found = [module for module in plan if isinstance(model.get_submodule(module), torch.nn.ModuleList)]
    if len(found) != 1:
        raise InputError(
            f"{name}: transformers has no pipeline plan for it (base_model_pp_plan in its config class), so it cannot "
            "be cut into stages. Qwen2, Qwen3, Llama, Mistral and others have one."
        )
    [layers] = found
    names = [module for module in plan if model.get_submodule(module) is not model.get_output_embeddings()]
    place = names.index(layers)
    heads = [module for module in plan if module not in names]
    return names[:place], [*names[place + 1 :], *heads], model.get_submodule(layers)


@torch.no_grad()
def check_cut(model: PreTrainedModel, stages: list[range]) -> None:
    """Raise InputError unless the stages of ``model``, one after the other, compute what ``model`` computes.

    A family may do something to its hidden states outside of the modules of its plan. Granite scales them
    before the first layer, and each stage would do it again: training would run, on another model. Experts are refused,
    because the router's loss is over the layers of all stages.
    """
    name = type(model).__name__
    if getattr(model.config.get_text_config(), "num_experts_per_tok", None):
        raise InputError(f"{name}: the loss of its router is over the layers of all stages. Use wiki_zh_scratch.py.")
    covered = {id(parameter) for parameter in model.parameters()}
    was_training = model.training
    model.eval()
    ids = torch.arange(1, 17, device=model.device).view(2, 8) % model.config.vocab_size
    positions = torch.arange(8, device=model.device).expand(2, 8)
    settings = {"position_ids": positions, "use_cache": False}
    expected = model(input_ids=ids, **settings).logits.float()
    passed, seen = {"input_ids": ids}, []
    for number, layers in enumerate(stages):
        part = cut(model, layers, number == 0, number == len(stages) - 1)
        seen += [id(parameter) for parameter in part.parameters()]
        if number < len(stages) - 1:
            passed = {"inputs_embeds": part.base_model(**passed, **settings).last_hidden_state}
        else:
            found = part(**passed, **settings).logits.float()
    model.train(was_training)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    each_once = set(seen) == covered and len(seen) == len(covered) + tied  # a tied matrix is in two stages
    if not each_once or not torch.allclose(found, expected, rtol=1e-3, atol=1e-5):
        raise InputError(
            f"{name}: its stages do not compute what the whole model computes (it changes hidden states outside of the "
            "modules of its pipeline plan). Use another family, or wiki_zh_scratch.py."
        )


def tied_weight(parts: Iterable[PreTrainedModel], grid: Grid) -> torch.nn.Parameter | None:
    """Return this process's copy of a matrix that is embedding and head; None if it has none, or they are not tied.

    The first process of a pipeline looks tokens up in it, the last one has it as the head. The gradient of the matrix
    is the sum of both.
    """
    first, *_, last = [*parts, *parts]
    if grid.ends is None or not first.config.tie_word_embeddings:
        return None
    return first.get_input_embeddings().weight if grid.position == 0 else last.get_output_embeddings().weight


def counted_once(parts: Iterable[PreTrainedModel], grid: Grid) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of this process by name, without the last process's copy of a tied matrix."""
    parameters = {name: parameter for part in parts for name, parameter in part.named_parameters()}
    copied = tied_weight(parts, grid) if grid.position > 0 else None
    return {name: parameter for name, parameter in parameters.items() if parameter is not copied}


class Stopwatch:
    """Adds up how long the blocks take that it is around, on the device: a GPU runs behind the lines of Python."""

    def __init__(self, device: torch.device):
        self.device = device
        self.spans: list[tuple] = []

    def __enter__(self):
        self.spans.append((self._now(), None))

    def __exit__(self, *error):
        self.spans[-1] = (self.spans[-1][0], self._now())

    def _now(self):
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Return the sum since the last call, and start again at 0."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
            total = sum(begin.elapsed_time(end) for begin, end in self.spans) / 1000
        else:
            total = sum(end - begin for begin, end in self.spans)
        self.spans.clear()
        return total


class TimedStage(PipelineStage):
    """torch's stage, with a stopwatch around its work in training. What a step takes beyond that is waiting."""

    def __init__(self, module: torch.nn.Module, number: int, stages: int, grid: Grid, given, passed_on):
        """``given``, ``passed_on``: of a micro-batch, by shape and dtype, on the device "meta"."""
        super().__init__(module, number, stages, grid.device, given, passed_on, group=grid.pipeline)
        self.busy = Stopwatch(grid.device)

    def forward_one_chunk(self, *arguments, **named):
        with self.busy if self.has_backward else nullcontext():
            return super().forward_one_chunk(*arguments, **named)

    def backward_one_chunk(self, *arguments, **named):
        with self.busy if self.has_backward else nullcontext():
            return super().backward_one_chunk(*arguments, **named)


def measured_bubble(stages: list[TimedStage], whole: Stopwatch) -> dict:
    """Return "waiting": of every process, the share of the time of ``whole`` in which its stages did not work, since
    the last call; and "bubble": the mean of them.
    """
    waiting = gather_object([1 - sum(stage.busy.seconds() for stage in stages) / whole.seconds()])
    return {"bubble": round(sum(waiting) / len(waiting), 4), "waiting": [round(share, 4) for share in waiting]}


def save_stages(
    folder: Path, grid: Grid, parts: Iterable[PreTrainedModel], optimizer: Optimizer, schedule, state: dict
) -> None:
    """Write this process's files of a checkpoint: weights, optimizer, learning rate, random numbers; ``state`` once.

    Replicas have the same weights and states, so one of them writes; each has random numbers of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = {"cpu": torch.get_rng_state()}
    if grid.device.type != "cpu":
        random[grid.device.type] = random_state(grid.device)
    torch.save(random, folder / f"random-{grid.position}-{grid.replica}.pt")
    if grid.replica == 0:
        states = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        states["weights"] = [part.state_dict() for part in parts]
        torch.save(states, folder / f"stages-{grid.position}.pt")
    if is_main_process():
        write_json(folder / "trainer_state.json", state)


def load_stages(folder: Path, grid: Grid, parts: Iterable[PreTrainedModel], optimizer: Optimizer, schedule) -> None:
    """Continue from what ``save_stages`` of the same grid wrote."""
    states = torch.load(folder / f"stages-{grid.position}.pt", map_location="cpu", weights_only=True)
    for part, weights in zip(parts, states["weights"], strict=True):
        part.load_state_dict(weights)
    optimizer.load_state_dict(states["optimizer"])
    schedule.load_state_dict(states["schedule"])
    random = torch.load(folder / f"random-{grid.position}-{grid.replica}.pt", weights_only=True)
    torch.set_rng_state(random["cpu"])
    if grid.device.type != "cpu":
        set_random_state(grid.device, random[grid.device.type])


def write_model(folder: str, grid: Grid, parts: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> None:
    """Write an ordinary model folder of transformers: one safetensors file a process, an index, config and tokenizer.

    All processes must call this; those of one pipeline write.
    """
    model = parts[0]
    weights = {name: parameter.detach() for name, parameter in counted_once(parts, grid).items()}
    file = f"model-{grid.position + 1:05}-of-{grid.processes:05}.safetensors"
    sizes = {name: weight.nbytes for name, weight in weights.items()}
    written = gather_object([(file, sizes)] if grid.replica == 0 else [])
    Path(folder).mkdir(parents=True, exist_ok=True)
    if grid.replica == 0:
        save_file({name: weight.cpu() for name, weight in weights.items()}, Path(folder) / file, {"format": "pt"})
    if is_main_process():
        index = {
            "metadata": {"total_size": sum(size for _, sizes in written for size in sizes.values())},
            "weight_map": {name: file for file, sizes in written for name in sizes},
        }
        Path(folder, "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
