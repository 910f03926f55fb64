"""Which pages each running request holds, and which prefixes can be reused. Plain Python: no torch here."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE, Kind, PageMoves, Request
from omniserve.cache.pool import PagePool

_GONE = -1


@dataclass(slots=True)
class _Table:
    """Physical pages of one request by logical page, per kind; the first `hashed` have been offered for reuse."""

    pages: tuple[list[int], ...]
    hashed: int


class CacheManager:
    """Page tables of the running requests, by slot, over one PagePool per kind of heads.

    Invariant: a page's reference count is the number of tables that list it. Between two plans a table covers exactly
    the issued tokens of its request; its shared pages lie wholly below them, so they are never written.

    Page tables on the device follow by `moves`: cells (slot, logical page) that changed since the last step.
    """

    def __init__(self, pools: Mapping[Kind, PagePool], *, prefix_caching: bool) -> None:
        assert pools
        self.pools = dict(pools)
        self.prefix_caching = prefix_caching
        self._pools = tuple(self.pools.values())
        self._tables: dict[int, _Table] = {}
        self._chains: dict[Request, list[bytes]] = {}
        self._moves: tuple[dict[tuple[int, int], int], ...] = tuple({} for _ in self._pools)

    @property
    def capacity(self) -> int:
        """Tokens that a request can have when it is alone."""
        return min(pool.total for pool in self._pools) * PAGE

    def match(self, tokens: Sequence[int], salt: bytes = b"") -> int:
        """Return how many leading tokens lie in cached pages: a multiple of 64.

        At least one token stays outside, so that there is something to run.
        """
        return len(self._longest(_chain(tokens, salt, _shareable(tokens), []))) * PAGE

    def start(self, request: Request, slot: int) -> int | None:
        """Give a request a slot's table that begins with its longest cached prefix, and return that prefix' tokens.

        None, and nothing changed, unless all tokens of the request find room now: what is begun should not have to stop
        half way, and what was just preempted does not come back before there is more room than it had. A request whose
        logits are wanted (`reduce`) starts at 0.
        """
        assert slot not in self._tables, slot
        found: list[tuple[int, ...]] = []
        if request.reduce is None:
            memo = self._chains.setdefault(request, [])
            found = self._longest(_chain(request.tokens, request.salt, _shareable(request.tokens), memo))
        pages = tuple([page[kind] for page in found] for kind in range(len(self._pools)))
        missing = ceil_div(len(request.tokens), PAGE) - len(found)
        for pool, shared in zip(self._pools, pages, strict=True):
            idle = sum(pool.references(page) == 0 for page in shared)
            if pool.available - idle < missing:
                return None
        for pool, shared, moves in zip(self._pools, pages, self._moves, strict=True):
            for logical, page in enumerate(shared):
                pool.share(page)
                moves[slot, logical] = page
        self._tables[slot] = _Table(pages=pages, hashed=len(found))
        return len(found) * PAGE

    def _longest(self, chain: Iterable[bytes]) -> list[tuple[int, ...]]:
        """The leading pages of a chain of hashes that every pool still has."""
        found: list[tuple[int, ...]] = []
        if not self.prefix_caching:
            return found
        for content in chain:
            pages = tuple(page for pool in self._pools if (page := pool.find(content)) is not None)
            if len(pages) < len(self._pools):
                break
            found.append(pages)
        return found

    def reserve(self, request: Request, count: int) -> bool:
        """Give a started request pages for `count` tokens after its issued ones; False: no room, nothing changed."""
        assert request.slot is not None, request.id
        table = self._tables[request.slot]
        wanted = ceil_div(request.issued + count, PAGE)
        if any(pool.available < wanted - len(held) for pool, held in zip(self._pools, table.pages, strict=True)):
            return False
        for pool, held, moves in zip(self._pools, table.pages, self._moves, strict=True):
            fresh = pool.allocate(max(wanted - len(held), 0))
            assert fresh is not None
            for page in fresh:
                moves[request.slot, len(held)] = page
                held.append(page)
            assert all(pool.writable(page) for page in held[request.issued // PAGE : wanted]), (request.id, held)
        return True

    def commit(self, request: Request) -> None:
        """Offer the full pages among a request's computed tokens for reuse.

        Where another page has the same content already, that one stays the one to be found.
        """
        assert request.slot is not None, request.id
        table = self._tables[request.slot]
        full = request.computed // PAGE
        if not self.prefix_caching or full <= table.hashed:
            return
        memo = self._chains.setdefault(request, [])
        chain = list(_chain(request.tokens, request.salt, full, memo))
        for pool, held in zip(self._pools, table.pages, strict=True):
            for logical in range(table.hashed, full):
                pool.set_hash(held[logical], chain[logical])
        table.hashed = full

    def release(self, request: Request) -> None:
        """Take back everything that a request holds; nothing happens if it holds nothing."""
        self._chains.pop(request, None)
        if request.slot is None:
            return
        table = self._tables.pop(request.slot)
        for pool, held, moves in zip(self._pools, table.pages, self._moves, strict=True):
            for logical in range(len(held) - 1, -1, -1):
                pool.release(held[logical])
                moves[request.slot, logical] = _GONE

    def forget(self) -> None:
        """Drop every cached prefix: what the pages hold is not known any more."""
        for pool in self._pools:
            pool.forget()

    def holdings(self) -> list[int]:
        """Return how many pages each running request holds, of all kinds together."""
        return [sum(map(len, table.pages)) for table in self._tables.values()]

    def moves(self) -> tuple[PageMoves, ...]:
        """Return, per kind, the cells of the page tables that changed since the last call, each at most once."""
        drained = tuple(
            PageMoves(
                appended=tuple((slot, logical, page) for (slot, logical), page in moves.items() if page != _GONE),
                freed=tuple(cell for cell, page in moves.items() if page == _GONE),
            )
            for moves in self._moves
        )
        for moves in self._moves:
            moves.clear()
        return drained

    def check(self, requests: Iterable[Request]) -> None:
        """Assert the invariants of pools and tables; `requests` are all that hold a slot."""
        issued = {request.slot: request.issued for request in requests}
        assert issued.keys() == self._tables.keys(), (issued.keys(), self._tables.keys())
        for kind, pool in enumerate(self._pools):
            pool.check()
            listed = Counter(page for table in self._tables.values() for page in table.pages[kind])
            assert len(listed) == pool.held, (listed, pool.held)
            for page, count in listed.items():
                assert pool.references(page) == count, (page, pool.references(page), count)
            for slot, table in self._tables.items():
                held = table.pages[kind]
                assert len(held) == ceil_div(issued[slot], PAGE), (slot, held, issued[slot])


def _shareable(tokens: Sequence[int]) -> int:
    """Full pages that leave at least one token outside."""
    return (len(tokens) - 1) // PAGE


def _chain(tokens: Sequence[int], salt: bytes, pages: int, memo: list[bytes]) -> Iterator[bytes]:
    """Yield the hashes of the first `pages` pages of a sequence; `memo` keeps those already computed.

    A page's hash is SHA-256 over its parent's and its 64 token ids (int64), so it names the whole prefix. The first
    parent is the salt, hashed twice: no salt can pass for a page, whose hash is taken over more bytes.
    """
    for page in range(pages):
        if page == len(memo):
            parent = memo[-1] if memo else sha256(sha256(salt).digest()).digest()
            memo.append(sha256(parent + array("q", tokens[page * PAGE : (page + 1) * PAGE]).tobytes()).digest())
        yield memo[page]
