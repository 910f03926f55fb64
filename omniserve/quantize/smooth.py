"""Smoothing of outputs: inputs of down (and out) are divided by λ, columns multiplied; the producer's rows take 1/λ.

λ = A^α / B^(1-α), A and B the largest |input| and |weight| of a channel; α is searched, (0, 0) = off included.
Source: SmoothQuant (arXiv 2211.10438) eq. 4; the search: qoq.md section 3 step 4.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.base.spec import ModelSpec
from omniserve.formats.weight import WeightFormat
from omniserve.quantize.forward import round_int8
from omniserve.quantize.layer import FeedForward, Layer, Linear
from omniserve.quantize.observe import Inputs, Statistics

FLOOR = 1e-5
"""Smallest maximum that sets a factor."""

Exponents = tuple[float, float]
OFF: Exponents = (0.0, 0.0)


def power(a: Tensor, b: Tensor, exponents: Exponents) -> Tensor:
    """Return a^α / b^β; maxima below the floor count as the floor."""
    return a.clamp_min(FLOOR) ** exponents[0] / b.clamp_min(FLOOR) ** exponents[1]


def down_candidates(alphas: Sequence[float]) -> list[Exponents]:
    """Return (0, 0) and (α, 1 - α) of every α."""
    return [OFF, *((alpha, 1 - alpha) for alpha in alphas)]


def smooth_down(
    layer: Layer, seen: Statistics, form: WeightFormat, candidates: Sequence[Exponents]
) -> tuple[Layer, Statistics, list[Exponents]]:
    """Divide the inputs of each down by the λ of least error; up rows (never gate's) take 1 / λ."""
    parts, chosen = [], []
    for number, (part, inputs) in enumerate(zip(layer.all_parts, seen.down, strict=True)):
        best = _search(part.down, inputs, form, candidates, partial(_factor, part.down, inputs))
        factor = _factor(part.down, inputs, best)
        parts.append(
            FeedForward(gate=part.gate, up=part.up.scale_rows(1 / factor), down=part.down.scale_columns(factor))
        )
        seen = seen.with_down(number, inputs.divide(factor))
        chosen.append(best)
    return layer.with_parts(tuple(parts)), seen, chosen


def smooth_out(
    layer: Layer, seen: Statistics, spec: ModelSpec, form: WeightFormat, candidates: Sequence[Exponents]
) -> tuple[Layer, Statistics, Exponents]:
    """Divide the inputs of out by the λ of least error; V rows take 1 / λ. Query heads of a key head share λ."""
    shape = (spec.kv_heads, spec.group, spec.head_dim)

    def factor(pair: Exponents) -> Tensor:
        a, b = seen.out.peak, layer.out.weight.abs().amax(0)
        return power(a.view(shape).amax(1), b.view(shape).amax(1), pair)

    def wide(pair: Exponents) -> Tensor:
        return factor(pair).repeat_interleave(spec.group, 0).flatten()

    best = _search(layer.out, seen.out, form, candidates, wide)
    q, k, v = seen.attention
    made = replace(layer, v=layer.v.scale_rows(1 / factor(best).flatten()), out=layer.out.scale_columns(wide(best)))
    return made, replace(seen, out=seen.out.divide(wide(best)), attention=(q, k, v / factor(best))), best


def _factor(down: Linear, inputs: Inputs, pair: Exponents) -> Tensor:
    return power(inputs.peak, down.weight.abs().amax(0), pair)


def _search(
    linear: Linear,
    inputs: Inputs,
    form: WeightFormat,
    candidates: Sequence[Exponents],
    factor: Callable[[Exponents], Tensor],
) -> Exponents:
    """Return the exponents of least squared output error, with int8 inputs and rounded weights; the first of equals."""
    if len(candidates) == 1:
        return candidates[0]
    x, w = inputs.rows, linear.weight
    wanted, best, least = x @ w.T, candidates[0], torch.inf
    for pair in candidates:
        f = factor(pair)
        try:
            given = round_int8(x / f) @ rounded(w * f, form).T
        except CheckpointError as error:
            raise CheckpointError(f"{linear.name}.weight: {error}") from None
        miss = float((given - wanted).square().sum())
        if miss < least:
            best, least = pair, miss
    return best


def rounded(w: Tensor, form: WeightFormat) -> Tensor:
    """Return w [N, K] after rounding to nearest in a weight format."""
    return form.dense(form.from_dense(w), w.dtype)
