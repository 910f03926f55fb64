"""The likeliest token of each row of logits, in two launches whatever the vocabulary: parts of rows, then rows.

A logit and its place become one whole number: the larger the logit, and among equals the smaller the id, the larger the
number. One maximum then finds the token and what it is worth, and NaN is larger than all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.kernels.device import OUTPUTS, kernel_of, need
from omniserve.ops.sample import CORRUPTED, greedy

PART = 4096
"""Logits of one program."""

_CORRUPTED = tl.constexpr(CORRUPTED)


@triton.jit
def key_of(x, at, V):
    """Return the keys of fp32 logits at places below V; those beyond are smaller than all."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # of negative numbers the larger has the smaller bits
    bits = tl.where(x != x, 0x7FFFFFFF, bits)
    bits = tl.where(at < V, bits, -0x80000000)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - at).to(tl.int64)


@triton.jit
def place_of(key):
    """Return the place of a key."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit
def logit_of(key):
    """Return the logit of a key, fp32."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def parts_kernel(logits, rows, keys, V, stride, parts, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key of BLOCK logits of a row, or of row `rows[i]` if ROWS; keys int64 [S, parts]."""
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    of = tl.load(rows + row) if ROWS else row
    at = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + of * stride + at, mask=at < V, other=0.0).to(tl.float32)
    tl.store(keys + row * parts + part, tl.max(key_of(x, at, V), 0))


@triton.jit
def pick_kernel(keys, tokens, parts, nothing, PARTS: tl.constexpr):
    """The token of a row's largest key, or what stands in its place."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PARTS)
    key = tl.max(tl.load(keys + row * parts + at, mask=at < parts, other=-0x8000000000000000), 0)
    worth = key >> 32
    token = tl.where(worth >= 0x7F800000, _CORRUPTED, place_of(key))  # +inf or NaN
    token = tl.where(worth == -0x7F800001, nothing, token)  # -inf
    tl.store(tokens + row, token)


@kernel_of(greedy)
def greedy_triton(logits: Tensor, nothing: int) -> Tensor:
    """Two launches, whose grids depend on the number of rows alone."""
    need(logits.dtype in OUTPUTS, f"greedy of {logits.dtype} on a GPU: float16, bfloat16 and float32 are there")
    rows, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        parts = ceil_div(vocab, PART)
        keys = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
        parts_kernel[(parts, rows)](logits, tokens, keys, vocab, logits.stride(0), parts, False, PART, num_warps=8)
        pick_kernel[(rows,)](keys, tokens, parts, nothing, triton.next_power_of_2(parts), num_warps=1)
    return tokens
