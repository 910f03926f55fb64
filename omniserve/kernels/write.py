"""`rope_write` in one launch: norm and rotate q and k, quantize K and V, write them into their pages.

One program per token and a few key heads of one group: it turns their queries and keys, and writes keys and values.
Dims j and j + D / 2 are what RoPE rotates and, in kv4, what shares a byte: everything here works on the two halves of a
head.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE
from omniserve.formats.kv import LARGEST, SMALLEST, STATIC_ZERO, LayerPages
from omniserve.kernels.device import INTERPRETED, OUTPUTS, kernel_of, need, pdl
from omniserve.kernels.handover import handed_over
from omniserve.kernels.rounding import clamped, quotient, share
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
    low,  # fp32 [heads, D / 2 padded], 0 outside
    high,
    there,  # heads and dims that exist, False for tokens that are skipped
    write,  # heads that exist, False for tokens that are skipped
    codes,  # [heads]: where each head's codes of the token lie
    params,  # [heads]: where its scale lies; its zero is 64 further
    scale,  # [heads]: where its static scale lies, if STATIC
    at,
    HALF: tl.constexpr,
    BITS: tl.constexpr,
    STATIC: tl.constexpr,
    ASM: tl.constexpr,
):
    """Write keys or values: plain, or as codes with scale and zero. The order of roundings is `KVFormat.encode`'s."""
    place = codes[:, None] + at[None, :]
    if BITS >= 16:
        tl.store(place, low.to(codes.dtype.element_ty), mask=there)
        tl.store(place + HALF, high.to(codes.dtype.element_ty), mask=there)
    else:
        TOP: tl.constexpr = (1 << BITS) - 1
        if STATIC:
            step = tl.load(scale, mask=write, other=1.0).to(tl.float16)
            zero = tl.full(step.shape, _STATIC_ZERO, tl.float32).to(tl.float16)
        else:
            keep = (at < HALF)[None, :]
            most = tl.max(tl.where(keep, tl.maximum(low, high), -float("inf")), 1)
            low_end = tl.min(tl.where(keep, tl.minimum(low, high), float("inf")), 1)
            least = low_end * -1.0  # keeps the sign of a zero, as the reference does
            span = share(most + least, 1.0 * TOP, ASM)
            wide = tl.maximum(span, tl.maximum(most, least) * 0.0009765625)
            step = tl.minimum(tl.maximum(wide, _SMALLEST), _LARGEST).to(tl.float16)
            zero = quotient(least, step.to(tl.float32), ASM).to(tl.float16)
        step32, zero32 = step.to(tl.float32)[:, None], zero.to(tl.float32)[:, None]
        first = clamped(quotient(low, step32, ASM) + zero32, TOP)
        second = clamped(quotient(high, step32, ASM) + zero32, TOP)
        if BITS == 4:
            tl.store(place, (first | (second << 4)).to(tl.uint8), mask=there)
        else:
            tl.store(place, first.to(tl.uint8), mask=there)
            tl.store(place + HALF, second.to(tl.uint8), mask=there)
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
    share0,  # key heads of the first group
    eps,
    G: tl.constexpr,
    D: tl.constexpr,
    HP: tl.constexpr,  # D / 2, rounded up to a power of two
    HEADS: tl.constexpr,  # key heads of one program
    QUERIES: tl.constexpr,  # their query heads, rounded up to a power of two
    BITS: tl.constexpr,
    NORM: tl.constexpr,
    STATIC: tl.constexpr,
    MEAN: tl.constexpr,
    TWO: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token, HEADS key heads of one group."""
    if PDL:
        handed_over()
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    like = qkv.dtype.element_ty
    slots, codes, params, scale, mean, first, heads = slots0, codes0, params0, scale0, mean0, share0 * 0, share0
    begin = part * HEADS
    if TWO:
        parts = tl.cdiv(share0, HEADS)
        if part >= parts:
            slots, codes, params, scale, mean, first = slots1, codes1, params1, scale1, mean1, share0
            heads = kv_heads - share0
            begin = (part - parts) * HEADS
    slot = tl.load(slots + token)
    at = tl.arange(0, HP)
    keep = at < HALF
    turn = table + tl.load(positions + token) * D + at
    cos = tl.load(turn, mask=keep, other=0.0)[None, :]
    sin = tl.load(turn + HALF, mask=keep, other=0.0)[None, :]

    mine = begin + tl.arange(0, HEADS)
    there = (mine < heads)[:, None] & keep[None, :]
    query = tl.arange(0, QUERIES)
    some = (query < tl.minimum(heads - begin, HEADS) * G)[:, None] & keep[None, :]
    query += (first + begin) * G
    source = qkv + token * stride
    queries = source + query[:, None] * D + at[None, :]
    keys = source + (kv_heads * G + first + mine)[:, None] * D + at[None, :]
    values = keys + kv_heads * D
    low, high = tl.load(queries, mask=some, other=0.0), tl.load(queries + HALF, mask=some, other=0.0)
    k_low, k_high = tl.load(keys, mask=there, other=0.0), tl.load(keys + HALF, mask=there, other=0.0)
    v_low, v_high = tl.load(values, mask=there, other=0.0), tl.load(values + HALF, mask=there, other=0.0)

    gain_low, gain_high = cos, sin
    if NORM:
        gain_low = tl.load(q_gain + at, mask=keep, other=0.0).to(tl.float32)[None, :]
        gain_high = tl.load(q_gain + HALF + at, mask=keep, other=0.0).to(tl.float32)[None, :]
    low, high = _turn(low, high, gain_low, gain_high, cos, sin, eps, D, NORM, like)
    target = q + (token * kv_heads * G + query[:, None]) * D + at[None, :]
    tl.store(target, low, mask=some)
    tl.store(target + HALF, high, mask=some)

    if NORM:
        gain_low = tl.load(k_gain + at, mask=keep, other=0.0).to(tl.float32)[None, :]
        gain_high = tl.load(k_gain + HALF + at, mask=keep, other=0.0).to(tl.float32)[None, :]
    k_low, k_high = _turn(k_low, k_high, gain_low, gain_high, cos, sin, eps, D, NORM, like)
    k_low, k_high = k_low.to(tl.float32), k_high.to(tl.float32)
    if MEAN:
        middle = mean + mine[:, None] * D + at[None, :]
        k_low -= tl.load(middle, mask=there, other=0.0).to(tl.float32)
        k_high -= tl.load(middle + HALF, mask=there, other=0.0).to(tl.float32)
    write = (mine < heads) & (slot >= 0)
    there = there & (slot >= 0)
    BYTES: tl.constexpr = D // 2 if BITS == 4 else D  # of a token's codes; numbers, where they are plain
    PARAMS: tl.constexpr = 256 if BITS < 16 else 0  # fp16 numbers behind the codes
    page = (slot >> 6) * heads + mine
    offset = slot & 63
    here = codes + page * (2 * _PAGE * BYTES + 2 * PARAMS) + offset * BYTES
    behind = params + page * (_PAGE * BYTES + PARAMS) + _PAGE * BYTES + offset
    _store(k_low, k_high, there, write, here, behind, scale + mine, at, HALF, BITS, STATIC, ASM)
    here += _PAGE * BYTES
    v_low, v_high = v_low.to(tl.float32), v_high.to(tl.float32)
    _store(v_low, v_high, there, write, here, behind + 128, scale + heads + mine, at, HALF, BITS, STATIC, ASM)


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

    flags = constants(
        group, head_dim, form.bits, norm=norm, static=form.static, mean=mean, two=len(stores) == 2, few=tokens <= FEW
    )
    rope_write_kernel[(tokens, sum(ceil_div(store.heads, flags["HEADS"]) for store in stores))](
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
        **flags,
        num_warps=WARPS,
        enable_fp_fusion=False,
        launch_pdl=flags["PDL"],
    )
    for slot, store in zip(slots, stores, strict=True):
        if store.statistics is not None:
            note(slot.contiguous(), store)
    return q


def constants(
    group: int, head_dim: int, bits: int, *, norm: bool, static: bool, mean: bool, two: bool, few: bool
) -> dict[str, int | bool]:
    """Return what `rope_write_kernel` is compiled for."""
    heads = 1 if few and not norm else heads_of(group, head_dim)  # sums of norms keep their order
    return {
        "G": group, "D": head_dim, "HP": triton.next_power_of_2(head_dim // 2), "HEADS": heads,
        "QUERIES": triton.next_power_of_2(heads * group), "BITS": bits, "NORM": norm, "STATIC": static, "MEAN": mean,
        "TWO": two, "ASM": not INTERPRETED, "PDL": pdl(),
    }  # fmt: skip


def heads_of(group: int, head_dim: int) -> int:
    """Return the key heads of one program: as many as fit its registers beside their queries, up to 8."""
    return max(1, min(8, 4096 // (triton.next_power_of_2(group) * triton.next_power_of_2(head_dim))))


FEW = 16
"""Tokens up to which every key head has a program of its own."""

WARPS = 4
"""Warps of one program."""
