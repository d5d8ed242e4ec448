"""Stochastic rounding against arithmetic."""

import math

import pytest
import torch

from common.train.low_memory_adamw import round_stochastically


def rounded(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return round_stochastically(values, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("value", [1 + 1 / 512, -1 - 1 / 512, 3.14159, -2.5e-7, 6.1e30, 1.5e-39])
def test_it_is_one_of_the_two_neighbours_and_the_mean_is_the_value(value):
    """Neighbours by math.frexp: a normal number has eight bits; smaller ones are multiples of 2**-133."""
    draws = 200_000
    ulp = math.ldexp(1, max(math.frexp(value)[1] - 8, -133))
    below = math.floor(torch.tensor(value).double().item() / ulp) * ulp
    found = rounded(torch.full((draws,), value)).double()
    assert set(found.tolist()) == {below, below + ulp}
    share = (torch.tensor(value).double().item() - below) / ulp
    deviation = math.sqrt(share * (1 - share) / draws)
    assert abs(found.eq(below + ulp).double().mean().item() - share) < 5 * deviation


def test_numbers_that_bf16_can_represent_stay():
    values = torch.tensor([0.0, -0.0, 1.0, -0.5, 3.0e38, torch.inf, -torch.inf]).bfloat16()
    found = rounded(values.float().repeat(1000, 1))
    assert found.dtype == torch.bfloat16
    assert all(torch.equal(row.view(torch.int16), values.view(torch.int16)) for row in found)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1])
def test_nan_stays_nan(bits):
    assert rounded(torch.full((1000,), bits, dtype=torch.int32).view(torch.float32)).isnan().all()


def test_the_largest_numbers_may_become_infinite_but_not_change_sign():
    found = rounded(torch.full((1000,), torch.finfo(torch.float32).max))
    assert set(found.tolist()) <= {torch.finfo(torch.bfloat16).max, math.inf}


def test_updates_far_below_half_an_ulp_move_a_weight_on_average_and_are_lost_by_plain_rounding():
    """1,000 steps of 1e-5 down from 1; the next number below 1 in bf16 is 1 - 1/256."""
    steps, update, weights = 1000, 1e-5, 4096
    drawn, plain = torch.ones(weights, dtype=torch.bfloat16), torch.ones(weights, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        drawn = round_stochastically(drawn.float() - update, generator)
        plain = (plain.float() - update).bfloat16()
    assert plain.eq(1).all()
    # Each step is a draw of variance update x (1/256 - update), all independent.
    deviation = math.sqrt(steps * update / 256 / weights)
    assert abs(drawn.double().mean().item() - (1 - steps * update)) < 5 * deviation


def test_equal_seeds_draw_alike_and_others_do_not():
    values = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rounded(values, 7), rounded(values, 7))
    assert not torch.equal(rounded(values, 7), rounded(values, 8))
