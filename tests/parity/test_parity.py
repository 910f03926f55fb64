"""Every implementation of every operation against the reference; tests/parity/compare.py has the rules."""

import pytest
import torch

from omniserve.formats.table import weight_format
from omniserve.ops.dispatch import TABLE, Implementation
from tests.parity.cases import CASES
from tests.parity.compare import Args, problems

assert weight_format("w8a8"), "imports every file that registers an implementation"

PAIRS = [
    pytest.param(implementation, args, id=f"{implementation.name}-{case}")
    for name, operation in sorted(TABLE.items())
    for implementation in operation.implementations
    if implementation.device == "cpu" and implementation.when()
    for case, args in CASES[name]()
]
"""On the CPU; tests/kernels has those for GPUs."""


@pytest.mark.parametrize(("implementation", "args"), PAIRS)
def test_implementation_equals_reference(implementation: Implementation, args: Args) -> None:
    operation = next(op for op in TABLE.values() if implementation in op.implementations)
    assert problems(implementation.function, operation, args) == []


def test_every_operation_with_an_implementation_has_cases() -> None:
    assert {name for name, operation in TABLE.items() if operation.implementations} <= CASES.keys()


def test_the_comparison_sees_a_wrong_result() -> None:
    operation = TABLE["int_matmul"]
    x = torch.ones(2, 3, dtype=torch.int8)
    assert problems(lambda x, w: operation.reference(x, w) + 1, operation, (x, x)) == [
        "result differs in 4 of 4 places"
    ]
    dense = TABLE["gemm_w16a16"]
    w = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    assert problems(lambda *given: dense.reference(*given) * 1.01, dense, (w, w, None, torch.float32))
    assert problems(lambda *given: dense.reference(*given) * float("nan"), dense, (w, w, None, torch.float32))
