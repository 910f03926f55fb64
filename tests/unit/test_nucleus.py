"""Which tokens filters leave, against loops over exact numbers; ties, borders and the last draws included."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from omniserve.ops.nucleus import UNITS, chosen, kept, weights


def left(weight: list[int], order: list[int], top_k: int, top_p: float, min_p: float) -> list[int]:
    """The same filters in loops; the share of the sum is a number of 64 bits."""
    some = [token for token in order if weight[token] and Fraction(weight[token], 2**UNITS) >= Fraction(min_p)]
    some = some[:top_k] if top_k else some
    limit, before, result = top_p * float(sum(weight[token] for token in some)), 0, [0] * len(weight)
    for rank, token in enumerate(some):
        if top_p >= 1 or rank == 0 or before < limit:
            result[token] = weight[token]
        before += weight[token]
    return result


@pytest.mark.parametrize("spread", [0.01, 1.0, 20.0])
def test_filters_leave_what_exact_numbers_leave(spread: float) -> None:
    """Rounded logits, so that equals lie on every border; a share of 1/2 or 1/4 is met exactly by equals."""
    draw = torch.Generator().manual_seed(int(spread * 100))
    x = (torch.randn(3, 60, generator=draw) * spread * 2).round() / 2
    x[1], x[2, ::3] = 0.5, -torch.inf
    order = torch.sort(x, dim=-1, descending=True, stable=True).indices
    weight = weights(x, torch.tensor([1.0, 0.4, 1.9], dtype=torch.float64))
    for top_k, top_p, min_p in itertools.product((0, 1, 7, 59, 60), (5e-324, 0.25, 0.5, 0.9, 1.0), (0.0, 0.2, 1.0)):
        found = kept(
            weight, order, torch.full((3,), top_k),
            torch.full((3,), top_p, dtype=torch.float64), torch.full((3,), min_p, dtype=torch.float64),
        )  # fmt: skip
        for row in range(3):
            expected = left(weight[row].tolist(), order[row].tolist(), top_k, top_p, min_p)
            assert found[row].tolist() == expected, (row, top_k, top_p, min_p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_exponentials(dtype: torch.dtype) -> None:
    x = torch.linspace(-40, 3, 5001, dtype=dtype).flip(0)[None]
    for temperature in (0.3, 1.0, 2.0):
        found = weights(x, torch.tensor([temperature], dtype=torch.float64))
        exact = torch.exp((x.double() - x.double().max()) / temperature) * 2.0**UNITS
        assert found[0, 0] == 2**UNITS
        # A logit in fp32 is off by half of its last bit, and so is its share of the temperature.
        off = 3e-7 + (4e-6 / temperature if dtype == torch.float32 else 0)
        assert ((found - exact).abs() <= exact * off + 1).all()


def test_weights_are_the_same_alone_as_among_others() -> None:
    x = torch.randn(40, 777, generator=torch.Generator().manual_seed(1)) * 8
    temperature = torch.linspace(0.1, 2, 40, dtype=torch.float64)
    together = weights(x, temperature)
    for row in (0, 13, 39):
        assert torch.equal(weights(x[row : row + 1], temperature[row : row + 1])[0], together[row])


def test_draws_follow_the_ids_and_none_of_weight_0_is_drawn() -> None:
    weight = torch.tensor([[0, 3, 0, 1, 4, 0]])
    u = [0.0, 0.37, 0.375, 0.49, 0.5, math.nextafter(1.0, 0.0), 1.0]
    drawn = [chosen(weight, torch.tensor([one], dtype=torch.float64)).item() for one in u]
    assert drawn == [1, 1, 3, 3, 4, 4, 4]


def test_what_is_no_distribution_draws_a_token_of_the_row() -> None:
    x = torch.tensor([[-torch.inf] * 3, [1.0, torch.nan, 2.0], [torch.inf, 0.0, 1.0]])
    weight = weights(x, torch.ones(3, dtype=torch.float64))
    assert set(chosen(weight, torch.full((3,), 0.5, dtype=torch.float64)).tolist()) <= {0, 1, 2}
