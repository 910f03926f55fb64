"""Activations: codes, scales and sums of every kind of row."""

import pytest
import torch
from torch import Tensor

from omniserve.ops.act import FLOOR, ActFormat, Int8, Plain, quantize


def int8(x: Tensor, wants: ActFormat = ActFormat.INT8) -> Int8:
    act = quantize(x, wants)
    assert isinstance(act, Int8)
    return act


ROWS = {
    "zero": torch.zeros(64),
    "constant": torch.full((64,), -3.25),
    "ordinary": torch.linspace(-2, 1, 64),
    "outlier": torch.cat([torch.full((63,), 1e-3), torch.tensor([900.0])]),
    "tiny": torch.full((64,), 1e-9),
    "huge": torch.linspace(-6e4, 6e4, 64),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_row_is_within_half_a_step(kind: str, dtype: torch.dtype) -> None:
    x = ROWS[kind].to(dtype)[None]
    act = int8(x)
    assert act.codes.dtype == torch.int8
    assert act.scale.dtype == torch.float32
    assert act.dtype == dtype
    assert act.scale.shape == (1, 1)
    assert float(act.scale) > 0
    assert int(act.codes.abs().max()) <= 127
    error = (act.codes.double() * act.scale.double() - x.double()).abs().max()
    assert float(error) <= float(act.scale) * 0.5001


def test_a_zero_row_has_zero_codes_and_a_positive_scale() -> None:
    act = int8(torch.zeros(2, 8), ActFormat.INT8_SUM)
    assert not act.codes.any()
    assert act.scale.flatten().tolist() == pytest.approx([FLOOR / 127] * 2)
    assert act.sum is not None
    assert act.sum.tolist() == [[0], [0]]


def test_the_largest_value_gets_the_largest_code() -> None:
    x = torch.randn(16, 576, generator=torch.Generator().manual_seed(0))
    codes = int8(x).codes.long()
    largest = x.abs().argmax(1, keepdim=True)
    assert torch.equal(codes.gather(1, largest), 127 * x.gather(1, largest).sign().long())


def test_codes_come_from_the_stored_scale_by_true_division() -> None:
    x = torch.randn(8, 576, generator=torch.Generator().manual_seed(1)) * 3
    act = int8(x)
    assert torch.equal(act.scale, x.abs().amax(1, keepdim=True) / 127)
    assert torch.equal(act.codes, (x / act.scale).round().clamp(-127, 127).to(torch.int8))


def test_sums_are_those_of_the_codes_and_made_only_when_wanted() -> None:
    x = torch.randn(5, 14336, generator=torch.Generator().manual_seed(2)).abs()
    act = int8(x, ActFormat.INT8_SUM)
    assert act.sum is not None
    assert act.sum.dtype == torch.int32
    assert torch.equal(act.sum.long(), act.codes.long().sum(1, keepdim=True))
    assert int8(x).sum is None


def test_plain_is_the_tensor_itself() -> None:
    x = torch.randn(2, 3)
    act = quantize(x, ActFormat.PLAIN)
    assert isinstance(act, Plain)
    assert act.x is x


def test_a_row_does_not_depend_on_its_batch() -> None:
    x = torch.randn(9, 200, generator=torch.Generator().manual_seed(3))
    whole = int8(x)
    for row in range(9):
        alone = int8(x[row : row + 1])
        assert torch.equal(alone.codes, whole.codes[row : row + 1])
        assert torch.equal(alone.scale, whole.scale[row : row + 1])


def test_nan_in_the_padding_of_a_buffer_is_never_seen() -> None:
    buffer = torch.full((3, 640), float("nan"))
    x = torch.randn(3, 576, generator=torch.Generator().manual_seed(4))
    buffer[:, :576] = x
    seen, clean = int8(buffer[:, :576], ActFormat.INT8_SUM), int8(x, ActFormat.INT8_SUM)
    assert torch.equal(seen.codes, clean.codes)
    assert torch.equal(seen.scale, clean.scale)
