"""Activations in the format that the next linear wants."""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from omniserve.ops.dispatch import operation


class ActFormat(Enum):
    """How a consumer wants its input.

    PLAIN: the model's dtype; INT8: codes and one scale per token; INT8_SUM: also the sum of the codes; BOTH, BOTH_SUM:
    plain and int8, for a 16-bit router beside int8 experts.
    """

    PLAIN = "plain"
    INT8 = "int8"
    INT8_SUM = "int8+sum"
    BOTH = "plain, int8"
    BOTH_SUM = "plain, int8+sum"

    @property
    def with_plain(self) -> "ActFormat":
        """This format and the plain one beside it."""
        return {ActFormat.INT8: ActFormat.BOTH, ActFormat.INT8_SUM: ActFormat.BOTH_SUM}.get(self, self)

    @property
    def sums(self) -> bool:
        """True if the sums of the codes are wanted."""
        return self in (ActFormat.INT8_SUM, ActFormat.BOTH_SUM)


@dataclass(frozen=True, slots=True)
class Plain:
    """Activations in the model's dtype: x [T, K]."""

    x: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.x.dtype


@dataclass(frozen=True, slots=True)
class Int8:
    """Quantized activations: x = codes * scale.

    codes  int8 [T, K]
    scale  fp32 [T, 1]
    sum    int32 [T, 1]: sum of a token's codes, or None if nobody asked for it
    dtype  the model's dtype, which products are returned in
    """

    codes: Tensor
    scale: Tensor
    sum: Tensor | None
    dtype: torch.dtype

    def of(self, dtype: torch.dtype) -> "Int8":
        """Return the same codes for a model of another dtype."""
        return Int8(self.codes, self.scale, self.sum, dtype)


@dataclass(frozen=True, slots=True)
class Both:
    """The same activations twice: plain for one consumer, int8 for another."""

    plain: Plain
    int8: Int8

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.plain.dtype


Act = Plain | Int8 | Both

FLOOR = 1e-6
"""Smallest maximum of a token that sets a scale: an all-zero token gets codes 0 and a positive scale."""


@operation
def quantize(x: Tensor, wants: ActFormat) -> Act:
    """Return x [T, K] in the wanted format.

    int8: per token, symmetric: s = max(amax, 1e-6) / 127 in fp32, codes = clamp(rne(x / s), -127, 127), from the
    values as given (no cast before). Source: formats.md section 6 (QServe, arXiv 2405.04532, with the scale kept
    in fp32 and the codes taken from that scale).
    """
    if wants is ActFormat.PLAIN:
        return Plain(x)
    exact = x if x.dtype == torch.float64 else x.float()
    amax = exact.abs().amax(-1, keepdim=True).clamp_(min=FLOOR)
    scale = amax.div_(torch.full_like(amax, 127)).float()  # by a number, a GPU multiplies with its rounded reciprocal
    codes = (exact / scale).round_().clamp_(-127, 127).to(torch.int8)
    total = codes.sum(-1, keepdim=True, dtype=torch.int32) if wants.sums else None
    int8 = Int8(codes, scale, total, x.dtype)
    return Both(Plain(x), int8) if wants in (ActFormat.BOTH, ActFormat.BOTH_SUM) else int8


def emit(y: Tensor, wants: ActFormat, dtype: torch.dtype) -> Act:
    """Return values y [T, K] that an epilogue holds in fp32 (fp64) as activations of a model in `dtype`.

    int8 codes come from y itself, before any cast.
    """
    act = quantize(y, wants)
    if act.dtype == dtype:
        return act
    if isinstance(act, Both):
        return Both(Plain(act.plain.x.to(dtype)), act.int8.of(dtype))
    return Plain(act.x.to(dtype)) if isinstance(act, Plain) else act.of(dtype)
