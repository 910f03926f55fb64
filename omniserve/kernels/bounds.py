"""Bounds of pages for tiles of prompts on compute capability 9.0, in Gluon: what `shares.share_kernel` does elsewhere.

256 queries lie in shared memory, their negative and positive parts. Four warps copy bounds of logical pages, 32 pages
at a time, lowest and highest keys in turn; two groups of four warps have 128 queries each. A product has the four
logical pages of 32 pages side by side, so that the best one of each page is found among a thread's own registers.
"""

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from omniserve.base.config import TILE
from omniserve.base.types import PAGE

QUERIES = 256
"""Queries of one program."""

SEGMENT = 1024
"""Pages that one program goes through."""

STAGES = 3
"""Halves of bounds that are on their way or in use."""

_PAGE = gl.constexpr(PAGE)
_TILE = gl.constexpr(TILE)
_SEGMENT = gl.constexpr(SEGMENT)
_STAGES = gl.constexpr(STAGES)
_HALF = gl.constexpr(QUERIES // 2)
_TURN = gl.constexpr(32)  # pages of one product
_LOGICAL = gl.constexpr(4)  # pages in a page
_WIDE = gl.constexpr(128)
_ALL = gl.constexpr(tl.PropagateNan.ALL)


@gluon.jit
def _best(bound):
    """Return the largest of the four logical pages of each page: [M, 128] becomes [M, 32]."""
    a, b = bound.reshape([bound.shape[0], 2, _WIDE // 2]).permute([0, 2, 1]).split()
    c = gl.maximum(a, b, propagate_nan=_ALL)
    a, b = c.reshape([bound.shape[0], 2, _TURN]).permute([0, 2, 1]).split()
    return gl.maximum(a, b, propagate_nan=_ALL)


@gluon.jit
def _copy(statistics, table, begin, end, kv_heads, head, b_s, full, empty, D: gl.constexpr):
    """Four warps: fetch bounds, as places for them become free."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    row = gl.arange(0, _WIDE, gl.SliceLayout(1, layout))
    dim = gl.arange(0, D, gl.SliceLayout(0, layout))
    blocks = gl.cdiv(end - begin, _TURN)
    physical = gl.load(table + gl.minimum(begin + row % _TURN, end - 1))
    for block in range(blocks):
        found = (gl.maximum(physical, 0).to(gl.int64) * kv_heads + head) * _LOGICAL + row // _TURN
        bounds = statistics + found[:, None] * (2 * D) + dim[None, :]
        physical = gl.load(table + gl.minimum(begin + (block + 1) * _TURN + row % _TURN, end - 1))
        for half in gl.static_range(2):
            turn = block * 2 + half
            at = turn % _STAGES
            mbarrier.wait(empty.index(at), ((turn // _STAGES) & 1) ^ 1)
            async_copy.async_copy_global_to_shared(b_s.index(at), bounds + half * D)
            async_copy.mbarrier_arrive(full.index(at), increment_count=False)


@gluon.jit
def _compute(
    sums, shares, begin, end, before, segment, scale, a_s, b_s, full, empty, half: gl.constexpr, SHARES: gl.constexpr,
    G: gl.constexpr,
):  # fmt: skip
    """Four warps: one half of the queries. sums, shares: of the program's first query and part."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _WIDE, 16])
    few: gl.constexpr = _best(gl.zeros((_HALF, _WIDE), gl.float32, layout)).type.layout
    line = half * _HALF + gl.arange(0, _HALF, gl.SliceLayout(1, few))
    within = gl.arange(0, _TURN, gl.SliceLayout(0, few))
    top = gl.full((_HALF,), float("-inf"), gl.float32, gl.SliceLayout(1, few))
    weight = gl.full((_HALF,), 0.0, gl.float32, gl.SliceLayout(1, few))
    whole = weight
    if SHARES:
        for some in range(gl.cdiv(before, _SEGMENT)):
            theirs = gl.load(sums + some * (2 * G * _TILE) + line)
            larger = gl.maximum(top, theirs)
            base = gl.where(larger == float("-inf"), 0.0, larger)
            weight = weight * gl.exp2(top - base)
            weight += gl.load(sums + some * (2 * G * _TILE) + G * _TILE + line) * gl.exp2(theirs - base)
            top = larger
        whole = gl.where(weight > 0.0, top + gl.log2(weight), 0.0)
    for block in range(gl.cdiv(end - begin, _TURN)):
        turn = block * 2
        at = turn % _STAGES
        then = (turn + 1) % _STAGES
        bound = gl.zeros((_HALF, _WIDE), gl.float32, layout)
        mbarrier.wait(full.index(at), (turn // _STAGES) & 1)
        fence_async_shared()
        bound = warpgroup_mma(a_s.index(half * 2), b_s.index(at).permute((1, 0)), bound, use_acc=False, is_async=True)
        mbarrier.wait(full.index(then), ((turn + 1) // _STAGES) & 1)
        fence_async_shared()
        bound = warpgroup_mma(a_s.index(half * 2 + 1), b_s.index(then).permute((1, 0)), bound, is_async=True)
        bound = warpgroup_mma_wait(1, deps=[bound])
        mbarrier.arrive(empty.index(at))
        bound = warpgroup_mma_wait(0, deps=[bound])
        mbarrier.arrive(empty.index(then))
        # A key beyond fp16 makes its bound infinite, and 0 * inf is no number: such a page is always attractive.
        best = _best(bound)
        page = begin + block * _TURN + within
        if SHARES:
            share = gl.exp2(best * scale - whole[:, None])
            share = gl.where(best < float("inf"), share, float("inf"))
            gl.store(shares + page, gl.sum(share, 0), mask=page < end)
        else:
            finite = (best < float("inf")) & (page < end)[None, :]
            value = gl.where(finite, best * scale, float("-inf"))
            larger = gl.maximum(top, gl.max(value, 1))
            base = gl.where(larger == float("-inf"), 0.0, larger)
            weight = weight * gl.exp2(top - base) + gl.sum(gl.exp2(value - base[:, None]), 1)
            top = larger
    if not SHARES:
        gl.store(sums + segment * (2 * G * _TILE) + line, top)
        gl.store(sums + segment * (2 * G * _TILE) + G * _TILE + line, weight)


@gluon.jit(
    do_not_specialize=["segments", "kv_heads", "table_stride", "pages"],
    do_not_specialize_on_alignment=["slots", "cu_q", "seq_len"],
)
def bound_kernel(
    q,  # arguments as those of `shares.share_kernel`
    statistics,
    table,
    slots,
    cu_q,
    seq_len,
    sums,
    shares,
    kv_heads,
    q_stride,
    table_stride,
    segments,
    pages,
    scale,
    SHARES: gl.constexpr,
    G: gl.constexpr,
    D: gl.constexpr,
):
    """Some queries of a tile, one key head, one segment of pages."""
    PROGRAMS: gl.constexpr = G * _TILE // (2 * _HALF)
    row = gl.program_id(0) // PROGRAMS
    part = gl.program_id(0) % PROGRAMS
    head = gl.program_id(1)
    segment = gl.program_id(2)
    first = gl.load(cu_q + row)
    last = gl.load(cu_q + row + 1) - 1
    before = (gl.load(seq_len + row) - (last + 1 - first)) // _PAGE  # pages that a tile chooses from
    begin = segment * _SEGMENT
    if begin >= before:
        return
    end = gl.minimum(before, begin + _SEGMENT)
    spot = row.to(gl.int64) * kv_heads + head
    sums += spot * segments * (2 * G * _TILE) + part * (2 * _HALF)
    shares += (spot * PROGRAMS + part) * 2 * pages
    table += gl.load(slots + row) * table_stride

    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_WIDE, D], gl.float16)
    a_s = gl.allocate_shared_memory(gl.float16, [4, _HALF, D], shared)
    b_s = gl.allocate_shared_memory(gl.float16, [_STAGES, _WIDE, D], shared)
    full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(_STAGES):
        mbarrier.init(full.index(stage), count=128)  # every thread that copies
        mbarrier.init(empty.index(stage), count=2)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    dim = gl.arange(0, D, gl.SliceLayout(0, layout))
    for half in gl.static_range(2):
        line = (part * 2 + half) * _HALF + gl.arange(0, _HALF, gl.SliceLayout(1, layout))
        token = gl.minimum(first + line % _TILE, last).to(gl.int64)
        asked = q + token[:, None] * q_stride + (head * G + line // _TILE)[:, None] * D + dim[None, :]
        query = gl.load(asked).to(gl.float16)
        a_s.index(half * 2).store(gl.minimum(query, 0.0).to(gl.float16))
        a_s.index(half * 2 + 1).store(gl.maximum(query, 0.0).to(gl.float16))
    fence_async_shared()
    gl.warp_specialize(
        [
            (_compute, (sums, shares, begin, end, before, segment, scale, a_s, b_s, full, empty, 0, SHARES, G)),
            (_compute, (sums, shares + pages, begin, end, before, segment, scale, a_s, b_s, full, empty, 1, SHARES, G)),
            (_copy, (statistics, table, begin, end, kv_heads, head, b_s, full, empty, D)),
        ],
        [4, 4],
        [208, 88],
    )


def serves(group: int, head_dim: int) -> bool:
    """True if the kernel takes groups of so many query heads of so many dims."""
    return group % (QUERIES // TILE) == 0 and head_dim in (64, 128)


def launch(
    q: Tensor, statistics: Tensor, lists: tuple[Tensor, ...], sums: Tensor, shares: Tensor, *, scale: float, last: bool
) -> None:
    """Write sums [R, H, segments, 2, G TILE], or by them shares [R, H, G, pages]; `shares.share_kernel` says what."""
    rows, kv_heads, segments = sums.shape[:3]
    group, head_dim = q.shape[1] // kv_heads, q.shape[2]
    # Programs that run at the same time read the same segment.
    bound_kernel[(rows * group * TILE // QUERIES, kv_heads, segments)](
        q, statistics, *lists, sums, shares, kv_heads, q.stride(0), lists[0].stride(0), segments, shares.shape[3],
        scale, SHARES=last, G=group, D=head_dim, num_warps=4,
    )  # fmt: skip
