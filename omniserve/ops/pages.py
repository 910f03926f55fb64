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
from omniserve.ops.batch import Rows, Workspace
from omniserve.ops.dispatch import operation
from omniserve.ops.rope import Rope, norm_heads, rotate

TILE = 256
"""Queries that the reference scores at once; bounds its memory."""


class PageStore(Protocol):
    """One layer of one head group's pages."""

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [T, H, D] at slots int64 [T] (physical page * 64 + offset; -1 skips a token).

        A store may subtract a fixed mean from each head's rotated keys first and need not add it back: all scores of a
        query shift alike, so `attend` gives the same.
        """

    def read(self, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys and values [R, H, P * 64, D] of pages ids [R, P], de-quantized; keys less their mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageList:
    """Pages to read.

    ids    int32 [X, P]: physical page
    index  int32 [X, P] or None: logical page, whose first key is at position index * 64; None means 0, 1, 2, ...
    count  int32 [R]: entries in use
    slots  int64 [R] or None: row r reads ids[slots[r]]; None: X = R
    """

    ids: Tensor
    index: Tensor | None
    count: Tensor
    slots: Tensor | None


@dataclass(frozen=True, slots=True)
class Visible:
    """Key j is visible to query i when j <= i and (j < sink or j > i - local). Dense: local = None."""

    sink: int = 0
    local: int | None = None

    def mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return bool [..., queries, keys] from positions [..., queries] and [..., keys]."""
        i, j = queries[..., :, None], keys[..., None, :]
        seen = j <= i
        return seen if self.local is None else seen & ((j < self.sink) | (j > i - self.local))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadGroup:
    """What one kind of heads reads in one layer.

    heads   slice of the Hq query heads; the group has G * H of them
    pages, visible: which keys; store: the group's pages of this layer
    """

    heads: slice
    pages: PageList
    visible: Visible
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
    share = kv_heads // len(stores)
    for number, (slot, store) in enumerate(zip(slots, stores, strict=True)):
        of = slice(number * share, (number + 1) * share)
        store.write(slot, keys[:, of], values[:, of])
    return turned[:, :heads]


@operation
def attend(q: Tensor, groups: tuple[HeadGroup, ...], rows: Rows, out: Tensor, work: Workspace, *, scale: float) -> None:
    """Softmax attention of every query over the visible keys of its row's pages, for all head groups.

    q    [T, Hq, D], rotated; tokens of a row are adjacent, rows of produced positions first
    out  [T, Hq, D], dtype of q, allocated by the caller; every head is written once
    Softmax and sums in fp32 (fp64 if q is). A token's result depends on its own row alone.
    Source: LServe (arXiv 2502.14866) section 3: block skipping leaves the softmax of the listed keys exact.
    """
    assert q.shape == out.shape, f"attend: q is {tuple(q.shape)}, out is {tuple(out.shape)}"
    lengths = rows.seq_len.tolist()
    starts = rows.cu_q.tolist()
    for group in groups:
        for first, last in _alike(lengths, rows.singles):
            _attend_singles(q[first:last, group.heads], group, lengths, first, out[first:last, group.heads], scale)
        for row in range(rows.singles, len(lengths)):
            span = slice(starts[row], starts[row + 1])
            _attend_chunk(q[span, group.heads], group, row, lengths[row], out[span, group.heads], scale)


def _alike(lengths: list[int], singles: int) -> Iterator[tuple[int, int]]:
    """Yield runs of adjacent single rows within a factor of two of each other: padding stays below half."""
    first = 0
    low = high = 0
    for row in range(singles):
        pages = ceil_div(lengths[row], PAGE)
        if row > first and max(high, pages) > 2 * min(low, pages):
            yield first, row
            first, low, high = row, pages, pages
        else:
            low, high = (min(low, pages), max(high, pages)) if row > first else (pages, pages)
    if singles > first:
        yield first, singles


def _read(group: HeadGroup, first: int, last: int, pages: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys, values [R, H, S, D] and their positions [1 or R, S] for rows [first, last)."""
    where: slice | Tensor = slice(first, last) if group.pages.slots is None else group.pages.slots[first:last]
    ids = group.pages.ids[where, :pages]
    k, v = group.store.read(ids, dtype)
    within = torch.arange(PAGE, device=ids.device)
    if group.pages.index is None:
        return k, v, torch.arange(pages * PAGE, device=ids.device)[None]
    index = group.pages.index[where, :pages].long()
    return k, v, (index[..., None] * PAGE + within).flatten(1)


def _attend_singles(q: Tensor, group: HeadGroup, lengths: list[int], first: int, out: Tensor, scale: float) -> None:
    """Rows of one produced position each: q, out [R, G * H, D]."""
    count = q.shape[0]
    own = lengths[first : first + count]
    dense = group.pages.index is None
    pages = ceil_div(max(own), PAGE) if dense else int(group.pages.count[first : first + count].max())
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v, positions = _read(group, first, first + count, pages, exact)
    if dense and group.visible.local is None and min(own) == max(own):
        k, v = k[:, :, : own[0]], v[:, :, : own[0]]
        mask = None
    else:
        last = torch.tensor(own, device=q.device)[:, None] - 1
        mask = group.visible.mask(last, positions)[:, None]  # [R, 1, 1, S]
        if not dense:
            listed = torch.arange(pages, device=q.device)[None] < group.pages.count[first : first + count, None]
            mask = mask & listed.repeat_interleave(PAGE, 1)[:, None, None]
    kv_heads = k.shape[1]
    query = q.to(exact).reshape(count, kv_heads, -1, q.shape[-1])
    out.copy_(_softmax_times_values(query, k, v, mask, scale).reshape(out.shape))


def _attend_chunk(q: Tensor, group: HeadGroup, row: int, length: int, out: Tensor, scale: float) -> None:
    """One row of adjacent prompt positions: q, out [t, G * H, D]."""
    count, heads, dim = q.shape
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    dense = group.pages.index is None
    pages = ceil_div(length, PAGE) if dense else int(group.pages.count[row])
    k, v, positions = _read(group, row, row + 1, pages, exact)
    kv_heads = k.shape[1]
    query = q.to(exact).view(count, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)  # [H, G, t, D]
    for begin in range(0, count, TILE):
        end = min(begin + TILE, count)
        reach = length - count + end if dense else k.shape[2]  # keys that the tile's last query may see
        asked = torch.arange(length - count + begin, length - count + end, device=q.device)
        mask = group.visible.mask(asked, positions[0, :reach])  # [tile, S]
        tile = query[:, :, begin:end].reshape(kv_heads, -1, dim)  # [H, G * tile, D]
        mask = mask.repeat(heads // kv_heads, 1)
        done = _softmax_times_values(tile, k[0, :, :reach], v[0, :, :reach], mask, scale)
        done = done.view(kv_heads, heads // kv_heads, end - begin, dim)
        out[begin:end] = done.permute(2, 0, 1, 3).reshape(end - begin, heads, dim).to(out.dtype)


def _softmax_times_values(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return softmax(q k^T * scale) v over the keys that the mask shows; hidden ones may hold anything, even NaN."""
    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(scale)
    if mask is None:
        return torch.matmul(torch.softmax(scores, -1), v)
    scores = scores.masked_fill_(~mask, float("-inf"))
    hidden = ~mask.any(-2)[..., None]  # [..., S, 1]
    return torch.matmul(torch.softmax(scores, -1), v.masked_fill(hidden, 0))
