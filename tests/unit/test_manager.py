import struct
from hashlib import sha256
from typing import Any

import pytest

from omniserve.base.types import PAGE, Kind, PageMoves, Request, SamplingParams
from omniserve.cache.manager import CacheManager
from omniserve.cache.pool import PagePool


def manager(pages: int = 8, prefix_caching: bool = True) -> CacheManager:
    return CacheManager({Kind.RETRIEVAL: PagePool(pages)}, prefix_caching=prefix_caching)


def request(tokens: list[int], **fields: Any) -> Request:
    return Request(id="r", tokens=list(tokens), prompt=len(tokens), sampling=SamplingParams(), **fields)


def start(cache: CacheManager, one: Request, slot: int) -> int | None:
    """What the scheduler does when a request takes a slot."""
    found = cache.start(one, slot)
    if found is not None:
        one.slot, one.issued, one.computed = slot, found, found
    return found


def compute(cache: CacheManager, one: Request, count: int) -> None:
    """Reserve, issue and land `count` tokens."""
    assert cache.reserve(one, count)
    one.issued += count
    one.computed += count
    cache.commit(one)


def end(cache: CacheManager, one: Request) -> None:
    cache.release(one)
    one.slot = None


def serve(cache: CacheManager, tokens: list[int], slot: int = 0, salt: bytes = b"") -> None:
    """Compute a sequence and let it go."""
    one = request(tokens, salt=salt)
    found = start(cache, one, slot)
    assert found is not None
    compute(cache, one, len(tokens) - found)
    end(cache, one)
    cache.check([])


def test_nothing_matches_in_an_empty_cache() -> None:
    assert manager().match(list(range(200))) == 0


@pytest.mark.parametrize(
    ("cached", "asked", "expected"), [(200, 200, 192), (192, 192, 128), (192, 193, 192), (64, 65, 64), (64, 64, 0)]
)
def test_whole_pages_match_and_one_token_stays_outside(cached: int, asked: int, expected: int) -> None:
    cache = manager()
    serve(cache, list(range(cached)))
    assert cache.match(list(range(asked))) == expected


def test_a_match_ends_at_the_first_difference() -> None:
    cache = manager()
    serve(cache, list(range(256)))
    tokens = list(range(256))
    tokens[100] = -1
    assert cache.match(tokens) == 64
    tokens[0] = -1
    assert cache.match(tokens) == 0


def test_equal_pages_after_different_prefixes_are_different() -> None:
    cache = manager()
    serve(cache, [1] * 64 + [7] * 64)
    serve(cache, [2] * 64)
    assert cache.match([2] * 64 + [7] * 64 + [0]) == 64


def test_a_salt_separates() -> None:
    cache = manager()
    serve(cache, list(range(128)), salt=b"alice")
    assert cache.match(list(range(128)), b"alice") == 64
    assert cache.match(list(range(128)), b"bob") == 0
    assert cache.match(list(range(128))) == 0


def test_hashes_are_sha256_over_parent_and_tokens() -> None:
    cache = manager()
    tokens = list(range(1000, 1128))
    serve(cache, tokens, salt=b"salt")
    first = sha256(sha256(sha256(b"salt").digest()).digest() + struct.pack("64q", *tokens[:64])).digest()
    second = sha256(first + struct.pack("64q", *tokens[64:])).digest()
    pool = cache.pools[Kind.RETRIEVAL]
    assert pool.find(first) is not None
    assert pool.find(second) is not None
    assert pool.cached == 2


def test_without_prefix_caching_nothing_is_kept() -> None:
    cache = manager(prefix_caching=False)
    serve(cache, list(range(128)))
    assert cache.match(list(range(128))) == 0
    assert cache.pools[Kind.RETRIEVAL].free == 8


def test_tables_grow_by_pages() -> None:
    cache = manager()
    one = request(list(range(130)))
    assert start(cache, one, 3) == 0
    assert cache.moves() == (PageMoves(),)
    for count, pages in ((64, 1), (1, 1), (65, 1)):
        compute(cache, one, count)
        (moves,) = cache.moves()
        assert [cell[0] for cell in moves.appended] == [3] * pages
        cache.check([one])
    compute(cache, one, 10)
    assert cache.moves() == (PageMoves(),)
    end(cache, one)
    (moves,) = cache.moves()
    assert sorted(moves.freed) == [(3, 0), (3, 1), (3, 2)]


def test_no_room_changes_nothing() -> None:
    cache = manager(pages=3)
    one, other = request(list(range(64))), request(list(range(500, 564)))
    start(cache, one, 0)
    compute(cache, one, 64)
    start(cache, other, 1)
    compute(cache, other, 64)
    cache.moves()
    assert not cache.reserve(one, 65)
    cache.check([one, other])
    assert cache.moves() == (PageMoves(),)
    assert cache.reserve(one, 64)


def test_a_request_starts_only_where_all_of_it_fits() -> None:
    cache = manager(pages=4)
    one = request(list(range(100)))
    start(cache, one, 0)
    compute(cache, one, 100)
    big = request(list(range(500, 700)))
    assert start(cache, big, 1) is None
    assert start(cache, request(list(range(500, 628))), 1) == 0


def test_a_prefix_hit_shares_pages_and_tells_the_device() -> None:
    cache = manager()
    one = request(list(range(200)))
    start(cache, one, 0)
    compute(cache, one, 200)
    (first,) = cache.moves()
    other = request([*range(128), 7, 7])
    assert start(cache, other, 1) == 128
    (second,) = cache.moves()
    assert [cell[1:] for cell in second.appended] == [cell[1:] for cell in first.appended[:2]]
    cache.check([one, other])
    compute(cache, other, 2)
    assert cache.pools[Kind.RETRIEVAL].held == 5
    end(cache, one)
    cache.check([other])
    end(cache, other)
    cache.check([])


def test_cached_pages_of_a_hit_do_not_count_as_room() -> None:
    cache = manager(pages=3)
    serve(cache, list(range(128)))  # two cached pages, one free
    assert start(cache, request([*range(128), *range(100)]), 0) is None
    assert cache.pools[Kind.RETRIEVAL].cached == 2
    assert start(cache, request([*range(128), *range(64)]), 0) == 128


def test_logits_of_the_prompt_forbid_a_hit() -> None:
    cache = manager()
    serve(cache, list(range(128)))
    assert start(cache, request(list(range(128)), reduce=lambda positions, logits: None), 0) == 0


def test_the_same_content_twice_is_registered_once() -> None:
    cache = manager()
    one, other = request(list(range(100))), request(list(range(100)))
    start(cache, one, 0)
    start(cache, other, 1)
    compute(cache, one, 100)
    compute(cache, other, 100)
    cache.check([one, other])
    end(cache, other)
    assert cache.pools[Kind.RETRIEVAL].cached == 0
    end(cache, one)
    assert cache.pools[Kind.RETRIEVAL].cached == 1
    cache.check([])


def test_a_full_page_is_found_when_it_has_landed() -> None:
    cache = manager()
    one = request(list(range(65)))
    start(cache, one, 0)
    assert cache.reserve(one, 64)
    one.issued = 64
    cache.commit(one)
    assert cache.match(one.tokens) == 0
    one.computed = 64
    cache.commit(one)
    assert cache.match(one.tokens) == 64


def test_a_cell_is_told_once_with_its_last_value() -> None:
    cache = manager()
    one, other = request(list(range(100))), request(list(range(500, 550)))
    start(cache, one, 0)
    compute(cache, one, 100)
    end(cache, one)
    start(cache, other, 0)
    compute(cache, other, 50)
    (moves,) = cache.moves()
    assert [cell[:2] for cell in moves.appended] == [(0, 0)]
    assert moves.freed == ((0, 1),)


def test_a_prefix_loses_its_tail_first() -> None:
    cache = manager(pages=4)
    serve(cache, list(range(256)))
    matches = []
    for slot in range(4):
        one = request([9000 + slot] * 64)
        start(cache, one, slot)
        compute(cache, one, 64)
        matches.append(cache.match(list(range(257))))
    assert matches == [192, 128, 64, 0]


def test_nothing_is_remembered_of_what_has_ended() -> None:
    cache = manager(pages=2)
    serve(cache, list(range(100)))
    one = request(list(range(200)))
    assert start(cache, one, 0) is None
    cache.release(one)
    assert cache._chains == {}


def test_release_of_a_request_that_holds_nothing() -> None:
    cache = manager()
    cache.release(request([1]))
    cache.check([])


def test_kinds_move_together() -> None:
    pools = {Kind.RETRIEVAL: PagePool(8), Kind.STREAMING: PagePool(3)}
    cache = CacheManager(pools, prefix_caching=True)
    assert cache.capacity == 3 * PAGE
    serve(cache, list(range(192)))
    assert len(cache.moves()) == 2
    assert cache.match(list(range(192))) == 128
    one = request(list(range(500, 600)))
    start(cache, one, 0)
    compute(cache, one, 100)  # evicts the streaming tail
    assert cache.match(list(range(192))) == 64
    assert not cache.reserve(one, 64 * 2)
    cache.check([one])


def test_writing_into_a_shared_page_is_refused() -> None:
    cache = manager()
    one = request(list(range(100)))
    start(cache, one, 0)
    compute(cache, one, 100)
    one.issued = one.computed = 0
    with pytest.raises(AssertionError):
        cache.reserve(one, 10)


def test_check_finds_a_lost_page() -> None:
    cache = manager()
    one = request(list(range(100)))
    start(cache, one, 0)
    compute(cache, one, 100)
    with pytest.raises(AssertionError):
        cache.check([])
    cache.pools[Kind.RETRIEVAL].allocate(1)
    with pytest.raises(AssertionError):
        cache.check([one])
