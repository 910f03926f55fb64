"""The keep rule against the rule of visibility itself, position by position."""

from hypothesis import given
from hypothesis import strategies as st

from omniserve.base.types import PAGE
from omniserve.cache.keep import KeepRule

rules = st.builds(KeepRule, sink=st.integers(0, 140), prompt_local=st.integers(1, 200), local=st.integers(1, 200))


def visible(rule: KeepRule, prompt: int, key: int, query: int) -> bool:
    local = rule.prompt_local if query < prompt else rule.local
    return key <= query and (key < rule.sink or key > query - local)


@given(rule=rules, next=st.integers(0, 400), prompt=st.integers(1, 400))
def test_dead_pages_are_those_that_no_query_to_come_sees(rule: KeepRule, next: int, prompt: int) -> None:
    end = max(next, prompt) + 300  # beyond it nothing written so far is in a window
    for page in range(next // PAGE + 1):
        keys = [key for key in range(page * PAGE, (page + 1) * PAGE) if key < next]
        seen = any(visible(rule, prompt, key, query) for query in range(next, end) for key in keys)
        whole = len(keys) == PAGE
        assert (page in rule.dead(next, prompt)) == (whole and not seen), page


@given(rule=rules, prompt=st.integers(1, 300), limit=st.integers(0, 300), unlanded=st.integers(1, 150), data=st.data())
def test_most_bounds_what_is_held(rule: KeepRule, prompt: int, limit: int, unlanded: int, data: st.DataObject) -> None:
    """Issue in any cuts, land late, give up what is dead: never more pages than `most` said at any time before."""
    total = prompt + limit
    computed = issued = 0
    known = data.draw(st.integers(prompt, max(total, 1)))  # a resumed request knows produced tokens already
    bound = rule.most(prompt=prompt, total=total, known=known, computed=0, unlanded=unlanded)
    while computed < total - 1:
        waiting = known - issued
        count = min(waiting, unlanded - (issued - computed), data.draw(st.integers(1, unlanded)))
        issued += max(count, 0)
        held = -(-issued // PAGE) - len(rule.dead(computed, prompt))
        assert held <= bound, (computed, issued)
        computed = issued
        known = min(max(known, computed + 1), total)
        now = rule.most(prompt=prompt, total=total, known=known, computed=computed, unlanded=unlanded)
        assert now <= bound
        bound = now


def test_windows_are_token_exact() -> None:
    rule = KeepRule(sink=65, prompt_local=8192, local=256)
    assert rule.sink_pages == 2
    assert rule.dead(1000 + 64, prompt=1000) == range(2, (1064 - 256 + 1) // 64)
    # the window of position 383 begins at 128: page 1 holds the sink's last token, page 2 is seen by its first key
    assert list(rule.dead(383, prompt=1)) == []
    assert list(rule.dead(446, prompt=1)) == []
    assert list(rule.dead(447, prompt=1)) == [2]
