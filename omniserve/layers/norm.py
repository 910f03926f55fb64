"""The norm before a sublayer."""

from dataclasses import dataclass

from torch import Tensor

from omniserve.ops.act import Act, ActFormat
from omniserve.ops.norm import add_norm


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm with the residual addition before it. weight [C]."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor, delta: Tensor | None, wants: ActFormat) -> tuple[Act, Tensor]:
        """Return (norm(x + delta) in format `wants`, x + delta); x, delta [T, C]."""
        return add_norm(x, delta, self.weight, self.eps, wants)
