"""Residual addition and RMS norm, in the format that the next linear wants."""

import torch
from torch import Tensor

from omniserve.ops.act import Act, ActFormat, emit
from omniserve.ops.dispatch import operation


@operation
def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, wants: ActFormat) -> tuple[Act, Tensor]:
    """Return (norm(x + delta) in format `wants`, x + delta).

    x       [T, C] residual stream, model dtype; delta [T, C] the previous sublayer's output, or None
    weight  [C]; eps is added to the mean square
    The sum is rounded to the model dtype; statistics and the normed value are fp32 (fp64 if x is), and int8 codes are
    taken from that value before any cast. Source: RMSNorm (arXiv 1910.07467) eq. 4.
    """
    if delta is not None:
        x = x + delta
    exact = x if x.dtype == torch.float64 else x.float()
    normed = torch.rms_norm(exact, (exact.shape[-1],), weight.to(exact.dtype), eps)
    return emit(normed, wants, x.dtype), x
