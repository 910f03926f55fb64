"""Torch's own attention of the same sizes, over 16-bit keys and values that lie in one piece."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from omniserve.bench.kernels.cases import Calls, Sizes, cold


def attention(rows: int, tokens: int, context: int, sizes: Sizes) -> dict[str, Callable[[], Calls]]:
    """Return torch's own choice, and cuDNN's kernel, for the last T positions of each of `rows` contexts.

    Prompts after earlier tokens take two calls, whose results nobody merges: earlier keys without a mask, own causal.
    """
    return {
        "torch": lambda: _calls(rows, tokens, context, sizes),
        "cudnn": lambda: _calls(rows, tokens, context, sizes, backends=[SDPBackend.CUDNN_ATTENTION]),
    }


def _calls(
    rows: int, tokens: int, context: int, sizes: Sizes, *, backends: Sequence[SDPBackend] | None = None
) -> Calls:
    spec = sizes.spec
    like: Any = {"device": sizes.device, "dtype": sizes.dtype}
    nbytes = 4.0 * rows * context * spec.kv_heads * spec.head_dim

    def read(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        gqa = spec.heads != spec.kv_heads
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

    def one() -> Callable[[], None]:
        q = torch.randn(rows, spec.heads, tokens, spec.head_dim, **like)
        k, v = (torch.randn(rows, spec.kv_heads, context, spec.head_dim, **like) for _ in range(2))
        before = context if tokens == 1 else context - tokens

        def call() -> None:
            with contextlib.nullcontext() if backends is None else sdpa_kernel(list(backends)):
                if before:
                    read(q, k[:, :, :before], v[:, :, :before], causal=False)
                if tokens > 1:
                    read(q, k[:, :, before:], v[:, :, before:], causal=True)

        return call

    return [one() for _ in range(cold(nbytes, None, most=24))]
