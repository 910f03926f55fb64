"""The choice of `select_pages`: from scores to lists, one program for a row and key head.

The best pages lie in as many units of a few pages each, those whose best page is best; scorers leave what tells them
apart. So a choice looks at units first and then at their pages, a few hundred numbers each time. The border between
what is taken and what is not is found by parting a range of scores in three, over and over.
"""

import triton
import triton.language as tl

from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE
from omniserve.kernels.device import pdl
from omniserve.kernels.handover import handed_over
from omniserve.kernels.keep import row_of

UNIT = 8
"""Pages of a unit; the scorer of bounds takes one at a turn."""

TURN = 8192
"""Scores that a choice holds in its registers, at most, unless one query head has more."""

_PAGE = tl.constexpr(PAGE)
_UNIT = tl.constexpr(UNIT)


@triton.jit(do_not_specialize=["budget", "rows"], do_not_specialize_on_alignment=["slots", "prompts", "seq_len"])
def choose_kernel(
    table,
    slots,
    prompts,
    seq_len,
    memo,
    scores,
    beside,  # by bounds as in `score_kernel`; by keys fp32 [R, H, pages]: scores of pages, for this kernel alone
    ids,
    index,
    count,
    rows,
    kv_heads,
    table_stride,
    memo_stride,
    interval,
    budget,
    pages,  # places of a row in `scores`, a multiple of 128; units: the same of eight pages
    units,
    scale,
    G: tl.constexpr,  # query heads whose scores lie apart; 0: there is one score per page
    TURN: tl.constexpr,  # of them, how many are taken at once
    LP: tl.constexpr,
    UNITS: tl.constexpr,  # a power of two, at least the units of any row
    SOME: tl.constexpr,  # units that may hold the best pages, likewise
    PDL: tl.constexpr,
):
    """The list of a row for one key head, from the scores of the row that chose: itself, or one before it.

    The best pages lie in as many units, those whose best page is best: these units are found first.
    """
    head = tl.program_id(0)
    row = tl.program_id(1)
    # The scorer writes none of these, and whatever came before it has ended when this kernel begins.
    slot, position, since, here = row_of(slots, prompts, seq_len, row, interval)
    newest = position // _PAGE
    existing = (position - since) // _PAGE + 1
    own = row.to(tl.int64) * kv_heads + head
    source = (row - since).to(tl.int64) * kv_heads + head
    index += own * (budget + 1)
    ids += own * (budget + 1)
    memo += slot * memo_stride + head * budget
    table += slot * table_stride
    # The next refresh of the same request, if this step holds it, is the one to remember.
    following = row + interval
    next_slot = tl.load(slots + tl.minimum(following, rows - 1))
    last = (since == 0) & ((following >= rows) | (next_slot != slot))
    grown = (newest >= existing).to(tl.int32)
    kept = tl.minimum(existing, budget)
    opening, ending, behind = tl.load(table), tl.load(table + existing - 1), tl.load(table + newest * grown)
    if PDL:
        handed_over()
    if (since > 0) & (here == 0):
        return
    if head == 0:
        tl.store(count + row, kept + grown)
    if existing <= budget:
        place = tl.arange(0, LP)
        tl.store(memo + place, place, mask=last & (place < budget))
        chosen = tl.where(place < existing + grown, place, 0)  # the page that began since follows the others
        tl.store(index + place, chosen, mask=place <= budget)
        found = tl.load(table + chosen, mask=place <= budget, other=0)
        tl.store(ids + place, found, mask=place <= budget)
        return
    wanted = budget - 2  # beside the first page and the newest
    filled = (existing - 2) // _UNIT + 1  # units with other pages
    unit = tl.arange(0, UNITS)
    if G == 0:
        scores += source * pages
        top = tl.load(beside + source * units + unit, mask=unit < filled, other=float("-inf"))
    else:
        page = tl.arange(0, UNITS * _UNIT)
        score = _shares(scores + source * G * pages, page, existing, pages, scale, G, TURN, UNITS * _UNIT)
        scores = beside + own * pages
        tl.store(scores + page, score, mask=page < existing)
        score = tl.where((page > 0) & (page < existing - 1), score, float("-inf"))
        top = tl.max(tl.reshape(score, (UNITS, _UNIT)), 1)
    key = ordered(top, unit < filled)
    border = tl.min(tl.where(unit < filled, key, 0x7FFFFFFF), 0)
    most = tl.max(key, 0) + 1
    room = wanted
    if filled > wanted:
        border, room = border_of(key, wanted, border, most)
    taken, place = taken_first(key, border, room, unit < filled)
    tl.store(index + place, unit, mask=taken)
    tl.debug_barrier()
    number = tl.arange(0, SOME * _UNIT)
    there = number // _UNIT < tl.minimum(filled, wanted)
    page = tl.load(index + number // _UNIT, mask=there, other=0) * _UNIT + number % _UNIT
    there = there & (page > 0) & (page < existing - 1)
    physical = tl.load(table + page, mask=there, other=0)
    key = ordered(tl.load(scores + page, mask=there, other=float("-inf")), there)
    if filled <= wanted:
        tl.debug_barrier()  # else ptxas 12.8 makes a predicate of this `if` for a single warp, perhaps a wrong one
        border = tl.min(tl.where(there, key, 0x7FFFFFFF), 0)
    border, room = border_of(key, wanted, border, most)
    taken, place = taken_first(key, border, room, there)
    place += 1
    tl.debug_barrier()  # all have read the units
    tl.store(index + place, page, mask=taken)
    tl.store(ids + place, physical, mask=taken)
    tl.store(memo + place, page, mask=taken & last)
    tl.store(index, 0)
    tl.store(ids, opening)
    tl.store(memo, 0, mask=last)
    tl.store(index + budget - 1, existing - 1)
    tl.store(ids + budget - 1, ending)
    tl.store(memo + budget - 1, existing - 1, mask=last)
    tl.store(index + budget, newest * grown)
    tl.store(ids + budget, behind)


@triton.jit
def _shares(scores, page, existing, pages, scale, G: tl.constexpr, TURN: tl.constexpr, WIDE: tl.constexpr):
    """Return the logarithm of the largest share that a page may draw from one of G query heads."""
    score = tl.full((WIDE,), float("-inf"), tl.float32)
    for first in range(0, G, TURN):
        group = first + tl.arange(0, TURN)
        there = (group < G)[:, None] & (page < existing)[None, :]
        best = tl.load(scores + (group * pages)[:, None] + page[None, :], mask=there, other=float("-inf")) * scale
        finite = tl.where(best == float("inf"), float("-inf"), best)
        top = tl.max(finite, 1)
        base = tl.where(top == float("-inf"), 0.0, top)
        whole = base + tl.log(_total(tl.exp(finite - base[:, None])))
        share = tl.where(finite == float("-inf"), best, best - whole[:, None])
        score = tl.maximum(score, tl.max(share, 0))
    return score


@triton.jit
def _total(x):
    """Return sums [N] of numbers [N, K] of 0 to 1 in units of 2^-32: whole numbers, whose sum has no order."""
    upper = x + 192.0  # the last bit counts 2^-16
    lower = (x - (upper - 192.0)) * 65536.0 + 192.0
    zero: tl.constexpr = 0x43400000  # 192
    many = tl.sum(upper.to(tl.int32, bitcast=True) - zero, 1).to(tl.float32)
    few = tl.sum(lower.to(tl.int32, bitcast=True) - zero, 1).to(tl.float32)
    return many * 2.0**-16 + few * 2.0**-32


@triton.jit
def ordered(score, there):
    """Return int32 numbers that are ordered like the scores; less than any where nothing is there."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(there, bits ^ ((bits >> 31) & 0x7FFFFFFF), -2147483648)


@triton.jit
def border_of(key, wanted, least, most):
    """Return the `wanted`-th largest key, and how many equal to it are wanted at most.

    least, most  at least `wanted` keys are not below `least`, fewer are not below `most`
    """
    over = most * 0  # keys that are not below `most`
    width = (most - least).to(tl.uint32)
    while width > 1:
        third = tl.maximum((width >> 2) + (width >> 4), 1).to(tl.int32)
        low, high = least + third, most - third
        both = tl.sum((key >= low).to(tl.int32) + ((key >= high).to(tl.int32) << 16), 0)
        above, beyond = both & 0xFFFF, both >> 16
        if beyond >= wanted:
            least = high
        elif above >= wanted:
            least, most, over = low, high, beyond
        else:
            most, over = low, above
        width = (most - least).to(tl.uint32)
        if (above == wanted) | (beyond == wanted):  # none that equals the last one is left over
            over = most * 0
            width = width * 0 + 1
    return least, wanted - over


@triton.jit
def taken_first(key, border, room, there):
    """Return which keys are taken, those above the border and the first that equal it, and their places among these."""
    sure = key > border
    equal = there & (key == border)
    before = tl.cumsum(sure.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
    taken = sure | (equal & ((before >> 16) <= room))
    return taken, (before & 0xFFFF) + tl.minimum(before >> 16, room) - 1


def choose_constants(pages: int, budget: int, apart: int) -> dict[str, int]:
    """Return what `choose_kernel` is compiled for."""
    units = triton.next_power_of_2(ceil_div(pages, UNIT))
    return {
        "G": apart, "TURN": max(1, min(triton.next_power_of_2(apart), TURN // (units * UNIT))),
        "LP": triton.next_power_of_2(budget + 1), "UNITS": units, "SOME": min(units, triton.next_power_of_2(budget)),
        "PDL": pdl(),
    }  # fmt: skip


def choose_warps(narrow: dict[str, int]) -> int:
    """Return the warps of a choice: 4 units or candidates per thread; by keys 16 to 32 scores of pages."""
    few = max(narrow["UNITS"], narrow["SOME"] * UNIT) // 128
    many = narrow["UNITS"] * UNIT * narrow["TURN"] // 1024 if narrow["G"] else 0
    return min(16, max(1, few, many))
