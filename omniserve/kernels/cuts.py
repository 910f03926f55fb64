"""How rows of produced positions are cut: pieces of pages, runs of pieces, and which of them a program takes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.kernels.device import kernel_of
from omniserve.ops.batch import FEW, MOST_PIECES, PIECE, RUN
from omniserve.ops.pages import cut_rows


@triton.jit
def shift_of(pages, PIECE: tl.constexpr, FEW: tl.constexpr, MOST: tl.constexpr):
    """Return the pages of one piece of a row of so many pages, as `cut_rows` has it: 1 << shift."""
    shift = tl.where(pages > PIECE * FEW, 1, 0)
    for step in tl.static_range(1, 16):
        shift = tl.where(pages > (PIECE << step) * MOST, step + 1, shift)
    return shift + (PIECE.bit_length() - 1)


@triton.jit
def run_of(shift, PIECE: tl.constexpr, RUN: tl.constexpr):
    """Return the pieces of a run: fewer where they are large."""
    return tl.where(shift > PIECE.bit_length(), RUN // 2, RUN)


@triton.jit
def cut(pages, PIECE: tl.constexpr, FEW: tl.constexpr, RUN: tl.constexpr, MOST: tl.constexpr):
    """Return the pieces of a row of so many pages, and how many of them a run has."""
    shift = shift_of(pages, PIECE, FEW, MOST)
    return (pages + ((1 << shift) - 1)) >> shift, run_of(shift, PIECE, RUN)


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["pages"],
)
def cut_kernel(
    pages,  # int32 [rows]
    cuts,  # int32 [2, rows + 1]
    rows,
    PIECE: tl.constexpr,
    FEW: tl.constexpr,
    RUN: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Running sums of pieces, and of runs of them; one program for all rows."""
    before = tl.zeros((), tl.int32)
    runs_before = tl.zeros((), tl.int32)
    tl.store(cuts, before)
    tl.store(cuts + rows + 1, before)
    for base in range(0, rows, BLOCK):
        row = base + tl.arange(0, BLOCK)
        some = row < rows
        count = tl.load(pages + row, mask=some, other=0)
        pieces, run = cut(count, PIECE, FEW, RUN, MOST)
        tl.store(cuts + row + 1, before + tl.cumsum(pieces, 0), mask=some)
        before += tl.sum(pieces, 0)
        runs = (pieces + run - 1) // run
        tl.store(cuts + rows + 2 + row, runs_before + tl.cumsum(runs, 0), mask=some)
        runs_before += tl.sum(runs, 0)


@triton.jit
def row_of_list(seq_len, slots, rows, places, spot, whole, span, SLOTS: tl.constexpr):
    """Return what `row_of_cuts` does, of a row with a list of its own."""
    many = tl.where(whole, places // span, places)
    row = spot // many
    there = row < rows
    length = tl.load(seq_len + row, mask=there, other=1)
    slot = row.to(tl.int64)
    if SLOTS:
        slot = tl.load(slots + row, mask=there, other=0)
    return row, spot - row * many, row * places, length, slot


@triton.jit
def row_of_cuts(cuts, seq_len, slots, rows, spot, whole, SLOTS: tl.constexpr, FEW_ROWS: tl.constexpr):
    """Return an item's row, its place in the row, the row's first piece, and the row's length and slot.

    Everything is read at once: what is read after something else was waits once more for memory.
    """
    if FEW_ROWS:
        at = tl.arange(0, 32)
        begin, end, first, length, slot = _rows(cuts, seq_len, slots, rows, at, whole, SLOTS)
        its = (begin <= spot) & (spot < end)
        row = tl.where(its, at, 0)
        place = tl.where(its, spot - begin, 0)
        first = tl.where(its, first, 0)
        length = tl.where(its, length, 0)
        slot = tl.where(its, slot, 0)
    else:
        row = tl.zeros((128,), tl.int32)
        place = tl.zeros((128,), tl.int32)
        first = tl.zeros((128,), tl.int32)
        length = tl.zeros((128,), tl.int32)
        slot = tl.zeros((128,), tl.int32)
        for base in range(0, rows, 128):
            at = base + tl.arange(0, 128)
            begin, end, its_first, its_length, its_slot = _rows(cuts, seq_len, slots, rows, at, whole, SLOTS)
            its = (begin <= spot) & (spot < end)
            row = tl.where(its, at, row)
            place = tl.where(its, spot - begin, place)
            first = tl.where(its, its_first, first)
            length = tl.where(its, its_length, length)
            slot = tl.where(its, its_slot, slot)
    row = tl.sum(row, 0)
    where = tl.sum(slot, 0) if SLOTS else row
    return row, tl.sum(place, 0), tl.sum(first, 0), tl.sum(length, 0), where.to(tl.int64)


@triton.jit
def _rows(cuts, seq_len, slots, rows, row, whole, SLOTS: tl.constexpr):
    """Return items before and after rows, pieces before them, their lengths and slots."""
    some = row < rows
    before = tl.load(cuts + row, mask=some, other=0)
    end = tl.load(cuts + row + 1, mask=some, other=0)
    runs_before = tl.load(cuts + rows + 1 + row, mask=some, other=0)
    runs_end = tl.load(cuts + rows + 2 + row, mask=some, other=0)
    slot = row
    if SLOTS:
        slot = tl.load(slots + row, mask=some, other=0).to(tl.int32)
    length = tl.load(seq_len + row, mask=some, other=0)
    return tl.where(whole, runs_before, before), tl.where(whole, runs_end, end), before, length, slot


@kernel_of(cut_rows)
def cut_rows_triton(pages: Tensor) -> Tensor:
    """One small launch."""
    cuts = torch.empty(2, pages.shape[0] + 1, dtype=torch.int32, device=pages.device)
    cut_kernel[(1,)](pages, cuts, pages.shape[0], **cut_constants(), num_warps=4)
    return cuts


def cut_constants() -> dict[str, int]:
    """Return what `cut_kernel` is compiled for."""
    return {"PIECE": PIECE, "FEW": FEW, "RUN": RUN, "MOST": MOST_PIECES, "BLOCK": 1024}
