from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import pytest

from omniserve.base.config import Limits
from omniserve.base.errors import RequestError
from omniserve.base.types import Kind, Output, Request, SamplingParams, Step, StepResult, Work
from omniserve.cache.manager import CacheManager
from omniserve.cache.pool import PagePool
from omniserve.engine.engine import Engine
from omniserve.engine.scheduler import Scheduler


@dataclass
class Landing:
    log: list[str]
    number: int
    value: StepResult | Exception

    def result(self) -> StepResult:
        self.log.append(f"result {self.number}")
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


@dataclass
class Counter:
    """An executor whose n-th token of a request is n, and that fails where it is told to."""

    log: list[str] = field(default_factory=list)
    submits: int = 0
    fail_submit: int | None = None
    fail_result: int | None = None

    def submit(self, step: Step) -> Landing:
        number, self.submits = self.submits, self.submits + 1
        self.log.append(f"submit {number}")
        if number == self.fail_submit:
            raise RuntimeError("submit")
        tokens = {work.request: work.start + work.count - work.prompt + 1 for work in step.works if work.draws}
        return Landing(
            self.log, number, RuntimeError("result") if number == self.fail_result else StepResult(tokens=tokens)
        )

    def close(self) -> None:
        self.log.append("close")


def engine(executor: Counter, *, overlap: bool, pages: int = 20, seqs: int = 4) -> Engine:
    cache = CacheManager({Kind.RETRIEVAL: PagePool(pages)}, prefix_caching=True)
    limits = Limits(max_model_len=500, max_seqs=seqs, max_step_tokens=100)
    return Engine(Scheduler(limits, cache, seed=0), executor, overlap=overlap)


def request(name: str, prompt: int = 5, limit: int = 3, stop: int | None = None) -> Request:
    stops = frozenset() if stop is None else frozenset([stop])
    tokens = [1000 + i for i in range(prompt)]
    return Request(id=name, tokens=tokens, prompt=prompt, sampling=SamplingParams(), limit=limit, stop_ids=stops)


def tokens(outputs: list[Output], name: str) -> list[int]:
    return [token for output in outputs if output.request == name for token in output.new_tokens]


def test_without_overlap_each_step_lands_at_once() -> None:
    executor = Counter()
    one = engine(executor, overlap=False)
    one.add(request("a"))
    assert [tokens(one.step(), "a") for _ in range(3)] == [[1], [2], [3]]
    assert executor.log == ["submit 0", "result 0", "submit 1", "result 1", "submit 2", "result 2"]
    assert not one.has_work


def test_with_overlap_the_next_step_is_submitted_first() -> None:
    executor = Counter()
    one = engine(executor, overlap=True)
    one.add(request("a"))
    assert [tokens(one.step(), "a") for _ in range(4)] == [[], [1], [2], [3]]
    assert executor.log == ["submit 0", "submit 1", "result 0", "submit 2", "result 1", "result 2"]
    assert not one.has_work


@pytest.mark.parametrize("overlap", [False, True])
def test_drain_ends_all(overlap: bool) -> None:
    one = engine(Counter(), overlap=overlap)
    for name in "abcdef":
        one.add(request(name))
    outputs = one.drain()
    for name in "abcdef":
        assert tokens(outputs, name) == [1, 2, 3]
    assert not one.has_work
    assert one.step() == []
    one.scheduler.check()


def test_a_stop_is_learnt_one_step_late() -> None:
    executor = Counter()
    one = engine(executor, overlap=True)
    one.add(request("a", limit=10, stop=2))
    outputs = one.drain()
    assert tokens(outputs, "a") == [1, 2]
    assert outputs[-1].finish == "stop"
    assert executor.submits == 3


def test_an_aborted_request_brings_nothing_more() -> None:
    one = engine(Counter(), overlap=True)
    one.add(request("a", limit=10))
    one.step()
    one.step()
    output = one.abort("a")
    assert output is not None
    assert output.finish == "abort"
    assert one.has_work  # a step is in flight
    assert one.step() == []
    assert not one.has_work
    assert one.abort("a") is None


def test_a_refused_request_leaves_no_trace() -> None:
    one = engine(Counter(), overlap=False)
    with pytest.raises(RequestError):
        one.add(request("a", prompt=500))
    assert not one.has_work


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("fail", ["submit", "result"])
def test_a_failure_takes_along_what_was_in_flight_only(overlap: bool, fail: str) -> None:
    executor = Counter()
    one = engine(executor, overlap=overlap, seqs=2)
    requests = [request(name, limit=5) for name in "abc"]
    for each in requests:
        one.add(each)
    outputs = one.step() + one.step()
    setattr(executor, f"fail_{fail}", 2)
    with pytest.raises(RuntimeError, match=fail):  # noqa: PT012  # with overlap a result is asked for one step later
        for _ in range(2):
            outputs += one.step()
    one.scheduler.check()
    assert (one.scheduler.running, one.scheduler.waiting) == (0, 1)
    late = one.step()
    aborted = {output.request for output in late if output.finish == "abort"}
    assert aborted == {"a", "b"}
    outputs += late + one.drain()
    for each in requests:
        assert tokens(outputs, each.id) == each.tokens[each.prompt :]
    assert tokens(outputs, "c") == [1, 2, 3, 4, 5]
    one.scheduler.check()


def test_steps_behind_a_failed_one_are_waited_for() -> None:
    executor = Counter(fail_result=0)
    one = engine(executor, overlap=True)
    one.add(request("a"))
    one.step()
    with pytest.raises(RuntimeError):
        one.step()
    assert executor.log == ["submit 0", "submit 1", "result 0", "result 1"]


def test_what_came_before_a_failure_is_not_lost() -> None:
    executor = Counter(fail_result=1)
    one = engine(executor, overlap=True)
    one.add(request("a", limit=2))
    assert one.step() == []
    assert tokens(one.step(), "a") == [1]
    with pytest.raises(RuntimeError):
        one.step()
    assert one.has_work
    assert [output.finish for output in one.drain()] == ["abort"]


def test_close_ends_all_and_stops_the_ranks() -> None:
    executor = Counter()
    one = engine(executor, overlap=True)
    one.add(request("a", limit=50))
    one.add(request("b", limit=50))
    one.step()
    one.close()
    assert not one.has_work
    assert executor.log[-2:] == ["result 0", "close"]


def test_close_stops_the_ranks_after_a_failure_too() -> None:
    executor = Counter(fail_result=0)
    one = engine(executor, overlap=True)
    one.add(request("a"))
    one.step()
    with pytest.raises(RuntimeError):
        one.close()
    assert executor.log[-1] == "close"


class Planned:
    """Stands in for the scheduler: hands out steps that were planned by hand."""

    has_work = False

    def __init__(self, steps: list[Step], log: list[str]) -> None:
        self.steps = steps
        self.log = log

    def plan(self) -> Step:
        self.log.append("plan")
        return self.steps.pop(0)

    def commit(self, step: Step, result: StepResult) -> list[Output]:
        return []


def test_a_step_marked_sync_lands_before_the_next_is_planned() -> None:
    executor = Counter()

    def step(sync: bool) -> Step:
        work = Work(
            request="a", slot=0, start=0, count=1, prompt=1, new_tokens=(1,), logits="none", draws=False, sync=sync
        )
        return Step(works=(work,))

    planned = Planned([step(False), step(True), step(False), Step(works=())], executor.log)
    one = Engine(cast(Scheduler, planned), executor, overlap=True)
    steps: list[Callable[[], object]] = [one.step] * 4
    for each in steps:
        each()
    order = [line for line in executor.log if line != "plan"]
    assert order == ["submit 0", "submit 1", "result 0", "result 1", "submit 2", "result 2"]
    assert executor.log.index("result 1") < executor.log.index("plan", executor.log.index("submit 1"))
