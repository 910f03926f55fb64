"""`attend` for rows of produced positions: cut into pieces of pages, and combined.

A row is cut at fixed multiples of pages, whatever the batch. Pieces add up in runs, in the order of the pages, and runs
in an order of their own. Where the card is full, a program takes a whole run and adds its pieces up as they come; else
each piece finds a program of its own, and `combine_kernel` adds up in the same way. So a token's bits depend on its
own row alone.

Launches depend on the number of rows and on the width of the lists, never on lengths: programs of a key head take piece
after piece, and `cut_rows` tells them on the device which row a piece belongs to. So a launch that was captured in a
CUDA graph serves all lengths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE
from omniserve.formats.kv import LayerPages
from omniserve.kernels.combine import combine_kernel
from omniserve.kernels.device import INTERPRETED, architecture, need, pdl, processors
from omniserve.kernels.plan import check_lists
from omniserve.kernels.runs import attend_kernel
from omniserve.ops.batch import FEW, MOST_PIECES, PIECE, RUN, Reading, Rows, Visible
from omniserve.ops.pages import HeadGroup, cut_rows, pieces_of

FULL = 5
"""Runs of pieces times key heads per multiprocessor from which programs take whole runs: fewer leave it idle."""

RESIDENT = 24
"""Programs per multiprocessor that a launch offers at least: as many as its registers hold, and some."""

TURNS_EACH = 1
"""Runs per row and key head that find a program of their own where there are many rows; programs take turns else."""

NEVER = 2**31 - 1
"""Runs from which programs take whole runs, where they never do."""

REGISTERS = 224
"""Registers of a thread for kv4: told nothing, the compiler takes all there are, and then spills some."""

LISTED_PIECE = 1
"""Pages of one part of a row with a list of its own, instead of PIECE: such lists are short."""

COMBINED = 2
"""Rows times key heads per multiprocessor from which a program combines all heads of a key head."""


@dataclass(frozen=True, slots=True)
class _Side:
    """What a launch reads for one head group, and its scratch."""

    q: Tensor
    store: LayerPages
    ids: Tensor
    index: Tensor | None
    count: Tensor
    slots: Tensor | None
    to: Tensor | None
    first: int
    heads: int
    places: int
    span: int
    visible: Visible
    parts: Tensor
    norms: Tensor

    @classmethod
    def of(cls, q: Tensor, group: HeadGroup, reading: Reading, run: range) -> "_Side":
        """Return the side of a group for the rows of `run`."""
        store: LayerPages = group.store
        mine, pages, past = q[run.start : run.stop, group.heads], reading.pages, slice(0, len(run))
        rowwise = pages.slots is None
        ids = pages.ids[past] if rowwise else pages.ids
        index = None if pages.index is None else pages.index[past] if rowwise else pages.index
        check_lists(ids, index)
        count = pages.count[past]
        assert count.is_contiguous() and q.device == ids.device
        places = pieces_of(ids.shape[-1], PIECE if index is None else LISTED_PIECE)
        if places > 1 or index is not None:
            places = ceil_div(places, RUN) * RUN
        span = RUN if ids.shape[-1] <= 2 * LISTED_PIECE * MOST_PIECES else RUN // 2
        heads = mine.shape[1]
        # Scratch comes from torch's caching allocator, which serves all layers with the same memory.
        scratch = len(run) * places if places > 1 else 0
        return cls(
            q=mine, store=store, ids=ids, index=index, count=count, slots=None if rowwise else pages.slots[past],
            to=group.to, first=group.heads.start, heads=heads, places=places, span=span, visible=reading.visible,
            parts=torch.empty(scratch, heads, q.shape[2], dtype=torch.float32, device=q.device),
            norms=torch.empty(scratch, heads, 2, dtype=torch.float32, device=q.device),
        )  # fmt: skip

    @property
    def bits(self) -> int:
        """Bits of a key's or value's number."""
        return self.store.format.bits

    @property
    def each(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.store.heads

    def pages(self) -> tuple[Tensor, ...]:
        """Return the pages in the three forms that the kernel reads."""
        pages = self.store.pages
        return pages.view(self.store.format.element), pages.view(torch.int32), pages.view(torch.float16)

    def lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return physical pages, logical pages (or anything), and how many."""
        return self.ids, self.ids if self.index is None else self.index, self.count

    def strides(self) -> tuple[int, int]:
        """Return the strides of lists from row to row and from head to head."""
        return self.ids.stride(0), self.ids.stride(1) if self.ids.dim() == 3 else 0

    def window(self) -> tuple[int, int]:
        """Return sink and local, or anything."""
        return self.visible.sink, self.visible.local or 0

    def joins(self, other: "_Side") -> bool:
        """True if one launch can read both, this one first."""
        alike = (self.bits, self.each, self.to is None) == (other.bits, other.each, other.to is None)
        return alike and other.index is not None and other.slots is None


def attend_produced(
    q: Tensor, sides: Sequence[tuple[HeadGroup, Reading]], run: range, rows: Rows, out: Tensor, scale: float
) -> None:
    """Rows of one token each: what head groups read for them; in one launch and its combine, where two are alike."""
    reads = [_Side.of(q, group, reading, run) for group, reading in sides]
    if len(reads) == 2 and reads[0].joins(reads[1]):
        _launch(reads[0], reads[1], run, rows, out, scale)
        return
    for side in reads:
        _launch(side, None, run, rows, out, scale)


def _launch(side: _Side, second: _Side | None, run: range, rows: Rows, out: Tensor, scale: float) -> None:
    """Launch both kernels."""
    two, other = second is not None, second or side
    seq_len = rows.seq_len[run.start : run.stop]
    assert seq_len.is_contiguous()
    listed, head_dim, kv_heads = side.index is not None, side.q.shape[2], side.store.heads
    flags = constants(
        side.each, head_dim, side.bits, architecture(), listed=listed, slots=side.slots is not None,
        to=side.to is not None, window=side.visible.local is not None, two=two,
        window2=two and other.visible.local is not None, few=len(run) <= 32,
    )  # fmt: skip
    cuts = side.count if listed else rows.cuts if run == range(rows.singles) else None
    if cuts is None:
        cuts = cut_rows(side.count)
    out = out[run.start : run.stop]
    to, to2 = (seq_len if one.to is None else one.to for one in (side, other))
    most = max(processors() * RESIDENT // kv_heads, len(run) * TURNS_EACH)
    offered = min(len(run) * side.places, most)
    behind = min(len(run) * other.places, most) if two else 0
    full = max(1, FULL * processors()) if folds(head_dim) else NEVER
    attend_kernel[(max(kv_heads, other.store.heads), offered + behind)](
        side.q, out, side.parts, side.norms, *side.pages(), *side.lists(), cuts,
        seq_len if side.slots is None else side.slots, to, seq_len, len(run), kv_heads, side.q.stride(0),
        out.stride(0), side.first, *side.strides(), side.places, side.span, offered, full, scale * math.log2(math.e),
        *side.window(),
        other.q, other.parts, other.norms, *other.pages(), *other.lists(), to2, other.store.heads, other.first,
        *other.strides(), other.places, other.span, *other.window(),
        **flags, **options_of(side.bits, head_dim, architecture()), launch_pdl=flags["PDL"],
    )  # fmt: skip
    if side.places > 1 or (two and other.places > 1):
        group = side.each if len(run) * kv_heads >= COMBINED * processors() else 1
        combine_kernel[(len(run), (side.heads + (other.heads if two else 0)) // group)](
            out, side.parts, side.norms, to, side.count, cuts, len(run), out.stride(0), side.first, side.heads,
            kv_heads, group, side.places, side.span, full,
            other.parts, other.norms, to2, other.count, other.first, other.heads, other.store.heads, other.places,
            other.span,
            **combine_constants(head_dim, listed=listed, to=side.to is not None, two=two),
            num_warps=8 if group == 1 else 4, launch_pdl=flags["PDL"],
        )  # fmt: skip


def combine_constants(head_dim: int, *, listed: bool, to: bool, two: bool) -> dict[str, int | bool]:
    """Return what `combine_kernel` is compiled for."""
    return {
        "LISTED": listed, "TO": to, "TWO": two, "D": head_dim, "DP": triton.next_power_of_2(head_dim),
        "PIECE": LISTED_PIECE if listed else PIECE, "PIECE2": LISTED_PIECE, "FEW": FEW, "RUN": RUN, "MOST": MOST_PIECES,
        "PDL": pdl(),
    }  # fmt: skip


def constants(
    group: int,
    head_dim: int,
    bits: int,
    arch: int,
    *,
    listed: bool,
    slots: bool,
    to: bool,
    window: bool,
    two: bool = False,
    window2: bool = False,
    few: bool = False,
) -> dict[str, int | bool]:
    """Return what `attend_kernel` is compiled for."""
    padded = max(8, triton.next_power_of_2(group))
    need(padded <= 64, f"{group} query heads per key head on a GPU: up to 64 are there")
    need(head_dim >= 32 or INTERPRETED, f"heads of {head_dim} dims on a GPU: 32 to 256 are there")
    keys, values = (head_dim, head_dim) if bits == 16 else (head_dim * bits // 8, head_dim * bits // 32)
    return {
        "LISTED": listed, "SLOTS": slots, "FEW_ROWS": few, "TO": to, "WINDOW": window, "TWO": two, "WINDOW2": window2,
        "G": group, "N": padded, "D": head_dim,
        "KP": max(32, triton.next_power_of_2(keys)), "VP": max(16, triton.next_power_of_2(values)), "BITS": bits,
        "PIECE": LISTED_PIECE if listed else PIECE, "PIECE2": LISTED_PIECE, "FEW": FEW, "RUN": RUN, "MOST": MOST_PIECES,
        "TOKENS": tokens_of(bits, head_dim, arch), "FOLD": folds(head_dim), "ASM": not INTERPRETED, "PDL": pdl(),
    }  # fmt: skip


def tokens_of(bits: int, head_dim: int, arch: int) -> int:
    """Return the keys of one turn: a page, or as much of it as registers hold."""
    if bits == 16:
        return PAGE // 2 if head_dim <= 128 else PAGE // 4
    if head_dim <= 128:
        return PAGE
    return PAGE // 4 if bits == 8 and arch < 90 else PAGE // 2


def folds(head_dim: int) -> bool:
    """Whether programs may take whole runs: elsewhere their registers do not hold what that needs."""
    return head_dim <= 128 and head_dim == triton.next_power_of_2(head_dim)


def options_of(bits: int, head_dim: int, arch: int) -> dict[str, int]:
    """Return how a program runs: in one warp, so that neither codes nor weights cross from warp to warp."""
    stages = {4: 3, 8: 2, 16: 4}[bits] if head_dim <= 128 else {4: 2, 8: 2, 16: 3}[bits]
    few = {"maxnreg": REGISTERS} if bits == 4 and (head_dim == 64 or (head_dim == 128 and arch >= 90)) else {}
    return {"num_warps": 1, "num_stages": stages, **few}
