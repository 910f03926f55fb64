"""add_norm: sums, statistics in fp32, codes from the value before any cast."""

import torch

from omniserve.ops.act import ActFormat, Int8, Plain, quantize
from omniserve.ops.norm import add_norm

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(5, 48, generator=GENERATOR)
DELTA = torch.randn(5, 48, generator=GENERATOR)
WEIGHT = torch.randn(48, generator=GENERATOR)


def truth(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * WEIGHT.double()


def test_plain_equals_the_formula() -> None:
    act, residual = add_norm(X, DELTA, WEIGHT, 1e-5, ActFormat.PLAIN)
    assert isinstance(act, Plain)
    assert torch.equal(residual, X + DELTA)
    assert (act.x.double() - truth(X + DELTA)).abs().max() < 2e-6


def test_without_delta_the_residual_is_unchanged() -> None:
    _, residual = add_norm(X, None, WEIGHT, 1e-5, ActFormat.PLAIN)
    assert torch.equal(residual, X)


def test_codes_come_from_the_unrounded_value_of_a_half_precision_model() -> None:
    half = X.bfloat16()
    act, _ = add_norm(half, None, WEIGHT.bfloat16(), 1e-5, ActFormat.INT8_SUM)
    assert isinstance(act, Int8)
    assert act.dtype == torch.bfloat16
    exact = torch.rms_norm(half.float(), (48,), WEIGHT.bfloat16().float(), 1e-5)
    wanted = quantize(exact, ActFormat.INT8_SUM)
    assert isinstance(wanted, Int8)
    assert torch.equal(act.codes, wanted.codes)
    assert torch.equal(act.scale, wanted.scale)
    assert act.sum is not None
    assert torch.equal(act.sum[:, 0], act.codes.sum(-1, dtype=torch.int32))
