"""Sizes that the kernels of prompts share."""

QUERIES = 128
"""Queries of a tile: one head's, of adjacent positions."""

BLOCK = 128
"""Keys come in multiples of this: two pages."""

FIELDS = 6
"""Numbers of a tile in the plan: its first token, its queries, the position of the first; where the keys of its row
begin in the scratch, how many of them lie there from position 0 on, how many positions are left out behind these. Where
pages were chosen, positions count from the first key of the list."""
