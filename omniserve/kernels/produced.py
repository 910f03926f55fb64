"""`attend` for rows of produced positions: cut into pieces of pages, and combined.

One kernel for dense, streaming and selected lists and for kv4, kv8 and kv16. The query heads of one key head are the
rows of its products. A row is cut at fixed multiples of pages, whatever the batch, and its parts are combined in the
order of the pages. So a token's bits depend on its own row alone.

Launches depend on the number of rows and on the width of the lists, never on lengths: programs take (piece, key head)
after (piece, key head), and `cut_rows` tells them on the device which row a piece belongs to. So a launch that was
captured in a CUDA graph serves all lengths.

Codes go into the products as they are stored. Keys: scores are (q . code - zero * sum(q)) * scale. Values: the weights
take the scale, relative to the largest of the page and times 2^15, so that small ones stay above fp16's smallest.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.base.types import PAGE
from omniserve.formats.kv import LayerPages
from omniserve.kernels.codes import signed_codes, small_codes
from omniserve.kernels.device import INTERPRETED, kernel_of, need, processors
from omniserve.ops.batch import MOST_PIECES, PIECE, Reading, Rows
from omniserve.ops.pages import HeadGroup, cut_rows, pieces_of

RESIDENT = 12
"""Programs per multiprocessor that a launch offers at least: as many as its registers hold, and some."""

TURNS_EACH = 4
"""Pieces per row and key head that find a program of their own where there are many rows; programs take turns else."""

_PAGE = tl.constexpr(PAGE)
_STEP = tl.constexpr(2.0**15)
_SMALL = tl.constexpr(2.0**24)
_CODES = tl.constexpr(32512.0)  # the largest 16-bit code whose upper byte is at most 127


@triton.jit
def _size(pages, PIECE: tl.constexpr, MOST: tl.constexpr):
    """Return the pages of one piece of a row of so many pages, as `cut_rows` has it."""
    size = PIECE
    for step in tl.static_range(16):
        size = tl.where(pages > (PIECE << step) * MOST, PIECE << (step + 1), size)
    return size


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["pages"],
)
def cut_kernel(
    pages,  # int32 [rows]
    cuts,  # int32 [rows + 1]
    rows,
    PIECE: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Running sum of pieces; one program for all rows."""
    before = tl.zeros((), tl.int32)
    tl.store(cuts, before)
    for base in range(0, rows, BLOCK):
        row = base + tl.arange(0, BLOCK)
        some = row < rows
        count = tl.load(pages + row, mask=some, other=0)
        pieces = tl.cdiv(count, _size(count, PIECE, MOST))
        tl.store(cuts + row + 1, before + tl.cumsum(pieces, 0), mask=some)
        before += tl.sum(pieces, 0)


@triton.jit(
    do_not_specialize=["rows", "places", "out_head", "ids_row", "ids_head", "sink", "local"],
    do_not_specialize_on_alignment=["count", "cuts", "slots", "to", "seq_len"],
)
def attend_kernel(
    q,  # [T, Hq, D], tokens `q_stride` apart
    out,  # [T, Hq, D], tokens `out_stride` apart; written for rows of one piece
    parts,  # fp32 [pieces, G H, D]: sums of weighted values, as the products have them, for rows of several pieces
    norms,  # fp32 [pieces, G H, 2]: largest score (log2), sum of weights, likewise
    codes,  # [pages, H, ...] as codes (uint8) or plain numbers
    words,  # the same memory as int32
    scales,  # the same memory as fp16: scales and zeros behind the codes
    ids,  # int32 physical pages
    index,  # int32 logical pages, read if LISTED
    count,  # int32 [rows], read if LISTED
    cuts,  # int32 [rows + 1], read unless LISTED
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
    places,  # pieces that a row has place for, if LISTED
    scale,  # of scores, times log2(e)
    sink,
    local,
    LISTED: tl.constexpr,
    SLOTS: tl.constexpr,
    TO: tl.constexpr,
    WINDOW: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,  # G, rounded up to what the products take
    D: tl.constexpr,
    KP: tl.constexpr,  # bytes of a key's codes, or its numbers, rounded up to a power of two
    VP: tl.constexpr,  # words of a value's codes, or its numbers, rounded up to a power of two
    BITS: tl.constexpr,
    PIECE: tl.constexpr,
    MOST: tl.constexpr,
    TOKENS: tl.constexpr,  # keys of one turn of the loop
    ASM: tl.constexpr,
):
    """Pieces of rows, key head by key head, until there are no more."""
    items = rows * places * kv_heads if LISTED else tl.load(cuts + rows) * kv_heads
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        spot = item // kv_heads
        head = item - spot * kv_heads
        if LISTED:
            row = spot // places
            piece = spot - row * places
        else:
            row = _owner(cuts, rows, spot)
            piece = spot - tl.load(cuts + row)
        _piece(
            q, out, parts, norms, codes, words, scales, ids, index, count, slots, to, seq_len, kv_heads, q_stride,
            out_stride, out_head, ids_row, ids_head, scale, sink, local, spot, row, piece, head,
            LISTED, SLOTS, TO, WINDOW, G, N, D, KP, VP, BITS, PIECE, MOST, TOKENS, ASM,
        )  # fmt: skip


@triton.jit
def _owner(cuts, rows, spot):
    """Return the row that a piece belongs to: so many end before it."""
    done = tl.zeros((128,), tl.int32)
    for base in range(0, rows, 128):
        row = base + tl.arange(0, 128)
        done += (tl.load(cuts + row + 1, mask=row < rows, other=0x7FFFFFFF) <= spot).to(tl.int32)
    return tl.sum(done, 0)


@triton.jit
def _scores(
    q0, q1, codes, token, N: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """Return products of queries with keys as they are stored, [N, tokens]."""
    BYTES: tl.constexpr = D // 2 if BITS == 4 else D
    at = tl.arange(0, KP)
    place = codes + (token[:, None] * BYTES + at[None, :])
    keys = tl.load(place) if KP == BYTES else tl.load(place, mask=(at < BYTES)[None, :], other=0)
    if BITS == 16:
        s = tl.dot(q0, keys.T)
        return tl.sum(s.reshape(s.shape[0] // N, N, s.shape[1]), 0)
    else:
        s = tl.dot(q0, signed_codes(keys, False, BITS, ASM).T, out_dtype=tl.int32)
        if BITS == 4:
            s = tl.dot(q1, signed_codes(keys, True, BITS, ASM).T, s, out_dtype=tl.int32)
        upper = tl.where(tl.arange(0, 2 * N) < N, 256, 1)
        return tl.sum((s * upper[:, None]).reshape(2, N, s.shape[1]), 0).to(tl.float32)


@triton.jit
def _weighed(a, words, p, shrink, BYTE: tl.constexpr, HIGH: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Return sums [VP, N] of one code of each word, moved on by one turn."""
    return tl.dot(small_codes(words, BYTE, HIGH, BITS, ASM), p, a * shrink[None, :])


@triton.jit
def _query(q, scale, N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, BITS: tl.constexpr):
    """Return the factors of both halves of a head's queries, the sums of their codes, and what a score counts for.

    Beside codes, queries become 16-bit codes: enough for any, and no row of the products stays empty.
    """
    HALF: tl.constexpr = D // 2
    at = tl.arange(0, KP)
    keep = (at < (HALF if BITS == 4 else D))[None, :]
    if BITS == 16:
        R: tl.constexpr = N if N > 8 else 16
        m = tl.arange(0, R)
        q0 = tl.load(q + m[:, None] * D + at[None, :], mask=(m < G)[:, None] & keep, other=0.0)
        total = tl.zeros((N,), tl.float32)
        return q0, q0, total, total + scale
    else:
        g = tl.arange(0, 2 * N) % N
        some = (g < G)[:, None] & keep
        source = q + g[:, None] * D + at[None, :]
        f0 = tl.load(source, mask=some, other=0.0).to(tl.float32)
        most = tl.max(tl.abs(f0), 1)
        sound = tl.sum(f0, 1)
        f1 = f0
        if BITS == 4:
            f1 = tl.load(source + HALF, mask=some, other=0.0).to(tl.float32)
            most = tl.maximum(most, tl.max(tl.abs(f1), 1))
            sound += tl.sum(f1, 1)
        most = tl.maximum(most, 1e-30)
        unit = most / _CODES + sound * 0.0  # what is not finite must not become a number
        to_code = (1.0 / most) * _CODES
        q0, total = _bytes(f0, to_code, N)
        q1 = q0
        if BITS == 4:
            q1, other = _bytes(f1, to_code, N)
            total += other
        total = tl.sum(total.reshape(2, N), 0).to(tl.float32)
        return q0, q1, total, tl.max(unit.reshape(2, N), 0) * scale


@triton.jit
def _piece(
    q, out, parts, norms, codes, words, scales, ids, index, count, slots, to, seq_len, kv_heads, q_stride, out_stride,
    out_head, ids_row, ids_head, scale, sink, local, spot, row, piece, head,
    LISTED: tl.constexpr, SLOTS: tl.constexpr, TO: tl.constexpr, WINDOW: tl.constexpr, G: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BITS: tl.constexpr, PIECE: tl.constexpr,
    MOST: tl.constexpr, TOKENS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Attend to one piece of a row with the queries of one key head."""
    HALF: tl.constexpr = D // 2
    BYTES: tl.constexpr = D // 2 if BITS == 4 else D  # of a key's codes, or its numbers
    WIDE: tl.constexpr = BYTES // 4 if BITS < 16 else D  # words of a value, or its numbers
    length = tl.load(seq_len + row)
    position = length - 1
    listed = tl.load(count + row) if LISTED else position // _PAGE + 1
    size = _size(listed, PIECE, MOST)
    first = piece * size
    last = tl.minimum(listed, first + size)
    if first < listed:
        x = row.to(tl.int64)
        if SLOTS:
            x = tl.maximum(tl.load(slots + row), 0)  # a row that pads a batch has none
        mine = x * ids_row + head * ids_head
        if WINDOW and not LISTED:
            first = tl.where(sink == 0, tl.maximum(tl.maximum(position - local + 1, 0) // _PAGE, first), first)

        of = q + (row.to(tl.int64) * q_stride + head * G * D)
        q0, q1, total, unit_q = _query(of, scale, N, G, D, KP, BITS)
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
        word = tl.arange(0, VP)
        token = tl.arange(0, TOKENS)
        PARAMS: tl.constexpr = 256 if BITS < 16 else 0
        TURNS: tl.constexpr = _PAGE // TOKENS  # of the loop for one page
        for turn in range(first * TURNS, last * TURNS):
            place = turn // TURNS
            begin = (turn - place * TURNS) * TOKENS
            page = tl.maximum(tl.load(ids + mine + place), 0).to(tl.int64) * kv_heads + head
            logical = place
            if LISTED:
                logical = tl.load(index + mine + place)
            key = logical * _PAGE + begin + token
            here = codes + page * (2 * _PAGE * BYTES + 2 * PARAMS)  # bytes, or numbers
            seen = key <= position
            if WINDOW:
                seen = seen & ((key < sink) | (key > position - local))
            s = _scores(q0, q1, here + begin * BYTES, token, N, D, KP, BITS, ASM)
            if BITS < 16:
                behind = scales + (page * (_PAGE * BYTES + PARAMS) + _PAGE * BYTES + begin) + token
                ks = tl.load(behind).to(tl.float32)
                kz = tl.load(behind + 64).to(tl.float32)
                if BITS == 8:
                    kz -= 128.0
                s = (s - total[:, None] * kz[None, :]) * ks[None, :]
            s = tl.where(seen[None, :], s, float("-inf"))
            top = tl.maximum(best, tl.max(s, 1))
            base = tl.where(top == float("-inf"), 0.0, top) * unit_q
            shrink = tl.exp2((best - top) * unit_q)
            shrink = tl.where(best == float("-inf"), 0.0, shrink)
            best = top
            if BITS < 16:
                # What nobody has written, or nobody sees, may be NaN.
                vs = tl.where(seen, tl.load(behind + 128).to(tl.float32), 0.0)
                vz = tl.where(seen, tl.load(behind + 192).to(tl.float32), 0.0)
                grown = tl.maximum(unit, tl.max(vs, 0))
                shrink = shrink * (unit / grown)
                unit = grown
                base -= tl.log2(_STEP / grown)  # all sums are in units of STEP / grown
            p = tl.exp2(s * unit_q[:, None] - base[:, None])
            weight = weight * shrink + tl.sum(p, 1)
            if BITS < 16:
                p16 = (p * vs[None, :]).to(tl.float16)
                lift = lift * shrink + tl.sum(p16.to(tl.float32) * vz[None, :], 1)
                p16 = p16.T
                value = words + (page * ((_PAGE * BYTES + PARAMS) // 2) + _PAGE * BYTES // 4 + begin * WIDE)
                value = value + (token[None, :] * WIDE + word[:, None])
                w = tl.load(value) if VP == WIDE else tl.load(value, mask=(word < WIDE)[:, None], other=0)
                a0 = _weighed(a0, w, p16, shrink, 0, False, BITS, ASM)
                a1 = _weighed(a1, w, p16, shrink, 1, False, BITS, ASM)
                a2 = _weighed(a2, w, p16, shrink, 2, False, BITS, ASM)
                a3 = _weighed(a3, w, p16, shrink, 3, False, BITS, ASM)
                if BITS == 4:
                    a4 = _weighed(a4, w, p16, shrink, 0, True, BITS, ASM)
                    a5 = _weighed(a5, w, p16, shrink, 1, True, BITS, ASM)
                    a6 = _weighed(a6, w, p16, shrink, 2, True, BITS, ASM)
                    a7 = _weighed(a7, w, p16, shrink, 3, True, BITS, ASM)
            else:
                there = seen[None, :] & (word < WIDE)[:, None]
                value = here + (_PAGE * D + begin * D) + (token[None, :] * D + word[:, None])
                v = tl.load(value, mask=there, other=0.0)
                a0 = tl.dot(v, p.to(v.dtype).T, a0 * shrink[None, :])

        if BITS == 16:
            unit = _STEP
        group = tl.arange(0, N)
        valid = group < G
        there = (word < WIDE)[:, None] & valid[None, :]
        if listed > size:
            part = spot.to(tl.int64) * kv_heads * G + head * G + group
            tl.store(norms + part * 2, best * unit_q, mask=valid)
            tl.store(norms + part * 2 + 1, weight * (unit / _STEP), mask=valid)
            # Numbers of one product stand together: `combine_kernel` puts them in order.
            rest = parts + part[None, :] * D + word[:, None]
            if BITS == 16:
                tl.store(rest, a0, mask=there)
            else:
                back = unit * (_SMALL / _STEP)
                lift = lift * (unit / _STEP)
                tl.store(rest, a0 * back - lift[None, :], mask=there)
                tl.store(rest + WIDE, a1 * back - lift[None, :], mask=there)
                tl.store(rest + WIDE * 2, a2 * back - lift[None, :], mask=there)
                tl.store(rest + WIDE * 3, a3 * back - lift[None, :], mask=there)
                if BITS == 4:
                    back = back / 16
                    tl.store(rest + WIDE * 4, a4 * back - lift[None, :], mask=there)
                    tl.store(rest + WIDE * 5, a5 * back - lift[None, :], mask=there)
                    tl.store(rest + WIDE * 6, a6 * back - lift[None, :], mask=there)
                    tl.store(rest + WIDE * 7, a7 * back - lift[None, :], mask=there)
        else:
            slot = out_head + head * G + group
            if TO:
                slot = tl.load(to + head * G + group, mask=valid, other=0).to(tl.int32)
            target = out + row.to(tl.int64) * out_stride + slot[None, :] * D
            if BITS == 16:
                tl.store(target + word[:, None], (a0 / weight[None, :]).to(out.dtype.element_ty), mask=there)
            else:
                target += word[:, None] * 4
                back = _SMALL
                _finish(target, a0, back, lift, weight, there)
                _finish(target + 1, a1, back, lift, weight, there)
                _finish(target + 2, a2, back, lift, weight, there)
                _finish(target + 3, a3, back, lift, weight, there)
                if BITS == 4:
                    back = back / 16
                    _finish(target + HALF, a4, back, lift, weight, there)
                    _finish(target + HALF + 1, a5, back, lift, weight, there)
                    _finish(target + HALF + 2, a6, back, lift, weight, there)
                    _finish(target + HALF + 3, a7, back, lift, weight, there)


@triton.jit
def _finish(target, a, back, lift, weight, there):
    """Write results of one product where nothing is to be combined."""
    value = a * back - lift[None, :]
    tl.store(target, (value / weight[None, :]).to(target.dtype.element_ty), mask=there)


@triton.jit
def _bytes(f, to_code, N: tl.constexpr):
    """Return 16-bit codes of queries [2 N, ..], upper bytes in the first N rows and lower ones behind, and their sums.

    The sums of both count for what they are, so their sum is that of the codes.
    """
    code = tl.floor(f * to_code[:, None] + 0.5).to(tl.int32)
    upper = (code + 128) >> 8
    first = (tl.arange(0, 2 * N) < N)[:, None]
    part = tl.where(first, upper, code - upper * 256)
    return part.to(tl.int8), tl.sum(tl.where(first, part * 256, part), 1)


@triton.jit(
    do_not_specialize=["out_head", "heads", "places"],
    do_not_specialize_on_alignment=["to", "pages", "cuts"],
)
def combine_kernel(
    out,  # [rows, Hq, D]
    parts,  # fp32 [pieces, heads, D]
    norms,  # fp32 [pieces, heads, 2]
    to,  # int64 [heads], read if TO
    pages,  # int32 [rows]: places of a row's list
    cuts,  # int32 [rows + 1], read unless LISTED
    out_stride,
    out_head,
    heads,
    places,
    LISTED: tl.constexpr,
    TO: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # D, rounded up to a power of two
    BITS: tl.constexpr,
    PIECE: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,  # pieces added up at once
):
    """One row of one head: its parts, in the order of the pages."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    count = tl.load(pages + row)
    mine = tl.cdiv(count, _size(count, PIECE, MOST))
    if mine > 1:
        first = row * places
        if not LISTED:
            first = tl.load(cuts + row)
        at = tl.arange(0, DP)
        keep = at < D
        each = tl.arange(0, MOST)
        tops = norms + ((first + each).to(tl.int64) * heads + head) * 2
        top = tl.max(tl.load(tops, mask=each < mine, other=float("-inf")), 0)
        value = tl.zeros((DP,), tl.float32)
        weight = tl.zeros((), tl.float32)
        for base in range(0, mine, BLOCK):
            piece = base + tl.arange(0, BLOCK)
            there = piece < mine
            spot = (first + piece).to(tl.int64) * heads + head
            share = tl.exp2(tl.load(norms + spot * 2, mask=there, other=float("-inf")) - top)
            weight += tl.sum(share * tl.load(norms + spot * 2 + 1, mask=there, other=0.0), 0)
            part = tl.load(parts + spot[:, None] * D + at[None, :], mask=there[:, None] & keep[None, :], other=0.0)
            value += tl.sum(share[:, None] * part, 0)
        slot = (out_head + head).to(tl.int64)
        if TO:
            slot = tl.load(to + head)
        dim = at
        if BITS < 16:
            WIDE: tl.constexpr = D // 8 if BITS == 4 else D // 4
            each = at // WIDE  # byte of a word, and which nibble
            dim = (at - each * WIDE) * 4 + each % 4 + (each // 4) * (D // 2)
        target = out + row.to(tl.int64) * out_stride + slot * D + dim
        tl.store(target, (value / weight).to(out.dtype.element_ty), mask=keep)


@kernel_of(cut_rows)
def cut_rows_triton(pages: Tensor) -> Tensor:
    """One small launch."""
    cuts = torch.empty(pages.shape[0] + 1, dtype=torch.int32, device=pages.device)
    cut_kernel[(1,)](pages, cuts, pages.shape[0], **cut_constants(), num_warps=4)
    return cuts


def cut_constants() -> dict[str, int]:
    """Return what `cut_kernel` is compiled for."""
    return {"PIECE": PIECE, "MOST": MOST_PIECES, "BLOCK": 1024}


def attend_produced(
    q: Tensor, group: HeadGroup, reading: Reading, run: range, rows: Rows, out: Tensor, scale: float
) -> None:
    """Rows of one token each, the leading ones of a reading."""
    store: LayerPages = group.store
    head_dim, kv_heads = q.shape[2], store.heads
    mine = q[:, group.heads]
    per_key = mine.shape[1] // kv_heads
    past = slice(0, len(run))
    pages = reading.pages
    rowwise = pages.slots is None
    ids = pages.ids[past] if rowwise else pages.ids
    index = None if pages.index is None else pages.index[past] if rowwise else pages.index
    assert ids.stride(-1) == 1 and (index is None or index.stride() == ids.stride()), (ids.stride(), ids.shape)
    seq_len, count = rows.seq_len[run.start : run.stop], pages.count[past]
    assert seq_len.is_contiguous() and count.is_contiguous() and q.device == ids.device
    places = pieces_of(ids.shape[-1])
    flags = constants(
        per_key, head_dim, store.format.bits, listed=index is not None,
        slots=not rowwise, to=group.to is not None, window=reading.visible.local is not None,
    )  # fmt: skip
    cuts = count if index is not None else rows.cuts if run == range(rows.singles) else None
    if cuts is None:
        cuts = cut_rows(count)
    heads, pieces = per_key * kv_heads, len(run) * places
    # Scratch comes from torch's caching allocator, which serves all layers with the same memory.
    parts = torch.empty(pieces if places > 1 else 0, heads, head_dim, dtype=torch.float32, device=q.device)
    norms = torch.empty(pieces if places > 1 else 0, heads, 2, dtype=torch.float32, device=q.device)
    out = out[run.start : run.stop]
    to = seq_len if group.to is None else group.to
    most = max(processors() * RESIDENT, len(run) * kv_heads * TURNS_EACH)
    attend_kernel[(min(pieces * kv_heads, most),)](
        mine[run.start : run.stop], out, parts, norms, store.pages.view(store.format.element),
        store.pages.view(torch.int32),
        store.pages.view(torch.float16), ids, ids if index is None else index, count, cuts,
        seq_len if rowwise else pages.slots[past], to, seq_len, len(run), kv_heads, q.stride(0), out.stride(0),
        group.heads.start, ids.stride(0), ids.stride(1) if ids.dim() == 3 else 0, places,
        scale * math.log2(math.e), reading.visible.sink, reading.visible.local or 0, **flags,
        **options_of(store.format.bits, head_dim),
    )  # fmt: skip
    if places > 1:
        combine_kernel[(len(run), heads)](
            out, parts, norms, to, count, cuts, out.stride(0), group.heads.start, heads, places,
            **combine_constants(head_dim, store.format.bits, listed=index is not None, to=group.to is not None),
            num_warps=4,
        )  # fmt: skip


def combine_constants(head_dim: int, bits: int, *, listed: bool, to: bool) -> dict[str, int | bool]:
    """Return what `combine_kernel` is compiled for."""
    return {
        "LISTED": listed, "TO": to, "D": head_dim, "DP": triton.next_power_of_2(head_dim), "BITS": bits, "PIECE": PIECE,
        "MOST": MOST_PIECES, "BLOCK": 32,
    }  # fmt: skip


def constants(
    group: int,
    head_dim: int,
    bits: int,
    *,
    listed: bool,
    slots: bool,
    to: bool,
    window: bool,
) -> dict[str, int | bool]:
    """Return what `attend_kernel` is compiled for."""
    padded = max(8, triton.next_power_of_2(group))
    need(padded <= 64, f"{group} query heads per key head on a GPU: up to 64 are there")
    need(head_dim >= 32 or INTERPRETED, f"heads of {head_dim} dims on a GPU: 32 to 256 are there")
    keys, values = (head_dim, head_dim) if bits == 16 else (head_dim * bits // 8, head_dim * bits // 32)
    return {
        "LISTED": listed, "SLOTS": slots, "TO": to, "WINDOW": window, "G": group, "N": padded, "D": head_dim,
        "KP": max(32, triton.next_power_of_2(keys)), "VP": max(16, triton.next_power_of_2(values)), "BITS": bits,
        "PIECE": PIECE, "MOST": MOST_PIECES, "TOKENS": tokens_of(bits, head_dim), "ASM": not INTERPRETED,
    }  # fmt: skip


def tokens_of(bits: int, head_dim: int) -> int:
    """Return the keys of one turn: a page, or as much of it as registers hold."""
    if bits == 16:
        return PAGE // 2 if head_dim <= 128 else PAGE // 4
    return PAGE if head_dim <= 128 else PAGE // 2


def options_of(bits: int, head_dim: int) -> dict[str, int]:
    """Return how a program runs: in one warp, so that neither codes nor weights cross from warp to warp."""
    fewer = head_dim > 128 or (bits, head_dim) in ((8, 64), (4, 80))  # or registers spill
    return {"num_warps": 1, "num_stages": 3 if fewer else 5}
