"""AdamW for weights in bf16, with 8-bit states, that can step inside backward: 4 bytes a parameter in all.

One chunk of a parameter at a time is updated in fp32 and rounded stochastically to bf16. So there is no master copy of
the weights, and no other copy of the model. States and kernels are those of bitsandbytes: a byte for each number, and a
scale for each block of 256 numbers, also of embeddings. With ``in_backward``, each gradient is freed once it is used.

Why the rounding is stochastic: bf16 keeps eight significant bits, so the next number above 1 is 1.0078. If a step of
1e-5 is added to a weight of 1 and the sum is rounded to the nearest number, the weight stays 1, and never moves. If it
is rounded up with probability 1e-5 / 0.0078 instead, the weight moves by the right amount on average.

torchao has such an optimizer, too. Why it is not used: docs/libraries.md.

Sources: https://arxiv.org/abs/2110.02861 (8-bit states), https://arxiv.org/abs/2306.09782 (steps inside backward),
https://arxiv.org/abs/2010.06192 (training in bf16 alone), https://arxiv.org/abs/1502.02551 (the rounding).
"""

import torch
from torch.optim.adamw import adamw

from common.model.memory import NUMBERS_A_BLOCK, SMALLEST_IN_8_BITS


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return ``values`` in bf16, each rounded up or down at random, so that the expected result is the value.

    The nearer neighbour in bf16 is the more probable one. Numbers that bf16 can represent stay as they are; infinity
    and NaN, too.

    Args:
        values: fp32; not changed.
        generator: on the device of ``values``.
    """
    # bf16 is the upper 16 bits of fp32. Adding 16 random bits to the lower ones carries into the upper ones with a
    # probability in proportion to the lower ones: 0x4000 of 0x10000 carries in one of four cases. The sign is a bit of
    # its own, so negative numbers are rounded in the same way.
    bits = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits.add_(values.view(torch.int32)).bitwise_and_(-1 << 16)
    rounded = bits.view(torch.float32)
    return torch.where(values.isnan(), values, rounded).bfloat16()  # a carry would turn some NaNs into -0.0


CHUNK = 1 << 16 << 8  # numbers updated at a time: 64 MiB in fp32. A multiple of NUMBERS_A_BLOCK


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW that computes in fp32, for parameters in bf16 or fp32.

    The states of a parameter are ``step``, ``exp_avg``, ``exp_avg_sq`` and, with 8 bits, the scales of both. The random
    bits of a step depend on the seed, the step and the parameter, so a resumed run draws the same ones.
    """

    def __init__(
        self,
        params,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        state_bits: int = 8,
        stochastic: bool = True,
        in_backward: bool = False,
        seed: int = 0,
    ):
        """Take parameters or groups of parameters, as every optimizer of torch does.

        Args:
            state_bits: 8 (by bitsandbytes) or 32.
            stochastic: how to round to bf16. False rounds to the nearest number, which loses small updates.
            in_backward: update each parameter as soon as its gradient is complete, and free the gradient. ``step`` then
                only ends the step. The caller makes sure that there is one micro-batch a step, one process, and no
                fp16 scaler.
        """
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.state_bits, self.stochastic, self.in_backward, self.seed = state_bits, stochastic, in_backward, seed
        self.squares: list[torch.Tensor] = []  # sums of squares of the gradients, a chunk each
        self.step_ended = False
        self.maps = None
        self.generator = None
        # The number of each parameter over all groups, and its group.
        numbered = [(group, p) for group in range(len(self.param_groups)) for p in self.param_groups[group]["params"]]
        self.places = {parameter: (number, group) for number, (group, parameter) in enumerate(numbered)}
        if in_backward:
            for parameter in self.places:
                parameter.register_post_accumulate_grad_hook(self.update_and_drop_gradient)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient. ``closure`` is not supported."""
        for parameter in self.places:
            if parameter.grad is not None:
                self.update(parameter)
        self.step_ended = True

    @property
    def grad_norm(self) -> torch.Tensor:
        """The norm of all gradients of this step, or of the last one between steps; only with ``in_backward``."""
        return torch.stack(self.squares).sum().sqrt()

    def update_and_drop_gradient(self, parameter: torch.nn.Parameter) -> None:
        """Update one parameter and free its gradient: the hook of ``in_backward``."""
        self.update(parameter)
        parameter.grad = None

    @torch.no_grad()
    def update(self, parameter: torch.nn.Parameter) -> None:
        """Update one parameter, chunk by chunk."""
        if self.step_ended:
            self.squares, self.step_ended = [], False
        number, group = self.places[parameter]
        state = self.state[parameter]
        if not state:
            state.update(self._first_state(parameter))
        state["step"] += 1
        if self.generator is None:
            self.generator = torch.Generator(parameter.device)
        self.generator.manual_seed(((self.seed * 1_000_003 + state["step"]) * 1_000_003 + number) % 2**63)
        weights, gradients = parameter.view(-1), parameter.grad.reshape(-1)
        for start in range(0, weights.numel(), CHUNK):
            chunk = slice(start, start + CHUNK)
            gradient, weight = gradients[chunk].float(), weights[chunk].float()  # copies of bf16, views of fp32
            if self.in_backward:  # else the norm is computed where gradients are clipped
                self.squares.append(gradient.dot(gradient))
            self._adamw(weight, gradient, state, chunk, self.param_groups[group])
            if parameter.dtype == torch.bfloat16:
                weight = round_stochastically(weight, self.generator) if self.stochastic else weight.bfloat16()
                weights[chunk] = weight

    def _adamw(self, weight: torch.Tensor, gradient: torch.Tensor, state: dict, chunk: slice, group: dict) -> None:
        """Update a chunk of fp32 weights and its states in place."""
        (beta1, beta2), lr, eps, decay = group["betas"], group["lr"], group["eps"], group["weight_decay"]
        averages = [state["exp_avg"].view(-1)[chunk], state["exp_avg_sq"].view(-1)[chunk]]
        if averages[0].dtype == torch.uint8:
            from bitsandbytes.functional import optimizer_update_8bit_blockwise  # imported where it is used only

            blocks = slice(
                chunk.start // NUMBERS_A_BLOCK, chunk.stop // NUMBERS_A_BLOCK
            )  # a partial last block has a scale, too
            scales = [state["exp_avg_scale"][blocks], state["exp_avg_sq_scale"][blocks]]
            maps = self._quantization_maps(weight.device)
            optimizer_update_8bit_blockwise(
                "adam", gradient, weight, *averages, beta1, beta2, 0.0, 0.0, eps, state["step"], lr, *maps, *scales,
                weight_decay=decay,
            )  # fmt: skip
        else:
            before = torch.tensor(float(state["step"] - 1))  # adamw adds this step itself
            parts = ([weight], [gradient], *([average] for average in averages))
            adamw(
                *parts, [], [before], amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=decay, eps=eps,
                foreach=False, maximize=False,
            )  # fmt: skip

    def _first_state(self, parameter: torch.nn.Parameter) -> dict:
        small = self.state_bits == 32 or parameter.numel() < SMALLEST_IN_8_BITS
        dtype = torch.float32 if small else torch.uint8
        averages = {name: torch.zeros_like(parameter, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
        if small:
            return {"step": 0, **averages}
        blocks = -(-parameter.numel() // NUMBERS_A_BLOCK)
        scales = {f"{name}_scale": torch.zeros(blocks, device=parameter.device) for name in averages}
        return {"step": 0, **averages, **scales}

    def _quantization_maps(self, device: torch.device) -> list[torch.Tensor]:
        """Return the numbers that the 256 values of a byte stand for: in ``exp_avg``, and in ``exp_avg_sq``."""
        if self.maps is None:
            from bitsandbytes.functional import create_dynamic_map

            self.maps = [create_dynamic_map(signed=signed).to(device) for signed in (True, False)]
        return self.maps

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Take over saved states and groups. Replaces: casting the states to the dtype of their parameters.

        Raises:
            ValueError: the saved groups have other numbers of parameters.
        """
        groups = state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("the saved optimizer has other parameter groups")
        numbers = [number for group in groups for number in group["params"]]
        for number, parameter in zip(numbers, self.places, strict=True):
            if number in state_dict["state"]:
                saved = state_dict["state"][number].items()
                self.state[parameter] = {
                    name: value.to(parameter.device) if torch.is_tensor(value) else value for name, value in saved
                }
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
