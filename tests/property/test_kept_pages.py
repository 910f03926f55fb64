"""CacheManager with a kind that gives pages up, beside the bytes: what a query to come may read is there, and right."""

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from omniserve.base.types import PAGE, Kind, Request, SamplingParams
from omniserve.cache.keep import KeepRule
from omniserve.cache.manager import CacheManager
from omniserve.cache.pool import PagePool

SLOTS = 3
KINDS = (Kind.RETRIEVAL, Kind.STREAMING)


class KeptPages(RuleBasedStateMachine):
    """Both kinds' pages as positions written, by the page tables that the moves describe.

    A position's content names the tokens up to it and whether it was written as a prompt or as a produced position.
    """

    @initialize(
        pages=st.integers(8, 14),
        windows=st.integers(6, 16),
        sink=st.integers(0, 130),
        prompt_local=st.integers(1, 150),
        local=st.integers(1, 150),
        unlanded=st.integers(64, 200),
    )
    def begin(self, pages: int, windows: int, sink: int, prompt_local: int, local: int, unlanded: int) -> None:
        self.keep = KeepRule(sink=sink, prompt_local=prompt_local, local=local)
        self.unlanded = unlanded
        self.pools = {Kind.RETRIEVAL: PagePool(pages), Kind.STREAMING: PagePool(windows)}
        self.cache = CacheManager(
            self.pools,
            prefix_caching=True,
            keeps={Kind.STREAMING: self.keep},
            unlanded=unlanded,
            by_position=True,
        )
        self.store: dict[tuple[Kind, int, int], tuple[bool, tuple[int, ...]]] = {}
        self.tables: dict[Kind, dict[tuple[int, int], int]] = {kind: {} for kind in KINDS}
        self.requests: dict[int, Request] = {}

    def follow(self) -> None:
        for kind, moves in zip(KINDS, self.cache.moves(), strict=True):
            for slot, logical, page in moves.appended:
                self.tables[kind][slot, logical] = page
            for cell in moves.freed:
                self.tables[kind].pop(cell, None)

    @precondition(lambda self: len(self.requests) < SLOTS)
    @rule(prompt=st.integers(1, 250), tail=st.sampled_from([0, 0, 0, 1, 30]), produced=st.integers(0, 80))
    def start(self, prompt: int, tail: int, produced: int) -> None:
        """A request, perhaps a resumed one that knows produced tokens already, perhaps the next turn of another."""
        tokens = list(range(prompt)) + [5000 + tail] * tail
        prompt = len(tokens)
        tokens += range(prompt, prompt + produced)
        one = Request(id="", tokens=tokens, prompt=prompt, sampling=SamplingParams(), limit=100)
        slot = next(slot for slot in range(SLOTS) if slot not in self.requests)
        before = [(pool.free, pool.held, pool.cached) for pool in self.pools.values()]
        found = self.cache.start(one, slot)
        if found is None:
            assert [(pool.free, pool.held, pool.cached) for pool in self.pools.values()] == before
            return
        assert found % PAGE == 0
        assert found <= prompt
        assert found < len(tokens)
        one.slot, one.issued, one.computed = slot, found, found
        self.requests[slot] = one
        self.follow()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), count=st.integers(1, 200), more=st.integers(0, 40))
    def compute(self, data: st.DataObject, count: int, more: int) -> None:
        one = data.draw(st.sampled_from(list(self.requests.values())))
        room = one.prompt + one.limit - len(one.tokens)
        one.tokens += [len(one.tokens) + i for i in range(min(more, room))] if one.computed >= one.prompt else []
        count = min(count, one.remaining, self.unlanded)
        if count == 0:
            return
        wanted = -(-(one.issued + count) // PAGE) - -(-one.issued // PAGE)
        if not self.cache.reserve(one, count):
            assert self.pools[Kind.RETRIEVAL].available < wanted, "nobody waits for windows"
            return
        self.follow()
        for kind in KINDS:
            for position in range(one.issued, one.issued + count):
                page = self.tables[kind][one.slot or 0, position // PAGE]
                assert self.pools[kind].writable(page)
                content = (position < one.prompt, tuple(one.tokens[: position + 1]))
                self.store[kind, page, position % PAGE] = content
        one.issued += count
        one.computed += count
        self.cache.commit(one)
        self.follow()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(list(self.requests)))
        self.cache.release(self.requests.pop(slot))
        self.follow()

    @invariant()
    def what_is_visible_is_there(self) -> None:
        self.cache.check(self.requests.values())
        for one in self.requests.values():
            local = self.keep.prompt_local if one.computed < one.prompt else self.keep.local
            for kind in KINDS:
                for position in range(one.computed):
                    seen = position < self.keep.sink or position > one.computed - local
                    if kind is Kind.RETRIEVAL or seen:
                        page = self.tables[kind][one.slot or 0, position // PAGE]
                        wanted = (position < one.prompt, tuple(one.tokens[: position + 1]))
                        assert self.store[kind, page, position % PAGE] == wanted, (kind, position)


def test_kept_pages() -> None:
    run_state_machine_as_test(KeptPages)
