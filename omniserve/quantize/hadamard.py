"""Orthogonal matrices for rotations: Hadamard matrices by construction, without tables; else a seeded random one."""

import functools
import math

import torch
from torch import Tensor

from omniserve.base.errors import ConfigError

Construction = str
"""`hadamard`, `random` (QR of a seeded Gaussian matrix), or `auto`: the first where there is one, else the second."""


def hadamard(n: int) -> Tensor | None:
    """Return an n × n matrix of ±1 (int8) whose rows are orthogonal; None if no construction below reaches n.

    Sylvester doubling of the smallest Paley matrix over a prime: I if n - 1 is a prime ≡ 3 mod 4, II if n / 2 - 1 is a
    prime ≡ 1 mod 4. That covers the hidden and feed-forward sizes of Llama, Qwen, Mistral, Yi and SmolLM.
    Source: R. Paley, On orthogonal matrices, J. Math. Phys. 12 (1933).
    """
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    if n == 1:
        return two[:1, :1].clone()
    if n == 2:
        return two
    if n < 1 or n % 4:
        return None
    if (half := hadamard(n // 2)) is not None:
        return torch.kron(half, two)
    if _prime(n - 1) and n % 4 == 0:
        return torch.eye(n, dtype=torch.int8) + _conference(n - 1, sign=-1)
    if _prime(n // 2 - 1) and n % 8 == 4:
        size = n // 2
        unit = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
        return torch.kron(_conference(size - 1, sign=1), two) + torch.kron(torch.eye(size, dtype=torch.int8), unit)
    return None


@functools.lru_cache(maxsize=4)
def orthogonal(n: int, construction: Construction = "auto", seed: int = 0) -> Tensor:
    """Return an orthogonal n × n matrix in fp64: hadamard(n) / √n, or a random one. Do not write to it.

    Raises ConfigError if `construction` is `hadamard` and none reaches n.
    """
    if construction != "random" and (found := hadamard(n)) is not None:
        return found.double() / math.sqrt(n)
    if construction == "hadamard":
        raise ConfigError(f"no Hadamard matrix of size {n} is known to this version")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + n)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    turned: Tensor = q * r.diagonal().sign()
    return turned


def _prime(q: int) -> bool:
    return q > 2 and all(q % i for i in range(2, math.isqrt(q) + 1))


def _conference(q: int, *, sign: int) -> Tensor:
    """Return the (q + 1) × (q + 1) matrix [[0, 1], [±1, χ(i - j)]] of the prime q; χ is the quadratic character."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, q)], dtype=torch.int8)
    step = torch.arange(q)
    made = torch.ones(q + 1, q + 1, dtype=torch.int8)
    made[0, 0] = 0
    made[1:, 0] = sign
    made[1:, 1:] = character[(step[:, None] - step) % q]
    return made
