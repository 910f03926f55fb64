"""Retrieval heads that choose their pages: at produced positions, and by tiles of prompt positions.

The rule belongs to the position. A produced position p of a prompt of n tokens reads the pages chosen at its refresh
position r = p - (p - n) % interval, and the page that began since, if one did. What outlives a step, the choice of each
slot's request, lies in `Batch.memo`; the first produced position refreshes, so nothing of an earlier request is read.
Where a step has no refresh, which the host can tell, lists of all layers are made at once.

Whatever chooses: the first page (sink) and the newest (a tile's own pages) are always in the list, inside the budget,
and lists are in ascending order. Pages the scorer ranks are complete by the refresh position, so tokens that are
written in the same step (a replay, a longer chunk) cannot change a choice.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from omniserve.base.config import Sparsity
from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE
from omniserve.ops.batch import Batch, PageList, Reading, Rows, Visible
from omniserve.ops.pages import PageStore
from omniserve.ops.select import keep_pages, select_pages, select_tiles


class PageSelector:
    """Chooses pages for the retrieval heads of a layer. Immutable; the choices live in the batch's memo."""

    def __init__(self, sparsity: Sparsity, scale: float, heads: Sequence[int]) -> None:
        """Heads: how many retrieval heads each layer has."""
        self._budget = None if sparsity.budget is None else sparsity.budget // PAGE
        self._tile_budget = None if sparsity.prefill_budget is None else sparsity.prefill_budget // PAGE
        self._interval = sparsity.interval
        self._scores = sparsity.scores
        self._scale = scale
        ends = tuple(accumulate(heads, initial=0))
        self._places = [slice(first, last) for first, last in pairwise(ends)]  # a layer's heads among those of all
        self._heads = ends[-1]

    def memo(self, *, slots: int, pages: int, device: torch.device) -> Tensor | None:
        """Return the memo of all layers: int32 [slots, N, P]."""
        if self._budget is None:
            return None
        return torch.zeros(slots, self._heads, min(self._budget, pages), dtype=torch.int32, device=device)

    @property
    def interval(self) -> int | None:
        """Produced positions from one choice to the next; None if none is chosen."""
        return self._interval if self._budget is not None and self._heads else None

    def kept(self, table: Tensor, slots: Tensor, prompts: Tensor, rows: Rows, memo: Tensor) -> PageList:
        """Return what the single rows read, for the heads of all layers, in a step in which none of them chooses."""
        of = slice(rows.singles)
        ids, index, count = keep_pages(table, slots[of], prompts[of], rows.seq_len[of], memo, self._interval)
        return PageList(ids=ids, index=index, count=count, slots=None)

    def windows(self, table: Tensor, slots: Tensor, rows: Rows) -> tuple[Reading, ...]:
        """Return what rows that choose nothing read: all pages."""
        plain = range(self._choosing(rows), rows.count - rows.tiles)
        return (whole(table, slots, rows, plain),) if plain else ()

    def _choosing(self, rows: Rows) -> int:
        """Return how many leading rows choose their pages."""
        return rows.singles if self._budget is not None else 0

    def reads(
        self, layer: int, q: Tensor, store: PageStore, batch: Batch, table: Tensor, plain: tuple[Reading, ...]
    ) -> tuple[Reading, ...]:
        """Return what the layer's retrieval heads read this step; q [T, G * H, D] are their queries, rotated.

        plain  what `windows` gave for this step
        """
        rows, reads = batch.rows, list(plain)
        chosen = self._choosing(rows)
        if chosen:
            reads.append(Reading(rows=range(chosen), pages=self._selected(layer, q, store, batch, table), visible=_ALL))
        if rows.tiles:
            reads.append(self._tiles(q, store, batch, table))
        return tuple(reads)

    def _selected(self, layer: int, q: Tensor, store: PageStore, batch: Batch, table: Tensor) -> PageList:
        """Return the pages of the single rows, refreshing the choices that are due and remembering them."""
        rows, heads, kept = slice(batch.rows.singles), self._places[layer], batch.kept
        if kept is not None:
            assert kept.index is not None
            return replace(kept, ids=kept.ids[:, heads], index=kept.index[:, heads])
        assert batch.memo is not None
        ids, index, count = select_pages(
            q[rows],
            store,
            table,
            batch.slots[rows],
            batch.prompts[rows],
            batch.rows.seq_len[rows],
            batch.memo[:, heads],
            self._interval,
            batch.rows.longest,
            self._scores,
            self._scale,
        )
        return PageList(ids=ids, index=index, count=count, slots=None)

    def _tiles(self, q: Tensor, store: PageStore, batch: Batch, table: Tensor) -> Reading:
        """Return what the tiles of prompt positions read: each a list of its own."""
        rows, budget = batch.rows, self._tile_budget
        assert budget is not None
        span = range(rows.count - rows.tiles, rows.count)
        cu_q, seq_len = rows.cu_q[span.start : span.stop + 1], rows.seq_len[span.start : span.stop]
        slots = batch.slots[span.start : span.stop]
        ids, index, count = select_tiles(q, store, table, slots, cu_q, seq_len, budget, rows.longest, self._scale)
        chosen = PageList(ids=ids, index=index, count=count, slots=None)
        return Reading(rows=span, pages=chosen, visible=_ALL, every=(table, slots))


_ALL = Visible()


def whole(table: Tensor, slots: Tensor, rows: Rows, span: range) -> Reading:
    """Return the reading of all pages by the rows of `span`: the device table itself, by request slot."""
    of = slice(span.start, span.stop)
    assert rows.longest <= table.shape[1] * PAGE, ceil_div(rows.longest, PAGE)
    count = (rows.seq_len[of] + (PAGE - 1)) // PAGE
    return Reading(rows=span, pages=PageList(ids=table, index=None, count=count, slots=slots[of]), visible=_ALL)
