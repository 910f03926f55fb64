"""The choice of `select_pages`: from scores to lists, one program for a row and key head.

The best pages lie in as many units of a few pages each, those whose best page is best; scorers leave what tells them
apart. So a choice looks at units first and then at their pages, a few hundred numbers each time. The border between
what is taken and what is not is found by parting a range of scores in three, over and over.
"""

import triton
import triton.language as tl

from omniserve.base.types import PAGE
from omniserve.kernels.device import INTERPRETED, pdl
from omniserve.kernels.handover import handed_over
from omniserve.kernels.keep import place_of, row_of

UNIT = 8
"""Pages of a unit; the scorer of bounds takes one at a turn."""

BLOCK = 32
"""Units whose shares one program of `unit_kernel` adds up."""

_PAGE = tl.constexpr(PAGE)
_UNIT = tl.constexpr(UNIT)
_BLOCK = tl.constexpr(BLOCK)


@triton.jit(do_not_specialize=["budget", "rows"], do_not_specialize_on_alignment=["slots", "prompts", "seq_len"])
def choose_kernel(
    table,
    slots,
    prompts,
    seq_len,
    memo,
    scores,
    beside,  # by bounds as `score_kernel` leaves it, by keys as `unit_kernel` does
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
    G: tl.constexpr,  # query heads whose scores lie apart; 0: there is one score per page
    LP: tl.constexpr,
    BLOCKS: tl.constexpr,  # a power of two, at least the blocks of any row
    WIDE: tl.constexpr,  # likewise at least its units, and the pages of those that may hold the best ones
    EACH: tl.constexpr,  # of WIDE numbers those of one thread
    ASM: tl.constexpr,
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
    unit = tl.arange(0, WIDE)
    if G == 0:
        scores += source * pages
        top = tl.load(beside + source * units + unit, mask=unit < filled, other=float("-inf"))
    else:
        scores += source * G * pages
        blocks = tl.cdiv(units, _BLOCK)
        beside += source * G * (units + 2 * blocks)
        wholes = ()
        for group in tl.static_range(G):
            whole = _whole(beside + G * units + group * blocks, G * blocks, existing, BLOCKS)
            wholes = wholes + (whole,)  # noqa: RUF005 - tuples of kernels know no star
        top = _shares(beside, units, unit, unit < filled, wholes, G)
    key = ordered(top, unit < filled)
    border, most = _span(key, unit < filled, unit, EACH, ASM)
    room = wanted + unit * 0
    if filled > wanted:
        border, room = _border(key, wanted, border, most, 1, EACH, ASM)
    taken, place = _first(key, border, room, unit < filled, unit, EACH, ASM)
    there = unit // _UNIT < tl.minimum(filled, wanted)
    page = _taken(unit, taken, place, index, there, WIDE, EACH, ASM) * _UNIT + unit % _UNIT
    there = there & (page > 0) & (page < existing - 1)
    physical = tl.load(table + page, mask=there, other=0)
    if G == 0:
        score = tl.load(scores + page, mask=there, other=float("-inf"))
    else:
        score = _shares(scores, pages, page, there, wholes, G)
    key = ordered(score, there)
    if filled <= wanted:
        tl.debug_barrier()  # else ptxas 12.8 makes a predicate of this `if` for a single warp, perhaps a wrong one
        border, _ = _span(key, there, unit, EACH, ASM)
    # Few pages are better than the last unit that is taken, and not as good as the last page.
    border, room = _border(key, wanted, border, most, 5, EACH, ASM)
    taken, place = _first(key, border, room, there, unit, EACH, ASM)
    place += 1
    if not ASM:
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


@triton.jit(do_not_specialize=["budget"], do_not_specialize_on_alignment=["slots", "prompts", "seq_len"])
def unit_kernel(
    slots,
    prompts,
    seq_len,
    scores,  # fp32 [R, H, G, pages]
    beside,  # fp32 [R, H, G (units + 2 blocks)]: best scores of units, forced pages aside; of blocks best scores, sums
    kv_heads,
    interval,
    budget,
    pages,
    units,
    G: tl.constexpr,
    PDL: tl.constexpr,
):
    """What a choice by keys wants to know of the pages of one block and query head."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    if PDL:
        handed_over()
    _, position, since = place_of(slots, prompts, seq_len, row, interval)
    existing = position // _PAGE + 1
    if (since > 0) | (existing <= budget) | (block * (_BLOCK * _UNIT) >= existing):
        return
    spot = row.to(tl.int64) * kv_heads * G + head  # a query head
    blocks = tl.cdiv(units, _BLOCK)
    unit = block * _BLOCK + tl.arange(0, _BLOCK)
    page = unit[:, None] * _UNIT + tl.arange(0, _UNIT)[None, :]
    best = tl.load(scores + spot * pages + page, mask=page < existing, other=float("-inf"))
    beside += spot // G * (G * (units + 2 * blocks))
    group = head % G
    open_ = (page > 0) & (page < existing - 1)
    most = tl.max(tl.where(open_, best, float("-inf")), 1)
    tl.store(beside + group * units + unit, most, mask=unit * _UNIT < existing)
    finite = tl.reshape(tl.where(best == float("inf"), float("-inf"), best), (_BLOCK * _UNIT,), can_reorder=True)
    top = tl.max(finite, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    beside += G * units + group * blocks + block
    tl.store(beside, top)
    tl.store(beside + G * blocks, _total(tl.exp(finite - base)))


@triton.jit
def _whole(tops, sums, existing, BLOCKS: tl.constexpr):
    """Return the logarithm of the sum of exponentials of one query head's scores, from its blocks.

    sums  how far behind `tops` the sums stand
    """
    block = tl.arange(0, BLOCKS)
    there = block * (_BLOCK * _UNIT) < existing
    top = tl.load(tops + block, mask=there, other=float("-inf"))
    part = tl.load(tops + sums + block, mask=there, other=0.0)
    most = tl.max(top, 0)
    base = tl.where(most == float("-inf"), 0.0, most)
    MOST: tl.constexpr = _BLOCK * _UNIT  # a sum is not larger
    return base + tl.log(_total(tl.exp(top - base) * part * (1.0 / MOST)) * MOST)


@triton.jit
def _shares(scores, stride, at, there, wholes, G: tl.constexpr):
    """Return the logarithm of the largest share that any of G query heads gives to what stands at some places."""
    share = tl.full(at.shape, float("-inf"), tl.float32)
    for group in tl.static_range(G):
        best = tl.load(scores + group * stride + at, mask=there, other=float("-inf"))
        endless = (best == float("inf")) | (best == float("-inf"))
        share = tl.maximum(share, tl.where(endless, best, best - wholes[group]))
    return share


@triton.jit
def _total(x):
    """Return the sum of numbers of 0 to 1 in units of 2^-32: whole numbers, whose sum has no order."""
    upper = x + 192.0  # the last bit counts 2^-16
    lower = (x - (upper - 192.0)) * 65536.0 + 192.0
    zero: tl.constexpr = 0x43400000  # 192
    many = tl.sum(upper.to(tl.int32, bitcast=True) - zero, 0).to(tl.float32)
    few = tl.sum(lower.to(tl.int32, bitcast=True) - zero, 0).to(tl.float32)
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


@triton.jit
def _span(key, there, at, EACH: tl.constexpr, ASM: tl.constexpr):
    """Return the smallest key of those that are there, and one more than the largest: the same for all keys."""
    low = tl.where(there, key, 0x7FFFFFFF)
    if ASM and EACH == 1:
        return tl.inline_asm_elementwise(
            """{ .shared .align 8 .b32 ends[64]; .reg .pred p; .reg .b32 least, most, lane, to;
            redux.sync.min.s32 least, $3, 0xffffffff; redux.sync.max.s32 most, $2, 0xffffffff;
            mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0; shr.u32 to, $4, 5; shl.b32 to, to, 3;
            mov.u32 $0, ends; add.u32 to, to, $0; @p st.shared.v2.b32 [to], {least, most};
            bar.sync 1;
            mov.b32 least, 0x7fffffff; mov.b32 most, 0x80000000; mov.u32 to, %ntid.x; shr.u32 to, to, 5;
            setp.lt.u32 p, lane, to; shl.b32 to, lane, 3; add.u32 to, to, $0;
            @p ld.shared.v2.b32 {least, most}, [to];
            redux.sync.min.s32 $0, least, 0xffffffff; redux.sync.max.s32 most, most, 0xffffffff;
            add.s32 $1, most, 1; }""",
            "=&r,=&r,r,r,r", [key, low, at], dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.min(low, 0) + key * 0, tl.max(key, 0) + 1 + key * 0


@triton.jit
def _border(key, wanted, least, most, SHIFT: tl.constexpr, EACH: tl.constexpr, ASM: tl.constexpr):
    """Return the `wanted`-th largest key, and how many equal to it are wanted at most: the same number for all keys.

    least, most  at least `wanted` keys are not below `least`, fewer are not below `most`
    SHIFT        the first 2^-SHIFT of the range is looked at first, then the first half of that share of the rest
    A range of keys is parted until one is left, or as many are not below the second part as are wanted.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            _search(SHIFT, EACH), _operands(EACH, 2, 4), [key, wanted + key * 0, least, most],
            dtype=(tl.int32, tl.int32), is_pure=False, pack=EACH,
        )  # fmt: skip
    else:
        least, room = border_of(key, wanted, tl.min(least, 0), tl.min(most, 0))
        return least + key * 0, room + key * 0


@triton.constexpr_function
def _search(shift, each):
    """Return PTX of `_border`, run by all threads at once: a barrier of the block counts the keys, in one instruction.

    each  keys of a thread; operands: borders, rooms, keys, and as often what is wanted, least and most
    """
    key, wanted, least, most = (f"${at * each}" for at in range(2, 6))
    count = f"setp.ge.s32 p, {key}, mid; bar.red.popc.u32 n, 1, p;"
    for one in range(1, each):
        count += f"setp.ge.s32 p, ${2 * each + one}, mid; bar.red.popc.u32 m, 1, p; add.u32 n, n, m;"
    found = "".join(f"mov.b32 ${one}, lo; mov.b32 ${each + one}, m;" for one in range(each))
    return (
        "{ .reg .pred p; .reg .b32 lo, hi, mid, n, m, over, by;"
        f"mov.b32 lo, {least}; mov.b32 hi, {most}; mov.b32 over, 0; mov.b32 by, {shift};"
        "again: sub.u32 mid, hi, lo; setp.le.u32 p, mid, 1; @p bra.uni done;"
        f"shr.u32 mid, mid, by; max.u32 mid, mid, 1; add.u32 mid, mid, lo; {count}"
        f"setp.eq.u32 p, n, {wanted}; @p bra.uni exact; setp.gt.s32 p, n, {wanted};"
        "selp.b32 lo, mid, lo, p; selp.b32 hi, hi, mid, p; selp.b32 over, over, n, p;"
        "sub.u32 by, by, 1; max.s32 by, by, 1; selp.b32 by, by, 1, p; bra.uni again;"
        "exact: mov.b32 lo, mid; mov.b32 over, 0;"
        f"done: sub.u32 m, {wanted}, over; {found} }}"
    )


@triton.constexpr_function
def _operands(each, results, arguments):
    """Return the registers of so many results and arguments of `each` numbers."""
    return ",".join(["=&r"] * (each * results) + ["r"] * (each * arguments))


@triton.jit
def _taken(unit, taken, place, index, there, WIDE: tl.constexpr, EACH: tl.constexpr, ASM: tl.constexpr):
    """Return for place `unit // 8` of the list of taken units which one stands there."""
    if ASM:
        return tl.inline_asm_elementwise(
            _passed(WIDE, EACH), _operands(EACH, 1, 4),
            [unit, taken.to(tl.int32), place, unit // _UNIT], dtype=tl.int32, is_pure=False, pack=EACH,
        )  # fmt: skip
    else:
        tl.store(index + place, unit, mask=taken)
        tl.debug_barrier()
        return tl.load(index + unit // _UNIT, mask=there, other=0)


@triton.constexpr_function
def _passed(wide, each):
    """Return PTX that passes units on to those that look at their pages, through shared memory."""
    given, taken, place, wanted = ([f"${at * each + one}" for one in range(each)] for at in (1, 2, 3, 4))
    kept = "".join(
        f"setp.ne.s32 p, {taken[one]}, 0; mad.lo.u32 at, {place[one]}, 4, start; @p st.shared.b32 [at], {given[one]};"
        for one in range(each)
    )
    read = "".join(f"mad.lo.u32 at, {wanted[one]}, 4, start; ld.shared.b32 ${one}, [at];" for one in range(each))
    return (
        f"{{ .shared .align 4 .b32 list[{wide}]; .reg .pred p; .reg .b32 at, start; mov.u32 start, list;"
        f"{kept} bar.sync 1; {read} }}"
    )


@triton.jit
def _first(key, border, room, there, at, EACH: tl.constexpr, ASM: tl.constexpr):
    """Return which keys are taken, those above the border and the first that equal it, and their places among these.

    at  places of the keys: those of a warp follow each other if each thread has one
    """
    if ASM and EACH == 1:
        taken, place = tl.inline_asm_elementwise(
            """{ .shared .align 4 .b32 parts[32]; .reg .pred above, equal, p; .reg .b32 a, e, n, m, lane, warp, to;
            setp.gt.s32 above, $2, $3; setp.eq.s32 equal, $2, $3; setp.ne.and.s32 equal, $5, 0, equal;
            vote.sync.ballot.b32 a, above, 0xffffffff; vote.sync.ballot.b32 e, equal, 0xffffffff;
            popc.b32 n, a; popc.b32 m, e; shl.b32 m, m, 16; add.u32 n, n, m;
            mov.u32 lane, %laneid; shr.u32 warp, $6, 5; mov.u32 to, parts; setp.eq.u32 p, lane, 0;
            mad.lo.u32 m, warp, 4, to; @p st.shared.b32 [m], n;
            bar.sync 1;
            mov.b32 n, 0; setp.lt.u32 p, lane, warp; mad.lo.u32 m, lane, 4, to; @p ld.shared.b32 n, [m];
            redux.sync.add.u32 n, n, 0xffffffff;
            mov.u32 m, %lanemask_lt; and.b32 a, a, m; and.b32 e, e, m; popc.b32 a, a; popc.b32 e, e;
            shr.u32 m, n, 16; and.b32 n, n, 0xffff; add.u32 a, a, n; add.u32 e, e, m;
            setp.lt.and.s32 equal, e, $4, equal; or.pred above, above, equal; selp.b32 $0, 1, 0, above;
            min.s32 e, e, $4; add.u32 $1, a, e; }""",
            "=&r,=&r,r,r,r,r,r", [key, border, room, there.to(tl.int32), at], dtype=(tl.int32, tl.int32),
            is_pure=False, pack=1,
        )  # fmt: skip
        return taken != 0, place
    else:
        return taken_first(key, border, room, there)


def choose_constants(pages: int, budget: int, apart: int) -> dict[str, int | bool]:
    """Return what `choose_kernel` is compiled for."""
    some = triton.next_power_of_2(pages)
    wide = max(32, some // UNIT, min(some, triton.next_power_of_2(budget) * UNIT))
    return {
        "G": apart, "LP": triton.next_power_of_2(budget + 1), "BLOCKS": max(32, some // (UNIT * BLOCK)), "WIDE": wide,
        "EACH": wide // 32 // choose_warps(wide), "ASM": not INTERPRETED, "PDL": pdl(),
    }  # fmt: skip


def choose_warps(wide: int) -> int:
    """Return the warps of a choice: one unit or candidate per thread, if there are so many threads."""
    return min(32, wide // 32)
