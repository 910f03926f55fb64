"""`attend` over page lists: rows of produced positions, cut into pieces of pages and combined; prompts: `prefill.py`.

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
from omniserve.kernels.codes import halves
from omniserve.kernels.device import INTERPRETED, kernel_of, need, processors
from omniserve.kernels.prefill import Prompts, attend_prompts, serving
from omniserve.kernels.write import checked
from omniserve.ops.batch import MOST_PIECES, PIECE, Reading, Rows, Workspace
from omniserve.ops.pages import HeadGroup, attend, cut_rows, pieces_of

RESIDENT = 12
"""Programs per multiprocessor that a launch offers at least: as many as its registers hold, and some."""

TURNS_EACH = 4
"""Pieces per row and key head that find a program of their own where there are many rows; programs take turns else."""

_PAGE = tl.constexpr(PAGE)
_STEP = tl.constexpr(2.0**15)


@triton.jit
def _size(pages, PIECE: tl.constexpr, MOST: tl.constexpr):
    """Return the pages of one piece of a row of so many pages, as `cut_rows` has it."""
    size = PIECE
    for step in tl.static_range(16):
        size = tl.where(pages > (PIECE << step) * MOST, PIECE << (step + 1), size)
    return size


@triton.jit
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


@triton.jit
def attend_kernel(
    q,  # [T, Hq, D], tokens `q_stride` apart
    out,  # [T, Hq, D], tokens `out_stride` apart; written for rows of one piece
    parts,  # fp32 [pieces, G H, D]: sums of weighted values, written for rows of several pieces
    norms,  # fp32 [pieces, G H, 2]: largest score (log2), sum of weights, likewise
    codes,  # [pages, H, ...] as codes (uint8) or plain numbers
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
    M: tl.constexpr,  # rows of the products: G, rounded up
    D: tl.constexpr,
    HP: tl.constexpr,  # D / 2, rounded up to a power of two
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
            q, out, parts, norms, codes, scales, ids, index, count, slots, to, seq_len, kv_heads, q_stride, out_stride,
            out_head, ids_row, ids_head, scale, sink, local, spot, row, piece, head,
            LISTED, SLOTS, TO, WINDOW, G, M, D, HP, BITS, PIECE, MOST, TOKENS, ASM,
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
def _piece(
    q, out, parts, norms, codes, scales, ids, index, count, slots, to, seq_len, kv_heads, q_stride, out_stride,
    out_head, ids_row, ids_head, scale, sink, local, spot, row, piece, head,
    LISTED: tl.constexpr, SLOTS: tl.constexpr, TO: tl.constexpr, WINDOW: tl.constexpr, G: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, BITS: tl.constexpr, PIECE: tl.constexpr, MOST: tl.constexpr,
    TOKENS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Attend to one piece of a row with the queries of one key head."""
    HALF: tl.constexpr = D // 2
    WHOLE: tl.constexpr = HALF == HP
    length = tl.load(seq_len + row)
    group = tl.arange(0, M)
    valid = group < G
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

        at = tl.arange(0, HP)
        keep = (at < HALF)[None, :]
        some = valid[:, None] & keep
        source = q + row.to(tl.int64) * q_stride + (head * G + group)[:, None] * D + at[None, :]
        q0 = tl.load(source, mask=some, other=0.0)
        q1 = tl.load(source + HALF, mask=some, other=0.0)
        like = q0.dtype
        total = tl.sum(q0.to(tl.float32), 1) + tl.sum(q1.to(tl.float32), 1)

        best = tl.full((M,), float("-inf"), tl.float32)
        weight = tl.zeros((M,), tl.float32)
        a0 = tl.zeros((M, HP), tl.float32)
        a1 = tl.zeros((M, HP), tl.float32)
        BYTES: tl.constexpr = D // 2 if BITS == 4 else D
        PARAMS: tl.constexpr = 256 if BITS < 16 else 0
        TURNS: tl.constexpr = _PAGE // TOKENS  # of the loop for one page
        for turn in range(first * TURNS, last * TURNS):
            place = turn // TURNS
            within = (turn - place * TURNS) * TOKENS + tl.arange(0, TOKENS)
            page = tl.maximum(tl.load(ids + mine + place), 0).to(tl.int64) * kv_heads + head
            logical = place
            if LISTED:
                logical = tl.load(index + mine + place)
            key = logical * _PAGE + within
            here = codes + page * (2 * _PAGE * BYTES + 2 * PARAMS)
            seen = (key <= position)[None, :] & valid[:, None]
            if WINDOW:
                seen = seen & ((key < sink)[None, :] | (key > position - local)[None, :])
            shown = tl.max(seen.to(tl.int32), 0) > 0
            k0, k1 = halves(here, within, at, keep, D, BITS, WHOLE, like, ASM)
            s = tl.dot(q0, k0.T)
            s = tl.dot(q1, k1.T, s)
            if BITS < 16:
                behind = scales + page * (_PAGE * BYTES + PARAMS) + _PAGE * BYTES + within
                ks = tl.load(behind).to(tl.float32)
                kz = tl.load(behind + 64).to(tl.float32)
                s = (s - total[:, None] * kz[None, :]) * (ks * scale)[None, :]
            else:
                s = s * scale
            s = tl.where(seen, s, float("-inf"))
            top = tl.maximum(best, tl.max(s, 1))
            base = tl.where(top == float("-inf"), 0.0, top)
            p = tl.exp2(s - base[:, None])
            shrink = tl.exp2(best - base)
            weight = weight * shrink + tl.sum(p, 1)
            if BITS < 16:
                v0, v1 = halves(here + _PAGE * BYTES, within, at, keep, D, BITS, WHOLE, tl.float16, ASM)
                # What nobody has written, or nobody sees, may be NaN.
                vs = tl.where(shown, tl.load(behind + 128).to(tl.float32), 0.0)
                vz = tl.where(shown, tl.load(behind + 192).to(tl.float32), 0.0)
                most = tl.maximum(tl.max(vs, 0), 1e-30)
                p16 = (p * (vs * (_STEP / most))[None, :]).to(tl.float16)
                lift = tl.sum(p16.to(tl.float32) * vz[None, :], 1)[:, None]
                back = most / _STEP
                a0 = a0 * shrink[:, None] + (tl.dot(p16, v0) - lift) * back
                a1 = a1 * shrink[:, None] + (tl.dot(p16, v1) - lift) * back
            else:
                there = shown[:, None] & keep
                cell = here + _PAGE * D + within[:, None] * D + at[None, :]
                v0 = tl.load(cell, mask=there, other=0.0)
                v1 = tl.load(cell + HALF, mask=there, other=0.0)
                p16 = p.to(v0.dtype)
                a0 = tl.dot(p16, v0, a0 * shrink[:, None])
                a1 = tl.dot(p16, v1, a1 * shrink[:, None])
            best = top

        if listed > size:
            part = spot.to(tl.int64) * kv_heads * G + head * G + group
            tl.store(norms + part * 2, best, mask=valid)
            tl.store(norms + part * 2 + 1, weight, mask=valid)
            rest = parts + part[:, None] * D + at[None, :]
            tl.store(rest, a0, mask=some)
            tl.store(rest + HALF, a1, mask=some)
        else:
            slot = out_head + head * G + group
            if TO:
                slot = tl.load(to + head * G + group, mask=valid, other=0).to(tl.int32)
            target = out + row.to(tl.int64) * out_stride + slot[:, None] * D + at[None, :]
            tl.store(target, (a0 / weight[:, None]).to(out.dtype.element_ty), mask=some)
            tl.store(target + HALF, (a1 / weight[:, None]).to(out.dtype.element_ty), mask=some)


@triton.jit
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
        target = out + row.to(tl.int64) * out_stride + slot * D + at
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


@kernel_of(attend, inside=serving)
def attend_triton(
    q: Tensor, groups: tuple[HeadGroup, ...], rows: Rows, out: Tensor, work: Workspace, *, scale: float
) -> None:
    """Per head group: one launch for rows of produced positions and its combine, one for those of prompts."""
    assert q.shape == out.shape, f"attend: q is {tuple(q.shape)}, out is {tuple(out.shape)}"
    need(
        q.dtype in (torch.float16, torch.bfloat16) and out.dtype == q.dtype,
        f"attend of {q.dtype} into {out.dtype} on a GPU: float16 or bfloat16, the same for both, are there",
    )
    head_dim = q.shape[2]
    assert q.stride()[1:] == (head_dim, 1) == out.stride()[1:], (q.stride(), out.stride())
    for group in groups:
        checked([group.store], head_dim)
        plain = group.store.format.bits == 16
        need(not plain or group.store.format.element == q.dtype, f"kv16 pages of {group.store.format.element}: as q is")
        for reading in group.reads:
            border = min(max(rows.singles, reading.rows.start), reading.rows.stop)
            if reading.rows.start < border:
                _attend_produced(q, group, reading, range(reading.rows.start, border), rows, out, scale)
            if border < reading.rows.stop:
                attend_prompts(Prompts(q, out, group, reading, range(border, reading.rows.stop), rows, scale))


def _attend_produced(
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
        store.pages.view(torch.float16), ids, ids if index is None else index, count, cuts,
        seq_len if rowwise else pages.slots[past], to, seq_len, len(run), kv_heads, q.stride(0), out.stride(0),
        group.heads.start, ids.stride(0), ids.stride(1) if ids.dim() == 3 else 0, places,
        scale * math.log2(math.e), reading.visible.sink, reading.visible.local or 0, **flags,
        num_warps=warps_of(flags), num_stages=stages_of(flags),
    )  # fmt: skip
    if places > 1:
        combine_kernel[(len(run), heads)](
            out, parts, norms, to, count, cuts, out.stride(0), group.heads.start, heads, places,
            **combine_constants(head_dim, listed=index is not None, to=group.to is not None), num_warps=4,
        )  # fmt: skip


def combine_constants(head_dim: int, *, listed: bool, to: bool) -> dict[str, int | bool]:
    """Return what `combine_kernel` is compiled for."""
    return {
        "LISTED": listed, "TO": to, "D": head_dim, "DP": triton.next_power_of_2(head_dim), "PIECE": PIECE,
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
    padded = triton.next_power_of_2(group)
    half = triton.next_power_of_2(head_dim // 2)
    need(padded <= 64, f"{group} query heads per key head on a GPU: up to 64 are there")
    need(half >= 16 or INTERPRETED, f"heads of {head_dim} dims on a GPU: 32 to 256 are there")
    tokens = PAGE if bits == 16 else PAGE // 2 if half <= 64 else PAGE // 4
    return {
        "LISTED": listed, "SLOTS": slots, "TO": to, "WINDOW": window,
        "G": group, "M": max(16, padded), "D": head_dim, "HP": half, "BITS": bits, "PIECE": PIECE,
        "MOST": MOST_PIECES, "TOKENS": tokens, "ASM": not INTERPRETED,
    }  # fmt: skip


def warps_of(flags: dict[str, int | bool]) -> int:
    """Return the warps of a program: one where a tile is small, which keeps codes out of shared memory."""
    if flags["M"] == 16 and flags["HP"] <= 64 and flags["BITS"] < 16:
        return 1 if flags["BITS"] == 4 or flags["HP"] <= 32 else 2  # one warp spills with 128 dims of 8 bits
    return 4


def stages_of(flags: dict[str, int | bool]) -> int:
    """Return how many pages are on their way: fewer where they are large."""
    return 3 if flags["BITS"] < 16 and flags["HP"] <= 64 else 2
