"""`select_pages`: scores of pages from their keys or their statistics, split over the sequence, and the choice.

Two launches, whatever the step: rows that keep what they chose copy it in the first and are skipped by the second; rows
that choose score their pages in the first. Which is which is decided on the device, from positions, so one captured
graph serves every mixture.

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
from omniserve.kernels.codes import halves
from omniserve.kernels.device import INTERPRETED, kernel_of, need, processors
from omniserve.kernels.write import checked
from omniserve.ops.select import Chosen, select_pages

BLOCK = 8
"""Pages that one turn of the scorer of bounds takes."""

CROWD = {0: 24, 4: 16, 8: 32, 16: 8}
"""Programs of a scorer per processor, by the bits of the keys that it reads (0: bounds): enough to hide the way to
memory, few enough to end early at low cost. Measured on an H200, like the warps and stages below."""

SCORE_WARPS, SCORE_STAGES = 2, 2

LARGEST = 16384
"""Pages of one sequence, at most: the choice holds them all in registers."""

_PAGE = tl.constexpr(PAGE)
_PARTS = tl.constexpr(4)


@triton.jit
def _row(slots, prompts, seq_len, row, interval):
    """Return slot and position of a row, how long ago its request chose, and if the row that chose is in this step."""
    slot = tl.load(slots + row)
    position = tl.load(seq_len + row) - 1
    since = tl.maximum((position - tl.load(prompts + row)) % interval, 0).to(tl.int32)
    source = row - since
    here = (source >= 0) & (tl.load(slots + tl.maximum(source, 0)) == slot)
    return slot, position, since, here


@triton.jit
def _begin(slots, prompts, seq_len, table, memo, ids, index, count, kv_heads, table_stride, interval, budget,
           LP: tl.constexpr):  # fmt: skip
    """Copy the list of a row that keeps what it chose; return slot, pages and place in `scores`, and if it chooses."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    slot, position, since, here = _row(slots, prompts, seq_len, row, interval)
    newest = position // _PAGE
    existing = (position - since) // _PAGE + 1  # pages at the position that chose
    spot = row.to(tl.int64) * kv_heads + head
    if (since > 0) & (split == 0) & (here == 0):
        place = tl.arange(0, LP)
        kept = tl.minimum(existing, budget)
        chosen = tl.load(memo + (slot * kv_heads + head) * budget + place, mask=place < kept, other=0)
        chosen = tl.where((place == kept) & (newest >= existing), newest, chosen)
        listed = spot * (budget + 1) + place
        tl.store(index + listed, chosen, mask=place <= budget)
        physical = tl.load(table + slot * table_stride + chosen, mask=place <= budget, other=0)
        tl.store(ids + listed, physical, mask=place <= budget)
        if head == 0:
            tl.store(count + row, kept + (newest >= existing).to(tl.int32))
    return slot, existing, spot, (since == 0) & (existing > budget)


@triton.jit
def score_kernel(
    q,  # [R, G H, D], rows `q_stride` apart
    statistics,  # fp16 [pages, H, 4, 2, D]
    table,  # int32 [slots, ...], rows `table_stride` apart
    slots,  # int64 [R]
    prompts,  # int64 [R]
    seq_len,  # int32 [R]
    memo,  # int32 [slots, H, budget]
    scores,  # fp32 [R, H, pages]
    ids,  # int32 [R, H, budget + 1]
    index,
    count,  # int32 [R]
    kv_heads,
    q_stride,
    table_stride,
    interval,
    budget,
    pages,
    G: tl.constexpr,
    GP: tl.constexpr,  # G, padded to the rows of a product
    D: tl.constexpr,
    DP: tl.constexpr,  # D, rounded up to a power of two
    LP: tl.constexpr,  # budget + 1, rounded up to a power of two
    BLOCK: tl.constexpr,
):
    """A share of one row's pages for one key head; or the list of a row that keeps what it chose."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    slot, existing, spot, chooses = _begin(
        slots, prompts, seq_len, table, memo, ids, index, count, kv_heads, table_stride, interval, budget, LP
    )
    if not chooses:
        return
    group = tl.arange(0, GP)
    at = tl.arange(0, DP)
    asked = q + row.to(tl.int64) * q_stride + (head * G + group)[None, :] * D + at[:, None]
    query = tl.load(asked, mask=(group < G)[None, :] & (at < D)[:, None], other=0.0).to(tl.float16)
    below, above = tl.minimum(query, 0.0).to(tl.float16), tl.maximum(query, 0.0).to(tl.float16)
    line = tl.arange(0, BLOCK * _PARTS)
    for block in range(split, tl.cdiv(existing, BLOCK), tl.num_programs(0)):
        page = block * BLOCK + line // _PARTS
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
        best = tl.max(tl.reshape(tl.max(score, 1), (BLOCK, _PARTS)), 1)
        page = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(scores + spot * pages + page, best, mask=page < existing)


@triton.jit
def key_score_kernel(
    q,  # [R, G H, D], rows `q_stride` apart
    codes,  # [pages, H, ...] as codes (uint8) or plain numbers
    scales,  # the same memory as fp16: scales and zeros behind the codes
    table,  # the others as in `score_kernel`
    slots,
    prompts,
    seq_len,
    memo,
    scores,  # fp32 [R, H, G, pages]
    ids,
    index,
    count,
    kv_heads,
    q_stride,
    table_stride,
    interval,
    budget,
    pages,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    HP: tl.constexpr,  # D / 2, rounded up to a power of two
    LP: tl.constexpr,
    BITS: tl.constexpr,
    ASM: tl.constexpr,
):
    """A share of one row's pages for one key head, by all their keys; or the list of a row that keeps what it chose."""
    HALF: tl.constexpr = D // 2
    head = tl.program_id(1)
    row = tl.program_id(2)
    slot, existing, spot, chooses = _begin(
        slots, prompts, seq_len, table, memo, ids, index, count, kv_heads, table_stride, interval, budget, LP
    )
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
    total = tl.sum(q0.to(tl.float32), 0) + tl.sum(q1.to(tl.float32), 0)
    BYTES: tl.constexpr = D // 2 if BITS == 4 else D  # of a token's codes; numbers, where they are plain
    SCALES: tl.constexpr = 256 if BITS < 16 else 0  # fp16 numbers behind the codes
    within = tl.arange(0, _PAGE)
    for logical in range(tl.program_id(0), existing, tl.num_programs(0)):
        physical = tl.maximum(tl.load(table + slot * table_stride + logical), 0).to(tl.int64)
        page = physical * kv_heads + head
        here = codes + page * (2 * _PAGE * BYTES + 2 * SCALES)
        k0, k1 = halves(here, within, at, keep, D, BITS, HALF == HP, q0.dtype, ASM)
        score = tl.dot(k0, q0)
        score = tl.dot(k1, q1, score)
        if BITS < 16:
            behind = scales + page * (_PAGE * BYTES + SCALES) + _PAGE * BYTES + within
            scale, zero = tl.load(behind).to(tl.float32), tl.load(behind + _PAGE).to(tl.float32)
            score = (score - zero[:, None] * total[None, :]) * scale[:, None]
        # A key beyond fp16 times 0 is no number: such a page is always attractive.
        score = tl.where(score == score, score, float("inf"))
        score = tl.where((within < length - logical * _PAGE)[:, None], score, float("-inf"))
        tl.store(scores + (spot * G + group) * pages + logical, tl.max(score, 0), mask=group < G)


@triton.jit
def choose_kernel(
    table,
    slots,
    prompts,
    seq_len,
    memo,
    scores,
    ids,
    index,
    count,
    rows,
    kv_heads,
    table_stride,
    interval,
    budget,
    pages,
    scale,
    G: tl.constexpr,  # query heads whose scores lie apart; 0: there is one score per page
    LP: tl.constexpr,
    WIDE: tl.constexpr,  # pages, rounded up to a power of two
    GROUPS: tl.constexpr,  # at least `budget`, unless that is more than there are pages
):
    """The list of a row for one key head, from the scores of the row that chose: itself, or one before it."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    slot, position, since, here = _row(slots, prompts, seq_len, row, interval)
    if (since > 0) & (here == 0):
        return
    newest = position // _PAGE
    existing = (position - since) // _PAGE + 1
    listed = (row.to(tl.int64) * kv_heads + head) * (budget + 1)
    remembered = (slot * kv_heads + head) * budget
    # The next refresh of the same request, if this step holds it, is the one to remember.
    following = row + interval
    next_slot = tl.load(slots + tl.minimum(following, rows - 1))
    last = (since == 0) & ((following >= rows) | (next_slot != slot))
    grown = (newest >= existing).to(tl.int32)
    kept = tl.minimum(existing, budget)
    if head == 0:
        tl.store(count + row, kept + grown)
    addresses = table + slot * table_stride
    if existing <= budget:
        place = tl.arange(0, LP)
        tl.store(memo + remembered + place, place, mask=last & (place < budget))
        chosen = tl.where(place < existing + grown, place, 0)  # the page that began since follows the others
        tl.store(index + listed + place, chosen, mask=place <= budget)
        physical = tl.load(addresses + chosen, mask=place <= budget, other=0)
        tl.store(ids + listed + place, physical, mask=place <= budget)
        return
    page = tl.arange(0, WIDE)
    forced = (page == 0) | (page == existing - 1)
    open_ = (page < existing) & (forced == 0)
    spot = ((row - since).to(tl.int64) * kv_heads + head) * pages
    if G == 0:
        score = tl.load(scores + spot + page, mask=open_, other=float("-inf"))
    else:
        score = tl.full((WIDE,), float("-inf"), tl.float32)
        for group in range(G):
            of = scores + (spot * G + group * pages) + page
            best = tl.load(of, mask=page < existing, other=float("-inf")) * scale
            finite = tl.where(best == float("inf"), float("-inf"), best)
            top = tl.max(finite, 0)
            base = tl.where(top == float("-inf"), 0.0, top)
            whole = base + tl.log(tl.sum(tl.exp(finite - base), 0))
            share = tl.where(finite == float("-inf"), best, best - whole)
            score = tl.maximum(score, share)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ordered like the scores
    wanted = budget - 2
    key = tl.where(open_, key, -2147483648)
    # At least `wanted` keys are not below `least`, fewer are not below `most`. Of every `GROUPS`-th page the best key
    # is such a `least`, as there are at least as many of them as are wanted: it saves half of the turns.
    best = tl.min(tl.max(tl.reshape(key, (WIDE // GROUPS, GROUPS)), 0), 0)
    least = tl.maximum(tl.min(tl.where(open_, key, 0x7FFFFFFF), 0), best).to(tl.int64)
    most = tl.max(key, 0).to(tl.int64) + 1
    while most - least > 1:
        middle = (least + most) // 2
        many = tl.sum((key >= middle.to(tl.int32)).to(tl.int32), 0)
        if many >= wanted:
            least = middle
        else:
            most = middle
        if many == wanted:
            most = least + 1
    border = least.to(tl.int32)
    sure = forced | (open_ & (key > border))
    equal = open_ & (key == border)
    room = budget - tl.sum(sure.to(tl.int32), 0)  # for those that equal the last one: the first of them
    before = tl.cumsum(sure.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
    taken = sure | (equal & ((before >> 16) <= room))
    place = (before & 0xFFFF) + tl.minimum(before >> 16, room) - 1
    tl.store(index + listed + place, page, mask=taken)
    tl.store(ids + listed + place, tl.load(addresses + page, mask=taken, other=0), mask=taken)
    tl.store(memo + remembered + place, page, mask=taken & last)
    behind = newest * grown
    tl.store(index + listed + budget, behind)
    tl.store(ids + listed + budget, tl.load(addresses + behind))


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
    assert q.stride()[1:] == (head_dim, 1) and memo.is_contiguous(), (q.stride(), memo.stride())
    assert table.stride(1) == 1 and budget >= 1, (table.stride(), budget)
    ids = torch.empty(rows, kv_heads, budget + 1, dtype=torch.int32, device=q.device)
    index, count = torch.empty_like(ids), torch.empty(rows, dtype=torch.int32, device=q.device)
    apart = heads // kv_heads if by == "keys" else 0
    scores = torch.empty(rows, kv_heads, max(apart, 1), pages, dtype=torch.float32, device=q.device)
    slots, prompts, seq_len = slots.contiguous(), prompts.contiguous(), seq_len.contiguous()
    lists = (table, slots, prompts, seq_len, memo, scores, ids, index, count)
    numbers = (kv_heads, q.stride(0), table.stride(0), interval, budget, pages)
    bits = store.format.bits if by == "keys" else 0
    crowd = ceil_div(CROWD[bits] * processors(), rows * kv_heads)
    if by == "keys":
        checked([store], head_dim)
        need(bits < 16 or store.format.element == q.dtype, f"kv16 pages of {store.format.element}: as q is")
        key_score_kernel[(min(pages, crowd), kv_heads, rows)](
            q, store.pages.view(store.format.element), store.pages.view(torch.float16), *lists, *numbers,
            **key_constants(heads // kv_heads, head_dim, budget, bits), num_warps=key_warps(head_dim, bits),
            num_stages=key_stages(bits),
        )  # fmt: skip
    else:
        assert store.statistics is not None and store.statistics.is_contiguous()
        score_kernel[(min(ceil_div(pages, BLOCK), crowd), kv_heads, rows)](
            q, store.statistics, *lists, *numbers, **score_constants(heads // kv_heads, head_dim, budget),
            num_warps=SCORE_WARPS, num_stages=SCORE_STAGES,
        )  # fmt: skip
    narrow = choose_constants(pages, budget, apart)
    choose_kernel[(kv_heads, rows)](
        table, slots, prompts, seq_len, memo, scores, ids, index, count, rows, kv_heads, table.stride(0), interval,
        budget, pages, scale, **narrow, num_warps=warps_of(narrow),
    )  # fmt: skip
    return ids, index, count


def score_constants(group: int, head_dim: int, budget: int) -> dict[str, int]:
    """Return what `score_kernel` is compiled for."""
    return {
        "G": group, "GP": max(16, triton.next_power_of_2(group)), "D": head_dim,
        "DP": max(16, triton.next_power_of_2(head_dim)), "LP": triton.next_power_of_2(budget + 1), "BLOCK": BLOCK,
    }  # fmt: skip


def key_constants(group: int, head_dim: int, budget: int, bits: int) -> dict[str, int | bool]:
    """Return what `key_score_kernel` is compiled for."""
    return {
        "G": group, "GP": max(8, triton.next_power_of_2(group)), "D": head_dim,
        "HP": triton.next_power_of_2(head_dim // 2), "LP": triton.next_power_of_2(budget + 1), "BITS": bits,
        "ASM": not INTERPRETED,
    }  # fmt: skip


def key_warps(head_dim: int, bits: int) -> int:
    """Return the warps of one program that reads keys: one, unless a page fills its registers."""
    return 4 if head_dim > 128 else 1 if bits == 4 else 2


def key_stages(bits: int) -> int:
    """Return how many pages are on their way."""
    return 3 if bits == 8 else 2


def choose_constants(pages: int, budget: int, apart: int) -> dict[str, int]:
    """Return what `choose_kernel` is compiled for."""
    wide = triton.next_power_of_2(pages)
    return {
        "G": apart, "LP": triton.next_power_of_2(budget + 1), "WIDE": wide,
        "GROUPS": min(wide, triton.next_power_of_2(budget)),
    }  # fmt: skip


def warps_of(narrow: dict[str, int]) -> int:
    """Return the warps of a choice: 16 pages per thread, more where there are very many."""
    return min(16, max(1, narrow["WIDE"] // 512))
