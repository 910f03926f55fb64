"""Which heads of a model need the whole context: a policy that looks on while the model reads.

Two measures, since they name different heads. *Passkeys*: of a head's attention at the positions that must repeat a
passkey, the share that falls on the passkey itself, far outside of sink and window; a key head has the share of the
query head that has most of it. *Prose*: how much the output of attention changes in plain text if the head sees sink
and window alone.
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

SINK, LOCAL = 128, 256
"""The window that prose is looked at through: the flags' defaults."""
WINDOW = 2048
"""Latest tokens that the heads found are to see at produced positions, so that plain text goes on as under dense
attention: half of the heads with a window of 256 cost 5 % and more of perplexity (docs/accuracy.md)."""
EVERY = 32
"""Of so many positions of prose one is looked at."""

Values = tuple[tuple[float, ...], ...]
"""A number for each key head, by layer."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Prose:
    """Plain text, looked at from the position `start` on."""

    ids: Sequence[int]
    start: int


class Probe(Dense):
    """Dense attention that notes, per layer and key head, what it looks at. Mutable, a measurement.

    One request at a time runs through it, prefix caching off.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._scale = spec.head_dim**-0.5
        self._sample: Sample | Prose | None = None
        self._shares, self._changes = (torch.zeros(spec.layers, spec.kv_heads, dtype=torch.float64) for _ in range(2))
        self._queries, self._looks = 0, 0

    def expect(self, sample: Sample | Prose) -> None:
        """Say what the request that runs next is."""
        self._sample = sample
        if isinstance(sample, Sample):
            self._queries += len(sample.asking)
        else:
            self._looks += len(range(sample.start, len(sample.ids), EVERY))

    def passkeys(self) -> Values:
        """Return the mean share of attention on passkeys, in [0, 1]."""
        return _lines(self._shares / max(self._queries, 1))

    def prose(self) -> Values:
        """Return the mean change of a layer's attention in prose, of its squared norm, when the key head streams."""
        return _lines(self._changes / max(self._looks, 1))

    def groups(self, layer: int, q: Tensor, stores: tuple[PageStore, ...], batch: Batch) -> tuple[HeadGroup, ...]:
        """Return dense attention, and note what the sample's positions look at."""
        if self._sample is not None:  # steps that a GPU captures before the first sample have none
            at = self._looking(batch.positions).nonzero()[:, 0]
            if at.numel():
                self._note(layer, q[at], batch.positions[at], stores[0], batch)
        return super().groups(layer, q, stores, batch)

    def _looking(self, positions: Tensor) -> Tensor:
        """Return which positions of a step are looked at, bool [T]."""
        if isinstance(self._sample, Sample):
            return (positions >= self._sample.asking.start) & (positions < self._sample.asking.stop)
        assert self._sample is not None
        return (positions >= self._sample.start) & ((positions - self._sample.start) % EVERY == 0)

    def _note(self, layer: int, q: Tensor, positions: Tensor, store: PageStore, batch: Batch) -> None:
        last = int(positions.max()) + 1
        k, v = store.read(batch.tables[0][batch.slots[:1], : ceil_div(last, PAGE)], torch.float32)
        k, v = k[0, :, :last], v[0, :, :last]  # [H, S, D]
        query = q.float().view(len(q), store.heads, -1, q.shape[-1])
        scores = torch.einsum("thgd,hsd->thgs", query, k) * self._scale
        key = torch.arange(last, device=k.device)
        scores = scores.masked_fill((key > positions[:, None])[:, None, None], float("-inf"))
        shares = torch.softmax(scores, -1)
        if isinstance(self._sample, Sample):
            span = self._sample.span
            on_key = shares[..., span.start : span.stop].sum(-1)  # [t, H, G]
            self._shares[layer] += on_key.amax(2).sum(0).double().cpu()
            return
        far = (key >= SINK) & (key <= positions[:, None] - LOCAL)
        near = torch.softmax(scores.masked_fill(far[:, None, None], float("-inf")), -1)
        whole, lost = (torch.einsum("thgs,hsd->thgd", p, v).square().sum((2, 3)) for p in (shares, shares - near))
        self._changes[layer] += (lost / whole.sum(1, keepdim=True)).sum(0).double().cpu()


def _lines(values: Tensor) -> Values:
    return tuple(tuple(line) for line in values.clamp(0, 1).tolist())


def merged(*measures: Values) -> Values:
    """Return for each key head a number in (0, 1] by its place in the measure that ranks it highest.

    A split at any share then takes as many heads from the top of each measure; their mean place decides among equals.
    """
    places = [_places(values) for values in measures]
    total = len(places[0])
    found = []
    for layer, line in enumerate(measures[0]):
        of = [[place[layer, head] for place in places] for head in range(len(line))]
        found.append(tuple(1 - (min(each) + sum(each) / len(each) / total / 10) / (total + 1) for each in of))
    return tuple(found)


def _places(values: Values) -> dict[tuple[int, int], int]:
    """Return (layer, head) -> place, the largest value first, among equals the first by layer and head."""
    flat = sorted((-value, layer, head) for layer, line in enumerate(values) for head, value in enumerate(line))
    return {(layer, head): place for place, (_, layer, head) in enumerate(flat)}
