"""omniserve/ops/transfer.py and the sizes of captured steps."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from omniserve.engine.graphs import sizes
from omniserve.ops.transfer import Arriving, parts, sent, staged

CPU = torch.device("cpu")
LISTS = st.lists(st.lists(st.integers(-(2**62), 2**62), max_size=9), min_size=1, max_size=6)


@given(LISTS)
def test_lists_arrive_as_they_were_sent(lists: list[list[int]]) -> None:
    found = sent(lists, CPU)
    assert [one.tolist() for one in found] == lists
    assert all(one.dtype == torch.int64 for one in found)


@given(LISTS)
def test_lists_begin_at_multiples_of_16_bytes(lists: list[list[int]]) -> None:
    flat = staged(lists, CPU)
    assert flat.numel() % 2 == 0
    places = [one.storage_offset() for one, given in zip(parts(flat, lists), lists, strict=True) if given]
    assert all(place % 2 == 0 for place in places)


def test_results_are_read_on_the_host() -> None:
    assert Arriving(torch.tensor([3, 1, 2])).tolist() == [3, 1, 2]


@given(st.integers(1, 3000))
def test_captured_sizes_hold_all_that_a_step_may_have(most: int) -> None:
    found = sizes(most)
    assert found[0] == 1
    assert all(a < b for a, b in pairwise(found))
    assert found[-1] == min(most, 1024)
    assert len(found) <= 36
    assert all(b - a <= max(8, a // 2, a) for a, b in pairwise(found))  # no step is padded to more than twice its rows
