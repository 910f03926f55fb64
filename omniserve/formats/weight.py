"""What a weight precision is: stored tensors in a logical layout, and what `bind` makes of them for a device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.base.numbers import align_up
from omniserve.ops.act import Act, ActFormat, Int8


@dataclass(frozen=True, slots=True)
class Field:
    """One stored tensor: its shape and dtype; `also` names other dtypes that readers accept."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    also: tuple[torch.dtype, ...] = ()


class Weight(Protocol):
    """One linear's parameters in one precision, bound for a device. Immutable."""

    @property
    def wants(self) -> ActFormat:
        """The format of the linear's input."""

    @property
    def shape(self) -> tuple[int, int]:
        """Real sizes N, K: padding is invisible from outside."""

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""

    def gemm(self, x: Act) -> Tensor:
        """Return x @ w.T + bias: x [T, K] in format `wants`, result [T, N] in x.dtype.

        The epilogue is fp32, fp64 if x.dtype is.
        """

    def gate_up_silu(self, x: Act, wants: ActFormat) -> Act:
        """Return silu(gate) * up of a fused gate|up weight, in the format its consumer wants: [T, N // 2].

        The product is in the model's dtype, as of every linear; what follows is fp32 (fp64), and int8 codes are taken
        from values that were not rounded in between.
        """


class Head(Protocol):
    """The projection to logits. Immutable."""

    @property
    def wants(self) -> ActFormat:
        """The format of its input."""

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""

    def logits(self, x: Act) -> Tensor:
        """Return x @ w.T: x [S, C] in format `wants`, result [S, V] in fp32 (fp64 if x.dtype is), rounded once.

        In bf16 a logit of 20 could only be told from one that is 0.125 smaller.
        """


class HeadFormat(Protocol):
    """A format that the projection to logits may have."""

    @property
    def wants(self) -> ActFormat:
        """The format of its input."""

    def from_dense(self, w: Tensor) -> dict[str, Tensor]:
        """Return the stored tensors nearest to w [V, C] of any float dtype. Raises CheckpointError."""

    def bind(self, t: Mapping[str, Tensor], *, bias: Tensor | None, dtype: torch.dtype, align: int = 1) -> Head:
        """Return the projection as its device wants it, as `WeightFormat.bind` does."""


class WeightFormat(Protocol):
    """One weight precision: what is stored, and how it becomes a `Weight`."""

    @property
    def name(self) -> str:
        """The name in a checkpoint's config, for instance `w4a8-g128`."""

    @property
    def wants(self) -> ActFormat:
        """The activations that bound weights of this format take."""

    def fields(self, n: int, k: int) -> dict[str, Field]:
        """Return the stored tensors of a linear [N, K] by name. Raises CheckpointError if the format cannot hold it."""

    def from_dense(self, w: Tensor) -> dict[str, Tensor]:
        """Return the stored tensors nearest to w [N, K] of any float dtype. Raises CheckpointError."""

    def dense(self, t: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights [N, K] that the stored tensors mean, computed in `dtype`: exact in float64."""

    def concat(self, tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the stored tensors of linears with the same input, stacked along N (q|k|v, gate|up)."""

    def bind(self, t: Mapping[str, Tensor], *, bias: Tensor | None, dtype: torch.dtype, align: int = 1) -> Weight:
        """Return the weight as its device wants it.

        bias   [N] or None
        dtype  the model's: of weights that are not quantized; float64 keeps scales and bias in float64
        align  N and K are padded with zeros to multiples of it; results stay those of the real sizes, exactly
        Raises CheckpointError naming a tensor that is missing or has another shape or dtype than `fields` says.
        """


def check(form: WeightFormat, t: Mapping[str, Tensor], n: int, k: int) -> None:
    """Raise CheckpointError unless the tensors are those of a linear [N, K] in this format, none more, none less."""
    fields = form.fields(n, k)
    missing, surplus = sorted(fields.keys() - t.keys()), sorted(t.keys() - fields.keys())
    if missing or surplus:
        words = [f"without {', '.join(missing)}"] * bool(missing) + [f"with unknown {', '.join(surplus)}"] * bool(
            surplus
        )
        raise CheckpointError(f"a {form.name} weight {' and '.join(words)}: it has {', '.join(fields)}")
    for name, field in fields.items():
        if tuple(t[name].shape) != field.shape or t[name].dtype not in (field.dtype, *field.also):
            raise CheckpointError(
                f"{name} of a {form.name} weight is {_short(t[name].dtype)} {list(t[name].shape)}; "
                f"expected {_short(field.dtype)} {list(field.shape)}"
            )


def stored(t: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the matrix `name`, which tells a linear's size. Raises CheckpointError if it is no matrix."""
    if name not in t or t[name].dim() != 2:
        raise CheckpointError(f"a quantized weight has no matrix {name!r}: it has {', '.join(t) or 'no tensors'}")
    return t[name]


def concat(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack stored tensors along N. Every parameter is per row, so that dimension 0 is right for all of them."""
    names = tensors[0].keys()
    assert all(t.keys() == names for t in tensors), f"concat: tensors {[sorted(t) for t in tensors]} differ"
    return {name: torch.cat([t[name] for t in tensors]) for name in names}


def need_finite(scale: Tensor) -> None:
    """Raise CheckpointError if a scale is NaN or infinite: then the weights were, or they overflow the stored dtype."""
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError("the weights hold NaN, infinity or values too large for their scales to be stored")


def exact(dtype: torch.dtype) -> torch.dtype:
    """Return the type that epilogues of a model in `dtype` compute in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def padded(x: Tensor, to: tuple[int, ...]) -> Tensor:
    """Return x with zeros appended until its shape is `to`; x itself if it already is."""
    extra = [size - have for have, size in zip(x.shape, to, strict=True)]
    if not any(extra):
        return x
    return torch.nn.functional.pad(x, [pad for size in reversed(extra) for pad in (0, size)])


def aligned(shape: tuple[int, int], align: int) -> tuple[int, int]:
    """Return both sizes rounded up to multiples of `align`."""
    return align_up(shape[0], align), align_up(shape[1], align)


def vector(x: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Return a parameter per row [N] as [1, n]: padded with zeros, in the epilogue's type."""
    return padded(x.to(exact(dtype)), (n,))[None]


def codes_of(x: Act, columns: int, *, padded_to: int) -> Int8:
    """Return int8 activations [T, K], their codes with zeros appended up to the weight's padded columns."""
    assert isinstance(x, Int8), f"gemm: x is {type(x).__name__}; expected Int8"
    assert x.codes.shape[1] == columns, f"gemm: x.codes is {list(x.codes.shape)}; expected [T, {columns}]"
    if padded_to == columns:
        return x
    return Int8(padded(x.codes, (x.codes.shape[0], padded_to)), x.scale, x.sum, x.dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
