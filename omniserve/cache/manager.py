"""Which pages each running request holds, and which prefixes can be reused. Plain Python: no torch here."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from omniserve.base.config import TILE
from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE, Kind, PageMoves, Request
from omniserve.cache.keep import KeepRule
from omniserve.cache.pool import PagePool

_GONE = -1


@dataclass(slots=True)
class _Table:
    """Physical pages of one request by logical page, per kind; -1 for a page that was freed.

    hashed  leading pages that have been offered for reuse
    freed   per kind, the logical page after the last one that was freed
    """

    pages: tuple[list[int], ...]
    hashed: int
    freed: list[int]


class CacheManager:
    """Page tables of the running requests, by slot, over one PagePool per kind of heads.

    Invariant: a page's reference count is the number of tables that list it. Between two plans a table covers exactly
    the issued tokens of its request, less the pages that its keep rule gave up; its shared pages lie wholly below the
    issued tokens, so they are never written.

    Page tables on the device follow by `moves`: cells (slot, logical page) that changed since the last step.
    """

    def __init__(
        self,
        pools: Mapping[Kind, PagePool],
        *,
        prefix_caching: bool,
        keeps: Mapping[Kind, KeepRule] | None = None,
        unlanded: int = 0,
        by_position: bool = False,
        tiles_from: int | None = None,
    ) -> None:
        """Manage pools.

        keeps        kinds whose pages are given up when no future query can see them; the others keep all
        unlanded     with keep rules: tokens that may be issued before the first of them lands
        by_position  produced positions are computed by another rule than those of a prompt: only pages that a prompt
                     filled are reused, and only as a prompt
        tiles_from   prompt positions from here on choose their pages by tiles of 128 queries: what is reused ends at a
                     tile, since an incomplete tile chose with some of its queries alone
        """
        assert pools
        assert not keeps or unlanded >= 1, unlanded
        self.pools = dict(pools)
        self.prefix_caching = prefix_caching
        self._pools = tuple(self.pools.values())
        self._keeps = tuple((keeps or {}).get(kind) for kind in self.pools)
        self._keeping = any(keep is not None for keep in self._keeps)
        self._unlanded = unlanded
        self._by_position = by_position
        self._tiles_from = tiles_from
        self._tables: dict[int, _Table] = {}
        self._owners: dict[int, Request] = {}
        self._chains: dict[Request, list[bytes]] = {}
        self._moves: tuple[dict[tuple[int, int], int], ...] = tuple({} for _ in self._pools)

    @property
    def capacity(self) -> int:
        """Tokens that a request can have when it is alone."""
        return min(self._holds(pool, keep) for pool, keep in zip(self._pools, self._keeps, strict=True))

    def _holds(self, pool: PagePool, keep: KeepRule | None) -> int:
        """Tokens that a request alone can have in a pool: any number where the pool holds its window."""
        endless = 1 << 48
        if keep is not None:
            most = keep.most(prompt=endless, total=endless, known=endless, computed=0, unlanded=self._unlanded)
            if most <= pool.total:
                return endless
        return pool.total * PAGE

    def match(self, tokens: Sequence[int], salt: bytes = b"") -> int:
        """Return how many leading tokens of a prompt lie in cached pages: a multiple of 64.

        At least one token stays outside, so that there is something to run.
        """
        pages = self._reusable(len(tokens), len(tokens))
        return len(self._longest(_chain(tokens, salt, pages, []), len(tokens))[0]) * PAGE

    def start(self, request: Request, slot: int) -> int | None:
        """Give a request a slot's table that begins with its longest cached prefix, and return that prefix' tokens.

        None, and nothing changed, unless all tokens of the request find room now: what is begun should not have to stop
        half way, and what was just preempted does not come back before there is more room than it had. Of a kind that
        gives pages up, the most that all running requests can ever hold must fit, so nobody is preempted for them. A
        request whose logits are wanted (`reduce`) starts at 0.
        """
        assert slot not in self._tables, slot
        pages: tuple[list[int], ...] = tuple([] for _ in self._pools)
        if request.reduce is None:
            memo = self._chains.setdefault(request, [])
            reusable = self._reusable(len(request.tokens), request.prompt)
            pages = self._longest(_chain(request.tokens, request.salt, reusable, memo), request.prompt)
        found = len(pages[0])
        for pool, keep, shared in zip(self._pools, self._keeps, pages, strict=True):
            if keep is not None and not self._fits(pool, keep, request, found * PAGE):
                return None
            idle = sum(page != _GONE and pool.references(page) == 0 for page in shared)
            missing = ceil_div(len(request.tokens), PAGE) - found if keep is None else 0
            if pool.available - idle < missing:
                return None
        for pool, shared, moves in zip(self._pools, pages, self._moves, strict=True):
            for logical, page in enumerate(shared):
                if page != _GONE:
                    pool.share(page)
                    moves[slot, logical] = page
        freed = [0 if keep is None else keep.dead(found * PAGE, request.prompt).stop for keep in self._keeps]
        self._tables[slot] = _Table(pages=pages, hashed=found, freed=freed)
        self._owners[slot] = request
        return found * PAGE

    def _fits(self, pool: PagePool, keep: KeepRule, request: Request, found: int) -> bool:
        """Whether the most that this request and the running ones can hold fits into a pool."""
        most = self._most(keep, request, found)
        return most + sum(self._most(keep, one, one.computed) for one in self._owners.values()) <= pool.total

    def _most(self, keep: KeepRule, request: Request, computed: int) -> int:
        return keep.most(
            prompt=request.prompt,
            total=request.prompt + request.limit,
            known=request.known,
            computed=computed,
            unlanded=self._unlanded,
        )

    def _reusable(self, tokens: int, prompt: int) -> int:
        """Full pages that may be reused, of a sequence's tokens; one token at least stays outside."""
        return self._rounded(min(tokens - 1, prompt) if self._by_position else tokens - 1)

    def _rounded(self, tokens: int) -> int:
        """Full pages among the leading tokens, beyond `tiles_from` full tiles of pages."""
        pages = tokens // PAGE
        if self._tiles_from is not None and pages * PAGE > self._tiles_from:
            pages = max(tokens // TILE * TILE, self._tiles_from // PAGE * PAGE) // PAGE
        return pages

    def _longest(self, chain: Iterable[bytes], prompt: int) -> tuple[list[int], ...]:
        """Return per kind the pages of the longest prefix that every pool still has, or no longer needs (-1)."""
        found: list[list[int]] = [[] for _ in self._pools]
        if not self.prefix_caching:
            return tuple(found)
        for content in chain:
            row = [pool.find(content) for pool in self._pools]
            if any(page is None and keep is None for page, keep in zip(row, self._keeps, strict=True)):
                break
            for pages, page in zip(found, row, strict=True):
                pages.append(_GONE if page is None else page)
        usable = (self._usable(pages, keep, prompt) for pages, keep in zip(found, self._keeps, strict=True))
        length = max(set.intersection(*usable), default=0)
        for pages, keep in zip(found, self._keeps, strict=True):
            del pages[length:]
            if keep is not None:
                dead = keep.dead(length * PAGE, prompt)
                pages[dead.start : dead.stop] = [_GONE] * len(range(length)[dead.start : dead.stop])
        return tuple(found)

    def _usable(self, pages: list[int], keep: KeepRule | None, prompt: int) -> set[int]:
        """Return the lengths, in pages, at which no page that is missing is still needed."""
        lengths: set[int] = set()
        missing = [logical for logical, page in enumerate(pages) if page == _GONE]
        last = _GONE  # the last missing page below a length
        following = iter([*missing, len(pages)])
        upcoming = next(following)
        for length in range(1, len(pages) + 1):
            if length > upcoming:
                last, upcoming = upcoming, next(following)
            if self._rounded(length * PAGE) != length:
                continue
            if last == _GONE:
                lengths.add(length)
            elif keep is not None:
                dead = keep.dead(length * PAGE, prompt)
                if missing[0] >= dead.start and last < dead.stop:
                    lengths.add(length)
        return lengths

    def reserve(self, request: Request, count: int) -> bool:
        """Give a started request pages for `count` tokens after its issued ones; False: no room, nothing changed."""
        assert request.slot is not None, request.id
        if count == 1 and request.issued % PAGE:  # the page of the position before
            return True
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
        """Offer the full pages among a request's computed tokens for reuse, then give up those that no query can see.

        Where another page has the same content already, that one stays the one to be found. A page that was offered is
        found until its memory is needed.
        """
        assert request.slot is not None, request.id
        table = self._tables[request.slot]
        self._offer(request, table)
        if not self._keeping:
            return
        for kind, (pool, keep, held) in enumerate(zip(self._pools, self._keeps, table.pages, strict=True)):
            if keep is None:
                continue
            dead = keep.dead(request.computed, request.prompt)
            for logical in range(max(table.freed[kind], dead.start), dead.stop):
                pool.release(held[logical])
                held[logical] = _GONE
                self._moves[kind][request.slot, logical] = _GONE
            table.freed[kind] = max(table.freed[kind], dead.stop)

    def _offer(self, request: Request, table: _Table) -> None:
        full = request.computed // PAGE
        if self._by_position:
            full = self._rounded(min(request.computed, request.prompt))
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
        del self._owners[request.slot]
        for pool, held, moves in zip(self._pools, table.pages, self._moves, strict=True):
            for logical in range(len(held) - 1, -1, -1):
                if held[logical] != _GONE:
                    pool.release(held[logical])
                    moves[request.slot, logical] = _GONE

    def forget(self) -> None:
        """Drop every cached prefix: what the pages hold is not known any more."""
        for pool in self._pools:
            pool.forget()

    def holdings(self) -> list[dict[Kind, int]]:
        """Return how many pages of each kind each running request holds."""
        return [
            {kind: len(pages) - pages.count(_GONE) for kind, pages in zip(self.pools, table.pages, strict=True)}
            for table in self._tables.values()
        ]

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
            tables = self._tables.values()
            listed = Counter(page for table in tables for page in table.pages[kind] if page != _GONE)
            assert len(listed) == pool.held, (listed, pool.held)
            for page, count in listed.items():
                assert pool.references(page) == count, (page, pool.references(page), count)
            for slot, table in self._tables.items():
                held = table.pages[kind]
                assert len(held) == ceil_div(issued[slot], PAGE), (slot, held, issued[slot])
                self._check_kept(kind, slot, held)

    def _check_kept(self, kind: int, slot: int, held: list[int]) -> None:
        """Assert that exactly the pages are gone which no query can see, and that the others are within their bound."""
        gone = {logical for logical, page in enumerate(held) if page == _GONE}
        keep, request = self._keeps[kind], self._owners[slot]
        dead = set() if keep is None else set(keep.dead(request.computed, request.prompt))
        assert gone == dead, (kind, slot, gone, dead)
        if keep is not None:
            assert len(held) - len(gone) <= self._most(keep, request, request.computed), (kind, slot, held)


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
