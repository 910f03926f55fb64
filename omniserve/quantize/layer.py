"""One decoder layer as tensors: what the passes transform. Pure data; every change makes a new layer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.base.spec import ModelSpec
from omniserve.formats.checkpoint import Source
from omniserve.models.families import expert_names

NAMES = ("gate_proj", "up_proj", "down_proj")
"""The linears of a feed-forward part, but for experts whose family calls them otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """y = x @ weight.T + bias. name: the module in the checkpoint; weight [N, K]; bias [N] or None."""

    name: str
    weight: Tensor
    bias: Tensor | None = None

    def scale_rows(self, factor: Tensor) -> "Linear":
        """Return the linear whose outputs are multiplied by factor [N]: weight and bias."""
        bias = None if self.bias is None else self.bias * factor
        return replace(self, weight=self.weight * factor[:, None], bias=bias)

    def scale_columns(self, factor: Tensor) -> "Linear":
        """Return the linear for inputs divided by factor [K]."""
        return replace(self, weight=self.weight * factor)

    def take_rows(self, order: Tensor) -> "Linear":
        """Return the linear with its outputs in another order, int64 [N]."""
        return replace(self, weight=self.weight[order], bias=None if self.bias is None else self.bias[order])

    def take_columns(self, order: Tensor) -> "Linear":
        """Return the linear for inputs in another order, int64 [K]."""
        return replace(self, weight=self.weight[:, order])

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K]. Returns [T, N]."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """down(silu(gate) * up): the layer's own, one expert, or the shared expert."""

    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A decoder layer.

    norm1, norm2    [C]
    q_norm, k_norm  [D] of models that norm q and k, else None
    parts           the feed-forward part; with a router, the experts
    router          [E, C] without bias, or None
    shared          the expert that all tokens go through, behind shared_gate [1, C]; or None
    """

    number: int
    norm1: Tensor
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    norm2: Tensor
    parts: tuple[FeedForward, ...]
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    router: Linear | None = None
    shared: FeedForward | None = None
    shared_gate: Linear | None = None

    @property
    def prefix(self) -> str:
        """What the names of the layer's tensors begin with."""
        return f"model.layers.{self.number}."

    @property
    def all_parts(self) -> tuple[FeedForward, ...]:
        """The experts and the shared one behind them, or the only part."""
        return self.parts if self.shared is None else (*self.parts, self.shared)

    def with_parts(self, parts: tuple[FeedForward, ...]) -> "Layer":
        """Return the layer with its parts replaced, in the order of `all_parts`."""
        if self.shared is None:
            return replace(self, parts=parts)
        return replace(self, parts=parts[:-1], shared=parts[-1])

    def linears(self) -> Iterator[Linear]:
        """Yield the linears that are quantized."""
        yield from (self.q, self.k, self.v, self.out)
        for part in self.all_parts:
            yield from (part.gate, part.up, part.down)

    def map(self, inputs: Callable[[Linear], Linear], outputs: Callable[[Linear], Linear]) -> "Layer":
        """Return the layer with `inputs` done to what reads the residual stream and `outputs` to what adds to it."""

        def part(p: FeedForward) -> FeedForward:
            return FeedForward(gate=inputs(p.gate), up=inputs(p.up), down=outputs(p.down))

        made = replace(self, q=inputs(self.q), k=inputs(self.k), v=inputs(self.v), out=outputs(self.out))
        made = made.with_parts(tuple(part(p) for p in self.all_parts))
        router, gate = (None if each is None else inputs(each) for each in (self.router, self.shared_gate))
        return replace(made, router=router, shared_gate=gate)


def read_layer(source: Source, spec: ModelSpec, number: int, *, dtype: torch.dtype, device: torch.device) -> Layer:
    """Return one layer of a checkpoint in `dtype`.

    Raises CheckpointError naming a tensor that holds NaN or infinity, or a weight whose values are all the same.
    """
    read = _Reader(source, dtype, device)
    prefix = f"model.layers.{number}."
    attention = prefix + "self_attn."
    mixed = spec.experts is not None and number in spec.experts.layers
    names = expert_names(spec.family)
    if mixed:
        assert spec.experts is not None
        experts = [f"{prefix}{names.experts}.{e}." for e in range(spec.experts.count)]
        parts = tuple(read.part(at, names.linears) for at in experts)
    else:
        parts = (read.part(prefix + "mlp.", NAMES),)
    shared = mixed and spec.experts is not None and spec.experts.shared_ffn > 0
    return Layer(
        number=number,
        norm1=read.vector(prefix + "input_layernorm.weight"),
        q=read.linear(attention + "q_proj"),
        k=read.linear(attention + "k_proj"),
        v=read.linear(attention + "v_proj"),
        out=read.linear(attention + "o_proj"),
        norm2=read.vector(prefix + "post_attention_layernorm.weight"),
        parts=parts,
        q_norm=read.vector(attention + "q_norm.weight") if spec.qk_norm else None,
        k_norm=read.vector(attention + "k_norm.weight") if spec.qk_norm else None,
        router=read.linear(prefix + names.router) if mixed else None,
        shared=read.part(prefix + "mlp.shared_expert.", NAMES) if shared else None,
        shared_gate=read.linear(prefix + "mlp.shared_expert_gate") if shared else None,
    )


def read_finite(source: Source, name: str) -> Tensor:
    """Return a tensor of a checkpoint. Raises CheckpointError if it holds NaN or infinity."""
    tensor = source.tensor(name)
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{source.path}: tensor {name} holds NaN or infinity")
    return tensor


class _Reader:
    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        self._source, self._names, self._dtype, self._device = source, source.names(), dtype, device

    def vector(self, name: str) -> Tensor:
        return read_finite(self._source, name).to(self._device, self._dtype, copy=True)

    def linear(self, module: str) -> Linear:
        weight = self.vector(f"{module}.weight")
        if weight.numel() > 1 and bool((weight == weight.flatten()[0]).all()):
            raise CheckpointError(
                f"{self._source.path}: all values of tensor {module}.weight are {float(weight.flatten()[0]):g}: "
                "nobody filled it, or the file is damaged"
            )
        bias = self.vector(f"{module}.bias") if f"{module}.bias" in self._names else None
        return Linear(name=module, weight=weight, bias=bias)

    def part(self, prefix: str, names: tuple[str, str, str]) -> FeedForward:
        gate, up, down = (self.linear(prefix + name) for name in names)
        return FeedForward(gate=gate, up=up, down=down)
