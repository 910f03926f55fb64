"""Rotary position embedding: frequencies of every kind, the table, and its application.

Angles are computed in fp64 and stored in fp32: fp32 angles are off by 0.036 at position 1e6.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from omniserve.base.spec import RopeSpec


@dataclass(frozen=True, slots=True)
class Rope:
    """Cosines and sines of every position of the model's context: table fp32 [context, 2, D / 2].

    q_norm, k_norm  [D] gains of the RMS norm of each head before it is rotated, for models that have them; eps of it
    """

    table: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0


def make_rope(spec: RopeSpec, *, head_dim: int, context: int, device: torch.device) -> Rope:
    """Return the table for positions below `context`.

    Dynamic NTK takes its factor once, from `context`: a factor that follows the sequence would change keys that are
    already stored.
    """
    frequencies, magnitude = rope_frequencies(spec, head_dim=head_dim, context=context)
    angles = torch.outer(torch.arange(context, dtype=torch.float64, device=device), frequencies.to(device))
    return Rope((torch.stack([angles.cos(), angles.sin()], 1) * magnitude).float())


def rope_frequencies(spec: RopeSpec, *, head_dim: int, context: int) -> tuple[Tensor, float]:
    """Return (radians per position fp64 [D / 2], factor on cosines and sines).

    Sources: RoFormer (arXiv 2104.09864); position interpolation (arXiv 2306.15595) for `linear`; NTK-aware scaling for
    `dynamic`; YaRN (arXiv 2309.00071) section 3 for `yarn`; Llama 3.1's wavelength rule for `llama3`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    base = spec.base
    if spec.kind == "dynamic":
        trained = spec.original_context or context
        if context > trained:
            stretch = spec.factor * context / trained - (spec.factor - 1)
            base *= stretch ** (head_dim / (head_dim - 2))
    plain = base**-exponents
    if spec.kind == "linear":
        return plain / spec.factor, 1.0
    if spec.kind == "llama3":
        return _llama3(spec, plain, context), 1.0
    if spec.kind == "yarn":
        return _yarn(spec, plain, head_dim, context)
    return plain, 1.0


def _llama3(spec: RopeSpec, plain: Tensor, context: int) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between blended."""
    trained = spec.original_context or context
    turns = trained * plain / (2 * math.pi)
    low, high = spec.low_frequency_factor, spec.high_frequency_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / spec.factor


def _yarn(spec: RopeSpec, plain: Tensor, head_dim: int, context: int) -> tuple[Tensor, float]:
    """Blend by the number of turns over the trained length; the magnitude grows with the factor."""
    trained = spec.original_context or context

    def dim_of(turns: float) -> float:
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(spec.base))

    low = max(math.floor(dim_of(spec.beta_fast)), 0)
    high = min(math.ceil(dim_of(spec.beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
    stretch = ramp.clamp(0, 1)
    frequencies = plain * (1 - stretch) + plain / spec.factor * stretch
    magnitude = spec.attention_factor
    if magnitude is None:
        magnitude = 0.1 * math.log(spec.factor) + 1 if spec.factor > 1 else 1.0
    return frequencies, magnitude


def norm_heads(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return x [T, heads, D] with each head RMS-normed and scaled by weight [D]; x itself without a weight."""
    if weight is None:
        return x
    exact = x if x.dtype == torch.float64 else x.float()
    return torch.rms_norm(exact, (x.shape[-1],), weight.to(exact.dtype), eps).to(x.dtype)


def rotate(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """Return x [T, heads, D] rotated by its positions int64 [T]; halves are the pairs (dim j with j + D / 2)."""
    turn = rope.table[positions].to(x.dtype if x.dtype == torch.float64 else torch.float32)  # [T, 2, D / 2]
    cos, sin = turn[:, None, 0], turn[:, None, 1]
    first, second = x.to(turn.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
