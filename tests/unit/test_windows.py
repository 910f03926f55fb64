"""Streaming heads through manager, tables, policy and pages, against a masked softmax over all keys ever made.

Truth is the masked full softmax. Everything between a request and `attend` is the engine's own; the keys are random.
"""

import pytest
import torch
from torch import Tensor

from omniserve.base.config import Sparsity
from omniserve.base.spec import ModelSpec
from omniserve.base.types import PAGE, Admission, Kind, Request, SamplingParams, Step, Work
from omniserve.cache.manager import CacheManager
from omniserve.cache.pool import PagePool
from omniserve.engine.assemble import Assembler
from omniserve.formats.kv import LayerPages, kv_format
from omniserve.ops.batch import Rows, Workspace
from omniserve.ops.pages import attend
from omniserve.sparsity.heads import split
from omniserve.sparsity.policy import Sparse

CPU = torch.device("cpu")
D = 8
SPEC = ModelSpec(
    family="llama", layers=1, hidden=8, heads=2, kv_heads=1, head_dim=D, ffn=8, vocab=9, context=4096, norm_eps=1e-5
)
SINK, LOCAL, PROMPT_LOCAL = 64, 192, 320
PROMPTS = [PAGE * pages + extra for pages in range(1, 13) for extra in (-1, 0, 1)]


class Served:
    """One layer of streaming heads whose requests are driven by hand."""

    def __init__(self, slots: int, unlanded: int) -> None:
        sparsity = Sparsity(streaming=1.0, sink=SINK, local=LOCAL, prefill_local=PROMPT_LOCAL)
        self.policy = Sparse(SPEC, sparsity, split([[0.0]], 1.0), device=CPU)
        pages = sparsity.streaming_pages(seqs=slots, unlanded=unlanded, longest=SPEC.context)
        self.cache = CacheManager(
            {Kind.STREAMING: PagePool(pages)},
            prefix_caching=False,
            keeps=self.policy.keeps,
            unlanded=unlanded,
            by_position=True,
        )
        kv = kv_format("kv32")
        # NaN wherever nothing was written: the store of a fresh server, and of a hard-working one
        self.store = LayerPages(torch.full((pages, 1, kv.page_bytes(D)), 255, dtype=torch.uint8), kv, D)
        self.assembler = Assembler(self.policy, slots=slots, max_len=SPEC.context, device=CPU)
        self.keys: dict[int, list[Tensor]] = {}
        self.draw = torch.Generator().manual_seed(0)

    def start(self, slot: int, prompt: int, limit: int) -> Request:
        one = Request(
            id=str(slot), tokens=[1] * prompt, prompt=prompt, sampling=SamplingParams(max_tokens=limit), limit=limit
        )
        assert self.cache.start(one, slot) == 0
        one.slot = slot
        self.keys[slot] = []
        return one

    def step(self, asks: list[tuple[Request, int]]) -> list[tuple[Tensor, Tensor]]:
        """Run (request, tokens) and return what attention gave and the truth, for the last token of each."""
        works = []
        for one, count in asks:
            assert self.cache.reserve(one, count), "the pool is as large as the plan says"
            assert one.slot is not None
            works.append(
                Work(
                    request=one.id,
                    slot=one.slot,
                    start=one.issued,
                    count=count,
                    prompt=one.prompt,
                    new_tokens=tuple(one.tokens[one.issued : one.issued + count]),
                    logits="last",
                    draws=False,
                    admission=Admission(sampling=one.sampling, seed=0, prompt=one.prompt),
                )
            )
        self.assembler.move(self.cache.moves())
        made = self.assembler.assemble(Step(works=tuple(works)), Workspace(out=torch.empty(0)))
        rows = made.batch.rows
        of_rows = zip(rows.cu_q[rows.singles : -1], rows.cu_q[rows.singles + 1 :], strict=True)
        assert [made.batch.positions[i:j].tolist() for i, j in of_rows] == [list(chunk) for chunk in rows.chunks]
        tokens = made.batch.tokens.shape[0]
        q = torch.randn(tokens, 2, D, generator=self.draw, dtype=torch.float64)
        k, v = (torch.randn(tokens, 1, D, generator=self.draw).double() for _ in range(2))
        self.store.write(made.batch.write_slots[0], k, v)
        out = torch.empty_like(q)
        groups = self.policy.groups(0, q, (self.store,), made.batch)
        attend(q, groups, made.batch.rows, out, made.batch.work, scale=0.3)
        found = []
        for (one, count), spans in zip(asks, made.spans, strict=True):
            for span in spans:
                self.keys[int(one.id)].append(torch.stack((k[span, 0], v[span, 0])))
            found.append((out[spans[-1].stop - 1], self.truth(one, q[spans[-1].stop - 1])))
            one.issued += count
            one.computed += count
            self.cache.commit(one)
        self.cache.check([one for one, _ in asks])
        return found

    def truth(self, one: Request, q: Tensor) -> Tensor:
        keys, values = torch.cat(self.keys[int(one.id)], 1)
        position = keys.shape[0] - 1
        local = PROMPT_LOCAL if position < one.prompt else LOCAL
        j = torch.arange(position + 1)
        scores = (q @ keys.T * 0.3).masked_fill(~((j < SINK) | (j > position - local)), float("-inf"))
        return torch.softmax(scores, -1) @ values


@pytest.mark.parametrize("chunk", [4096, 100])
def test_prompts_of_any_length_then_decode(chunk: int) -> None:
    """36 prompts of 1 to 12 pages, give or take a token, then 140 steps: the truth at every step, in one batch.

    In the reference the ring of local pages and the trimmed page table disagree after three pages of decode, and local
    pages of some prompts land on the sink.
    """
    served = Served(len(PROMPTS), chunk)
    requests = []
    for slot, prompt in enumerate(PROMPTS):
        one = served.start(slot, prompt, 200)
        requests.append(one)
        while one.issued < one.prompt:
            ((got, truth),) = served_alone(served, one, min(chunk, one.prompt - one.issued))
            assert (got - truth).abs().max() < 1e-9, one.prompt
    for step in range(140):
        for one in requests:
            one.tokens.append(1)
        for one, (got, truth) in zip(requests, served.step([(one, 1) for one in requests]), strict=True):
            assert (got - truth).abs().max() < 1e-9, (one.prompt, step)


def served_alone(served: Served, one: Request, count: int) -> list[tuple[Tensor, Tensor]]:
    """One request's step; the invariants of the cache are those of all that hold a slot."""
    check, served.cache.check = served.cache.check, lambda requests: None  # type: ignore[method-assign]
    try:
        return served.step([(one, count)])
    finally:
        served.cache.check = check  # type: ignore[method-assign]


def test_replayed_rows_read_their_own_windows() -> None:
    """After a preemption the produced tokens run as many rows of one step, each with the window of its position."""
    served = Served(1, 4096)
    one = served.start(0, 500, 300)
    one.tokens += [1] * 299
    for count in (500, 200, 99):
        ((got, truth),) = served.step([(one, count)])
        assert (got - truth).abs().max() < 1e-9
    # The pages of the whole replay stood at once; what no later query sees went when it landed.
    assert served.cache.pools[Kind.STREAMING].held == SINK // PAGE + LOCAL // PAGE + 1


def test_lists_have_a_width_that_no_position_decides() -> None:
    """A captured step is replayed at any positions: what it was captured with must have room for all."""
    policy = Sparse(SPEC, Sparsity(streaming=1.0, sink=SINK, local=LOCAL), split([[0.0]], 1.0), device=CPU)
    table = torch.arange(3 * 64, dtype=torch.int32).view(3, 64)
    widths = set()
    for first in range(0, SPEC.context - 2000, 31):
        lengths = torch.tensor([first + 1, first + 64, first + 2000], dtype=torch.int32)
        cu_q = torch.arange(4, dtype=torch.int32)
        rows = Rows(cu_q=cu_q, seq_len=lengths, singles=3, longest=SPEC.context)
        (((reading,),)) = policy.windows((table,), torch.arange(3), rows)
        assert int(reading.pages.count.max()) <= reading.pages.ids.shape[1]
        widths.add(reading.pages.ids.shape)
    assert widths == {(3, SINK // PAGE + (LOCAL + PAGE - 2) // PAGE + 1)}


def test_write_slots_of_huge_pools_are_64_bit() -> None:
    """Physical page 2^26 begins at slot 2^32: addresses in 32 bits would wrap."""
    served = Served(1, 64)
    served.assembler.tables[0][0, 0] = 1 << 26
    work = Work(request="0", slot=0, start=0, count=1, prompt=1, new_tokens=(1,), logits="none", draws=False)
    made = served.assembler.assemble(Step(works=(work,)), Workspace(out=torch.empty(0)))
    assert made.batch.write_slots[0].tolist() == [1 << 32]
