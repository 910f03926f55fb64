"""Attention over lists of pages: `rope_write` fills pages, `attend` reads them.

Dense, streaming and selected attention are one function over (physical page, logical page) lists and a rule of two
numbers. The references compose simple steps and know no KV format: a store writes and reads its own bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE
from omniserve.ops.batch import FEW, MOST_PIECES, PIECE, RUN, Reading, Rows, Workspace
from omniserve.ops.dispatch import operation
from omniserve.ops.rope import Rope, norm_heads, rotate

TILE = 256
"""Queries that the reference scores at once; bounds its memory."""


class PageStore(Protocol):
    """One layer of one head group's pages."""

    @property
    def heads(self) -> int:
        """Key heads of the group in this layer (H); may be 0."""

    @property
    def statistics(self) -> Tensor | None:
        """Fp16 [pages, H, J, 2, D]: smallest and largest key, dim by dim, of each logical page; None if not kept."""

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [T, H, D] at slots int64 [T] (physical page * 64 + offset; -1 skips a token).

        A store may subtract a fixed mean from each head's rotated keys first and need not add it back: all scores of a
        query shift alike, so `attend` gives the same. Statistics of the logical pages that are touched are made anew
        from the keys as stored, up to the last one written: they bound what `attend` reads, and nothing stays of what
        a page held before.
        """

    def read(self, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys (less their mean) and values [R, H, P * 64, D] of pages ids [R, P] or [R, H, P], de-quantized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadGroup:
    """What the heads of one kind read in one layer.

    heads  slice of the Hq query heads; the group has G * H of them
    to     int64 [G * H] or None: where each head goes in `out`; None: to `heads`
    reads  runs of rows that cover every row once; store: the group's pages of this layer
    """

    heads: slice
    to: Tensor | None
    reads: tuple[Reading, ...]
    store: PageStore


@operation
def rope_write(
    qkv: Tensor, positions: Tensor, slots: Sequence[Tensor], stores: Sequence[PageStore], rope: Rope, heads: int
) -> Tensor:
    """Norm (where the model does) and rotate q and k, quantize K and V, write them; return q [T, Hq, D], rotated.

    All head groups are one launch.

    qkv     [T, Hq + 2 H, D]: q, k, v; in each the heads of the first group come first
    slots   per group int64 [T]: physical page * 64 + offset; -1 skips a token
    heads   Hq
    Writing twice is the same as writing once.
    """
    kv_heads = (qkv.shape[1] - heads) // 2
    plain = qkv[:, : heads + kv_heads]
    if rope.q_norm is not None:
        q, k = norm_heads(plain[:, :heads], rope.q_norm, rope.eps), norm_heads(plain[:, heads:], rope.k_norm, rope.eps)
        plain = torch.cat([q, k], 1)
    turned = rotate(plain, positions, rope)
    keys, values = turned[:, heads:], qkv[:, heads + kv_heads :]
    first = 0
    for slot, store in zip(slots, stores, strict=True):
        of = slice(first, first + store.heads)
        first = of.stop
        if store.heads:
            store.write(slot, keys[:, of], values[:, of])
    assert first == kv_heads, (first, kv_heads)
    return turned[:, :heads]


def pieces_of(pages: int, piece: int = PIECE) -> int:
    """Return the pieces that a row of up to so many pages may have, when the smallest have `piece` pages."""
    return min(ceil_div(pages, piece), max(FEW, min(ceil_div(pages, piece * 2), MOST_PIECES)))


@operation
def cut_rows(pages: Tensor) -> Tensor:
    """Return int32 [2, R + 1]: pieces of the rows before each row, and of all; likewise runs of RUN pieces.

    pages int32 [R], at least 1 each.
    A piece is PIECE pages of a row's list if they make one run, else twice as many; four times, eight times as many
    where a row would have more than MOST_PIECES.
    It depends on the row alone. What `attend` reads for produced positions on a GPU; the same in all layers of a step.
    """
    size = torch.where(pages > PIECE * FEW, PIECE * 2, PIECE).to(pages.dtype)
    for _ in range(15):  # up to 2^24 pages
        size = torch.where(pages > size * MOST_PIECES, size * 2, size)
    pieces = (pages + size - 1) // size
    run = torch.where(size > PIECE * 2, RUN // 2, RUN).to(pages.dtype)
    ends = torch.cumsum(torch.stack((pieces, (pieces + run - 1) // run)), 1, dtype=torch.int32)
    return torch.cat((ends.new_zeros(2, 1), ends), 1)


@operation
def attend(q: Tensor, groups: tuple[HeadGroup, ...], rows: Rows, out: Tensor, work: Workspace, *, scale: float) -> None:
    """Softmax attention of every query over the visible keys of its row's pages, for all head groups.

    q    [T, Hq, D], rotated; tokens of a row are adjacent, rows of produced positions first
    out  [T, Hq, D], dtype of q, allocated by the caller; every head is written once, where its group says
    Softmax and sums in fp32 (fp64 if q is). A token's result depends on its own row alone.
    Source: LServe (arXiv 2502.14866) section 3: block skipping leaves the softmax of the listed keys exact.
    """
    assert q.shape == out.shape, f"attend: q is {tuple(q.shape)}, out is {tuple(out.shape)}"
    lengths = rows.seq_len.tolist()
    starts = rows.cu_q.tolist()
    for group in groups:
        to = group.heads if group.to is None else group.to
        for reading in group.reads:
            part = _Part(group.store, reading, lengths[reading.rows.start : reading.rows.stop])
            singles = max(min(rows.singles, reading.rows.stop) - reading.rows.start, 0)
            for first, last in _alike(part.pages[:singles]):
                at = slice(reading.rows.start + first, reading.rows.start + last)
                out[at, to] = _attend_singles(q[at, group.heads], part, first, scale).to(out.dtype)
            for row in range(singles, len(part.lengths)):
                at = slice(starts[reading.rows.start + row], starts[reading.rows.start + row + 1])
                if at.start == at.stop:  # a row that pads
                    continue
                out[at, to] = _attend_chunk(q[at, group.heads], part, row, scale).to(out.dtype)


class _Part:
    """A reading with its rows' lengths and listed pages as plain numbers."""

    def __init__(self, store: PageStore, reading: Reading, lengths: list[int]) -> None:
        self.store = store
        self.visible = reading.visible
        self.list = reading.pages
        self.lengths = lengths
        self.dense = reading.pages.index is None
        self.pages = [ceil_div(length, PAGE) for length in lengths] if self.dense else reading.pages.count.tolist()

    def read(self, first: int, last: int, pages: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values [R, H, S, D] and their positions [R or 1, H or 1, S] for rows [first, last)."""
        slots = self.list.slots
        where: slice | Tensor = slice(first, last) if slots is None else slots[first:last]
        ids = self.list.ids[where][..., :pages]
        k, v = self.store.read(ids, dtype)
        if self.list.index is None:
            return k, v, torch.arange(pages * PAGE, device=ids.device)[None, None]
        index = self.list.index[where][..., :pages].long()
        positions = (index[..., None] * PAGE + torch.arange(PAGE, device=ids.device)).flatten(-2)
        return k, v, positions if positions.dim() == 3 else positions[:, None]


def _alike(pages: list[int]) -> Iterator[tuple[int, int]]:
    """Yield runs of adjacent rows whose numbers of pages are within a factor of two: padding stays below half."""
    first = 0
    for row in range(1, len(pages) + 1):
        run = pages[first : row + 1]
        if row == len(pages) or max(run) > 2 * min(run):
            yield first, row
            first = row


def _attend_singles(q: Tensor, part: _Part, first: int, scale: float) -> Tensor:
    """Rows of one produced position each: q [R, G * H, D]; returns the like."""
    count = q.shape[0]
    own = part.lengths[first : first + count]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    pages = max(part.pages[first : first + count])
    k, v, positions = part.read(first, first + count, pages, exact)
    if part.dense and part.visible.local is None and min(own) == max(own):
        k, v = k[:, :, : own[0]], v[:, :, : own[0]]
        mask = None
    else:
        last = torch.tensor(own, device=q.device)[:, None, None] - 1
        mask = part.visible.mask(last, positions)  # [R, H or 1, 1, S]
        if not part.dense:
            listed = torch.arange(pages, device=q.device) < part.list.count[first : first + count, None]
            mask = mask & listed.repeat_interleave(PAGE, 1)[:, None, None]
    query = q.to(exact).reshape(count, k.shape[1], -1, q.shape[-1])
    return _softmax_times_values(query, k, v, mask, scale).reshape(q.shape)


def _attend_chunk(q: Tensor, part: _Part, row: int, scale: float) -> Tensor:
    """One row of adjacent prompt positions: q [t, G * H, D]; returns the like."""
    count, heads, dim = q.shape
    length = part.lengths[row]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v, positions = part.read(row, row + 1, part.pages[row], exact)
    kv_heads = k.shape[1]
    query = q.to(exact).view(count, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)  # [H, G, t, D]
    out = torch.empty(count, heads, dim, dtype=exact, device=q.device)
    for begin in range(0, count, TILE):
        end = min(begin + TILE, count)
        reach = length - count + end if part.dense else k.shape[2]  # keys that the tile's last query may see
        asked = torch.arange(length - count + begin, length - count + end, device=q.device)
        mask = part.visible.mask(asked, positions[0, :, :reach])  # [H or 1, tile, S]
        tile = query[:, :, begin:end].reshape(kv_heads, -1, dim)  # [H, G * tile, D]
        mask = mask.repeat(1, heads // kv_heads, 1)
        done = _softmax_times_values(tile, k[0, :, :reach], v[0, :, :reach], mask, scale)
        done = done.view(kv_heads, heads // kv_heads, end - begin, dim)
        out[begin:end] = done.permute(2, 0, 1, 3).reshape(end - begin, heads, dim)
    return out


def _softmax_times_values(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return softmax(q k^T * scale) v over the keys that the mask shows; hidden ones may hold anything, even NaN."""
    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(scale)
    if mask is None:
        return torch.matmul(torch.softmax(scores, -1), v)
    scores = scores.masked_fill_(~mask, float("-inf"))
    hidden = ~mask.any(-2)[..., None]  # [..., S, 1]
    return torch.matmul(torch.softmax(scores, -1), v.masked_fill(hidden, 0))
