"""Integer products of few tokens on compute capability 9.0: small programs, several on each multiprocessor.

Here bytes in flight count, and how soon the first ones are asked for. K is cut into parts, so that every
multiprocessor has weights to read; each program asks for its first weights before the kernel before it ends
(programmatic dependent launch), and holds so little shared memory that those of the next product fit beside it. The
last of a tile's programs adds up the parts, which are integers, and applies the epilogue of `linear.py`: no order, no
other bits.

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
from omniserve.kernels.hopper import ELEMENTS, _high, _layout, _low, _second_level
from omniserve.kernels.tiles import Tile

TICKETS = 1 << 14
"""Tiles whose parts can be counted: K of products with more is not cut."""


@gluon.jit
def _fetch_weights(
    w, tail, wb, gb, bar, slot, tile_n, step, blocks, wanted,
    BITS: gl.constexpr, GROUPED: gl.constexpr, BN: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """Ask for the weights of one stage."""
    LINES: gl.constexpr = 66 if GROUPED else 64  # of 128 bytes in a block
    n = tile_n * BN
    for inner in gl.static_range(STEP):
        block = step * STEP + inner
        place = slot * STEP + inner
        if BITS == 4:
            line = ((n // 128) * blocks + block) * LINES + n % 128 // 2
            tma.async_copy_global_to_shared(w, [line, 0], bar, wb.index(place), pred=wanted)
        else:
            tma.async_copy_global_to_shared(w, [n, block * 128], bar, wb.index(place), pred=wanted)
        if GROUPED:
            byte = ((n // 128) * blocks + block) * (LINES * 128) + 8192
            byte += n % 128  # half a panel begins at its own scales
            tma.async_copy_global_to_shared(tail, [byte], bar, gb.index(place), pred=wanted)


@gluon.jit
def _fetch_tokens(x, xb, bar, slot, tile_m, step, wanted, BM: gl.constexpr, STEP: gl.constexpr):
    """Ask for the activations of one stage; behind the last column are zeros."""
    for inner in gl.static_range(STEP):
        k = (step * STEP + inner) * 128
        tma.async_copy_global_to_shared(x, [tile_m * BM, k], bar, xb.index(slot * STEP + inner), pred=wanted)


@gluon.jit(do_not_specialize=["M", "N", "blocks"])
def few_kernel(
    x,  # int8 [M, K] in boxes [BM, 128]
    w,  # blocks as lines of 128 bytes, two rows of weights, in boxes [BN / 2, 128]; or int8 [N, K] in boxes [BN, 128]
    tail,  # blocks as bytes, in boxes of 256: the groups' parameters, read if GROUPED
    y,  # [M, N] in boxes [BM, BN]
    a,  # fp32 [M]
    total,  # int32 [M], read if ZERO
    scale,  # fp32 [N]
    zero,  # fp32 [N], read if ZERO
    bias,  # fp32 [N], read if BIAS
    sums,  # int32 [tiles, SPLIT, BN, BM] if SPLIT > 1
    tickets,  # int32 [tiles] if SPLIT > 1: how many parts of a tile are there; zero before and after
    M,
    N,
    blocks,  # blocks of 128 columns
    BITS: gl.constexpr,
    GROUPED: gl.constexpr,
    ZERO: gl.constexpr,
    BIAS: gl.constexpr,
    SPLIT: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STEP: gl.constexpr,  # blocks of one stage
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,  # parts that are read at once
):
    """One part of the sum of one tile [BN, BM]."""
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 32])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 4)
    by_weight: gl.constexpr = gl.SliceLayout(1, layout)
    by_token: gl.constexpr = gl.SliceLayout(0, layout)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    # Two rows of weights lie in a line of 128 bytes, its pieces of 16 in the order that copies of tiles give them.
    FIRST: gl.constexpr = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 32], [1, 0], [2, 16], [4, 32], [9, 0], [16, 0]]
    LINES: gl.constexpr = gl.SharedLinearLayout(FIRST + ([[32, 0]] if BN == 64 else [[32, 0], [64, 0]]), [], 1024)
    BYTES: gl.constexpr = STEP * (w.block_type.nbytes + x.block_type.nbytes + (256 if GROUPED else 0))
    SPREAD: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BM, BM // 4], [WARPS, 1], [1, 0])  # 16 bytes per thread

    part = gl.program_id(0) % SPLIT
    tile = gl.program_id(0) // SPLIT
    tiles_m = gl.cdiv(M, BM)
    tile_m = tile % tiles_m
    tile_n = tile // tiles_m
    steps = gl.cdiv(blocks, STEP)
    first = part * steps // SPLIT
    count = (part + 1) * steps // SPLIT - first

    wb = gl.allocate_shared_memory(gl.int8, [STEP * STAGES] + w.block_type.shape, w.layout)
    xb = gl.allocate_shared_memory(gl.int8, [STEP * STAGES] + x.block_type.shape, x.layout)
    gb = wb
    if GROUPED:
        gb = gl.allocate_shared_memory(gl.uint8, [STEP * STAGES] + tail.block_type.shape, tail.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    fence_async_shared()
    gdc_launch_dependents()
    for stage in gl.static_range(STAGES):  # weights, which no kernel before this one writes
        mbarrier.expect(full.index(stage), BYTES, pred=stage < count)
        _fetch_weights(
            w, tail, wb, gb, full.index(stage), stage, tile_n, first + stage, blocks, stage < count,
            BITS, GROUPED, BN, STEP,
        )  # fmt: skip
    rn = gl.minimum(tile_n * BN + gl.arange(0, BN, flat), N - 1)  # what is outside is not stored
    rm = gl.minimum(tile_m * BM + gl.arange(0, BM, flat), M - 1)
    sv = gl.load(scale + rn)
    if ZERO:
        zv = gl.load(zero + rn)
    if BIAS:
        bv = gl.load(bias + rn)
    gdc_wait()
    for stage in gl.static_range(STAGES):
        _fetch_tokens(x, xb, full.index(stage), stage, tile_m, first + stage, stage < count, BM, STEP)
    av = gl.load(a + rm)
    if ZERO:
        tv = gl.load(total + rm)

    acc = gl.zeros((BN, BM), gl.int32, layout)
    for i in range(count):
        at = i % STAGES
        bar = full.index(at)
        mbarrier.wait(bar, (i // STAGES) & 1)
        for inner in gl.static_range(STEP):
            slot = at * STEP + inner
            if BITS == 4:
                packed = wb.index(slot)._reinterpret(gl.int8, [BN, 64], LINES).load(operand)
                w0 = _low(packed)
                w1 = _high(packed)
                if GROUPED:
                    s = gb.index(slot).slice(0, BN).load(gl.SliceLayout(1, operand)).to(gl.int32)
                    o = gb.index(slot).slice(128, BN).load(gl.SliceLayout(1, operand)).to(gl.int32) * 0x01010101
                    w0 = _second_level(w0, s[:, None], o[:, None])
                    w1 = _second_level(w1, s[:, None], o[:, None])
                acc = warpgroup_mma(w0, xb.index(slot).slice(0, 64, dim=1).permute((1, 0)), acc, is_async=True)
                acc = warpgroup_mma(w1, xb.index(slot).slice(64, 64, dim=1).permute((1, 0)), acc, is_async=True)
            else:
                acc = warpgroup_mma(wb.index(slot), xb.index(slot).permute((1, 0)), acc, is_async=True)
        old = i - 1  # its weights and activations are no longer needed
        if (old >= 0) & (old + STAGES < count):
            gl.thread_barrier()
            at = old % STAGES
            bar = full.index(at)
            step = first + old + STAGES
            mbarrier.expect(bar, BYTES)
            _fetch_weights(w, tail, wb, gb, bar, at, tile_n, step, blocks, True, BITS, GROUPED, BN, STEP)
            _fetch_tokens(x, xb, bar, at, tile_m, step, True, BM, STEP)
        acc = warpgroup_mma_wait(0, deps=[acc])

    finish = True
    if SPLIT > 1:
        weight = gl.arange(0, BN, gl.SliceLayout(1, SPREAD))[:, None]
        token = gl.arange(0, BM, gl.SliceLayout(0, SPREAD))[None, :]
        place = sums + tile * (SPLIT * BN * BM) + weight * BM + token
        gl.store(place + part * (BN * BM), gl.convert_layout(acc, SPREAD))
        gl.thread_barrier()
        finish = gl.atomic_add(tickets + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
        if finish:
            gl.thread_barrier()
            spread = gl.zeros((BN, BM), gl.int32, SPREAD)
            for begin in range(0, gl.num_programs(0) // (tiles_m * gl.cdiv(N, BN)), TOGETHER):  # SPLIT, not unrolled
                for other in gl.static_range(TOGETHER):
                    spread += gl.load(place + (begin + other) * (BN * BM), cache_modifier=".cg")
            acc = gl.convert_layout(spread, layout)
            gl.store(tickets + tile, 0)
    if finish:
        value = acc.to(gl.float32) * gl.convert_layout(sv, by_weight)[:, None]
        if ZERO:
            sum_of_codes = gl.convert_layout(tv, by_token).to(gl.float32)
            value = value - gl.convert_layout(zv, by_weight)[:, None] * sum_of_codes[None, :]
        value = value * gl.convert_layout(av, by_token)[None, :]
        if BIAS:
            value = value + gl.convert_layout(bv, by_weight)[:, None]
        yb = gl.allocate_shared_memory(y.dtype, y.block_type.shape, y.layout)
        yb.permute((1, 0)).store(value.to(y.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y, [tile_m * BM, tile_n * BN], yb)
        tma.store_wait(0)


@functools.cache
def _tickets(device: torch.device) -> Tensor:
    """Return the counts of a card's tiles: zero before and after every launch, which follow each other."""
    return torch.zeros(TICKETS, dtype=torch.int32, device=device)


def launch(
    x: Tensor, a: Tensor, total: Tensor, w: Tensor, scale: Tensor, zero: Tensor, bias: Tensor, y: Tensor,
    tile: Tile, *, bits: int, grouped: bool, has_zero: bool, has_bias: bool,
) -> None:  # fmt: skip
    """Write the product into y; arguments are those of `linear.gemm_kernel`, `tile` one of language "few"."""
    (m, k), n = x.shape, scale.shape[0]
    if x.stride(0) % 16 or x.stride(1) != 1 or x.data_ptr() % 16:
        x = x.contiguous()
    bm, bn = tile.tokens, tile.weights
    blocks = ceil_div(k, SIDE)
    tiles = ceil_div(m, bm) * ceil_div(n, bn)
    if tiles > TICKETS:
        tile = replace(tile, split=1)
    sums = total
    if tile.split > 1:
        sums = torch.empty(tiles * tile.split * bn * bm, dtype=torch.int32, device=x.device)
    lines = bn if bits == 8 else bn // 2
    flat = w.view(torch.int8) if bits == 8 else w.view(torch.int8).view(-1, SIDE)
    few_kernel[(tiles * tile.split,)](
        TensorDescriptor.from_tensor(x, [bm, SIDE], _layout(bm, SIDE, gl.int8)),
        TensorDescriptor.from_tensor(flat, [lines, SIDE], _layout(lines, SIDE, gl.int8)),
        TensorDescriptor.from_tensor(w.view(torch.uint8).view(-1), [256], gl.NVMMASharedLayout(0, 8, rank=1)),
        TensorDescriptor.from_tensor(y, [bm, bn], _layout(bm, bn, ELEMENTS[y.dtype])),
        a, total, scale, zero, bias, sums, _tickets(x.device), m, n, blocks,
        **constants(tile, bits=bits, grouped=grouped, zero=has_zero, bias=has_bias),
        num_warps=tile.warps, enable_fp_fusion=False, launch_pdl=True, maxnreg=registers(tile),
    )  # fmt: skip


def constants(tile: Tile, *, bits: int, grouped: bool, zero: bool, bias: bool) -> dict[str, Any]:
    """Return what `few_kernel` is compiled for."""
    return {
        "BITS": bits, "GROUPED": grouped, "ZERO": zero, "BIAS": bias, "SPLIT": tile.split,
        "BM": tile.tokens, "BN": tile.weights, "STEP": tile.step, "STAGES": tile.stages, "TOGETHER": together(tile),
    }  # fmt: skip


def together(tile: Tile) -> int:
    """Return how many parts are added up at once: as many as fit into registers."""
    fitting = 2048 * tile.warps // (tile.weights * tile.tokens)
    return max(one for one in range(1, max(1, min(tile.split, fitting)) + 1) if tile.split % one == 0)


def registers(tile: Tile) -> int | None:
    """Return how many registers a thread may take, or None for as many as it likes: two programs must fit."""
    return 128 if tile.warps == 8 and tile.tokens == 128 else None


def boxes(tile: Tile, element: str, *, bits: int) -> dict[str, str]:
    """Return the types of the kernel's copied arguments for a dtype of y, "fp16", "bf16" or "fp32"."""
    bm, bn = tile.tokens, tile.weights
    lines = bn if bits == 8 else bn // 2
    of = {"fp16": gl.float16, "bf16": gl.bfloat16, "fp32": gl.float32}[element]
    return {
        "x": f"tensordesc<i8[{bm}, {SIDE}],{_layout(bm, SIDE, gl.int8)!r}>",
        "w": f"tensordesc<i8[{lines}, {SIDE}],{_layout(lines, SIDE, gl.int8)!r}>",
        "tail": f"tensordesc<u8[256],{gl.NVMMASharedLayout(0, 8, rank=1)!r}>",
        "y": f"tensordesc<{element}[{bm}, {bn}],{_layout(bm, bn, of)!r}>",
    }
