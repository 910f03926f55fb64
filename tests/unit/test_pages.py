"""attend and rope_write against a masked full softmax, in float64, over a store of plain numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omniserve.base.spec import RopeSpec
from omniserve.base.types import PAGE
from omniserve.ops.batch import PageList, Reading, Rows, Visible, Workspace
from omniserve.ops.pages import HeadGroup, attend, rope_write
from omniserve.ops.rope import make_rope, rotate

D = 8


class PlainStore:
    """Pages of unquantized numbers."""

    statistics = None

    def __init__(self, pages: int, heads: int, fill: float = float("nan")) -> None:
        self.k = torch.full((pages, heads, PAGE, D), fill, dtype=torch.float64)
        self.v = self.k.clone()
        self.heads = heads

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        used = slots >= 0
        page, offset = slots[used] // PAGE, slots[used] % PAGE
        self.k[page, :, offset] = k[used].double()
        self.v[page, :, offset] = v[used].double()

    def read(self, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        of = torch.arange(self.heads)[:, None]
        at = (ids if ids.dim() == 3 else ids[:, None]).long()  # [R, H or 1, P]
        return self.k[at, of].flatten(2, 3).to(dtype), self.v[at, of].flatten(2, 3).to(dtype)


def truth(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, visible: Visible) -> Tensor:
    """q [t, Hq, D] at positions [t]; k, v [S, H, D]: one masked softmax for each head."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        for row, i in enumerate(positions.tolist()):
            seen = [
                j
                for j in range(k.shape[0])
                if j <= i and (visible.local is None or j < visible.sink or j > i - visible.local)
            ]
            weight = torch.softmax(k[seen, head // group] @ q[row, head] * 0.3, 0)
            out[row, head] = weight @ v[seen, head // group]
    return out


def setting(lengths: list[int], heads: int, seed: int) -> tuple[PlainStore, Tensor, list[Tensor], list[Tensor]]:
    """A store with rows of these lengths on shuffled pages; unwritten places hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-n // PAGE) for n in lengths]
    store = PlainStore(sum(needed) + 3, heads)
    shuffled = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    table = torch.full((len(lengths), max(needed)), -1, dtype=torch.int32)
    keys, values = [], []
    for row, length in enumerate(lengths):
        for logical in range(needed[row]):
            table[row, logical] = shuffled.pop()
        k = torch.randn(length, heads, D, generator=generator, dtype=torch.float64)
        v = torch.randn(length, heads, D, generator=generator, dtype=torch.float64)
        position = torch.arange(length)
        store.write(table[row, position // PAGE].long() * PAGE + position % PAGE, k, v)
        keys.append(k)
        values.append(v)
    return store, table, keys, values


def rows_of(counts: list[int], lengths: list[int], singles: int) -> Rows:
    return Rows(
        cu_q=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
        seq_len=torch.tensor(lengths, dtype=torch.int32),
        singles=singles,
        longest=max(lengths),
    )


def run(q: Tensor, store: PlainStore, pages: PageList, rows: Rows, visible: Visible) -> Tensor:
    out = torch.empty_like(q)
    reading = Reading(rows=range(rows.count), pages=pages, visible=visible)
    group = HeadGroup(heads=slice(0, q.shape[1]), to=None, reads=(reading,), store=store)
    attend(q, (group,), rows, out, Workspace(out=out), scale=0.3)
    return out


def counts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([-(-n // PAGE) for n in lengths], dtype=torch.int32)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("visible", [Visible(), Visible(sink=5, local=40), Visible(sink=64, local=1)], ids=str)
def test_mixed_rows_equal_a_masked_softmax(group: int, visible: Visible) -> None:
    lengths, counts = [1, 64, 65, 200, 300, 3], [1, 1, 1, 1, 290, 3]
    store, table, keys, values = setting(lengths, 2, seed=group)
    q = torch.randn(sum(counts), 2 * group, D, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    pages = PageList(ids=table, index=None, count=counts_of(lengths), slots=torch.arange(6))
    out = run(q, store, pages, rows_of(counts, lengths, 4), visible)
    begin = 0
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        positions = torch.arange(length - count, length)
        wanted = truth(q[begin : begin + count], keys[row], values[row], positions, visible)
        assert (out[begin : begin + count] - wanted).abs().max() < 1e-12, row
        begin += count


@given(st.data())
def test_order_of_listed_pages_is_irrelevant_and_all_pages_are_dense(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 400))
    store, table, keys, values = setting([length], 2, seed=length)
    order = data.draw(st.permutations(range(table.shape[1])))
    q = torch.randn(1, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    listed = PageList(
        ids=table[:, order], index=torch.tensor([order], dtype=torch.int32), count=counts_of([length]), slots=None
    )
    out = run(q, store, listed, rows_of([1], [length], 1), Visible())
    assert (out - truth(q, keys[0], values[0], torch.tensor([length - 1]), Visible())).abs().max() < 1e-12


@given(st.data())
def test_pages_that_nobody_sees_may_be_missing_or_poisoned(data: st.DataObject) -> None:
    """Streaming: only sink and window pages are listed; every other page is NaN."""
    length = data.draw(st.integers(1, 600))
    sink, local = data.draw(st.integers(0, 130)), data.draw(st.integers(1, 200))
    visible = Visible(sink=sink, local=local)
    store, table, keys, values = setting([length], 1, seed=length)
    logical = [
        page for page in range(table.shape[1]) if page * PAGE < sink or min((page + 1) * PAGE, length) > length - local
    ]
    for page in set(range(table.shape[1])) - set(logical):
        store.k[table[0, page]] = store.v[table[0, page]] = float("nan")
    q = torch.randn(1, 2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    pages = PageList(
        ids=table[:, logical],
        index=torch.tensor([logical], dtype=torch.int32),
        count=torch.tensor([len(logical)], dtype=torch.int32),
        slots=None,
    )
    out = run(q, store, pages, rows_of([1], [length], 1), visible)
    assert (out - truth(q, keys[0], values[0], torch.tensor([length - 1]), visible)).abs().max() < 1e-12


@given(cut=st.integers(1, 299))
def test_chunking_is_invisible(cut: int) -> None:
    store, table, _, _ = setting([300], 2, seed=4)
    q = torch.randn(300, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    pages = PageList(ids=table, index=None, count=counts_of([300]), slots=None)
    whole = run(q, store, pages, rows_of([300], [300], 0), Visible())
    first = run(q[:cut], store, pages, rows_of([cut], [cut], 0), Visible())
    second = run(q[cut:], store, pages, rows_of([300 - cut], [300], 0), Visible())
    assert (torch.cat([first, second]) - whole).abs().max() < 1e-12


def test_rope_write_rotates_and_writing_twice_is_writing_once() -> None:
    rope = make_rope(RopeSpec(), head_dim=D, context=200, device=torch.device("cpu"))
    qkv = torch.randn(5, 4 + 2 * 2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 7, 64, 65, 199])
    slots = torch.tensor([3, 70, -1, 128, 190])
    store = PlainStore(3, 2, fill=0.0)
    q = rope_write(qkv, positions, (slots,), (store,), rope, 4)
    once = store.k.clone(), store.v.clone()
    rope_write(qkv, positions, (slots,), (store,), rope, 4)
    assert torch.equal(store.k, once[0])
    assert torch.equal(store.v, once[1])
    assert torch.equal(q, rotate(qkv[:, :4], positions, rope))
    assert torch.equal(store.k[1, :, 6], rotate(qkv[:, 4:6], positions, rope)[1])
    assert torch.equal(store.v[2, :, 0], qkv[3, 6:])
    assert not store.k[0, :, 0].any()  # a slot of -1 writes nothing
