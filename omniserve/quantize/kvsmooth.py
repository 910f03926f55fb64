"""Keys made easy to quantize: SmoothAttention, K / λ and Q · λ in the rows of q and k, with λ searched. Folds away.

RoPE mixes dims j and j + D / 2, so the pair shares one λ; the query heads of a key head share its λ; a model that norms
q and k takes λ in the norms' weights, one for all heads. Source: QServe (arXiv 2405.04532) section 4.2.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from omniserve.base.spec import ModelSpec
from omniserve.quantize.layer import Layer
from omniserve.quantize.observe import Statistics
from omniserve.quantize.smooth import OFF, Exponents, power

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention output of q, k, v."""


def key_candidates(alphas: Sequence[float]) -> list[Exponents]:
    """Return (0, 0), and (α, 0) and (α, 1 - α) of every α."""
    return [OFF, *((alpha, beta) for alpha in alphas for beta in (0.0, 1 - alpha))]


def key_factor(layer: Layer, seen: Statistics, spec: ModelSpec, pair: Exponents) -> Tensor:
    """Return λ [H, D] for exponents α, β: key peak^α / query peak^β."""
    keys = _paired(seen.key_peak)
    queries = _paired(seen.query_peak.view(spec.kv_heads, spec.group, spec.head_dim).amax(1))
    if layer.q_norm is not None:
        keys, queries = (t.amax(0, keepdim=True).expand_as(t) for t in (keys, queries))
    return power(keys, queries, pair)


def _paired(peak: Tensor) -> Tensor:
    """Return the larger of dims j and j + D / 2 of each head [H, D], in both places."""
    half = peak.view(len(peak), 2, -1).amax(1)
    return torch.cat([half, half], -1)


def fold_key_factor(layer: Layer, seen: Statistics, spec: ModelSpec, factor: Tensor) -> tuple[Layer, Statistics]:
    """Return the layer whose keys are divided by factor [H, D] and whose queries are multiplied by it."""
    wide = factor.repeat_interleave(spec.group, 0)
    if layer.q_norm is not None and layer.k_norm is not None:
        assert bool((factor == factor[:1]).all()), "one λ for all heads where q and k are normed"
        made = replace(layer, q_norm=layer.q_norm * factor[0], k_norm=layer.k_norm / factor[0])
    else:
        made = replace(layer, q=layer.q.scale_rows(wide.flatten()), k=layer.k.scale_rows(1 / factor.flatten()))
    q, k, v = seen.attention
    return made, replace(
        seen,
        key_peak=seen.key_peak / factor,
        query_peak=seen.query_peak * wide,
        key_mean=seen.key_mean / factor,
        attention=(q * wide, k / factor, v),
    )


def search_key_factor(
    layer: Layer,
    seen: Statistics,
    spec: ModelSpec,
    candidates: Sequence[Exponents],
    attend: Attend,
    stored: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Exponents, dict[str, float]]:
    """Return the exponents whose attention output differs least when keys are quantized; errors before and after.

    attend  attention output of q, k, v of the sample
    stored  keys [T, H, D] and their mean [H, D] -> keys as attention reads them
    Errors are squared, relative to the output.
    """
    q, k, v = seen.attention
    wanted = attend(q, k, v)
    size = float(wanted.square().sum())
    best, least, before = candidates[0], torch.inf, 0.0
    for pair in candidates:
        factor = key_factor(layer, seen, spec, pair)
        wide = factor.repeat_interleave(spec.group, 0)
        error = float((attend(q * wide, stored(k / factor, seen.key_mean / factor), v) - wanted).square().sum())
        if pair == candidates[0]:
            before = error
        if error < least:
            best, least = pair, error
    return best, {"before": before / size if size else 0.0, "after": least / size if size else 0.0}
