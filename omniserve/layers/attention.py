"""Self-attention over pages, for every precision, KV format and kind of sparsity."""

from dataclasses import dataclass

from torch import Tensor

from omniserve.formats.weight import Weight
from omniserve.ops.act import Act, ActFormat, quantize
from omniserve.ops.batch import Batch
from omniserve.ops.pages import PageStore, attend, rope_write
from omniserve.ops.rope import Rope
from omniserve.sparsity.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """qkv projection, rotation and page write, attention, output projection.

    layer: its number; qkv: fused q|k|v weight, its heads as the policy sorts them
    out: output projection; heads Hq and head_dim D of this rank.
    """

    layer: int
    qkv: Weight
    out: Weight
    rope: Rope
    policy: Policy
    heads: int
    head_dim: int

    @property
    def wants(self) -> ActFormat:
        """The format of this layer's input."""
        return self.qkv.wants

    def __call__(self, a: Act, batch: Batch, stores: tuple[PageStore, ...]) -> Tensor:
        """a [T, C] in self.wants. Returns [T, C]; the caller adds it to the residual stream."""
        qkv = self.qkv.gemm(a)
        qkv = qkv.view(qkv.shape[0], -1, self.head_dim)
        q = rope_write(qkv, batch.positions, batch.write_slots, stores, self.rope, self.heads)
        out = batch.work.out[: q.shape[0]]
        groups = self.policy.groups(self.layer, q, stores, batch)
        attend(q, groups, batch.rows, out, batch.work, scale=self.head_dim**-0.5)
        return self.out.gemm(quantize(out.flatten(1), self.out.wants))
