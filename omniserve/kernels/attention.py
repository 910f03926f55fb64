"""`attend` over page lists: rows of produced positions, cut into pieces of pages and combined; prompts: `prefill.py`.

One kernel for dense, streaming and selected lists and for kv4, kv8 and kv16. The query heads of one key head are the
rows of its products. A row is cut at fixed multiples of pages, whatever the batch, and its parts are combined in the
order of the pages. So a token's bits depend on its own row alone.

Codes go into the products as they are stored. Keys: scores are (q . code - zero * sum(q)) * scale. Values: the weights
take the scale, relative to the largest of the page and times 2^15, so that small ones stay above fp16's smallest.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE
from omniserve.formats.kv import LayerPages
from omniserve.kernels.codes import halves
from omniserve.kernels.device import INTERPRETED, kernel_of, need
from omniserve.kernels.prefill import attend_prompts
from omniserve.kernels.write import checked
from omniserve.ops.batch import Reading, Rows, Workspace
from omniserve.ops.pages import HeadGroup, attend

PIECE = 8
"""Pages of one part of a produced position's row. Part of the result's bits: it never depends on batch or length."""

_PAGE = tl.constexpr(PAGE)
_STEP = tl.constexpr(2.0**15)


@triton.jit
def attend_kernel(
    q,  # [T, Hq, D], tokens `q_stride` apart
    out,  # [T, Hq, D], tokens `out_stride` apart; written unless SPLIT
    parts,  # fp32 [rows, G H, pieces, D], written if SPLIT: sums of weighted values
    norms,  # fp32 [rows, G H, pieces, 2], written if SPLIT: largest score (log2), sum of weights
    codes,  # [pages, H, ...] as codes (uint8) or plain numbers
    scales,  # the same memory as fp16: scales and zeros behind the codes
    ids,  # int32 physical pages
    index,  # int32 logical pages, read if LISTED
    count,  # int32 [rows], read if LISTED
    slots,  # int64 [rows], read if SLOTS
    to,  # int64 [G H], read if TO
    cu_q,  # int32, from the first of these rows
    seq_len,  # int32 [rows]
    kv_heads,
    q_stride,
    out_stride,
    out_head,  # the group's first head in `out`
    ids_row,  # strides of ids and index
    ids_head,
    pieces,
    scale,  # of scores, times log2(e)
    sink,
    local,
    SPLIT: tl.constexpr,
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
    TOKENS: tl.constexpr,  # keys of one turn of the loop
    ASM: tl.constexpr,
):
    """One key head: a piece of one row."""
    HALF: tl.constexpr = D // 2
    WHOLE: tl.constexpr = HALF == HP
    row = tl.program_id(0)
    head = tl.program_id(1)
    piece = tl.program_id(2)
    length = tl.load(seq_len + row)
    token0 = tl.load(cu_q + row)
    group = tl.arange(0, M)
    valid = group < G
    position = length - 1
    at = tl.arange(0, HP)
    keep = (at < HALF)[None, :]

    some = valid[:, None] & keep
    source = q + token0.to(tl.int64) * q_stride + (head * G + group)[:, None] * D + at[None, :]
    q0 = tl.load(source, mask=some, other=0.0)
    q1 = tl.load(source + HALF, mask=some, other=0.0)
    like = q0.dtype
    total = tl.sum(q0.to(tl.float32), 1) + tl.sum(q1.to(tl.float32), 1)

    first = piece * PIECE
    if LISTED:
        last = tl.load(count + row)
    else:
        last = position // _PAGE + 1
        if WINDOW:
            first = tl.where(sink == 0, tl.maximum(tl.maximum(position - local + 1, 0) // _PAGE, first), first)
    last = tl.minimum(last, (piece + 1) * PIECE)
    x = row.to(tl.int64)
    if SLOTS:
        x = tl.load(slots + row)
    listed = x * ids_row + head * ids_head

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
        page = tl.maximum(tl.load(ids + listed + place), 0).to(tl.int64) * kv_heads + head
        logical = place
        if LISTED:
            logical = tl.load(index + listed + place)
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
            spot = here + _PAGE * D + within[:, None] * D + at[None, :]
            v0 = tl.load(spot, mask=there, other=0.0)
            v1 = tl.load(spot + HALF, mask=there, other=0.0)
            p16 = p.to(v0.dtype)
            a0 = tl.dot(p16, v0, a0 * shrink[:, None])
            a1 = tl.dot(p16, v1, a1 * shrink[:, None])
        best = top

    if SPLIT:
        spot = (row * kv_heads + head).to(tl.int64) * G + group
        spot = spot * pieces + piece
        tl.store(norms + spot * 2, best, mask=valid)
        tl.store(norms + spot * 2 + 1, weight, mask=valid)
        target = parts + spot[:, None] * D + at[None, :]
        tl.store(target, a0, mask=some)
        tl.store(target + HALF, a1, mask=some)
    else:
        slot = out_head + head * G + group
        if TO:
            slot = tl.load(to + head * G + group, mask=group < G, other=0)
        target = out + token0.to(tl.int64) * out_stride + slot[:, None] * D + at[None, :]
        tl.store(target, (a0 / weight[:, None]).to(out.dtype.element_ty), mask=some)
        tl.store(target + HALF, (a1 / weight[:, None]).to(out.dtype.element_ty), mask=some)


@triton.jit
def combine_kernel(
    out,  # [T, Hq, D]
    parts,  # fp32 [rows, heads, pieces, D]
    norms,  # fp32 [rows, heads, pieces, 2]
    to,  # int64 [heads], read if TO
    cu_q,
    pages,  # int32 [rows]: places of a row's list
    out_stride,
    out_head,
    heads,
    pieces,
    TO: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # D, rounded up to a power of two
    PIECE: tl.constexpr,
):
    """One row of one head: its parts, in the order of the pages."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    at = tl.arange(0, DP)
    keep = at < D
    mine = tl.cdiv(tl.load(pages + row), PIECE)
    spot = (row * heads + head).to(tl.int64) * pieces
    top = tl.full((), float("-inf"), tl.float32)
    for piece in range(mine):
        top = tl.maximum(top, tl.load(norms + (spot + piece) * 2))
    value = tl.zeros((DP,), tl.float32)
    weight = tl.zeros((), tl.float32)
    for piece in range(mine):
        share = tl.exp2(tl.load(norms + (spot + piece) * 2) - top)
        weight += share * tl.load(norms + (spot + piece) * 2 + 1)
        value += share * tl.load(parts + (spot + piece) * D + at, mask=keep, other=0.0)
    slot = (out_head + head).to(tl.int64)
    if TO:
        slot = tl.load(to + head)
    target = out + tl.load(cu_q + row).to(tl.int64) * out_stride + slot * D + at
    tl.store(target, (value / weight).to(out.dtype.element_ty), mask=keep)


@kernel_of(attend)
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
                attend_prompts(q, group, reading, range(border, reading.rows.stop), rows, out, scale)


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
    seq_len, cu_q = rows.seq_len[run.start : run.stop], rows.cu_q[run.start : run.stop + 1]
    places = ceil_div(rows.longest, PAGE) if index is None else ids.shape[-1]
    pieces = ceil_div(places, PIECE)
    flags = constants(
        per_key, head_dim, store.format.bits, split=pieces > 1, listed=index is not None,
        slots=not rowwise, to=group.to is not None, window=reading.visible.local is not None,
    )  # fmt: skip
    # Scratch comes from torch's caching allocator: the runner's workspace has no place for it yet.
    split = (len(run), per_key * kv_heads, pieces)
    parts = torch.empty(*split, head_dim, dtype=torch.float32, device=q.device) if pieces > 1 else out
    norms = torch.empty(*split, 2, dtype=torch.float32, device=q.device) if pieces > 1 else out
    attend_kernel[(len(run), kv_heads, pieces)](
        mine, out, parts, norms, store.pages.view(store.format.element), store.pages.view(torch.float16), ids,
        ids if index is None else index, pages.count[past], cu_q if rowwise else pages.slots[past],
        cu_q if group.to is None else group.to, cu_q, seq_len, kv_heads, q.stride(0), out.stride(0),
        group.heads.start, ids.stride(0), ids.stride(1) if ids.dim() == 3 else 0, pieces,
        scale * math.log2(math.e), reading.visible.sink, reading.visible.local or 0, **flags,
        num_warps=warps_of(flags), num_stages=stages_of(flags),
    )  # fmt: skip
    if pieces > 1:
        listed = (seq_len + (PAGE - 1)) // PAGE if index is None else pages.count[past]
        combine_kernel[(len(run), per_key * kv_heads)](
            out, parts, norms, cu_q if group.to is None else group.to, cu_q, listed, out.stride(0),
            group.heads.start, per_key * kv_heads, pieces, group.to is not None, head_dim,
            triton.next_power_of_2(head_dim), PIECE, num_warps=1,
        )  # fmt: skip


def constants(
    group: int,
    head_dim: int,
    bits: int,
    *,
    split: bool,
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
        "SPLIT": split, "LISTED": listed, "SLOTS": slots, "TO": to, "WINDOW": window,
        "G": group, "M": max(16, padded), "D": head_dim, "HP": half, "BITS": bits, "PIECE": PIECE,
        "TOKENS": tokens, "ASM": not INTERPRETED,
    }  # fmt: skip


def warps_of(flags: dict[str, int | bool]) -> int:
    """Return the warps of a program: one where a tile is small, which keeps codes out of shared memory."""
    if flags["M"] == 16 and flags["HP"] <= 64 and flags["BITS"] < 16:
        return 1 if flags["BITS"] == 4 or flags["HP"] <= 32 else 2  # one warp spills with 128 dims of 8 bits
    return 4


def stages_of(flags: dict[str, int | bool]) -> int:
    """Return how many pages are on their way: fewer where they are large."""
    return 3 if flags["BITS"] < 16 and flags["HP"] <= 64 else 2
