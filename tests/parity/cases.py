"""Cases of every operation that has more than its reference: what implementations are compared on."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from omniserve.formats.w16a16 import pack

Args = tuple[Any, ...]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def int_matmul() -> Iterator[tuple[str, Args]]:
    """Ordinary, minimum, ragged and long sums; extreme operands."""
    for m, n, k in ((1, 1, 1), (1, 960, 576), (3, 5, 7), (33, 64, 1025), (2, 16, 9216), (8, 8, 14336)):
        x = torch.randint(-128, 128, (m, k), generator=_generator(m + k)).to(torch.int8)
        w = torch.randint(-128, 128, (n, k), generator=_generator(n + k)).to(torch.int8)
        yield f"random {m}x{n}x{k}", (x, w)
        yield f"extreme {m}x{n}x{k}", (torch.full_like(x, 127), torch.full_like(w, -128))


def gemm_w16a16() -> Iterator[tuple[str, Args]]:
    """Plain and packed weights, one token and many, with and without bias."""
    for m, n, k in ((1, 1, 1), (1, 960, 576), (5, 192, 64), (64, 128, 1536)):
        x = torch.randn(m, k, generator=_generator(m + k))
        w = torch.randn(n, k, generator=_generator(n + k))
        bias = torch.randn(n, generator=_generator(n))
        yield f"plain {m}x{n}x{k}", (x, w, None)
        yield f"packed {m}x{n}x{k}", (x, pack(w), bias)


CASES: dict[str, Callable[[], Iterator[tuple[str, Args]]]] = {
    "int_matmul": int_matmul,
    "gemm_w16a16": gemm_w16a16,
}
