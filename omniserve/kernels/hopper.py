"""Integer products on compute capability 9.0: one warp fetches tiles, groups of four warps multiply.

The Triton kernel of `linear.py` waits for each product before it unpacks the next weights. Here two to four groups of
warps work each at its own pace, so that one unpacks while the others multiply: on neighbouring weights (SIDES), or in
turns along K (TURNS), where many tokens, or many bytes in flight, count. The grid is persistent and fetches the next
tile during the epilogue. Where tiles leave multiprocessors free, programs on these help: they take the first part of
tiles' K and hand over sums, which are integers: no order, no other bits. The epilogue is that of `linear.py`, so both
kernels give the same result.

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
from omniserve.kernels.device import SHARED_BYTES, processors
from omniserve.kernels.fragments import _as_lines, _as_tile, _high, _low, _piece, _second_level, _tokens
from omniserve.kernels.tiles import Tile


@gluon.jit
def _count(tiles, HELPED: gl.constexpr):
    """Return how many tiles this program works on; with helpers, that is every program behind the tiles' own."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    count = gl.cdiv(tiles - program, programs)
    if HELPED:
        count = gl.where(program < tiles, 1, gl.cdiv(2 * tiles - program, programs - tiles))
    return count


@gluon.jit
def _segment(i, tiles, steps, lent, HELPED: gl.constexpr):
    """Return a program's i-th piece of work: (tile, first step, end, whether it helps the tile's own program)."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    tile = program + i * programs
    begin = 0
    end = steps
    helps = False
    if HELPED:
        helps = program >= tiles
        tile = gl.where(helps, program - tiles + i * (programs - tiles), program)
        begin = gl.where(helps, 0, lent)
        end = gl.where(helps, lent, steps)
    return tile, begin, end, helps


@gluon.jit
def _place(tile, tiles_n, tiles_m, TOGETHER: gl.constexpr):
    """Return which weights and which tokens a tile is: TOGETHER tiles of tokens follow each other on one panel."""
    band = tile // (TOGETHER * tiles_n)
    high = gl.minimum(tiles_m - band * TOGETHER, TOGETHER)
    inside = tile % (TOGETHER * tiles_n)
    return inside // high, band * TOGETHER + inside % high


@gluon.jit
def _fetch(
    w, x, tail, wb, xb, gb, full, empty, ready, there, tickets, tiles_n, tiles_m, blocks, lent,
    BITS: gl.constexpr, STAGES: gl.constexpr, STEP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    SIDES: gl.constexpr, TURNS: gl.constexpr, GROUPED: gl.constexpr, HELPED: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """Fetch blocks of weights and activations, tile after tile, as buffers become free."""
    WIDE: gl.constexpr = SIDES * BN
    PER: gl.constexpr = 2 if BN == 64 and SIDES % 2 == 0 else 1  # groups of warps that share a panel's parameters
    TAILS: gl.constexpr = SIDES // PER
    ROWS: gl.constexpr = 132 if GROUPED else 128
    BYTES: gl.constexpr = SIDES * w.block_type.nbytes + x.block_type.nbytes + (TAILS * 256 if GROUPED else 0)
    steps = gl.cdiv(blocks, STEP)
    tiles = tiles_n * tiles_m
    count = _count(tiles, HELPED)
    for again in gl.static_range(2):  # the first weights, which no kernel before this one writes; then everything
        turn = 0
        if again:
            # A copy of rows that are not there reads nothing but the descriptor, which the first activations then find.
            mbarrier.expect(ready, x.block_type.nbytes)
            tma.async_copy_global_to_shared(x, [tiles_m * BM, 0], ready, xb.index(STAGES * STEP - 1))
            gdc_wait()
        for i in range(count if again else gl.minimum(count, STAGES)):
            tile, begin, last, helps = _segment(i, tiles, steps, lent, HELPED)
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
                            for one in gl.static_range(TAILS):
                                n = tile_n * WIDE + one * PER * BN
                                place = ((n // 128) * blocks + block) * (ROWS * 64)
                                place += 8192 + n % 128  # half a panel begins at its own scales
                                tma.async_copy_global_to_shared(tail, [place], bar, gb.index(slot * TAILS + one))
                if again:
                    if at == STAGES - 1:
                        mbarrier.wait(ready, 0)
                    for inner in gl.static_range(STEP):
                        k = (gl.where(step < last, step, steps) * STEP + inner) * 128  # behind the last one are zeros
                        tma.async_copy_global_to_shared(x, [tile_m * BM, k], bar, xb.index(at * STEP + inner))
                turn += 1
            if again and HELPED:  # noqa: SIM102
                if not helps:
                    while gl.atomic_add(tickets + tile, 0, sem="acquire", scope="gpu") < SIDES:
                        pass
                    gl.store(tickets + tile, 0)
                    mbarrier.arrive(there)
    mbarrier.wait(ready, 0)


@gluon.jit
def _multiply(
    wb, xb, gb, yb, rb, full, empty, given, taken, there, y, a, total, scale, zero, bias, sums, tickets,
    M, N, tiles_n, tiles_m, blocks, lent,
    BITS: gl.constexpr, STAGES: gl.constexpr, STEP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    SIDES: gl.constexpr, TURNS: gl.constexpr, GROUPED: gl.constexpr, ZERO: gl.constexpr, BIAS: gl.constexpr,
    HELPED: gl.constexpr, TOGETHER: gl.constexpr, group: gl.constexpr,
):  # fmt: skip
    """Multiply BN weights of each tile with its tokens, taking turns; finish the sums and send them off."""
    side: gl.constexpr = group % SIDES
    mine: gl.constexpr = group // SIDES
    WIDE: gl.constexpr = SIDES * BN
    PER: gl.constexpr = 2 if BN == 64 and SIDES % 2 == 0 else 1
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM if BM <= 128 else 128, 32])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 4)
    final: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, y.block_type.shape[0], 32])
    by_weight: gl.constexpr = gl.SliceLayout(1, final)
    by_token: gl.constexpr = gl.SliceLayout(0, final)
    WITHIN: gl.constexpr = side % PER * BN
    PIECES: gl.constexpr = BM // y.block_type.shape[0]
    BUFFERS: gl.constexpr = 1 if PIECES == 1 else 2
    T: gl.constexpr = BM // PIECES
    # The epilogue's arguments for tokens stay in registers during the loop, if these are not full of sums.
    FREE: gl.constexpr = 128 if SIDES * TURNS == 2 else 64
    EARLY: gl.constexpr = PIECES == 1 and FREE >= BN * BM // 128 + BM
    # Two rows of weights lie in a line of 128 bytes, its pieces of 16 in the order that copies of tiles give them.
    FIRST: gl.constexpr = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 32], [1, 0], [2, 16], [4, 32], [9, 0], [16, 0]]
    LINES: gl.constexpr = gl.SharedLinearLayout(FIRST + ([[32, 0]] if BN == 64 else [[32, 0], [64, 0]]), [], 1024)
    steps = gl.cdiv(blocks, STEP)
    if mine == 0:  # nothing is written: these rows are not there, but the descriptor is
        tma.async_copy_shared_to_global(y, [tiles_m * BM, 0], yb.index(side * BUFFERS))
    gdc_wait()
    turn = 0
    for i in range(_count(tiles_n * tiles_m, HELPED)):
        tile, begin, last, helps = _segment(i, tiles_n * tiles_m, steps, lent, HELPED)
        tile_n, tile_m = _place(tile, tiles_n, tiles_m, TOGETHER)
        if mine == 0:
            rn = gl.minimum(tile_n * WIDE + side * BN + gl.arange(0, BN, by_weight), N - 1)
            sv = gl.load(scale + rn)
            if ZERO:
                zv = gl.load(zero + rn)
            if EARLY:
                rm = gl.minimum(tile_m * BM + gl.arange(0, BM, by_token), M - 1)
                if ZERO:
                    tv = gl.load(total + rm)
                av = gl.load(a + rm)
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
                        held = gb.index(slot * (SIDES // PER) + side // PER)
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
                rb.index(slot).store(_as_lines(acc))
                mbarrier.arrive(given.index(slot))
            else:
                lines = _as_lines(acc)
                for source in gl.static_range(TURNS - 1):
                    slot = source * SIDES + side
                    mbarrier.wait(given.index(slot), i & 1)
                    lines += rb.index(slot).load(lines.type.layout)
                    mbarrier.arrive(taken.index(slot))
                acc = _as_tile(lines, BN, BM, layout)
        if mine == 0:
            finish = True
            if HELPED:
                PIECE: gl.constexpr = _piece(BN * BM // 512)
                place = gl.arange(0, BN * BM // 512, gl.SliceLayout(1, PIECE))[:, None] * 512
                place += gl.arange(0, 512, gl.SliceLayout(0, PIECE))[None, :]
                place += (tile * SIDES + side) * (BN * BM)
                lines = _as_lines(acc)
                finish = not helps
                if finish:
                    mbarrier.wait(there, 0)
                    lines += gl.load(sums + place, cache_modifier=".cg")
                else:
                    gl.store(sums + place, lines)
                    gl.thread_barrier()
                    gl.atomic_add(tickets + tile, 1, sem="release", scope="gpu")
                acc = _as_tile(lines, BN, BM, layout)
            if finish:
                for piece in gl.static_range(PIECES):
                    value = _tokens(acc, piece, PIECES, final).to(gl.float32)
                    m = tile_m * BM + piece * T
                    if not EARLY:
                        rm = gl.minimum(m + gl.arange(0, T, by_token), M - 1)
                        if ZERO:
                            tv = gl.load(total + rm)
                        av = gl.load(a + rm)
                    value = value * sv[:, None]
                    if ZERO:
                        value = value - zv[:, None] * tv.to(gl.float32)[None, :]
                    value = value * av[None, :]
                    if BIAS:
                        value = value + gl.load(bias + rn)[:, None]
                    tma.store_wait(BUFFERS - 1)
                    result = yb.index(side * BUFFERS + piece % BUFFERS)
                    result.permute((1, 0)).store(value.to(y.dtype))
                    fence_async_shared()
                    tma.async_copy_shared_to_global(y, [m, tile_n * WIDE + side * BN], result)
    if mine == 0:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "blocks", "lent"])
def hopper_kernel(
    x,  # int8 [M, K] in boxes [BM, 128]
    w,  # blocks as lines of 128 bytes, two rows of weights, in boxes [BN / 2, 128]; or int8 [N, K] in boxes [BN, 128]
    tail,  # blocks as bytes, in boxes of 256: the groups' parameters, read if GROUPED
    y,  # [M, N] in boxes [min(BM, 32), BN]
    a,  # fp32 [M]
    total,  # int32 [M], read if ZERO
    scale,  # fp32 [N]
    zero,  # fp32 [N], read if ZERO
    bias,  # fp32 [N], read if BIAS
    sums,  # int32 [tiles, SIDES, BN * BM] if HELPED: what a helper hands to the program of a tile
    tickets,  # int32 [tiles] if HELPED: how many sides of them are there; zero before and after
    M,
    N,
    blocks,  # blocks of 128 columns
    lent,  # steps of each tile that a helper takes, if HELPED
    BITS: gl.constexpr,
    GROUPED: gl.constexpr,
    ZERO: gl.constexpr,
    BIAS: gl.constexpr,
    HELPED: gl.constexpr,  # programs behind those of the tiles take a part of their K
    TOGETHER: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,  # weights of one group of warps
    SIDES: gl.constexpr,  # groups of warps with weights of their own
    TURNS: gl.constexpr,  # groups of warps that take turns with the same weights
    STEP: gl.constexpr,  # blocks of one stage
    STAGES: gl.constexpr,  # a multiple of TURNS
):
    """Parts of tiles [SIDES * BN, BM], one after the other."""
    TAILS: gl.constexpr = SIDES // (2 if BN == 64 and SIDES % 2 == 0 else 1)
    BUFFERS: gl.constexpr = 1 if y.block_type.shape[0] == BM else 2
    tiles_n = gl.cdiv(N, SIDES * BN)
    tiles_m = gl.cdiv(M, BM)
    wb = gl.allocate_shared_memory(gl.int8, [SIDES * STEP * STAGES] + w.block_type.shape, w.layout)
    xb = gl.allocate_shared_memory(gl.int8, [STEP * STAGES] + x.block_type.shape, x.layout)
    yb = gl.allocate_shared_memory(y.dtype, [SIDES * BUFFERS] + y.block_type.shape, y.layout)
    gb = wb
    if GROUPED:
        gb = gl.allocate_shared_memory(gl.uint8, [TAILS * STEP * STAGES] + tail.block_type.shape, tail.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    there = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.init(there, count=1)
    rb = wb
    given = full
    taken = full
    if TURNS > 1:
        OTHERS: gl.constexpr = (TURNS - 1) * SIDES
        rb = gl.allocate_shared_memory(
            gl.int32, [OTHERS, BN * BM // 512, 512], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        )
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
            (_multiply, (wb, xb, gb, yb, rb, full, empty, given, taken, there, y, a, total, scale, zero, bias, sums,
                         tickets, M, N, tiles_n, tiles_m, blocks, lent, BITS, STAGES, STEP, BM, BN, SIDES, TURNS,
                         GROUPED, ZERO, BIAS, HELPED, TOGETHER, 0)),
            (_multiply, (wb, xb, gb, yb, rb, full, empty, given, taken, there, y, a, total, scale, zero, bias, sums,
                         tickets, M, N, tiles_n, tiles_m, blocks, lent, BITS, STAGES, STEP, BM, BN, SIDES, TURNS,
                         GROUPED, ZERO, BIAS, HELPED, TOGETHER, 1)),
            (_fetch, (w, x, tail, wb, xb, gb, full, empty, ready, there, tickets, tiles_n, tiles_m, blocks, lent,
                      BITS, STAGES, STEP, BM, BN, SIDES, TURNS, GROUPED, HELPED, TOGETHER)),
        ], [4, 1], [216, 24])  # fmt: skip
    elif SIDES * TURNS == 3:
        gl.warp_specialize([
            (_multiply, (wb, xb, gb, yb, rb, full, empty, given, taken, there, y, a, total, scale, zero, bias, sums,
                         tickets, M, N, tiles_n, tiles_m, blocks, lent, BITS, STAGES, STEP, BM, BN, SIDES, TURNS,
                         GROUPED, ZERO, BIAS, HELPED, TOGETHER, 0)),
            (_multiply, (wb, xb, gb, yb, rb, full, empty, given, taken, there, y, a, total, scale, zero, bias, sums,
                         tickets, M, N, tiles_n, tiles_m, blocks, lent, BITS, STAGES, STEP, BM, BN, SIDES, TURNS,
                         GROUPED, ZERO, BIAS, HELPED, TOGETHER, 1)),
            (_multiply, (wb, xb, gb, yb, rb, full, empty, given, taken, there, y, a, total, scale, zero, bias, sums,
                         tickets, M, N, tiles_n, tiles_m, blocks, lent, BITS, STAGES, STEP, BM, BN, SIDES, TURNS,
                         GROUPED, ZERO, BIAS, HELPED, TOGETHER, 2)),
            (_fetch, (w, x, tail, wb, xb, gb, full, empty, ready, there, tickets, tiles_n, tiles_m, blocks, lent,
                      BITS, STAGES, STEP, BM, BN, SIDES, TURNS, GROUPED, HELPED, TOGETHER)),
        ], [4, 4, 1], [152, 152, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (wb, xb, gb, yb, rb, full, empty, given, taken, there, y, a, total, scale, zero, bias, sums,
                         tickets, M, N, tiles_n, tiles_m, blocks, lent, BITS, STAGES, STEP, BM, BN, SIDES, TURNS,
                         GROUPED, ZERO, BIAS, HELPED, TOGETHER, 0)),
            (_multiply, (wb, xb, gb, yb, rb, full, empty, given, taken, there, y, a, total, scale, zero, bias, sums,
                         tickets, M, N, tiles_n, tiles_m, blocks, lent, BITS, STAGES, STEP, BM, BN, SIDES, TURNS,
                         GROUPED, ZERO, BIAS, HELPED, TOGETHER, 1)),
            (_multiply, (wb, xb, gb, yb, rb, full, empty, given, taken, there, y, a, total, scale, zero, bias, sums,
                         tickets, M, N, tiles_n, tiles_m, blocks, lent, BITS, STAGES, STEP, BM, BN, SIDES, TURNS,
                         GROUPED, ZERO, BIAS, HELPED, TOGETHER, 2)),
            (_multiply, (wb, xb, gb, yb, rb, full, empty, given, taken, there, y, a, total, scale, zero, bias, sums,
                         tickets, M, N, tiles_n, tiles_m, blocks, lent, BITS, STAGES, STEP, BM, BN, SIDES, TURNS,
                         GROUPED, ZERO, BIAS, HELPED, TOGETHER, 3)),
            (_fetch, (w, x, tail, wb, xb, gb, full, empty, ready, there, tickets, tiles_n, tiles_m, blocks, lent,
                      BITS, STAGES, STEP, BM, BN, SIDES, TURNS, GROUPED, HELPED, TOGETHER)),
        ], [4, 4, 4, 1], [112, 112, 112, 24])  # fmt: skip


ELEMENTS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
"""Gluon's names of the outputs' dtypes."""


FINISHED = 32
"""Tokens whose results are finished, and sent off, at once."""

HAND = 8
"""Blocks of 128 columns that a program multiplies while another one hands over its sums."""


@functools.cache
def tickets(device: torch.device) -> Tensor:
    """Return the counts of a card's tiles: zero before and after every launch, which follow each other."""
    return torch.zeros(processors(), dtype=torch.int32, device=device)


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
    tile = fitted(tile, y.element_size(), bits=bits, grouped=grouped)
    flat = w.view(torch.int8) if bits == 8 else w.view(torch.int8).view(-1, SIDE)
    programs, borrowed, sums = min(sms, tiles), 0, total
    if tile.split > 1:
        borrowed = lent(tiles, ceil_div(blocks, tile.step), tile.step, sms)
    if borrowed:
        programs = min(sms, 2 * tiles)
        sums = torch.empty(tiles * tile.weights * bm, dtype=torch.int32, device=x.device)
    hopper_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [bm, SIDE], _layout(bm, SIDE, gl.int8)),
        TensorDescriptor.from_tensor(flat, [lines, SIDE], _layout(lines, SIDE, gl.int8)),
        TensorDescriptor.from_tensor(w.view(torch.uint8).view(-1), [256], gl.NVMMASharedLayout(0, 8, rank=1)),
        TensorDescriptor.from_tensor(y, [min(bm, FINISHED), bn], _layout(min(bm, FINISHED), bn, ELEMENTS[y.dtype])),
        a, total, scale, zero, bias, sums, tickets(x.device), m, n, blocks, borrowed,
        **constants(tile, bits=bits, grouped=grouped, zero=has_zero, bias=has_bias, helped=borrowed > 0),
        num_warps=4, enable_fp_fusion=False, launch_pdl=True,
    )  # fmt: skip


def lent(tiles: int, steps: int, step: int, sms: int) -> int:
    """Return how many steps of each tile helpers take; 0 where there are too few of them: one per two tiles.

    All programs must run at once, because those of the tiles wait for their helpers.
    """
    helpers = min(sms, 2 * tiles) - tiles
    if helpers <= 0:
        return 0
    turns = ceil_div(tiles, helpers)
    return max(0, steps - turns * ceil_div(HAND, step)) // (turns + 1) if turns <= 2 else 0


def fitted(tile: Tile, element: int, *, bits: int, grouped: bool) -> Tile:
    """Return a tile with as many stages as shared memory holds beside results of so many bytes each.

    A stage belongs to one of the groups that take turns: another one would wait for a phase that looks complete.
    """
    turns = groups(tile)[1]
    others, stage = _bytes(tile, element, bits=bits, grouped=grouped)
    return replace(tile, stages=min(tile.stages, (SHARED_BYTES[90] - others) // stage) // turns * turns)


def _bytes(tile: Tile, element: int, *, bits: int, grouped: bool) -> tuple[int, int]:
    """Return the shared memory of a program without its stages, and that of one stage."""
    bm, (sides, turns) = tile.tokens, groups(tile)
    tails = sides // 2 if tile.weights == 64 * sides and sides % 2 == 0 else sides
    block = bm * SIDE + tile.weights * SIDE * bits // 8 + (256 * tails if grouped else 0)
    others = tile.weights * (bm * (turns - 1) * 4 + min(bm, 2 * FINISHED) * element)
    return others + 2048, block * tile.step  # barriers and alignment take the 2 KiB


def constants(tile: Tile, *, bits: int, grouped: bool, zero: bool, bias: bool, helped: bool) -> dict[str, Any]:
    """Return what `hopper_kernel` is compiled for."""
    sides, turns = groups(tile)
    return {
        "BITS": bits, "GROUPED": grouped, "ZERO": zero, "BIAS": bias, "HELPED": helped,
        "TOGETHER": tile.order, "BM": tile.tokens, "BN": tile.weights // sides, "SIDES": sides,
        "TURNS": turns, "STEP": tile.step, "STAGES": tile.stages,
    }  # fmt: skip


def groups(tile: Tile) -> tuple[int, int]:
    """Return how many groups of four warps have weights of their own, and how many take turns with the same ones."""
    count = (tile.warps - 1) // 4
    sides = min(count, tile.weights // 64)
    return sides, count // sides


def boxes(tile: Tile, element: str, *, bits: int) -> dict[str, str]:
    """Return the types of the kernel's copied arguments for a dtype of y, "fp16" or "bf16"."""
    bm, bn, bs = tile.tokens, tile.weights // groups(tile)[0], min(tile.tokens, FINISHED)
    lines = bn if bits == 8 else bn // 2
    of = {"fp16": gl.float16, "bf16": gl.bfloat16, "fp32": gl.float32}[element]
    return {
        "x": f"tensordesc<i8[{bm}, {SIDE}],{_layout(bm, SIDE, gl.int8)!r}>",
        "w": f"tensordesc<i8[{lines}, {SIDE}],{_layout(lines, SIDE, gl.int8)!r}>",
        "tail": f"tensordesc<u8[256],{gl.NVMMASharedLayout(0, 8, rank=1)!r}>",
        "y": f"tensordesc<{element}[{bs}, {bn}],{_layout(bs, bn, of)!r}>",
    }


@functools.cache
def _layout(rows: int, columns: int, element: Any) -> Any:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], element)
