"""`select_tiles`: shares of the attention that pages may draw from tiles of prompts, and the choice of the largest.

Three launches. A tile's queries, of all heads of a group, meet the bounds of logical pages on tensor cores, as
min(q, 0) . low + max(q, 0) . high, twice: for what each query's softmax over the pages is divided by, and for the sums
of its shares. Writing the bounds between would take more memory than the pages. The third launch chooses.

Pages are cut into segments at multiples of `SEGMENT`, and sums of segments are added up in their order: a tile's list
depends on its own queries and pages alone.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.base.config import TILE
from omniserve.base.numbers import ceil_div, power_of_two
from omniserve.base.types import PAGE
from omniserve.formats.kv import LayerPages
from omniserve.kernels.choice import border_of, ordered, taken_first
from omniserve.kernels.device import GLUON, INTERPRETED, architecture, kernel_of, need
from omniserve.ops.select import Chosen, select_tiles

if triton.__version__ in GLUON:
    from omniserve.kernels import bounds

SEGMENT = 64 if INTERPRETED else 512
"""Pages that one program goes through."""

LARGEST = 16384
"""Pages of one sequence, at most: the choice holds them all in registers."""

_PAGE = tl.constexpr(PAGE)
_TILE = tl.constexpr(TILE)


@triton.jit(
    do_not_specialize=["segments", "kv_heads", "table_stride", "pages"],
    do_not_specialize_on_alignment=["slots", "cu_q", "seq_len"],
)
def share_kernel(
    q,  # [T, G H, D], tokens `q_stride` apart
    statistics,  # fp16 [pages, H, 4, 2, D]
    table,  # int32 [slots, ...], rows `table_stride` apart
    slots,  # int64 [R]
    cu_q,  # int32 [R + 1]
    seq_len,  # int32 [R]
    sums,  # fp32 [R, H, segments, 2, G TILE]: largest bound of each query in a segment, and its sum of weights
    shares,  # fp32 [R, H, parts, pages]
    kv_heads,
    q_stride,
    table_stride,
    segments,
    pages,  # places of a row in `shares`
    scale,  # of bounds, times log2(e)
    SHARES: tl.constexpr,  # write shares, by the sums that are there; else write the sums
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # D, rounded up to a power of two
    QUERIES: tl.constexpr,  # of one program: a part of G TILE
    SEGMENT: tl.constexpr,
    PAGES: tl.constexpr,  # of one turn
    STAGES: tl.constexpr,
):
    """Some queries of a tile, one key head, one segment of pages."""
    PARTS: tl.constexpr = G * _TILE // QUERIES
    LOGICAL: tl.constexpr = 4  # pages in a page
    row = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    head = tl.program_id(1)
    segment = tl.program_id(2)
    first = tl.load(cu_q + row)
    last = tl.load(cu_q + row + 1) - 1
    before = (tl.load(seq_len + row) - (last + 1 - first)) // _PAGE  # pages that a tile chooses from
    begin = segment * SEGMENT
    if begin >= before:
        return
    end = tl.minimum(before, begin + SEGMENT)
    line = part * QUERIES + tl.arange(0, QUERIES)
    token = tl.minimum(first + line % _TILE, last).to(tl.int64)
    at = tl.arange(0, DP)
    there = (at < D)[None, :]
    asked = q + token[:, None] * q_stride + (head * G + line // _TILE)[:, None] * D + at[None, :]
    query = tl.load(asked, mask=there, other=0.0).to(tl.float16)
    below, above = tl.minimum(query, 0.0).to(tl.float16), tl.maximum(query, 0.0).to(tl.float16)

    spot = row.to(tl.int64) * kv_heads + head
    sums += spot * segments * (2 * G * _TILE) + line
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    weight = tl.zeros((QUERIES,), tl.float32)
    whole = tl.zeros((QUERIES,), tl.float32)
    if SHARES:
        for some in range(tl.cdiv(before, SEGMENT)):
            theirs = tl.load(sums + some * (2 * G * _TILE))
            larger = tl.maximum(top, theirs)
            base = tl.where(larger == float("-inf"), 0.0, larger)
            weight = weight * tl.exp2(top - base)
            weight += tl.load(sums + some * (2 * G * _TILE) + G * _TILE) * tl.exp2(theirs - base)
            top = larger
        whole = tl.where(weight > 0.0, top + tl.log2(weight), 0.0)

    shares += (spot * PARTS + part) * pages
    table += tl.load(slots + row) * table_stride
    best = tl.full((QUERIES, PAGES), float("-inf"), tl.float32)
    within = tl.arange(0, PAGES)
    for step in tl.range(0, tl.cdiv(end - begin, PAGES) * LOGICAL, num_stages=STAGES):
        page = begin + step // LOGICAL * PAGES + within
        physical = tl.load(table + page, mask=page < end, other=0)
        found = (tl.maximum(physical, 0).to(tl.int64) * kv_heads + head) * LOGICAL + step % LOGICAL
        bounds = statistics + found[None, :] * (2 * D) + at[:, None]
        if D == DP:
            low, high = tl.load(bounds), tl.load(bounds + D)
        else:
            low = tl.load(bounds, mask=(at < D)[:, None], other=0.0)
            high = tl.load(bounds + D, mask=(at < D)[:, None], other=0.0)
        bound = tl.dot(below, low)
        bound = tl.dot(above, high, bound)
        # A key beyond fp16 makes its bound infinite, and 0 * inf is no number: such a page is always attractive.
        best = tl.maximum(best, bound, propagate_nan=tl.PropagateNan.ALL)
        if step % LOGICAL == LOGICAL - 1:
            if SHARES:
                share = tl.exp2(best * scale - whole[:, None])
                share = tl.where(best < float("inf"), share, float("inf"))
                tl.store(shares + page, tl.sum(share, 0), mask=page < end)
            else:
                finite = (best < float("inf")) & (page < end)[None, :]
                value = tl.where(finite, best * scale, float("-inf"))
                larger = tl.maximum(top, tl.max(value, 1))
                base = tl.where(larger == float("-inf"), 0.0, larger)
                weight = weight * tl.exp2(top - base) + tl.sum(tl.exp2(value - base[:, None]), 1)
                top = larger
            best = tl.full((QUERIES, PAGES), float("-inf"), tl.float32)
    if not SHARES:
        tl.store(sums + segment * (2 * G * _TILE), top)
        tl.store(sums + segment * (2 * G * _TILE) + G * _TILE, weight)


@triton.jit(
    do_not_specialize=["kv_heads", "table_stride", "pages", "budget", "places"],
    do_not_specialize_on_alignment=["slots", "cu_q", "seq_len"],
)
def take_kernel(
    table,  # as in `share_kernel`
    slots,
    cu_q,
    seq_len,
    shares,
    ids,  # int32 [R, H, `places`]
    index,
    count,  # int32 [R]
    kv_heads,
    table_stride,
    pages,
    budget,
    places,
    PARTS: tl.constexpr,  # of the queries of a tile
    WIDE: tl.constexpr,  # a power of two, at least the pages of any row
    LIST: tl.constexpr,  # places, rounded up to a power of two
):
    """The list of a tile for one key head."""
    OWN: tl.constexpr = _TILE // _PAGE
    head = tl.program_id(0)
    row = tl.program_id(1)
    length = tl.load(seq_len + row)
    before = (length - (tl.load(cu_q + row + 1) - tl.load(cu_q + row))) // _PAGE
    existing = tl.cdiv(length, _PAGE)
    spot = row.to(tl.int64) * kv_heads + head
    table += tl.load(slots + row) * table_stride
    index += spot * places
    ids += spot * places
    if head == 0:
        tl.store(count + row, tl.minimum(existing, budget))
    place = tl.arange(0, LIST)
    if existing <= budget:
        chosen = tl.where(place < existing, place, 0)
        found = tl.load(table + chosen, mask=place < places, other=0)
        tl.store(index + place, chosen, mask=place < places)
        tl.store(ids + place, found, mask=place < places)
        return
    own = existing - before
    wanted = budget - 1 - own
    page = tl.arange(0, WIDE)
    open_ = (page > 0) & (page < before)
    share = tl.zeros((WIDE,), tl.float32)
    for part in range(PARTS):
        share += tl.load(shares + (spot * PARTS + part) * pages + page, mask=open_, other=0.0)
    key = ordered(share, open_)
    border, room = border_of(key, wanted, tl.min(tl.where(open_, key, 0x7FFFFFFF), 0), tl.max(key, 0) + 1)
    taken, behind = taken_first(key, border, room, open_)
    mine = tl.arange(0, OWN)
    tl.store(index, 0)
    tl.store(index + 1 + behind, page, mask=taken)
    tl.store(index + budget - own + mine, before + mine, mask=mine < own)
    tl.debug_barrier()  # read again: a list is shorter than what it is chosen from
    chosen = tl.load(index + place, mask=place < budget, other=0)
    tl.store(ids + place, tl.load(table + chosen, mask=place < budget, other=0), mask=place < budget)


def on_gluon(group: int, head_dim: int) -> bool:
    """Return whether the kernel for compute capability 9.0 serves groups of so many heads of so many dims here."""
    found = triton.__version__ in GLUON and not INTERPRETED and architecture() == 90
    return found and bounds.serves(group, head_dim)


def serving() -> str:
    """Return for people which kernel finds the shares on this card."""
    if on_gluon(2, 128):
        return "shares: bound_kernel for even groups of heads of 64 and 128 dims, share_kernel for others"
    return f"shares: share_kernel; on compute capability 9.0 with Triton {' or '.join(GLUON)} a faster one is there"


@kernel_of(select_tiles, inside=serving)
def select_tiles_triton(
    q: Tensor,
    store: LayerPages,
    table: Tensor,
    slots: Tensor,
    cu_q: Tensor,
    seq_len: Tensor,
    budget: int,
    longest: int,
    scale: float,
) -> Chosen:
    """Three launches: sums of weights, shares, the choice."""
    rows, head_dim, kv_heads, statistics = seq_len.shape[0], q.shape[2], store.heads, store.statistics
    need(
        q.dtype in (torch.float16, torch.bfloat16),
        f"selecting pages for {q.dtype} on a GPU: float16 and bfloat16 are there",
    )
    pages = ceil_div(longest, PAGE)
    need(pages <= LARGEST, f"selecting among {pages} pages on a GPU: up to {LARGEST} are there")
    assert statistics is not None and statistics.is_contiguous() and q.stride()[1:] == (head_dim, 1), q.stride()
    assert table.stride(1) == 1 and budget > 1 + TILE // PAGE, (table.stride(), budget)
    group, places, gluon = q.shape[1] // kv_heads, min(budget, pages), on_gluon(q.shape[1] // kv_heads, head_dim)
    flags = share_constants(group, head_dim, architecture())
    parts = group if gluon else group * TILE // flags["QUERIES"]
    segments = ceil_div(pages, bounds.SEGMENT if gluon else SEGMENT)
    sums = torch.empty(rows, kv_heads, segments, 2, group * TILE, dtype=torch.float32, device=q.device)
    shares = torch.empty(rows, kv_heads, parts, pages, dtype=torch.float32, device=q.device)
    ids = torch.empty(rows, kv_heads, places, dtype=torch.int32, device=q.device)
    index, count = torch.empty_like(ids), torch.empty(rows, dtype=torch.int32, device=q.device)
    lists, scale = (table, slots, cu_q, seq_len), scale * math.log2(math.e)
    for last in (False, True):
        if gluon:
            bounds.launch(q, statistics, lists, sums, shares, scale=scale, last=last)
            continue
        # Programs that run at the same time read the same segment.
        share_kernel[(rows * parts, kv_heads, segments)](
            q, statistics, *lists, sums, shares, kv_heads, q.stride(0), table.stride(0), segments, pages, scale, last,
            **flags, num_warps=share_warps(flags),
        )  # fmt: skip
    narrow = take_constants(table.shape[1], budget, parts)
    take_kernel[(kv_heads, rows)](
        *lists, shares, ids, index, count, kv_heads, table.stride(0), pages, budget, places, **narrow,
        num_warps=take_warps(narrow),
    )  # fmt: skip
    return ids, index, count


@functools.cache
def share_constants(group: int, head_dim: int, arch: int) -> dict[str, int]:
    """Return what `share_kernel` is compiled for. Queries stay in shared memory: on 9.0, 128 KiB for 256 of them."""
    wide = max(16, power_of_two(head_dim))
    large = arch == 90 and wide <= 128
    return {
        "G": group, "D": head_dim, "DP": wide, "QUERIES": 256 if large and group % 2 == 0 else 128 if large else 64,
        "SEGMENT": SEGMENT, "PAGES": 64 if large else 32 if wide <= 128 else 16,
        "STAGES": 3,
    }  # fmt: skip


def share_warps(flags: dict[str, int]) -> int:
    """Return the warps of a program."""
    return 8 if flags["QUERIES"] == 256 else 4


def take_constants(pages: int, budget: int, parts: int) -> dict[str, int]:
    """Return what `take_kernel` is compiled for; pages: of the engine's longest sequence."""
    return {"PARTS": parts, "WIDE": triton.next_power_of_2(pages), "LIST": triton.next_power_of_2(min(budget, pages))}


def take_warps(narrow: dict[str, int]) -> int:
    """Return the warps of a choice: up to 16 pages per thread."""
    return min(16, max(1, narrow["WIDE"] // 512))
