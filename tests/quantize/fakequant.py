"""The quantizer's arithmetic on whole models: logits in full precision, after transforms, and of an artefact simulated.

No engine and no pages: an artefact's tensors are decoded by the formulas of qoq.md section 4, written out here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from omniserve.base.spec import ModelSpec
from omniserve.formats.checkpoint import Source, open_checkpoint
from omniserve.formats.kv import KVFormat
from omniserve.models.families import family
from omniserve.quantize.forward import PLAIN, Cache, Forward
from omniserve.quantize.layer import Layer, read_layer
from omniserve.quantize.spill import Spill
from omniserve.quantize.stages import Streams

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder on plain tensors."""

    spec: ModelSpec
    embedding: Tensor
    layers: Sequence[Layer]
    norm: Tensor
    head: Tensor

    def hidden(self, ids: Sequence[int], caches: Sequence[Cache] | None = None, rounded: bool = False) -> Tensor:
        forward = Forward(self.spec, positions=len(ids), device=CPU)
        x, positions = self.embedding[list(ids)], torch.arange(len(ids))
        for number, layer in enumerate(self.layers):
            x = forward(layer, x, positions, cache=caches[number] if caches else PLAIN, rounded=rounded)
        return forward.norm(x, self.norm)

    def logits(self, ids: Sequence[int], caches: Sequence[Cache] | None = None, rounded: bool = False) -> Tensor:
        return self.hidden(ids, caches, rounded) @ self.head.T


def read(source: Source | str | Path, dtype: torch.dtype) -> Model:
    source = source if not isinstance(source, str | Path) else open_checkpoint(source)
    spec = family(source.config).spec(source.config)
    embedding = source.tensor("model.embed_tokens.weight").to(dtype)
    own = "lm_head.weight" in source.names()
    return Model(
        spec=spec,
        embedding=embedding,
        layers=[read_layer(source, spec, n, dtype=dtype, device=CPU) for n in range(spec.layers)],
        norm=source.tensor("model.norm.weight").to(dtype),
        head=source.tensor("lm_head.weight").to(dtype) if own else embedding,
    )


def decoded(folder: Path) -> dict[str, Tensor]:
    """All tensors of an artefact by name, its linears as dense fp64 weights."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if last == "codes":
            made[f"{stem}.weight"] = _dense(tensors, stem)
        elif last not in ("scale", "zero", "group_scale", "group_zero"):
            made[name] = tensor.double()
    return made


def _dense(tensors: dict[str, Tensor], stem: str) -> Tensor:
    codes, scale = tensors[f"{stem}.codes"], tensors[f"{stem}.scale"].double()[:, None]
    if codes.dtype == torch.int8:
        return codes.double() * scale
    wide = torch.stack([codes % 16, codes // 16], -1).flatten(1).double()
    if f"{stem}.zero" in tensors:
        return wide * scale - tensors[f"{stem}.zero"].double()[:, None]
    s2, z2 = (
        tensors[f"{stem}.{name}"].double().repeat_interleave(128, 1)[:, : wide.shape[1]]
        for name in ("group_scale", "group_zero")
    )
    level1 = wide * s2 - z2
    assert -128 <= level1.min() <= level1.max() <= 127
    return level1 * scale


class Decoded:
    """An artefact as a source of dense weights."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config = json.loads((folder / "config.json").read_text())
        self._tensors = decoded(folder)

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def served(folder: Path) -> tuple[Model, list[Cache]]:
    """The model of an artefact in fp32, and what its KV cache does in each layer."""
    source = Decoded(folder)
    model = read(source, torch.float32)
    kv = source.config["quantization_config"]["kv"]
    form = None
    if kv["key_bits"] < 16:
        form = KVFormat(bits=kv["key_bits"], element=torch.uint8, static=kv["per"] == "head")
    caches = []
    for number in range(model.spec.layers):
        at = f"model.layers.{number}.self_attn."
        mean, scale = (
            source.tensor(at + name).float() if at + name in source.names() else None
            for name in ("key_mean", "kv_scale")
        )
        assert (mean is not None) == kv["key_mean"]
        caches.append(Cache(keys=form, values=form, mean=mean, scale=scale))
    return model, caches


def served_logits(folder: Path, ids: Sequence[int]) -> Tensor:
    model, caches = served(folder)
    return model.logits(ids, caches, rounded=True)


@torch.inference_mode()
def divergence(wanted: Tensor, given: Tensor) -> float:
    """Mean KL in nats over the predictions of one window, from logits [T, V]."""
    p, q = (logits[:-1].float().log_softmax(-1) for logits in (wanted, given))
    return float((p.exp() * (p - q)).sum(-1).mean())


def streams(folder: Path, samples: Sequence[Tensor], dtype: torch.dtype, heads: int) -> Streams:
    """Files of activations in front of a layer, both streams filled with the samples [T, C]."""
    shape = tuple(samples[0].shape)

    def spill(name: str, columns: int) -> Spill:
        return Spill(folder / f"{name}.bin", samples=len(samples), shape=(shape[0], columns), dtype=dtype, device=CPU)

    names = ("plain", "rounded", "next_plain", "next_rounded", "middle", "middle_rounded")
    made = Streams(**{name: spill(name, shape[1]) for name in names}, attended=spill("attended", heads))
    for stream in (made.plain, made.rounded):
        with stream.writer() as writer:
            for sample in samples:
                writer.add(sample)
    return made
