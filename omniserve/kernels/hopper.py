"""Integer products on compute capability 9.0: one warp fetches tiles, groups of four warps multiply.

The Triton kernel of `linear.py` waits for each product before it unpacks the next weights. Here two or four groups of
warps work each at its own pace, so that one unpacks while the others multiply: on neighbouring weights (SIDES), or in
turns along K (TURNS), where many tokens, or many bytes in flight, count. The grid is persistent and fetches the next
tile during the epilogue. Tiles that do not fill the grid may be shared among its programs, which add up integers: no
order, no other bits. The epilogue is that of `linear.py`, so both kernels give the same result.

The kernel may start while the one before it ends (programmatic dependent launch): it fetches its first weights, which
nobody writes, and waits for that kernel before it touches anything else.

Gluon, the language of this kernel, is experimental: `linear.GLUON` names the versions it was tested with.
"""

import functools
from dataclasses import replace
from typing import Any

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from omniserve.base.numbers import ceil_div
from omniserve.formats.blocks import SIDE
from omniserve.kernels.device import SHARED_BYTES
from omniserve.kernels.tiles import Tile


@gluon.jit
def _low(p):
    return gl.inline_asm_elementwise("and.b32 $0, $1, 0x0f0f0f0f;", "=r,r", [p], dtype=gl.int8, is_pure=True, pack=4)


@gluon.jit
def _high(p):
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0f0f0f0f; }",
        "=r,r",
        [p],
        dtype=gl.int8,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _second_level(q, scale, offset):
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; mad.lo.u32 t, $1, $2, $6; xor.b32 $0, t, 0x80808080; }",
        "=r,r,r,r,r,r,r,r,r,r",
        [q, scale, offset],
        dtype=gl.int8,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _share(tiles, blocks, STREAM: gl.constexpr):
    """Return this program's share: (first unit, end, segments of shared tiles, whole tiles, all segments).

    A unit is one block of 128 columns of one tile. Tiles that do not fill the grid once more are shared: their units
    are dealt out evenly, so that a program gets the end of one tile, tiles, and the beginning of another.
    """
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    whole = gl.cdiv(tiles - program, programs)
    first = 0
    end = 0
    shared = 0
    if STREAM:
        whole = tiles // programs
        units = (tiles - whole * programs) * blocks
        first = program * units // programs
        end = (program + 1) * units // programs
        shared = gl.where(end > first, (end - 1) // blocks - first // blocks + 1, 0)
    return first, end, shared, whole, shared + whole


@gluon.jit
def _segment(i, first, end, shared, whole, blocks):
    """Return segment i of a program: (tile, first block, end).

    The beginning of a tile comes first, because another program waits for its sums; the end of a tile whose sums this
    program waits for comes last of the shared ones.
    """
    programs = gl.num_programs(0)
    tile = (end - 1) // blocks - i
    begin = gl.maximum(first - tile * blocks, 0)
    last = gl.minimum(end - tile * blocks, blocks)
    mine = i < shared
    tile = gl.where(mine, tile + whole * programs, gl.program_id(0) + (i - shared) * programs)
    return tile, gl.where(mine, begin, 0), gl.where(mine, last, blocks)


@gluon.jit
def _place(tile, tiles_n, tiles_m, TOGETHER: gl.constexpr):
    """Return which weights and which tokens a tile is: TOGETHER tiles of tokens follow each other on one panel."""
    band = tile // (TOGETHER * tiles_n)
    high = gl.minimum(tiles_m - band * TOGETHER, TOGETHER)
    inside = tile % (TOGETHER * tiles_n)
    return inside // high, band * TOGETHER + inside % high


@gluon.jit
def _fetch(
    w, x, tail, wb, xb, gb, full, empty, tiles, tiles_n, tiles_m, blocks,
    BITS: gl.constexpr, STAGES: gl.constexpr, STEP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    SIDES: gl.constexpr, TURNS: gl.constexpr, GROUPED: gl.constexpr, STREAM: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """Fetch blocks of weights and activations, tile after tile, as buffers become free."""
    WIDE: gl.constexpr = SIDES * BN
    PANELS: gl.constexpr = (WIDE + 127) // 128
    ROWS: gl.constexpr = 132 if GROUPED else 128
    BYTES: gl.constexpr = SIDES * w.block_type.nbytes + x.block_type.nbytes + (PANELS * 256 if GROUPED else 0)
    steps = gl.cdiv(blocks, STEP)
    first, end, shared, whole, segments = _share(tiles, steps, STREAM)
    for again in gl.static_range(2):  # the first weights, which no kernel before this one writes; then everything
        turn = 0
        if again:
            gdc_wait()
        for i in range(segments if again else gl.minimum(segments, STAGES)):
            tile, begin, last = _segment(i, first, end, shared, whole, steps)
            tile_n, tile_m = _place(tile, tiles_n, tiles_m, TOGETHER)
            until = begin + gl.cdiv(last - begin, TURNS) * TURNS
            if not again:
                until = gl.minimum(until, begin + STAGES - turn)
            for step in range(begin, until):
                at = turn % STAGES
                bar = full.index(at)
                if again:
                    mbarrier.wait(empty.index(at), ((turn // STAGES) & 1) ^ 1)
                if not again or turn >= STAGES:
                    mbarrier.expect(bar, STEP * BYTES)
                    for inner in gl.static_range(STEP):
                        block = step * STEP + inner
                        slot = at * STEP + inner
                        for side in gl.static_range(SIDES):
                            n = tile_n * WIDE + side * BN
                            if BITS == 4:
                                row = ((n // 128) * blocks + block) * (ROWS // 2) + n % 128 // 2
                                tma.async_copy_global_to_shared(w, [row, 0], bar, wb.index(slot * SIDES + side))
                            else:
                                tma.async_copy_global_to_shared(w, [n, block * 128], bar, wb.index(slot * SIDES + side))
                        if GROUPED:
                            for panel in gl.static_range(PANELS):
                                place = (((tile_n * WIDE) // 128 + panel) * blocks + block) * (ROWS * 64)
                                place += 8192 + (tile_n * WIDE) % 128  # half a panel begins at its own scales
                                tma.async_copy_global_to_shared(tail, [place], bar, gb.index(slot * PANELS + panel))
                if again:
                    for inner in gl.static_range(STEP):
                        k = (gl.where(step < last, step, steps) * STEP + inner) * 128  # behind the last one are zeros
                        tma.async_copy_global_to_shared(x, [tile_m * BM, k], bar, xb.index(at * STEP + inner))
                turn += 1


@gluon.jit
def _multiply(
    wb, xb, gb, yb, rb, full, empty, given, taken, y, a, total, scale, zero, bias, sums, flags,
    M, N, tiles, tiles_n, tiles_m, blocks,
    BITS: gl.constexpr, STAGES: gl.constexpr, STEP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    SIDES: gl.constexpr, TURNS: gl.constexpr, GROUPED: gl.constexpr, ZERO: gl.constexpr, BIAS: gl.constexpr,
    STREAM: gl.constexpr, TOGETHER: gl.constexpr, group: gl.constexpr,
):  # fmt: skip
    """Multiply BN weights of each tile with its tokens, taking turns; finish the sums and send them off."""
    side: gl.constexpr = group % SIDES
    mine: gl.constexpr = group // SIDES
    WIDE: gl.constexpr = SIDES * BN
    PANELS: gl.constexpr = (WIDE + 127) // 128
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM if BM <= 128 else 128, 32])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 4)
    by_weight: gl.constexpr = gl.SliceLayout(1, layout)
    by_token: gl.constexpr = gl.SliceLayout(0, layout)
    WITHIN: gl.constexpr = side * BN % 128
    EARLY: gl.constexpr = BM <= 32  # the epilogue's arguments fit into registers during the loop
    # Two rows of weights lie in a line of 128 bytes, its pieces of 16 in the order that copies of tiles give them.
    FIRST: gl.constexpr = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 32], [1, 0], [2, 16], [4, 32], [9, 0], [16, 0]]
    LINES: gl.constexpr = gl.SharedLinearLayout(FIRST + ([[32, 0]] if BN == 64 else [[32, 0], [64, 0]]), [], 1024)
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    steps = gl.cdiv(blocks, STEP)
    first, end, shared, whole, segments = _share(tiles, steps, STREAM)
    private = gl.arange(0, BN, by_weight)[:, None] * BM + gl.arange(0, BM, by_token)[None, :]
    gdc_wait()
    turn = 0
    for i in range(segments):
        tile, begin, last = _segment(i, first, end, shared, whole, steps)
        tile_n, tile_m = _place(tile, tiles_n, tiles_m, TOGETHER)
        if EARLY and mine == 0:
            rn = gl.minimum(tile_n * WIDE + side * BN + gl.arange(0, BN, by_weight), N - 1)
            rm = gl.minimum(tile_m * BM + gl.arange(0, BM, by_token), M - 1)
            av, sv = gl.load(a + rm), gl.load(scale + rn)
            if ZERO:
                tv, zv = gl.load(total + rm), gl.load(zero + rn)
        acc = gl.zeros((BN, BM), gl.int32, layout)
        for _ in range(gl.cdiv(last - begin, TURNS)):
            now = turn * TURNS + mine
            at = now % STAGES
            mbarrier.wait(full.index(at), (now // STAGES) & 1)
            for inner in gl.static_range(STEP):
                slot = at * STEP + inner
                if BITS == 4:
                    packed = wb.index(slot * SIDES + side)._reinterpret(gl.int8, [BN, 64], LINES).load(operand)
                    w0 = _low(packed)
                    w1 = _high(packed)
                    if GROUPED:
                        held = gb.index(slot * PANELS + side * BN // 128)
                        s = held.slice(WITHIN, BN).load(gl.SliceLayout(1, operand)).to(gl.int32)
                        o = held.slice(128 + WITHIN, BN).load(gl.SliceLayout(1, operand)).to(gl.int32)
                        o = o * 0x01010101
                        w0 = _second_level(w0, s[:, None], o[:, None])
                        w1 = _second_level(w1, s[:, None], o[:, None])
                    acc = warpgroup_mma(w0, xb.index(slot).slice(0, 64, dim=1).permute((1, 0)), acc, is_async=True)
                    acc = warpgroup_mma(w1, xb.index(slot).slice(64, 64, dim=1).permute((1, 0)), acc, is_async=True)
                else:
                    held8 = wb.index(slot * SIDES + side)
                    acc = warpgroup_mma(held8, xb.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(at))
            turn += 1
        if TURNS > 1:
            if mine > 0:
                slot = (mine - 1) * SIDES + side
                mbarrier.wait(taken.index(slot), (i & 1) ^ 1)
                rb.index(slot).store(acc)
                mbarrier.arrive(given.index(slot))
            else:
                for source in gl.static_range(TURNS - 1):
                    slot = source * SIDES + side
                    mbarrier.wait(given.index(slot), i & 1)
                    acc += rb.index(slot).load(layout)
                    mbarrier.arrive(taken.index(slot))
        if mine == 0:
            finish = True
            if STREAM:
                finish = last == steps
                if finish:
                    units = (tiles - whole * programs) * steps
                    start = (tile - whole * programs) * steps
                    other = program - 1
                    until = gl.where(begin > 0, (other + 1) * units // programs, start)
                    while until > start:
                        since = other * units // programs
                        if since < until:
                            flag = flags + other * SIDES + side
                            while gl.atomic_add(flag, 0, sem="acquire", scope="gpu") == 0:
                                pass
                            gl.thread_barrier()
                            part = sums + (other * SIDES + side) * (BN * BM)
                            acc += gl.load(part + private, cache_modifier=".cg")
                            gl.store(flag, 0)
                        until = since
                        other -= 1
                else:
                    gl.store(sums + (program * SIDES + side) * (BN * BM) + private, acc)
                    gl.thread_barrier()
                    gl.atomic_xchg(flags + program * SIDES + side, 1, sem="release", scope="gpu")
            if finish:
                n = tile_n * WIDE + side * BN
                rn = gl.minimum(n + gl.arange(0, BN, by_weight), N - 1)  # what is outside is not stored
                rm = gl.minimum(tile_m * BM + gl.arange(0, BM, by_token), M - 1)
                if EARLY:
                    value = acc.to(gl.float32) * sv[:, None]
                    if ZERO:
                        value = value - zv[:, None] * tv.to(gl.float32)[None, :]
                    value = value * av[None, :]
                else:
                    value = acc.to(gl.float32) * gl.load(scale + rn)[:, None]
                    if ZERO:
                        value = value - gl.load(zero + rn)[:, None] * gl.load(total + rm).to(gl.float32)[None, :]
                    value = value * gl.load(a + rm)[None, :]
                if BIAS:
                    value = value + gl.load(bias + rn)[:, None]
                out = yb.index(side)
                tma.store_wait(0)
                out.permute((1, 0)).store(value.to(y.dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(y, [tile_m * BM, n], out)
    if mine == 0:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "blocks"])
def hopper_kernel(
    x,  # int8 [M, K] in boxes [BM, 128]
    w,  # blocks as lines of 128 bytes, two rows of weights, in boxes [BN / 2, 128]; or int8 [N, K] in boxes [BN, 128]
    tail,  # blocks as bytes, in boxes of 256: the groups' parameters, read if GROUPED
    y,  # [M, N] in boxes [BM, BN]
    a,  # fp32 [M]
    total,  # int32 [M], read if ZERO
    scale,  # fp32 [N]
    zero,  # fp32 [N], read if ZERO
    bias,  # fp32 [N], read if BIAS
    sums,  # int32 [programs, SIDES, BN, BM] if STREAM: what a program adds to another's tile
    flags,  # int32 [programs, SIDES] if STREAM: 1 where such sums are there; zero before and after
    M,
    N,
    blocks,  # blocks of 128 columns
    BITS: gl.constexpr,
    GROUPED: gl.constexpr,
    ZERO: gl.constexpr,
    BIAS: gl.constexpr,
    STREAM: gl.constexpr,  # tiles that do not fill the grid are shared among its programs
    TOGETHER: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,  # weights of one group of warps
    SIDES: gl.constexpr,  # groups of warps with weights of their own
    TURNS: gl.constexpr,  # groups of warps that take turns with the same weights
    STEP: gl.constexpr,  # blocks of one stage
    STAGES: gl.constexpr,  # a multiple of TURNS
):
    """Whole tiles [SIDES * BN, BM] in turn, and a share of those that are left."""
    PANELS: gl.constexpr = (SIDES * BN + 127) // 128
    tiles_n = gl.cdiv(N, SIDES * BN)
    tiles_m = gl.cdiv(M, BM)
    tiles = tiles_n * tiles_m
    wb = gl.allocate_shared_memory(gl.int8, [SIDES * STEP * STAGES] + w.block_type.shape, w.layout)
    xb = gl.allocate_shared_memory(gl.int8, [STEP * STAGES] + x.block_type.shape, x.layout)
    yb = gl.allocate_shared_memory(y.dtype, [SIDES] + y.block_type.shape, y.layout)
    gb = wb
    if GROUPED:
        gb = gl.allocate_shared_memory(gl.uint8, [PANELS * STEP * STAGES] + tail.block_type.shape, tail.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    rb = wb
    given = full
    taken = full
    if TURNS > 1:
        OTHERS: gl.constexpr = (TURNS - 1) * SIDES
        rb = gl.allocate_shared_memory(gl.int32, [OTHERS, BN, BM], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        given = gl.allocate_shared_memory(gl.int64, [OTHERS, 1], mbarrier.MBarrierLayout())
        taken = gl.allocate_shared_memory(gl.int64, [OTHERS, 1], mbarrier.MBarrierLayout())
        for other in gl.static_range(OTHERS):
            mbarrier.init(given.index(other), count=1)
            mbarrier.init(taken.index(other), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=SIDES)
    fence_async_shared()
    gdc_launch_dependents()
    if SIDES * TURNS == 2:
        gl.warp_specialize([
            (_multiply, (wb, xb, gb, yb, rb, full, empty, given, taken, y, a, total, scale, zero, bias, sums, flags,
                         M, N, tiles, tiles_n, tiles_m, blocks, BITS, STAGES, STEP, BM, BN, SIDES, TURNS, GROUPED,
                         ZERO, BIAS, STREAM, TOGETHER, 0)),
            (_multiply, (wb, xb, gb, yb, rb, full, empty, given, taken, y, a, total, scale, zero, bias, sums, flags,
                         M, N, tiles, tiles_n, tiles_m, blocks, BITS, STAGES, STEP, BM, BN, SIDES, TURNS, GROUPED,
                         ZERO, BIAS, STREAM, TOGETHER, 1)),
            (_fetch, (w, x, tail, wb, xb, gb, full, empty, tiles, tiles_n, tiles_m, blocks,
                      BITS, STAGES, STEP, BM, BN, SIDES, TURNS, GROUPED, STREAM, TOGETHER)),
        ], [4, 1], [216, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (wb, xb, gb, yb, rb, full, empty, given, taken, y, a, total, scale, zero, bias, sums, flags,
                         M, N, tiles, tiles_n, tiles_m, blocks, BITS, STAGES, STEP, BM, BN, SIDES, TURNS, GROUPED,
                         ZERO, BIAS, STREAM, TOGETHER, 0)),
            (_multiply, (wb, xb, gb, yb, rb, full, empty, given, taken, y, a, total, scale, zero, bias, sums, flags,
                         M, N, tiles, tiles_n, tiles_m, blocks, BITS, STAGES, STEP, BM, BN, SIDES, TURNS, GROUPED,
                         ZERO, BIAS, STREAM, TOGETHER, 1)),
            (_multiply, (wb, xb, gb, yb, rb, full, empty, given, taken, y, a, total, scale, zero, bias, sums, flags,
                         M, N, tiles, tiles_n, tiles_m, blocks, BITS, STAGES, STEP, BM, BN, SIDES, TURNS, GROUPED,
                         ZERO, BIAS, STREAM, TOGETHER, 2)),
            (_multiply, (wb, xb, gb, yb, rb, full, empty, given, taken, y, a, total, scale, zero, bias, sums, flags,
                         M, N, tiles, tiles_n, tiles_m, blocks, BITS, STAGES, STEP, BM, BN, SIDES, TURNS, GROUPED,
                         ZERO, BIAS, STREAM, TOGETHER, 3)),
            (_fetch, (w, x, tail, wb, xb, gb, full, empty, tiles, tiles_n, tiles_m, blocks,
                      BITS, STAGES, STEP, BM, BN, SIDES, TURNS, GROUPED, STREAM, TOGETHER)),
        ], [4, 4, 4, 1], [112, 112, 112, 24])  # fmt: skip


ELEMENTS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
"""Gluon's names of the outputs' dtypes."""


@functools.cache
def _flags(device: torch.device) -> Tensor:
    """Return the flags of a card's shared tiles: zero before and after every launch, which follow each other."""
    return torch.zeros(4096, dtype=torch.int32, device=device)


def serves(k: int, n: int, dtype: torch.dtype) -> bool:
    """True if the kernel can take a product: rows of x and y are multiples of 16 bytes, as copies of tiles need."""
    return k % 16 == 0 and n * dtype.itemsize % 16 == 0


def launch(
    x: Tensor, a: Tensor, total: Tensor, w: Tensor, scale: Tensor, zero: Tensor, bias: Tensor, y: Tensor,
    tile: Tile, *, bits: int, grouped: bool, has_zero: bool, has_bias: bool, sms: int,
) -> None:  # fmt: skip
    """Write the product into y; arguments are those of `linear.gemm_kernel`, `tile` one of language "gluon"."""
    (m, k), n = x.shape, scale.shape[0]
    if x.stride(0) % 16 or x.stride(1) != 1 or x.data_ptr() % 16:
        x = x.contiguous()
    bm, (sides, _) = tile.tokens, groups(tile)
    bn = tile.weights // sides
    lines = bn if bits == 8 else bn // 2
    blocks = ceil_div(k, SIDE)
    tiles = ceil_div(m, bm) * ceil_div(n, tile.weights)
    stream = tile.split > 1 and tiles % sms != 0
    programs = min(sms, tiles * ceil_div(blocks, tile.step)) if stream else min(sms, tiles)
    flat = w.view(torch.int8) if bits == 8 else w.view(torch.int8).view(-1, SIDE)
    sums = torch.empty(programs * tile.weights * bm, dtype=torch.int32, device=x.device) if stream else total
    hopper_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [bm, SIDE], _layout(bm, SIDE, gl.int8)),
        TensorDescriptor.from_tensor(flat, [lines, SIDE], _layout(lines, SIDE, gl.int8)),
        TensorDescriptor.from_tensor(w.view(torch.uint8).view(-1), [256], gl.NVMMASharedLayout(0, 8, rank=1)),
        TensorDescriptor.from_tensor(y, [bm, bn], _layout(bm, bn, ELEMENTS[y.dtype])),
        a, total, scale, zero, bias, sums, _flags(x.device), m, n, blocks,
        **constants(
            fitted(tile, y.element_size(), bits=bits, grouped=grouped),
            bits=bits, grouped=grouped, zero=has_zero, bias=has_bias, stream=stream,
        ),
        num_warps=4, enable_fp_fusion=False, launch_pdl=True,
    )  # fmt: skip


def fitted(tile: Tile, element: int, *, bits: int, grouped: bool) -> Tile:
    """Return a tile with as many stages as shared memory holds beside results of so many bytes each."""
    bm, turns = tile.tokens, groups(tile)[1]
    block = bm * SIDE + tile.weights * SIDE * bits // 8 + (256 * ceil_div(tile.weights, SIDE) if grouped else 0)
    others = (turns - 1) * tile.weights * bm * 4
    room = SHARED_BYTES[90] - 2048 - tile.weights * bm * element - others  # barriers and alignment take the 2 KiB
    return replace(tile, stages=min(tile.stages, room // (block * tile.step) // turns * turns))


def constants(tile: Tile, *, bits: int, grouped: bool, zero: bool, bias: bool, stream: bool) -> dict[str, Any]:
    """Return what `hopper_kernel` is compiled for."""
    sides, turns = groups(tile)
    return {
        "BITS": bits, "GROUPED": grouped, "ZERO": zero, "BIAS": bias, "STREAM": stream, "TOGETHER": tile.order,
        "BM": tile.tokens, "BN": tile.weights // sides, "SIDES": sides, "TURNS": turns, "STEP": tile.step,
        "STAGES": tile.stages,
    }  # fmt: skip


def groups(tile: Tile) -> tuple[int, int]:
    """Return how many groups of four warps have weights of their own, and how many take turns with the same ones."""
    count = (tile.warps - 1) // 4
    sides = min(count, tile.weights // 64)
    return sides, count // sides


def boxes(tile: Tile, element: str, *, bits: int) -> dict[str, str]:
    """Return the types of the kernel's copied arguments for a dtype of y, "fp16" or "bf16"."""
    bm, bn = tile.tokens, tile.weights // groups(tile)[0]
    lines = bn if bits == 8 else bn // 2
    of = {"fp16": gl.float16, "bf16": gl.bfloat16, "fp32": gl.float32}[element]
    return {
        "x": f"tensordesc<i8[{bm}, {SIDE}],{_layout(bm, SIDE, gl.int8)!r}>",
        "w": f"tensordesc<i8[{lines}, {SIDE}],{_layout(lines, SIDE, gl.int8)!r}>",
        "tail": f"tensordesc<u8[256],{gl.NVMMASharedLayout(0, 8, rank=1)!r}>",
        "y": f"tensordesc<{element}[{bm}, {bn}],{_layout(bm, bn, of)!r}>",
    }


@functools.cache
def _layout(rows: int, columns: int, element: Any) -> Any:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], element)
