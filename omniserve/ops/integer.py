"""Exact products of int8 matrices."""

import functools

import torch
from torch import Tensor

from omniserve.ops.dispatch import implements, operation

EXACT = 2**24
"""Whole numbers up to here are exact in fp32."""


@operation
def int_matmul(x: Tensor, w: Tensor) -> Tensor:
    """Return x @ w.T as int32 [M, N], exactly; x int8 [M, K], w int8 [N, K].

    Reference: fp32 matmuls over K-chunks of 1,024, whose sums stay below 2^24 (128 * 128 * 1024 = 2^24), added up in
    int32. One fp32 matmul over all of K is not exact (formats.md section 13).
    """
    chunk = EXACT // (128 * 128)
    total = None
    for start in range(0, x.shape[1], chunk):
        part = (x[:, start : start + chunk].float() @ w[:, start : start + chunk].float().T).to(torch.int32)
        total = part if total is None else total.add_(part)
    assert total is not None, "int_matmul: K is 0"
    return total


@functools.cache
def int_mm_is_exact() -> bool:
    """True if `torch._int_mm` gives true integer products on this CPU.

    Without VNNI instructions it saturates in 16 bits and is wrong without an error, so saturating operands are tried
    at the sizes that decode and prefill use.
    """
    ends = torch.tensor([127, -128, 127, 1, -128], dtype=torch.int8)
    for k in (576, 14336):
        for m in (1, 2, 8, 33):
            x = ends.repeat(m * k // 5 + 1)[: m * k].reshape(m, k)
            w = torch.cat([torch.full((8, k), 127), torch.full((8, k), -128)]).to(torch.int8)
            w[::3, ::7] = 15
            if not torch.equal(torch._int_mm(x, w.T).long(), x.long() @ w.long().T):
                return False
    return True


@implements(int_matmul, device="cpu", when=int_mm_is_exact)
def int_matmul_vnni(x: Tensor, w: Tensor) -> Tensor:
    """`torch._int_mm`, on CPUs where it passed its self-test; for K = 1 it returns memory that nobody wrote."""
    return int_matmul.reference(x, w) if x.shape[1] == 1 else torch._int_mm(x, w.T)
