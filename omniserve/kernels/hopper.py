"""Integer products on compute capability 9.0: one warp fetches tiles, two groups of four warps multiply.

The Triton kernel of `linear.py` waits for each product before it unpacks the next weights. Here two groups of warps
work on neighbouring weights, each at its own pace, so that one unpacks while the other multiplies; a persistent grid
fetches the next tile during the epilogue. Tiles that do not fill the grid are shared among its programs, which add up
integers: no order, no other bits. The epilogue is that of `linear.py`, so both kernels give the same result.

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

from omniserve.base.numbers import ceil_div
from omniserve.formats.blocks import SIDE
from omniserve.kernels.device import SHARED_BYTES

GROUPS = 2
"""Groups of warps that multiply."""


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
    BITS: gl.constexpr, STAGES: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUPED: gl.constexpr,
    STREAM: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """Fetch blocks of weights and activations, tile after tile, as buffers become free."""
    PANELS: gl.constexpr = (2 * BN + 127) // 128
    ROWS: gl.constexpr = 132 if GROUPED else 128
    PARTS: gl.constexpr = 2 if BITS == 4 else 1  # of 128 columns of x
    BYTES: gl.constexpr = 2 * w.block_type.nbytes + PARTS * x.block_type.nbytes + (PANELS * 256 if GROUPED else 0)
    first, end, shared, whole, segments = _share(tiles, blocks, STREAM)
    turn = 0
    for i in range(segments):
        tile, begin, last = _segment(i, first, end, shared, whole, blocks)
        tile_n, tile_m = _place(tile, tiles_n, tiles_m, TOGETHER)
        for block in range(begin, last):
            at = turn % STAGES
            mbarrier.wait(empty.index(at), ((turn // STAGES) & 1) ^ 1)
            bar = full.index(at)
            mbarrier.expect(bar, BYTES)
            for group in gl.static_range(2):
                n = tile_n * (2 * BN) + group * BN
                if BITS == 4:
                    row = ((n // 128) * blocks + block) * ROWS + n % 128
                    tma.async_copy_global_to_shared(w, [row, 0], bar, wb.index(at * 2 + group))
                else:
                    tma.async_copy_global_to_shared(w, [n, block * 128], bar, wb.index(at * 2 + group))
            for part in gl.static_range(PARTS):
                k = block * 128 + part * 64
                tma.async_copy_global_to_shared(x, [tile_m * BM, k], bar, xb.index(at * PARTS + part))
            if GROUPED:
                for panel in gl.static_range(PANELS):
                    place = (((tile_n * (2 * BN)) // 128 + panel) * blocks + block) * (ROWS * 64) + 8192
                    tma.async_copy_global_to_shared(tail, [place], bar, gb.index(at * PANELS + panel))
            turn += 1


@gluon.jit
def _multiply(
    wb, xb, gb, yb, full, empty, y, a, total, scale, zero, bias, sums, flags, M, N, tiles, tiles_n, tiles_m, blocks,
    BITS: gl.constexpr, STAGES: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUPED: gl.constexpr,
    ZERO: gl.constexpr, BIAS: gl.constexpr, STREAM: gl.constexpr, TOGETHER: gl.constexpr, group: gl.constexpr,
):  # fmt: skip
    """Multiply this group's BN weights of each tile with its tokens, finish the sums and send them off."""
    PANELS: gl.constexpr = (2 * BN + 127) // 128
    WIDE: gl.constexpr = BM if BM <= 128 else 128
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 32])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 4)
    by_weight: gl.constexpr = gl.SliceLayout(1, layout)
    by_token: gl.constexpr = gl.SliceLayout(0, layout)
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    first, end, shared, whole, segments = _share(tiles, blocks, STREAM)
    private = gl.arange(0, BN, by_weight)[:, None] * BM + gl.arange(0, BM, by_token)[None, :]
    turn = 0
    for i in range(segments):
        tile, begin, last = _segment(i, first, end, shared, whole, blocks)
        tile_n, tile_m = _place(tile, tiles_n, tiles_m, TOGETHER)
        acc = gl.zeros((BN, BM), gl.int32, layout)
        for _ in range(begin, last):
            at = turn % STAGES
            mbarrier.wait(full.index(at), (turn // STAGES) & 1)
            if BITS == 4:
                packed = wb.index(at * 2 + group).load(operand)
                w0 = _low(packed)
                w1 = _high(packed)
                if GROUPED:
                    held = gb.index(at * PANELS + group * BN // 128)
                    within: gl.constexpr = group * BN % 128
                    s = held.slice(within, BN).load(gl.SliceLayout(1, operand)).to(gl.int32)
                    o = held.slice(128 + within, BN).load(gl.SliceLayout(1, operand)).to(gl.int32) * 0x01010101
                    w0 = _second_level(w0, s[:, None], o[:, None])
                    w1 = _second_level(w1, s[:, None], o[:, None])
                acc = warpgroup_mma(w0, xb.index(at * 2).permute((1, 0)), acc, is_async=True)
                acc = warpgroup_mma(w1, xb.index(at * 2 + 1).permute((1, 0)), acc, is_async=True)
            else:
                acc = warpgroup_mma(wb.index(at * 2 + group), xb.index(at).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(at))
            turn += 1
        finish = True
        if STREAM:
            finish = last == blocks
            if finish:
                units = (tiles - whole * programs) * blocks
                start = (tile - whole * programs) * blocks
                other = program - 1
                until = gl.where(begin > 0, (other + 1) * units // programs, start)
                while until > start:
                    since = other * units // programs
                    if since < until:
                        flag = flags + other * 2 + group
                        while gl.atomic_add(flag, 0, sem="acquire", scope="gpu") == 0:
                            pass
                        gl.thread_barrier()
                        part = sums + (other * 2 + group) * (BN * BM)
                        acc += gl.load(part + private, cache_modifier=".cg")
                        gl.store(flag, 0)
                    until = since
                    other -= 1
            else:
                gl.store(sums + (program * 2 + group) * (BN * BM) + private, acc)
                gl.thread_barrier()
                gl.atomic_xchg(flags + program * 2 + group, 1, sem="release", scope="gpu")
        if finish:
            out = yb.index(group)
            n = tile_n * (2 * BN) + group * BN
            rn = gl.minimum(n + gl.arange(0, BN, by_weight), N - 1)  # what is outside is not stored
            rm = gl.minimum(tile_m * BM + gl.arange(0, BM, by_token), M - 1)
            value = acc.to(gl.float32) * gl.load(scale + rn)[:, None]
            if ZERO:
                value = value - gl.load(zero + rn)[:, None] * gl.load(total + rm).to(gl.float32)[None, :]
            value = value * gl.load(a + rm)[None, :]
            if BIAS:
                value = value + gl.load(bias + rn)[:, None]
            tma.store_wait(0)
            out.permute((1, 0)).store(value.to(y.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(y, [tile_m * BM, n], out)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "blocks"])
def hopper_kernel(
    x,  # int8 [M, K] in boxes [BM, 64], or [BM, 128] if BITS = 8
    w,  # blocks as rows of 64 bytes, in boxes [BN, 64]; or int8 [N, K] in boxes [BN, 128]
    tail,  # blocks as bytes, in boxes of 256: the groups' parameters, read if GROUPED
    y,  # [M, N] in boxes [BM, BN]
    a,  # fp32 [M]
    total,  # int32 [M], read if ZERO
    scale,  # fp32 [N]
    zero,  # fp32 [N], read if ZERO
    bias,  # fp32 [N], read if BIAS
    sums,  # int32 [programs, 2, BN, BM] if STREAM: what a program adds to another's tile
    flags,  # int32 [programs, 2] if STREAM: 1 where such sums are there; zero before and after
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
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """Whole tiles [2 * BN, BM] in turn, and a share of those that are left."""
    PANELS: gl.constexpr = (2 * BN + 127) // 128
    PARTS: gl.constexpr = 2 if BITS == 4 else 1
    tiles_n = gl.cdiv(N, 2 * BN)
    tiles_m = gl.cdiv(M, BM)
    tiles = tiles_n * tiles_m
    wb = gl.allocate_shared_memory(gl.int8, [2 * STAGES] + w.block_type.shape, w.layout)
    xb = gl.allocate_shared_memory(gl.int8, [PARTS * STAGES] + x.block_type.shape, x.layout)
    yb = gl.allocate_shared_memory(y.dtype, [2] + y.block_type.shape, y.layout)
    gb = wb
    if GROUPED:
        gb = gl.allocate_shared_memory(gl.uint8, [PANELS * STAGES] + tail.block_type.shape, tail.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (wb, xb, gb, yb, full, empty, y, a, total, scale, zero, bias, sums, flags, M, N, tiles, tiles_n,
                         tiles_m, blocks, BITS, STAGES, BM, BN, GROUPED, ZERO, BIAS, STREAM, TOGETHER, 0)),
            (_multiply, (wb, xb, gb, yb, full, empty, y, a, total, scale, zero, bias, sums, flags, M, N, tiles, tiles_n,
                         tiles_m, blocks, BITS, STAGES, BM, BN, GROUPED, ZERO, BIAS, STREAM, TOGETHER, 1)),
            (_fetch, (w, x, tail, wb, xb, gb, full, empty, tiles, tiles_n, tiles_m, blocks,
                      BITS, STAGES, BM, BN, GROUPED, STREAM, TOGETHER)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


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
    tile: Any, *, bits: int, grouped: bool, has_zero: bool, has_bias: bool, sms: int,
) -> None:  # fmt: skip
    """Write the product into y; arguments are those of `linear.gemm_kernel`, `tile` one of language "gluon"."""
    (m, k), n = x.shape, scale.shape[0]
    if x.stride(0) % 16 or x.stride(1) != 1 or x.data_ptr() % 16:
        x = x.contiguous()
    bm, bn = tile.tokens, tile.weights // GROUPS
    wide = 64 if bits == 4 else SIDE
    blocks = ceil_div(k, SIDE)
    tiles = ceil_div(m, bm) * ceil_div(n, tile.weights)
    stream = tile.split > 1 and tiles % sms != 0
    programs = min(sms, tiles * blocks) if stream else min(sms, tiles)
    flat = w.view(torch.int8) if bits == 8 else w.view(torch.int8).view(-1, 64)
    sums = torch.empty(programs * tile.weights * bm, dtype=torch.int32, device=x.device) if stream else total
    hopper_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [bm, wide], _layout(bm, wide, gl.int8)),
        TensorDescriptor.from_tensor(flat, [bn, wide], _layout(bn, wide, gl.int8)),
        TensorDescriptor.from_tensor(w.view(torch.uint8).view(-1), [256], gl.NVMMASharedLayout(0, 8, rank=1)),
        TensorDescriptor.from_tensor(y, [bm, bn], _layout(bm, bn, ELEMENTS[y.dtype])),
        a, total, scale, zero, bias, sums, _flags(x.device), m, n, blocks,
        **constants(
            fitted(tile, y.element_size(), bits=bits, grouped=grouped),
            bits=bits, grouped=grouped, zero=has_zero, bias=has_bias, stream=stream,
        ),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def fitted(tile: Any, element: int, *, bits: int, grouped: bool) -> Any:
    """Return a tile with as many stages as shared memory holds beside results of so many bytes each."""
    bm, bn = tile.tokens, tile.weights // GROUPS
    stage = bm * SIDE + tile.weights * SIDE * bits // 8 + (256 * ceil_div(tile.weights, SIDE) if grouped else 0)
    room = SHARED_BYTES[90] - 2048 - GROUPS * bm * bn * element  # barriers and alignment take the 2 KiB
    return replace(tile, stages=min(tile.stages, room // stage))


def constants(tile: Any, *, bits: int, grouped: bool, zero: bool, bias: bool, stream: bool) -> dict[str, Any]:
    """Return what `hopper_kernel` is compiled for."""
    return {
        "BITS": bits, "GROUPED": grouped, "ZERO": zero, "BIAS": bias, "STREAM": stream, "TOGETHER": tile.order,
        "BM": tile.tokens, "BN": tile.weights // GROUPS, "STAGES": tile.stages, "REGISTERS": 216,
    }  # fmt: skip


def boxes(tile: Any, element: str, *, bits: int) -> dict[str, str]:
    """Return the types of the kernel's copied arguments for a dtype of y, "fp16" or "bf16"."""
    wide, bm, bn = 64 if bits == 4 else SIDE, tile.tokens, tile.weights // GROUPS
    of = {"fp16": gl.float16, "bf16": gl.bfloat16, "fp32": gl.float32}[element]
    return {
        "x": f"tensordesc<i8[{bm}, {wide}],{_layout(bm, wide, gl.int8)!r}>",
        "w": f"tensordesc<i8[{bn}, {wide}],{_layout(bn, wide, gl.int8)!r}>",
        "tail": f"tensordesc<u8[256],{gl.NVMMASharedLayout(0, 8, rank=1)!r}>",
        "y": f"tensordesc<{element}[{bm}, {bn}],{_layout(bm, bn, of)!r}>",
    }


@functools.cache
def _layout(rows: int, columns: int, element: Any) -> Any:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], element)
