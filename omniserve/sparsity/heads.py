"""Which key heads retrieve and which stream, and the order they are sorted into when weights load."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSplit:
    """The key heads of each layer, retrieval heads first, each kind in its old order.

    order      per layer: old number of the head at each place
    retrieval  per layer: how many lead
    The class belongs to the key head, hence to all query heads that read it.
    """

    order: tuple[tuple[int, ...], ...]
    retrieval: tuple[int, ...]

    @property
    def streaming(self) -> tuple[int, ...]:
        """Per layer, how many heads stream."""
        return tuple(len(order) - count for order, count in zip(self.order, self.retrieval, strict=True))

    def rows(self, layer: int, size: int) -> list[int] | None:
        """Return the old place of each row when heads of `size` rows are sorted; None where nothing moves."""
        order = self.order[layer]
        if list(order) == list(range(len(order))):
            return None
        return [head * size + row for head in order for row in range(size)]


def split(values: Sequence[Sequence[float]], sparsity: float) -> HeadSplit:
    """Return which heads retrieve when a share of all heads, over all layers, streams.

    Keeps n - ceil((n - 1) * sparsity) of n heads, those of the largest values; among equals the first by (layer, head).
    None is kept at a sparsity of 1. The count is that of LServe's quantile; there noise decides among equals.
    """
    ranked = sorted(
        ((-value, layer, head) for layer, line in enumerate(values) for head, value in enumerate(line)),
    )
    total = len(ranked)
    count = 0 if sparsity >= 1 else total - ceil((total - 1) * max(sparsity, 0.0))
    kept = {(layer, head) for _, layer, head in ranked[:count]}
    order, retrieval = [], []
    for layer, line in enumerate(values):
        leading = [head for head in range(len(line)) if (layer, head) in kept]
        order.append((*leading, *(head for head in range(len(line)) if (layer, head) not in kept)))
        retrieval.append(len(leading))
    return HeadSplit(order=tuple(order), retrieval=tuple(retrieval))
