"""Draws at random, and lists of likeliest tokens: rows of logits are never sorted, nor copied.

Sums are fp64 and taken in one order per row, so that a draw depends on no other row. A logit and its place become one
whole number, as in `pick.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.kernels.device import OUTPUTS, kernel_of, need
from omniserve.kernels.pick import PART, key_of, logit_of, parts_kernel, place_of
from omniserve.ops.sample import NARROW, Chance, draw_narrow, draw_whole, likeliest

SIDE = 64
"""Logits whose largest one stands for all; no token among the 64 likeliest lies elsewhere than behind 64 of these."""

_ANYWHERE = ["rows", "seed", "position", "top_k", "temperature", "top_p", "min_p"]
"""What is not compiled for its alignment: columns of tables, of which some are aligned and some are not."""
_ANY = ["count", "wanted", "parts"]

_SIDE = tl.constexpr(SIDE)
_NARROW = tl.constexpr(NARROW)


@triton.jit
def _shifted(z, BY: tl.constexpr):
    """Logical right shift of int64."""
    MASK: tl.constexpr = (1 << (64 - BY)) - 1
    return (z >> BY) & MASK


@triton.jit
def uniform(seed, position):
    """`ops.sample.uniform` of two numbers."""
    z = seed + (position + 1) * -7046029254386353131
    z = (z ^ _shifted(z, 30)) * -4658895280553007687
    z = (z ^ _shifted(z, 27)) * -7723592293110705685
    z = z ^ _shifted(z, 31)
    return _shifted(z, 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def _first_beyond(cumulative, weight, target, at):
    """Return where the sum passes the target: never at a weight of 0, and the last place that has one at most."""
    passed = tl.min(tl.where((cumulative > target) & (weight > 0), at, 0x7FFFFFFF), 0)
    last = tl.max(tl.where(weight > 0, at, 0), 0)
    return tl.where(passed == 0x7FFFFFFF, last, passed)


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=_ANYWHERE)
def maxima_kernel(logits, rows, keys, V, stride, count, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key of every SIDE logits; keys int64 [S, count]."""
    row = tl.program_id(1).to(tl.int64)
    of = tl.load(rows + row) if ROWS else row
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + of * stride + at, mask=at < V, other=0.0).to(tl.float32)
    best = tl.max(tl.reshape(key_of(x, at, V), (BLOCK // _SIDE, _SIDE)), 1)
    place = tl.program_id(0) * (BLOCK // _SIDE) + tl.arange(0, BLOCK // _SIDE)
    tl.store(keys + row * count + place, best, mask=place < count)


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=_ANYWHERE)
def top_kernel(
    logits,
    rows,  # int64 [S], read if ROWS
    keys,  # of `maxima_kernel`
    out,  # int64 [S, wanted], or [S] if DRAW
    seed,  # int64 [S]; these seven are read if DRAW
    position,
    top_k,
    temperature,  # fp64 [S]
    top_p,
    min_p,
    V,
    stride,
    count,
    wanted,
    ROWS: tl.constexpr,
    DRAW: tl.constexpr,
    COUNT: tl.constexpr,  # count, rounded up to a power of two
):
    """The NARROW likeliest tokens of a row in order, or a draw among them."""
    row = tl.program_id(0).to(tl.int64)
    of = tl.load(rows + row) if ROWS else row
    at = tl.arange(0, COUNT)
    best = tl.topk(tl.load(keys + row * count + at, mask=at < count, other=-0x8000000000000000), _NARROW)
    inside = (place_of(best) // _SIDE)[:, None] * _SIDE + tl.arange(0, _SIDE)[None, :]
    x = tl.load(logits + of * stride + inside, mask=inside < V, other=0.0).to(tl.float32)
    best = tl.topk(tl.reshape(key_of(x, inside, V), (_NARROW * _SIDE,)), _NARROW)
    rank = tl.arange(0, _NARROW)
    if DRAW:
        value = logit_of(best)
        largest = tl.max(tl.where(rank == 0, value, -float("inf")), 0)
        weight = tl.exp((value - largest) / tl.load(temperature + row).to(tl.float32)).to(tl.float64)
        k = tl.load(top_k + row)
        kept = (weight >= tl.load(min_p + row)) & ((rank < k) | (k == 0)) & (rank < V)
        weight = tl.where(kept, weight, 0.0)
        weight = weight / tl.sum(weight, 0)
        before = tl.cumsum(weight, 0) - weight
        weight = tl.where((before < tl.load(top_p + row)) | (rank == 0), weight, 0.0)
        target = uniform(tl.load(seed + row), tl.load(position + row)) * tl.sum(weight, 0)
        by_id = tl.sort((place_of(best) << 6) | rank)
        place, weight = by_id >> 6, tl.gather(weight, (by_id & 63).to(tl.int32), 0)
        tl.store(out + row, _first_beyond(tl.cumsum(weight, 0), weight, target, place))
    else:
        tl.store(out + row * wanted + rank, place_of(best), mask=rank < wanted)


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=_ANYWHERE)
def weigh_kernel(logits, rows, keys, sums, temperature, V, stride, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of exp((logit - largest) / temperature) of BLOCK logits; sums fp64 [S, parts], keys of `parts_kernel`."""
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    each = tl.arange(0, PARTS)
    key = tl.max(tl.load(keys + row * parts + each, mask=each < parts, other=-0x8000000000000000), 0)
    at = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + tl.load(rows + row) * stride + at, mask=at < V, other=-float("inf")).to(tl.float32)
    weight = tl.exp((x - logit_of(key)) / tl.load(temperature + row).to(tl.float32))
    tl.store(sums + row * parts + part, tl.sum(weight.to(tl.float64), 0))


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=_ANYWHERE)
def draw_kernel(
    logits, rows, keys, sums, out, seed, position, temperature, V, stride, parts,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A draw from the whole distribution: the part in which the sum passes u, then the token in it."""
    row = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, PARTS)
    key = tl.max(tl.load(keys + row * parts + each, mask=each < parts, other=-0x8000000000000000), 0)
    mass = tl.load(sums + row * parts + each, mask=each < parts, other=0.0)
    cumulative = tl.cumsum(mass, 0)
    target = uniform(tl.load(seed + row), tl.load(position + row)) * tl.sum(mass, 0)
    part = _first_beyond(cumulative, mass, target, each)
    before = tl.sum(tl.where(each < part, mass, 0.0), 0)
    at = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + tl.load(rows + row) * stride + at, mask=at < V, other=-float("inf")).to(tl.float32)
    weight = tl.exp((x - logit_of(key)) / tl.load(temperature + row).to(tl.float32)).to(tl.float64)
    token = _first_beyond(before + tl.cumsum(weight, 0), weight, target, at)
    tl.store(out + row, tl.minimum(token, V - 1).to(tl.int64))


def _taken(logits: Tensor) -> Tensor:
    need(logits.dtype in OUTPUTS, f"a draw from {logits.dtype} on a GPU: float16, bfloat16 and float32 are there")
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _top(logits: Tensor, chance: Chance | None, count: int) -> Tensor:
    logits = _taken(logits)
    vocab, rows = logits.shape[1], logits.shape[0] if chance is None else chance.rows.shape[0]
    shape = (rows, count) if chance is None else (rows,)
    out = torch.empty(shape, dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    most = ceil_div(vocab, SIDE)
    need(most <= 8192, f"the likeliest of {vocab} tokens on a GPU: vocabularies up to {8192 * SIDE} are there")
    keys = torch.empty(rows, most, dtype=torch.int64, device=logits.device)
    spare = [out] * 7 if chance is None else parameters(chance)
    where, seed, position, top_k, temperature, top_p, min_p = spare
    maxima_kernel[(ceil_div(vocab, PART), rows)](
        logits, where, keys, vocab, logits.stride(0), most, chance is not None, PART, num_warps=8
    )
    top_kernel[(rows,)](
        logits, where, keys, out, seed, position, top_k, temperature, top_p, min_p, vocab, logits.stride(0), most,
        count, chance is not None, chance is not None, max(NARROW, triton.next_power_of_2(most)), num_warps=8,
    )  # fmt: skip
    return out


def parameters(chance: Chance) -> list[Tensor]:
    """Rows, seed, position, top_k, temperature, top_p, min_p, each with its numbers side by side."""
    fields = (
        chance.rows, chance.seed, chance.position, chance.top_k, chance.temperature, chance.top_p, chance.min_p,
    )  # fmt: skip
    return [field.contiguous() for field in fields]


@kernel_of(likeliest)
def likeliest_triton(logits: Tensor, count: int) -> Tensor:
    """Two launches."""
    return _top(logits, None, count)


@kernel_of(draw_narrow)
def draw_narrow_triton(logits: Tensor, chance: Chance) -> Tensor:
    """Two launches."""
    return _top(logits, chance, NARROW)


@kernel_of(draw_whole)
def draw_whole_triton(logits: Tensor, chance: Chance) -> Tensor:
    """Three launches."""
    logits = _taken(logits)
    vocab, rows = logits.shape[1], chance.rows.shape[0]
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    parts = ceil_div(vocab, PART)
    keys = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    sums = torch.empty(rows, parts, dtype=torch.float64, device=logits.device)
    where, seed, position, _, temperature, _, _ = parameters(chance)
    stride, padded = logits.stride(0), triton.next_power_of_2(parts)
    grid = (parts, rows)
    parts_kernel[grid](logits, where, keys, vocab, stride, parts, True, PART, num_warps=8)
    weigh_kernel[grid](logits, where, keys, sums, temperature, vocab, stride, parts, padded, PART, num_warps=8)
    draw_kernel[(rows,)](
        logits, where, keys, sums, out, seed, position, temperature, vocab, stride, parts, padded, PART, num_warps=8
    )
    return out
