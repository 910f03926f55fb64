"""Every implementation of every operation against the reference: integers equal, floats near torch's error.

The root mean square error may be three times torch's, the largest six times: on this rule's worst case, K = 1536 in
fp32, a sum in one chain (oneDNN) has 2.04 and 3.8 times the error of MKL's blocked one.
"""

import pytest
import torch

from omniserve.formats.table import weight_format
from omniserve.ops.dispatch import TABLE, Implementation
from tests.parity.cases import CASES, Args

assert weight_format("w8a8"), "imports every file that registers an implementation"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRS = [
    pytest.param(implementation, args, id=f"{implementation.name}-{case}")
    for name, operation in sorted(TABLE.items())
    for implementation in operation.implementations
    if implementation.device == DEVICE and implementation.when()
    for case, args in CASES[name]()
]


def to_float64(args: Args) -> Args:
    def wide(x: object) -> object:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return (x.to_dense() if x.is_mkldnn else x).double()

    return tuple(wide(x) for x in args)


@pytest.mark.parametrize(("implementation", "args"), PAIRS)
def test_implementation_equals_reference(implementation: Implementation, args: Args) -> None:
    operation = next(op for op in TABLE.values() if implementation in op.implementations)
    got, reference = implementation.function(*args), operation.reference(*args)
    assert got.shape == reference.shape
    assert got.dtype == reference.dtype
    if not reference.is_floating_point():
        assert torch.equal(got, reference)
        return
    truth = operation.reference(*to_float64(args))
    ulp = torch.finfo(got.dtype).eps * truth.abs().max()
    for size in (lambda error: error.abs().max() / 2, lambda error: error.pow(2).mean().sqrt()):
        assert size(got.double() - truth) <= 3 * size(reference.double() - truth) + ulp


def test_every_operation_with_an_implementation_has_cases() -> None:
    assert {name for name, operation in TABLE.items() if operation.implementations} <= CASES.keys()
