"""Statistics of logical pages, made anew from the keys as stored: what `rope_write` leaves for `select_pages`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE
from omniserve.formats.kv import LOGICAL, LayerPages
from omniserve.kernels.device import need, pdl
from omniserve.kernels.handover import handed_over

SCAN = 512
"""Slots that are looked through at once."""

CROWD = 512
"""Tokens from which on one program takes all heads: most have nothing to do, and looking through slots costs more."""

_PAGE = tl.constexpr(PAGE)
_LOGICAL = tl.constexpr(LOGICAL)


@triton.jit
def _half_above(x):
    """Return the smallest fp16 that is not below x. fp16 of one sign are ordered like their bits."""
    half = x.to(tl.float16)
    short = half.to(tl.float32) < x
    bits = half.to(tl.int16, bitcast=True).to(tl.int32)
    up = tl.where(bits < 0, tl.where(bits == -32768, 1, bits - 1), bits + 1)
    return tl.where(short, up, bits).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def statistics_kernel(
    slots,  # int64 [T]
    codes,  # [pages, H, ...] as codes (uint8) or plain numbers
    scales,  # the same memory as fp16: scales and zeros behind the codes
    statistics,  # fp16 [pages, H, 4, 2, D]
    tokens,
    kv_heads,
    each,  # key heads of one program
    D: tl.constexpr,
    HP: tl.constexpr,  # D / 2, rounded up to a power of two
    BITS: tl.constexpr,
    SCAN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token, some key heads: the bounds of its logical page, if it is the last one of this call in it."""
    if PDL:
        handed_over()
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    part = slot // _LOGICAL
    following = tl.load(slots + token + 1, mask=token + 1 < tokens, other=-1)
    if (slot < 0) | ((following > slot) & (following // _LOGICAL == part)):
        return
    later = 0
    if slot % _LOGICAL != _LOGICAL - 1:
        # A request's tokens may lie apart: its produced positions stand before those of its prompt.
        for first in range(0, tokens, SCAN):
            at = first + tl.arange(0, SCAN)
            other = tl.load(slots + at, mask=at < tokens, other=-1)
            later += tl.sum(((other > slot) & (other // _LOGICAL == part)).to(tl.int32), 0)
    if later > 0:
        return
    within = tl.arange(0, _LOGICAL)
    at = tl.arange(0, HP)
    there = at < HALF
    keep = there[None, :]
    used = (within <= slot % _LOGICAL)[:, None]
    infinity = float("inf")
    BYTES: tl.constexpr = D // 2 if BITS == 4 else D  # of a token's codes; numbers, where they are plain
    SCALES: tl.constexpr = 256 if BITS < 16 else 0  # fp16 numbers behind the codes
    place = (slot % _PAGE) // _LOGICAL
    offset = place * _LOGICAL + within
    for head in range(tl.program_id(1) * each, tl.minimum((tl.program_id(1) + 1) * each, kv_heads)):
        page = (slot // _PAGE) * kv_heads + head
        here = codes + page * (2 * _PAGE * BYTES + 2 * SCALES) + offset[:, None] * BYTES + at[None, :]
        first = tl.load(here, mask=keep, other=0)
        if BITS == 4:
            low, high = (first & 0xF).to(tl.float32), (first >> 4).to(tl.float32)
        else:
            low, high = first.to(tl.float32), tl.load(here + HALF, mask=keep, other=0).to(tl.float32)
        if BITS < 16:
            behind = scales + page * (_PAGE * BYTES + SCALES) + _PAGE * BYTES + offset
            scale, zero = tl.load(behind).to(tl.float32)[:, None], tl.load(behind + _PAGE).to(tl.float32)[:, None]
            low, high = (low - zero) * scale, (high - zero) * scale
        target = statistics + (page * (_PAGE // _LOGICAL) + place) * (2 * D) + at
        tl.store(target, -_half_above(-tl.min(tl.where(used, low, infinity), 0)), mask=there)
        tl.store(target + HALF, -_half_above(-tl.min(tl.where(used, high, infinity), 0)), mask=there)
        tl.store(target + D, _half_above(tl.max(tl.where(used, low, -infinity), 0)), mask=there)
        tl.store(target + D + HALF, _half_above(tl.max(tl.where(used, high, -infinity), 0)), mask=there)


def note(slots: Tensor, store: LayerPages) -> None:
    """Make the statistics of the logical pages that hold these slots anew, as `LayerPages` says; slots int64 [T]."""
    statistics = store.statistics
    assert statistics is not None and statistics.is_contiguous()
    need(store.head_dim % 2 == 0, f"statistics of heads of {store.head_dim} dims on a GPU: even numbers are there")
    if not slots.shape[0]:
        return
    each = 1 if slots.shape[0] < CROWD else store.heads
    statistics_kernel[(slots.shape[0], ceil_div(store.heads, each))](
        slots,
        store.pages.view(store.format.element),
        store.pages.view(torch.float16),
        statistics,
        slots.shape[0],
        store.heads,
        each,
        **constants(store.head_dim, store.format.bits),
        num_warps=warps_of(store.head_dim),
        enable_fp_fusion=False,
        launch_pdl=pdl(),
    )


def constants(head_dim: int, bits: int) -> dict[str, int | bool]:
    """Return what `statistics_kernel` is compiled for."""
    return {"D": head_dim, "HP": triton.next_power_of_2(head_dim // 2), "BITS": bits, "SCAN": SCAN, "PDL": pdl()}


def warps_of(head_dim: int) -> int:
    """Return the warps of one program."""
    return 1 if head_dim <= 128 else 4
