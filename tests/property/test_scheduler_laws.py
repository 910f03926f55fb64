"""Whatever the scheduler does, a request's tokens are those of an unloaded run, and the pool stays whole.

The model is a fake whose "key" at a position is a hash of the token and of every key before it, read through the page
tables that the step's moves describe: one wrong, stale or overwritten page changes every later token.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from omniserve.base.config import Limits
from omniserve.base.errors import CapacityError, RequestError
from omniserve.base.types import PAGE, Admission, FinishReason, Kind, Output, Request, SamplingParams, Step, StepResult
from omniserve.cache.manager import CacheManager
from omniserve.cache.pool import PagePool
from omniserve.engine.engine import Engine
from omniserve.engine.scheduler import Scheduler

VOCAB = 32
EOS = 0
UNWRITTEN = -1


def key_of(token: int, before: Sequence[int]) -> int:
    return hash((token, *before))


def draw(keys: Sequence[int], seed: int) -> int:
    return hash((seed, keys[-1])) % VOCAB


class BrokenError(Exception):
    """The executor failed, as it was told to."""


@dataclass
class Landing:
    """Handle of a step of the fake model."""

    value: StepResult | None

    def result(self) -> StepResult:
        if self.value is None:
            raise BrokenError
        return self.value


@dataclass
class Slot:
    """What the fake model knows of a slot's request."""

    request: str
    epoch: int
    admission: Admission
    last: int | None = None


class FakeModel:
    """An executor that runs steps when they are submitted and checks each against the contract of `Work`.

    fail  makes the next step fail, at once or when its result is asked for; it and those submitted before the failure
          was seen then leave rubbish behind, as a device would whose tables were not updated
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.store = [[UNWRITTEN] * PAGE for _ in range(pool.total)]
        self.table: dict[tuple[int, int], int] = {}
        self.slots: dict[int, Slot] = {}
        self.fail: Literal["submit", "result"] | None = None
        self.rubbish = False
        self.tokens = 0
        self.mixed = False

    def submit(self, step: Step) -> Landing:
        if self.fail is not None or self.rubbish:
            at, self.fail = self.fail, None
            self.spoil(step)
            if at == "submit":
                self.rubbish = False
                raise BrokenError
            self.rubbish = True
            return Landing(None)
        assert step.tokens == sum(work.count for work in step.works)
        assert len({work.request for work in step.works}) == len({work.slot for work in step.works}) == len(step.works)
        self.tokens += step.tokens
        self.mixed |= len({work.start < work.prompt for work in step.works}) == 2
        self.move(step)
        drawn = {}
        for work in step.works:
            if work.admission is not None:
                assert work.admission.prompt == work.prompt
                self.slots[work.slot] = Slot(work.request, work.epoch, work.admission)
            slot = self.slots[work.slot]
            assert (slot.request, slot.epoch) == (work.request, work.epoch), "the admission was not sent again"
            tokens = work.new_tokens
            if not tokens:
                assert work.count == 1
                assert work.start >= work.prompt
                assert slot.last is not None
                tokens = (slot.last,)
            assert len(tokens) == work.count
            keys = self.read(work.slot, work.start)
            for position, token in enumerate(tokens, work.start):
                page = self.table[work.slot, position // PAGE]
                assert self.pool.writable(page), "a shared page was written"
                keys.append(key_of(token, keys))
                self.store[page][position % PAGE] = keys[-1]
            if work.logits == "all":
                assert work.start + work.count <= work.prompt
                assert slot.admission.reduce is not None
                slot.admission.reduce(range(work.start, work.start + work.count), keys[work.start :])
            if work.draws:
                assert work.logits != "none"
                slot.last = drawn[work.request] = draw(keys, slot.admission.seed)
        return Landing(StepResult(tokens=drawn))

    def close(self) -> None:
        pass

    def move(self, step: Step) -> None:
        (moves,) = step.moves
        cells = [cell[:2] for cell in moves.appended] + list(moves.freed)
        assert len(cells) == len(set(cells))
        for slot, logical, page in moves.appended:
            self.table[slot, logical] = page
        for cell in moves.freed:
            self.table.pop(cell, None)

    def read(self, slot: int, count: int) -> list[int]:
        """The keys of the first `count` positions."""
        keys: list[int] = []
        for logical in range(-(-count // PAGE)):
            keys += self.store[self.table[slot, logical]]
        return keys[:count]

    def spoil(self, step: Step) -> None:
        for work in step.works:
            for position in range(work.start, work.start + work.count):
                page = self.table.get((work.slot, position // PAGE))
                if page is not None:
                    self.store[page][position % PAGE] = UNWRITTEN


def unloaded(request: Request) -> tuple[list[int], FinishReason]:
    """The tokens that a request gets when the model runs for it alone, without pages."""
    assert request.sampling.seed is not None
    keys: list[int] = []
    for token in request.tokens[: request.prompt]:
        keys.append(key_of(token, keys))
    produced: list[int] = []
    while len(produced) < request.limit:
        produced.append(draw(keys, request.sampling.seed))
        if produced[-1] in request.stop_ids:
            return produced, "stop"
        keys.append(key_of(produced[-1], keys))
    return produced, "length"


@dataclass
class Ask:
    """A request to come: the first `shared` tokens of a family, then `tail` tokens of its own."""

    shared: int
    tail: int
    limit: int
    family: int = 0
    mark: int = 0
    salt: bytes = b""
    score: bool = False
    ignore_eos: bool = False
    priority: int = 0

    @property
    def prompt(self) -> list[int]:
        own = [100 + self.mark] * (self.tail - 1) + [EOS if self.mark == 1 else 100 + self.mark]
        return [(self.family + 7 * i) % VOCAB for i in range(self.shared)] + own


@dataclass
class World:
    """An engine over the fake model, and what came out of it."""

    pages: int = 16
    max_seqs: int = 8
    step_tokens: int = 128
    max_model_len: int = 1024
    overlap: bool = False
    prefix_caching: bool = True
    priorities: bool = True
    outputs: dict[str, list[Output]] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)
    scored: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    allowed: set[str] = field(default_factory=set)
    """Requests that may end in an abort: those that the test aborted, or that a failure took along."""

    def __post_init__(self) -> None:
        limits = Limits(max_model_len=self.max_model_len, max_seqs=self.max_seqs, max_step_tokens=self.step_tokens)
        self.pool = PagePool(self.pages)
        self.cache = CacheManager({Kind.RETRIEVAL: self.pool}, prefix_caching=self.prefix_caching)
        self.scheduler = Scheduler(limits, self.cache, seed=5, priorities=self.priorities)
        self.model = FakeModel(self.pool)
        self.engine = Engine(self.scheduler, self.model, overlap=self.overlap)

    def add(self, ask: Ask) -> str:
        name = f"r{len(self.requests)}"
        tokens = ask.prompt
        scored: list[tuple[int, int]] = []

        def reduce(positions: Iterable[int], logits: Iterable[int]) -> None:
            scored.extend(zip(positions, logits, strict=True))

        request = Request(
            id=name,
            tokens=tokens,
            prompt=len(tokens),
            sampling=SamplingParams(),
            stop_ids=frozenset() if ask.ignore_eos else frozenset([EOS]),
            limit=ask.limit,
            reduce=reduce if ask.score else None,
            salt=ask.salt,
            priority=ask.priority,
        )
        self.engine.add(request)
        self.requests[name] = request
        self.outputs[name] = []
        if ask.score:
            self.scored[name] = scored
        return name

    def step(self) -> None:
        self.collect(self.engine.step())

    def collect(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            self.outputs[output.request].append(output)

    def abort(self, name: str) -> None:
        output = self.engine.abort(name)
        if output is not None:
            self.allowed.add(name)
            self.collect([output])

    def broken_step(self, at: Literal["submit", "result"]) -> None:
        """Let the next step that is submitted fail."""
        self.model.fail = at
        try:
            self.step()
            if self.model.fail is None:
                self.step()  # with overlap the result is asked for one step later
        except BrokenError:
            self.allowed |= {name for name, request in self.requests.items() if request.finish == "abort"}
        self.model.fail, self.model.rubbish = None, False

    def finish(self) -> "World":
        self.collect(self.engine.drain())
        self.verify()
        return self

    def verify(self) -> None:
        """Everything has ended as in an unloaded run, and nothing is held."""
        self.scheduler.check()
        assert not self.engine.has_work
        assert self.scheduler.waiting == self.scheduler.running == self.pool.held == 0
        assert self.pool.free + self.pool.cached == self.pool.total
        for name, request in self.requests.items():
            tokens, reason = unloaded(request)
            got = [token for output in self.outputs[name] for token in output.new_tokens]
            ends = [output.finish for output in self.outputs[name] if output.finish is not None]
            assert request.tokens[request.prompt :] == got
            assert ends == [request.finish], name
            assert self.outputs[name][-1].usage.completion_tokens == len(got)
            if name in self.allowed and ends == ["abort"]:
                assert got == tokens[: len(got)]
            else:
                assert (got, ends) == (tokens, [reason])
            if name in self.scored:
                keys: list[int] = []
                for token in request.tokens[: request.prompt]:
                    keys.append(key_of(token, keys))
                expected = list(enumerate(keys))
                if ends == ["abort"]:
                    expected = expected[: len(self.scored[name])]
                assert self.scored[name] == expected, "each position once, in order"

    def tokens(self) -> list[list[int]]:
        return [request.tokens for request in self.requests.values()]


asks = st.builds(
    Ask,
    shared=st.integers(0, 200),
    tail=st.integers(1, 90),
    limit=st.integers(1, 80),
    family=st.integers(0, 1),
    mark=st.integers(0, 2),
    salt=st.sampled_from([b"", b"", b"salt"]),
    score=st.sampled_from([False, False, False, True]),
    ignore_eos=st.booleans(),
    priority=st.sampled_from([0, 0, -1, 1, 5]),
) | st.builds(Ask, shared=st.integers(0, 200), tail=st.integers(1, 90), limit=st.just(0), score=st.just(True))

worlds = st.builds(
    World,
    pages=st.integers(6, 14),
    max_seqs=st.integers(1, 6),
    step_tokens=st.sampled_from([1, 3, 17, 64, 100, 1000]),
    max_model_len=st.just(370),
    overlap=st.booleans(),
    prefix_caching=st.booleans(),
)


class Serving(RuleBasedStateMachine):
    """Any order of submissions, steps, aborts and failures."""

    @initialize(world=worlds)
    def begin(self, world: World) -> None:
        self.world = world

    @rule(ask=asks)
    def submit(self, ask: Ask) -> None:
        self.world.add(ask)

    @rule(count=st.integers(1, 30))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @rule(number=st.integers(0, 100))
    def abort(self, number: int) -> None:
        self.world.abort(f"r{number % (len(self.world.requests) + 1)}")

    @rule(at=st.sampled_from(["submit", "result"]))
    def fail(self, at: Literal["submit", "result"]) -> None:
        self.world.broken_step(at)

    @invariant()
    def whole(self) -> None:
        self.world.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()


def test_any_order_of_events() -> None:
    run_state_machine_as_test(Serving)


@given(world=worlds, load=st.lists(asks, min_size=1, max_size=12))
def test_tokens_do_not_depend_on_the_configuration(world: World, load: list[Ask]) -> None:
    for ask in load:
        world.add(ask)
    world.finish()


@given(world=worlds, load=st.lists(asks, min_size=2, max_size=12))
def test_priorities_change_no_token(world: World, load: list[Ask]) -> None:
    """Only the order: without them, on a pool with room for all, each request draws the same."""
    for ask in load:
        world.add(ask)
    calm = World(pages=200, max_seqs=16, max_model_len=370, priorities=False)
    for ask in load:
        calm.add(replace(ask, priority=0))
    assert world.finish().tokens() == calm.finish().tokens()


LOAD = [
    Ask(shared=64 * (i % 3), tail=20 + i % 50, limit=40 + i % 30, mark=i % 5, ignore_eos=i % 2 == 0) for i in range(64)
]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("step_tokens", [16, 300])
def test_64_requests_on_a_pool_for_4(overlap: bool, step_tokens: int) -> None:
    small = World(pages=16, max_seqs=16, step_tokens=step_tokens, overlap=overlap)
    for ask in LOAD:
        assert -(-(len(ask.prompt) + ask.limit) // PAGE) <= 4
        small.add(ask)
    small.finish()
    assert small.scheduler.stats.preemptions > 5
    assert small.model.mixed
    wide = World(pages=1000, max_seqs=64, step_tokens=10_000)
    for ask in LOAD:
        wide.add(ask)
    wide.finish()
    assert wide.scheduler.stats.preemptions == 0
    assert small.tokens() == wide.tokens()


@pytest.mark.parametrize("step_tokens", [1, 7, 64, 65, 200, 10_000])
@pytest.mark.parametrize("overlap", [False, True])
def test_chunks_do_not_show(step_tokens: int, overlap: bool) -> None:
    world = World(pages=64, step_tokens=step_tokens, overlap=overlap)
    for i in range(6):
        world.add(Ask(shared=100 * (i % 3), tail=30, limit=20, mark=i))
    world.finish()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_prefix_hit_does_not_show(overlap: bool) -> None:
    world = World(pages=64, overlap=overlap)
    for mark in (1, 2, 1):
        world.add(Ask(shared=192, tail=10, limit=30, mark=mark))
        world.collect(world.engine.drain())
    world.verify()
    cached = [world.outputs[name][-1].usage.cached_tokens for name in world.requests]
    assert cached == [0, 192, 192]
    assert world.scheduler.stats.prefix_hits == 384
    assert world.scheduler.stats.prefix_queries == 3 * 202
    without = World(pages=64, overlap=overlap, prefix_caching=False)
    for mark in (1, 2, 1):
        without.add(Ask(shared=192, tail=10, limit=30, mark=mark))
    without.finish()
    assert without.tokens() == world.tokens()


def test_overlap_does_not_show() -> None:
    both = []
    for overlap in (False, True):
        world = World(pages=12, max_seqs=5, step_tokens=40, overlap=overlap)
        for ask in LOAD[:20]:
            world.add(ask)
        both.append(world.finish().tokens())
    assert both[0] == both[1]


@pytest.mark.parametrize("overlap", [False, True])
def test_an_end_of_sequence_in_mid_flight(overlap: bool) -> None:
    world = World(pages=32, overlap=overlap)
    for mark in range(12):
        world.add(Ask(shared=64, tail=1 + mark, limit=200, mark=mark))
    world.finish()
    stopped = [request for request in world.requests.values() if request.finish == "stop"]
    assert len(stopped) > 6
    for request in stopped:
        assert request.tokens[-1] == EOS
        assert EOS not in request.tokens[request.prompt : -1]


@pytest.mark.parametrize("overlap", [False, True])
def test_abort_at_any_step(overlap: bool) -> None:
    for when in range(40):
        world = World(pages=8, max_seqs=4, step_tokens=50, overlap=overlap)
        for i in range(4):
            world.add(Ask(shared=100, tail=10 + i, limit=30, mark=i, ignore_eos=True))
        for _ in range(when):
            world.step()
        world.abort(f"r{when % 4}")
        world.scheduler.check()
        world.finish()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("at", ["submit", "result"])
def test_failure_at_any_step(overlap: bool, at: Literal["submit", "result"]) -> None:
    for when in range(30):
        world = World(pages=8, max_seqs=3, step_tokens=50, overlap=overlap)
        for i in range(6):
            world.add(Ask(shared=100, tail=10 + i, limit=30, mark=i, ignore_eos=True))
        for _ in range(when):
            world.step()
        world.broken_step(at)
        world.scheduler.check()
        world.finish()
        assert any(request.finish == "length" for request in world.requests.values())


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("at", ["submit", "result"])
def test_no_prefix_outlives_a_failure(overlap: bool, at: Literal["submit", "result"]) -> None:
    """The failed step did not update the tables, so the next owner of a slot wrote over the pages of the last one."""
    world = World(max_seqs=1, overlap=overlap)
    world.add(Ask(shared=150, tail=10, limit=5, ignore_eos=True))
    world.add(Ask(shared=0, tail=100, limit=5))
    while not world.requests["r0"].finished:
        world.step()
    world.broken_step(at)
    world.add(Ask(shared=150, tail=10, limit=5, ignore_eos=True))
    world.finish()
    assert world.requests["r1"].finish == "abort"


@pytest.mark.parametrize("overlap", [False, True])
def test_logits_come_once_in_spite_of_preemptions(overlap: bool) -> None:
    world = World(pages=8, max_seqs=6, step_tokens=30, overlap=overlap)
    for i in range(8):
        world.add(Ask(shared=90, tail=5 + i, limit=60 * (i % 2), mark=i, score=True, ignore_eos=True))
        world.add(Ask(shared=90, tail=5 + i, limit=100, mark=i, ignore_eos=True))
    world.finish()
    assert world.scheduler.stats.preemptions > 5
    assert any(world.requests[name].preemptions for name in world.scored)


def test_1000_random_sequences_leave_the_pool_whole() -> None:
    for seed in range(1000):
        chance = random.Random(seed)
        world = World(
            pages=chance.randint(5, 9),
            max_seqs=chance.randint(1, 4),
            step_tokens=chance.choice([9, 70, 300]),
            max_model_len=260,
            overlap=chance.random() < 0.5,
        )
        for _ in range(20):
            event = chance.random()
            if event < 0.35:
                shared, tail, limit = chance.choice([0, 64, 130]), chance.randint(1, 60), chance.randint(1, 50)
                world.add(Ask(shared=shared, tail=tail, limit=limit, ignore_eos=chance.random() < 0.5))
            elif event < 0.5 and world.requests:
                world.abort(chance.choice(list(world.requests)))
            else:
                for _ in range(chance.randint(1, 12)):
                    world.step()
            world.scheduler.check()
        world.finish()


def test_what_can_never_be_served_is_refused_and_the_rest_ends() -> None:
    world = World(pages=4, max_model_len=300)
    with pytest.raises(RequestError):
        world.add(Ask(shared=0, tail=300, limit=1))
    with pytest.raises(CapacityError):
        world.add(Ask(shared=0, tail=250, limit=50))
    world.add(Ask(shared=0, tail=250, limit=6, ignore_eos=True))
    world.add(Ask(shared=0, tail=256, limit=0, score=True))
    world.finish()


def test_the_fake_model_notices_a_wrong_page() -> None:
    world = World()
    world.add(Ask(shared=0, tail=100, limit=20, ignore_eos=True))
    for _ in range(3):
        world.step()
    world.model.store[world.model.table[0, 0]][5] += 1
    with pytest.raises(AssertionError):
        world.finish()
