"""The numbers of a step that lengths alone decide, one launch each; torch takes a launch for every plus and minus."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE
from omniserve.kernels.device import kernel_of, need, pdl
from omniserve.kernels.handover import handed_over
from omniserve.ops.batch import PageList
from omniserve.ops.lists import produced, window_pages

TABLES = 2
"""Page tables of one launch: of retrieval and of streaming heads."""

PLACES = 1024
"""Places of a list that one program fills at most."""

ROWS = 128
"""Rows of one program."""

_PAGE = tl.constexpr(PAGE)


@triton.jit
def _placed(table, stride, slot, position, places, row, some):
    page = tl.load(table + slot * stride + position // _PAGE, mask=some, other=0).to(tl.int64)
    tl.store(places + row, page * _PAGE + position % _PAGE, mask=some)


@triton.jit(do_not_specialize=["rows", "stride"])
def produced_kernel(
    last,  # int64 [slots]
    positions,  # int64 [rows]
    slots,  # int64 [rows]
    table0,  # int32 [slots, max_pages], rows `stride` apart
    table1,  # read if TWO
    tokens,  # int64 [rows]
    seq_len,  # int32 [rows]
    pages,  # int32 [rows]
    places0,  # int64 [rows]
    places1,
    rows,
    stride,
    TWO: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK rows."""
    if PDL:
        handed_over()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    some = row < rows
    slot = tl.load(slots + row, mask=some, other=0)
    position = tl.load(positions + row, mask=some, other=0)
    tl.store(tokens + row, tl.load(last + slot, mask=some, other=0), mask=some)
    tl.store(seq_len + row, (position + 1).to(tl.int32), mask=some)
    tl.store(pages + row, (position // _PAGE + 1).to(tl.int32), mask=some)
    _placed(table0, stride, slot, position, places0, row, some)
    if TWO:
        _placed(table1, stride, slot, position, places1, row, some)


@triton.jit(
    do_not_specialize=["width", "stride", "max_pages", "sink", "local"],
    do_not_specialize_on_alignment=["slots", "cu_q", "seq_len"],
)
def window_kernel(
    table,  # int32 [slots, max_pages], rows `stride` apart
    slots,  # int64 [rows]
    cu_q,  # int32 [rows + 1]
    seq_len,  # int32 [rows]
    ids,  # int32 [rows, width]
    index,  # int32 [rows, width]
    count,  # int32 [rows]
    stride,
    max_pages,
    width,
    sink,  # pages
    local,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK places of one row's list."""
    if PDL:
        handed_over()
    row = tl.program_id(0)
    end = tl.load(seq_len + row)
    begin = end - (tl.load(cu_q + row + 1) - tl.load(cu_q + row))
    opening = tl.maximum(begin - local + 1, 0) // _PAGE
    leading = tl.minimum(opening, sink)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    some = place < width
    logical = tl.minimum(tl.where(place < leading, place, place - leading + opening), max_pages - 1)
    target = row.to(tl.int64) * width + place
    physical = tl.load(table + tl.load(slots + row) * stride + logical, mask=some, other=0)
    tl.store(ids + target, physical, mask=some)
    tl.store(index + target, logical, mask=some)
    if tl.program_id(1) == 0:
        tl.store(count + row, leading + (end - 1) // _PAGE - opening + 1)


@kernel_of(produced)
def produced_triton(
    last: Tensor, positions: Tensor, slots: Tensor, tables: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """One launch for all tables."""
    need(1 <= len(tables) <= TABLES, f"{len(tables)} page tables on a GPU: up to {TABLES} are there")
    first, second = tables[0], tables[-1]
    assert first.shape == second.shape and first.stride() == second.stride() and first.stride(1) == 1, first.stride()
    rows = slots.shape[0]
    tokens, *places = (torch.empty(rows, dtype=torch.int64, device=slots.device) for _ in range(1 + len(tables)))
    seq_len, pages = (torch.empty(rows, dtype=torch.int32, device=slots.device) for _ in range(2))
    if rows:
        produced_kernel[(ceil_div(rows, ROWS),)](
            last.contiguous(), positions.contiguous(), slots.contiguous(), first, second, tokens, seq_len, pages,
            places[0], places[-1], rows, first.stride(0), len(tables) == 2, ROWS, pdl(), launch_pdl=pdl(),
        )  # fmt: skip
    return tokens, seq_len, pages, tuple(places)


@kernel_of(window_pages)
def window_pages_triton(
    table: Tensor, slots: Tensor, cu_q: Tensor, seq_len: Tensor, sink: int, local: int, width: int
) -> PageList:
    """One launch."""
    assert table.stride(1) == 1 and cu_q.is_contiguous() and seq_len.is_contiguous(), (table.stride(), cu_q.stride())
    rows = seq_len.shape[0]
    ids = torch.empty(rows, width, dtype=torch.int32, device=table.device)
    index, count = torch.empty_like(ids), torch.empty(rows, dtype=torch.int32, device=table.device)
    if rows and width:
        block = min(PLACES, max(32, triton.next_power_of_2(width)))
        window_kernel[(rows, ceil_div(width, block))](
            table, slots.contiguous(), cu_q, seq_len, ids, index, count, table.stride(0), table.shape[1], width,
            ceil_div(sink, PAGE), local, block, pdl(), launch_pdl=pdl(),
        )  # fmt: skip
    return PageList(ids=ids, index=index, count=count, slots=None)
