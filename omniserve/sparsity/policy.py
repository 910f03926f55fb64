"""Policies: what sparsity means. A policy hands out page lists and holds no state of any request."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from omniserve.base.config import Sparsity
from omniserve.base.numbers import ceil_div
from omniserve.base.spec import ModelSpec
from omniserve.base.types import PAGE, Kind
from omniserve.cache.keep import KeepRule
from omniserve.ops.batch import Batch, PageList, Reading, Rows, Visible
from omniserve.ops.lists import window_pages
from omniserve.ops.pages import HeadGroup, PageStore
from omniserve.sparsity.heads import HeadSplit
from omniserve.sparsity.topk import PageSelector, whole


class Policy(Protocol):
    """Decides which keys are kept in memory and which are read."""

    @property
    def split(self) -> HeadSplit | None:
        """The order that heads are sorted into when weights load; None: as they come."""

    @property
    def heads(self) -> dict[Kind, tuple[int, ...]]:
        """Key heads by layer of each kind that has any, in the order of the head groups."""

    @property
    def statistics(self) -> frozenset[Kind]:
        """Kinds whose page statistics are read."""

    @property
    def keeps(self) -> dict[Kind, KeepRule]:
        """Kinds whose pages are given up, and when."""

    @property
    def by_position(self) -> bool:
        """True if produced positions are computed by another rule than those of a prompt."""

    @property
    def tiles_from(self) -> int | None:
        """First prompt position whose queries choose their pages by tiles; None if there is none."""

    @property
    def interval(self) -> int | None:
        """Heads choose pages at produced positions `prompt + n * interval`, and keep them between; None: none do."""

    def memo(self, *, slots: int, pages: int, device: torch.device) -> Tensor | None:
        """Return what outlives a step on the device, by request slot (`Batch.memo`)."""

    def kept(
        self, tables: Sequence[Tensor], slots: Tensor, prompts: Tensor, rows: Rows, memo: Tensor
    ) -> PageList | None:
        """Return what heads that choose read in a step at none of whose produced positions they do (`Batch.kept`)."""

    def windows(self, tables: Sequence[Tensor], slots: Tensor, rows: Rows) -> tuple[tuple[Reading, ...], ...]:
        """Return per kind what is the same for all layers of a step (`Batch.windows`).

        Safe to capture in a CUDA graph: shapes follow from the numbers of rows and `rows.longest` alone.
        """

    def groups(self, layer: int, q: Tensor, stores: tuple[PageStore, ...], batch: Batch) -> tuple[HeadGroup, ...]:
        """Return what each kind of heads reads in a layer this step; q [T, Hq, D], rotated, heads sorted."""


class Dense:
    """Every head sees every key, or those of the model's own sliding window."""

    split: HeadSplit | None = None
    statistics: frozenset[Kind] = frozenset()
    by_position = False
    tiles_from: int | None = None
    interval: int | None = None

    def __init__(self, spec: ModelSpec) -> None:
        self.heads = {Kind.RETRIEVAL: (spec.kv_heads,) * spec.layers}
        self.keeps: dict[Kind, KeepRule] = {}
        self._heads = slice(0, spec.heads)
        self._visible = [Visible(local=window) for window in spec.windows or (None,) * spec.layers]

    def memo(self, *, slots: int, pages: int, device: torch.device) -> Tensor | None:
        """Return nothing: a dense model remembers nothing beside its pages."""
        return None

    def kept(
        self, tables: Sequence[Tensor], slots: Tensor, prompts: Tensor, rows: Rows, memo: Tensor
    ) -> PageList | None:
        """Return nothing: a dense model chooses nothing."""
        return None

    def windows(self, tables: Sequence[Tensor], slots: Tensor, rows: Rows) -> tuple[tuple[Reading, ...], ...]:
        """Return all pages of every row: the device table itself, by request slot."""
        return ((whole(tables[0], slots, rows, range(rows.count)),),)

    def groups(self, layer: int, q: Tensor, stores: tuple[PageStore, ...], batch: Batch) -> tuple[HeadGroup, ...]:
        """Return one group that reads every page, within the layer's own window if it has one."""
        ((every,),) = batch.windows
        reading = replace(every, visible=self._visible[layer])
        return (HeadGroup(heads=self._heads, to=None, reads=(reading,), store=stores[0]),)


class Sparse:
    """LServe: streaming heads see sink and window, retrieval heads choose pages; each part can be off.

    Source: LServe (arXiv 2502.14866). Windows are token-exact; the rules go by position, see sparsity/topk.py.
    """

    def __init__(self, spec: ModelSpec, sparsity: Sparsity, split: HeadSplit, *, device: torch.device) -> None:
        self.split: HeadSplit | None = split
        self.by_position = True
        self.tiles_from = sparsity.tiles_from
        bounds = sparsity.budget is not None and sparsity.scores == "bounds"
        self.statistics = frozenset({Kind.RETRIEVAL} if bounds or sparsity.prefill_budget is not None else ())
        counts = {Kind.RETRIEVAL: split.retrieval, Kind.STREAMING: split.streaming}
        self.heads = {kind: heads for kind, heads in counts.items() if any(heads)}
        rule = KeepRule(sink=sparsity.sink, prompt_local=sparsity.prefill_local, local=sparsity.local)
        self.keeps = {Kind.STREAMING: rule} if Kind.STREAMING in self.heads else {}
        self._spec = spec
        self._kinds = tuple(self.heads)
        self._sparsity = sparsity
        self._selector = PageSelector(sparsity, spec.head_dim**-0.5, self.heads.get(Kind.RETRIEVAL, ()))
        self.interval = self._selector.interval
        places = (split.rows(layer, spec.group) for layer in range(spec.layers))
        self._places = [None if rows is None else torch.tensor(rows, device=device) for rows in places]

    def memo(self, *, slots: int, pages: int, device: torch.device) -> Tensor | None:
        """Return int32 [slots, N, P]: what a slot's request chose last, for the N retrieval heads of all layers."""
        return self._selector.memo(slots=slots, pages=pages, device=device)

    def kept(
        self, tables: Sequence[Tensor], slots: Tensor, prompts: Tensor, rows: Rows, memo: Tensor
    ) -> PageList | None:
        """Return the lists of the retrieval heads of all layers."""
        return self._selector.kept(tables[self._kinds.index(Kind.RETRIEVAL)], slots, prompts, rows, memo)

    def windows(self, tables: Sequence[Tensor], slots: Tensor, rows: Rows) -> tuple[tuple[Reading, ...], ...]:
        """Return all pages of rows that choose none, and those of sinks and windows for streaming heads."""
        return tuple(
            self._selector.windows(table, slots, rows)
            if kind is Kind.RETRIEVAL
            else self._streaming(table, slots, rows)
            for kind, table in zip(self._kinds, tables, strict=True)
        )

    def _streaming(self, table: Tensor, slots: Tensor, rows: Rows) -> tuple[Reading, ...]:
        """Return the pages of the sink and of the windows, for produced positions and for those of prompts."""
        sink = self._sparsity.sink
        reads = []
        local, longest = self._sparsity.local, ceil_div(rows.longest, PAGE)
        spans = (
            # A window of n tokens lies in up to (n + 62) // 64 + 1 pages; a prompt's rows may be as long as the prompt.
            (range(rows.singles), local, min(ceil_div(sink, PAGE) + (local + PAGE - 2) // PAGE + 1, longest)),
            (range(rows.singles, rows.count), self._sparsity.prefill_local, longest),
        )
        for span, local, width in spans:
            if span:
                of = slice(span.start, span.stop)
                cu_q = rows.cu_q[span.start : span.stop + 1]
                pages = window_pages(table, slots[of], cu_q, rows.seq_len[of], sink, local, width)
                reads.append(Reading(rows=span, pages=pages, visible=Visible(sink=sink, local=local)))
        return tuple(reads)

    def groups(self, layer: int, q: Tensor, stores: tuple[PageStore, ...], batch: Batch) -> tuple[HeadGroup, ...]:
        """Return a group for each kind that has heads in this layer."""
        groups = []
        first = 0
        for place, (kind, store) in enumerate(zip(self._kinds, stores, strict=True)):
            heads = slice(first, first + self._spec.group * store.heads)
            first = heads.stop
            if not store.heads:
                continue
            reads = batch.windows[place]
            if kind is Kind.RETRIEVAL:
                reads = self._selector.reads(layer, q[:, heads], store, batch, batch.tables[place], reads)
            places = self._places[layer]
            to = None if places is None else places[heads]
            groups.append(HeadGroup(heads=heads, to=to, reads=reads, store=store))
        return tuple(groups)
