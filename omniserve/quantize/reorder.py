"""Reordering of channels, so that a group of 128 columns holds channels of like size. Folds away.

Source: QServe (arXiv 2405.04532) section 4.3.
"""

from dataclasses import replace

import torch

from omniserve.base.spec import ModelSpec
from omniserve.quantize.layer import FeedForward, Layer
from omniserve.quantize.observe import Statistics


def reorder_out(layer: Layer, seen: Statistics, spec: ModelSpec) -> tuple[Layer, Statistics]:
    """Sort the inputs of out by size, ascending, within each head; V rows move along.

    The query heads of a key head share its order, by the largest of them.
    """
    shape = (spec.kv_heads, spec.group, spec.head_dim)
    order = seen.out.peak.view(shape).amax(1).argsort(dim=-1, stable=True)
    first = torch.arange(spec.kv_heads, device=order.device)[:, None] * spec.head_dim
    rows = (order + first).flatten()
    first = torch.arange(spec.heads, device=order.device)[:, None] * spec.head_dim
    columns = (order.repeat_interleave(spec.group, 0) + first).flatten()
    q, k, v = seen.attention
    moved = torch.take_along_dim(v, order[None], -1)
    made = replace(layer, v=layer.v.take_rows(rows), out=layer.out.take_columns(columns))
    return made, replace(seen, out=seen.out.take(columns), attention=(q, k, moved))


def reorder_down(layer: Layer, seen: Statistics) -> tuple[Layer, Statistics]:
    """Sort the inputs of each down by size, ascending; gate and up rows move along."""
    parts = []
    for number, (part, inputs) in enumerate(zip(layer.all_parts, seen.down, strict=True)):
        order = inputs.peak.argsort(stable=True)
        parts.append(
            FeedForward(
                gate=part.gate.take_rows(order), up=part.up.take_rows(order), down=part.down.take_columns(order)
            )
        )
        seen = seen.with_down(number, inputs.take(order))
    return layer.with_parts(tuple(parts)), seen
