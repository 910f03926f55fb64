"""What the kernels of attention share: sizes, and how lists of pages must lie in memory."""

from torch import Tensor

QUERIES = 128
"""Queries of a tile: one head's, of adjacent positions."""

BLOCK = 128
"""Keys come in multiples of this: two pages."""

FIELDS = 6
"""Numbers of a tile in the plan: its first token, its queries, the position of the first; where the keys of its row
begin in the scratch, how many of them lie there from position 0 on, how many positions are left out behind these. Where
pages were chosen, positions count from the first key of the list. Where all tiles of a sequence find theirs among its
pages, the row stands in place of the fifth number."""


def check_lists(ids: Tensor, index: Tensor | None) -> None:
    """Assert that physical pages and their logical ones (None: in order) are found by the strides of `ids`."""
    like = index is None or all(
        mine == theirs or size == 1  # then torch may give any stride
        for mine, theirs, size in zip(ids.stride(), index.stride(), ids.shape, strict=True)
    )
    assert ids.stride(-1) == 1 and like, (ids.shape, ids.stride(), None if index is None else index.stride())
