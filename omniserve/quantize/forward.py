"""The arithmetic of a layer on plain tensors: in full precision, or with what the served path rounds simulated.

One sample at a time, [T, C], in fp32 or fp64; no pages. The rounding is that of `formats` and `ops`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from omniserve.base.spec import ModelSpec
from omniserve.formats.kv import KVFormat
from omniserve.ops.act import ActFormat, Int8, quantize
from omniserve.ops.batch import Visible
from omniserve.ops.rope import make_rope, norm_heads, rotate
from omniserve.quantize.layer import FeedForward, Layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """What becomes of keys and values between the write and the read of pages.

    keys, values  formats, or None: unchanged
    mean          fp16 [H, D] subtracted from rotated keys before they are quantized, or None
    scale         fp32 [2, H] of static formats, or None
    """

    keys: KVFormat | None = None
    values: KVFormat | None = None
    mean: Tensor | None = None
    scale: Tensor | None = None

    def read_keys(self, k: Tensor) -> Tensor:
        """Return rotated keys [T, H, D] as attention reads them: without their mean, which softmax does not see."""
        if self.mean is not None:
            k = k - self.mean.to(k.dtype)
        return _round_trip(k, self.keys, None if self.scale is None else self.scale[0])

    def read_values(self, v: Tensor) -> Tensor:
        """Return values [T, H, D] as attention reads them."""
        return _round_trip(v, self.values, None if self.scale is None else self.scale[1])


PLAIN = Cache()
"""Nothing is rounded."""


def _round_trip(x: Tensor, form: KVFormat | None, scale: Tensor | None) -> Tensor:
    if form is None:
        return x
    codes, params = form.encode(x, scale[:, None] if form.static and scale is not None else None)
    return form.decode(codes, params, x.dtype)


def round_int8(x: Tensor) -> Tensor:
    """Return activations [T, K] after the round trip through int8 codes and one scale per token."""
    act = quantize(x, ActFormat.INT8)
    assert isinstance(act, Int8)
    return act.codes.to(x.dtype) * act.scale.to(x.dtype)


class Forward:
    """The steps of a layer's arithmetic for one model on one device.

    positions  largest position + 1 that samples reach
    """

    def __init__(self, spec: ModelSpec, *, positions: int, device: torch.device) -> None:
        self.spec = spec
        self._rope = make_rope(spec.rope, head_dim=spec.head_dim, context=positions, device=device)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the RMS norm of x [T, C]."""
        return torch.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), self.spec.norm_eps)

    def project(self, layer: Layer, h: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [T, Hq, D] and k [T, H, D], normed where the model does and rotated, and v [T, H, D].

        h [T, C]: the normed input
        """
        dim, eps = self.spec.head_dim, self.spec.norm_eps
        q, k, v = (linear(h).view(h.shape[0], -1, dim) for linear in (layer.q, layer.k, layer.v))
        q, k = norm_heads(q, layer.q_norm, eps), norm_heads(k, layer.k_norm, eps)
        return rotate(q, positions, self._rope), rotate(k, positions, self._rope), v

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return causal attention [T, Hq * D] of one sample's queries over its own keys, within the layer's window."""
        group = self.spec.group
        window = self.spec.windows[layer] if self.spec.windows else None
        mask = None
        if window is not None and window < len(q):
            places = torch.arange(len(q), device=q.device)
            mask = Visible(local=window).mask(places, places)
        keys, values = (t.transpose(0, 1).repeat_interleave(group, 0)[None] for t in (k, v))
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys, values, attn_mask=mask, is_causal=mask is None
        )
        return out[0].transpose(0, 1).flatten(1)

    def inner(self, part: FeedForward, h: Tensor) -> Tensor:
        """Return the input of down [T, F]: silu(gate) * up."""
        return functional.silu(part.gate(h)).mul_(part.up(h))

    def routes(self, layer: Layer, h: Tensor) -> Iterator[tuple[FeedForward, Tensor | None, Tensor | None]]:
        """Yield each part with the tokens int64 [t] that go through it and their weights [t, 1]; None: all, unweighted.

        h [T, C]: the normed input, in full precision. The shared part comes last.
        """
        if layer.router is None:
            yield layer.parts[0], None, None
            return
        experts = self.spec.experts
        assert experts is not None
        weights, chosen = torch.topk(torch.softmax(layer.router(h), -1), experts.chosen, dim=-1)
        if experts.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        for number, part in enumerate(layer.parts):
            token, place = torch.where(chosen == number)
            yield part, token, weights[token, place, None]
        if layer.shared is not None and layer.shared_gate is not None:
            yield layer.shared, None, torch.sigmoid(layer.shared_gate(h))

    def feed_forward(self, layer: Layer, x: Tensor, *, rounded: bool = False) -> Tensor:
        """Return what the feed-forward part adds to x [T, C]; `rounded`: inputs of linears go through int8."""
        h = self.norm(x, layer.norm2)
        out = torch.zeros_like(x)
        inputs = round_int8(h) if rounded else h
        for part, token, weight in self.routes(layer, h):
            inner = self.inner(part, inputs if token is None else inputs[token])
            added = part.down(round_int8(inner) if rounded else inner)
            added = added if weight is None else added * weight
            out = out + added if token is None else out.index_add(0, token, added)
        return out

    def attention(
        self, layer: Layer, x: Tensor, positions: Tensor, *, cache: Cache = PLAIN, rounded: bool = False
    ) -> Tensor:
        """Return what attention adds to x [T, C]."""
        h = self.norm(x, layer.norm1)
        q, k, v = self.project(layer, round_int8(h) if rounded else h, positions)
        o = self.attend(layer.number, q, cache.read_keys(k), cache.read_values(v))
        return layer.out(round_int8(o) if rounded else o)

    def __call__(
        self, layer: Layer, x: Tensor, positions: Tensor, *, cache: Cache = PLAIN, rounded: bool = False
    ) -> Tensor:
        """Return the residual stream [T, C] behind the layer."""
        x = x + self.attention(layer, x, positions, cache=cache, rounded=rounded)
        return x + self.feed_forward(layer, x, rounded=rounded)
