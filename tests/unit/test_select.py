"""Choosing pages: scores bound, lists hold what they must, and a row's list is its own affair."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniserve.base.config import PageScores, Sparsity
from omniserve.base.types import PAGE
from omniserve.formats.kv import LayerPages, kv_format
from omniserve.ops.batch import Batch, PageList, Rows, Workspace
from omniserve.ops.select import score_keys, score_pages, score_tiles, top_pages
from omniserve.sparsity.topk import PageSelector

H, G, D = 2, 3, 8
CPU = torch.device("cpu")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def store(pages: int, seed: int = 0) -> LayerPages:
    """Pages full of random keys, with their statistics."""
    kv = kv_format("kv8")
    made = LayerPages(
        torch.zeros(pages, H, kv.page_bytes(D), dtype=torch.uint8),
        kv,
        D,
        statistics=torch.zeros(pages, H, 4, 2, D, dtype=torch.float16),
    )
    k, v = (torch.randn(pages * PAGE, H, D, generator=generator(seed + n)).double() for n in range(2))
    made.write(torch.arange(pages * PAGE), k, v)
    return made


def queries(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, H * G, D, dtype=torch.float64, generator=generator(seed))


@given(seed=st.integers(0, 99), rows=st.integers(1, 4))
def test_the_score_bounds_every_product_of_its_page(seed: int, rows: int) -> None:
    pages = store(6, seed)
    q = queries(rows, seed)
    ids = torch.stack([torch.randperm(6, generator=generator(seed + row))[:4] for row in range(rows)]).int()
    assert pages.statistics is not None
    scores = score_pages(q, pages.statistics, ids)
    k, _ = pages.read(ids, torch.float64)  # [R, H, 4 * 64, D]
    products = torch.einsum("rhgd,rhsd->rhgs", q.view(rows, H, G, D), k).view(rows, H, G, 4, PAGE)
    assert (scores >= products.amax((2, 4)) - 1e-9).all()
    # And it is the formula: the best over heads and logical pages of the sum of the better corner, dim by dim.
    found = pages.statistics[ids.long()].double().permute(0, 2, 1, 3, 4, 5)[:, :, None]  # [R, H, 1, P, J, 2, D]
    corners = (q.view(rows, H, G, 1, 1, 1, D) * found).amax(5).sum(5).amax((2, 4))
    assert (scores - corners).abs().max() < 1e-9


def test_scores_by_keys_are_shares_of_the_best_keys() -> None:
    """A query's softmax over the best product of each page, keys behind the end hidden; the larger over the heads."""
    pages, q = store(6), queries(2)
    ids = torch.tensor([[3, 1, 2, 5], [0, 4, 5, 2]], dtype=torch.int32)
    lengths = torch.tensor([256, 150])
    scores = score_keys(q, pages, ids, lengths, 0.3)
    k, _ = pages.read(ids, torch.float64)
    for row, length in enumerate(lengths.tolist()):
        products = torch.einsum("hgd,hsd->hgs", q[row].view(H, G, D), k[row, :, :length]) * 0.3
        best = torch.stack([part.amax(2) for part in products.split(PAGE, 2)], 2)
        shares = torch.softmax(best, 2).amax(1)
        assert torch.allclose(scores[row].exp()[:, : shares.shape[1]], shares, atol=1e-12)
        assert (scores[row, :, shares.shape[1] :] == float("-inf")).all()


def test_keys_beyond_fp16_make_a_page_attractive() -> None:
    plain = kv_format("kv16")
    pages = LayerPages(torch.zeros(2, 1, plain.page_bytes(D), dtype=torch.uint8), plain, D)
    pages.codes[1, 0, 0, 5, 3] = float("inf")
    ids = torch.tensor([[0, 1]], dtype=torch.int32)
    scores = score_keys(torch.zeros(1, 1, D), pages, ids, torch.tensor([128]), 1.0)
    assert scores.tolist() == [[[0.0, float("inf")]]]
    statistics = torch.zeros(2, 1, 4, 2, D, dtype=torch.float16)
    statistics[1, 0, 2, 1, 3] = float("inf")
    q = torch.zeros(1, 1, D)
    assert score_pages(q, statistics, ids).tolist() == [[[0.0, float("inf")]]]


@given(data=st.data())
def test_top_pages_against_sorted_lists(data: st.DataObject) -> None:
    pages = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    count, width = data.draw(st.integers(2, 6)), max(pages)
    value = st.sampled_from([0.0, 1.0, 2.0, float("inf")])
    scores = [data.draw(st.lists(value, min_size=width, max_size=width)) for _ in pages]
    forced = torch.zeros(len(pages), width, dtype=torch.bool)
    for row, n in enumerate(pages):
        forced[row, [0, *range(n - 1, width)]] = True  # what does not exist cannot be taken
    chosen = top_pages(torch.tensor(scores)[:, None], torch.tensor(pages), forced, count)
    for row, n in enumerate(pages):
        rest = sorted(set(range(1, n - 1)), key=lambda page: (-scores[row][page], page))
        wanted = sorted([*{0, n - 1}, *rest][:count]) if n >= count else list(range(n))
        got = chosen[row, 0].tolist()
        assert got[: len(wanted)] == wanted
        assert got == sorted(got)
        assert all(page >= n for page in got[len(wanted) :])


def test_tile_shares_sum_to_the_queries_of_the_group() -> None:
    pages = store(5)
    assert pages.statistics is not None
    q = torch.randn(2, 7, H * G, D, dtype=torch.float64, generator=generator(3))
    ids = torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]], dtype=torch.int32)
    shares = score_tiles(q, pages.statistics, ids, torch.tensor([5, 3]), 0.3)
    assert torch.allclose(shares.sum(-1), torch.full((2, H), 7.0 * G, dtype=torch.float64))
    assert not shares[1, :, 3:].any()


class Selection:
    """A selector with its memo over one store, driven position by position.

    keeping  steps in which no row chooses take the lists of all layers at once, as the engine does
    """

    def __init__(
        self,
        budget: int,
        interval: int,
        slots: int,
        pages: int,
        seed: int = 0,
        scores: PageScores = "bounds",
        layers: int = 1,
        *,
        keeping: bool = True,
    ) -> None:
        self.store = store(slots * pages, seed)
        order = torch.randperm(slots * pages, generator=generator(seed + 9))
        self.table = order.view(slots, pages).int()
        self.selector = PageSelector(Sparsity(budget=budget, interval=interval, scores=scores), 0.3, (H,) * layers)
        self.keeping, self.kept = keeping, 0
        memo = self.selector.memo(slots=slots, pages=pages, device=CPU)
        assert memo is not None
        self.memo = memo
        self.memo.fill_(1 << 20)  # what a slot held before is never read

    def step(self, asks: list[tuple[int, int, int, Tensor]], layer: int = 0) -> PageList:
        """Rows (slot, prompt, position, query [G * H, D]) of one step; what they read."""
        positions = torch.tensor([position for _, _, position, _ in asks])
        rows = Rows(
            cu_q=torch.arange(len(asks) + 1, dtype=torch.int32),
            seq_len=(positions + 1).int(),
            singles=len(asks),
            longest=int(positions.max()) + 1,
        )
        nothing = torch.empty(0)
        slots = torch.tensor([slot for slot, _, _, _ in asks])
        prompts = torch.tensor([prompt for _, prompt, _, _ in asks])
        interval = self.selector.interval
        assert interval is not None
        keeps = self.keeping and all((position - prompt) % interval for _, prompt, position, _ in asks)
        self.kept += keeps
        batch = Batch(
            tokens=nothing,
            positions=positions,
            write_slots=(),
            slots=slots,
            prompts=prompts,
            tables=(self.table,),
            windows=((),),
            memo=self.memo,
            kept=self.selector.kept(self.table, slots, prompts, rows, self.memo) if keeps else None,
            rows=rows,
            work=Workspace(out=nothing),
        )
        q = torch.stack([query for _, _, _, query in asks])
        (reading,) = self.selector.reads(layer, q, self.store, batch, self.table, ())
        return reading.pages


def logical(pages: PageList, row: int) -> list[list[int]]:
    """The listed logical pages of each head."""
    assert pages.index is not None
    return pages.index[row, :, : int(pages.count[row])].tolist()


def query_at(slot: int, position: int) -> Tensor:
    return queries(1, 1000 * slot + position)[0]


@pytest.mark.parametrize("interval", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("prompt", [62, 100, 190, 255, 256, 257, 300, 511])
def test_lists_across_two_page_borders(interval: int, prompt: int) -> None:
    """Below, at and above a budget of 256: each page once, the newest and the sink always, none past the length.

    The reference drops the newest page at some lengths and lists one too many at others.
    """
    selection = Selection(256, interval, 1, 12)
    for position in range(prompt, prompt + 130):
        pages = selection.step([(0, prompt, position, query_at(0, position))])
        newest = position // PAGE
        for head, listed in enumerate(logical(pages, 0)):
            assert listed == sorted(set(listed)), (position, listed)
            assert listed[0] == 0
            assert listed[-1] == newest
            refresh = position - (position - prompt) % interval
            assert len(listed) == min(4, refresh // PAGE + 1) + (newest > refresh // PAGE)
            if position < 256:
                assert listed == list(range(newest + 1))
            assert pages.ids[0, head, : len(listed)].tolist() == selection.table[0, listed].tolist()


@given(data=st.data())
def test_steps_that_keep_read_what_choosing_steps_would(data: st.DataObject) -> None:
    """Ids, pages and counts of every layer; whatever the requests, and across the pages that begin in between."""
    interval = data.draw(st.integers(2, 8))
    prompts = data.draw(st.lists(st.integers(1, 700), min_size=1, max_size=3))
    budget = data.draw(st.sampled_from([128, 192, 512]))
    first, other = (Selection(budget, interval, 3, 13, layers=3, keeping=keeping) for keeping in (True, False))
    begin = data.draw(st.lists(st.integers(0, 1), min_size=len(prompts), max_size=len(prompts)))
    late = [interval * part for part in begin]  # requests at other places of their answers, but in step
    for slot, prompt in enumerate(prompts):  # choices of the past
        for position in range(prompt, prompt + late[slot]):
            for layer in range(3):
                ask = (slot, prompt, position, query_at(10 * layer + slot, position))
                first.step([ask], layer)
                other.step([ask], layer)
    for step in range(70):
        for layer in range(3):
            asks = [
                (slot, prompt, prompt + late[slot] + step, query_at(10 * layer + slot, prompt + step))
                for slot, prompt in enumerate(prompts)
            ]
            got, wanted = first.step(asks, layer), other.step(asks, layer)
            assert got.index is not None
            assert wanted.index is not None
            assert torch.equal(got.index, wanted.index), (layer, step)
            assert torch.equal(got.ids, wanted.ids)
            assert torch.equal(got.count, wanted.count)
    assert torch.equal(first.memo, other.memo)
    assert first.kept >= 3 * (70 - -(-70 // interval))
    assert not other.kept


def test_a_list_is_kept_for_an_interval_and_then_chosen_anew() -> None:
    selection = Selection(192, 4, 1, 20)
    prompt = 1000
    lists = [logical(selection.step([(0, prompt, p, query_at(0, p))]), 0) for p in range(prompt, prompt + 12)]
    for position, listed in enumerate(lists):
        chosen = lists[position - position % 4]
        assert [one[: len(first)] for one, first in zip(listed, chosen, strict=True)] == chosen
    assert lists[0] != lists[4]
    assert lists[4] != lists[8]


LENGTHS = (100, 4096, 4097, 70000)


@pytest.mark.parametrize("budget", [256, 4096])
def test_rows_of_very_different_lengths_equal_each_alone(budget: int) -> None:
    """The reference takes strides and the last page from the longest sequence of a batch."""
    pages = -(-70010 // PAGE)
    together, apart = Selection(budget, 3, 4, pages), Selection(budget, 3, 4, pages)
    for step in range(7):
        asks = [(slot, n, n + step, query_at(slot, n + step)) for slot, n in enumerate(LENGTHS)]
        listed = together.step(asks)
        for row, ask in enumerate(asks):
            assert logical(listed, row) == logical(apart.step([ask]), 0), (step, row)


@settings(max_examples=40)
@given(data=st.data())
def test_rows_come_and_go_between_refreshes(data: st.DataObject) -> None:
    """Replayed rows, decode rows, absent rows: a list depends on the request's position alone.

    The reference keeps one list on the layer: it leaks from one request to the next, with the old batch's size.
    """
    interval = data.draw(st.integers(1, 5))
    scores = data.draw(st.sampled_from(get_args(PageScores)))
    prompts = data.draw(st.lists(st.integers(1, 600), min_size=1, max_size=3))
    wanted: dict[tuple[int, int], list[list[int]]] = {}
    for slot, prompt in enumerate(prompts):
        alone = Selection(192, interval, 3, 11, scores=scores, keeping=False)
        for position in range(prompt, prompt + 70):
            wanted[slot, position] = logical(alone.step([(slot, prompt, position, query_at(slot, position))]), 0)
    mixed = Selection(192, interval, 3, 11, scores=scores)
    at = list(prompts)
    for _ in range(12):
        asks = []
        for slot, prompt in enumerate(prompts):
            if data.draw(st.integers(0, 9)) == 0:  # preempted: the slot starts again, perhaps after another's use
                at[slot] = prompt
                mixed.memo[slot] = 1 << 20
            count = min(data.draw(st.sampled_from([0, 1, 1, 1, 2, 7])), prompt + 70 - at[slot])
            asks += [(slot, prompt, p, query_at(slot, p)) for p in range(at[slot], at[slot] + count)]
            at[slot] += count
        if asks:
            pages = mixed.step(asks)
            for row, (slot, _, position, _) in enumerate(asks):
                assert logical(pages, row) == wanted[slot, position], (slot, position)


def test_what_is_beyond_the_table_is_never_an_address() -> None:
    """Rows of fewer pages than the longest one get filler numbers, which point into the table all the same."""
    selection = Selection(512, 4, 2, 8)
    pages = selection.step([(0, 10, 10, query_at(0, 10)), (1, 500, 500, query_at(1, 500))])
    assert (pages.ids >= 0).all()
    assert pages.count.tolist() == [1, 8]
