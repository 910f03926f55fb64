"""The physical limit of an operation: what it must move and compute, over what the card can move and compute.

Activations are read once, outputs written once; nothing is gained from caches, nothing is lost between kernels.
"""

from dataclasses import dataclass

from omniserve.base.types import PAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Ceilings that were measured on a card: bytes per second, operations per second on 8-bit and 16-bit numbers."""

    bandwidth: float
    int8: float
    half: float


CARDS = {"NVIDIA H200": Card(bandwidth=4.3e12, int8=1580e12, half=790e12)}
"""By the name that the driver gives: a large copy, the best fp8 product and the best bf16 product of torch 2.11."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an operation must do: bytes to and from memory, operations (a multiply-add is two) by their precision."""

    bytes: float
    int8: float = 0.0
    half: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Return the work of both at once, as of one kernel."""
        return Work(bytes=self.bytes + other.bytes, int8=self.int8 + other.int8, half=self.half + other.half)

    def microseconds(self, card: Card) -> float:
        """Return the time that no kernel can beat."""
        return max(self.bytes / card.bandwidth, self.int8 / card.int8 + self.half / card.half) * 1e6


@dataclass(frozen=True, slots=True)
class InTurn:
    """Works one after the other: their times add up."""

    works: "tuple[Work | InTurn, ...]"

    def microseconds(self, card: Card) -> float:
        """Return the time that no kernels can beat."""
        return sum(work.microseconds(card) for work in self.works)


WEIGHT_BYTES = {"w4a8-row": 0.5, "w4a8-g128": 0.5 + 2 / 128, "w8a8": 1.0, "w16a16": 2.0}
"""Bytes of a weight by format, second-level scales and zeros included."""


def product(form: str, tokens: int, n: int, k: int, *, out: float = 2.0) -> Work:
    """Return the work of x @ w.T for T tokens and a weight [N, K]; `out` bytes for each result."""
    dense = form == "w16a16"
    moved = n * k * WEIGHT_BYTES[form] + tokens * k * (2 if dense else 1) + tokens * n * out
    operations = 2.0 * tokens * n * k
    return Work(bytes=moved, half=operations) if dense else Work(bytes=moved, int8=operations)


def decode(page_bytes: int, rows: int, context: int, heads: int, kv_heads: int, head_dim: int) -> Work:
    """Return the work of one produced position in each of `rows` contexts; page_bytes of 64 tokens of a key head."""
    moved = rows * context * kv_heads * page_bytes / PAGE + 2 * 2.0 * rows * heads * head_dim
    return Work(bytes=moved, half=4.0 * rows * context * heads * head_dim)


def prompt(page_bytes: int, pairs: float, tokens: int, context: int, heads: int, kv_heads: int, head_dim: int) -> Work:
    """Return the work of T prompt positions that see `pairs` (query, key) pairs in all, in one context."""
    moved = context * kv_heads * page_bytes / PAGE + 2 * 2.0 * tokens * heads * head_dim
    return Work(bytes=moved, half=4.0 * pairs * heads * head_dim)


def pairs(tokens: int, context: int, *, sink: int = 0, local: int | None = None) -> float:
    """Return how many (query, key) pairs the last T positions of a context see."""
    if local is None:
        return tokens * (context - tokens) + tokens * (tokens + 1) / 2
    return float(
        sum(min(end, local + min(sink, max(end - local, 0))) for end in range(context - tokens + 1, context + 1))
    )
