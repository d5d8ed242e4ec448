"""Muon for the matrices of a model's layers, AdamW for everything else, as one optimizer.

Muon takes the momentum of a matrix's gradient and replaces it by the nearest matrix whose singular values are all about
1, so that the matrix learns in every direction at the same pace. torch.optim.Muon does this for one matrix after
another, with some 25 small kernels each. Here, matrices of the same shape go through the iteration together. Matrices
that FSDP2 or tensor parallelism divide are gathered for it, all of a shape at once. DeepSpeed's ZeRO flattens the
parameters into one vector, in which the matrices cannot be found; under ZeRO, the optimizer is AdamW.

The experts of a layer are one tensor, (experts, rows, columns), and go through the iteration as the stack of matrices
that they are. FSDP2 shards it by experts, so that each process has whole matrices and nothing is gathered. A fused
gate_up_proj of experts holds two matrices for each expert. (Fused projections of a layer without experts, such as
GPT-2's c_attn, are taken as the one matrix that they are stored as.)

Two additions, of which each saved about 1% of the bits of a run of 500 steps (benchmarks/LOG.md): the rows of an update
are brought to the same size (NorMuon), and the momentum begins low, while the gradients still change fast.

Sources: https://kellerjordan.github.io/posts/muon/ (the method, its coefficients), https://arxiv.org/abs/2502.16982
(the scale of the updates, with which both optimizers can have the same learning rate and weight decay),
https://arxiv.org/abs/2510.05491 (NorMuon), https://github.com/KellerJordan/modded-nanogpt (momentum warmup).
"""

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import PreTrainedModel, TrainingArguments

from common.console import InputError, in_one_line, say
from common.distributed.accelerator import computes_in_bf16
from common.distributed.strategy import local
from common.model.counts import layer_matrices
from common.train.cuda_graph import EAGER, Recorded

MOMENTUM = 0.95
FIRST_MOMENTUM, MOMENTUM_WARMUP_STEPS = 0.85, 100  # it rises from the one to the other in so many steps
ROW_DECAY = 0.95  # of the mean squares of an update's rows
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
UPDATE_SIZE = 0.2  # root mean square of a matrix's update at a learning rate of 1; AdamW's is usually about the same
STACK_NUMBERS = 1 << 27  # so many numbers of matrices go through the iteration together: 256 MiB in bf16


class MuonWithAdamW(torch.optim.AdamW):
    """AdamW in which Muon updates the parameter groups that have ``matrices=True``."""

    def __init__(
        self,
        model: PreTrainedModel,
        decayed: list[str],
        lr: float,
        weight_decay: float,
        graphs: bool = False,
        **adamw,
    ):
        """Sort the trainable parameters of ``model`` into groups.

        Args:
            decayed: names of the parameters that ``weight_decay`` applies to.
            graphs: launch the updates of matrices as CUDA graphs, one for each shape.
            adamw: ``betas``, ``eps``, ``fused`` of torch.optim.AdamW.
        """
        self.graphs, self.recorded, self.eager_steps = graphs, {}, EAGER
        matrices = layer_matrices(model, stacks=True)
        groups: dict[tuple, list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # AdamW's kernels take parameters that are all divided, or all whole
                halved = halved_along(model, name) if name in matrices and parameter.dim() == 3 else None
                mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
                groups.setdefault((name in matrices, name in decayed, halved, mesh), []).append(parameter)
        super().__init__(
            [
                {"params": parameters, "matrices": by_muon, "weight_decay": weight_decay if decay else 0.0}
                | ({"halved": halved} if halved else {})
                for (by_muon, decay, halved, _), parameters in groups.items()
            ],
            lr=lr,
            **adamw,
        )
        # With fused AdamW, the fp16 scaler calls step even if gradients are infinite, and AdamW skips the step itself.
        # Muon does not, so the scaler must.
        self._step_supports_amp_scaling = False

    def load_state_dict(self, state_dict: dict) -> None:
        """Replaces torch's: graphs know the states by their addresses."""
        self.recorded, self.eager_steps = {}, EAGER
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient. ``closure`` is not supported."""
        groups = self.param_groups
        for group in groups:
            if group["matrices"]:
                self._step_matrices(group)
        self.param_groups = [group for group in groups if not group["matrices"]]
        super().step()
        self.param_groups = groups
        self.eager_steps = max(0, self.eager_steps - 1)

    def _step_matrices(self, group: dict) -> None:
        alike: dict[tuple, list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.dim() == 3:
                self._step_experts(group, parameter)
            elif parameter.grad is not None:
                places = parameter.placements if isinstance(parameter, DTensor) else None
                alike.setdefault((parameter.shape, places), []).append(parameter)
        for (shape, _), parameters in alike.items():
            at_once = max(1, STACK_NUMBERS // shape.numel())
            # The numbers of an orthogonal matrix have a root mean square of 1 / max(shape) ** 0.5.
            rate = group["lr"] * UPDATE_SIZE * max(shape) ** 0.5
            for first in range(0, len(parameters), at_once):
                some = parameters[first : first + at_once]
                self._move(some, gathered(self._with_momentum(some), some[0]), rate, group)

    def _move(self, parameters: list, directions: torch.Tensor, rate: float, group: dict) -> None:
        """Update ``parameters`` by ``rate`` along their ``directions`` (n, rows, columns), made orthogonal."""
        moments = [self.state[parameter]["row_moment"] for parameter in parameters]
        weights = [local(parameter) for parameter in parameters]

        def move(directions, rate, decay):
            updates = with_even_rows(orthogonalized(directions), moments)
            torch._foreach_mul_(weights, 1 - decay)
            torch._foreach_sub_(weights, placed_like(parameters[0], updates * rate).unbind())

        decay = group["lr"] * group["weight_decay"]
        if not self.graphs:
            return move(directions, rate, decay)
        rate, decay = (torch.full((), number, device=directions.device) for number in (rate, decay))
        given = {"directions": directions, "rate": rate, "decay": decay}
        if self.eager_steps:
            return move(**given)
        key = tuple(map(id, parameters))
        if key not in self.recorded:
            try:
                self.recorded[key] = Recorded(move, given)
            except RuntimeError as error:  # recording has run nothing: the step can still be made
                say(f"note: Muon without CUDA graphs, which cannot be recorded here: {in_one_line(error)}")
                self.graphs = False
                return move(**given)
        self.recorded[key](**given)

    def _step_experts(self, group: dict, parameter: torch.nn.Parameter) -> None:
        """Update the experts in ``parameter``, (experts, rows, columns), or those of them that this process has."""
        if isinstance(parameter, DTensor) and any(place.is_shard() and place.dim > 0 for place in parameter.placements):
            raise InputError(f"Muon needs whole experts, and this strategy cuts them up: {parameter.placements}.")
        [momentum] = self._with_momentum([parameter], group.get("halved"))
        weights = local(parameter)
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        halved = group.get("halved")
        moment = local(self.state[parameter]["row_moment"])
        parts = [matrices_in(tensor, halved) for tensor in (weights, momentum, moment)]
        for part, direction, rows in zip(*parts, strict=True):
            rate = group["lr"] * UPDATE_SIZE * max(part.shape[1:]) ** 0.5
            at_once = max(1, STACK_NUMBERS // part.shape[1:].numel())
            for experts, *of_them in zip(*(each.split(at_once) for each in (part, direction, rows)), strict=True):
                if len(experts):  # FSDP2 may leave a process without experts
                    directions, moments = of_them
                    updates = with_even_rows(orthogonalized(directions), moments.unbind())
                    experts.add_(updates.to(experts.dtype), alpha=-rate)

    def _with_momentum(self, parameters: list[torch.nn.Parameter], halved: str | None = None) -> list[torch.Tensor]:
        """Update the momenta of ``parameters`` and return their gradients with Nesterov's momentum, as sharded."""
        states = [self._state_of(parameter, halved) for parameter in parameters]
        steps = int(states[0]["step"])  # they all step together
        share = min(1.0, steps / MOMENTUM_WARMUP_STEPS)
        momentum = FIRST_MOMENTUM + share * (MOMENTUM - FIRST_MOMENTUM)
        momenta = [local(state["momentum_buffer"]) for state in states]
        gradients = [local(parameter.grad) for parameter in parameters]
        torch._foreach_add_([state["step"] for state in states], 1)
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        return list(torch._foreach_lerp(gradients, momenta, momentum))

    def _state_of(self, parameter: torch.nn.Parameter, halved: str | None) -> dict:
        """Return the state of a matrix, or of a stack of them; make what is missing.

        A state that was saved before there were ``row_moment`` continues with the momentum at its height.
        """
        state = self.state[parameter]
        if "row_moment" not in state:
            state["step"] = torch.full((), float(MOMENTUM_WARMUP_STEPS) if "momentum_buffer" in state else 0.0)
            if parameter.dim() == 3:  # sharded as the experts are; two halves side by side have rows of their own
                halves = 2 if halved is not None and halved.endswith("columns") else 1
                state["row_moment"] = torch.zeros_like(parameter[..., :halves], dtype=torch.float32)
            else:  # whole on every process: the updates are gathered anyway
                state["row_moment"] = torch.zeros(parameter.shape[0], 1, device=parameter.device)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        if state["step"].device.type != "cpu":  # loading moves it to the card; reading it there would wait for the card
            state["step"] = state["step"].cpu()
        return state


def with_even_rows(updates: torch.Tensor, moments: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return ``updates`` (n, rows, columns) with rows of the same size, each matrix as large as before: NorMuon.

    A row is divided by the root of the mean of its squares over the last steps, which ``moments``, n times (rows, 1),
    hold and which are updated.

    Source: https://arxiv.org/abs/2510.05491, algorithm 1
    """
    squares = updates.float().square().mean(-1, keepdim=True)  # (n, rows, 1)
    torch._foreach_lerp_(list(moments), list(squares.unbind()), 1 - ROW_DECAY)
    recent = torch.stack(list(moments)).clamp(min=1e-20)  # a matrix without any gradient has rows of 0
    grown = (squares / recent).sum(-2, keepdim=True).clamp(min=1e-20)
    return updates * (squares.sum(-2, keepdim=True) / grown / recent).sqrt()


def halved_along(model: PreTrainedModel, name: str) -> str | None:
    """Return how gate and up share the experts' parameter called ``name``: see ``matrices_in``; None: it is neither.

    transformers writes into its modules of experts whether they are stored transposed, and whether gate and up follow
    each other. Llama 4's and JetMoe's do not say so; they are told by the dimension that is not the hidden size.
    """
    owner, _, last = name.rpartition(".")
    if last != "gate_up_proj" and not name.endswith("mlp.input_linear.weight"):
        return None
    module, hidden = model.get_submodule(owner), model.config.get_text_config().hidden_size
    columns = getattr(module, "is_transposed", model.get_parameter(name).shape[-1] != hidden)
    along = "columns" if columns else "rows"
    return along if getattr(module, "is_concatenated", True) else f"alternate {along}"


def matrices_in(experts: torch.Tensor, halved: str | None) -> list[torch.Tensor]:
    """Return views of the one or two stacks of matrices that ``experts`` (experts, rows, columns) holds.

    Args:
        halved: None, "rows" or "columns" (first all of gate, then all of up), "alternate rows" or "alternate columns".
    """
    if halved is None:
        return [experts]
    last = halved.endswith("columns")
    if not halved.startswith("alternate"):
        return list(experts.chunk(2, -1 if last else -2))
    return [experts[..., half::2] if last else experts[:, half::2] for half in (0, 1)]


def muon_or_adamw(model: PreTrainedModel, name: str, training: TrainingArguments) -> torch.optim.Optimizer:
    """Return the optimizer ``name``, "muon" or "adamw", with the settings of ``training``.

    Norms and biases, the vectors, have no weight decay. recipes/explicit_loop.py spells the same out.
    """
    betas = (training.adam_beta1, training.adam_beta2)
    adamw = dict(lr=training.learning_rate, betas=betas, eps=training.adam_epsilon, fused=True)
    adamw["weight_decay"] = training.weight_decay
    decayed = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    if name == "muon":
        return MuonWithAdamW(model, list(decayed), **adamw)
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return torch.optim.AdamW([{"params": list(decayed.values())}, {"params": vectors, "weight_decay": 0.0}], **adamw)


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Return U V^T, approximately, for each of ``matrices`` (n, rows, columns) = U S V^T (singular values).

    By Newton and Schulz's iteration, with coefficients that raise small singular values fast: the singular values of
    the result are between 0.7 and 1.2. In bf16 if the device computes in it, else in fp32.
    """
    a, b, c = COEFFICIENTS
    fast = computes_in_bf16(matrices.device)
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(torch.bfloat16 if fast else torch.float32)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def gathered(shards: list[torch.Tensor], parameter: torch.Tensor) -> torch.Tensor:
    """Gather n matrices of the same shape and return them as one stack (n, rows, columns).

    They are gathered in one exchange: with one exchange for each, the CPU could not keep up with the GPUs.

    Args:
        shards: this process's parts of the matrices.
        parameter: one that is sharded as they are.
    """
    stack = torch.stack(shards)
    if not isinstance(parameter, DTensor):
        return stack
    rows, columns = parameter.shape
    shape, stride = torch.Size([len(shards), rows, columns]), (rows * columns, columns, 1)
    places = _of_stack(parameter)
    return DTensor.from_local(stack, parameter.device_mesh, places, shape=shape, stride=stride).full_tensor()


def placed_like(parameter: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
    """Return this process's part of ``stack`` (n, rows, columns), sharded as ``parameter`` is, in its dtype.

    Args:
        stack: whole, and the same on every process.
    """
    stack = stack.to(parameter.dtype)
    if not isinstance(parameter, DTensor):
        return stack
    everywhere = [Replicate()] * parameter.device_mesh.ndim
    return (
        DTensor.from_local(stack, parameter.device_mesh, everywhere)
        .redistribute(placements=_of_stack(parameter))
        .to_local()
    )


def _of_stack(parameter: DTensor) -> list[Placement]:
    """Return the placements of a stack of matrices that are sharded as ``parameter``: each dimension is one later."""
    places: list[Placement] = []
    for place in parameter.placements:
        if isinstance(place, _StridedShard):  # FSDP2 over tensor parallelism: a dimension that is divided twice
            places.append(_StridedShard(place.dim + 1, split_factor=place.split_factor))
        else:
            places.append(Shard(place.dim + 1) if place.is_shard() else place)
    return places
