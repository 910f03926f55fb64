"""Which heads of a model retrieve: a policy that looks on while the model reads passkeys, and says who looked at them.

The measure: of a head's attention at the positions that must repeat a passkey, the share that falls on the passkey
itself, far outside of sink and window. A key head has the share of the query head that has most of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.base.spec import ModelSpec
from omniserve.base.types import PAGE
from omniserve.ops.batch import Batch
from omniserve.ops.pages import HeadGroup, PageStore
from omniserve.sparsity.policy import Dense


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A text that ends with a repeated passkey.

    ids     its tokens
    span    positions of the passkey in the text
    asking  positions from which the repeated passkey's tokens are predicted
    """

    ids: Sequence[int]
    span: range
    asking: range


class Probe(Dense):
    """Dense attention that notes, per layer and key head, how much of it falls on a passkey. Mutable, a measurement.

    One request at a time runs through it, prefix caching off.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._spec = spec
        self._sample: Sample | None = None
        self._sums = torch.zeros(spec.layers, spec.kv_heads, dtype=torch.float64)
        self._queries = 0

    def expect(self, sample: Sample) -> None:
        """Say what the request that runs next asks for."""
        self._sample = sample
        self._queries += len(sample.asking)

    def values(self) -> tuple[tuple[float, ...], ...]:
        """Return the mean share of each layer's key heads, in [0, 1]."""
        shares = self._sums / max(self._queries, 1)
        return tuple(tuple(line) for line in shares.clamp(0, 1).tolist())

    def groups(self, layer: int, q: Tensor, stores: tuple[PageStore, ...], batch: Batch) -> tuple[HeadGroup, ...]:
        """Return dense attention, and note what the sample's asking positions look at."""
        if self._sample is not None:
            asking = self._sample.asking
            at = ((batch.positions >= asking.start) & (batch.positions < asking.stop)).nonzero()[:, 0]
            if at.numel():
                self._note(layer, q[at], batch.positions[at], stores[0], batch)
        return super().groups(layer, q, stores, batch)

    def _note(self, layer: int, q: Tensor, positions: Tensor, store: PageStore, batch: Batch) -> None:
        assert self._sample is not None
        last = int(positions.max()) + 1
        k, _ = store.read(batch.tables[0][batch.slots[:1], : ceil_div(last, PAGE)], torch.float32)
        k = k[0, :, :last]  # [H, S, D]
        query = q.float().view(len(q), store.heads, -1, q.shape[-1])
        scores = torch.einsum("thgd,hsd->thgs", query, k) * self._spec.head_dim**-0.5
        hidden = torch.arange(last, device=k.device) > positions[:, None]
        shares = torch.softmax(scores.masked_fill(hidden[:, None, None], float("-inf")), -1)
        span = self._sample.span
        on_key = shares[..., span.start : span.stop].sum(-1)  # [t, H, G]
        self._sums[layer] += on_key.amax(2).sum(0).double().cpu()
