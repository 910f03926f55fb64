"""Biases, what grammars allow, and penalties: one pass over all logits, in the reference's order of operations."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.kernels.device import OUTPUTS, kernel_of, need
from omniserve.ops.changes import LEAST_PENALTY, PROMPT, Bias, Masked, Penalties, changed

BLOCK = 2048
"""Logits of one program."""
WARPS = 4

_TIMES = tl.constexpr(PROMPT - 1)
_LEAST = tl.constexpr(LEAST_PENALTY)

_ANY = ["words"]
_ANYWHERE = ["of", "repetition", "presence", "frequency"]


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=_ANYWHERE)
def change_kernel(
    logits,
    out,  # fp32 [S, V]
    of,  # int64 [4, S]: a row's place in table, bits, counts and penalties, -1: in none
    table,  # fp32 [slots, V]
    bits,  # int32 [s, words]
    counts,  # int32 [slots, V]
    repetition,  # fp64 [s]
    presence,
    frequency,
    V,
    stride,
    words,
    BLOCK: tl.constexpr,
):
    """Change BLOCK logits of a row by what the row asks for; what no row asks for is not read."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    many = tl.num_programs(1)
    there = at < V
    x = tl.load(logits + row * stride + at, mask=there, other=0.0).to(tl.float32)
    biased, masked = tl.load(of + row), tl.load(of + many + row)
    counted, penalized = tl.load(of + 2 * many + row), tl.load(of + 3 * many + row)
    if biased >= 0:
        x += tl.load(table + biased * V + at, mask=there, other=0.0)
    if masked >= 0:
        word = tl.load(bits + masked * words + at // 32, mask=there, other=0)
        x = tl.where(((word >> (at % 32)) & 1) == 1, x, -float("inf"))
    if penalized >= 0:
        count = tl.load(counts + counted * V + at, mask=there, other=0)
        penalty = tl.maximum(tl.load(repetition + penalized).to(tl.float32), _LEAST)
        penalty = tl.where(count > 0, penalty, 1.0)
        x = tl.div_rn(tl.maximum(x, 0.0), penalty) + tl.minimum(x, 0.0) * penalty
        times = count & _TIMES
        x -= tl.load(frequency + penalized).to(tl.float32) * times.to(tl.float32)
        x -= tl.load(presence + penalized).to(tl.float32) * (times > 0).to(tl.float32)
    tl.store(out + row * V + at, x, mask=there)


@kernel_of(changed)
def changed_triton(logits: Tensor, bias: Bias | None, masked: Masked | None, penalties: Penalties | None) -> Tensor:
    """One launch beside those that note which row asks for what."""
    need(logits.dtype in OUTPUTS, f"changes of {logits.dtype} on a GPU: float16, bfloat16 and float32 are there")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, vocab = logits.shape
    out = torch.empty(rows, vocab, device=logits.device)
    if not rows:
        return out
    of = torch.full((4, rows), -1, dtype=torch.int64, device=logits.device)
    table, bits, counts, numbers = out, of.view(torch.int32), of.view(torch.int32), [of.view(torch.float64)] * 3
    if bias is not None:
        of[0].index_copy_(0, bias.rows, bias.slots)
        table = bias.table
    if masked is not None:
        of[1].index_copy_(0, masked.rows, torch.arange(masked.rows.shape[0], device=out.device))
        bits = masked.bits.contiguous()
    if penalties is not None:
        of[2].index_copy_(0, penalties.rows, penalties.slots)
        of[3].index_copy_(0, penalties.rows, torch.arange(penalties.rows.shape[0], device=out.device))
        counts = penalties.counts
        numbers = [one.contiguous() for one in (penalties.repetition, penalties.presence, penalties.frequency)]
    words = masked.bits.shape[1] if masked is not None else 0
    change_kernel[(ceil_div(vocab, BLOCK), rows)](
        logits, out, of, table, bits, counts, *numbers, vocab, logits.stride(0), words,
        BLOCK, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out
