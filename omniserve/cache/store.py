"""The memory of the KV pages: one tensor per head group for all layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from omniserve.base.spec import ModelSpec
from omniserve.formats.kv import KVFormat, LayerPages


class KVStore:
    """Pages of one head group, all layers: uint8 [L, pages, H, bytes]. Mutable memory.

    scales, key_means: of each layer, [2, H] for a static format and [H, D] if the checkpoint has them
    pages   how many fit into `memory_bytes`
    layers  per layer, the typed views that attention writes and reads
    """

    def __init__(
        self,
        kv: KVFormat,
        spec: ModelSpec,
        *,
        memory_bytes: int,
        scales: Sequence[Tensor] | None,
        device: torch.device,
        key_means: Sequence[Tensor] | None = None,
    ) -> None:
        page_bytes = kv.page_bytes(spec.head_dim)
        self.pages = memory_bytes // (page_bytes * spec.kv_heads * spec.layers)
        shape = (spec.layers, self.pages, spec.kv_heads, page_bytes)
        self.memory = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.layers = tuple(
            LayerPages(
                self.memory[layer],
                kv,
                spec.head_dim,
                None if scales is None else scales[layer].to(device),
                None if key_means is None else key_means[layer].to(device),
            )
            for layer in range(spec.layers)
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the pages take."""
        return self.memory.nbytes
