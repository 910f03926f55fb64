"""Rotations that fold away: R1 turns the residual stream, R2 the values of each head. Norm weights are folded before.

Products are taken in fp64. The function of the model stays the same: RMS norm with weight 1 does not see R1, and V and
O meet R2 and its transpose.
Source: QuaRot (arXiv 2404.00456) section 4; SpinQuant (arXiv 2405.16406) section 3 for the names.
"""

from dataclasses import replace

import torch
from torch import Tensor

from omniserve.quantize.layer import Layer, Linear

CHUNK = 1 << 26
"""Elements of a matrix that are turned at once: in fp64 they take 512 MB."""


def fold_norms(layer: Layer) -> Layer:
    """Return the layer with norm weights 1: they move into the linears that read the normed input."""

    def read(linear: Linear, weight: Tensor) -> Linear:
        return linear.scale_columns(weight)

    made = layer.map(lambda linear: read(linear, layer.norm2), lambda linear: linear)
    q, k, v = (read(linear, layer.norm1) for linear in (layer.q, layer.k, layer.v))
    ones = torch.ones_like(layer.norm1)
    return replace(made, q=q, k=k, v=v, norm1=ones, norm2=ones.clone())


def rotate_residual(layer: Layer, r: Tensor) -> Layer:
    """Return the layer for a residual stream x @ r: W r for what reads it, rᵀ W (and biases) for what adds to it.

    r  fp64 [C, C], orthogonal. The norm weights must be folded.
    """
    return layer.map(lambda linear: turn_inputs(linear, r), lambda linear: turn_outputs(linear, r))


def rotate_heads(layer: Layer, r: Tensor) -> Layer:
    """Return the layer whose values are v @ r in every head: rows of V and columns of O turn. r fp64 [D, D]."""
    return replace(layer, v=turn_outputs(layer.v, r), out=turn_inputs(layer.out, r))


def turn_inputs(linear: Linear, r: Tensor) -> Linear:
    """Return the linear for inputs turned by r [D, D], in each block of D columns."""
    return replace(linear, weight=turned(linear.weight, r))


def turn_outputs(linear: Linear, r: Tensor) -> Linear:
    """Return the linear whose outputs are turned by r [D, D], in each block of D rows."""
    bias = None if linear.bias is None else turned(linear.bias[None], r)[0]
    return replace(linear, weight=turned(linear.weight.T, r).T.contiguous(), bias=bias)


def turned(x: Tensor, r: Tensor) -> Tensor:
    """Return x [N, K] with each block of D columns multiplied by r [D, D], in the dtype of x."""
    wide = r.to(x.device)
    rows = max(1, CHUNK // x.shape[1])
    parts = [(part.double().view(len(part), -1, len(r)) @ wide).view(len(part), -1) for part in torch.split(x, rows)]
    return torch.cat([part.to(x.dtype) for part in parts])
