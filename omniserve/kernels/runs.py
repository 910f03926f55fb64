"""`attend_kernel`: what the queries of one key head see of a piece of a row, or of a run of pieces.

One kernel for dense, streaming and selected lists and for kv4, kv8 and kv16. The query heads of one key head are the
rows of its products.
"""

import triton
import triton.language as tl

from omniserve.base.types import PAGE
from omniserve.kernels.cuts import row_of_cuts, row_of_list, run_of, shift_of
from omniserve.kernels.handover import held_back
from omniserve.kernels.sums import (
    STEP,
    add,
    dims,
    joined,
    plain,
    queries,
    query_codes,
    rounded,
    scores_of,
    settle,
    sums_of,
    weighed,
)  # fmt: skip

_PAGE = tl.constexpr(PAGE)


@triton.jit(
    do_not_specialize=[
        "rows", "places", "span", "out_head", "ids_row", "ids_head", "sink", "local", "offered", "full", "kv_heads2",
        "places2", "span2", "out_head2", "ids_row2", "ids_head2", "sink2", "local2",
    ],
    do_not_specialize_on_alignment=["count", "cuts", "slots", "to", "seq_len", "count2", "to2"],
)  # fmt: skip
def attend_kernel(
    q,  # [T, G H, D], tokens `q_stride` apart: the group's heads
    out,  # [T, Hq, D], tokens `out_stride` apart; written for rows that one program takes whole
    parts,  # fp32 [pieces, G H, D]: sums of weighted values; of a run at its first piece
    norms,  # fp32 [pieces, G H, 2]: largest score (log2), sum of weights, likewise
    codes,  # [pages, H, ...] as codes (uint8) or plain numbers
    words,  # the same memory as int32
    scales,  # the same memory as fp16: scales and zeros behind the codes
    ids,  # int32 physical pages
    index,  # int32 logical pages, read if LISTED
    count,  # int32 [rows], read if LISTED
    cuts,  # int32 [2, rows + 1], read unless LISTED
    slots,  # int64 [rows], read if SLOTS
    to,  # int64 [G H], read if TO
    seq_len,  # int32 [rows]
    rows,
    kv_heads,
    q_stride,
    out_stride,
    out_head,  # the group's first head in `out`
    ids_row,  # strides of ids and index
    ids_head,
    places,  # pieces that a row has place for, a multiple of RUN, if LISTED
    span,  # pieces of the shortest runs that such rows have
    offered,  # programs of a key head; if TWO, those of the second group come behind
    full,  # runs times key heads from which programs take whole runs
    scale,  # of scores, times log2(e)
    sink,
    local,
    q2,  # the same of a second group, if TWO: it has lists, and no slots
    parts2,
    norms2,
    codes2,
    words2,
    scales2,
    ids2,
    index2,
    count2,
    to2,
    kv_heads2,
    out_head2,
    ids_row2,
    ids_head2,
    places2,
    span2,
    sink2,
    local2,
    LISTED: tl.constexpr,
    SLOTS: tl.constexpr,
    FEW_ROWS: tl.constexpr,  # 32 at most
    TO: tl.constexpr,
    WINDOW: tl.constexpr,
    TWO: tl.constexpr,
    WINDOW2: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,  # G, rounded up to what the products take
    D: tl.constexpr,
    KP: tl.constexpr,  # bytes of a key's codes, or its numbers, rounded up to a power of two
    VP: tl.constexpr,  # words of a value's codes, or its numbers, rounded up to a power of two
    BITS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECE2: tl.constexpr,
    FEW: tl.constexpr,
    RUN: tl.constexpr,  # pieces of a run
    MOST: tl.constexpr,
    TOKENS: tl.constexpr,  # keys of one turn of the loop
    FOLD: tl.constexpr,  # whether programs may take whole runs
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Pieces of rows or runs of them, of one key head, until there are no more; some programs: of a second group."""
    if PDL:
        held_back()  # `combine_kernel` reads counts and cuts at once
    head = tl.program_id(0)
    begin = tl.program_id(1)
    if begin < offered:
        if head < kv_heads:
            if LISTED:
                whole = rows * (places // span) * kv_heads >= full
                items = rows * tl.where(whole, places // span, places)
                row, index_in, first, length, slot = row_of_list(
                    seq_len, slots, rows, places, begin, whole, span, SLOTS
                )
            else:
                runs = tl.load(cuts + rows * 2 + 1)
                pieces = tl.load(cuts + rows)
                whole = runs * kv_heads >= full
                items = tl.where(whole, runs, pieces)
                row, index_in, first, length, slot = row_of_cuts(
                    cuts, seq_len, slots, rows, begin, whole, SLOTS, FEW_ROWS
                )
            for item in range(begin, items, offered):
                mine = tl.maximum(slot, 0) * ids_row + head * ids_head  # a row that pads a batch has no slot
                _run(
                    q, out, parts, norms, codes, words, scales, ids + mine, index + mine, count, to, kv_heads,
                    q_stride, out_stride, out_head, scale, sink, local, row, length, first, index_in,
                    whole, head, LISTED, TO, WINDOW, G, N, D, KP, VP, BITS, PIECE, FEW, RUN, MOST, TOKENS, FOLD, ASM,
                )  # fmt: skip
                following = item + offered
                if following < items:
                    if LISTED:
                        row, index_in, first, length, slot = row_of_list(
                            seq_len, slots, rows, places, following, whole, span, SLOTS
                        )
                    else:
                        row, index_in, first, length, slot = row_of_cuts(
                            cuts, seq_len, slots, rows, following, whole, SLOTS, FEW_ROWS
                        )
    elif TWO:  # noqa: SIM102 - a constexpr stands by itself
        if head < kv_heads2:
            whole = rows * (places2 // span2) * kv_heads2 >= full
            items = rows * tl.where(whole, places2 // span2, places2)
            for item in range(begin - offered, items, tl.num_programs(1) - offered):
                row, index_in, first, length, slot = row_of_list(
                    seq_len, seq_len, rows, places2, item, whole, span2, False
                )
                mine = slot * ids_row2 + head * ids_head2
                _run(
                    q2, out, parts2, norms2, codes2, words2, scales2, ids2 + mine, index2 + mine, count2, to2,
                    kv_heads2, q_stride, out_stride, out_head2, scale, sink2, local2, row, length, first, index_in,
                    whole, head, True, TO, WINDOW2, G, N, D, KP, VP, BITS, PIECE2, FEW, RUN, MOST, TOKENS, FOLD, ASM,
                )  # fmt: skip


@triton.jit
def listed_pages(ids, index, begin, end, LISTED: tl.constexpr):
    """Return the next 32 physical and logical pages of a list: a turn's then waits for no memory."""
    at = begin + tl.arange(0, 32)
    near = tl.load(ids + at, mask=at < end, other=0)
    return near, tl.load(index + at, mask=at < end, other=0) if LISTED else near


@triton.jit
def _run(
    q, out, parts, norms, codes, words, scales, ids, index, count, to, kv_heads, q_stride, out_stride, out_head, scale,
    sink, local, row, length, first, index_in, whole, head,
    LISTED: tl.constexpr, TO: tl.constexpr, WINDOW: tl.constexpr, G: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BITS: tl.constexpr, PIECE: tl.constexpr,
    FEW: tl.constexpr, RUN: tl.constexpr, MOST: tl.constexpr, TOKENS: tl.constexpr, FOLD: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Attend to some pieces of a row with the queries of one key head, and add the pieces up as they come."""
    BYTES: tl.constexpr = D // 2 if BITS == 4 else D  # of a key's codes, or its numbers
    WIDE: tl.constexpr = BYTES // 4 if BITS < 16 else D  # words of a value, or its numbers
    PARAMS: tl.constexpr = 256 if BITS < 16 else 0
    TURNS: tl.constexpr = _PAGE // TOKENS  # of the loop for one page
    position = length - 1
    listed = tl.load(count + row) if LISTED else position // _PAGE + 1
    shift = shift_of(listed, PIECE, FEW, MOST)
    each = tl.where(whole, run_of(shift, PIECE, RUN), 1)
    begins = index_in * each
    opening = begins << shift
    last = tl.minimum(listed, opening + (each << shift))
    if opening < last:
        oldest = opening
        if WINDOW and not LISTED:
            seen_from = tl.where(sink == 0, tl.maximum(position - local + 1, 0) // _PAGE, 0)
            oldest = tl.minimum(tl.maximum(opening, seen_from), last)
        # What a first turn needs is asked for at once: what waits for something else waits once more for memory.
        near, far = listed_pages(ids, index, oldest, last, LISTED)
        f0, f1 = queries(q + (row.to(tl.int64) * q_stride + head * G * D), N, G, D, KP, BITS)
        lane = tl.arange(0, 32)
        q0, q1, total, unit_q = query_codes(f0, f1, scale, N, D, BITS)
        word = tl.arange(0, VP)
        token = tl.arange(0, TOKENS)
        group = tl.arange(0, N)
        valid = group < G
        part = (first + begins).to(tl.int64) * kv_heads * G + head * G + group
        dim, within = dims(D, VP, BITS)
        within = valid[:, None, None] & within
        rest = parts + part[:, None, None] * D + dim
        best = tl.full((N,), float("-inf"), tl.float32)
        weight = tl.zeros((N,), tl.float32)
        lift = tl.zeros((N,), tl.float32)
        unit = tl.full((), 1e-30, tl.float32)
        a0 = tl.zeros((VP, N), tl.float32)
        a1 = tl.zeros((VP, N), tl.float32)
        a2 = tl.zeros((VP, N), tl.float32)
        a3 = tl.zeros((VP, N), tl.float32)
        a4 = tl.zeros((VP, N), tl.float32)
        a5 = tl.zeros((VP, N), tl.float32)
        a6 = tl.zeros((VP, N), tl.float32)
        a7 = tl.zeros((VP, N), tl.float32)
        fresh = (((oldest >> shift) + 1) << shift) * TURNS
        until = fresh  # where the next piece begins
        for block in range(oldest, last, 32):
            if block > oldest:
                near, far = listed_pages(ids, index, block, last, LISTED)
            for turn in range(block * TURNS, tl.minimum(block + 32, last) * TURNS):
                if FOLD:  # noqa: SIM102 - a constexpr stands by itself
                    if turn >= until:  # a piece is done: add it to those before it, and begin anew
                        sums = sums_of(a0, a1, a2, a3, a4, a5, a6, a7, lift, unit, VP, N, BITS)
                        add(
                            sums, rounded(best, unit_q), plain(weight, unit, BITS), rest, norms + part * 2, valid,
                            within, until > fresh, ASM,
                        )  # fmt: skip
                        until += TURNS << shift
                        best = tl.full((N,), float("-inf"), tl.float32)  # all sums become 0 of it
                        unit = tl.full((), 1e-30, tl.float32)
                place = turn // TURNS
                begin = (turn - place * TURNS) * TOKENS
                page = tl.maximum(tl.sum(tl.where(lane == place - block, near, 0), 0), 0).to(tl.int64) * kv_heads + head
                logical = place
                if LISTED:
                    logical = tl.sum(tl.where(lane == place - block, far, 0), 0)
                here = codes + page * (2 * _PAGE * BYTES + 2 * PARAMS)  # bytes, or numbers
                earliest = logical * _PAGE + begin
                key = earliest + token
                seen = key <= position
                hidden = earliest + TOKENS > length
                if WINDOW:
                    seen = seen & ((key < sink) | (key > position - local))
                    hidden = hidden | ((earliest <= position - local) & (earliest + TOKENS > sink))
                s = scores_of(q0, q1, here + begin * BYTES, token, N, D, KP, BITS, ASM)
                if BITS < 16:
                    behind = scales + (page * (_PAGE * BYTES + PARAMS) + _PAGE * BYTES + begin) + token
                    ks = tl.load(behind).to(tl.float32)
                    kz = tl.load(behind + 64).to(tl.float32)
                    if BITS == 8:
                        kz -= 128.0
                    s = (s - total[:, None] * kz[None, :]) * ks[None, :]
                if hidden:
                    s = tl.where(seen[None, :], s, float("-inf"))
                top = tl.maximum(best, tl.max(s, 1))
                base = tl.where(top == float("-inf"), 0.0, top) * unit_q
                shrink = tl.where(best == float("-inf"), 0.0, tl.exp2((best - top) * unit_q))
                best = top
                if BITS < 16:
                    vs = tl.load(behind + 128).to(tl.float32)
                    vz = tl.load(behind + 192).to(tl.float32)
                    if hidden:  # what nobody has written, or nobody sees, may be NaN
                        vs = tl.where(seen, vs, 0.0)
                        vz = tl.where(seen, vz, 0.0)
                    grown = tl.maximum(unit, tl.max(vs, 0))
                    shrink = shrink * (unit / grown)
                    unit = grown
                    base -= tl.log2(STEP / grown)  # all sums are in units of STEP / grown
                p = tl.exp2(s * unit_q[:, None] - base[:, None])
                weight = weight * shrink + tl.sum(p, 1)
                if BITS < 16:
                    p16 = (p * vs[None, :]).to(tl.float16)
                    lift = lift * shrink + tl.sum(p16.to(tl.float32) * vz[None, :], 1)
                    p16 = p16.T
                    value = words + (page * ((_PAGE * BYTES + PARAMS) // 2) + _PAGE * BYTES // 4 + begin * WIDE)
                    value = value + (token[None, :] * WIDE + word[:, None])
                    w = tl.load(value) if VP == WIDE else tl.load(value, mask=(word < WIDE)[:, None], other=0)
                    if BITS == 8:
                        a0 *= shrink[None, :]
                        a1 *= shrink[None, :]
                        a2 *= shrink[None, :]
                        a3 *= shrink[None, :]
                    elif tl.min(shrink, 0) < 1:
                        a0 *= shrink[None, :]
                        a1 *= shrink[None, :]
                        a2 *= shrink[None, :]
                        a3 *= shrink[None, :]
                        a4 *= shrink[None, :]
                        a5 *= shrink[None, :]
                        a6 *= shrink[None, :]
                        a7 *= shrink[None, :]
                    a0 = weighed(a0, w, p16, 0, False, BITS, ASM)
                    a1 = weighed(a1, w, p16, 1, False, BITS, ASM)
                    a2 = weighed(a2, w, p16, 2, False, BITS, ASM)
                    a3 = weighed(a3, w, p16, 3, False, BITS, ASM)
                    if BITS == 4:
                        a4 = weighed(a4, w, p16, 0, True, BITS, ASM)
                        a5 = weighed(a5, w, p16, 1, True, BITS, ASM)
                        a6 = weighed(a6, w, p16, 2, True, BITS, ASM)
                        a7 = weighed(a7, w, p16, 3, True, BITS, ASM)
                else:
                    there = seen[None, :] & (word < WIDE)[:, None]
                    value = here + (_PAGE * D + begin * D) + (token[None, :] * D + word[:, None])
                    v = tl.load(value, mask=there, other=0.0)
                    a0 = tl.dot(v, p.to(v.dtype).T, a0 * shrink[None, :])

        more = until > fresh
        sums = sums_of(a0, a1, a2, a3, a4, a5, a6, a7, lift, unit, VP, N, BITS)
        weight = plain(weight, unit, BITS)
        if listed > (each << shift):  # other programs have other pieces
            add(sums, rounded(best, unit_q), weight, rest, norms + part * 2, valid, within, more, ASM)
        else:
            slot = out_head + head * G + group
            if TO:
                slot = tl.load(to + head * G + group, mask=valid, other=0).to(tl.int32)
            settle(0, ASM)
            _, weight, sums = joined(
                sums, rounded(best, unit_q), weight, rest, norms + part * 2, valid & more, within & more
            )
            target = out + row.to(tl.int64) * out_stride + slot[:, None, None] * D + dim
            tl.store(target, (sums / weight[:, None, None]).to(out.dtype.element_ty), mask=within)
