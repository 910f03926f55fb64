"""One layer, from 16 bit to codes: observed and transformed in full precision, then solved stage by stage.

Two streams run through it: x, what the unquantized model feeds, and x̂, what the quantized one does, with int8
activations and the quantized KV cache simulated.

    observe    x -> maxima, means, samples; the residual behind attention and behind the layer
    transform  reorder, SmoothAttention, smoothing: the function stays the same
    solve      qkv, out, gate and up, down: each on what everything before it, already quantized, feeds
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.base.spec import ModelSpec
from omniserve.formats.weight import WeightFormat
from omniserve.quantize import solve
from omniserve.quantize.forward import PLAIN, Cache, Forward, round_int8
from omniserve.quantize.kvsmooth import fold_key_factor, key_candidates, key_factor, search_key_factor
from omniserve.quantize.layer import FeedForward, Layer, Linear
from omniserve.quantize.observe import Inputs, Peak, Statistics
from omniserve.quantize.recipe import KV, Recipe
from omniserve.quantize.reorder import reorder_down, reorder_out
from omniserve.quantize.smooth import down_candidates, smooth_down, smooth_out
from omniserve.quantize.spill import Spill

FEW = 4
"""An expert that sees fewer tokens than this times its input size is solved on all tokens of the layer."""

HESSIANS = 1 << 30
"""Bytes of moments of experts that are gathered at once."""

STEPS = ("observe", "transform", "qkv", "out", "gate_up", "down", "write")
"""What happens to a layer, for the progress bar."""

Tick = Callable[[str], None]
"""Called with the name of a step that is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """Files of activations: x and x̂ of this layer, where those of the next go, and scratch within the layer."""

    plain: Spill
    rounded: Spill
    next_plain: Spill
    next_rounded: Spill
    middle: Spill
    middle_rounded: Spill
    attended: Spill

    def scratch(self) -> tuple[Spill, ...]:
        """Return the files that are of no use once the layer is done."""
        return self.middle, self.middle_rounded, self.attended


@dataclass(slots=True, kw_only=True)
class Notes:
    """What the report says of a layer; grows while the layer is worked on."""

    linears: dict[str, dict[str, float]] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    smooth: dict[str, Any] = field(default_factory=dict)
    pooled: list[str] = field(default_factory=list)
    output: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for the report."""
        return {
            "output_error": self.output,
            "linears": self.linears,
            "formats": self.formats,
            "keys": self.keys,
            "smooth": self.smooth,
            "pooled_experts": self.pooled,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What all layers share. positions: where each sample begins; length: tokens of a sample."""

    recipe: Recipe
    spec: ModelSpec
    forward: Forward
    positions: Sequence[int]
    length: int
    device: torch.device

    @property
    def samples(self) -> range:
        """Numbers of the samples."""
        return range(len(self.positions))

    def places(self, sample: int) -> Tensor:
        """Return the positions int64 [T] of a sample."""
        return torch.arange(self.length, device=self.device) + self.positions[sample]


def quantize_layer(layer: Layer, streams: Streams, work: Work, tick: Tick) -> tuple[dict[str, Tensor], Notes]:
    """Return the stored tensors of a layer by name, and its notes; fills the next streams.

    layer  norms folded and rotated as the recipe says
    """
    notes = Notes()
    seen = observe(layer, streams, work)
    tick("observe")
    layer = transform(layer, seen, work, notes)
    tick("transform")
    solver = _Solver(work, notes)
    stored: dict[str, Tensor] = {}
    attention = solver.attention(layer, streams, tick, stored)
    solver.feed_forward(layer, attention, streams, tick, stored)
    for spill in streams.scratch():
        spill.remove()
    notes.output = _distance(streams, work)
    return stored, notes


def _distance(streams: Streams, work: Work) -> float:
    """Return the squared distance of the two streams behind the layer, relative to the unquantized one."""
    apart, size = 0.0, 0.0
    for sample in work.samples:
        y = streams.next_plain[sample]
        apart += float((streams.next_rounded[sample] - y).square().sum(dtype=torch.float64))
        size += float(y.square().sum(dtype=torch.float64))
    return apart / size if size else 0.0


# Observation, in full precision


def observe(layer: Layer, streams: Streams, work: Work) -> Statistics:
    """Return what the samples tell of a layer; writes the residual behind attention and behind the layer."""
    forward, spec = work.forward, work.spec
    peaks = {name: Peak(f"{layer.prefix}self_attn.{name}") for name in ("q_proj", "k_proj", "o_proj")}
    mean = torch.zeros(spec.kv_heads, spec.head_dim, dtype=torch.float64, device=work.device)
    first: tuple[Tensor, Tensor, Tensor] | None = None
    with streams.middle.writer() as middle:
        for sample in work.samples:
            x = streams.plain[sample]
            q, k, v = forward.project(layer, forward.norm(x, layer.norm1), work.places(sample))
            o = forward.attend(layer.number, q, k, v)
            first = first or (q, k, v)
            for name, values in (("q_proj", q), ("k_proj", k), ("o_proj", o)):
                peaks[name].add(values.flatten(1))
            mean += k.sum(0, dtype=torch.float64)
            middle.add(x + layer.out(o))
    assert first is not None
    down = _observe_down(layer, streams, work)
    heads = {name: peak.inputs(0, mean).peak.view(-1, spec.head_dim) for name, peak in peaks.items()}
    return Statistics(
        key_peak=heads["k_proj"],
        query_peak=heads["q_proj"],
        key_mean=(mean / (work.length * len(work.positions))).to(layer.norm1.dtype),
        attention=first,
        out=peaks["o_proj"].inputs(0, mean),
        down=down,
    )


def _observe_down(layer: Layer, streams: Streams, work: Work) -> tuple[Inputs, ...]:
    """Return the inputs of each part's down; writes the residual behind the layer."""
    forward = work.forward
    peaks = [Peak(part.down.name) for part in layer.all_parts]
    counts = [0] * len(peaks)
    with streams.next_plain.writer() as behind:
        for sample in work.samples:
            x = streams.middle[sample]
            h = forward.norm(x, layer.norm2)
            out = torch.zeros_like(x)
            for number, (part, token, weight) in enumerate(forward.routes(layer, h)):
                inner = forward.inner(part, h if token is None else h[token])
                peaks[number].add(inner)
                counts[number] += len(inner)
                added = part.down(inner)
                added = added if weight is None else added * weight
                out = out + added if token is None else out.index_add(0, token, added)
            behind.add(x + out)
    for number, part in enumerate(layer.parts if layer.router is not None else ()):
        if counts[number] < FEW * part.down.weight.shape[1]:
            peaks[number] = Peak(part.down.name)
            for sample in work.samples:
                peaks[number].add(forward.inner(part, forward.norm(streams.middle[sample], layer.norm2)))
    parts = zip(peaks, layer.all_parts, strict=True)
    return tuple(peak.inputs(part.down.weight.shape[1], layer.norm1) for peak, part in parts)


# Transforms


def transform(layer: Layer, seen: Statistics, work: Work, notes: Notes) -> Layer:
    """Return the layer after the recipe's passes that leave its function as it is."""
    recipe, spec = work.recipe, work.spec
    if recipe.reorder is not None:
        if recipe.reorder.out:
            layer, seen = reorder_out(layer, seen, spec)
        if recipe.reorder.down:
            layer, seen = reorder_down(layer, seen)
    if recipe.keys is not None and recipe.keys.smooth and recipe.kv.keys < 16:
        layer, seen = _smooth_keys(layer, seen, work, notes)
    if recipe.smooth is not None and recipe.smooth.out:
        form = recipe.weights.of(layer.out.name)
        layer, seen, chosen = smooth_out(layer, seen, spec, form, down_candidates(recipe.smooth.out))
        notes.smooth["out"] = chosen
    if recipe.smooth is not None and recipe.smooth.down:
        form = recipe.weights.of(layer.parts[0].down.name)
        layer, seen, pairs = smooth_down(layer, seen, form, down_candidates(recipe.smooth.down))
        notes.smooth["down"] = pairs
    return layer


def _smooth_keys(layer: Layer, seen: Statistics, work: Work, notes: Notes) -> tuple[Layer, Statistics]:
    recipe = work.recipe
    assert recipe.keys is not None
    centred = recipe.centred

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return work.forward.attend(layer.number, q, k, v)

    def stored(k: Tensor, mean: Tensor) -> Tensor:
        scale = _static_scale((k - mean if centred else k).abs().amax((0, 2)), recipe.kv)
        cache = Cache(keys=recipe.kv.formats()[0], mean=mean.half() if centred else None, scale=scale)
        return cache.read_keys(k)

    pair, errors = search_key_factor(layer, seen, work.spec, key_candidates(recipe.keys.smooth), attend, stored)
    notes.keys = {"exponents": pair, **errors}
    return fold_key_factor(layer, seen, work.spec, key_factor(layer, seen, work.spec, pair))


def _static_scale(peaks: Tensor, kv: KV) -> Tensor | None:
    """Return fp32 scales of static ranges from the largest |x| of each head, or None for dynamic ones."""
    if not kv.static:
        return None
    peaks = (peaks.amax(-1, keepdim=True).expand_as(peaks) if kv.range == "tensor" else peaks).float()
    scale = peaks / 127
    return scale.masked_fill(scale == 0, 1)[None] if peaks.dim() == 1 else scale.masked_fill(scale == 0, 1)


# Solving


class Moments:
    """H = Σ x̂ᵀ x̂ and C = Σ (x - x̂)ᵀ x̂ over tokens in their order, fp64 [K, K]; C only if asked for."""

    def __init__(self, columns: int, device: torch.device, *, aim: bool) -> None:
        self.h = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self.c = torch.zeros_like(self.h) if aim else None
        self.tokens = 0

    def add(self, x: Tensor, rounded: Tensor) -> None:
        """Take in inputs x and x̂ [t, K] of the same tokens."""
        self.h += rounded.T @ rounded
        if self.c is not None:
            self.c += (x - rounded).T @ rounded
        self.tokens += len(x)


class _Solver:
    """Solves the linears of a layer in the order in which they are used."""

    def __init__(self, work: Work, notes: Notes) -> None:
        self._work = work
        self._notes = notes
        given = work.recipe.solve
        self._delta = 0.0 if given is None else given.reaim
        self._options = given

    def attention(self, layer: Layer, streams: Streams, tick: Tick, stored: dict[str, Tensor]) -> Layer:
        """Solve q, k, v and out; return the layer with these as they will be served, the rest in full precision."""
        work, forward = self._work, self._work.forward
        moments = self._moments(layer.q)
        for sample in work.samples:
            h = forward.norm(streams.plain[sample], layer.norm1)
            moments.add(h, round_int8(forward.norm(streams.rounded[sample], _as_stored(layer.norm1))))
        q, k, v = self._solve((layer.q, layer.k, layer.v), moments, stored)
        served = replace(layer, q=q, k=k, v=v, norm1=_as_stored(layer.norm1), norm2=_as_stored(layer.norm2))
        if layer.q_norm is not None and layer.k_norm is not None:
            served = replace(served, q_norm=_as_stored(layer.q_norm), k_norm=_as_stored(layer.k_norm))
        tick("qkv")
        cache = self._cache(served, streams, stored)
        moments = self._moments(layer.out)
        with streams.attended.writer() as attended:
            for sample in work.samples:
                at = work.places(sample)
                x, rounded = streams.plain[sample], streams.rounded[sample]
                o = self._attended(layer, forward.norm(x, layer.norm1), at, PLAIN)
                o_rounded = self._attended(served, round_int8(forward.norm(rounded, served.norm1)), at, cache)
                moments.add(o, round_int8(o_rounded))
                attended.add(round_int8(o_rounded))
        (out,) = self._solve((layer.out,), moments, stored)
        with streams.middle_rounded.writer() as middle:
            for sample in work.samples:
                middle.add(streams.rounded[sample] + out(streams.attended[sample]))
        tick("out")
        return replace(served, out=out)

    def _attended(self, layer: Layer, h: Tensor, at: Tensor, cache: Cache) -> Tensor:
        q, k, v = self._work.forward.project(layer, h, at)
        return self._work.forward.attend(layer.number, q, cache.read_keys(k), cache.read_values(v))

    def _cache(self, served: Layer, streams: Streams, stored: dict[str, Tensor]) -> Cache:
        """Return what the KV cache does to the served keys and values: their mean, static scales."""
        work, kv = self._work, self._work.recipe.kv
        keys, values = kv.formats()
        centred = work.recipe.centred
        if not centred and not kv.static:
            return Cache(keys=keys, values=values)
        total: Tensor | None = None
        ends: list[Tensor] = []
        for sample in work.samples:
            h = round_int8(work.forward.norm(streams.rounded[sample], served.norm1))
            _, k, v = work.forward.project(served, h, work.places(sample))
            added = k.sum(0, dtype=torch.float64)
            total = added if total is None else total + added
            seen = [k.amin(0), k.amax(0), v.abs().amax(0)]
            ends = seen if not ends else [torch.minimum(ends[0], seen[0]), *map(torch.maximum, ends[1:], seen[1:])]
        assert total is not None
        attention = served.prefix + "self_attn."
        mean = None
        if centred:
            mean = (total / (work.length * len(work.positions))).half()
            stored[attention + "key_mean"] = mean
        shift = 0.0 if mean is None else mean.float()
        key_peak = torch.maximum((ends[0] - shift).abs(), (ends[1] - shift).abs()).amax(1)
        scale = _static_scale(torch.stack([key_peak, ends[2].amax(1)]), kv)
        if scale is not None:
            stored[attention + "kv_scale"] = scale
        return Cache(keys=keys, values=values, mean=mean, scale=scale)

    def feed_forward(
        self, layer: Layer, served: Layer, streams: Streams, tick: Tick, stored: dict[str, Tensor]
    ) -> None:
        """Solve gate, up and down of all parts; fills the next quantized stream."""
        work, forward = self._work, self._work.forward
        router, gate = (None if each is None else _kept(each, stored) for each in (layer.router, layer.shared_gate))
        served = replace(served, router=router, shared_gate=gate)
        parts = layer.all_parts
        solved: list[FeedForward] = []
        for block, moments in self._gathered(layer, served, streams, down=False):
            for number, found in zip(block, moments, strict=True):
                gate, up = self._solve((parts[number].gate, parts[number].up), found, stored)
                solved.append(FeedForward(gate=gate, up=up, down=parts[number].down))
        served = served.with_parts(tuple(solved))
        tick("gate_up")
        for block, moments in self._gathered(layer, served, streams, down=True):
            for number, found in zip(block, moments, strict=True):
                (down,) = self._solve((parts[number].down,), found, stored)
                solved[number] = replace(solved[number], down=down)
        served = served.with_parts(tuple(solved))
        with streams.next_rounded.writer() as behind:
            for sample in work.samples:
                x = streams.middle_rounded[sample]
                behind.add(x + forward.feed_forward(served, x, rounded=True))
        for name, norm in (("input_layernorm", layer.norm1), ("post_attention_layernorm", layer.norm2)):
            stored[f"{layer.prefix}{name}.weight"] = half(norm, f"{layer.prefix}{name}.weight")
        for name, weight in (("q_norm", layer.q_norm), ("k_norm", layer.k_norm)):
            if weight is not None:
                full = f"{layer.prefix}self_attn.{name}.weight"
                stored[full] = half(weight, full)
        tick("down")

    def _gathered(
        self, layer: Layer, served: Layer, streams: Streams, *, down: bool
    ) -> Iterator[tuple[list[int], list[Moments]]]:
        """Yield blocks of parts with the moments of their inputs: of down, else of gate and up.

        Tokens are those that the quantized stream routes to a part; a part with few is given all.
        """
        parts = layer.all_parts
        linears = [part.down if down else part.gate for part in parts]
        size = 8 * linears[0].weight.shape[1] ** 2 * (2 if self._delta else 1)
        step = max(1, HESSIANS // size)
        for start in range(0, len(parts), step):
            block = list(range(start, min(start + step, len(parts))))
            moments = [self._moments(linears[number]) for number in block]
            self._gather(layer, served, streams, block, moments, down=down)
            few = []
            for place, number in enumerate(block):
                if number < len(layer.parts) and layer.router is not None:
                    columns = linears[number].weight.shape[1]
                    if moments[place].tokens < FEW * columns:
                        few.append(number)
                        moments[place] = self._moments(linears[number])
            if few:
                chosen = [moments[number - start] for number in few]
                self._gather(layer, served, streams, few, chosen, down=down, everything=True)
                self._notes.pooled += [linears[number].name for number in few]
            yield block, moments

    def _gather(
        self,
        layer: Layer,
        served: Layer,
        streams: Streams,
        block: Sequence[int],
        moments: Sequence[Moments],
        *,
        down: bool,
        everything: bool = False,
    ) -> None:
        forward = self._work.forward
        for sample in self._work.samples:
            h = forward.norm(streams.middle[sample], layer.norm2)
            plain = forward.norm(streams.middle_rounded[sample], served.norm2)
            inputs = round_int8(plain)
            for number, (part, token, _) in enumerate(forward.routes(served, plain)):
                if number not in block:
                    continue
                own, fed = (h, inputs) if token is None or everything else (h[token], inputs[token])
                if down:
                    own, fed = forward.inner(layer.all_parts[number], own), round_int8(forward.inner(part, fed))
                moments[block.index(number)].add(own, fed)

    def _moments(self, linear: Linear) -> Moments:
        return Moments(linear.weight.shape[1], self._work.device, aim=self._delta > 0)

    def _solve(self, linears: Sequence[Linear], moments: Moments, stored: dict[str, Tensor]) -> list[Linear]:
        """Solve linears that share their input, as one; store them and return them as they will be served."""
        form = self._work.recipe.weights.of(linears[0].name)
        weight = torch.cat([linear.weight for linear in linears])
        try:
            if self._options is None:
                solved = solve.nearest(weight, form)
            else:
                if moments.c is not None:
                    weight = solve.reaim(weight, moments.h, moments.c, self._delta)
                    moments.c = None
                solved = solve.solve(weight, moments.h, form, self._options)
        except CheckpointError as error:
            raise CheckpointError(f"{linears[0].name}: {error}") from None
        made, first = [], 0
        for linear in linears:
            own = solved.rows(slice(first, first + len(linear.weight)))
            first += len(linear.weight)
            self._notes.linears[linear.name] = own.relative()
            self._notes.formats[linear.name] = form.name
            made.append(_store(linear, form, own.stored, stored))
        return made


def _store(linear: Linear, form: WeightFormat, tensors: dict[str, Tensor], stored: dict[str, Tensor]) -> Linear:
    """Add a quantized linear to the stored tensors; return it with the weights that they mean."""
    stored |= {f"{linear.name}.{name}": tensor for name, tensor in tensors.items()}
    bias = linear.bias
    if bias is not None:
        stored[f"{linear.name}.bias"] = half(bias, f"{linear.name}.bias")
        bias = _as_stored(bias)
    return replace(linear, weight=form.dense(tensors, linear.weight.dtype), bias=bias)


def _kept(linear: Linear, stored: dict[str, Tensor]) -> Linear:
    """Add a linear that stays in 16 bit to the stored tensors; return it as it will be served."""
    stored[f"{linear.name}.weight"] = half(linear.weight, f"{linear.name}.weight")
    return replace(linear, weight=_as_stored(linear.weight))


def _as_stored(x: Tensor) -> Tensor:
    return x.half().to(x.dtype)


def half(x: Tensor, name: str) -> Tensor:
    """Return a tensor as it is stored, fp16. Raises CheckpointError naming it if fp16 cannot hold it."""
    made = x.half()
    if not bool(torch.isfinite(made).all()):
        raise CheckpointError(f"tensor {name} has values beyond 65504, which 16 bits cannot store")
    return made
