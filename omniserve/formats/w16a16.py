"""Weights that are not quantized: the model's dtype on both sides."""

import functools
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.formats.weight import (
    Field,
    aligned,
    check,
    concat,
    exact,
    padded,
    stored,
)
from omniserve.ops.act import Act, ActFormat, Plain
from omniserve.ops.dispatch import implements, operation
from omniserve.ops.glu import swiglu

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

PACK_FOR = 64
"""Tokens that oneDNN is told to expect: from 2 on every number gives the one layout that is fast for all batches."""


@operation
def gemm_w16a16(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x @ w.T + bias [T, N] in `dtype`, summed in fp32 (fp64) and rounded once.

    x [T, K], w [N, K] (plain or as `pack` returns it) and bias [N] of one dtype, which is `dtype` or a narrower one
    """
    w = w.to_dense() if w.is_mkldnn else w
    return torch.nn.functional.linear(x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype))


@functools.cache
def onednn_works() -> bool:
    """True if oneDNN multiplies fp32 matrices here, packed and plain, as `linear` does.

    The two calls are those of PyTorch's own compiler; they are no public interface, so they are tried first. On an AMD
    EPYC with two cores they take 0.3 to 0.5 of the time of `linear`, which is MKL's: 8 x 576 x 3072 in 76 us instead
    of 264, 1 x 576 x 49152 in 1.9 ms instead of 6.6.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch has no types here
        return False
    try:
        w = torch.linspace(-1, 1, 48 * 80).view(48, 80).sin_()
        packed = torch.ops.mkldnn._reorder_linear_weight(w, PACK_FOR)
        return torch.equal(packed.to_dense(), w) and all(
            torch.allclose(_onednn(x, form, None), torch.nn.functional.linear(x, w), atol=1e-5, rtol=1e-5)
            for x in (w[:1].cos(), w[:9].cos())
            for form in (packed, w)
        )
    except (AttributeError, RuntimeError):
        return False


def pack(w: Tensor) -> Tensor:
    """Return w [N, K] as this CPU multiplies it fastest: repacked by oneDNN, or w itself."""
    if w.device.type == "cpu" and w.dtype == torch.float32 and onednn_works():
        return torch.ops.mkldnn._reorder_linear_weight(w, PACK_FOR)  # type: ignore[no-any-return]  # untyped operator
    return w.contiguous()


@implements(gemm_w16a16, device="cpu", when=onednn_works)
def gemm_w16a16_onednn(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """oneDNN for fp32 matrices, where it passed its self-test."""
    if w.dtype == torch.float32 == dtype:
        return _onednn(x, w, bias)
    return gemm_w16a16.reference(x, w, bias, dtype)


def _onednn(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")  # type: ignore[no-any-return]  # untyped


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A linear in the model's dtype.

    weight  [N, K] with padding, packed; bias [N] with padding, or None; shape without padding
    """

    weight: Tensor
    bias: Tensor | None
    shape: tuple[int, int]

    @property
    def wants(self) -> ActFormat:
        """Activations in the model's dtype."""
        return ActFormat.PLAIN

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def gemm(self, x: Act) -> Tensor:
        """Return x @ w.T + bias [T, N]; x [T, K] in the model's dtype."""
        return self._product(x, x.dtype)

    def logits(self, x: Act) -> Tensor:
        """Return x @ w.T + bias [T, N] in fp32 (fp64); x [T, K] in the model's dtype."""
        return self._product(x, exact(x.dtype))

    def _product(self, x: Act, dtype: torch.dtype) -> Tensor:
        n, k = self.shape
        assert isinstance(x, Plain), f"gemm: x is {type(x).__name__}; expected Plain"
        assert x.x.shape[1] == k, f"gemm: x is {list(x.x.shape)}; expected [T, {k}]"
        rows, columns = self.weight.shape
        y = gemm_w16a16(padded(x.x, (x.x.shape[0], columns)) if columns > k else x.x, self.weight, self.bias, dtype)
        return y[:, :n] if rows > n else y

    def gate_up_silu(self, x: Act, wants: ActFormat) -> Act:
        """Return silu(gate) * up [T, N // 2] in the wanted format, from the product in the model's dtype."""
        return swiglu(self.gemm(x), wants, x.dtype)


@dataclass(frozen=True, slots=True)
class W16A16:
    """The dense format: one tensor `weight` of any float dtype."""

    name: str = "w16a16"
    wants: ActFormat = ActFormat.PLAIN

    def fields(self, n: int, k: int) -> dict[str, Field]:
        """Return the stored tensor of a linear [N, K]."""
        return {"weight": Field((n, k), torch.bfloat16, FLOATS)}

    def from_dense(self, w: Tensor) -> dict[str, Tensor]:
        """Return w [N, K], as it is. Raises CheckpointError if it is no matrix of floats."""
        if w.dim() != 2 or w.dtype not in FLOATS:
            raise CheckpointError(f"a weight is {w.dtype} {list(w.shape)}; expected a matrix of floats")
        return {"weight": w}

    def dense(self, t: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights [N, K]."""
        return t["weight"].to(dtype)

    def concat(self, tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Stack linears along N."""
        return concat(tensors)

    def bind(self, t: Mapping[str, Tensor], *, bias: Tensor | None, dtype: torch.dtype, align: int = 1) -> DenseWeight:
        """Return the weight in the model's dtype, packed for the device; on the CPU no second copy stays."""
        n, k = stored(t, "weight").shape
        check(self, t, n, k)
        rows, columns = aligned((n, k), align)
        weight = pack(padded(t["weight"].to(dtype), (rows, columns)))
        return DenseWeight(weight, None if bias is None else padded(bias.to(dtype), (rows,)), (n, k))
