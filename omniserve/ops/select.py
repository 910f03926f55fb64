"""Choosing pages: `select_pages` and `keep_pages` for produced positions, `select_tiles` for tiles of prompts.

The score of a page is the largest share of attention that one of its keys draws from a query; or a bound of its
products by statistics: smallest and largest key of each logical page, dim by dim, bound them without reading a key.
"""

import torch
from torch import Tensor

from omniserve.base.config import TILE, PageScores
from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE
from omniserve.ops.dispatch import operation
from omniserve.ops.pages import PageStore

Chosen = tuple[Tensor, Tensor, Tensor]
"""ids and index int32 [R, H, P], count int32 [R], as in a `PageList`. Places behind `count` hold page 0. P is one more
than the budget at produced positions; for tiles it is the budget, or the pages of the longest sequence."""


@operation
def select_pages(
    q: Tensor,
    store: PageStore,
    table: Tensor,
    slots: Tensor,
    prompts: Tensor,
    seq_len: Tensor,
    memo: Tensor,
    interval: int,
    longest: int,
    by: PageScores,
    scale: float,
) -> Chosen:
    """Pages that rows of one produced position read: those that their request chose last, and the one begun since.

    q           [R, G * H, D], rotated; rows of a request are adjacent and ascend by one position
    table       int32 [slots, max_pages]: physical pages; slots, prompts int64 [R], seq_len int32 [R] as in a `Batch`
    memo        int32 [slots, H, budget]: what each slot's request chose last; rows that choose write theirs
    interval    a request chooses at its positions `prompt + n * interval`: page 0, the newest one and those with the
                best scores; up to `budget` pages it takes all
    longest     largest seq_len that there may be; sets sizes of scratch alone
    by          "keys": scores are `score_keys` of the store, "bounds": `score_pages` of its statistics
    scale       of attention's products
    A row's list depends on its own request and position alone. Which rows choose is known to the device only.
    """
    rows, budget = q.shape[0], memo.shape[2]
    position = seq_len.long() - 1
    since = (position - prompts) % interval
    chosen_at = position - since
    due = (since == 0).nonzero()[:, 0]
    chosen = memo[slots]
    row = torch.arange(rows, device=q.device)
    if due.numel():
        pages = chosen_at[due] // PAGE + 1
        width = int(pages.max())
        ids = table[slots[due], :width]
        if by == "keys":
            scores = score_keys(q[due], store, ids, chosen_at[due] + 1, scale)
        else:
            assert store.statistics is not None
            scores = score_pages(q[due], store.statistics, ids)
        forced = torch.zeros(due.shape[0], width, dtype=torch.bool, device=q.device)
        forced[:, 0] = True
        forced.scatter_(1, pages[:, None] - 1, True)
        fresh = top_pages(scores, pages, forced, budget)
        source = row - since
        here = (source >= 0) & (slots[source.clamp(min=0)] == slots)
        place = torch.empty_like(row)
        place[due] = torch.arange(due.shape[0], device=q.device)
        chosen = torch.where(here[:, None, None], fresh[place[source.clamp(min=0)] * here], chosen)
        following = (due + interval).clamp(max=rows - 1)
        last = (due + interval >= rows) | (slots[following] != slots[due])
        memo[slots[due[last]]] = fresh[last]
    return _with_newest(table[slots], chosen, position // PAGE, chosen_at // PAGE)


@operation
def keep_pages(table: Tensor, slots: Tensor, prompts: Tensor, seq_len: Tensor, memo: Tensor, interval: int) -> Chosen:
    """Pages that rows read none of which chooses: those that their requests chose last, and the one begun since.

    memo    int32 [slots, N, P]: what each slot's request chose last, of the heads of all layers side by side
    The others as in `select_pages`, and so is the result, for N heads. A row that does choose gets any numbers.
    """
    position = seq_len.long() - 1
    chosen_at = position - (position - prompts) % interval
    return _with_newest(table[slots], memo[slots], position // PAGE, chosen_at // PAGE)


@operation
def select_tiles(
    q: Tensor,
    store: PageStore,
    table: Tensor,
    slots: Tensor,
    cu_q: Tensor,
    seq_len: Tensor,
    budget: int,
    longest: int,
    scale: float,
) -> Chosen:
    """Pages that tiles of prompt positions read: page 0, the tile's own, and those of the largest `score_tiles`.

    q           [T, G * H, D], rotated; row r's queries are cu_q[r] to cu_q[r + 1], at most TILE, which end at position
                seq_len[r]; the first is at a multiple of TILE
    store       its statistics are read, of complete pages before a tile alone
    table       int32 [slots, max_pages]: physical pages; slots int64 [R], cu_q int32 [R + 1], seq_len int32 [R]
    budget      pages of a list at most, more than page 0 and a tile's own; longest: the largest seq_len
    A row's list depends on its own queries and the pages before them alone.
    """
    assert store.statistics is not None
    first, stop, end = cu_q[:-1].long(), cu_q[1:].long(), seq_len.long()
    pages, longest = (end + PAGE - 1) // PAGE, ceil_div(longest, PAGE)
    mine = (end - (stop - first)) // PAGE  # the first page of a tile's own
    of = torch.minimum(first[:, None] + torch.arange(TILE, device=q.device), stop[:, None] - 1)
    page = torch.arange(longest, device=q.device)
    # The tile's own pages are listed in any case, and hold tokens that some of its queries do not see.
    scores = score_tiles(q[of], store.statistics, table[slots, :longest], mine, scale)
    chosen = top_pages(scores, pages, (page == 0) | (page >= mine[:, None]), min(budget, longest))
    count = pages.clamp(max=budget)
    used = torch.arange(chosen.shape[2], device=q.device) < count[:, None]
    index = torch.where(used[:, None], chosen, 0)
    return listed(table[slots], index), index, count.to(torch.int32)


def _with_newest(table: Tensor, chosen: Tensor, newest: Tensor, newest_then: Tensor) -> Chosen:
    """Return lists of chosen pages [R, H, P] with the newest page, int64 [R], behind them if it is another by now."""
    kept = (newest_then + 1).clamp(max=chosen.shape[2])
    # One place more than the memo has, for the page that began since: it follows the chosen ones.
    index = torch.nn.functional.pad(chosen, (0, 1))
    places = torch.arange(index.shape[2], device=table.device)
    behind = torch.where(newest > newest_then, newest, 0)[:, None] * (places == kept[:, None])
    index = torch.where((places < kept[:, None])[:, None], index, behind[:, None]).to(torch.int32)
    count = (kept + (newest > newest_then)).to(torch.int32)
    return listed(table, index), index, count


def listed(table: Tensor, index: Tensor) -> Tensor:
    """Return the physical pages, shape of index [R, H, P], of logical pages of sequences with tables [R, max_pages]."""
    at = index.long().clamp(max=table.shape[1] - 1)
    return torch.gather(table[:, None].expand(-1, index.shape[1], -1), 2, at)


def score_keys(q: Tensor, store: PageStore, ids: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Logarithm of the largest share of attention that a page may draw, the larger over the G heads that share keys.

    q        [R, G * H, D], rotated, one query per row
    ids      int32 [R, P]: physical pages; lengths int64 [R]: keys of each row, as they are stored
    A page's largest product takes the place of its scores in a softmax over the pages of a query: a head that looks at
    few keys does not lose them to one that looks at many, whose products may be larger all over.
    Returns [R, H, P] fp32 (fp64 if q is). A row's scores depend on its own query and pages alone.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    inside = torch.arange(ids.shape[1] * PAGE, device=q.device) < lengths[:, None]
    scores = []
    for row in range(q.shape[0]):
        keys, _ = store.read(ids[row : row + 1], exact)  # [1, H, P * 64, D]
        query = q[row].to(exact).view(keys.shape[1], -1, q.shape[-1])
        product = torch.matmul(query, keys[0].transpose(1, 2))  # [H, G, P * 64]
        # A key beyond fp16 times 0 is no number: such a page is always attractive.
        product = torch.where(product.isnan(), float("inf"), product).masked_fill(~inside[row], float("-inf"))
        best = product.view(*product.shape[:2], -1, PAGE).amax(3) * scale  # [H, G, P]
        endless = best == float("inf")
        whole = torch.logsumexp(best.masked_fill(endless, float("-inf")), 2, keepdim=True)
        share = torch.where(endless | (best == float("-inf")), best, best - whole)
        scores.append(share.amax(1))
    return torch.stack(scores)


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


def score_tiles(q: Tensor, statistics: Tensor, ids: Tensor, pages: Tensor, scale: float) -> Tensor:
    """Share of the attention that each page may draw from a tile of queries, summed over queries and heads of a group.

    q       [R, t, G * H, D], rotated: t queries of each row; a row with fewer repeats its last one
    pages   int64 [R]: how many leading entries of ids count; the others get a share of 0
    Otherwise as `score_pages`. The bound of a page takes the place of its scores in a softmax over the pages; endless
    ones are left out of it, and their pages are always attractive.
    Returns [R, H, P].
    """
    used = torch.arange(ids.shape[1], device=ids.device) < pages[:, None]
    shares = []
    for row in range(q.shape[0]):  # one after the other: the bounds of one at 256K tokens take a few hundred megabytes
        of = slice(row, row + 1)
        bounds = _bounds(q[of], statistics, ids[of]).amax(4) * scale  # [1, H, G * t, P]
        there = used[of, None, None]
        endless = (bounds == float("inf")) & there
        share = torch.softmax(bounds.masked_fill(~there | endless, float("-inf")), -1)
        share = share.masked_fill(~there, 0).masked_fill(endless, float("inf"))  # a query that sees none: no number
        # In fp64, so that equal pages have equal sums: torch adds up columns in different orders.
        shares.append(torch.where(share.isnan(), 0, share).sum(2, dtype=torch.float64).to(share.dtype))
    return torch.cat(shares)


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
    inf = float("inf")
    return torch.nan_to_num(product, nan=inf, posinf=inf, neginf=-inf).view(rows, kv_heads, -1, ids.shape[1], parts)


def top_pages(scores: Tensor, pages: Tensor, forced: Tensor, count: int) -> Tensor:
    """Return the logical pages int32 [R, H, count] of the largest scores, in ascending order.

    scores  [R, H, P]
    pages   int64 [R]: the first so many pages exist; a row with fewer than `count` gets all of them, and behind them
            numbers that are not pages
    forced  bool [R, P]: pages that are always taken, if they exist
    Equal scores: the smaller page.
    """
    existing = torch.arange(scores.shape[2], device=scores.device) < pages[:, None]
    forced = forced & existing
    ranked = scores.masked_fill(forced[:, None], float("inf")).masked_fill(~existing[:, None], float("-inf"))
    # A score may be infinite itself: forced pages come first all the same.
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices
    first = torch.gather(forced[:, None].expand_as(order), 2, order)
    order = torch.gather(order, 2, torch.sort(first, dim=-1, descending=True, stable=True).indices)[..., :count]
    if order.shape[2] < count:
        filler = torch.arange(order.shape[2], count, device=order.device).expand(*order.shape[:2], -1)
        order = torch.cat((order, filler), -1)
    return torch.sort(order, -1).values.to(torch.int32)
