"""The gated feed-forward part of a layer."""

from dataclasses import dataclass

from torch import Tensor

from omniserve.formats.weight import Weight
from omniserve.ops.act import Act, ActFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class MLP:
    """down(silu(gate) * up). gate_up: fused gate|up weight [2F, C]; down: [C, F]."""

    gate_up: Weight
    down: Weight

    @property
    def wants(self) -> ActFormat:
        """The format of this layer's input."""
        return self.gate_up.wants

    def __call__(self, a: Act) -> Tensor:
        """a [T, C] in self.wants. Returns [T, C]."""
        return self.down.gemm(self.gate_up.gate_up_silu(a, self.down.wants))
