"""Integer products are exact for every K, by the portable path and by the fast one where it may be used."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from omniserve.ops.dispatch import force_reference
from omniserve.ops.integer import int_matmul, int_matmul_vnni, int_mm_is_exact

LENGTHS = (2, 63, 64, 127, 576, 1024, 1025, 1536, 4096, 9216, 14336)

Path = Callable[[Tensor, Tensor], Tensor]


def fast(x: Tensor, w: Tensor) -> Tensor:
    if not int_mm_is_exact():
        pytest.skip("torch._int_mm is not exact on this CPU")
    return int_matmul_vnni(x, w)


PATHS = pytest.mark.parametrize("path", [int_matmul.reference, fast], ids=["portable", "fast"])


def true_product(x: Tensor, w: Tensor) -> Tensor:
    return (x.double() @ w.double().T).long()  # exact: sums stay below 2^53


@PATHS
@pytest.mark.parametrize("k", LENGTHS)
@pytest.mark.parametrize(("left", "right"), [(127, 127), (-128, -128), (-128, 127), (127, 15)])
def test_extreme_operands(path: Path, k: int, left: int, right: int) -> None:
    x = torch.full((3, k), left, dtype=torch.int8)
    w = torch.full((5, k), right, dtype=torch.int8)
    w[1, ::2] = 1  # odd sums: a rounded one would show
    got = path(x, w)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), true_product(x, w))


@PATHS
@pytest.mark.parametrize("k", LENGTHS)
@pytest.mark.parametrize(("low", "high"), [(-128, 128), (0, 16)], ids=["int8", "4 bits"])
def test_random_operands(path: Path, k: int, low: int, high: int) -> None:
    generator = torch.Generator().manual_seed(k)
    for m in (1, 2, 7, 33):
        x = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
        w = torch.randint(low, high, (24, k), generator=generator, dtype=torch.int8)
        assert torch.equal(path(x, w).long(), true_product(x, w))


def test_one_float_product_would_not_be_exact() -> None:
    x = torch.full((1, 9216), 127, dtype=torch.int8)
    w = torch.full((1, 9216), 15, dtype=torch.int8)
    w[0, -1] = 14
    true = int(true_product(x, w).item())
    assert true > 2**24
    assert true % 2 == 1  # fp32 holds even numbers alone up there
    assert int((x.float() @ w.float().T).item()) != true
    assert int_matmul.reference(x, w).item() == true


@PATHS
def test_rows_are_independent_of_their_batch(path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-127, 128, (33, 1536), generator=generator, dtype=torch.int8)
    w = torch.randint(-128, 128, (100, 1536), generator=generator, dtype=torch.int8)
    whole = path(x, w)
    for row in range(33):
        assert torch.equal(path(x[row : row + 1], w), whole[row : row + 1])


def test_the_operation_can_be_forced_to_its_reference() -> None:
    x = torch.full((2, 14336), -128, dtype=torch.int8)
    with force_reference():
        forced = int_matmul(x, x)
    assert torch.equal(forced, int_matmul(x, x))
    assert forced[0, 0].item() == 128 * 128 * 14336
