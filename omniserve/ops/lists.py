"""The numbers of a step that lengths alone decide: tokens and places of produced positions, pages of windows.

A step makes them once, for all layers. On a GPU each of these is one launch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE
from omniserve.ops.batch import PageList
from omniserve.ops.dispatch import operation


@operation
def produced(
    last: Tensor, positions: Tensor, slots: Tensor, tables: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Return tokens int64 [R], lengths int32 [R], their pages int32 [R], and per table `Batch.write_slots` int64 [R].

    last    int64 [slots]: the token that each slot's request drew last; positions, slots int64 [R]
    tables  int32 [slots, max_pages]: physical page by request slot and logical page; -1 where there is none
    A length is a position + 1. A place below 0 is skipped: the slot has no page there.
    """
    page, offset = positions // PAGE, positions % PAGE
    places = tuple(table[slots, page].long() * PAGE + offset for table in tables)
    return last[slots], (positions + 1).int(), (page + 1).int(), places


@operation
def window_pages(
    table: Tensor, slots: Tensor, cu_q: Tensor, seq_len: Tensor, sink: int, local: int, width: int
) -> PageList:
    """Return the pages of the sink and of a window of `local` positions, each once, ascending, for adjacent rows.

    table  int32 [slots, max_pages]; slots int64 [R]; cu_q int32 [R + 1]: where each row's queries begin
    seq_len  int32 [R]: position of a row's last query + 1; width: places of the lists, enough for every row
    """
    end = seq_len.long()
    begin = end - (cu_q[1:] - cu_q[:-1])  # position of a row's first query
    opening = (begin - local + 1).clamp(min=0) // PAGE  # the page of the first key that a window shows
    leading = opening.clamp(max=ceil_div(sink, PAGE))
    count = leading + (end - 1) // PAGE - opening + 1
    place = torch.arange(width, device=table.device)[None]
    index = torch.where(place < leading[:, None], place, place - leading[:, None] + opening[:, None])
    index = index.clamp(max=table.shape[1] - 1)
    ids = torch.gather(table[slots], 1, index)
    return PageList(ids=ids, index=index.int(), count=count.int(), slots=None)
