"""`rope_write` in one launch: norm and rotate q and k, quantize K and V, write them into their pages.

One program per token and key head: it turns the head's queries, its key, and writes key and value. Dims j and j + D / 2
are what RoPE rotates and, in kv4, what shares a byte: everything here works on the two halves of a head.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.base.types import PAGE
from omniserve.formats.kv import LARGEST, SMALLEST, STATIC_ZERO, LayerPages
from omniserve.kernels.device import OUTPUTS, kernel_of, need
from omniserve.kernels.statistics import note
from omniserve.ops.pages import rope_write
from omniserve.ops.rope import Rope

GROUPS = 2
"""Head groups of one launch: retrieval and streaming heads."""

_SMALLEST = tl.constexpr(SMALLEST)
_LARGEST = tl.constexpr(LARGEST)
_STATIC_ZERO = tl.constexpr(STATIC_ZERO)
_PAGE = tl.constexpr(PAGE)


@triton.jit
def _turn(low, high, gain_low, gain_high, cos, sin, eps, D: tl.constexpr, NORM: tl.constexpr, like):
    """Return both halves of heads [.., D / 2], normed if NORM, rotated; fp32 inside, rounded to the model's dtype."""
    low, high = low.to(tl.float32), high.to(tl.float32)
    if NORM:
        mean = tl.div_rn(tl.sum(low * low, -1, keep_dims=True) + tl.sum(high * high, -1, keep_dims=True), 1.0 * D)
        factor = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
        low = (low * factor * gain_low).to(like).to(tl.float32)
        high = (high * factor * gain_high).to(like).to(tl.float32)
    return (low * cos - high * sin).to(like), (high * cos + low * sin).to(like)


@triton.jit
def _store(
    low,  # fp32 [D / 2 padded], 0 outside
    high,
    keep,  # dims that exist
    write,  # False for tokens that are skipped
    codes,  # where the token's codes lie
    params,  # where its scale lies; its zero is 64 further
    scale,  # where the static scale lies, if STATIC
    at,
    HALF: tl.constexpr,
    BITS: tl.constexpr,
    STATIC: tl.constexpr,
):
    """Write one key or value: plain, or as codes with scale and zero. The order of roundings is `KVFormat.encode`'s."""
    there = keep & write
    if BITS >= 16:
        tl.store(codes + at, low.to(codes.dtype.element_ty), mask=there)
        tl.store(codes + HALF + at, high.to(codes.dtype.element_ty), mask=there)
    else:
        TOP: tl.constexpr = (1 << BITS) - 1
        if STATIC:
            step = tl.load(scale).to(tl.float16)
            zero = tl.full((), _STATIC_ZERO, tl.float32).to(tl.float16)
        else:
            infinity = float("inf")
            most = tl.maximum(tl.max(tl.where(keep, low, -infinity), 0), tl.max(tl.where(keep, high, -infinity), 0))
            low_end = tl.minimum(tl.min(tl.where(keep, low, infinity), 0), tl.min(tl.where(keep, high, infinity), 0))
            least = low_end * -1.0  # keeps the sign of a zero, as the reference does
            span = tl.div_rn(most + least, 1.0 * TOP)
            wide = tl.maximum(span, tl.maximum(most, least) * 0.0009765625)
            step = tl.minimum(tl.maximum(wide, _SMALLEST), _LARGEST).to(tl.float16)
            zero = tl.div_rn(least, step.to(tl.float32)).to(tl.float16)
        step32, zero32 = step.to(tl.float32), zero.to(tl.float32)
        # Adding 1.5 * 2^23 leaves no bit for fractions: a sum rounds to nearest even.
        first = ((tl.div_rn(low, step32) + zero32) + 12582912.0) - 12582912.0
        second = ((tl.div_rn(high, step32) + zero32) + 12582912.0) - 12582912.0
        first = tl.minimum(tl.maximum(first, 0.0), 1.0 * TOP).to(tl.int32)
        second = tl.minimum(tl.maximum(second, 0.0), 1.0 * TOP).to(tl.int32)
        if BITS == 4:
            tl.store(codes + at, (first | (second << 4)).to(tl.uint8), mask=there)
        else:
            tl.store(codes + at, first.to(tl.uint8), mask=there)
            tl.store(codes + HALF + at, second.to(tl.uint8), mask=there)
        tl.store(params, step, mask=write)
        tl.store(params + 64, zero, mask=write)


@triton.jit
def rope_write_kernel(
    qkv,  # [T, Hq + 2 H, D], tokens `stride` apart
    positions,  # int64 [T]
    table,  # fp32 [context, 2, D / 2]
    q_gain,  # [D], read if NORM
    k_gain,
    q,  # [T, Hq, D]
    slots0,  # int64 [T], of the first group
    slots1,
    codes0,  # its pages as codes (uint8) or plain numbers
    codes1,
    params0,  # its pages as fp16
    params1,
    scale0,  # [2, heads], read if STATIC
    scale1,
    mean0,  # [heads, D], read if MEAN
    mean1,
    stride,
    kv_heads,
    share,  # key heads of the first group
    eps,
    G: tl.constexpr,
    GP: tl.constexpr,  # G, rounded up to a power of two
    D: tl.constexpr,
    HP: tl.constexpr,  # D / 2, rounded up to a power of two
    BITS: tl.constexpr,
    NORM: tl.constexpr,
    STATIC: tl.constexpr,
    MEAN: tl.constexpr,
    TWO: tl.constexpr,
):
    """One token, one key head."""
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    like = qkv.dtype.element_ty
    at = tl.arange(0, HP)
    keep = at < HALF
    turn = table + tl.load(positions + token) * D + at
    cos = tl.load(turn, mask=keep, other=0.0)
    sin = tl.load(turn + HALF, mask=keep, other=0.0)

    group = tl.arange(0, GP)
    some = (group < G)[:, None] & keep[None, :]
    source = qkv + token * stride + (head * G + group)[:, None] * D + at[None, :]
    gain_low, gain_high = cos[None, :], sin[None, :]
    if NORM:
        gain_low = tl.load(q_gain + at, mask=keep, other=0.0).to(tl.float32)[None, :]
        gain_high = tl.load(q_gain + HALF + at, mask=keep, other=0.0).to(tl.float32)[None, :]
    low, high = tl.load(source, mask=some, other=0.0), tl.load(source + HALF, mask=some, other=0.0)
    low, high = _turn(low, high, gain_low, gain_high, cos[None, :], sin[None, :], eps, D, NORM, like)
    target = q + (token * kv_heads * G + (head * G + group)[:, None]) * D + at[None, :]
    tl.store(target, low, mask=some)
    tl.store(target + HALF, high, mask=some)

    source = qkv + token * stride + (kv_heads * G + head) * D + at
    gain_low, gain_high = cos, sin
    if NORM:
        gain_low = tl.load(k_gain + at, mask=keep, other=0.0).to(tl.float32)
        gain_high = tl.load(k_gain + HALF + at, mask=keep, other=0.0).to(tl.float32)
    low, high = tl.load(source, mask=keep, other=0.0), tl.load(source + HALF, mask=keep, other=0.0)
    low, high = _turn(low, high, gain_low, gain_high, cos, sin, eps, D, NORM, like)
    low, high = low.to(tl.float32), high.to(tl.float32)
    source += kv_heads * D
    v_low = tl.load(source, mask=keep, other=0.0).to(tl.float32)
    v_high = tl.load(source + HALF, mask=keep, other=0.0).to(tl.float32)

    slots, codes, params, scale, mean, first, heads = slots0, codes0, params0, scale0, mean0, share * 0, share
    if TWO:  # noqa: SIM102  # known when compiled, unlike the branch inside
        if head >= share:
            slots, codes, params, scale, mean, first = slots1, codes1, params1, scale1, mean1, share
            heads = kv_heads - share
    mine = head - first
    if MEAN:
        low -= tl.load(mean + mine * D + at, mask=keep, other=0.0).to(tl.float32)
        high -= tl.load(mean + mine * D + HALF + at, mask=keep, other=0.0).to(tl.float32)
    slot = tl.load(slots + token)
    BYTES: tl.constexpr = D // 2 if BITS == 4 else D  # of a token's codes; numbers, where they are plain
    PARAMS: tl.constexpr = 256 if BITS < 16 else 0  # fp16 numbers behind the codes
    page = (slot >> 6) * heads + mine
    offset = slot & 63
    here = codes + page * (2 * _PAGE * BYTES + 2 * PARAMS) + offset * BYTES
    behind = params + page * (_PAGE * BYTES + PARAMS) + _PAGE * BYTES + offset
    _store(low, high, keep, slot >= 0, here, behind, scale + mine, at, HALF, BITS, STATIC)
    here += _PAGE * BYTES
    _store(v_low, v_high, keep, slot >= 0, here, behind + 128, scale + heads + mine, at, HALF, BITS, STATIC)


def checked(stores: Sequence[LayerPages], head_dim: int) -> None:
    """Raise ConfigError unless the kernels can use these pages."""
    form = stores[0].format
    need(1 <= len(stores) <= GROUPS, f"{len(stores)} head groups on a GPU: up to {GROUPS} are there")
    need(
        head_dim % 8 == 0 and head_dim <= 256, f"heads of {head_dim} dims on a GPU: multiples of 8 up to 256 are there"
    )
    need(form.bits < 32, f"{form.name} pages on a GPU: kv4, kv8 and kv16 are there")
    assert all(store.format == form and store.head_dim == head_dim for store in stores), [s.format for s in stores]


@kernel_of(rope_write)
def rope_write_triton(
    qkv: Tensor, positions: Tensor, slots: Sequence[Tensor], stores: Sequence[LayerPages], rope: Rope, heads: int
) -> Tensor:
    """All head groups in one launch."""
    tokens, total, head_dim = qkv.shape
    need(qkv.dtype in OUTPUTS, f"rope_write of {qkv.dtype} on a GPU: float16, bfloat16 and float32 are there")
    slots, stores = zip(*((one, store) for one, store in zip(slots, stores, strict=True) if store.heads), strict=True)
    checked(stores, head_dim)
    kv_heads = (total - heads) // 2
    assert heads % kv_heads == 0 and sum(store.heads for store in stores) == kv_heads, (heads, kv_heads)
    q = torch.empty(tokens, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if not tokens:
        return q
    qkv = qkv if qkv.stride()[1:] == (head_dim, 1) else qkv.contiguous()
    form, group = stores[0].format, heads // kv_heads
    first, last = (stores[0], slots[0].contiguous()), (stores[-1], slots[-1].contiguous())
    norm, mean = rope.q_norm is not None, stores[0].key_mean is not None

    def both(of: str, spare: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(
            spare if getattr(store, of) is None else getattr(store, of).contiguous() for store, _ in (first, last)
        )

    rope_write_kernel[(tokens, kv_heads)](
        qkv,
        positions.contiguous(),
        rope.table,
        rope.q_norm.contiguous() if norm else q,
        rope.k_norm.contiguous() if norm else q,
        q,
        first[1],
        last[1],
        *(store.pages.view(form.element) for store, _ in (first, last)),
        *(store.pages.view(torch.float16) for store, _ in (first, last)),
        *both("scale", q),
        *both("key_mean", q),
        qkv.stride(0),
        kv_heads,
        first[0].heads,
        rope.eps,
        **constants(group, head_dim, form.bits, norm=norm, static=form.static, mean=mean, two=len(stores) == 2),
        num_warps=warps_of(group, head_dim),
        enable_fp_fusion=False,
    )
    for slot, store in zip(slots, stores, strict=True):
        if store.statistics is not None:
            note(slot.contiguous(), store)
    return q


def constants(
    group: int, head_dim: int, bits: int, *, norm: bool, static: bool, mean: bool, two: bool
) -> dict[str, int | bool]:
    """Return what `rope_write_kernel` is compiled for."""
    return {
        "G": group, "GP": triton.next_power_of_2(group), "D": head_dim, "HP": triton.next_power_of_2(head_dim // 2),
        "BITS": bits, "NORM": norm, "STATIC": static, "MEAN": mean, "TWO": two,
    }  # fmt: skip


def warps_of(group: int, head_dim: int) -> int:
    """Return the warps of one program: one, unless a head's queries would fill its registers."""
    return 1 if group * head_dim <= 1024 else 4
