"""8-bit weights, symmetric, one scale per row; and the int8 product that 4-bit weights in groups share on the CPU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.formats.weight import (
    Field,
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


@operation
def gemm_w8a8(x: Tensor, a: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return y[m, n] = acc[m, n] * scale[n] * a[m] + bias[n] in `dtype`, acc = x @ w.T exactly in int32.

    x     int8 [T, K] codes of the activations; a fp32 [T, 1] their scales
    w     int8 [N, K]; scale, bias fp32 or fp64 [1, N]
    The epilogue is fp32, fp64 if `dtype` is. Source: formats.md section 6.
    """
    y = int_matmul(x, w).to(exact(dtype)).mul_(scale).mul_(a)
    return (y if bias is None else y.add_(bias)).to(dtype)


TOP = 127
"""Largest code; -127..127 are used."""


def snap(x: Tensor, scale: Tensor, zero: Tensor | float, low: float, top: float) -> Tensor:
    """Return the codes clip(rne((x + zero) / scale), low, top) in the dtype of x: how every weight grid rounds."""
    return (x + zero).div_(scale).round_().clamp_(low, top)


def symmetric_scale(w: Tensor, ratio: float = 1.0) -> Tensor:
    """Return the scale [..., 1] of rows w [..., K]: ratio * amax / 127 in fp32; a row of zeros gets scale 1."""
    scale = w.abs().amax(-1, keepdim=True).mul_(ratio).div_(TOP).float()
    return scale.masked_fill_(scale == 0, 1)


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A linear of int8 codes with one scale per row, one byte per weight.

    codes  int8 [N, K] with padding; scale, bias fp32 or fp64 [1, N] with padding; shape without padding
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    shape: tuple[int, int]

    @property
    def wants(self) -> ActFormat:
        """Codes and one scale per token."""
        return ActFormat.INT8

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self.codes.nbytes + self.scale.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def gemm(self, x: Act) -> Tensor:
        """Return x @ w.T + bias [T, N] in x.dtype; x [T, K] int8."""
        return self._product(x, x.dtype)

    def logits(self, x: Act) -> Tensor:
        """Return x @ w.T + bias [T, N] in fp32 (fp64); x [T, K] int8."""
        return self._product(x, exact(x.dtype))

    def gate_up_silu(self, x: Act, wants: ActFormat) -> Act:
        """Return silu(gate) * up [T, N // 2] in the wanted format."""
        return swiglu(self.gemm(x), wants, x.dtype)

    def _product(self, x: Act, dtype: torch.dtype) -> Tensor:
        rows, columns = self.codes.shape
        act = codes_of(x, self.shape[1], padded_to=columns)
        y = gemm_w8a8(act.codes, act.scale, self.codes, self.scale, self.bias, dtype)
        return y[:, : self.shape[0]] if rows > self.shape[0] else y


def bind_int8(codes: Tensor, scale: Tensor, *, bias: Tensor | None, dtype: torch.dtype, align: int) -> Int8Weight:
    """Return the weight of int8 codes [N, K] and scales [N], padded with zeros to multiples of `align`."""
    n, k = codes.shape
    rows, columns = aligned((n, k), align)
    return Int8Weight(
        padded(codes, (rows, columns)).contiguous(),
        vector(scale, rows, dtype),
        None if bias is None else vector(bias, rows, dtype),
        (n, k),
    )


@dataclass(frozen=True, slots=True)
class W8A8:
    """w = codes * scale, codes -127..127."""

    name: str = "w8a8"
    wants: ActFormat = ActFormat.INT8

    def fields(self, n: int, k: int) -> dict[str, Field]:
        """Return the stored tensors of a linear [N, K]. Scales are fp32: an fp16 scale would be off by 2^-12."""
        return {
            "codes": Field((n, k), torch.int8),
            "scale": Field((n,), torch.float32, (torch.float16,)),
        }

    def from_dense(self, w: Tensor) -> dict[str, Tensor]:
        """Return w [N, K] rounded to nearest: scale = amax / 127 per row in fp32, codes = rne(w / scale).

        A row of zeros gets scale 1. Raises CheckpointError if w holds NaN or infinity or is no matrix.
        """
        if w.dim() != 2:
            raise CheckpointError(f"a weight has shape {list(w.shape)}; expected [N, K]")
        wide = w.float()
        scale = symmetric_scale(wide)
        need_finite(scale)
        return self.from_codes(snap(wide, scale, 0.0, -TOP, TOP), scale[:, 0])

    def from_codes(self, codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Return the stored tensors of codes -127..127 [N, K], of any dtype, and scales [N].

        Raises CheckpointError unless scales are positive finite numbers.
        """
        need_finite(scale)
        if not bool((scale > 0).all()):
            raise CheckpointError("a scale of w8a8 weights is not positive")
        return {"codes": codes.to(torch.int8), "scale": scale.float()}

    def dense(self, t: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return codes * scale [N, K]."""
        return t["codes"].to(dtype) * t["scale"].to(dtype)[:, None]

    def concat(self, tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Stack linears along N."""
        return concat(tensors)

    def bind(self, t: Mapping[str, Tensor], *, bias: Tensor | None, dtype: torch.dtype, align: int = 1) -> Int8Weight:
        """Return the weight with its codes as they are stored."""
        check(self, t, *stored(t, "codes").shape)
        return bind_int8(t["codes"], t["scale"], bias=bias, dtype=dtype, align=align)
