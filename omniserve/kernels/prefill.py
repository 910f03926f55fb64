"""`attend` for rows of prompt positions: pages become 16-bit keys and values once, then tiles of queries read those.

`gather_kernel` writes what a row's queries may see, as `PageStore.read` gives it, rounded to the model's dtype, in the
order of the positions; what is behind the row's end, or not listed, becomes zero. Blocks of keys begin at multiples of
`BLOCK` positions and are taken in ascending order, and a prompt position always runs in a tile of queries: its bits
depend on its own row alone, whatever the chunk or the batch.
"""

import functools
import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.base.numbers import ceil_div, power_of_two
from omniserve.base.types import PAGE
from omniserve.kernels.codes import halves
from omniserve.kernels.device import GLUON, INTERPRETED, architecture, need, processors
from omniserve.kernels.plan import BLOCK, FIELDS, QUERIES, check_lists
from omniserve.ops.batch import Reading, Rows
from omniserve.ops.pages import HeadGroup

if triton.__version__ in GLUON:
    from omniserve.kernels import flash as flash_gluon

SCRATCH = 1 << 30
"""Bytes of keys and values that are unpacked at a time; key heads wait for their turn beyond that."""

PLANNED = 32
"""Tiles whose plan one program writes."""

_PAGE = tl.constexpr(PAGE)
_QUERIES = tl.constexpr(QUERIES)
_BLOCK = tl.constexpr(BLOCK)
_FIELDS = tl.constexpr(FIELDS)
_PLANNED = tl.constexpr(PLANNED)
_ROWS = tl.constexpr(16)  # rows that programs look at together


@triton.jit
def _kept(begin, length, sink, local, places, LISTED: tl.constexpr, WINDOW: tl.constexpr):
    """Return (pages in the scratch, those from position 0 on, pages left out behind them) of rows."""
    pages = tl.cdiv(length, _BLOCK) * (_BLOCK // _PAGE)
    lead = pages * 0
    skip = pages * 0
    if LISTED:
        pages = pages * 0 + places
    elif WINDOW:
        lead = tl.minimum(tl.cdiv(sink, _BLOCK) * (_BLOCK // _PAGE), pages)
        first = tl.maximum(begin - local + 1, 0) // _BLOCK * (_BLOCK // _PAGE)
        skip = tl.maximum(first - lead, 0)
        pages = pages - skip
    return pages, lead, skip


@triton.jit
def _sizes(
    r, rows, cu_q, seq_len, slots, sink, local, places, LISTED: tl.constexpr, SHARED: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Return (pages in the scratch, tiles) of rows r; 0 where there is no row."""
    there = r < rows
    length = tl.load(seq_len + r, mask=there, other=0)
    tokens = tl.load(cu_q + r + 1, mask=there, other=0) - tl.load(cu_q + r, mask=there, other=0)
    PER_ROW: tl.constexpr = LISTED and not SHARED
    size, _, _ = _kept(length - tokens, length, sink, local, places, PER_ROW, WINDOW)
    holds = there
    if SHARED:  # the last of a sequence's tiles holds its pages
        following = tl.load(slots + r + 1, mask=r + 1 < rows, other=-1)
        holds = there & (following != tl.load(slots + r, mask=there, other=-1))
    return tl.where(holds, size, 0), tl.cdiv(tokens, _QUERIES)


@triton.jit
def _tile(
    tile, tiles, rows, cu_q, seq_len, slots, count, sink, local, places, LISTED: tl.constexpr, SHARED: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Return what the plan says of tiles, how many blocks of keys they read (-1: no tile), and all rows' tiles."""
    of = tile * 0
    first = tile * 0
    start = tile * 0
    whole = rows * 0
    for some in range(0, rows, _ROWS):
        r = some + tl.arange(0, _ROWS)
        size, more = _sizes(r, rows, cu_q, seq_len, slots, sink, local, places, LISTED, SHARED, WINDOW)
        past = ((tl.cumsum(more, 0) + whole)[None, :] <= tile[:, None]) & (r < rows)[None, :]
        of += tl.sum(past.to(tl.int32), 1)
        first += tl.sum(tl.where(past, more[None, :], 0), 1)
        start += tl.sum(tl.where(past, size[None, :], 0), 1)
        whole += tl.sum(more, 0)
    there = tile < tl.minimum(tiles, whole)
    token = tl.load(cu_q + of, mask=there, other=0)
    queries = tl.load(cu_q + of + 1, mask=there, other=0) - token
    length = tl.load(seq_len + of, mask=there, other=0)
    position = length - queries
    _, long, left = _kept(position, length, sink, local, places, LISTED, WINDOW)
    if SHARED:
        long = of
    if LISTED:
        # The row's own pages end the list, and all before are seen: only how many these are matters.
        own = (length - 1) // _PAGE - position // _PAGE + 1
        position = (tl.load(count + of, mask=there, other=0) - own) * _PAGE + position % _PAGE
    begin = (tile - first) * _QUERIES
    position += begin
    queries = tl.minimum(queries - begin, _QUERIES)
    steps = tl.cdiv(position + queries, _BLOCK)
    if WINDOW:
        opening = tl.maximum(position - local + 1, 0) // _BLOCK
        steps -= tl.maximum(opening - tl.cdiv(sink, _BLOCK), 0)
    return token + begin, queries, position, start, long, left, tl.where(there, steps, -1), whole


@triton.jit(
    do_not_specialize=["rows", "pages", "tiles", "places", "heads", "head0", "ids_row", "ids_head", "sink", "local"],
    do_not_specialize_on_alignment=["ids", "index", "count", "slots", "cu_q", "seq_len"],
)
def gather_kernel(
    k,  # [H, N, W], keys as numbers
    v,
    plan,  # int32 [tiles + 1, FIELDS]
    codes,  # [pages, heads, ...] as codes (uint8) or plain numbers
    scales,  # the same memory as fp16
    ids,  # int32 physical pages
    index,  # int32 logical pages, read if LISTED
    count,  # int32 [rows], read if LISTED
    slots,  # int64 [rows], read if SLOTS; if SHARED those of a sequence are equal and adjacent
    cu_q,  # int32, from the first of these rows
    seq_len,  # int32 [rows]
    rows,
    pages,  # of the scratch: N / 64
    tiles,  # at most; how many there are is written behind them
    places,  # of each row, if LISTED
    heads,  # key heads of a page
    head0,  # the first of those asked for
    ids_row,  # strides of ids
    ids_head,
    sink,
    local,
    SLOTS: tl.constexpr,
    LISTED: tl.constexpr,  # pages that were chosen; otherwise those that every query's window shows, in order
    SHARED: tl.constexpr,  # all pages of each sequence, once for all its tiles, which find those of their lists there
    SOME: tl.constexpr,  # the list has the sink's and the window's pages alone
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,  # D, rounded up to a power of two
    BITS: tl.constexpr,
    ASM: tl.constexpr,
):
    """One page of one key head; behind them, for the first head, the plan of `PLANNED` tiles."""
    HALF: tl.constexpr = D // 2
    pid = tl.program_id(0)
    head = tl.program_id(1)
    if pid >= pages:
        if head == 0:
            tile = (pid - pages) * _PLANNED + tl.arange(0, _PLANNED)
            token, queries, position, start, long, left, steps, whole = _tile(
                tile, tiles, rows, cu_q, seq_len, slots, count, sink, local, places, LISTED, SHARED, WINDOW
            )
            rank = tl.zeros((_PLANNED,), tl.int32)  # longest first
            for begin in range(0, tiles, _PLANNED):
                other = begin + tl.arange(0, _PLANNED)
                _, _, _, _, _, _, theirs, _ = _tile(
                    other, tiles, rows, cu_q, seq_len, slots, count, sink, local, places, LISTED, SHARED, WINDOW
                )
                longer = theirs[None, :] > steps[:, None]
                earlier = (theirs[None, :] == steps[:, None]) & (other[None, :] < tile[:, None])
                rank += tl.sum((longer | earlier).to(tl.int32), 1)
            there = tile < tiles
            at = plan + rank * _FIELDS
            tl.store(at, token, mask=there)
            tl.store(at + 1, queries, mask=there)
            tl.store(at + 2, position, mask=there)
            tl.store(at + 3, start * _PAGE, mask=there)
            tl.store(at + 4, long if SHARED else long * _PAGE, mask=there)
            tl.store(at + 5, left * _PAGE, mask=there)
            tl.store(plan + tiles * _FIELDS, whole)
        return

    row = pid * 0
    start = pid * 0
    whole = pid * 0
    for some in range(0, rows, _ROWS):
        r = some + tl.arange(0, _ROWS)
        size, _ = _sizes(r, rows, cu_q, seq_len, slots, sink, local, places, LISTED, SHARED, WINDOW)
        past = (tl.cumsum(size, 0) + whole <= pid) & (r < rows)
        row += tl.sum(past.to(tl.int32), 0)
        start += tl.sum(tl.where(past, size, 0), 0)
        whole += tl.sum(size, 0)
    if row >= rows:  # a launch for more pages than there are
        return
    slot = pid - start
    length = tl.load(seq_len + row)
    begin = length - (tl.load(cu_q + row + 1) - tl.load(cu_q + row))
    PER_ROW: tl.constexpr = LISTED and not SHARED
    _, lead, skip = _kept(begin, length, sink, local, places, PER_ROW, WINDOW)
    logical = tl.where(slot < lead, slot, slot + skip)
    place = logical
    listed = logical * _PAGE < length
    if PER_ROW:
        place = slot
        listed = slot < tl.load(count + row)
    if SOME:
        opening = tl.maximum(begin - local + 1, 0) // _PAGE
        leading = tl.minimum(opening, tl.cdiv(sink, _PAGE))
        listed = listed & ((logical < leading) | (logical >= opening))
        place = tl.where(logical < leading, logical, logical - opening + leading)
    x = row.to(tl.int64)
    if SLOTS:
        x = tl.load(slots + row)
    if PER_ROW:
        logical = tl.load(index + x * ids_row + (head0 + head) * ids_head + place, mask=listed, other=0)
    id = tl.load(ids + x * ids_row + (head0 + head) * ids_head + place, mask=listed, other=-1)

    token = tl.arange(0, _PAGE)
    written = (id >= 0) & (logical * _PAGE + token < length)  # behind the end of a row may lie NaN
    BYTES: tl.constexpr = D // 2 if BITS == 4 else D
    PARAMS: tl.constexpr = 256 if BITS < 16 else 0
    HP: tl.constexpr = W // 2
    at = tl.arange(0, HP)
    keep = written[:, None] & (at < HALF)[None, :]
    page = tl.maximum(id, 0).to(tl.int64) * heads + head0 + head
    here = codes + page * (2 * _PAGE * BYTES + 2 * PARAMS)
    like = k.dtype.element_ty
    number = tl.float16 if BITS < 16 else like  # exact for codes
    spot = (head.to(tl.int64) * pages + pid) * _PAGE * W + token[:, None] * W + at[None, :]
    for kind in tl.static_range(2):
        target = k if kind == 0 else v
        low, high = halves(here + kind * _PAGE * BYTES, token, at, keep, D, BITS, False, number, ASM)
        if BITS < 16:
            behind = scales + page * (_PAGE * BYTES + PARAMS) + _PAGE * BYTES + kind * 128 + token
            scale = tl.load(behind, mask=written, other=0.0).to(tl.float32)[:, None]
            zero = tl.load(behind + 64, mask=written, other=0.0).to(tl.float32)[:, None]
            low = tl.where(keep, (low.to(tl.float32) - zero) * scale, 0.0)
            high = tl.where(keep, (high.to(tl.float32) - zero) * scale, 0.0)
        if HALF == HP:
            tl.store(target + spot, low.to(like))
            tl.store(target + spot + HALF, high.to(like))
        else:
            dims = (at < HALF)[None, :] & (token >= 0)[:, None]
            tl.store(target + spot, low.to(like), mask=dims)
            tl.store(target + spot + HALF, high.to(like), mask=dims)
            tail = (at < W - D)[None, :] & (token >= 0)[:, None]
            tl.store(target + spot + D, tl.zeros((_PAGE, HP), like), mask=tail)


@triton.jit
def _steps(
    begin, end, q, k, v, listed, places, a, best, weight, query, lead, first, long, skip, scale, sink, local,
    MASK: tl.constexpr, WINDOW: tl.constexpr, SHARED: tl.constexpr, W: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Add blocks [begin, end) of a tile's walk to its sums."""
    at = tl.arange(0, KEYS)
    dim = tl.arange(0, W)
    for step in range(begin, end):
        key = step * KEYS
        if WINDOW:
            key = tl.where(step < lead, step, step - lead + first) * KEYS
        here = key
        if WINDOW:
            here = tl.where(key < long, key, key - skip)
        if SHARED:  # behind the list's end any page will do: no query sees it
            here = tl.load(listed + tl.minimum(key // _PAGE, places - 1)) * _PAGE + key % _PAGE
        rows = here + at
        s = tl.dot(q, tl.load(k + rows[None, :] * W + dim[:, None]))
        if MASK:
            position = key + at
            seen = position[None, :] <= query[:, None]
            if WINDOW:
                seen = seen & ((position < sink)[None, :] | (position[None, :] > query[:, None] - local))
            s = tl.where(seen, s, float("-inf"))
        top = tl.maximum(best, tl.max(s, 1))
        base = top
        if MASK:
            base = tl.where(top == float("-inf"), 0.0, top)
        # One rounding each, whatever the compiler fuses; a block that brings nothing shrinks by 1 exactly.
        p = tl.exp2(tl.fma(s, tl.zeros_like(s) + scale, tl.zeros_like(s) - (base * scale)[:, None]))
        shrink = tl.exp2((best - base) * scale)
        weight = weight * shrink + tl.sum(p, 1)
        values = tl.load(v + rows[:, None] * W + dim[None, :])
        a = tl.dot(p.to(values.dtype), values, a * shrink[:, None])
        best = top
    return a, best, weight


@triton.jit(
    do_not_specialize=["out_head", "keys", "heads", "head0", "index_row", "index_head", "places", "sink", "local"],
    do_not_specialize_on_alignment=["to", "index"],
)
def flash_kernel(
    q,  # [T, Hq, D], tokens `q_stride` apart; from the first head of these
    k,  # [H, N, W]
    v,
    out,  # [T, Hq, D], tokens `out_stride` apart
    plan,  # int32 [tiles + 1, FIELDS]
    to,  # int64 [G H], read if TO
    index,  # int32 logical pages, read if SHARED
    q_stride,
    out_stride,
    out_head,  # where the first of these heads goes in `out`
    keys,  # N
    heads,  # query heads
    head0,  # the first of their key heads
    index_row,  # strides of index
    index_head,
    places,  # of each list
    scale,  # of scores, times log2(e)
    sink,
    local,
    WINDOW: tl.constexpr,
    SHARED: tl.constexpr,
    TO: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    QUERIES: tl.constexpr,  # of one program: a tile is 128
    KEYS: tl.constexpr,  # of one step
):
    """Queries of one head, in the order of the plan."""
    PARTS: tl.constexpr = _QUERIES // QUERIES
    group = tl.program_id(0) % heads
    part = tl.program_id(0) // heads
    head = group // G
    tile = part // PARTS
    begin = (part % PARTS) * QUERIES
    fields = plan + tile * _FIELDS
    token = tl.load(fields) + begin
    tokens = tl.load(fields + 1) - begin
    if tokens <= 0:
        return
    position = tl.load(fields + 2) + begin
    start = tl.load(fields + 3)
    long = tl.load(fields + 4)
    skip = tl.load(fields + 5)
    m = tl.arange(0, QUERIES)
    dim = tl.arange(0, W)
    query = position + m
    some = (m < tokens)[:, None] & (dim < D)[None, :]
    spot = (token + m).to(tl.int64)[:, None]
    queries = tl.load(q + spot * q_stride + group * D + dim[None, :], mask=some, other=0.0)
    base = (head.to(tl.int64) * keys + start) * W
    k += base
    v += base
    listed = index
    if SHARED:
        listed += long * index_row + (head0 + head) * index_head
    lead = 0
    first = 0
    stop = tl.cdiv(position + tl.minimum(tokens, QUERIES), KEYS)
    outer = (position + 1) // KEYS  # first block that a query does not see to the end
    inner = 0
    if WINDOW:
        lead = tl.minimum(tl.cdiv(long, KEYS), stop)
        first = tl.maximum(tl.maximum(position - local + 1, 0) // KEYS, lead)
        edge = tl.maximum(position + QUERIES - local + KEYS - 1, 0) // KEYS  # first block that all windows show
        stop = lead + stop - first
        outer = lead + outer - first
        inner = tl.minimum(tl.maximum(lead + edge - first, lead), stop)
    outer = tl.minimum(tl.maximum(outer, inner), stop)

    best = tl.full((QUERIES,), float("-inf"), tl.float32)
    weight = tl.zeros((QUERIES,), tl.float32)
    a = tl.zeros((QUERIES, W), tl.float32)
    if WINDOW:
        a, best, weight = _steps(
            0, inner, queries, k, v, listed, places, a, best, weight, query, lead, first, long, skip, scale, sink,
            local, True, WINDOW, SHARED, W, KEYS,
        )  # fmt: skip
    a, best, weight = _steps(
        inner, outer, queries, k, v, listed, places, a, best, weight, query, lead, first, long, skip, scale, sink,
        local, False, WINDOW, SHARED, W, KEYS,
    )  # fmt: skip
    a, best, weight = _steps(
        outer, stop, queries, k, v, listed, places, a, best, weight, query, lead, first, long, skip, scale, sink, local,
        True, WINDOW, SHARED, W, KEYS,
    )  # fmt: skip
    slot = out_head + group
    if TO:
        slot = tl.load(to + group).to(tl.int32)
    target = out + spot * out_stride + slot * D + dim[None, :]
    tl.store(target, (a / weight[:, None]).to(out.dtype.element_ty), mask=some)


@dataclass(frozen=True, slots=True)
class Prompts:
    """Rows of prompts that one group of heads attends for, as `attend` was given them.

    run: the rows, all behind those of produced positions; scale: of scores
    """

    q: Tensor
    out: Tensor
    group: HeadGroup
    reading: Reading
    run: range
    rows: Rows
    scale: float

    @property
    def past(self) -> slice:
        """The rows among those of the reading."""
        first = self.reading.rows.start
        return slice(self.run.start - first, self.run.stop - first)

    @property
    def room(self) -> "Room":
        """What the rows take, or take at most."""
        most = self.rows.most
        if most is not None:
            assert not self.rows.tiles, self.rows
            return most_room(most.tokens, most.pages, len(self.run))
        chunks = self.rows.chunks[self.run.start - self.rows.singles : self.run.stop - self.rows.singles]
        assert len(chunks) == len(self.run), f"attend: {len(self.run)} rows of prompts, the host knows {len(chunks)}"
        pages, visible = self.reading.pages, self.reading.visible
        chosen = 0 if pages.index is None or visible.local is not None else pages.ids.shape[-1]
        tiled = self.rows.tiled if self.reading.every is not None and self.run == self.reading.rows else ()
        return room_of(chunks, chosen, tiled, visible.sink, visible.local)


@dataclass(frozen=True, slots=True)
class Room:
    """Sizes that the host knows; kernels find out how many tiles and pages there really are.

    tiles, pages: of all rows, pages in the scratch; places: of these, each row's where pages were chosen, else 0
    level: the longest tile reads at most a seventh more than the shortest
    shared: tiles find their pages among all of their sequence
    """

    tiles: int
    pages: int
    places: int
    level: bool
    shared: bool = False


@functools.lru_cache(64)  # all layers of a step ask for the same
def room_of(chunks: tuple[range, ...], chosen: int, tiled: tuple[int, ...], sink: int, local: int | None) -> Room:
    """Return what rows with queries at these positions take.

    chosen: pages of each list, 0 if positions tell them; tiled: how many rows each sequence has, if this is known
    """
    tiles = sum(ceil_div(len(chunk), QUERIES) for chunk in chunks)
    if chosen:
        places = _even(chosen * PAGE)
        every = sum(_even(chunks[end - 1].stop) for end in accumulate(tiled))
        if tiled and every < places * len(chunks):
            return Room(tiles, every, places, level=False, shared=True)
        return Room(tiles, places * len(chunks), places, level=False)
    pages = 0
    for chunk in chunks:
        every = _even(chunk.stop)
        first = 0 if local is None else max(chunk.start - local + 1, 0) // BLOCK * (BLOCK // PAGE)
        pages += every - max(first - min(_even(sink), every), 0)
    shortest, longest = min(chunk.start for chunk in chunks), max(chunk.stop for chunk in chunks)
    return Room(tiles, pages, 0, level=local is None and 8 * shortest >= 7 * longest)


def most_room(tokens: int, pages: int, rows: int) -> Room:
    """Return what any rows take at most that have so many queries and pages, whatever of them windows show."""
    return Room(tokens // QUERIES + rows, pages + rows * (BLOCK // PAGE - 1), 0, level=False)


def _even(tokens: int) -> int:
    """Return the pages of the blocks that hold so many tokens."""
    return ceil_div(tokens, BLOCK) * (BLOCK // PAGE)


def attend_prompts(prompts: Prompts) -> None:
    """Attend for rows of prompts; their group is as `attend` has checked it."""
    q, store = prompts.q, prompts.group.store
    width = power_of_two(q.shape[2])
    room = prompts.room
    plan = torch.empty(room.tiles + 1, FIELDS, dtype=torch.int32, device=q.device)
    size = room.pages * PAGE
    heads = max(1, min(store.heads, SCRATCH // (2 * size * width * q.element_size())))
    # A few sizes: the allocator keeps one piece of each, while a prompt's chunks ask for more and more.
    scratch = torch.empty(power_of_two(2 * heads * size * width), dtype=q.dtype, device=q.device)
    k, v = scratch[: 2 * heads * size * width].view(2, heads, size, width)
    for first in range(0, store.heads, heads):
        some = range(first, min(first + heads, store.heads))
        gather(prompts, k, v, plan, some)
        flash(prompts, k, v, plan, some, gluon=on_gluon(q.shape[2]))


def gather(prompts: Prompts, k: Tensor, v: Tensor, plan: Tensor, heads: range) -> None:
    """Unpack what these key heads may read into k, v [heads, N, W], and write the plan of the tiles."""
    store: Any = prompts.group.store
    run, past, pages, visible = prompts.run, prompts.past, prompts.reading.pages, prompts.reading.visible
    rowwise, places, shared, slots = pages.slots is None, prompts.room.places, prompts.room.shared, pages.slots
    ids = pages.ids[past] if rowwise else pages.ids
    index = None if pages.index is None else pages.index[past] if rowwise else pages.index
    if shared:
        assert prompts.reading.every is not None
        (ids, slots), index, rowwise = prompts.reading.every, None, False
    check_lists(ids, index)
    seq_len, cu_q = prompts.rows.seq_len[run.start : run.stop], prompts.rows.cu_q[run.start : run.stop + 1]
    flags = gather_constants(
        store.head_dim, store.format.bits, slots=not rowwise, listed=places > 0, shared=shared,
        some=index is not None and places == 0, window=visible.local is not None,
    )  # fmt: skip
    size, tiles = k.shape[1] // PAGE, plan.shape[0] - 1
    gather_kernel[(size + ceil_div(tiles, PLANNED), len(heads))](
        k, v, plan, store.pages.view(store.format.element), store.pages.view(torch.float16), ids,
        ids if index is None else index, pages.count[past], cu_q if rowwise else slots[past], cu_q, seq_len,
        len(run), size, tiles, places, store.heads, heads.start, ids.stride(0),
        ids.stride(1) if ids.dim() == 3 else 0, visible.sink, visible.local or 0, **flags, num_warps=4,
    )  # fmt: skip


def flash(prompts: Prompts, k: Tensor, v: Tensor, plan: Tensor, heads: range, *, gluon: bool) -> None:
    """Attend to what `gather` left, for the query heads of these key heads."""
    q, out, group, visible = prompts.q, prompts.out, prompts.group, prompts.reading.visible
    per_key = (group.heads.stop - group.heads.start) // group.store.heads
    skipped = heads.start * per_key
    first, asking = group.heads.start + skipped, per_key * len(heads)
    mine = q[:, first : first + asking]
    to = None if group.to is None else group.to[skipped:]
    index, room = plan, prompts.room
    if room.shared:
        assert prompts.reading.pages.index is not None
        index = prompts.reading.pages.index
        assert index.dim() == 3 and index.stride(2) == 1, index.stride()
    lists = (heads.start, index.stride(0), index.stride(1), index.shape[-1])
    scale = prompts.scale * math.log2(math.e)
    if gluon:
        flash_gluon.launch(
            mine, k, v, out, plan, to, index, lists, group=per_key, out_head=first, scale=scale, sink=visible.sink,
            local=visible.local, together=per_key if room.level else asking, programs=processors(),
            shared=room.shared,
        )  # fmt: skip
        return
    flags = constants(
        per_key, q.shape[2], arch=architecture(), to=to is not None, window=visible.local is not None,
        shared=room.shared,
    )  # fmt: skip
    flash_kernel[((plan.shape[0] - 1) * (QUERIES // flags["QUERIES"]) * asking,)](
        mine, k, v, out, plan, plan if to is None else to, index, q.stride(0), out.stride(0), first, k.shape[1], asking,
        *lists, scale, visible.sink, visible.local or 0, **flags, num_warps=warps_of(flags),
        num_stages=stages_of(flags),
    )  # fmt: skip


def on_gluon(head_dim: int) -> bool:
    """Return whether the kernel for compute capability 9.0 serves heads of so many dims here."""
    return triton.__version__ in GLUON and not INTERPRETED and architecture() == 90 and flash_gluon.serves(head_dim)


def serving() -> str:
    """Return for people which kernel attends for prompts on this card."""
    if on_gluon(128):
        return "prompts: flash_gluon_kernel for heads of 64 and 128 dims, flash_kernel for others"
    return f"prompts: flash_kernel; on compute capability 9.0 with Triton {' or '.join(GLUON)} a faster one is there"


@functools.cache
def gather_constants(
    head_dim: int, bits: int, *, slots: bool, listed: bool, shared: bool, some: bool, window: bool
) -> dict[str, int | bool]:
    """Return what `gather_kernel` is compiled for."""
    need(head_dim >= 32 or INTERPRETED, f"heads of {head_dim} dims on a GPU: 32 to 256 are there")
    return {
        "SLOTS": slots, "LISTED": listed, "SHARED": shared, "SOME": some, "WINDOW": window,
        "D": head_dim, "W": power_of_two(head_dim), "BITS": bits, "ASM": not INTERPRETED,
    }  # fmt: skip


@functools.cache
def constants(
    group: int, head_dim: int, *, arch: int, to: bool, window: bool, shared: bool = False
) -> dict[str, int | bool]:
    """Return what `flash_kernel` is compiled for."""
    width = power_of_two(head_dim)
    small = width <= (128 if arch == 90 else 64)
    return {
        "WINDOW": window, "SHARED": shared, "TO": to, "G": group, "D": head_dim, "W": width,
        "QUERIES": 128 if small else 64, "KEYS": 64 if small else 32,
    }  # fmt: skip


def warps_of(flags: dict[str, int | bool]) -> int:
    """Return the warps of a program."""
    return 4 if flags["QUERIES"] == 64 and flags["W"] <= 128 else 8


def stages_of(flags: dict[str, int | bool]) -> int:
    """Return how many blocks of keys are on their way."""
    return 3 if flags["W"] <= 128 else 2
