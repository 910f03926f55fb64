"""The memory of the KV pages: one allocation per head group for all layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from omniserve.base.types import PAGE
from omniserve.formats.kv import LOGICAL, KVFormat, LayerPages


class KVStore:
    """Pages of one head group, all layers. Mutable memory.

    A page number is one page in every layer; layers may have different numbers of heads of the kind, even none.
    layers  per layer, the typed views that attention writes and reads
    """

    def __init__(
        self,
        kv: KVFormat,
        heads: Sequence[int],
        head_dim: int,
        *,
        pages: int,
        statistics: bool,
        scales: Sequence[Tensor] | None,
        device: torch.device,
        key_means: Sequence[Tensor] | None = None,
    ) -> None:
        """Allocate.

        heads              key heads of this kind, by layer
        statistics         keep smallest and largest keys of logical pages
        scales, key_means  of each layer's heads of this kind, [2, H] for a static format and [H, D] if there are any
        """
        self.pages = pages
        page_bytes = kv.page_bytes(head_dim)
        self.memory = torch.zeros(pages * sum(heads) * page_bytes, dtype=torch.uint8, device=device)
        bounds = PAGE // LOGICAL * 2 * head_dim if statistics else 0
        self.statistics = torch.zeros(pages * sum(heads) * bounds, dtype=torch.float16, device=device)
        layers = []
        first = 0
        for layer, count in enumerate(heads):
            span = slice(first * pages, (first + count) * pages)
            parts = slice(*(end * PAGE // LOGICAL for end in (span.start, span.stop)))
            first += count
            layers.append(
                LayerPages(
                    self.memory.view(-1, page_bytes)[span].view(pages, count, page_bytes),
                    kv,
                    head_dim,
                    None if scales is None else scales[layer].to(device),
                    None if key_means is None else key_means[layer].to(device),
                    self.statistics.view(-1, 2, head_dim)[parts].view(pages, count, PAGE // LOGICAL, 2, head_dim)
                    if statistics
                    else None,
                )
            )
        self.layers = tuple(layers)

    @property
    def nbytes(self) -> int:
        """Bytes that the pages take, with their statistics."""
        return self.memory.nbytes + self.statistics.nbytes
