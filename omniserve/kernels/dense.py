"""Products of 16-bit matrices that give a token the same bits whatever else is in the batch: y^T = w x^T.

Every tile adds up K in one order, in fp32, and no tile splits it; weights are the first operand, as in `linear.py`, so
that one token and thousands use the same tensor-core instruction. cuBLAS promises neither.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.formats.w16a16 import gemm_w16a16
from omniserve.kernels.device import OUTPUTS, architecture, kernel_of, need, processors
from omniserve.kernels.tiles import Tile

STEP = 64
"""Columns that a tile's `step` counts."""


LARGE = (
    (Tile(64, 64, 2, 4, 4), 16),
    (Tile(128, 64, 1, 4, 5), 22),
    (Tile(128, 128, 1, 8, 4), 29),
    (Tile(256, 128, 1, 8, 3), 48),
)
"""Tiles for more than 64 tokens, and microseconds that a round of them takes on an H200 with K = 4,096."""


EXACT = (Tile(16, 64, 1, 4, 3), Tile(64, 64, 1, 4, 3))
"""Tiles of fp32, for up to 16 tokens and for more: one step for all, since sums are added up step by step."""


def choose_dense(tokens: int, rows: int, *, arch: int, sms: int) -> Tile:
    """Return the tile for T tokens and N weights; on 9.0 measured on an H200 at the sizes of Llama-3-8B."""
    if arch != 90:
        return Tile(16, 64, 2, 4, 3) if tokens <= 16 else Tile(64, 64, 1, 4, 3)
    wide = rows >= 16384
    if tokens <= 16:
        return Tile(16, 128 if wide else 64, 2, 4, 5)
    if tokens <= 64:
        return Tile(64, 128, 1, 4, 6) if wide else Tile(64, 64, 2, 4, 4)

    def cost(choice: tuple[Tile, int]) -> int:
        tile, us = choice
        return ceil_div(ceil_div(tokens, tile.tokens) * ceil_div(rows, tile.weights), sms) * us

    return min((one for one in LARGE if one[0].tokens < 2 * tokens), key=cost)[0]


@triton.jit
def dense_kernel(
    x,  # [M, K], rows `x_stride` apart
    w,  # [N, K]
    bias,  # [N], read if BIAS
    y,  # [M, N]
    M,
    N,
    K,
    x_stride,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,  # K is a multiple of BK
    TOGETHER: tl.constexpr,  # tiles of tokens that follow each other on one panel of weights
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile of the product."""
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BN)
    tiles_m = tl.cdiv(M, BM)
    band = pid // (TOGETHER * tiles_n)
    high = tl.minimum(tiles_m - band * TOGETHER, TOGETHER)
    inside = pid % (TOGETHER * tiles_n)
    rm = (band * TOGETHER + inside % high) * BM + tl.arange(0, BM)
    rn = inside // high * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    xp = x + tl.where(rm < M, rm, 0).to(tl.int64)[:, None] * x_stride + rk[None, :]
    wp = w + tl.where(rn < N, rn, 0).to(tl.int64)[:, None] * K + rk[None, :]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for k in range(0, K, BK):
        if EVEN:
            tokens, weights = tl.load(xp + k), tl.load(wp + k)
        else:
            tokens = tl.load(xp + k, mask=(k + rk < K)[None, :], other=0.0)
            weights = tl.load(wp + k, mask=(k + rk < K)[None, :], other=0.0)
        if weights.dtype == tl.float32:
            # The sum of each step, then the sum of steps: the error of one chain over all of K is several times that.
            # Without the last argument, which means nothing here, the compiler would make one chain of them again.
            acc += tl.dot(weights, tokens.T, input_precision="ieee", max_num_imprecise_acc=1)
        else:
            acc = tl.dot(weights, tokens.T, acc)
    if BIAS:
        acc += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    place = y + rm.to(tl.int64)[None, :] * N + rn[:, None]
    tl.store(place, acc.to(y.dtype.element_ty), mask=(rn < N)[:, None] & (rm < M)[None, :])


def constants(tile: Tile, *, bias: bool, columns: int) -> dict[str, Any]:
    """Return what `dense_kernel` is compiled for."""
    step = tile.step * STEP
    return {
        "BIAS": bias, "EVEN": columns % step == 0, "TOGETHER": 8, "BM": tile.tokens, "BN": tile.weights, "BK": step,
    }  # fmt: skip


def dense(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype, tile: Tile | None = None) -> Tensor:
    """Return x @ w.T + bias [T, N] in `dtype`; the tile is chosen unless it is given.

    It changes no bit of 16-bit products; in fp32 its step does.
    """
    need(
        x.dtype == w.dtype and x.dtype in OUTPUTS and dtype in OUTPUTS,
        f"a GPU product of {x.dtype} with {w.dtype} to {dtype}: float16, bfloat16 and float32 are there",
    )
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    if not m:
        return y
    x, w = x if x.stride(1) == 1 else x.contiguous(), w.contiguous()
    if tile is None:
        exact = x.dtype == torch.float32
        tile = EXACT[m > 16] if exact else choose_dense(m, n, arch=architecture(), sms=processors())
    dense_kernel[(ceil_div(m, tile.tokens) * ceil_div(n, tile.weights),)](
        x, w, w if bias is None else bias.contiguous(), y, m, n, k, x.stride(0),
        **constants(tile, bias=bias is not None, columns=k), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


@kernel_of(gemm_w16a16)
def gemm_w16a16_triton(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One launch."""
    return dense(x, w, bias, dtype)
