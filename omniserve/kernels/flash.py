"""Attention of prompt tiles for compute capability 9.0, in Gluon: one warp copies, two groups of four warps compute.

Each group has 64 queries. While the tensor cores multiply the weights of one block of keys with their values, the
softmax of the next block runs. Programs stay and take one tile after the other: what the next one needs is fetched
while the last one ends. Blocks of 128 keys lie at multiples of 128 positions and are taken in ascending order, whatever
the tile, so a token's bits depend on its own row alone.
"""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from omniserve.base.types import PAGE
from omniserve.kernels.plan import BLOCK, FIELDS, QUERIES

STAGES = 2
"""Blocks of keys, and of values, that are on their way or in use."""

REGISTERS = 240
"""Of a thread that computes."""

_BLOCK = gl.constexpr(BLOCK)
_FIELDS = gl.constexpr(FIELDS)
_PAGE = gl.constexpr(PAGE)
_HALF = gl.constexpr(QUERIES // 2)
_STAGES = gl.constexpr(STAGES)
_REGISTERS = gl.constexpr(REGISTERS)


@gluon.jit
def _item(number, items):
    """Return which (tile, head) a program takes as its `number`th: there and back again over all programs."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    back = number % 2
    place = place + back * (programs - 1 - 2 * place)
    return gl.minimum(number * programs + place, items - 1)


@gluon.jit
def _count(items):
    """Return how many items a program takes."""
    programs = gl.num_programs(0)
    whole = items // programs
    place = gl.program_id(0)
    place = place + (whole % 2) * (programs - 1 - 2 * place)
    return whole + (whole * programs + place < items).to(gl.int32)


@gluon.jit
def _read(plan, number, items, heads, together):
    """Return the plan of an item's tile, and its head: all tiles of `together` heads, then those of the next ones."""
    item = _item(number, items)
    turn = items // heads * together
    past = item // turn
    rest = item - past * turn
    at = plan + (rest // together) * _FIELDS
    return (
        gl.load(at),
        gl.load(at + 1),
        gl.load(at + 2),
        gl.load(at + 3),
        gl.load(at + 4),
        gl.load(at + 5),
        past * together + rest % together,
    )


@gluon.jit
def _walk(count, position, long, local, WINDOW: gl.constexpr):
    """Return (blocks of the sink, first block behind them, blocks in all) of a tile."""
    stop = (position + count + _BLOCK - 1) // _BLOCK
    lead = position * 0
    first = position * 0
    if WINDOW:
        lead = gl.minimum(long // _BLOCK, stop)
        first = gl.maximum(gl.maximum(position - local + 1, 0) // _BLOCK, lead)
    return lead, first, lead + stop - first


@gluon.jit
def _fetch(desc, here, then, full, place, SHARED: gl.constexpr):
    """Copy a block of keys or values, or its two pages."""
    if SHARED:
        mbarrier.expect(full, 2 * desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [here, 0], full, place.slice(0, _PAGE))
        tma.async_copy_global_to_shared(desc, [then, 0], full, place.slice(_PAGE, _PAGE))
    else:
        mbarrier.expect(full, desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [here, 0], full, place)


@gluon.jit
def _copy(
    q_desc, k_desc, v_desc, plan, items, heads, together, keys, index, head0, index_row, index_head, places, local,
    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, WINDOW: gl.constexpr, SHARED: gl.constexpr,
    G: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """One warp: fetch queries, keys and values, as places for them become free."""
    done = items * 0
    for number in range(_count(items)):
        token, count, position, start, long, left, head = _read(plan, number, items, heads, together)
        lead, first, steps = _walk(count, position, long, local, WINDOW)
        row = (head // G) * keys + start
        for half in gl.static_range(2):
            mbarrier.wait(q_empty.index(half), (number & 1) ^ 1)
            mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc, [token + _HALF * half, head * D], q_full.index(half), q_s.index(half)
            )
        for step in range(steps):
            at = (done + step) % _STAGES
            phase = ((done + step) // _STAGES) & 1
            key = gl.where(step < lead, step, step - lead + first) * _BLOCK
            here = row + key - gl.where(key < long, 0, left)
            then = here
            if SHARED:  # two pages of the list; behind its end any page will do, no query sees it
                listed = index + long * index_row + (head0 + head // G) * index_head
                here = row + gl.load(listed + gl.minimum(2 * step, places - 1)) * _PAGE
                then = row + gl.load(listed + gl.minimum(2 * step + 1, places - 1)) * _PAGE
            mbarrier.wait(k_empty.index(at), phase ^ 1)
            _fetch(k_desc, here, then, k_full.index(at), k_s.index(at), SHARED)
            mbarrier.wait(v_empty.index(at), phase ^ 1)
            _fetch(v_desc, here, then, v_full.index(at), v_s.index(at), SHARED)
        done += steps


@gluon.jit
def _softmax(
    s, best, weight, query, key, scale, sink, local, MASK: gl.constexpr, WINDOW: gl.constexpr, layout: gl.constexpr
):
    """Return (weights of a block, largest score so far, sum so far, factor of what was summed before).

    One rounding each, whatever the compiler fuses; a block that brings nothing has the factor 1 exactly.
    """
    if MASK:
        at = key + gl.arange(0, _BLOCK, gl.SliceLayout(0, layout))
        seen = at[None, :] <= query[:, None]
        if WINDOW:
            seen = seen & ((at < sink)[None, :] | (at[None, :] > query[:, None] - local))
        s = gl.where(seen, s, float("-inf"))
    top = gl.maximum(best, gl.max(s, 1))
    base = top
    if MASK:
        base = gl.where(top == float("-inf"), 0.0, top)
    factor = gl.full(s.shape, 0.0, gl.float32, layout) + scale
    less = gl.full(s.shape, 0.0, gl.float32, layout) - (base * scale)[:, None]
    p = gl.exp2(gl.fma(s, factor, less))
    shrink = gl.exp2((best - base) * scale)
    return p, top, weight * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _steps(
    begin, end, done, q_s, k_s, v_s, k_full, k_empty, v_full, v_empty, p, o, best, weight, query, lead, first, scale,
    sink, local, MASK: gl.constexpr, WINDOW: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Take blocks [begin, end): the scores of each, beside the values of the one before."""
    for step in range(begin, end):
        at = (done + step) % _STAGES
        before = (done + step - 1) % _STAGES
        mbarrier.wait(k_full.index(at), ((done + step) // _STAGES) & 1)
        s = gl.zeros((_HALF, _BLOCK), gl.float32, layout)
        s = warpgroup_mma(q_s, k_s.index(at).permute((1, 0)), s, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((done + step - 1) // _STAGES) & 1)
        o = warpgroup_mma(p, v_s.index(before), o, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(at))
        key = gl.where(step < lead, step, step - lead + first) * _BLOCK
        fresh, best, weight, shrink = _softmax(s, best, weight, query, key, scale, sink, local, MASK, WINDOW, layout)
        o, p = warpgroup_mma_wait(0, deps=[o, p])
        mbarrier.arrive(v_empty.index(before))
        o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o.type.layout))[:, None]
        p = gl.convert_layout(fresh.to(v_s.dtype), gl.DotOperandLayout(0, o.type.layout, 2))
    return p, o, best, weight


@gluon.jit
def _compute(
    plan, items, heads, together, out, to, out_stride, out_head, scale, sink, local, q_s, k_s, v_s, q_full, q_empty,
    k_full, k_empty, v_full, v_empty, half: gl.constexpr, TO: gl.constexpr, WINDOW: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Four warps: one half of the queries of each tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _BLOCK, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    queries = q_s.index(half)
    done = items * 0
    token, count, position, _start, long, _left, head = _read(plan, 0, items, heads, together)
    for number in range(_count(items)):
        lead, first, steps = _walk(count, position, long, local, WINDOW)
        coming = _read(plan, number + 1, items, heads, together)
        slot = out_head + head
        if TO:
            slot = gl.load(to + head).to(gl.int32)
        query = position + half * _HALF + gl.arange(0, _HALF, gl.SliceLayout(1, layout))
        best = gl.full((_HALF,), float("-inf"), gl.float32, gl.SliceLayout(1, layout))
        weight = gl.full((_HALF,), 0.0, gl.float32, gl.SliceLayout(1, layout))
        o = gl.zeros((_HALF, D), gl.float32, wide)
        mbarrier.wait(q_full.index(half), number & 1)
        at = done % _STAGES
        mbarrier.wait(k_full.index(at), (done // _STAGES) & 1)
        s = gl.zeros((_HALF, _BLOCK), gl.float32, layout)
        s = warpgroup_mma(queries, k_s.index(at).permute((1, 0)), s, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(at))
        key = gl.where(lead > 0, 0, first) * _BLOCK
        fresh, best, weight, _ = _softmax(s, best, weight, query, key, scale, sink, local, True, WINDOW, layout)
        p = gl.convert_layout(fresh.to(v_s.dtype), gl.DotOperandLayout(0, wide, 2))
        # Masks are computed where a block may hold keys that a query does not see: the first one, and both ends.
        inner = gl.minimum(items * 0 + 1, steps)
        if WINDOW:
            edge = gl.maximum(position + 2 * _HALF - 1 - local + _BLOCK, 0) // _BLOCK  # from here all windows show
            inner = gl.minimum(gl.maximum(gl.maximum(lead + edge - first, lead), inner), steps)
            p, o, best, weight = _steps(
                1, inner, done, queries, k_s, v_s, k_full, k_empty, v_full, v_empty, p, o, best, weight, query, lead,
                first, scale, sink, local, True, WINDOW, layout,
            )  # fmt: skip
        outer = gl.maximum(lead + (position + 1) // _BLOCK - first, inner)
        p, o, best, weight = _steps(
            inner, outer, done, queries, k_s, v_s, k_full, k_empty, v_full, v_empty, p, o, best, weight, query, lead,
            first, scale, sink, local, False, WINDOW, layout,
        )  # fmt: skip
        p, o, best, weight = _steps(
            outer, steps, done, queries, k_s, v_s, k_full, k_empty, v_full, v_empty, p, o, best, weight, query, lead,
            first, scale, sink, local, True, WINDOW, layout,
        )  # fmt: skip
        mbarrier.arrive(q_empty.index(half))
        done += steps
        last = (done - 1) % _STAGES
        mbarrier.wait(v_full.index(last), ((done - 1) // _STAGES) & 1)
        o = warpgroup_mma(p, v_s.index(last), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(v_empty.index(last))
        o = o * gl.convert_layout(1.0 / weight, gl.SliceLayout(1, wide))[:, None]
        ready = gl.convert_layout(o.to(out.dtype.element_ty), flat)
        row = half * _HALF + gl.arange(0, _HALF, gl.SliceLayout(1, flat))
        dim = gl.arange(0, D, gl.SliceLayout(0, flat))
        target = out + (token + row).to(gl.int64)[:, None] * out_stride + slot * D + dim[None, :]
        gl.store(target, ready, mask=(row < count)[:, None])
        token, count, position, _start, long, _left, head = coming


@gluon.jit(
    do_not_specialize=[
        "out_head",
        "keys",
        "heads",
        "together",
        "tiles",
        "head0",
        "index_row",
        "index_head",
        "places",
        "sink",
        "local",
    ],
    do_not_specialize_on_alignment=["to", "index"],
)
def flash_gluon_kernel(
    q_desc,  # [T, Hq D], blocks of half a tile's tokens of one head
    k_desc,  # [H N, D], blocks of BLOCK keys; of pages if SHARED
    v_desc,
    out,  # [T, Hq, D], tokens `out_stride` apart
    plan,  # int32 [tiles + 1, FIELDS]; the last row begins with how many tiles there are
    to,  # int64 [heads], read if TO
    index,  # int32 logical pages, read if SHARED
    out_stride,
    out_head,  # where the first of these heads goes in `out`
    keys,  # N
    heads,  # query heads
    together,  # of them, those that go through all tiles before the next ones do: they share what is in the cache
    tiles,  # at most
    head0,  # the first of the key heads
    index_row,  # strides of index
    index_head,
    places,  # of each list
    scale,  # of scores, times log2(e)
    sink,
    local,
    TO: gl.constexpr,
    WINDOW: gl.constexpr,
    SHARED: gl.constexpr,
    G: gl.constexpr,
    D: gl.constexpr,
):
    """One (tile, head) after the other, in the order of the plan."""
    items = gl.load(plan + tiles * _FIELDS) * heads
    q_s = gl.allocate_shared_memory(q_desc.dtype, [2, _HALF, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [_STAGES, _BLOCK, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [_STAGES, _BLOCK, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_compute, (plan, items, heads, together, out, to, out_stride, out_head, scale, sink, local, q_s, k_s, v_s,
                        q_full, q_empty, k_full, k_empty, v_full, v_empty, 0, TO, WINDOW, D)),
            (_compute, (plan, items, heads, together, out, to, out_stride, out_head, scale, sink, local, q_s, k_s, v_s,
                        q_full, q_empty, k_full, k_empty, v_full, v_empty, 1, TO, WINDOW, D)),
            (_copy, (q_desc, k_desc, v_desc, plan, items, heads, together, keys, index, head0, index_row, index_head,
                     places, local, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, WINDOW, SHARED,
                     G, D)),
        ],
        [4, 1],
        [_REGISTERS, 24],
    )  # fmt: skip


def serves(head_dim: int) -> bool:
    """True if the kernel can attend with heads of so many dims."""
    return head_dim in (64, 128)


def launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, plan: Tensor, to: Tensor | None, index: Tensor,
    lists: tuple[int, int, int, int], *, group: int, out_head: int, scale: float, sink: int, local: int | None,
    together: int, programs: int, shared: bool,
) -> None:  # fmt: skip
    """Attend for query heads q [T, heads, D] to k, v [H, N, D]; arguments are those of `prefill.flash_kernel`.

    lists: head0, index_row, index_head, places
    group: query heads per key head; programs: as many as the card runs at a time
    together: heads that go through all tiles before the next ones do. All heads keep the programs busy to the end where
    tiles differ; those of one key keep its keys in the cache where they do not (2.6 % at 64K, from 128K on 7 to 12 %)
    """
    tokens, heads, head_dim = q.shape
    tiles = plan.shape[0] - 1
    flat = TensorDescriptor(
        q,
        [tokens, heads * head_dim],
        [q.stride(0), 1],
        [QUERIES // 2, head_dim],
        _layout(QUERIES // 2, head_dim, q.dtype),
    )
    some = PAGE if shared else BLOCK
    keys, values = (
        TensorDescriptor.from_tensor(x.view(-1, head_dim), [some, head_dim], _layout(some, head_dim, x.dtype))
        for x in (k, v)
    )
    flash_gluon_kernel[(min(tiles * heads, programs),)](
        flat, keys, values, out, plan, plan if to is None else to, index, out.stride(0), out_head, k.shape[1], heads,
        together, tiles, *lists, scale, sink, local or 0, TO=to is not None, WINDOW=local is not None, SHARED=shared,
        G=group, D=head_dim, num_warps=4,
    )  # fmt: skip


def boxes(head_dim: int, element: str, *, shared: bool) -> dict[str, str]:
    """Return Triton's types of what is copied in boxes, by argument."""
    like = {"bf16": torch.bfloat16, "fp16": torch.float16}[element]
    of = {"q_desc": QUERIES // 2} | dict.fromkeys(("k_desc", "v_desc"), PAGE if shared else BLOCK)
    return {
        name: f"tensordesc<{element}[{rows},{head_dim}],{_layout(rows, head_dim, like)!r}>" for name, rows in of.items()
    }


@functools.cache
def _layout(rows: int, head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Return how a block of rows lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, head_dim], gl.float16 if dtype == torch.float16 else gl.bfloat16)
