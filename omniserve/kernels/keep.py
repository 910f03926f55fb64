"""`keep_pages`: lists of rows that keep what they chose, for the heads of all layers in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE
from omniserve.kernels.device import kernel_of
from omniserve.ops.select import Chosen, keep_pages

ALIGNED = 4
"""Lists of all layers are as long as a multiple of this: every head's begins at 16 bytes, as in lists of one layer."""

_PAGE = tl.constexpr(PAGE)


@triton.jit
def place_of(slots, prompts, seq_len, row, interval):
    """Return slot and position of a row, and how long ago its request chose."""
    slot = tl.load(slots + row)
    position = tl.load(seq_len + row) - 1
    return slot, position, tl.maximum((position - tl.load(prompts + row)) % interval, 0).to(tl.int32)


@triton.jit
def row_of(slots, prompts, seq_len, row, interval):
    """Return slot and position of a row, how long ago its request chose, and if the row that chose is in this step."""
    slot, position, since = place_of(slots, prompts, seq_len, row, interval)
    source = row - since
    here = (source >= 0) & (tl.load(slots + tl.maximum(source, 0)) == slot)
    return slot, position, since, here


@triton.jit
def keep_row(remembered, addresses, ids, index, count, row, head, newest, existing, budget, LP: tl.constexpr):
    """Copy the list of one head, the newest page behind it unless it was there already."""
    place = tl.arange(0, LP)
    kept = tl.minimum(existing, budget)
    chosen = tl.load(remembered + place, mask=place < kept, other=0)
    chosen = tl.where((place == kept) & (newest >= existing), newest, chosen)
    tl.store(index + place, chosen, mask=place <= budget)
    physical = tl.load(addresses + chosen, mask=place <= budget, other=0)
    tl.store(ids + place, physical, mask=place <= budget)
    if head == 0:
        tl.store(count + row, kept + (newest >= existing).to(tl.int32))


@triton.jit(do_not_specialize=["list_stride", "memo_stride", "interval", "budget"])
def keep_kernel(
    table,  # int32 [slots, ...], rows `table_stride` apart
    slots,  # int64 [R]
    prompts,  # int64 [R]
    seq_len,  # int32 [R]
    memo,  # int32 [slots, N, budget], rows `memo_stride` apart
    ids,  # int32 [R, N, `list_stride`]
    index,
    count,  # int32 [R]
    table_stride,
    memo_stride,
    list_stride,
    interval,
    budget,
    LP: tl.constexpr,  # budget + 1, rounded up to a power of two
):
    """The list of a row that keeps what it chose, for one head of one layer."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    slot, position, since, _ = row_of(slots, prompts, seq_len, row, interval)
    listed = (row.to(tl.int64) * tl.num_programs(0) + head) * list_stride
    keep_row(
        memo + slot * memo_stride + head * budget, table + slot * table_stride, ids + listed, index + listed, count,
        row, head, position // _PAGE, (position - since) // _PAGE + 1, budget, LP,
    )  # fmt: skip


@kernel_of(keep_pages)
def keep_pages_triton(
    table: Tensor, slots: Tensor, prompts: Tensor, seq_len: Tensor, memo: Tensor, interval: int
) -> Chosen:
    """One launch for the heads of all layers."""
    heads, budget = memo.shape[1:]
    rows, wide = slots.shape[0], ALIGNED * ceil_div(budget + 1, ALIGNED)
    assert table.stride(1) == 1 and memo.is_contiguous() and budget >= 1, (table.stride(), memo.stride())
    ids = torch.empty(rows, heads, wide, dtype=torch.int32, device=table.device)
    index, count = torch.empty_like(ids), torch.empty(rows, dtype=torch.int32, device=table.device)
    keep_kernel[(heads, rows)](
        table, slots.contiguous(), prompts.contiguous(), seq_len.contiguous(), memo, ids, index, count,
        table.stride(0), memo.stride(0), wide, interval, budget, **keep_constants(budget), num_warps=1,
    )  # fmt: skip
    return ids[..., : budget + 1], index[..., : budget + 1], count


def keep_constants(budget: int) -> dict[str, int]:
    """Return what `keep_kernel` is compiled for."""
    return {"LP": triton.next_power_of_2(budget + 1)}
