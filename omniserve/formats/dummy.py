"""Random weights in the shape of a published model, for benchmarks: every output that shows them says so."""

import math
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from omniserve.base.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_COLUMNS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps",
)  # fmt: skip
_ROWS: dict[str, tuple[object, ...]] = {
    "tiny": ("llama", 512, 64, 160, 2, 4, 2, 2048, 10000.0, 1e-5),
    "llama-3-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, 8192, 500000.0, 1e-5),
    "llama-3-8b-1048k": ("llama", 128256, 4096, 14336, 32, 32, 8, 1048576, 3580165449.0, 1e-5),
    "llama-2-7b": ("llama", 32000, 4096, 11008, 32, 32, 32, 4096, 10000.0, 1e-5),
    "llama-2-13b": ("llama", 32000, 5120, 13824, 40, 40, 40, 4096, 10000.0, 1e-5),
    "llama-30b": ("llama", 32000, 6656, 17920, 60, 52, 52, 2048, 10000.0, 1e-6),
    "llama-2-70b": ("llama", 32000, 8192, 28672, 80, 64, 8, 4096, 10000.0, 1e-5),
    "mistral-7b": ("mistral", 32000, 4096, 14336, 32, 32, 8, 32768, 10000.0, 1e-5),
    "yi-34b": ("llama", 64000, 7168, 20480, 60, 56, 8, 4096, 5000000.0, 1e-5),
    "qwen1.5-72b": ("qwen2", 152064, 8192, 24576, 80, 64, 64, 32768, 1000000.0, 1e-6),
}
CONFIGS: dict[str, Mapping[str, object]] = {
    name: dict(zip(_COLUMNS, row, strict=True))
    | {"hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float16"}
    | ({"sliding_window": 4096} if name == "mistral-7b" else {})
    for name, row in _ROWS.items()
}
"""config.json of the published models, by `--shape`; `tiny` is nobody's."""

_POOL = 4_194_301
"""Random numbers that are drawn once; a prime, so that rows of a tensor begin at different ones."""


class DummySource:
    """A checkpoint that is made up as it is read: the same name gives the same tensor, always.

    Linears have a standard deviation of 1/sqrt(K), norms are 1: activations stay of order 1.

    label   what every output calls the model
    device  where its tensors are made: on a GPU those of 8 billion parameters take less than a second
    """

    def __init__(
        self,
        name: str,
        config: Mapping[str, object],
        shapes: Mapping[str, tuple[int, ...]],
        device: "torch.device | str" = "cpu",
    ) -> None:
        self.label = f"{name} (dummy weights)"
        self.path = Path(self.label)
        self._config = config
        self._shapes = dict(shapes)
        self._device = device

    @cached_property
    def _pools(self) -> "dict[int, Tensor]":
        """Random numbers by the columns of the tensors that are filled with them; drawn alike for every device."""
        import torch

        pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).to(self._device)
        columns = {shape[-1] for shape in self._shapes.values()}
        return {count: (pool * count**-0.5).half() for count in columns}

    @property
    def config(self) -> Mapping[str, object]:
        """The published model's numbers."""
        return self._config

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        if name not in self._shapes:
            raise CheckpointError(f"{self.label}: tensor {name!r} is missing")
        return self._shapes[name]

    def dtype(self, name: str) -> "torch.dtype":
        """float16."""
        import torch

        self.shape(name)
        return torch.float16

    def tensor(self, name: str) -> "Tensor":
        """Return one tensor: a window of an endless repetition of the pool, scaled."""
        import torch

        shape = self.shape(name)
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=torch.float16, device=self._device)
        start, count = zlib.crc32(name.encode()) % _POOL, math.prod(shape)
        endless = self._pools[shape[-1]].repeat((start + count - 1) // _POOL + 1)
        return endless[start : start + count].view(shape)
