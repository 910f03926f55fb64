"""From a step's plain numbers to its tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE, PageMoves, Step, Work
from omniserve.ops.batch import Batch, Rows, Workspace


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

    tables      per kind int32 [slots, max_pages], column = logical page
    last_token  int64 [slots]: the token that a slot's request drew last
    """

    def __init__(self, *, slots: int, max_len: int, kinds: int, device: torch.device) -> None:
        pages = ceil_div(max_len, PAGE)
        self.tables = tuple(torch.full((slots, pages), -1, dtype=torch.int32, device=device) for _ in range(kinds))
        self.last_token = torch.zeros(slots, dtype=torch.int64, device=device)
        self._device = device

    def assemble(self, step: Step, work: Workspace) -> Assembled:
        """Apply the step's page moves and return its batch.

        A work's produced positions become single-query rows, which come first; its prompt positions one row of
        several queries, even when it is one token.
        """
        for table, moves in zip(self.tables, step.moves, strict=True):
            self._move(table, moves)
        plan = _Plan()
        for number, one in enumerate(step.works):
            plan.take(number, one, produced=True)
        singles = len(plan.slots)
        for number, one in enumerate(step.works):
            plan.take(number, one, produced=False)
        tokens = self._tensor(plan.tokens)
        if plan.drawn:
            where, slots = self._tensor([t for t, _ in plan.drawn]), self._tensor([s for _, s in plan.drawn])
            tokens[where] = self.last_token[slots]
        positions = self._tensor(plan.positions)
        owners = self._tensor(plan.owners)
        rows = Rows(
            cu_q=self._tensor(plan.cu_q, torch.int32),
            seq_len=self._tensor(plan.seq_len, torch.int32),
            singles=singles,
            longest=max(plan.seq_len),
        )
        batch = Batch(
            tokens=tokens,
            positions=positions,
            write_slots=tuple(
                table[owners, positions // PAGE].long() * PAGE + positions % PAGE for table in self.tables
            ),
            slots=self._tensor(plan.slots),
            tables=self.tables,
            rows=rows,
            work=work,
        )
        spans = [sorted(plan.spans[number], key=lambda run: run[0]) for number in range(len(step.works))]
        return Assembled(
            batch=batch,
            ends=tuple(runs[-1][1].stop - 1 for runs in spans),
            spans=tuple(tuple(span for _, span in runs) for runs in spans),
        )

    def _move(self, table: Tensor, moves: PageMoves) -> None:
        if moves.appended:
            slots, logical, physical = self._tensor(moves.appended).unbind(1)
            table[slots, logical] = physical.to(torch.int32)
        if moves.freed:
            slots, logical = self._tensor(moves.freed).unbind(1)
            table[slots, logical] = -1

    def _tensor(self, values: Sequence[int] | Sequence[tuple[int, ...]], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


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
        self.spans: dict[int, list[tuple[int, slice]]] = {}

    def take(self, number: int, work: Work, *, produced: bool) -> None:
        """Append the rows of a work's produced positions, or of its prompt positions."""
        border = min(max(work.prompt, work.start), work.start + work.count)
        first, last = (border, work.start + work.count) if produced else (work.start, border)
        if first == last:
            return
        begin = len(self.tokens)
        if work.new_tokens:
            self.tokens += work.new_tokens[first - work.start : last - work.start]
        else:
            assert produced and last - first == 1, work
            self.drawn.append((begin, work.slot))
            self.tokens.append(0)
        self.positions += range(first, last)
        self.owners += [work.slot] * (last - first)
        ends = range(first + 1, last + 1) if produced else (last,)
        for end in ends:
            self.cu_q.append(begin + end - first)
            self.seq_len.append(end)
            self.slots.append(work.slot)
        self.spans.setdefault(number, []).append((first, slice(begin, len(self.tokens))))
