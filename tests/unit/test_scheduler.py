from collections.abc import Sequence
from typing import Any

import pytest

from omniserve.base.config import Limits
from omniserve.base.errors import CapacityError, RequestError
from omniserve.base.types import Kind, Output, Request, SamplingParams, Step, StepResult, TokenLogprobs
from omniserve.cache.manager import CacheManager
from omniserve.cache.pool import PagePool
from omniserve.engine.scheduler import Scheduler

TOKEN = 7
STOP = 99


def scheduler(
    pages: int = 100, seqs: int = 8, step: int = 100, longest: int = 1000, seed: int = 0, priorities: bool = False
) -> Scheduler:
    cache = CacheManager({Kind.RETRIEVAL: PagePool(pages)}, prefix_caching=True)
    limits = Limits(max_model_len=longest, max_seqs=seqs, max_step_tokens=step)
    return Scheduler(limits, cache, seed=seed, priorities=priorities)


def request(name: str, prompt: int, limit: int = 10, *, base: int = 0, **fields: Any) -> Request:
    tokens = [1000 + base + i for i in range(prompt)]
    fields.setdefault("sampling", SamplingParams())
    return Request(id=name, tokens=tokens, prompt=prompt, limit=limit, stop_ids=frozenset([STOP]), **fields)


def add(one: Scheduler, *requests: Request) -> None:
    for each in requests:
        one.add(each)


def land(one: Scheduler, step: Step, token: int = TOKEN) -> list[Output]:
    one.check()
    outputs = one.commit(step, StepResult(tokens={work.request: token for work in step.works if work.draws}))
    one.check()
    return outputs


def run(one: Scheduler, steps: int, token: int = TOKEN) -> list[Output]:
    return [output for _ in range(steps) for output in land(one, one.plan(), token)]


def shares(step: Step) -> list[tuple[str, int, int]]:
    return [(work.request, work.start, work.count) for work in step.works]


def names(requests: Sequence[Request]) -> list[str]:
    return [each.id for each in requests]


# What a step holds


def test_a_prompt_is_cut_into_chunks_and_drawn_from_once() -> None:
    one = scheduler(step=100)
    add(one, request("a", 250))
    seen = []
    for _ in range(4):
        step = one.plan()
        (work,) = step.works
        seen.append((work.start, work.count, work.draws, work.logits, len(work.new_tokens)))
        assert step.tokens == work.count
        land(one, step)
    assert seen == [
        (0, 100, False, "none", 100),
        (100, 100, False, "none", 100),
        (200, 50, True, "last", 50),
        (250, 1, True, "last", 0),
    ]


def test_running_rows_come_first_and_waiting_ones_take_the_rest() -> None:
    one = scheduler(step=60)
    add(one, request("a", 20), request("b", 100, base=500), request("c", 10, base=800))
    seen = []
    for _ in range(3):
        step = one.plan()
        seen.append(shares(step))
        land(one, step)
    assert seen == [
        [("a", 0, 20), ("b", 0, 40)],
        [("a", 20, 1), ("b", 40, 59)],
        [("a", 21, 1), ("b", 99, 1), ("c", 0, 10)],
    ]
    assert (one.running, one.waiting) == (3, 0)


def test_slots_bound_the_running_requests() -> None:
    one = scheduler(seqs=2)
    add(one, *(request(name, 5, limit=2) for name in "abc"))
    first = one.plan()
    assert [(work.request, work.slot) for work in first.works] == [("a", 0), ("b", 1)]
    land(one, first)
    run(one, 1)
    assert shares(one.plan()) == [("c", 0, 5)]


def test_the_admission_comes_with_the_first_work_only() -> None:
    one = scheduler(step=10)
    add(one, request("a", 15, sampling=SamplingParams(seed=3, temperature=0.5)))
    first, second = one.plan(), one.plan()
    (admission,) = [work.admission for work in first.works]
    assert admission is not None
    assert (admission.seed, admission.prompt, admission.sampling.temperature) == (3, 15, 0.5)
    assert second.works[0].admission is None


def test_a_plan_without_work_changes_nothing() -> None:
    one = scheduler()
    assert not one.has_work
    assert one.plan() == Step(works=())
    add(one, request("a", 64, limit=1))
    step = one.plan()
    assert one.plan().works == ()
    assert len(step.moves) == 1
    (output,) = land(one, step)
    assert output.finish == "length"
    assert not one.has_work


def test_page_moves_of_an_end_go_with_the_next_step() -> None:
    one = scheduler()
    add(one, request("a", 64, limit=1))
    run(one, 1)
    assert one.plan().moves == ()
    add(one, request("b", 10, base=500))
    (moves,) = one.plan().moves
    assert [cell[:2] for cell in moves.appended] == [(0, 0)]
    assert moves.freed == ()


# Stepping ahead


def test_the_next_step_is_planned_without_the_token() -> None:
    one = scheduler()
    add(one, request("a", 5, limit=4))
    steps = [one.plan(), one.plan()]
    assert shares(steps[1]) == [("a", 5, 1)]
    assert steps[1].works[0].new_tokens == ()
    land(one, steps.pop(0))
    steps.append(one.plan())
    assert shares(steps[1]) == [("a", 6, 1)]


def test_nothing_is_issued_past_the_limit() -> None:
    one = scheduler()
    add(one, request("a", 5, limit=2))
    steps = [one.plan(), one.plan()]
    assert [work.draws for step in steps for work in step.works] == [True, True]
    assert one.plan().works == ()
    assert [output.finish for step in steps for output in land(one, step)] == [None, "length"]


def test_what_was_issued_past_an_end_is_dropped() -> None:
    one = scheduler()
    add(one, request("a", 5))
    first, second = one.plan(), one.plan()
    (output,) = land(one, first, STOP)
    assert (output.new_tokens, output.finish, output.usage.completion_tokens) == ((STOP,), "stop", 1)
    assert one.running == 0
    assert land(one, second) == []


def test_an_id_can_be_used_again_while_its_last_step_is_in_flight() -> None:
    one = scheduler()
    add(one, request("a", 5))
    old = one.plan()
    one.abort("a")
    again = request("a", 8, base=50)
    add(one, again)
    new = one.plan()
    assert land(one, old, 1) == []
    assert [output.new_tokens for output in land(one, new, 2)] == [(2,)]
    assert again.tokens[8:] == [2]


# Ends


def test_a_stop_token_in_the_prompt_does_not_stop() -> None:
    one = scheduler(step=5)
    add(one, Request(id="a", tokens=[STOP] * 9, prompt=9, sampling=SamplingParams(), stop_ids=frozenset([STOP])))
    run(one, 1)
    assert [output.finish for output in run(one, 2)] == [None, None]


def test_the_limit_is_cut_to_the_longest_sequence() -> None:
    one = scheduler(longest=30)
    a = request("a", 25, limit=100)
    add(one, a)
    assert a.limit == 5
    outputs = run(one, 5)
    assert outputs[-1].finish == "length"
    assert len(a.tokens) == 30


@pytest.mark.parametrize("running", [False, True])
def test_abort(running: bool) -> None:
    one = scheduler()
    add(one, request("a", 5))
    if running:
        run(one, 3)
    output = one.abort("a")
    assert output is not None
    assert (output.finish, output.usage.completion_tokens) == ("abort", 3 if running else 0)
    assert one.abort("a") is None
    assert one.abort("never") is None
    assert not one.has_work
    one.check()


def test_an_aborted_request_that_never_ran_leaves_nothing() -> None:
    one = scheduler(pages=2)
    add(one, request("a", 100, limit=20), request("b", 100, limit=20, base=500))
    run(one, 2)
    one.abort("b")
    one.abort("a")
    assert one.cache._chains == {}
    one.check()


def test_a_failed_step_aborts_its_requests_and_restarts_the_others() -> None:
    one = scheduler(step=100)
    a = request("a", 200, reduce=lambda positions, logits: None, scored=50)  # as if it had been preempted
    add(one, a, request("b", 80, base=500))
    first = one.plan()
    assert shares(first) == [("a", 0, 50), ("b", 0, 50)]
    land(one, first)
    assert shares(one.plan()) == [("a", 50, 100)]
    assert [(output.request, output.finish) for output in one.abandon()] == [("a", "abort")]
    one.check()
    assert (one.running, one.waiting) == (0, 1)
    assert shares(one.plan()) == [("b", 0, 80)]


# Priority


def test_the_more_urgent_request_starts_first() -> None:
    one = scheduler(seqs=1, step=300, priorities=True)
    add(one, request("a", 10, limit=2), request("b", 10, limit=2, base=100), request("c", 10, limit=2, base=200))
    add(one, request("d", 10, limit=2, base=300, priority=-1), request("e", 10, limit=2, base=400, priority=-1))
    order = [output.request for output in run(one, 10) if output.finish]
    assert order == ["d", "e", "a", "b", "c"]


def test_a_waiting_request_takes_nothing_from_a_running_one() -> None:
    one = scheduler(seqs=1, step=300, priorities=True)
    add(one, request("a", 10, limit=3, priority=7))
    run(one, 1)
    add(one, request("b", 10, limit=3, base=100, priority=-7))
    order = [output.request for output in run(one, 5) if output.finish]
    assert order == ["a", "b"]
    assert one.stats.preemptions == 0


def test_the_less_urgent_request_gives_way() -> None:
    one = scheduler(pages=4, step=300, priorities=True)
    a, b = request("a", 127, limit=40, priority=1), request("b", 126, limit=40, base=500)
    add(one, a, b)
    run(one, 3)
    assert (a.preemptions, b.preemptions) == (1, 0)
    assert shares(one.plan()) == [("b", 128, 1)]


def test_priorities_need_their_policy() -> None:
    one = scheduler()
    with pytest.raises(RequestError, match=r"priority=3.*--scheduling-policy priority"):
        one.add(request("a", 10, priority=3))
    assert not one.has_work


# Faults


def test_a_fault_ends_its_request_alone_and_keeps_no_prefix() -> None:
    one = scheduler(step=300)
    add(one, request("a", 130, limit=5), request("b", 130, limit=5, base=500))
    step = one.plan()
    outputs = one.commit(step, StepResult(tokens={"b": TOKEN}, faults={"a": "logits"}))
    one.check()
    assert [(output.request, output.finish, output.fault) for output in outputs] == [
        ("a", "error", "logits"),
        ("b", None, None),
    ]
    assert one.stats.corrupted == 1
    found = request("c", 130, limit=1)
    add(one, found)
    run(one, 4)
    assert (found.cached, one.has_work) == (0, False)


def test_a_request_that_leaves_no_token_corrupts_nothing() -> None:
    one = scheduler(step=300)
    add(one, request("a", 130, limit=5))
    (output,) = one.commit(one.plan(), StepResult(faults={"a": "nothing"}))
    assert (output.finish, output.fault, output.new_tokens) == ("error", "nothing", ())
    assert (one.stats.corrupted, one.has_work) == (0, False)


# Preemption


@pytest.mark.parametrize("culprit", ["a", "b", "c", "d"])
@pytest.mark.parametrize("flying", [False, True])
def test_a_plan_that_fails_at_a_request_costs_that_request(
    culprit: str, flying: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others start again, also those with a step in flight, and bring the tokens that they would have brought."""
    one = scheduler(seqs=3, step=300)
    requests = [request(name, 70, limit=5, base=100 * place) for place, name in enumerate("abc")]
    add(one, *requests)
    run(one, 2)
    step = one.plan() if flying else None
    add(one, request("d", 10, limit=2))
    real, reserve = [], one.cache.reserve

    def fails(each: Request, count: int) -> bool:
        if each.id == culprit:
            raise RuntimeError(culprit)
        real.append(each.id)
        return reserve(each, count)

    monkeypatch.setattr(one.cache, "reserve", fails)
    outputs: list[Output] = []
    for _ in range(40):
        if not one.has_work:
            break
        try:
            planned = one.plan()
        except RuntimeError:
            outputs += one.tear_up()
            one.check()
            continue
        if step is not None:
            outputs += land(one, step)
        step = planned if planned.works else None
        if step is not None and not flying:
            outputs += land(one, step)
            step = None
    assert not one.has_work
    ends = {output.request: output.finish for output in outputs if output.finish is not None}
    assert ends == {name: "abort" if name == culprit else "length" for name in "abcd"}
    assert [each.produced for each in requests if each.id != culprit] == [5] * (3 - (culprit in "abc"))
    assert one.cache.pools[Kind.RETRIEVAL].held == 0


def full_pool() -> tuple[Scheduler, Request, Request]:
    """Two requests that fill the pool of 4 pages; the next token of either needs a page."""
    one = scheduler(pages=4, step=300)
    a, b = request("a", 127, limit=40), request("b", 126, limit=40, base=500)
    add(one, a, b)
    run(one, 2)
    return one, a, b


def test_the_newest_request_gives_way() -> None:
    one, a, b = full_pool()
    step = one.plan()
    assert shares(step) == [("a", 128, 1)]
    assert (b.slot, b.issued, b.computed, b.epoch, b.preemptions) == (None, 0, 0, 1, 1)
    assert (one.running, one.waiting, one.stats.preemptions) == (1, 1, 1)
    land(one, step)
    assert a.produced == 3
    assert b.produced == 2


def test_a_needy_newest_request_gives_way_itself_and_waits() -> None:
    one = scheduler(pages=4, step=300)
    a, b = request("a", 100, limit=10), request("b", 127, limit=100, base=500)
    add(one, a, b)
    run(one, 2)
    one.abort("a")
    c = request("c", 10, base=900)
    add(one, request("d", 100, base=700), c)
    step = one.plan()  # b takes a third page, d does not fit any more, and c must not overtake it
    assert shares(step) == [("b", 128, 1)]
    land(one, step)
    assert names(list(one._waiting)) == ["d", "c"]


def test_a_preempted_request_comes_back_when_there_is_more_room() -> None:
    one = scheduler(pages=3, step=300)
    add(one, request("a", 60, limit=60), request("b", 64, limit=60, base=500))
    run(one, 5)
    step = one.plan()  # a takes one of the two pages that b needs
    assert shares(step) == [("a", 64, 1)]
    land(one, step)
    assert shares(one.plan()) == [("a", 65, 1)]


def test_preempted_requests_keep_their_order() -> None:
    one = scheduler(pages=6, step=1000)
    add(one, request("a", 127, limit=200), request("b", 120, base=300), request("c", 120, base=600))
    run(one, 1)
    add(one, request("d", 5, base=900))
    for _ in range(80):
        land(one, one.plan())
        one.check()  # running and waiting together are in order of arrival
        if one._waiting and one._waiting[0].id == "b":
            break


def test_a_resumed_request_replays_its_tokens_from_the_host() -> None:
    one, _, b = full_pool()
    land(one, one.plan())
    one.abort("a")
    step = one.plan()
    (work,) = step.works
    assert (work.request, work.start, work.count, work.draws) == ("b", 64, 64, True)  # its own first page was cached
    assert work.new_tokens == (*b.tokens[64:126], TOKEN, TOKEN)
    assert work.admission is not None
    assert work.epoch == 1
    assert (work.prompt, b.cached) == (126, 0)
    land(one, step)
    (work,) = one.plan().works
    assert (work.start, work.new_tokens) == (128, ())


def test_a_token_in_flight_is_kept_and_waited_for() -> None:
    one = scheduler(pages=4, step=300)
    a, b = request("a", 127, limit=40), request("b", 126, limit=40, base=500)
    add(one, a, b)
    run(one, 1)
    both = one.plan()
    assert shares(both) == [("a", 127, 1), ("b", 126, 1)]
    alone = one.plan()
    assert shares(alone) == [("a", 128, 1)]
    assert (b.slot, b.flights, b.drawn) == (None, 1, 1)
    one.abort("a")
    assert one.plan().works == ()
    assert [output.request for output in land(one, both)] == ["b"]
    assert (b.produced, b.drawn, b.flights, b.computed) == (2, 0, 0, 0)
    assert shares(one.plan()) == [("b", 64, 64)]


def test_a_preempted_request_may_end_while_it_waits() -> None:
    one = scheduler(pages=4, step=300)
    add(one, request("a", 127, limit=40), request("b", 126, limit=40, base=500))
    run(one, 1)
    both, _ = one.plan(), one.plan()
    outputs = land(one, both, STOP)
    assert [(output.request, output.finish) for output in outputs] == [("a", "stop"), ("b", "stop")]
    assert not one.has_work


def test_only_what_fits_whole_is_started() -> None:
    one = scheduler(pages=4, step=50)
    add(one, request("a", 100, limit=20), request("b", 200, limit=20, base=300))
    run(one, 3)
    assert (one.running, one.waiting) == (1, 1)
    one.abort("a")
    assert shares(one.plan()) == [("b", 0, 50)]


# Prefixes


def test_a_prefix_hit_starts_late_and_is_counted_once() -> None:
    one = scheduler(step=500)
    add(one, request("a", 200))
    run(one, 1)
    add(one, request("b", 200))
    step = one.plan()
    assert shares(step) == [("a", 200, 1), ("b", 192, 8)]
    outputs = land(one, step)
    assert [output.usage.cached_tokens for output in outputs] == [0, 192]
    assert (one.stats.prefix_queries, one.stats.prefix_hits) == (400, 192)


def test_cached_tokens_are_those_of_the_first_start() -> None:
    one, _, b = full_pool()
    land(one, one.plan())
    one.abort("a")
    run(one, 1)
    assert b.slot is not None
    assert b.cached == 0
    assert one.stats.prefix_hits == 0


def test_wanted_logits_begin_at_0_and_a_score_ends_with_its_prompt() -> None:
    one = scheduler(step=150)
    add(one, request("a", 200, limit=1))
    run(one, 2)
    add(one, request("b", 200, limit=0, reduce=lambda positions, logits: None))
    step = one.plan()
    (work,) = step.works
    assert (work.start, work.logits, work.draws) == (0, "all", False)
    assert work.admission is not None
    assert work.admission.reduce is not None
    assert land(one, step) == []
    (output,) = run(one, 1)
    assert (output.new_tokens, output.finish) == ((), "length")
    assert not one.has_work


def test_wanted_logits_and_a_draw_in_one_work() -> None:
    one = scheduler()
    add(one, request("a", 20, limit=2, reduce=lambda positions, logits: None))
    step = one.plan()
    assert (step.works[0].logits, step.works[0].draws) == ("all", True)
    land(one, step)
    assert one.plan().works[0].logits == "last"


# What sampling needs


def test_an_admission_brings_the_history_that_is_looked_up() -> None:
    kinds: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
        ({}, {}, False),
        ({"top_p": 0.5, "min_tokens": 3, "logit_bias": {1: 1.0}}, {}, False),
        ({"repetition_penalty": 1.1}, {}, True),
        ({"presence_penalty": -1}, {}, True),
        ({"frequency_penalty": 1}, {}, True),
        ({}, {"bad_words": ((1, 2),)}, True),
        ({"prompt_logprobs": 0}, {"reduce": "logprobs"}, True),
    ]
    for params, fields, wanted in kinds:
        one = scheduler(pages=4, step=300)
        a = request("a", 127, limit=40)
        b = request("b", 126, limit=40, base=500, sampling=SamplingParams(max_tokens=None, **params), **fields)
        add(one, a, b)
        first = one.plan().works[1].admission
        assert first is not None
        assert first.history == (tuple(b.tokens) if wanted else ())
        assert first.stop_ids == ((STOP,) if "min_tokens" in params else ())
        assert first.bad_words == fields.get("bad_words", ())


def test_a_resumed_request_brings_what_it_has_produced() -> None:
    one = scheduler(pages=4, step=300)
    penalized = SamplingParams(presence_penalty=1.0)
    add(one, request("a", 127, limit=40), request("b", 126, limit=40, base=500, sampling=penalized))
    run(one, 3)  # the third preempts b
    one.abort("a")
    admission = one.plan().works[0].admission
    assert admission is not None
    assert admission.history[126:] == (TOKEN, TOKEN)


def entry(token: int) -> TokenLogprobs:
    return TokenLogprobs(token=token, logprob=-1.0, rank=2)


def test_logprobs_go_with_their_tokens() -> None:
    one = scheduler()
    add(one, request("a", 5), request("b", 6, base=500))
    step = one.plan()
    outputs = one.commit(step, StepResult(tokens={"a": 1, "b": 2}, logprobs={"b": entry(2)}))
    assert [(output.new_tokens, output.logprobs) for output in outputs] == [((1,), ()), ((2,), (entry(2),))]
    assert [output.prompt_logprobs for output in outputs] == [None, None]


def scored(step: Step, requests: Sequence[Request]) -> StepResult:
    """What a step brings when the built-in reducer is asked for."""
    found = {}
    for work, one in ((work, one) for work in step.works for one in requests if one.id == work.request):
        if work.logits == "all":
            targets = one.tokens[work.start + 1 : min(work.start + work.count + 1, one.prompt)]
            found[one.id] = tuple(map(entry, targets))
    return StepResult(tokens={work.request: TOKEN for work in step.works if work.draws}, prompt_logprobs=found)


def test_prompt_logprobs_come_once_with_the_first_token() -> None:
    one = scheduler(step=50)
    a = request("a", 120, limit=3, reduce="logprobs", sampling=SamplingParams(prompt_logprobs=0))
    add(one, a)
    seen = []
    while one.has_work:
        step = one.plan()
        seen += one.commit(step, scored(step, [a]))
    assert [len(output.new_tokens) for output in seen] == [1, 1, 1]
    assert seen[0].prompt_logprobs == tuple(map(entry, a.tokens[1:120]))
    assert [output.prompt_logprobs for output in seen[1:]] == [None, None]


def test_prompt_logprobs_of_a_preempted_request_are_asked_for_once() -> None:
    one = scheduler(pages=5, step=150)
    a, b = request("a", 127, limit=40), request("b", 190, base=500, reduce="logprobs")
    add(one, a, b)
    steps = [one.plan() for _ in range(3)]
    assert [shares(step) for step in steps] == [
        [("a", 0, 127), ("b", 0, 23)],
        [("a", 127, 1), ("b", 23, 149)],
        [("a", 128, 1)],
    ]
    assert b.preemptions == 1
    for step in steps:
        one.commit(step, scored(step, [b]))
    one.abort("a")
    seen, logits = [], []
    while not b.produced:
        step = one.plan()
        logits += [(work.start, work.count, work.logits) for work in step.works]
        seen += one.commit(step, scored(step, [b]))
    assert logits == [(0, 150, "none"), (150, 22, "none"), (172, 18, "all")]
    assert seen[0].prompt_logprobs == tuple(map(entry, b.tokens[1:190]))


# Leaders


def led(one: Scheduler, prompt: int) -> tuple[Request, Request]:
    a = request("a", prompt)
    b = request("b", prompt, leader=a)
    add(one, a, b)
    return a, b


def test_a_request_waits_for_its_leaders_pages() -> None:
    one = scheduler(step=100)
    _, b = led(one, 150)
    add(one, request("c", 5, base=900))
    first, second = one.plan(), one.plan()
    assert [shares(step) for step in (first, second)] == [[("a", 0, 100)], [("a", 100, 50)]]
    land(one, first)
    land(one, second)
    assert shares(one.plan()) == [("a", 150, 1), ("b", 128, 22), ("c", 0, 5)]
    assert b.cached == 128


def test_a_request_does_not_wait_for_what_it_cannot_share() -> None:
    one = scheduler(step=200)
    led(one, 64)
    assert shares(one.plan()) == [("a", 0, 64), ("b", 0, 64)]


def test_a_request_does_not_wait_for_a_leader_that_has_ended() -> None:
    one = scheduler(step=100)
    led(one, 150)
    step = one.plan()
    one.abort("a")
    assert shares(one.plan()) == [("b", 0, 100)]
    land(one, step)


def test_a_preempted_leader_goes_first_again() -> None:
    one = scheduler(pages=3, step=300)
    add(one, request("z", 60, limit=70, base=500))
    a, b = led(one, 65)
    run(one, 2)
    assert (a.slot is not None, b.slot is not None) == (True, False)  # no page left for b
    run(one, 60)
    assert a.preemptions == 1
    one.abort("z")
    run(one, 2)
    assert a.slot is not None
    assert b.slot is not None
    assert b.cached == 64


# What is refused


def test_a_prompt_must_leave_room_for_a_token() -> None:
    one = scheduler(longest=100)
    with pytest.raises(RequestError, match=r"100 tokens: max_model_len is 100"):
        one.add(request("a", 100))
    one.add(request("b", 99))
    one.add(request("c", 100, limit=0, reduce=lambda positions, logits: None))
    with pytest.raises(RequestError, match=r"101 tokens: max_model_len is 100"):
        one.add(request("d", 101, limit=0, reduce=lambda positions, logits: None))


def test_a_request_must_fit_the_pool() -> None:
    one = scheduler(pages=2)
    with pytest.raises(CapacityError, match=r"129 tokens .* holds 128"):
        one.add(request("a", 100, limit=29))
    one.add(request("a", 100, limit=28))


@pytest.mark.parametrize(("prompt", "limit", "words"), [(0, 1, "empty"), (5, 0, "limit=0"), (5, -1, "limit=-1")])
def test_requests_without_sense(prompt: int, limit: int, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        scheduler().add(request("a", prompt, limit=limit))


def test_an_id_is_unique() -> None:
    one = scheduler()
    one.add(request("a", 5))
    with pytest.raises(RequestError, match="'a' is in use"):
        one.add(request("a", 5))


# Seeds


def drawn_seeds(seed: int, own: int | None = None) -> list[int | None]:
    one = scheduler(seed=seed)
    requests = [request(name, 5, sampling=SamplingParams(seed=own)) for name in "abc"]
    add(one, *requests)
    return [each.sampling.seed for each in requests]


def test_seeds_are_drawn_from_the_engines_and_the_order() -> None:
    first = drawn_seeds(0)
    assert len(set(first)) == 3
    assert drawn_seeds(0) == first
    assert set(drawn_seeds(1)).isdisjoint(first)
    assert drawn_seeds(0, own=5) == [5, 5, 5]


def test_a_resumed_request_keeps_its_seed() -> None:
    one, _, b = full_pool()
    seed = b.sampling.seed
    land(one, one.plan())
    one.abort("a")
    admission = one.plan().works[0].admission
    assert admission is not None
    assert admission.seed == seed
