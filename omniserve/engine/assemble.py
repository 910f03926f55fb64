"""From a step's plain numbers to its tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omniserve.base.config import TILE
from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE, PageMoves, Step, Work
from omniserve.ops.batch import Batch, Most, Rows, Workspace
from omniserve.ops.lists import produced
from omniserve.ops.pages import cut_rows
from omniserve.ops.transfer import sent
from omniserve.sparsity.policy import Policy

KEEPING = 16
"""Rows, at most, of steps that are told from others because no row chooses pages: of more, one nearly always does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """A batch and what is done with its hidden rows.

    ends  per work, index of its last token in the batch; spans: per work, slices of its tokens in position order
    """

    batch: Batch
    ends: tuple[int, ...]
    spans: tuple[tuple[slice, ...], ...]


class Assembler:
    """Holds what outlives a step on the device: page tables and last tokens, by request slot. Mutable.

    One slot more than there are requests, `idle`, has no pages: what its rows write goes nowhere.

    tables      per kind int32 [slots + 1, max_pages], column = logical page
    memo        what the policy remembers, by slot
    last_token  int64 [slots + 1]: the token that a slot's request drew last
    """

    def __init__(self, policy: Policy, *, slots: int, max_len: int, device: torch.device) -> None:
        pages = ceil_div(max_len, PAGE)
        self.idle = slots
        self.tiles_from = policy.tiles_from
        shape = (slots + 1, pages)
        self.tables = tuple(torch.full(shape, -1, dtype=torch.int32, device=device) for _ in policy.heads)
        self.memo = policy.memo(slots=slots + 1, pages=pages, device=device)
        self._policy = policy
        self.last_token = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._device = device
        self._each = torch.arange(slots + 1, dtype=torch.int32, device=device)

    def move(self, moves: Sequence[PageMoves]) -> None:
        """Bring the page tables up to date."""
        for table, moved in zip(self.tables, moves, strict=True):
            self._move(table, moved)

    def keeps(self, positions: Sequence[int], prompts: Sequence[int]) -> bool:
        """Whether heads that choose pages keep what they chose at all of these positions; no if these are too many.

        positions  produced ones; prompts: prompt lengths of their requests
        """
        interval = self._policy.interval
        if interval is None or not 0 < len(positions) <= KEEPING:
            return False
        return all((position - prompt) % interval for position, prompt in zip(positions, prompts, strict=True))

    def decode(self, slots: Tensor, positions: Tensor, prompts: Tensor, work: Workspace, *, keeps: bool) -> Batch:
        """Return the batch of R produced positions, each with the token that its slot's request drew last.

        slots, positions, prompts int64 [R], on the device. The host looks at nothing: the work can be captured.
        keeps  as the method says of these positions
        """
        tokens, seq_len, pages, places = produced(self.last_token, positions, slots, self.tables)
        rows = Rows(
            cu_q=self._counting(slots.shape[0] + 1),
            seq_len=seq_len,
            singles=slots.shape[0],
            longest=self.tables[0].shape[1] * PAGE,
            cuts=cut_rows(pages),
        )
        return self._batch(tokens, positions, places, slots, prompts, rows, work, keeps=keeps)

    def mix(self, numbers: Sequence[Tensor], most: Most, work: Workspace) -> Batch:
        """Return the batch of `Mixture.lists`, on the device. The host looks at nothing: the work can be captured."""
        slots, positions, prompts, tokens, places, owners, cu_q, seq_len, chunk_slots, chunk_prompts = numbers
        singles = slots.shape[0]
        cu_q, seq_len = cu_q.int(), seq_len.int()
        writes, cuts = self._places(owners, places), None
        if singles:
            last, lengths, pages, written = produced(self.last_token, positions, slots, self.tables)
            cuts = cut_rows(pages)
            tokens, places = torch.cat((last, tokens)), torch.cat((positions, places))
            writes = tuple(torch.cat(both) for both in zip(written, writes, strict=True))
            cu_q = torch.cat((self._counting(singles), cu_q + singles))
            seq_len = torch.cat((lengths, seq_len))
            chunk_slots, chunk_prompts = torch.cat((slots, chunk_slots)), torch.cat((prompts, chunk_prompts))
        longest = self.tables[0].shape[1] * PAGE
        rows = Rows(cu_q=cu_q, seq_len=seq_len, singles=singles, longest=longest, cuts=cuts, most=most)
        return self._batch(tokens, places, writes, chunk_slots, chunk_prompts, rows, work, keeps=False)

    def _places(self, owners: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Return per kind where tokens of these slots are written; below 0 they are not: their slot has no page."""
        page, offset = positions // PAGE, positions % PAGE
        return tuple(table[owners, page].long() * PAGE + offset for table in self.tables)

    def _counting(self, count: int) -> Tensor:
        """Return 0, 1, 2, ... as int32 [count]."""
        if count > self._each.shape[0]:
            self._each = torch.arange(count, dtype=torch.int32, device=self._device)
        return self._each[:count]

    def assemble(self, step: Step, work: Workspace) -> Assembled:
        """Return a step's batch; its page moves are in the tables already.

        A work's produced positions become single-query rows, which come first; its prompt positions one row of
        several queries, even when it is one token. Where the policy has tiles, prompt positions from `tiles_from` on
        become a row for each tile; these come last.
        """
        plan = _Plan()
        border = self.tiles_from
        for number, one in enumerate(step.works):
            plan.singles(number, one)
        singles = len(plan.slots)
        for number, one in enumerate(step.works):
            plan.chunk(number, one, border)
        chunks = len(plan.slots)
        for number, one in enumerate(step.works):
            plan.tiles(number, one, border)
        lists = (
            plan.tokens, plan.positions, plan.owners, plan.cu_q, plan.seq_len, plan.slots, plan.prompts,
            [token for token, _ in plan.drawn], [slot for _, slot in plan.drawn],
        )  # fmt: skip
        tokens, positions, owners, cu_q, seq_len, slots, prompts, drawn, drawers = sent(lists, self._device)
        if plan.drawn:
            tokens[drawn] = self.last_token[drawers]
        seq_len = seq_len.int()
        rows = Rows(
            cu_q=cu_q.int(),
            seq_len=seq_len,
            singles=singles,
            longest=max(plan.seq_len),
            tiles=len(plan.slots) - chunks,
            tiled=tuple(plan.tiled),
            cuts=cut_rows((seq_len[:singles] + PAGE - 1) // PAGE) if singles else None,
            chunks=plan.positions_of(range(singles, len(plan.slots))),
        )
        places = self._places(owners, positions)
        keeps = self.keeps([length - 1 for length in plan.seq_len[:singles]], plan.prompts[:singles])
        batch = self._batch(tokens, positions, places, slots, prompts, rows, work, keeps=keeps)
        spans = [sorted(plan.spans[number], key=lambda run: run[0]) for number in range(len(step.works))]
        return Assembled(
            batch=batch,
            ends=tuple(runs[-1][1].stop - 1 for runs in spans),
            spans=tuple(tuple(span for _, span in runs) for runs in spans),
        )

    def _batch(
        self, tokens: Tensor, positions: Tensor, places: tuple[Tensor, ...], slots: Tensor, prompts: Tensor, rows: Rows,
        work: Workspace, *, keeps: bool,
    ) -> Batch:  # fmt: skip
        """Return the batch of tokens at positions, int64 [T], written to places [T], of requests with slots [R]."""
        memo = self.memo
        return Batch(
            tokens=tokens,
            positions=positions,
            write_slots=places,
            slots=slots,
            prompts=prompts,
            tables=self.tables,
            windows=self._policy.windows(self.tables, slots, rows),
            memo=memo,
            kept=self._policy.kept(self.tables, slots, prompts, rows, memo) if keeps and memo is not None else None,
            rows=rows,
            work=work,
        )

    def _move(self, table: Tensor, moves: PageMoves) -> None:
        if moves.appended:
            slots, logical, physical = sent(list(zip(*moves.appended, strict=True)), self._device)
            table[slots, logical] = physical.to(torch.int32)
        if moves.freed:
            slots, logical = sent(list(zip(*moves.freed, strict=True)), self._device)
            table[slots, logical] = torch.full_like(slots, -1, dtype=torch.int32)  # a number would wait for the device


class _Plan:
    """Lists of a batch under construction; thrown away after."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.owners: list[int] = []  # request slot of each token
        self.drawn: list[tuple[int, int]] = []  # (token index, slot whose last token it is)
        self.cu_q = [0]
        self.seq_len: list[int] = []
        self.slots: list[int] = []
        self.prompts: list[int] = []
        self.tiled: list[int] = []  # tiles of each work that has some
        self.spans: dict[int, list[tuple[int, slice]]] = {}

    def singles(self, number: int, work: Work) -> None:
        """Append a row for each of a work's produced positions."""
        first, last = max(work.prompt, work.start), work.start + work.count
        if first < last:
            self._take(number, work, range(first, last), range(first + 1, last + 1))

    def chunk(self, number: int, work: Work, tiles_from: int | None) -> None:
        """Append one row of a work's prompt positions, up to those that are tiles."""
        last = min(work.prompt, work.start + work.count)
        if tiles_from is not None:
            last = min(last, tiles_from)
        if work.start < last:
            self._take(number, work, range(work.start, last), (last,))

    def tiles(self, number: int, work: Work, tiles_from: int | None) -> None:
        """Append a row for each tile of a work's prompt positions."""
        if tiles_from is None:
            return
        first, last = max(tiles_from, work.start), min(work.prompt, work.start + work.count)
        if first < last:
            assert first % TILE == 0, f"a chunk begins within a tile: {work}"
            ends = (*range(first + TILE, last, TILE), last)
            self.tiled.append(len(ends))
            self._take(number, work, range(first, last), ends)

    def positions_of(self, rows: range) -> tuple[range, ...]:
        """Return the positions of the queries of these rows."""
        ends = ((self.seq_len[row], self.cu_q[row + 1] - self.cu_q[row]) for row in rows)
        return tuple(range(end - count, end) for end, count in ends)

    def _take(self, number: int, work: Work, positions: range, ends: Sequence[int]) -> None:
        """Append adjacent positions as rows that end where `ends` says."""
        begin, first = len(self.tokens), positions.start
        if work.new_tokens:
            self.tokens += work.new_tokens[first - work.start : positions.stop - work.start]
        else:
            assert first >= work.prompt and len(positions) == 1, work
            self.drawn.append((begin, work.slot))
            self.tokens.append(0)
        self.positions += positions
        self.owners += [work.slot] * len(positions)
        for end in ends:
            self.cu_q.append(begin + end - first)
            self.seq_len.append(end)
            self.slots.append(work.slot)
            self.prompts.append(work.prompt)
        self.spans.setdefault(number, []).append((first, slice(begin, len(self.tokens))))
