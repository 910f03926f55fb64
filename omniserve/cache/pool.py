"""Pages of one kind of heads: who holds them, how they are found again, which one is handed out next.

Plain Python: no torch here. A page is a number; its bytes live in `cache/store.py`.
"""

from collections import OrderedDict

FREE, CACHED, HELD, SHARED = range(4)
"""States of a page, for whoever draws a map: see PagePool; shared is held more than once."""


class PagePool:
    """Reference counts, content hashes and the order of eviction of the pages 0 .. total - 1.

    Invariant: free + held + cached == total at every return. A page is held while its reference count is above 0;
    cached while nobody holds it but its hash still finds it; free when it holds nothing that could be found. Only held
    and cached pages have a hash, and a hash names one page.

    Free pages are handed out first, then the cached page that was released longest ago, which loses its hash. Whoever
    releases a sequence does so from its last page to its first, so that a prefix loses its tail before its head.
    """

    def __init__(self, pages: int) -> None:
        assert pages >= 1, pages
        self.total = pages
        self._free = list(range(pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._held = 0
        self._states = bytearray(pages)
        self._references = [0] * pages
        self._hashes: list[bytes | None] = [None] * pages
        self._found: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Pages without findable content."""
        return len(self._free)

    @property
    def held(self) -> int:
        """Pages that somebody holds."""
        return self._held

    @property
    def cached(self) -> int:
        """Pages that nobody holds and that are found by their hash."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def states(self) -> bytes:
        """FREE, CACHED, HELD or SHARED of each page, up to the last one that is not free."""
        return bytes(self._states).rstrip(b"\0")

    def references(self, page: int) -> int:
        """Return how many holders a page has."""
        return self._references[page]

    def writable(self, page: int) -> bool:
        """Return whether a page has one holder and no hash, so that no other sequence can read it."""
        return self._references[page] == 1 and self._hashes[page] is None

    def allocate(self, count: int) -> list[int] | None:
        """Return `count` pages, held once and without a hash; None if there are not so many, and nothing changed."""
        if count > self.available:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        self._references[page] = 1
        self._states[page] = HELD
        self._held += 1
        return page

    def share(self, page: int) -> None:
        """Add a holder to a held or cached page."""
        if self._references[page] == 0:
            del self._cached[page]
            self._held += 1
        self._references[page] += 1
        self._states[page] = HELD if self._references[page] == 1 else SHARED

    def release(self, page: int) -> None:
        """Take a holder from a page; without holders it becomes cached if it has a hash, else free."""
        assert self._references[page] > 0, page
        self._references[page] -= 1
        if self._references[page]:
            self._states[page] = HELD if self._references[page] == 1 else SHARED
            return
        self._held -= 1
        if self._hashes[page] is None:
            self._free.append(page)
            self._states[page] = FREE
        else:
            self._cached[page] = None
            self._states[page] = CACHED

    def find(self, content: bytes) -> int | None:
        """Return the page that a content hash names."""
        return self._found.get(content)

    def set_hash(self, page: int, content: bytes) -> bool:
        """Make a held page findable; False, and nothing changed, if another page has that content already."""
        assert self._references[page] > 0 and self._hashes[page] is None, page
        if content in self._found:
            return False
        self._hashes[page] = content
        self._found[content] = page
        return True

    def forget(self) -> None:
        """Drop every hash: cached pages become free, held ones stay held."""
        for page in list(self._found.values()):
            self._forget(page)
        self._free += self._cached
        for page in self._cached:
            self._states[page] = FREE
        self._cached.clear()

    def _forget(self, page: int) -> None:
        content = self._hashes[page]
        assert content is not None, page
        del self._found[content]
        self._hashes[page] = None

    def check(self) -> None:
        """Assert the invariant, page by page."""
        assert self.free + self.held + self.cached == self.total, (self.free, self.held, self.cached, self.total)
        free, cached = set(self._free), set(self._cached)
        held = {page for page, count in enumerate(self._references) if count > 0}
        assert len(free) == self.free and len(held) == self.held, (free, held)
        assert free | cached | held == set(range(self.total)), (free, cached, held)
        assert min(self._references) >= 0, self._references
        words = dict.fromkeys(cached, CACHED) | dict.fromkeys(held, HELD)
        words |= {page: SHARED for page in held if self._references[page] > 1}
        assert self._states == bytes(words.get(page, FREE) for page in range(self.total)), self._states
        hashed = {page: content for page, content in enumerate(self._hashes) if content is not None}
        assert {page: content for content, page in self._found.items()} == hashed, (self._found, hashed)
        assert cached <= hashed.keys() <= cached | held, (cached, held, hashed)
