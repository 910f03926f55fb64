"""The parts of rows of produced positions, added up: pieces in runs, then runs."""

import triton
import triton.language as tl

from omniserve.kernels.cuts import cut
from omniserve.kernels.handover import handed_over
from omniserve.kernels.sums import shares


@triton.jit(
    do_not_specialize=[
        "rows", "out_head", "heads", "kv_heads", "group", "places", "span", "full", "out_head2", "heads2", "kv_heads2",
        "places2", "span2",
    ],
    do_not_specialize_on_alignment=["to", "count", "cuts", "to2", "count2"],
)  # fmt: skip
def combine_kernel(
    out,  # [rows, Hq, D]
    parts,  # fp32 [pieces, heads, D]
    norms,  # fp32 [pieces, heads, 2]
    to,  # int64 [heads], read if TO
    count,  # int32 [rows]: places of a row's list
    cuts,  # int32 [2, rows + 1], read unless LISTED
    rows,
    out_stride,
    out_head,
    heads,
    kv_heads,
    group,  # heads of a program
    places,
    span,
    full,
    parts2,  # the same of a second group, if TWO
    norms2,
    to2,
    count2,
    out_head2,
    heads2,
    kv_heads2,
    places2,
    span2,
    LISTED: tl.constexpr,
    TO: tl.constexpr,
    TWO: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # D, rounded up to a power of two
    PIECE: tl.constexpr,
    PIECE2: tl.constexpr,
    FEW: tl.constexpr,
    RUN: tl.constexpr,  # pieces of a run
    MOST: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row of some heads: its pieces in runs, in the order of the pages, then its runs."""
    row = tl.program_id(0)
    begin = tl.program_id(1) * group
    place = out + row.to(tl.int64) * out_stride
    # `attend_kernel` waited for what these come from before it let this one begin.
    if begin < heads:
        mine = tl.load(count + row, cache_modifier=".cg")
        first = row * places
        runs = rows * (places // span)
        if not LISTED:
            first = tl.load(cuts + row, cache_modifier=".cg")
            runs = tl.load(cuts + rows * 2 + 1, cache_modifier=".cg")
        whole = runs * kv_heads >= full
        if PDL:
            handed_over()
        _combine(
            place, parts, norms, to, mine, first, whole, begin, group, heads, out_head,
            TO, D, DP, PIECE, FEW, RUN, MOST,
        )  # fmt: skip
    elif TWO:
        mine = tl.load(count2 + row, cache_modifier=".cg")
        whole = rows * (places2 // span2) * kv_heads2 >= full
        if PDL:
            handed_over()
        _combine(
            place, parts2, norms2, to2, mine, row * places2, whole, begin - heads, group, heads2, out_head2,
            TO, D, DP, PIECE2, FEW, RUN, MOST,
        )  # fmt: skip


@triton.jit
def _combine(
    place, parts, norms, to, count, first, whole, begin, group, heads, out_head,
    TO: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PIECE: tl.constexpr, FEW: tl.constexpr, RUN: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """Add up the parts of some heads of a row, if it has several."""
    pieces, run = cut(count, PIECE, FEW, RUN, MOST)
    if pieces > tl.where(whole, run, 1):
        at = tl.arange(0, DP)
        for head in range(begin, begin + group):
            slot = (out_head + head).to(tl.int64)
            if TO:
                slot = tl.load(to + head)
            part = first.to(tl.int64) * heads + head
            if pieces <= run:
                value = _runs(parts, norms, part, heads, pieces, run, whole, 1, RUN, D, DP)
            elif pieces <= run * 8:
                value = _runs(parts, norms, part, heads, pieces, run, whole, 8, RUN, D, DP)
            else:
                value = _runs(parts, norms, part, heads, pieces, run, whole, MOST * 2 // RUN, RUN, D, DP)
            tl.store(place + slot * D + at, value.to(place.dtype.element_ty), mask=at < D)


@triton.jit
def _runs(
    parts, norms, part, heads, pieces, run, whole,
    COUNT: tl.constexpr, RUN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Return one head's result from up to COUNT runs, a power of two. More give the same bits: they add zeros."""
    at = tl.arange(0, DP)[None, :]
    opening = (tl.arange(0, COUNT) * run)[:, None]
    spot = part + opening * heads
    high, weight, sums = _part(parts, norms, spot, opening < pieces, at, at < D, D)
    if not whole:
        for step in tl.static_range(1, RUN):
            there = (opening + step < pieces) & (step < run)
            its, its_weight, its_sums = _part(parts, norms, spot + step * heads, there, at, at < D, D)
            high, old, new = shares(high, its)
            weight = tl.fma(weight, old, its_weight * new)
            sums = tl.fma(sums, old, its_sums * new)
    top = tl.max(high, 0)[None, :]
    share = tl.exp2(high - tl.where(top == float("-inf"), 0.0, top))
    sums = share * sums
    weight = share * weight
    for step in tl.static_range(5):  # in an order of its own, whatever the warps
        if COUNT >> step > 1:
            sums = _halved(sums, COUNT >> step, DP)
            weight = _halved(weight, COUNT >> step, 1)
    return (sums / weight).reshape(DP)


@triton.jit
def _halved(x, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Return the sums of the first and the second half of rows."""
    a, b = tl.split(tl.permute(x.reshape(2, COUNT // 2, WIDTH), (1, 2, 0)))
    return a + b


@triton.jit
def _part(parts, norms, spot, there, at, keep, D: tl.constexpr):
    """Return largest scores, sums of weights [.., 1] and sums of weighted values of parts."""
    high = tl.load(norms + spot * 2, mask=there, other=float("-inf"))
    weight = tl.load(norms + spot * 2 + 1, mask=there, other=0.0)
    return high, weight, tl.load(parts + spot * D + at, mask=there & keep, other=0.0)
