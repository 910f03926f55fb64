"""`select_pages`: scores of pages from their keys or their statistics, split over the sequence, and the choice.

Two launches per layer, whatever the step: rows that keep what they chose copy it in the first and are skipped by the
second (`choice.py`); rows that choose score their pages in the first. Which is which is decided on the device, from
positions, so one captured graph serves every mixture.

Scores are products on tensor cores. Keys: (q . code - zero * sum(q)) * scale, the largest of a page and query head; the
choice makes shares of them. Bounds: sum over dims of max(q low, q high) = min(q, 0) . low + max(q, 0) . high.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.base.config import PageScores
from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE
from omniserve.formats.kv import LayerPages
from omniserve.kernels.choice import BLOCK, UNIT, choose_constants, choose_kernel, choose_warps, unit_kernel
from omniserve.kernels.codes import halves, tiny_codes
from omniserve.kernels.device import INTERPRETED, kernel_of, need, pdl, processors
from omniserve.kernels.handover import held_back
from omniserve.kernels.keep import keep_row, row_of
from omniserve.kernels.write import checked
from omniserve.ops.select import Chosen, select_pages

CROWD = {0: 24, 4: 16, 8: 7, 16: 10}
"""Programs of a scorer per processor, by the bits of the keys that it reads (0: bounds): enough to hide the way to
memory, few enough to end early at low cost. Measured on an H200, like the warps and stages below."""

SCORE_WARPS, SCORE_STAGES = 2, 2

STRIDE = 128
"""Scores of a row take a multiple of so many places: what compiled kernels know of strides is always the same."""

LARGEST = 16384
"""Pages of one sequence, at most: the choice holds them all in registers."""

_PAGE = tl.constexpr(PAGE)
_UNIT = tl.constexpr(UNIT)
_PARTS = tl.constexpr(4)


@triton.jit
def _begin(slots, prompts, seq_len, table, memo, ids, index, count, kv_heads, table_stride, memo_stride, interval,
           budget, LP: tl.constexpr):  # fmt: skip
    """Copy the list of a row that keeps what it chose; return slot, pages and place in `scores`, and if it chooses."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    slot, position, since, here = row_of(slots, prompts, seq_len, row, interval)
    existing = (position - since) // _PAGE + 1  # pages at the position that chose
    spot = row.to(tl.int64) * kv_heads + head
    if (since > 0) & (split == 0) & (here == 0):
        listed = spot * (budget + 1)
        remembered = memo + slot * memo_stride + head * budget
        keep_row(
            remembered, table + slot * table_stride, ids + listed, index + listed, count, row, head, position // _PAGE,
            existing, budget, LP,
        )  # fmt: skip
    return slot, existing, spot, (since == 0) & (existing > budget)


@triton.jit(do_not_specialize_on_alignment=["slots", "prompts", "seq_len"])
def score_kernel(
    q,  # [R, G H, D], rows `q_stride` apart
    statistics,  # fp16 [pages, H, 4, 2, D]
    table,  # int32 [slots, ...], rows `table_stride` apart
    slots,  # int64 [R]
    prompts,  # int64 [R]
    seq_len,  # int32 [R]
    memo,  # int32 [slots, H, budget], rows `memo_stride` apart
    scores,  # fp32 [R, H, pages]
    beside,  # fp32 [R, H, units]: the best score of each unit, forced pages aside
    ids,  # int32 [R, H, budget + 1]
    index,
    count,  # int32 [R]
    kv_heads,
    q_stride,
    table_stride,
    memo_stride,
    interval,
    budget,
    pages,
    units,
    G: tl.constexpr,
    GP: tl.constexpr,  # G, padded to the rows of a product
    D: tl.constexpr,
    DP: tl.constexpr,  # D, rounded up to a power of two
    LP: tl.constexpr,  # budget + 1, rounded up to a power of two
    STAGES: tl.constexpr,  # units on their way
    PDL: tl.constexpr,
):
    """A share of one row's pages for one key head; or the list of a row that keeps what it chose."""
    if PDL:
        held_back()  # `choose_kernel` reads lengths and tables at once
    split = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    slot, existing, spot, chooses = _begin(
        slots, prompts, seq_len, table, memo, ids, index, count, kv_heads, table_stride, memo_stride, interval,
        budget, LP,
    )  # fmt: skip
    if not chooses:
        return
    group = tl.arange(0, GP)
    at = tl.arange(0, DP)
    asked = q + row.to(tl.int64) * q_stride + (head * G + group)[None, :] * D + at[:, None]
    query = tl.load(asked, mask=(group < G)[None, :] & (at < D)[:, None], other=0.0).to(tl.float16)
    below, above = tl.minimum(query, 0.0).to(tl.float16), tl.maximum(query, 0.0).to(tl.float16)
    line = tl.arange(0, _UNIT * _PARTS)
    for unit in tl.range(split, tl.cdiv(existing, _UNIT), tl.num_programs(0), num_stages=STAGES):
        page = unit * _UNIT + line // _PARTS
        physical = tl.load(table + slot * table_stride + page, mask=page < existing, other=0)
        found = (tl.maximum(physical, 0).to(tl.int64) * kv_heads + head) * _PARTS + line % _PARTS
        bounds = statistics + found[:, None] * (2 * D) + at[None, :]
        if D == DP:
            low, high = tl.load(bounds), tl.load(bounds + D)
        else:
            low = tl.load(bounds, mask=(at < D)[None, :], other=0.0)
            high = tl.load(bounds + D, mask=(at < D)[None, :], other=0.0)
        score = tl.dot(low, below)
        score = tl.dot(high, above, score)
        # A key beyond fp16 makes its bound infinite, and 0 * inf is no number: such a page is always attractive.
        score = tl.where(score == score, score, float("inf"))
        score = tl.where((group < G)[None, :], score, float("-inf"))
        best = tl.max(tl.reshape(tl.max(score, 1), (_UNIT, _PARTS)), 1)
        page = unit * _UNIT + tl.arange(0, _UNIT)
        tl.store(scores + spot * pages + page, best, mask=page < existing)
        open_ = (page > 0) & (page < existing - 1)
        tl.store(beside + spot * units + unit, tl.max(tl.where(open_, best, float("-inf")), 0))


@triton.jit(do_not_specialize_on_alignment=["slots", "prompts", "seq_len"])
def key_score_kernel(
    q,  # [R, G H, D], rows `q_stride` apart
    codes,  # [pages, H, ...] as codes (uint8) or plain numbers
    scales,  # the same memory as fp16: scales and zeros behind the codes
    table,  # the others as in `score_kernel`
    slots,
    prompts,
    seq_len,
    memo,
    scores,  # fp32 [R, H, G, pages], times `factor`
    beside,  # for `unit_kernel`
    ids,
    index,
    count,
    kv_heads,
    q_stride,
    table_stride,
    memo_stride,
    interval,
    budget,
    pages,
    units,
    factor,  # of attention's products
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    HP: tl.constexpr,  # D / 2, rounded up to a power of two
    LP: tl.constexpr,
    BITS: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,  # pages on their way
    PDL: tl.constexpr,
):
    """A share of one row's pages for one key head, by all their keys; or the list of a row that keeps what it chose."""
    if PDL:
        held_back()  # `choose_kernel` reads lengths and tables at once
    HALF: tl.constexpr = D // 2
    head = tl.program_id(1)
    row = tl.program_id(2)
    slot, existing, spot, chooses = _begin(
        slots, prompts, seq_len, table, memo, ids, index, count, kv_heads, table_stride, memo_stride, interval,
        budget, LP,
    )  # fmt: skip
    if not chooses:
        return
    length = tl.load(seq_len + row)
    group = tl.arange(0, GP)
    at = tl.arange(0, HP)
    keep = (at < HALF)[None, :]
    asked = q + row.to(tl.int64) * q_stride + (head * G + group)[None, :] * D + at[:, None]
    some = (group < G)[None, :] & (at < HALF)[:, None]
    q0 = tl.load(asked, mask=some, other=0.0)
    q1 = tl.load(asked + HALF, mask=some, other=0.0)
    FACTOR: tl.constexpr = 2.0**24 if BITS < 16 and q0.dtype == tl.float16 else 1.0  # of `tiny_codes`
    total = (tl.sum(q0.to(tl.float32), 0) + tl.sum(q1.to(tl.float32), 0)) * (1 / FACTOR)
    BYTES: tl.constexpr = D // 2 if BITS == 4 else D  # of a token's codes; numbers, where they are plain
    SCALES: tl.constexpr = 256 if BITS < 16 else 0  # fp16 numbers behind the codes
    within = tl.arange(0, _PAGE)
    for logical in tl.range(tl.program_id(0), existing, tl.num_programs(0), num_stages=STAGES):
        physical = tl.maximum(tl.load(table + slot * table_stride + logical), 0).to(tl.int64)
        page = physical * kv_heads + head
        here = codes + page * (2 * _PAGE * BYTES + 2 * SCALES)
        if FACTOR > 1:
            place = here + within[:, None] * BYTES + at[None, :]
            first = tl.load(place) if HALF == HP else tl.load(place, mask=keep, other=0)
            if BITS == 4:
                score = tl.dot(tiny_codes(first, False, BITS, ASM), q0)
                score += tl.dot(tiny_codes(first, True, BITS, ASM), q1) * 2.0**-4
            else:
                second = tl.load(place + HALF) if HALF == HP else tl.load(place + HALF, mask=keep, other=0)
                score = tl.dot(tiny_codes(first, False, BITS, ASM), q0)
                score = tl.dot(tiny_codes(second, True, BITS, ASM), q1, score)
        else:
            k0, k1 = halves(here, within, at, keep, D, BITS, HALF == HP, q0.dtype, ASM)
            score = tl.dot(k0, q0)
            score = tl.dot(k1, q1, score)
        if BITS < 16:
            behind = scales + page * (_PAGE * BYTES + SCALES) + _PAGE * BYTES + within
            scale, zero = tl.load(behind).to(tl.float32), tl.load(behind + _PAGE).to(tl.float32)
            score = (score - zero[:, None] * total[None, :]) * (scale * FACTOR)[:, None]
        score = tl.where((within < length - logical * _PAGE)[:, None], score, float("-inf"))
        best = tl.reduce(score, 0, _larger)
        # A key beyond fp16 times 0 is no number: such a page is always attractive.
        best = tl.where(best == best, best, float("inf"))
        tl.store(scores + (spot * G + group) * pages + logical, best * factor, mask=group < G)


@triton.jit
def _larger(a, b):
    """Return the larger number, and what is no number if one of them is none."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@kernel_of(select_pages)
def select_pages_triton(
    q: Tensor,
    store: LayerPages,
    table: Tensor,
    slots: Tensor,
    prompts: Tensor,
    seq_len: Tensor,
    memo: Tensor,
    interval: int,
    longest: int,
    by: PageScores,
    scale: float,
) -> Chosen:
    """Two launches; the second does nothing for rows that keep what they chose."""
    rows, heads, head_dim = q.shape
    kv_heads, budget = memo.shape[1:]
    need(
        q.dtype in (torch.float16, torch.bfloat16),
        f"selecting pages for {q.dtype} on a GPU: float16 and bfloat16 are there",
    )
    pages = ceil_div(longest, PAGE)
    need(pages <= LARGEST, f"selecting among {pages} pages on a GPU: up to {LARGEST} are there")
    assert q.stride()[1:] == (head_dim, 1) and memo.stride()[1:] == (budget, 1), (q.stride(), memo.stride())
    assert table.stride(1) == 1 and budget >= 1, (table.stride(), budget)
    ids = torch.empty(rows, kv_heads, budget + 1, dtype=torch.int32, device=q.device)
    index, count = torch.empty_like(ids), torch.empty(rows, dtype=torch.int32, device=q.device)
    apart = heads // kv_heads if by == "keys" else 0
    # Compiled for the engine's longest sequence, whatever the step: nothing is compiled within a request.
    units = ceil_div(pages, STRIDE) * STRIDE // UNIT
    stride = units * UNIT
    scores = torch.empty(rows, kv_heads, max(apart, 1), stride, dtype=torch.float32, device=q.device)
    blocks = ceil_div(units, BLOCK)
    each = apart * (units + 2 * blocks) if apart else units
    beside = torch.empty(rows, kv_heads, each, dtype=torch.float32, device=q.device)
    slots, prompts, seq_len = slots.contiguous(), prompts.contiguous(), seq_len.contiguous()
    lists = (table, slots, prompts, seq_len, memo, scores, beside, ids, index, count)
    numbers = (kv_heads, q.stride(0), table.stride(0), memo.stride(0), interval, budget, stride, units)
    bits = store.format.bits if by == "keys" else 0
    crowd = max(1, CROWD[bits] * processors() // (rows * kv_heads))
    if by == "keys":
        checked([store], head_dim)
        need(bits < 16 or store.format.element == q.dtype, f"kv16 pages of {store.format.element}: as q is")
        key_score_kernel[(min(pages, crowd), kv_heads, rows)](
            q, store.pages.view(store.format.element), store.pages.view(torch.float16), *lists, *numbers, scale,
            **key_constants(apart, head_dim, budget, bits), num_warps=key_warps(head_dim), launch_pdl=pdl(),
        )  # fmt: skip
        unit_kernel[(blocks, heads, rows)](
            slots, prompts, seq_len, scores, beside, kv_heads, interval, budget, stride, units, apart, pdl(),
            num_warps=1, launch_pdl=pdl(),
        )  # fmt: skip
    else:
        assert store.statistics is not None and store.statistics.is_contiguous()
        score_kernel[(min(units, crowd), kv_heads, rows)](
            q, store.statistics, *lists, *numbers, **score_constants(heads // kv_heads, head_dim, budget),
            num_warps=SCORE_WARPS, launch_pdl=pdl(),
        )  # fmt: skip
    narrow = choose_constants(max(pages, table.shape[1]), budget, apart)
    choose_kernel[(kv_heads, rows)](
        *lists, rows, kv_heads, table.stride(0), memo.stride(0), interval, budget, stride, units, **narrow,
        num_warps=choose_warps(narrow["WIDE"]), launch_pdl=pdl(),
    )  # fmt: skip
    return ids, index, count


def score_constants(group: int, head_dim: int, budget: int) -> dict[str, int]:
    """Return what `score_kernel` is compiled for."""
    return {
        "G": group, "GP": max(16, triton.next_power_of_2(group)), "D": head_dim,
        "DP": max(16, triton.next_power_of_2(head_dim)), "LP": triton.next_power_of_2(budget + 1),
        "STAGES": SCORE_STAGES, "PDL": pdl(),
    }  # fmt: skip


def key_constants(group: int, head_dim: int, budget: int, bits: int) -> dict[str, int | bool]:
    """Return what `key_score_kernel` is compiled for."""
    return {
        "G": group, "GP": max(8, triton.next_power_of_2(group)), "D": head_dim,
        "HP": triton.next_power_of_2(head_dim // 2), "LP": triton.next_power_of_2(budget + 1), "BITS": bits,
        "ASM": not INTERPRETED, "STAGES": key_stages(bits), "PDL": pdl(),
    }  # fmt: skip


def key_warps(head_dim: int) -> int:
    """Return the warps of one program that reads keys: one, unless a page fills its registers."""
    return 4 if head_dim > 128 else 1


def key_stages(bits: int) -> int:
    """Return how many pages are on their way."""
    return {4: 3, 8: 3, 16: 2}[bits]
