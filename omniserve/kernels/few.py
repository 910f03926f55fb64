"""Integer products of few tokens on compute capability 9.0: small programs, several on each multiprocessor.

Here bytes in flight count, and how soon the first ones are asked for. K is cut into parts, so that every
multiprocessor has weights to read; each program asks for its first weights before the kernel before it ends
(programmatic dependent launch), and holds so little shared memory that those of the next product fit beside it. The
last of a tile's programs adds up the parts, which are integers, and applies the epilogue of `linear.py`: no order, no
other bits.

A stage, `step` blocks of 128 columns, comes in one copy of weights and one of activations, whatever its size: the
compiler puts a barrier of the whole program before each copy.

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
from omniserve.kernels.hopper import _high, _low, _second_level
from omniserve.kernels.tiles import Tile

TICKETS = 1 << 14
"""Tiles whose parts can be counted: K of products with more is not cut."""


@gluon.jit
def _fetch_weights(
    w, tail, wb, gb, bar, stage, tile_n, step, blocks, wanted,
    BITS: gl.constexpr, GROUPED: gl.constexpr, BN: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """Ask for the weights of one stage; behind a panel's last block the activations are zeros."""
    n = tile_n * BN
    if BITS == 4:
        block = n // 128 * blocks + step * STEP
        tma.async_copy_global_to_shared(w, [block, n % 128 // 2, 0], bar, wb.index(stage), pred=wanted)
        if GROUPED:  # half a panel begins at its own scales
            tma.async_copy_global_to_shared(tail, [block, 8192 + n % 128], bar, gb.index(stage), pred=wanted)
    else:
        tma.async_copy_global_to_shared(w, [n, step * STEP * 128], bar, wb.index(stage), pred=wanted)


@gluon.jit(do_not_specialize=["M", "blocks", "parts"])
def few_kernel(
    x,  # int8 [M, K] in boxes [BM, STEP * 128]
    w,  # blocks as lines of 128 bytes, two rows of weights, in boxes [STEP, BN / 2, 128]; or int8 [N, K]
    tail,  # blocks as bytes, in boxes [STEP, 256]: the groups' parameters, read if GROUPED
    y,  # [M, N]
    a,  # fp32 [M]
    total,  # int32 [M], read if ZERO
    scale,  # fp32 [N]
    zero,  # fp32 [N], read if ZERO
    bias,  # fp32 [N], read if BIAS
    sums,  # int32 [tiles, parts, BM, BN] if CUT
    tickets,  # int32 [tiles] if CUT: how many parts of a tile are there; zero before and after
    M,
    N,
    blocks,  # blocks of 128 columns
    parts,  # of K
    BITS: gl.constexpr,
    GROUPED: gl.constexpr,
    ZERO: gl.constexpr,
    BIAS: gl.constexpr,
    CUT: gl.constexpr,  # there are several parts
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
    # Two rows of weights lie in a line of 128 bytes, its pieces of 16 in the order that copies of tiles give them.
    FIRST: gl.constexpr = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 32], [1, 0], [2, 16], [4, 32], [9, 0], [16, 0]]
    LINES: gl.constexpr = gl.SharedLinearLayout(FIRST + ([[32, 0]] if BN == 64 else [[32, 0], [64, 0]]), [], 1024)
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 8, rank=2)
    PLAIN: gl.constexpr = gl.NVMMASharedLayout(0, 8, rank=1)
    BYTES: gl.constexpr = w.block_type.nbytes + x.block_type.nbytes + (STEP * 256 if GROUPED else 0)
    WIDE: gl.constexpr = 32 if BN == 128 else 16
    flat: gl.constexpr = gl.BlockedLayout([4, 1], [WIDE, 32 // WIDE], [1, WARPS], [0, 1])  # 16 bytes of sums per thread
    by_weight: gl.constexpr = gl.SliceLayout(1, flat)
    by_token: gl.constexpr = gl.SliceLayout(0, flat)

    part = gl.program_id(0) % parts
    tile = gl.program_id(0) // parts
    tiles_m = gl.cdiv(M, BM)
    tile_m = tile % tiles_m
    tile_n = tile // tiles_m
    steps = gl.cdiv(blocks, STEP)
    first = part * steps // parts
    count = (part + 1) * steps // parts - first

    wb = gl.allocate_shared_memory(gl.int8, [STAGES] + w.block_type.shape, w.layout)
    xb = gl.allocate_shared_memory(gl.int8, [STAGES] + x.block_type.shape, x.layout)
    gb = wb
    if GROUPED:
        gb = gl.allocate_shared_memory(gl.uint8, [STAGES] + tail.block_type.shape, tail.layout)
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
    rn = tile_n * BN + gl.arange(0, BN, by_weight)
    rm = tile_m * BM + gl.arange(0, BM, by_token)
    there = gl.minimum(rn, N - 1)  # what is outside is not stored
    sv = gl.load(scale + there)
    if ZERO:
        zv = gl.load(zero + there)
    if BIAS:
        bv = gl.load(bias + there)
    gdc_wait()
    for stage in gl.static_range(STAGES):
        k = (first + stage) * (STEP * 128)
        tma.async_copy_global_to_shared(x, [tile_m * BM, k], full.index(stage), xb.index(stage), pred=stage < count)
    here = gl.minimum(rm, M - 1)
    if BM < 128:
        av = gl.load(a + here)
        if ZERO:
            tv = gl.load(total + here)

    acc = gl.zeros((BN, BM), gl.int32, layout)
    for i in range(count):
        at = i % STAGES
        mbarrier.wait(full.index(at), (i // STAGES) & 1)
        tokens = xb.index(at)
        for inner in gl.static_range(STEP):
            if BITS == 4:
                lines = wb.index(at)._reinterpret(gl.int8, [STEP, BN // 2, 128], SWIZZLED).index(inner)
                packed = lines._reinterpret(gl.int8, [BN, 64], LINES).load(operand)
                w0 = _low(packed)
                w1 = _high(packed)
                if GROUPED:
                    group = gb.index(at)._reinterpret(gl.uint8, [STEP, 256], PLAIN).index(inner)
                    s = group.slice(0, BN).load(gl.SliceLayout(1, operand)).to(gl.int32)
                    o = group.slice(128, BN).load(gl.SliceLayout(1, operand)).to(gl.int32) * 0x01010101
                    w0 = _second_level(w0, s[:, None], o[:, None])
                    w1 = _second_level(w1, s[:, None], o[:, None])
                acc = warpgroup_mma(w0, tokens.slice(inner * 128, 64, dim=1).permute((1, 0)), acc, is_async=True)
                acc = warpgroup_mma(w1, tokens.slice(inner * 128 + 64, 64, dim=1).permute((1, 0)), acc, is_async=True)
            else:
                codes = wb.index(at).slice(inner * 128, 128, dim=1)
                acc = warpgroup_mma(codes, tokens.slice(inner * 128, 128, dim=1).permute((1, 0)), acc, is_async=True)
        old = i - 1  # its weights and activations are no longer needed
        if (old >= 0) & (old + STAGES < count):
            gl.thread_barrier()
            at = old % STAGES
            step = first + old + STAGES
            mbarrier.expect(full.index(at), BYTES)
            _fetch_weights(
                w, tail, wb, gb, full.index(at), at, tile_n, step, blocks, True, BITS, GROUPED, BN, STEP
            )  # fmt: skip
            tma.async_copy_global_to_shared(x, [tile_m * BM, step * (STEP * 128)], full.index(at), xb.index(at))
        acc = warpgroup_mma_wait(0, deps=[acc])

    if BM == 128:  # registers are scarce
        av = gl.load(a + here)
        if ZERO:
            tv = gl.load(total + here)
    result = gl.convert_layout(acc, flat)
    finish = True
    if CUT:
        weight = gl.arange(0, BN, by_weight)[:, None]
        token = gl.arange(0, BM, by_token)[None, :]
        place = sums + tile * (parts * BN * BM) + token * BN + weight
        gl.store(place + part * (BN * BM), result)
        gl.thread_barrier()
        finish = gl.atomic_add(tickets + tile, 1, sem="acq_rel", scope="gpu") == parts - 1
        if finish:
            gl.thread_barrier()
            result = gl.zeros((BN, BM), gl.int32, flat)
            for begin in range(0, parts, TOGETHER):
                for other in gl.static_range(TOGETHER):
                    some = (begin + other < parts) & (weight >= 0)
                    result += gl.load(place + (begin + other) * (BN * BM), mask=some, other=0, cache_modifier=".cg")
            gl.store(tickets + tile, 0)
    if finish:
        value = result.to(gl.float32) * sv[:, None]
        if ZERO:
            value = value - zv[:, None] * tv.to(gl.float32)[None, :]
        value = value * av[None, :]
        if BIAS:
            value = value + bv[:, None]
        inside = (rn < N)[:, None] & (rm < M)[None, :]
        gl.store(y + rm.to(gl.int64)[None, :] * N + rn[:, None], value.to(y.dtype.element_ty), mask=inside)


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
    of = copies(tile, bits=bits)
    flat = w.view(torch.int8)
    if bits == 4:
        flat = flat.view(-1, w.shape[2] // SIDE, SIDE)
    tail = TensorDescriptor.from_tensor(w.view(-1, w.shape[2]), *of["tail"]) if grouped else total
    few_kernel[(tiles * tile.split,)](
        TensorDescriptor.from_tensor(x, *of["x"]), TensorDescriptor.from_tensor(flat, *of["w"]), tail, y,
        a, total, scale, zero, bias, sums, _tickets(x.device), m, n, blocks, tile.split,
        **constants(tile, bits=bits, grouped=grouped, zero=has_zero, bias=has_bias),
        num_warps=tile.warps, enable_fp_fusion=False, launch_pdl=True, maxnreg=registers(tile),
    )  # fmt: skip


def constants(tile: Tile, *, bits: int, grouped: bool, zero: bool, bias: bool) -> dict[str, Any]:
    """Return what `few_kernel` is compiled for."""
    return {
        "BITS": bits, "GROUPED": grouped, "ZERO": zero, "BIAS": bias, "CUT": tile.split > 1,
        "BM": tile.tokens, "BN": tile.weights, "STEP": tile.step, "STAGES": tile.stages, "TOGETHER": together(tile),
    }  # fmt: skip


def together(tile: Tile) -> int:
    """Return how many parts are added up at once: as many as fit into registers."""
    return max(1, min(tile.split, 4, 2048 * tile.warps // (tile.weights * tile.tokens)))


def registers(tile: Tile) -> int | None:
    """Return how many registers a thread may take, or None for as many as it likes: two programs must fit."""
    return 128 if tile.warps == 8 and tile.tokens == 128 else None


def copies(tile: Tile, *, bits: int) -> dict[str, tuple[list[int], Any]]:
    """Return box and layout of the kernel's copied arguments."""
    columns = SIDE * tile.step
    w = [tile.weights, columns] if bits == 8 else [tile.step, tile.weights // 2, SIDE]
    return {
        "x": ([tile.tokens, columns], gl.NVMMASharedLayout(128, 8, rank=2)),
        "w": (w, gl.NVMMASharedLayout(128, 8, rank=len(w))),
        "tail": ([tile.step, 256], gl.NVMMASharedLayout(0, 8, rank=2)),
    }


def boxes(tile: Tile, element: str, *, bits: int, grouped: bool) -> dict[str, str]:
    """Return the types of the kernel's copied arguments and of y, whose dtype is "fp16", "bf16" or "fp32"."""
    of = {name: f"tensordesc<i8{box},{layout!r}>" for name, (box, layout) in copies(tile, bits=bits).items()}
    of["tail"] = of["tail"].replace("<i8", "<u8") if grouped else "*i32"
    return of | {"y": f"*{element}"}
