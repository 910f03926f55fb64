"""`attend` for rows of prompt positions: tiles of queries over the pages of their row.

A prompt position always runs in a tile of queries, and keys are taken in the order of their pages: its bits depend on
its own row alone.

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
from omniserve.kernels.device import INTERPRETED, need
from omniserve.ops.batch import Reading, Rows
from omniserve.ops.pages import HeadGroup

_PAGE = tl.constexpr(PAGE)
_STEP = tl.constexpr(2.0**15)


@triton.jit
def prompt_kernel(
    q,  # [T, Hq, D], tokens `q_stride` apart
    out,  # [T, Hq, D], tokens `out_stride` apart
    codes,  # [pages, H, ...] as codes (uint8) or plain numbers
    scales,  # the same memory as fp16: scales and zeros behind the codes
    ids,  # int32 physical pages
    index,  # int32 logical pages, read if LISTED
    count,  # int32 [rows], read if LISTED
    slots,  # int64 [rows], read if SLOTS
    to,  # int64 [G H], read if TO
    cu_q,  # int32, from the first of these rows
    seq_len,  # int32 [rows]
    rows,
    kv_heads,
    q_stride,
    out_stride,
    out_head,  # the group's first head in `out`
    ids_row,  # strides of ids and index
    ids_head,
    scale,  # of scores, times log2(e)
    sink,
    local,
    LISTED: tl.constexpr,
    SLOTS: tl.constexpr,
    TO: tl.constexpr,
    WINDOW: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,  # G, rounded up to a power of two
    M: tl.constexpr,  # rows of the products: queries times GP
    D: tl.constexpr,
    HP: tl.constexpr,  # D / 2, rounded up to a power of two
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,  # keys of one turn of the loop
    ASM: tl.constexpr,
):
    """One key head and a tile of queries."""
    HALF: tl.constexpr = D // 2
    QUERIES: tl.constexpr = M // GP
    WHOLE: tl.constexpr = HALF == HP
    pid = tl.program_id(0)
    head = tl.program_id(1)
    row = -1
    begin = 0
    tiles = 0
    for r in range(rows):
        more = tl.cdiv(tl.load(cu_q + r + 1) - tl.load(cu_q + r), QUERIES)
        if (pid >= tiles) & (pid < tiles + more):
            row = r
            begin = (pid - tiles) * QUERIES
        tiles += more
    if row < 0:
        return
    length = tl.load(seq_len + row)
    token0 = tl.load(cu_q + row)
    tokens = tl.load(cu_q + row + 1) - token0
    m = tl.arange(0, M)
    query, group = begin + m // GP, m % GP
    valid = (query < tokens) & (group < G)
    position = length - tokens + query
    at = tl.arange(0, HP)
    keep = (at < HALF)[None, :]

    some = valid[:, None] & keep
    source = q + (token0 + query).to(tl.int64)[:, None] * q_stride + (head * G + group)[:, None] * D + at[None, :]
    q0 = tl.load(source, mask=some, other=0.0)
    q1 = tl.load(source + HALF, mask=some, other=0.0)
    like = q0.dtype
    total = tl.sum(q0.to(tl.float32), 1) + tl.sum(q1.to(tl.float32), 1)

    first = 0
    oldest = length - tokens + begin  # position of the first query
    newest = tl.minimum(oldest + QUERIES, length) - 1
    if LISTED:
        last = tl.load(count + row)
    else:
        last = newest // _PAGE + 1
        if WINDOW:
            first = tl.where(sink == 0, tl.maximum(oldest - local + 1, 0) // _PAGE, 0)
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
        seen = (key[None, :] <= position[:, None]) & valid[:, None]
        if WINDOW:
            seen = seen & ((key < sink)[None, :] | (key[None, :] > position[:, None] - local))
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

    slot = out_head + head * G + group
    if TO:
        slot = tl.load(to + head * G + group, mask=group < G, other=0)
    target = out + (token0 + query).to(tl.int64)[:, None] * out_stride + slot[:, None] * D + at[None, :]
    tl.store(target, (a0 / weight[:, None]).to(out.dtype.element_ty), mask=some)
    tl.store(target + HALF, (a1 / weight[:, None]).to(out.dtype.element_ty), mask=some)


def attend_prompts(
    q: Tensor, group: HeadGroup, reading: Reading, run: range, rows: Rows, out: Tensor, scale: float
) -> None:
    """Attention of the rows `run` of prompt positions; arguments as `attend` has checked them."""
    store: LayerPages = group.store
    head_dim, kv_heads = q.shape[2], store.heads
    mine = q[:, group.heads]
    per_key = mine.shape[1] // kv_heads
    past = slice(run.start - reading.rows.start, run.stop - reading.rows.start)
    pages = reading.pages
    rowwise = pages.slots is None
    ids = pages.ids[past] if rowwise else pages.ids
    index = None if pages.index is None else pages.index[past] if rowwise else pages.index
    assert ids.stride(-1) == 1 and (index is None or index.stride() == ids.stride()), (ids.stride(), ids.shape)
    seq_len, cu_q = rows.seq_len[run.start : run.stop], rows.cu_q[run.start : run.stop + 1]
    flags = constants(
        per_key, head_dim, store.format.bits, listed=index is not None,
        slots=not rowwise, to=group.to is not None, window=reading.visible.local is not None,
    )  # fmt: skip
    queries = flags["M"] // flags["GP"]
    grid = (ceil_div(q.shape[0], queries) + len(run), kv_heads)
    prompt_kernel[grid](
        mine, out, store.pages.view(store.format.element), store.pages.view(torch.float16), ids,
        ids if index is None else index, pages.count[past], cu_q if rowwise else pages.slots[past],
        cu_q if group.to is None else group.to, cu_q, seq_len, len(run), kv_heads, q.stride(0), out.stride(0),
        group.heads.start, ids.stride(0), ids.stride(1) if ids.dim() == 3 else 0,
        scale * math.log2(math.e), reading.visible.sink, reading.visible.local or 0, **flags,
        num_warps=warps_of(flags), num_stages=stages_of(flags),
    )  # fmt: skip


def constants(
    group: int, head_dim: int, bits: int, *, listed: bool, slots: bool, to: bool, window: bool
) -> dict[str, int | bool]:
    """Return what `prompt_kernel` is compiled for."""
    padded = triton.next_power_of_2(group)
    half = triton.next_power_of_2(head_dim // 2)
    need(padded <= 64, f"{group} query heads per key head on a GPU: up to 64 are there")
    need(half >= 16 or INTERPRETED, f"heads of {head_dim} dims on a GPU: 32 to 256 are there")
    tokens = PAGE // 2 if half <= 64 or bits == 16 else PAGE // 4
    return {
        "LISTED": listed, "SLOTS": slots, "TO": to, "WINDOW": window,
        "G": group, "GP": padded, "M": 64, "D": head_dim, "HP": half, "BITS": bits,
        "TOKENS": tokens, "ASM": not INTERPRETED,
    }  # fmt: skip


def warps_of(flags: dict[str, int | bool]) -> int:
    """Return the warps of a program."""
    return 4 if flags["HP"] <= 64 else 8


def stages_of(flags: dict[str, int | bool]) -> int:
    """Return how many pages are on their way: fewer where they are large."""
    return 3 if flags["BITS"] < 16 and flags["HP"] <= 64 else 2
