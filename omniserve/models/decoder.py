"""The decoder-only transformer: one file for every family, precision, sparsity and device."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from omniserve.base.spec import ModelSpec
from omniserve.formats.weight import Head
from omniserve.layers.attention import Attention
from omniserve.layers.mlp import MLP
from omniserve.layers.moe import MoE
from omniserve.layers.norm import Norm
from omniserve.ops.batch import Batch
from omniserve.ops.pages import PageStore

LayerStores = Sequence[tuple[PageStore, ...]]
"""Per layer, the pages of each head group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One layer; no precision, no sparsity, no phase."""

    norm1: Norm
    attention: Attention
    norm2: Norm
    mlp: MLP | MoE

    def __call__(
        self, x: Tensor, delta: Tensor | None, batch: Batch, stores: tuple[PageStore, ...]
    ) -> tuple[Tensor, Tensor]:
        """x: residual stream [T, C]; delta: previous sublayer's output, added inside the norm. Returns (x, delta)."""
        a, x = self.norm1(x, delta, self.attention.wants)
        a, x = self.norm2(x, self.attention(a, batch, stores), self.mlp.wants)
        return x, self.mlp(a)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Embedding, layers, final norm and head. Immutable after load.

    embedding [V, C]; head: the projection to V logits; weight_bytes: what the parameters take in memory.
    """

    spec: ModelSpec
    embedding: Tensor
    blocks: tuple[Block, ...]
    norm: Norm
    head: Head
    weight_bytes: int

    def hidden(self, batch: Batch, stores: LayerStores) -> Tensor:
        """Return the residual stream after the last layer [T, C], before the final norm; writes the step's pages."""
        x, delta = self._through(batch, stores)
        return x + delta

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [S, V] of rows of the residual stream [S, C], fp32 (fp64 if the model is)."""
        normed, _ = self.norm(hidden, None, self.head.wants)
        return self.head.logits(normed)

    def produce(self, batch: Batch, stores: LayerStores) -> Tensor:
        """Return `logits` of `hidden` of all tokens, the last sum within the norm; writes the step's pages."""
        normed, _ = self.norm(*self._through(batch, stores), self.head.wants)
        return self.head.logits(normed)

    def _through(self, batch: Batch, stores: LayerStores) -> tuple[Tensor, Tensor]:
        """Return the residual stream before the last sublayer's output, and that output, each [T, C]."""
        x = self.embedding[batch.tokens]
        delta: Tensor | None = None
        for block, store in zip(self.blocks, stores, strict=True):
            x, delta = block(x, delta, batch, store)
        assert delta is not None, "a decoder has at least one layer"
        return x, delta
