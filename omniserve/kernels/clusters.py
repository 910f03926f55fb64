"""Integer products of few tokens on compute capability 9.0 by `clusters.cu`, in CUDA C++.

Two things that Gluon does not have make it faster than `few.py`: programs of a cluster store sums straight into each
other's shared memory, where a barrier counts their bytes, so that adding up the parts of K costs a few hundred
nanoseconds instead of a way through memory; and a warp that fetches on its own, so that no copy waits for those that
multiply. Bits are those of every other kernel: integer sums, and the epilogue of `linear.py`, nothing fused.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.formats.blocks import BLOCK_BYTES, CODE_BYTES, SIDE
from omniserve.kernels.cuda import LINE, Kernel, compiler, kernel, tensor_map
from omniserve.kernels.tiles import Tile

SOURCE = Path(__file__).with_name("clusters.cu")

ARCH = "sm_90a"

TOKENS = (8, 16, 32, 64, 128)
"""Tokens of a tile."""

OUTPUTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@functools.cache
def available() -> bool:
    """True if there is a compiler for the kernel."""
    return compiler() is not None


def turns(tile: Tile) -> int:
    """Return how many groups of warps take turns with the same weights; one more warp fetches."""
    return (tile.warps - 1) // 4 // (tile.weights // 64)


def constants(tile: Tile, dtype: torch.dtype, *, grouped: bool, zero: bool, bias: bool) -> dict[str, int]:
    """Return what the kernel is compiled for."""
    return {
        "BM": tile.tokens, "BN": tile.weights, "CK": tile.split, "TURNS": turns(tile), "STEP": tile.step,
        "STAGES": tile.stages, "GROUPED": grouped, "ZERO": zero, "BIAS": bias, "OUT": OUTPUTS[dtype],
        "PROGRAMS": tile.programs,
    }  # fmt: skip


def shared_bytes(tile: Tile, dtype: torch.dtype, *, grouped: bool) -> int:
    """Return a program's dynamic shared memory: stages, whose place sums and results take, and what it is given."""
    octets, threads = tile.tokens // 8, tile.weights * 2
    most = ceil_div(octets, tile.split * turns(tile))
    panels = max(tile.weights // SIDE, 1)
    stage = tile.step * (tile.weights * SIDE // 2 + tile.tokens * SIDE + (2 * SIDE * panels if grouped else 0))
    exchanged = turns(tile) * octets * threads * 16 if turns(tile) > 1 else 0
    results = turns(tile) * most * 8 * (tile.weights * dtype.itemsize + 16)
    given = turns(tile) * most * (tile.split - 1) * threads * 16
    return 1024 + max(tile.stages * stage, exchanged + results) + given


def static_bytes(tile: Tile) -> int:
    """Return its static shared memory: barriers, and scale and sum of each token."""
    return 8 * (2 * tile.stages + turns(tile)) + 8 * tile.tokens


def source(tokens: int) -> str:
    """Return the source for tiles of so many tokens.

    The instruction names the registers of its sums one by one, so `multiply` is written here.
    """
    count = tokens // 2
    sums = ", ".join(f"%{at}" for at in range(count))
    held = ", ".join(f'"+r"(d[{at}])' for at in range(count))
    weights = ", ".join(f"%{count + at}" for at in range(4))
    multiply = (
        f"__device__ __forceinline__ void multiply(int (&d)[{count}], const u32 (&a)[4], u64 b) {{\n"
        f'  asm volatile("wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.s8.s8 {{{sums}}}, {{{weights}}}, '
        f'%{count + 4}, 1;"\n    : {held} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));\n}}\n'
    )
    return SOURCE.read_text().replace("// multiply\n", multiply)


@functools.cache
def _kernel(tile: Tile, dtype: torch.dtype, grouped: bool, zero: bool, bias: bool, device: int) -> Kernel:
    return kernel(
        source(tile.tokens), ARCH, "product", constants(tile, dtype, grouped=grouped, zero=zero, bias=bias),
        threads=tile.warps * 32, cluster=tile.split, shared=shared_bytes(tile, dtype, grouped=grouped),
    )  # fmt: skip


def launch(
    x: Tensor, a: Tensor, total: Tensor, w: Tensor, scale: Tensor, zero: Tensor, bias: Tensor, y: Tensor,
    tile: Tile, *, grouped: bool, has_zero: bool, has_bias: bool,
) -> None:  # fmt: skip
    """Write the product into y; arguments are those of `linear.gemm_kernel`, `tile` one of language "cuda"."""
    (m, k), n = x.shape, scale.shape[0]
    if x.stride(0) % 16 or x.stride(1) != 1 or x.data_ptr() % 16:
        x = x.contiguous()
    height = min(tile.weights, SIDE) // 2
    arguments = (
        tensor_map(x.data_ptr(), m, k, x.stride(0), tile.tokens),
        tensor_map(w.data_ptr(), w.numel() // LINE, LINE, LINE, height),
        w, y, a, total, scale, zero, bias, m, n, ceil_div(k, SIDE),
    )  # fmt: skip
    assert w.shape[2] == (BLOCK_BYTES if grouped else CODE_BYTES), w.shape
    clusters = ceil_div(m, tile.tokens) * ceil_div(n, tile.weights)
    _kernel(tile, y.dtype, grouped, has_zero, has_bias, x.device.index or 0)(clusters, arguments)
