"""The gate of a gated feed-forward part: the second half of `Weight.gate_up_silu`."""

import torch
from torch import Tensor

from omniserve.ops.act import Act, ActFormat, emit
from omniserve.ops.dispatch import operation


def silu_mul(x: Tensor) -> Tensor:
    """Return silu(gate) * up of gate|up rows.

    x  [T, 2F]: F columns of gate, then F of up
    Returns [T, F] in fp32 (fp64 if x is), not rounded to the model's dtype: int8 codes are taken from it (formats.md
    section 6). Source: SwiGLU, arXiv 2002.05202 section 2.
    """
    gate, up = (x if x.dtype == torch.float64 else x.float()).chunk(2, -1)
    return torch.nn.functional.silu(gate).mul_(up)


@operation
def swiglu(product: Tensor, wants: ActFormat, dtype: torch.dtype) -> Act:
    """Return silu(gate) * up of a gate|up product [T, 2F] as activations [T, F] of a model in `dtype`.

    int8 codes are taken from the fp32 (fp64) values, before any cast.
    """
    return emit(silu_mul(product), wants, dtype)
