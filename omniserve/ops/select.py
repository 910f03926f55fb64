"""Choosing pages by statistics: `score_pages` bounds what a page can weigh, `top_pages` takes the best.

No key is read: smallest and largest key of each logical page, dim by dim, bound every score of the page.
"""

import torch
from torch import Tensor

from omniserve.ops.dispatch import operation


@operation
def score_pages(q: Tensor, statistics: Tensor, ids: Tensor) -> Tensor:
    """Upper bound of q·k over each page, the larger over its logical pages and over the G heads that share keys.

    q           [R, G * H, D], rotated, one query per row
    statistics  fp16 [pages, H, J, 2, D]: smallest and largest key of each of the J logical pages
    ids         int32 [R, P]: physical pages; what stands below 0 or is not in use gives any value
    Returns [R, H, P] fp32 (fp64 if q is). A row's scores depend on its own query and pages alone.
    Source: Quest (arXiv 2406.10774) section 3; pages of several logical pages: LServe (arXiv 2502.14866) section 3.
    """
    bounds = _bounds(q[:, None], statistics, ids)  # [R, H, G, P, J]
    return bounds.amax((2, 4))


@operation
def score_tiles(q: Tensor, statistics: Tensor, ids: Tensor, pages: Tensor, scale: float) -> Tensor:
    """Share of the attention that each page may draw from a tile of queries, summed over queries and heads of a group.

    q       [R, t, G * H, D], rotated: t queries of each row; a row with fewer repeats its last one
    pages   int64 [R]: how many leading entries of ids count; the others get a share of 0
    Otherwise as `score_pages`. The bound of a page takes the place of its scores in a softmax over the pages.
    Returns [R, H, P].
    """
    bounds = _bounds(q, statistics, ids).amax(4) * scale  # [R, H, G * t, P]
    used = torch.arange(ids.shape[1], device=ids.device) < pages[:, None]
    shares = torch.softmax(bounds.masked_fill(~used[:, None, None], float("-inf")), -1)
    return shares.sum(2)


def _bounds(q: Tensor, statistics: Tensor, ids: Tensor) -> Tensor:
    """Return the bounds [R, H, G * t, P, J] of queries [R, t, G * H, D] on logical pages."""
    rows, count, heads, dim = q.shape
    kv_heads, parts = statistics.shape[1:3]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    query = q.to(exact).view(rows, count, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    found = statistics[ids.clamp(min=0).long()].to(exact).permute(0, 2, 1, 3, 4, 5)  # [R, H, P, J, 2, D]
    both = torch.cat((query.clamp(max=0), query.clamp(min=0)), -1)  # sum of max(q low, q high), dim by dim
    product = torch.matmul(both, found.reshape(rows, kv_heads, -1, 2 * dim).transpose(2, 3))
    # A key beyond fp16 makes its bound infinite, and 0 * inf is no number: such a page is always attractive.
    return torch.nan_to_num(product, nan=float("inf")).view(rows, kv_heads, -1, ids.shape[1], parts)


@operation
def top_pages(scores: Tensor, pages: Tensor, forced: Tensor, count: int) -> Tensor:
    """Return the logical pages int32 [R, H, count] of the largest scores, in ascending order.

    scores  [R, H, P]
    pages   int64 [R]: the first so many pages exist; a row with fewer than `count` gets all of them, and behind them
            numbers that are not pages
    forced  bool [R, P]: pages that are always taken
    Equal scores: the smaller page.
    """
    existing = torch.arange(scores.shape[2], device=scores.device) < pages[:, None]
    ranked = scores.masked_fill(forced[:, None], float("inf")).masked_fill(~existing[:, None], float("-inf"))
    # A score may be infinite itself: forced pages come first all the same.
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices
    first = torch.gather(forced[:, None].expand_as(order), 2, order)
    order = torch.gather(order, 2, torch.sort(first, dim=-1, descending=True, stable=True).indices)[..., :count]
    if order.shape[2] < count:
        filler = torch.arange(order.shape[2], count, device=order.device).expand(*order.shape[:2], -1)
        order = torch.cat((order, filler), -1)
    return torch.sort(order, -1).values.to(torch.int32)
