"""Integer products of int8 activations with int8 or 4-bit weights: y^T = w x^T, weights as the first operand.

Weights that are the first operand go from registers into the tensor cores, so that 4-bit codes are unpacked in
registers and never return to shared memory. Sums are int32 and know no order: every tile shape and every split of K
gives the same bits, because all of them end in the one expression of `_epilogue`, compiled without fused
multiply-adds.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.formats.blocks import BLOCK_BYTES, SIDE
from omniserve.formats.w4a8 import gemm_w4a8_blocks
from omniserve.formats.w8a8 import gemm_w8a8
from omniserve.kernels import clusters
from omniserve.kernels.cuda import compiler, version
from omniserve.kernels.device import GLUON, INTERPRETED, OUTPUTS, architecture, kernel_of, need, processors
from omniserve.kernels.tiles import Tile, choose, default

if triton.__version__ in GLUON:
    from omniserve.kernels import few, hopper

LONGEST = 2**31 // (128 * 128)
"""Columns whose sums of int8 products stay inside int32."""


@triton.jit
def _low(p, ASM: tl.constexpr):
    """Return the low nibbles of packed bytes, four at a time."""
    if ASM:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x0f0f0f0f;", "=r,r", [p], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return (p & 0xF).to(tl.int8)


@triton.jit
def _high(p, ASM: tl.constexpr):
    """Return the high nibbles of packed bytes, four at a time."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0f0f0f0f; }",
            "=r,r",
            [p],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return ((p >> 4) & 0xF).to(tl.int8)


@triton.jit
def _second_level(q, scale, offset, ASM: tl.constexpr):
    """Return q * scale + offset - 128 as int8: one multiply-add and one xor for four weights.

    scale holds the number, offset the byte 128 - zero (asm: four times in a word). No byte carries into the next,
    because every code that is there gives 0..255 before the xor: `bind` checks it.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; mad.lo.u32 t, $1, $2, $6; xor.b32 $0, t, 0x80808080; }",
            "=r,r,r,r,r,r,r,r,r,r",
            [q, scale, offset],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return (q.to(tl.int32) * scale + (offset & 0xFF) - 128).to(tl.int8)


@triton.jit
def _epilogue(acc, a, total, scale, zero, bias, ZERO: tl.constexpr, BIAS: tl.constexpr):
    """Return (acc * scale - zero * total) * a + bias: the order of the reference, each operation rounded."""
    y = acc.to(tl.float32) * scale
    if ZERO:
        y = y - zero * total.to(tl.float32)
    y = y * a
    if BIAS:
        y = y + bias
    return y


@triton.jit(do_not_specialize=["M", "blocks", "each"])
def gemm_kernel(
    x,  # int8 [M, K], rows `x_stride` apart
    a,  # fp32 [M]
    total,  # int32 [M], read if ZERO
    w,  # uint8 blocks (BITS = 4), or int8 [N, K] (BITS = 8)
    scale,  # fp32 [N]
    zero,  # fp32 [N], read if ZERO
    bias,  # fp32 [N], read if BIAS
    y,  # [M, N], or int32 [SPLIT, M, N] partial sums if SPLIT > 1
    M,
    N,
    K,
    x_stride,
    blocks,  # blocks of 128 columns
    each,  # blocks of one part of the split
    BITS: tl.constexpr,
    GROUPED: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,  # K is a multiple of 128
    SPLIT: tl.constexpr,
    TOGETHER: tl.constexpr,  # tiles of tokens that follow each other on one panel of weights
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEP: tl.constexpr,
    BYTES: tl.constexpr,  # of a block
    ASM: tl.constexpr,
):
    """One tile of the product, or of one part of its sum; the loop runs over blocks of 128 columns."""
    HALF: tl.constexpr = 64
    CODES: tl.constexpr = 8192
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BN)
    tiles_m = tl.cdiv(M, BM)
    part = pid // (tiles_n * tiles_m)
    pid = pid % (tiles_n * tiles_m)
    band = pid // (TOGETHER * tiles_n)
    high = tl.minimum(tiles_m - band * TOGETHER, TOGETHER)
    inside = pid % (TOGETHER * tiles_n)
    tile_m = band * TOGETHER + inside % high
    tile_n = inside // high

    rm = tile_m * BM + tl.arange(0, BM)
    rn = tile_n * BN + tl.arange(0, BN)
    rk = tl.arange(0, HALF)
    row = tl.where(rm < M, rm, 0).to(tl.int64)
    xp = x + row[:, None] * x_stride + rk[None, :]
    first = part * each
    last = tl.minimum(first + each, blocks)
    if BITS == 8:
        weight = tl.where(rn < N, rn, 0).to(tl.int64)
        wp = w + weight[:, None] * K + rk[None, :]
    else:
        panel = (tile_n * BN) // 128
        within = (tile_n * BN) % 128 + tl.arange(0, BN)
        base = w + panel.to(tl.int64) * blocks * BYTES
        wp = base + within[:, None] * HALF + rk[None, :]
        gp = base + CODES + within

    acc = tl.zeros((BN, BM), dtype=tl.int32)
    for turn in range(first, last, STEP):
        for inner in tl.static_range(STEP):
            block = turn + inner
            k = block * 128
            if EVEN:
                x0 = tl.load(xp + k)
                x1 = tl.load(xp + k + HALF)
            else:
                x0 = tl.load(xp + k, mask=(k + rk < K)[None, :], other=0)
                x1 = tl.load(xp + k + HALF, mask=(k + HALF + rk < K)[None, :], other=0)
            if BITS == 8:
                if EVEN:
                    w0 = tl.load(wp + k)
                    w1 = tl.load(wp + k + HALF)
                else:
                    w0 = tl.load(wp + k, mask=(k + rk < K)[None, :], other=0)
                    w1 = tl.load(wp + k + HALF, mask=(k + HALF + rk < K)[None, :], other=0)
            else:
                packed = tl.load(wp + block * BYTES)
                w0 = _low(packed, ASM)
                w1 = _high(packed, ASM)
                if GROUPED:
                    s = tl.load(gp + block * BYTES).to(tl.int32)
                    o = tl.load(gp + block * BYTES + 128).to(tl.int32)
                    if ASM:
                        o = o * 0x01010101
                    w0 = _second_level(w0, s[:, None], o[:, None], ASM)
                    w1 = _second_level(w1, s[:, None], o[:, None], ASM)
            acc = tl.dot(w0, x0.T, acc, out_dtype=tl.int32)
            acc = tl.dot(w1, x1.T, acc, out_dtype=tl.int32)

    inside_y = (rn < N)[:, None] & (rm < M)[None, :]
    if SPLIT > 1:
        place = (part.to(tl.int64) * M + rm[None, :]) * N + rn[:, None]
        tl.store(y + place, acc, mask=inside_y)
    else:
        here, there = rm < M, rn < N
        av = tl.load(a + rm, mask=here, other=0.0)[None, :]
        sv = tl.load(scale + rn, mask=there, other=0.0)[:, None]
        tv, zv, bv = av, sv, sv
        if ZERO:
            tv = tl.load(total + rm, mask=here, other=0)[None, :]
            zv = tl.load(zero + rn, mask=there, other=0.0)[:, None]
        if BIAS:
            bv = tl.load(bias + rn, mask=there, other=0.0)[:, None]
        value = _epilogue(acc, av, tv, sv, zv, bv, ZERO, BIAS)
        place = rm.to(tl.int64)[None, :] * N + rn[:, None]
        tl.store(y + place, value.to(y.dtype.element_ty), mask=inside_y)


@triton.jit(do_not_specialize=["M"])
def sum_kernel(
    sums,  # int32 [SPLIT, M, N]
    a,
    total,
    scale,
    zero,
    bias,
    y,  # [M, N]
    M,
    N,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
):
    """Add up the parts of a split and finish them: one program per token and BN weights."""
    m = tl.program_id(0)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    there = rn < N
    acc = tl.zeros((BN,), dtype=tl.int32)
    for part in range(SPLIT):
        acc += tl.load(sums + (part * M + m).to(tl.int64) * N + rn, mask=there, other=0)
    av = tl.load(a + m)
    sv = tl.load(scale + rn, mask=there, other=0.0)
    tv, zv, bv = m, sv, sv
    if ZERO:
        tv = tl.load(total + m)
        zv = tl.load(zero + rn, mask=there, other=0.0)
    if BIAS:
        bv = tl.load(bias + rn, mask=there, other=0.0)
    value = _epilogue(acc, av, tv, sv, zv, bv, ZERO, BIAS)
    tl.store(y + m.to(tl.int64) * N + rn, value.to(y.dtype.element_ty), mask=there)


FINISH = 256
"""Weights of one program of `sum_kernel`."""


def constants(tile: Tile, *, bits: int, grouped: bool, zero: bool, bias: bool, even: bool) -> dict[str, Any]:
    """Return what `gemm_kernel` is compiled for."""
    return {
        "BITS": bits, "GROUPED": grouped, "ZERO": zero, "BIAS": bias, "EVEN": even, "SPLIT": tile.split,
        "TOGETHER": tile.order, "BM": tile.tokens, "BN": tile.weights, "STEP": tile.step,
        "BYTES": BLOCK_BYTES if grouped else BLOCK_BYTES - 2 * SIDE, "ASM": not INTERPRETED,
    }  # fmt: skip


def product(
    x: Tensor,
    a: Tensor,
    total: Tensor | None,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """Return y [T, N] in `dtype`; w is int8 [N, K] or blocks uint8; `tile` is chosen unless it is given."""
    need(dtype in OUTPUTS, f"a GPU product in {dtype}: float16, bfloat16 and float32 are there")
    need(x.dtype == torch.int8 and x.dim() == 2, f"a GPU product of {x.dtype} {list(x.shape)}: x must be int8 [T, K]")
    (m, k), n = x.shape, scale.shape[-1]
    need(k <= LONGEST, f"a GPU product over {k} columns: int32 sums hold {LONGEST}")
    bits = 8 if w.dtype == torch.int8 else 4
    blocks = ceil_div(k, SIDE)
    if bits == 4:
        held = (w.shape[0] * SIDE, w.shape[1])
        assert held[0] >= n and held[1] == blocks and w.is_contiguous(), (held, n, k)
    else:
        assert w.shape == (n, k) and w.is_contiguous(), (w.shape, n, k)
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    if not m:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    parameters = [None if p is None else p.reshape(-1).contiguous() for p in (a, total, scale, zero, bias)]
    av, tv, sv, zv, bv = (parameters[0] if p is None else p for p in parameters)  # one that is not read stands in
    grouped = bits == 4 and w.shape[2] == BLOCK_BYTES
    kind = "w8a8" if bits == 8 else "g128" if grouped else "row"
    aligned = k % 16 == 0 and n * dtype.itemsize % 16 == 0  # rows of x and y, as copies of tiles need them
    cuda = aligned and architecture() == 90 and not INTERPRETED and clusters.available()
    tile = tile or choose(m, n, k, kind, arch=architecture(), sms=processors(), cuda=cuda)
    if tile.language == "cuda" and cuda:
        has = {"grouped": grouped, "has_zero": zero is not None, "has_bias": bias is not None}
        clusters.launch(x, av, tv, w, sv, zv, bv, y, tile, **has)
        return y
    if tile.language != "triton":
        if triton.__version__ in GLUON and not INTERPRETED and aligned and tile.language != "cuda":
            flags = {
                "bits": bits, "grouped": grouped, "has_zero": zero is not None, "has_bias": bias is not None,
            }  # fmt: skip
            if tile.language == "few":
                few.launch(x, av, tv, w, sv, zv, bv, y, tile, **flags)
            else:
                hopper.launch(x, av, tv, w, sv, zv, bv, y, tile, **flags, sms=processors())
            return y
        tile = default(m, n, k, kind, arch=architecture(), sms=processors())
    flags = constants(
        tile, bits=bits, grouped=grouped, zero=zero is not None, bias=bias is not None, even=k % SIDE == 0
    )
    sums = y if tile.split == 1 else torch.empty(tile.split, m, n, dtype=torch.int32, device=x.device)
    grid = (ceil_div(m, tile.tokens) * ceil_div(n, tile.weights) * tile.split,)
    gemm_kernel[grid](
        x, av, tv, w, sv, zv, bv, sums, m, n, k, x.stride(0), blocks, ceil_div(blocks, tile.split), **flags,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if tile.split > 1:
        sum_kernel[(m, ceil_div(n, FINISH))](
            sums, av, tv, sv, zv, bv, y, m, n, zero is not None, bias is not None, tile.split, FINISH,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return y


@kernel_of(gemm_w8a8)
def gemm_w8a8_triton(x: Tensor, a: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """int8 weights [N, K]."""
    return product(x, a, None, w, scale, None, bias, dtype)


def serving() -> str:
    """Return for people which kernels serve on this card: tables say which one for a product's size."""
    if architecture() != 90:
        return "gemm_kernel"
    gluon = triton.__version__ in GLUON
    library = compiler()
    few = (
        f"NVRTC {'.'.join(map(str, version(library)))}"
        if library
        else "no NVRTC is here: up to 128 tokens it is slower"
    )
    return f"{'few_kernel, hopper_kernel' if gluon else 'gemm_kernel'}; CUDA C++ by {few}"


@kernel_of(gemm_w4a8_blocks, inside=serving)
def gemm_w4a8_blocks_triton(
    x: Tensor,
    a: Tensor,
    total: Tensor | None,
    blocks: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """4-bit weights in blocks, per row or in groups."""
    return product(x, a, total, blocks, scale, zero, bias, dtype)
