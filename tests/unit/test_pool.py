import pytest

from omniserve.cache.pool import PagePool


def counts(pool: PagePool) -> tuple[int, int, int]:
    pool.check()
    return pool.free, pool.held, pool.cached


def hold(pool: PagePool, count: int) -> list[int]:
    pages = pool.allocate(count)
    assert pages is not None
    return pages


def cache(pool: PagePool, *contents: bytes) -> list[int]:
    """Pages with these contents that nobody holds, released from the last to the first."""
    pages = hold(pool, len(contents))
    for page, content in zip(pages, contents, strict=True):
        assert pool.set_hash(page, content)
    for page in reversed(pages):
        pool.release(page)
    return pages


def test_pages_are_handed_out_once() -> None:
    pool = PagePool(5)
    first, second = hold(pool, 2), hold(pool, 3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert counts(pool) == (0, 5, 0)


def test_all_or_nothing() -> None:
    pool = PagePool(3)
    hold(pool, 1)
    assert pool.allocate(3) is None
    assert counts(pool) == (2, 1, 0)
    assert pool.allocate(0) == []


def test_a_page_without_hash_becomes_free() -> None:
    pool = PagePool(2)
    (page,) = hold(pool, 1)
    pool.release(page)
    assert counts(pool) == (2, 0, 0)


def test_a_page_with_hash_stays_findable() -> None:
    pool = PagePool(2)
    (page,) = cache(pool, b"a")
    assert counts(pool) == (1, 0, 1)
    assert pool.available == 2
    assert pool.find(b"a") == page
    pool.share(page)
    assert counts(pool) == (1, 1, 0)
    assert pool.references(page) == 1


def test_free_pages_go_before_cached_ones() -> None:
    pool = PagePool(3)
    pages = cache(pool, b"a", b"b")
    assert set(hold(pool, 1)).isdisjoint(pages)
    assert pool.find(b"a") is not None
    assert pool.find(b"b") is not None


def test_the_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    pool = PagePool(3)
    cache(pool, b"head", b"middle", b"tail")
    found = []
    for _ in range(3):
        hold(pool, 1)
        found.append([content for content in (b"head", b"middle", b"tail") if pool.find(content) is not None])
    assert found == [[b"head", b"middle"], [b"head"], []]
    assert counts(pool) == (0, 3, 0)


def test_what_was_used_last_is_evicted_last() -> None:
    pool = PagePool(2)
    old, _ = cache(pool, b"old", b"new")
    pool.share(old)
    pool.release(old)
    hold(pool, 1)
    assert pool.find(b"old") == old
    assert pool.find(b"new") is None


def test_holders_are_counted() -> None:
    pool = PagePool(2)
    (page,) = hold(pool, 1)
    pool.share(page)
    pool.release(page)
    assert counts(pool) == (1, 1, 0)
    pool.release(page)
    assert counts(pool) == (2, 0, 0)


def test_a_content_has_one_page() -> None:
    pool = PagePool(2)
    first, second = hold(pool, 2)
    assert pool.set_hash(first, b"a")
    assert not pool.set_hash(second, b"a")
    assert pool.find(b"a") == first
    pool.release(second)
    assert counts(pool) == (1, 1, 0)


def test_writable_means_alone_and_not_findable() -> None:
    pool = PagePool(2)
    (page,) = hold(pool, 1)
    assert pool.writable(page)
    pool.share(page)
    assert not pool.writable(page)
    pool.release(page)
    pool.set_hash(page, b"a")
    assert not pool.writable(page)


def test_forget_drops_hashes_and_keeps_holders() -> None:
    pool = PagePool(3)
    cache(pool, b"a")
    (held,) = hold(pool, 1)
    pool.set_hash(held, b"b")
    pool.forget()
    assert counts(pool) == (2, 1, 0)
    assert pool.find(b"a") is None
    assert pool.find(b"b") is None


def test_releasing_too_often_is_a_mistake() -> None:
    pool = PagePool(1)
    with pytest.raises(AssertionError):
        pool.release(0)
