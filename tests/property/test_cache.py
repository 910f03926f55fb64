"""Pages are never lost, never shared while written, and found again only with the content they were named after."""

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from omniserve.base.types import PAGE, Kind, Request, SamplingParams
from omniserve.cache.manager import CacheManager
from omniserve.cache.pool import PagePool


class PoolAgainstLists(RuleBasedStateMachine):
    """PagePool beside the same thing written with plain lists."""

    pages: Bundle[int] = Bundle("pages")

    @initialize(total=st.integers(1, 8))
    def begin(self, total: int) -> None:
        self.pool = PagePool(total)
        self.holders = dict.fromkeys(range(total), 0)
        self.contents: dict[int, bytes] = {}
        self.released: list[int] = []  # without holders, with content; the longest ago first

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        free = [p for p, n in self.holders.items() if n == 0 and p not in self.contents]
        pages = self.pool.allocate(count)
        if count > len(free) + len(self.released):
            assert pages is None
            return
        assert pages is not None
        assert len(set(pages)) == count
        evicted = self.released[: max(count - len(free), 0)]
        assert set(pages) - set(free) == set(evicted)
        del self.released[: len(evicted)]
        for page in pages:
            self.contents.pop(page, None)
            self.holders[page] = 1

    def held(self) -> list[int]:
        return [page for page, count in self.holders.items() if count]

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.held()))
        self.pool.release(page)
        self.holders[page] -= 1
        if self.holders[page] == 0 and page in self.contents:
            self.released.append(page)

    @precondition(lambda self: self.held() or self.released)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.held() + self.released))
        self.pool.share(page)
        if page in self.released:
            self.released.remove(page)
        self.holders[page] += 1

    @precondition(lambda self: not self.contents.keys() >= set(self.held()))
    @rule(data=st.data(), content=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def name(self, data: st.DataObject, content: bytes) -> None:
        page = data.draw(st.sampled_from(sorted(set(self.held()) - set(self.contents))))
        fresh = content not in self.contents.values()
        assert self.pool.set_hash(page, content) is fresh
        if fresh:
            self.contents[page] = content

    @rule(contents=st.permutations([b"a", b"b", b"c", b"d"]), count=st.integers(1, 4))
    def retire(self, contents: list[bytes], count: int) -> None:
        """A sequence comes, is named and goes."""
        free = [p for p, n in self.holders.items() if n == 0 and p not in self.contents]
        for content in [c for c in contents if c not in self.contents.values()][: min(count, len(free))]:
            (page,) = self.pool.allocate(1) or []
            assert self.pool.set_hash(page, content)
            self.pool.release(page)
            self.contents[page] = content
            self.released.append(page)

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.contents.clear()
        self.released.clear()

    @invariant()
    def equal(self) -> None:
        pool = self.pool
        pool.check()
        assert pool.free + pool.held + pool.cached == pool.total
        assert pool.held == len(self.held())
        assert pool.cached == len(self.released)
        for page, count in self.holders.items():
            assert pool.references(page) == count
        names = {content: page for page, content in self.contents.items()}
        for content in (b"a", b"b", b"c", b"d"):
            assert pool.find(content) == names.get(content)


SLOTS = 4
SALTS = (b"", b"salt")


class ManagerWithContents(RuleBasedStateMachine):
    """CacheManager beside the bytes: what stands in each page, and a copy of the device's tables."""

    @initialize(pages=st.integers(4, 10))
    def begin(self, pages: int) -> None:
        self.pool = PagePool(pages)
        self.cache = CacheManager({Kind.RETRIEVAL: self.pool}, prefix_caching=True)
        self.store: list[dict[int, tuple[bytes, tuple[int, ...]]]] = [{} for _ in range(pages)]
        self.table: dict[tuple[int, int], int] = {}
        self.requests: dict[int, Request] = {}

    @precondition(lambda self: len(self.requests) < SLOTS)
    @rule(
        family=st.integers(0, 1),
        shared=st.integers(0, 200),
        tail=st.integers(1, 70),
        mark=st.integers(0, 2),
        salt=st.sampled_from(SALTS),
    )
    def start(self, family: int, shared: int, tail: int, mark: int, salt: bytes) -> None:
        tokens = [family * 1000 + i for i in range(shared)] + [5000 + mark] * tail
        request = Request(id="", tokens=tokens, prompt=len(tokens), sampling=SamplingParams(), salt=salt)
        slot = next(slot for slot in range(SLOTS) if slot not in self.requests)
        matched = self.cache.match(tokens, salt)
        before = (self.pool.free, self.pool.held, self.pool.cached)
        found = self.cache.start(request, slot)
        if found is None:
            assert (self.pool.free, self.pool.held, self.pool.cached) == before
            assert self.pool.available < -(-len(tokens) // PAGE)
            return
        assert found == matched
        assert found % PAGE == 0
        assert found < len(tokens)
        request.slot, request.issued, request.computed = slot, found, found
        self.requests[slot] = request
        self.follow()
        for position in range(found):
            assert self.read(request, position) == (salt, tuple(tokens[: position + 1]))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), count=st.integers(1, 100), produced=st.integers(0, 30))
    def compute(self, data: st.DataObject, count: int, produced: int) -> None:
        request = data.draw(st.sampled_from(list(self.requests.values())))
        request.tokens += range(9000, 9000 + produced)
        count = min(count, request.remaining)
        if count == 0:
            return
        if not self.cache.reserve(request, count):
            needed = -(-(request.issued + count) // PAGE) - -(-request.issued // PAGE)
            assert self.pool.available < needed
            return
        self.follow()
        for position in range(request.issued, request.issued + count):
            page = self.table[request.slot or 0, position // PAGE]
            assert self.pool.writable(page)
            self.store[page][position % PAGE] = (request.salt, tuple(request.tokens[: position + 1]))
        request.issued += count
        request.computed += count
        self.cache.commit(request)
        for position in range(request.computed):
            assert self.read(request, position) == (request.salt, tuple(request.tokens[: position + 1]))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(list(self.requests)))
        request = self.requests.pop(slot)
        self.cache.release(request)
        self.follow()

    def read(self, request: Request, position: int) -> tuple[bytes, tuple[int, ...]]:
        return self.store[self.table[request.slot or 0, position // PAGE]][position % PAGE]

    def follow(self) -> None:
        """Apply the moves, as a rank does."""
        (moves,) = self.cache.moves()
        cells = [cell[:2] for cell in moves.appended] + list(moves.freed)
        assert len(cells) == len(set(cells))
        for slot, logical, page in moves.appended:
            self.table[slot, logical] = page
        for cell in moves.freed:
            self.table.pop(cell, None)

    @invariant()
    def whole(self) -> None:
        self.cache.check(self.requests.values())
        held = {(slot, i) for slot, one in self.requests.items() for i in range(-(-one.issued // PAGE))}
        assert self.table.keys() == held

    def teardown(self) -> None:
        for request in list(getattr(self, "requests", {}).values()):
            self.cache.release(request)
            self.cache.pools[Kind.RETRIEVAL].check()
        if hasattr(self, "pool"):
            assert self.pool.held == 0


def test_pool() -> None:
    run_state_machine_as_test(PoolAgainstLists)


def test_manager() -> None:
    run_state_machine_as_test(ManagerWithContents)
