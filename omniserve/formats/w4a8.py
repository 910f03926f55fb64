"""4-bit weights: one scale per row, or progressive with a second, integer scale per group of 128 columns.

Zeros are scaled zeros, subtracted after the scale is applied. Level-1 values of the grouped form stay within ±119 and
the range of every group includes 0: then all 16 codes of every group decode into int8, whatever chose them
(qoq.md sections 0 and 2).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.base.numbers import ceil_div
from omniserve.formats.blocks import SIDE, pack_blocks, unpack_blocks
from omniserve.formats.w8a8 import bind_int8, gemm_w8a8, snap
from omniserve.formats.weight import (
    Field,
    Weight,
    aligned,
    check,
    codes_of,
    concat,
    exact,
    need_finite,
    padded,
    stored,
    vector,
)
from omniserve.ops.act import Act, ActFormat
from omniserve.ops.dispatch import operation
from omniserve.ops.glu import swiglu
from omniserve.ops.integer import int_matmul

GROUP = SIDE
"""Columns that share a second-level scale: 128, a block's side."""

PROTECTED = 119
"""Largest level-1 value of the grouped form. 120 is too much: code 15 of a group (-112.5, 120) decodes to 128."""

RATIOS = tuple(1 - step / 20 for step in range(11))
"""Shares of a range that the clip search tries: 1, .95, ..., .5."""

SMALLEST = 2.0**-24
"""The smallest positive fp16: floor of stored scales."""

TOP = 15
"""Largest code; 0..15 are used."""

STEEPEST = 17
"""Largest scale of a group: 15 * 17 = 255."""

CHUNK = 2**18
"""Weights that the clip search handles at once: they and two temporaries stay in a core's cache."""

CHUNK_ON_GPU = 2**25
"""The same on a GPU: enough to keep all of it busy; they and their temporaries take half a GB."""


def pack_columns(codes: Tensor) -> Tensor:
    """Return codes 0..15 [N, K], K even, as bytes uint8 [N, K / 2]: even k in the low nibble, odd k in the high one."""
    wide = codes.to(torch.uint8)
    return wide[:, 0::2] | (wide[:, 1::2] << 4)


def unpack_columns(packed: Tensor) -> Tensor:
    """Return the codes uint8 [N, K] of bytes [N, K / 2]; the inverse of `pack_columns`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def expand(codes: Tensor, group_scale: Tensor, group_zero: Tensor) -> Tensor:
    """Return the level-1 values codes * group_scale - group_zero as int8 [N, K].

    codes uint8 [N, K]; group_scale, group_zero uint8 [N, ceil(K / 128)]
    Raises CheckpointError if a value is not in -128..127.
    """
    k = codes.shape[1]
    scale, zero = (p.to(torch.int16).repeat_interleave(GROUP, 1)[:, :k] for p in (group_scale, group_zero))
    wide = codes.to(torch.int16).mul_(scale).sub_(zero)
    if wide.numel() and (wide.amin() < -128 or wide.amax() > 127):
        raise CheckpointError("codes * group_scale - group_zero of a w4a8-g128 weight leave the range of int8")
    return wide.to(torch.int8)


def group_grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return (scale, zero) of groups whose level-1 values lie in low..high, low <= 0 <= high, both within ±119.

    scale = clip(rne((high - low) / 15), 1, 17), zero = rne(-low), whole numbers in the dtype of `low`. For every such
    range all codes 0..15 decode into -119..127. Source: qoq.md section 1, generation 2 with P = 119.
    """
    return ((high - low) / TOP).round_().clamp_(1, STEEPEST), (-low).round_()


def group_legal(scale: Tensor, zero: Tensor) -> Tensor:
    """Return where all codes of a group with this scale and zero, whole numbers, decode into int8 (bool)."""
    return (scale >= 1) & (scale <= STEEPEST) & (zero >= 0) & (zero <= 128) & (TOP * scale - zero <= 127)


def level1_scale(w: Tensor, ratio: float = 1.0) -> Tensor:
    """Return the row scales [N, 1] of the grouped form, fp16 values in the dtype of w: ratio * amax / 119."""
    return (w.abs().amax(1, keepdim=True) * (ratio / PROTECTED)).clamp_(min=SMALLEST).half().to(w.dtype)


def row_grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return (scale, zero) of rows whose weights lie in low..high: fp16 values in the dtype of `low`.

    scale = fp16((high - low) / 15), zero = fp16(-low). Source: qoq.md section 1, generation 2.
    """
    return ((high - low) / TOP).clamp_(min=SMALLEST).half().to(low.dtype), (-low).half().to(low.dtype)


Grid = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def nearest(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the codes clip(rne((x + zero) / scale), 0, 15) as uint8."""
    return snap(x, scale, zero, 0, TOP).to(torch.uint8)


def clip_search(x: Tensor, low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the (scale, zero) of each vector with the least squared rounding error, over `RATIOS` of its range.

    x  [..., g] vectors; low, high [..., 1] their ranges
    """
    scale, zero = grid(low, high)
    best = _error(x, scale, zero)
    for ratio in RATIOS[1:]:
        new_scale, new_zero = grid(low * ratio, high * ratio)
        error = _error(x, new_scale, new_zero)
        better = error < best
        scale, zero = torch.where(better, new_scale, scale), torch.where(better, new_zero, zero)
        best = torch.minimum(best, error)
    return scale, zero


def _error(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Root of the squared rounding error [..., 1]."""
    inverse = scale.reciprocal()
    exact_code = torch.addcmul(zero * inverse, x, inverse)
    miss = exact_code.round().clamp_(0, TOP).sub_(exact_code)
    norm: Tensor = torch.linalg.vector_norm(miss, dim=-1, keepdim=True)
    return norm.mul_(scale)


@operation
def gemm_w4a8_row(
    x: Tensor,
    a: Tensor,
    total: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return y[m, n] = acc[m, n] * scale[n] * a[m] - zero[n] * (a * total)[m] + bias[n] in `dtype`.

    x      int8 [T, K] codes of the activations; a fp32 [T, 1] their scales; total int32 [T, 1] the sums of their codes
    w      int8 [N, K] holding codes 0..15; scale, zero, bias fp32 or fp64 [1, N]
    acc = x @ w.T exactly in int32. The epilogue is fp32, fp64 if `dtype` is. Source: formats.md section 6.
    """
    wide = exact(dtype)
    y = int_matmul(x, w).to(wide).mul_(scale).addcmul_(zero, total.to(wide), value=-1).mul_(a)
    return (y if bias is None else y.add_(bias)).to(dtype)


@dataclass(frozen=True, slots=True)
class Uint4Weight:
    """A linear of codes 0..15 with scale and zero per row. On the CPU a code takes a byte.

    codes  int8 [N, K] with padding; scale, zero, bias fp32 or fp64 [1, N] with padding; shape without padding
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None
    shape: tuple[int, int]

    @property
    def wants(self) -> ActFormat:
        """Codes, one scale per token and the sum of its codes, which the zero is multiplied with."""
        return ActFormat.INT8_SUM

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        held = (self.codes, self.scale, self.zero, self.bias)
        return sum(t.nbytes for t in held if t is not None)

    def gemm(self, x: Act) -> Tensor:
        """Return x @ w.T + bias [T, N] in x.dtype; x [T, K] int8 with sums."""
        return self._product(x, x.dtype)

    def gate_up_silu(self, x: Act, wants: ActFormat) -> Act:
        """Return silu(gate) * up [T, N // 2] in the wanted format."""
        return swiglu(self.gemm(x), wants, x.dtype)

    def _product(self, x: Act, dtype: torch.dtype) -> Tensor:
        rows, columns = self.codes.shape
        act = codes_of(x, self.shape[1], padded_to=columns)
        assert act.sum is not None, "gemm: x has no sums; expected int8+sum"
        y = gemm_w4a8_row(act.codes, act.scale, act.sum, self.codes, self.scale, self.zero, self.bias, dtype)
        return y[:, : self.shape[0]] if rows > self.shape[0] else y


@operation
def gemm_w4a8_blocks(
    x: Tensor,
    a: Tensor,
    total: Tensor | None,
    blocks: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the product of `gemm_w4a8_row` (with total and zero) or `gemm_w8a8` (groups) of weights in blocks.

    blocks  uint8 [ceil(N / 128), ceil(K / 128), 8192 or 8448] as `pack_blocks` returns them
    scale, zero, bias  fp32 or fp64 [1, N], the real N; x int8 [T, K], the real K
    """
    shape = (scale.shape[1], x.shape[1])
    codes, group_scale, group_zero = unpack_blocks(blocks, shape)
    if zero is not None:
        assert total is not None, "gemm_w4a8_blocks: weights with a zero per row need the sums of the codes"
        return gemm_w4a8_row.reference(x, a, total, codes.view(torch.int8), scale, zero, bias, dtype)
    assert group_scale is not None and group_zero is not None, "gemm_w4a8_blocks: neither a zero per row nor groups"
    return gemm_w8a8.reference(x, a, expand(codes, group_scale, group_zero), scale, bias, dtype)


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """A linear of 4-bit codes as GPU kernels read them: two codes a byte, in blocks of 128 rows and columns.

    blocks  as `pack_blocks` returns them; scale, zero (per row only), bias fp32 or fp64 [1, N]; shape N, K
    """

    blocks: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    shape: tuple[int, int]

    @property
    def wants(self) -> ActFormat:
        """Sums of codes are wanted where the zero is per row."""
        return ActFormat.INT8 if self.zero is None else ActFormat.INT8_SUM

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(t.nbytes for t in (self.blocks, self.scale, self.zero, self.bias) if t is not None)

    def gemm(self, x: Act) -> Tensor:
        """Return x @ w.T + bias [T, N] in x.dtype; x [T, K] int8, with sums where the zero is per row."""
        return self._product(x, x.dtype)

    def gate_up_silu(self, x: Act, wants: ActFormat) -> Act:
        """Return silu(gate) * up [T, N // 2] in the wanted format."""
        return swiglu(self.gemm(x), wants, x.dtype)

    def _product(self, x: Act, dtype: torch.dtype) -> Tensor:
        act = codes_of(x, self.shape[1], padded_to=self.shape[1])
        return gemm_w4a8_blocks(act.codes, act.scale, act.sum, self.blocks, self.scale, self.zero, self.bias, dtype)


@dataclass(frozen=True, slots=True)
class W4A8:
    """4-bit weights, per row (group None) or progressive (group 128).

    group None   w = codes * scale - zero
    group 128    w = (codes * group_scale - group_zero) * scale
    """

    group: Literal[128] | None

    @property
    def name(self) -> str:
        """The name in a checkpoint's config."""
        return "w4a8-row" if self.group is None else "w4a8-g128"

    @property
    def wants(self) -> ActFormat:
        """Sums of codes are wanted where the zero is per row."""
        return ActFormat.INT8_SUM if self.group is None else ActFormat.INT8

    def fields(self, n: int, k: int) -> dict[str, Field]:
        """Return the stored tensors of a linear [N, K]. Raises CheckpointError if K is odd."""
        if k % 2:
            raise CheckpointError(f"a weight has {k} columns: 4-bit weights need an even number")
        row = Field((n,), torch.float16, (torch.float32,))
        codes = Field((n, k // 2), torch.uint8)
        if self.group is None:
            return {"codes": codes, "scale": row, "zero": row}
        per_group = Field((n, ceil_div(k, GROUP)), torch.uint8)
        return {"codes": codes, "scale": row, "group_scale": per_group, "group_zero": per_group}

    def from_dense(self, w: Tensor) -> dict[str, Tensor]:
        """Return w [N, K] rounded to nearest after a clip search (per row, or per group).

        Parameters are rounded to their stored types first, codes are taken from the rounded ones. A short last group
        is searched over its real columns. Raises CheckpointError if w holds NaN or infinity, or K is odd.
        """
        if w.dim() != 2:
            raise CheckpointError(f"a weight has shape {list(w.shape)}; expected [N, K]")
        self.fields(*w.shape)
        rows = max(1, (CHUNK if w.device.type == "cpu" else CHUNK_ON_GPU) // max(1, w.shape[1]))
        make = _row_form if self.group is None else _group_form
        with _one_thread():
            return concat([make(part.float()) for part in torch.split(w, rows)])

    def from_codes(self, codes: Tensor, scale: Tensor, zero: Tensor, level1: Tensor | None = None) -> dict[str, Tensor]:
        """Return the stored tensors of given codes 0..15 [N, K], of any dtype.

        per row   scale, zero [N, 1]: w = codes * scale - zero
        group 128 scale, zero [N, groups]: whole numbers; level1 [N, 1]: w = (codes * scale - zero) * level1
        Raises CheckpointError unless all are finite, scales positive and every code decodes into int8.
        """
        outer = scale if level1 is None else level1
        need_finite(scale + zero + outer)
        row = {"codes": pack_columns(codes), "scale": outer[:, 0].half()}
        if not bool((row["scale"] > 0).all()):
            raise CheckpointError(f"a scale of {self.name} weights is not positive")
        if level1 is None:
            return row | {"zero": zero[:, 0].half()}
        if not bool(group_legal(scale, zero).all()):
            raise CheckpointError("codes of a w4a8-g128 group decode to values that int8 cannot hold")
        return row | {"group_scale": scale.to(torch.uint8), "group_zero": zero.to(torch.uint8)}

    def dense(self, t: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights [N, K] that the stored tensors mean."""
        codes, scale = unpack_columns(t["codes"]), t["scale"].to(dtype)[:, None]
        if self.group is None:
            return codes.to(dtype) * scale - t["zero"].to(dtype)[:, None]
        return expand(codes, t["group_scale"], t["group_zero"]).to(dtype) * scale

    def concat(self, tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Stack linears along N."""
        return concat(tensors)

    def bind(self, t: Mapping[str, Tensor], *, bias: Tensor | None, dtype: torch.dtype, align: int = 1) -> Weight:
        """Return the weight as its device multiplies it.

        GPU: in blocks, two codes a byte. CPU: one byte per code; groups are expanded to int8, so that they multiply
        like w8a8.
        """
        n, half = stored(t, "codes").shape
        check(self, t, n, 2 * half)
        if t["codes"].device.type == "cuda":
            return self.bind_blocks(t, bias=bias, dtype=dtype)
        with _one_thread():
            codes = unpack_columns(t["codes"])
            level1 = None if self.group is None else expand(codes, t["group_scale"], t["group_zero"])
        if level1 is not None:
            return bind_int8(level1, t["scale"], bias=bias, dtype=dtype, align=align)
        rows, columns = aligned((n, 2 * half), align)
        return Uint4Weight(
            padded(codes.view(torch.int8), (rows, columns)).contiguous(),
            vector(t["scale"], rows, dtype),
            vector(t["zero"], rows, dtype),
            None if bias is None else vector(bias, rows, dtype),
            (n, 2 * half),
        )

    def bind_blocks(self, t: Mapping[str, Tensor], *, bias: Tensor | None, dtype: torch.dtype) -> BlockWeight:
        """Return the weight as GPU kernels multiply it. Raises CheckpointError if a code does not decode into int8."""
        codes = unpack_columns(t["codes"])
        group = (t["group_scale"], t["group_zero"]) if self.group is not None else None
        if group is not None:
            expand(codes, *group)  # raises where a decoded code would carry into its neighbour
        n, k = codes.shape
        return BlockWeight(
            pack_blocks(codes, *(group or ())),
            vector(t["scale"], n, dtype),
            vector(t["zero"], n, dtype) if group is None else None,
            None if bias is None else vector(bias, n, dtype),
            (n, k),
        )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread. The search is many operations of 30 us: two threads gain little on an idle machine, and
    waiting for each other made it ten times slower on a busy one (13 s instead of 1.3 for the weights of SmolLM2).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _row_form(w: Tensor) -> dict[str, Tensor]:
    """Stored tensors of some rows w fp32 [N, K], one scale and zero per row."""
    scale, zero = clip_search(w, w.amin(1, keepdim=True), w.amax(1, keepdim=True), row_grid)
    need_finite(scale + zero)
    codes = nearest(w, scale, zero)
    return {"codes": pack_columns(codes), "scale": scale[:, 0].half(), "zero": zero[:, 0].half()}


def _group_form(w: Tensor) -> dict[str, Tensor]:
    """Stored tensors of some rows w fp32 [N, K], progressive."""
    n, k = w.shape
    scale = level1_scale(w)
    need_finite(scale)
    level1 = (w / scale).clamp_(-PROTECTED, PROTECTED)
    whole = k // GROUP * GROUP
    groups = [level1[:, :whole].view(n, -1, GROUP)] if whole else []
    groups += [level1[:, whole:].view(n, 1, -1)] if k > whole else []
    codes, scales, zeros = [], [], []
    for u in groups:
        low, high = u.amin(-1, keepdim=True).clamp_(max=0), u.amax(-1, keepdim=True).clamp_(min=0)
        group_scale, group_zero = clip_search(u, low, high, group_grid)
        codes.append(nearest(u, group_scale, group_zero).view(n, -1))
        scales.append(group_scale[..., 0].to(torch.uint8))
        zeros.append(group_zero[..., 0].to(torch.uint8))
    return {
        "codes": pack_columns(torch.cat(codes, 1)),
        "scale": scale[:, 0].half(),
        "group_scale": torch.cat(scales, 1),
        "group_zero": torch.cat(zeros, 1),
    }
