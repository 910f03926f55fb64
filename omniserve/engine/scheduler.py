"""Who gets how many tokens in the next step. Plain Python: no torch here.

A request has `known` tokens (prompt, produced, and the one a step in flight is sampling), `issued` tokens (handed to a
step) and `computed` tokens (landed); a step gives it `count` of `known - issued`. Running requests are served first, in
order of priority and arrival, each with 1 token or its next chunk; then waiting ones, within `max_step_tokens` per step
and `max_seqs` slots. A waiting request starts at its longest cached prefix, rounded down so that at least one token
outside any shared page is left to run; one whose logits are wanted starts at 0; one with a leader starts when that
one's prompt is there to be shared. When pages run out the last running request in that order is preempted: its pages
are released (their hashes stay findable), `issued` and `computed` become 0, it returns to its place in the queue. A
resumed request prefills its prompt and replays its produced tokens as single-query rows. A request is sampled only by
the step that brings `issued` up to `known`. A step with a row marked `sync` is committed before the next one is
planned. `plan()` changes the queue, reservations and `issued`; `commit()` alone advances `computed`, appends tokens,
hashes pages, and truncates what was issued past an end.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass, replace

from omniserve.base.config import TILE, Limits
from omniserve.base.errors import CapacityError, RequestError
from omniserve.base.types import (
    PAGE,
    Admission,
    Fault,
    FinishReason,
    Output,
    Request,
    Step,
    StepResult,
    TokenLogprobs,
    Usage,
    Work,
)
from omniserve.cache.manager import CacheManager


@dataclass(slots=True)
class Stats:
    """Counters since the start; prefix queries and hits in tokens, of first starts only.

    corrupted  requests whose logits were not finite numbers
    """

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    corrupted: int = 0


class Scheduler:
    """Queues, slots and reservations of all unfinished requests, and the steps in flight.

    cache       the pages of running requests, to look at: the scheduler alone reserves and releases
    stats       counters
    priorities  requests may have one other than 0; a waiting one with a smaller number takes nothing from a running one

    Invariant: running and waiting requests are each in order: of priority, then of arrival. Where all priorities are
    equal the running ones arrived before the waiting ones. A request holds pages exactly while it runs. Every request
    fits into the pool alone (`add` sees to it) and may take the pages of all running ones behind it, so the first one
    always moves on.
    """

    def __init__(self, limits: Limits, cache: CacheManager, *, seed: int, priorities: bool = False) -> None:
        assert limits.max_seqs >= 1 and limits.max_step_tokens >= 1, limits
        self.stats = Stats()
        self._limits = limits
        self.cache = cache
        self._seed = seed
        self._priorities = priorities
        self._added = 0
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._unfinished: dict[str, Request] = {}
        self._slots = list(range(limits.max_seqs - 1, -1, -1))
        self._flying: deque[tuple[Step, tuple[Request, ...]]] = deque()
        self._draft: list[tuple[Work, Request]] = []  # of the step being planned
        self._at: Request | None = None  # whose turn it is in it

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished."""
        return bool(self._unfinished)

    @property
    def requests(self) -> tuple[str, ...]:
        """Ids of the unfinished requests."""
        return tuple(self._unfinished)

    def add(self, request: Request) -> None:
        """Queue a request. Its limit is cut to the room in `max_model_len`, its seed drawn if it brings none.

        Raises RequestError or CapacityError if it can never be served.
        """
        prompt, longest, capacity = request.prompt, self._limits.max_model_len, self.cache.capacity
        assert prompt == len(request.tokens) and request.issued == 0 and not request.finished, request
        if request.id in self._unfinished:
            raise RequestError(f"request id {request.id!r} is in use: give another")
        if request.priority and not self._priorities:
            raise RequestError(
                f"priority={request.priority}: must be 0 where requests are served in order of arrival; start with "
                "--scheduling-policy priority"
            )
        if prompt < 1:
            raise RequestError("the prompt is empty: give at least one token")
        if request.limit < (0 if request.reduce else 1):
            raise RequestError(f"limit={request.limit}: must be 1 or more")
        if prompt + min(request.limit, 1) > longest:
            room = " and one must be left for the answer" if request.limit else ""
            raise RequestError(f"the prompt has {prompt} tokens: max_model_len is {longest}{room}; shorten the prompt")
        limit = min(request.limit, longest - prompt)
        if prompt + limit > capacity:
            raise CapacityError(
                f"the request needs {prompt + limit} tokens of KV cache ({prompt} prompt, {limit} to produce): "
                f"the pool holds {capacity}; shorten the prompt, lower max_tokens or give the cache more memory"
            )
        request.limit = limit
        if request.sampling.seed is None:
            request.sampling = replace(request.sampling, seed=mixed(self._seed, self._added))
        request.number = self._added
        self._added += 1
        self._unfinished[request.id] = request
        insort(self._waiting, request, key=_order)

    def abort(self, request_id: str) -> Output | None:
        """End a request and return its last output; None if it has ended already or never was."""
        request = self._unfinished.get(request_id)
        if request is None:
            return None
        self._finish(request, "abort")
        return _output(request, ())

    def plan(self) -> Step:
        """Return the next step; without works if there is nothing to do before a step in flight lands.

        After an exception `tear_up` must be called.
        """
        self._draft = []
        budget = self._limits.max_step_tokens

        def serve(request: Request, count: int, admission: Admission | None = None) -> None:
            nonlocal budget
            self._draft.append((self._issue(request, count, admission), request))
            budget -= count

        for request in tuple(self._running):
            self._at = request
            count = self._due(request, budget)
            if count == 0:
                continue
            self._make_room(request, count)
            if request.slot is None:  # preempted, and with it all behind it
                break
            serve(request, count)

        least = 1 if self._limits.tiles_from is None else TILE  # so that whatever starts gets something
        while self._waiting and self._slots and budget >= least:
            request = self._at = self._waiting[0]
            admission = None if request.flights or self._behind(request) else self._start(request)
            if admission is None:
                break
            count = self._due(request, budget)
            reserved = self.cache.reserve(request, count)
            assert reserved, request
            serve(request, count, admission)

        self._at = None
        draft = self._draft
        assert draft or self._flying or not self._unfinished, "nothing moves"
        if not draft:
            return Step(works=())
        works, served = zip(*draft, strict=True)
        step = Step(works=works, moves=self.cache.moves(), tokens=self._limits.max_step_tokens - budget)
        self._flying.append((step, served))
        return step

    def tear_up(self) -> list[Output]:
        """Forget the step whose planning failed, and return the output of the request that it failed at, if any.

        That one is aborted. Nothing of the step has run, so that the others only start again; steps in flight land.
        """
        for work, request in self._draft:
            request.flights -= 1
            request.drawn -= work.draws
            if work.logits == "all":
                request.scored = work.start
        self._draft = []
        while self._running:
            self._preempt(self._running[-1])
        at, self._at = self._at, None
        if at is None or at.finished:
            return []
        self._finish(at, "abort")
        return [_output(at, ())]

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, at most."""
        return self._limits.max_step_tokens

    def retreat(self, step: Step) -> bool:
        """Take back the newest step, which did not run, and let no step be as large again.

        Its requests are preempted. False, and nothing changed, if steps cannot be smaller.
        """
        assert self._flying and self._flying[-1][0] is step, step
        least = max(self._limits.max_seqs + (TILE if self._limits.tiles_from is not None else 0), PAGE)
        smaller = max(min(step.tokens, self._limits.max_step_tokens) // 2, least)
        if smaller >= step.tokens:
            return False
        self._limits = replace(self._limits, max_step_tokens=smaller)
        _, served = self._flying.pop()
        for work, request in zip(step.works, served, strict=True):
            request.flights -= 1
            request.drawn -= work.draws
            if work.logits == "all":
                request.scored = min(request.scored, work.start)
            if not request.finished and request.slot is not None:
                self._preempt(request)
        return True

    def _behind(self, request: Request) -> bool:
        """True while the pages that a request could share with its leader are not computed yet."""
        leader = request.leader
        if leader is None or leader.finished or not self.cache.prefix_caching:
            return False
        return leader.computed < (request.prompt - 1) // PAGE * PAGE

    def _due(self, request: Request, budget: int) -> int:
        """Tokens that the next step can give a request. The last token of its limit is never fed back."""
        if request.held:  # the next produced position, or none
            last = min(len(request.tokens) + request.drawn, request.prompt + request.limit - 1)
            return 1 if budget and request.issued < last else 0
        wanted = min(request.known, request.prompt + max(request.limit - 1, 0))
        count = min(wanted - request.issued, budget)
        if request.reduce is not None and request.issued < request.prompt:
            border = request.scored if request.issued < request.scored else request.prompt
            count = min(count, border - request.issued)
        return self._limits.cut(request.issued, request.issued + count, request.prompt) - request.issued

    def _make_room(self, request: Request, count: int) -> None:
        """Reserve pages for a running request, preempting the last, in the end itself, until there is room."""
        while request.slot is not None and not self.cache.reserve(request, count):
            self._preempt(self._running[-1])

    def _preempt(self, request: Request) -> None:
        self._vacate(request)
        request.issued = request.computed = 0
        request.epoch += 1
        request.preemptions += 1
        self.stats.preemptions += 1
        insort(self._waiting, request, key=_order)

    def _start(self, request: Request) -> Admission | None:
        """Give the head of the queue a slot; None, and nothing changed, if it does not fit."""
        slot, first = self._slots[-1], request.preemptions == 0
        found = self.cache.start(request, slot)
        if found is None:
            return None
        insort(self._running, self._waiting.pop(0), key=_order)
        request.slot = self._slots.pop()
        request.issued = request.computed = found
        if first:
            request.cached = found
            if self.cache.prefix_caching and request.reduce is None:
                self.stats.prefix_queries += len(request.tokens)
                self.stats.prefix_hits += found
        return _admission(request)

    def _issue(self, request: Request, count: int, admission: Admission | None) -> Work:
        """Hand a request's next tokens, whose pages are reserved, to the step being planned."""
        assert request.slot is not None, request
        start, end = request.issued, request.issued + count
        draws = end == request.known and request.limit > 0
        all_logits = request.reduce is not None and request.scored <= start < request.prompt
        held = request.held
        work = Work(
            request.id,
            request.slot,
            start,
            count,
            request.prompt,
            () if held else tuple(request.tokens[start:end]),
            "all" if all_logits else "last" if draws else "none",
            draws,
            False,
            request.epoch,
            admission,
        )
        assert len(work.new_tokens) == (0 if request.held else count), request
        request.issued = end
        request.flights += 1
        if all_logits:
            request.scored = end
        if draws:
            request.drawn += 1
            request.held = True
        return work

    def commit(self, step: Step, result: StepResult) -> list[Output]:
        """Take in what the oldest step in flight brought."""
        assert self._flying and self._flying[0][0] is step, step
        brought = result.tokens.keys() | result.faults.keys()
        assert all(not work.draws or work.request in brought for work in step.works), (step, result)
        _, served = self._flying.popleft()
        outputs, faults = [], result.faults
        for work, request in zip(step.works, served, strict=True):
            request.flights -= 1
            request.drawn -= work.draws
            if request.finished:
                continue
            if faults and (fault := faults.get(work.request)) is not None:
                outputs.append(self._fail(request, fault))
                continue
            if work.epoch == request.epoch:
                assert request.computed == work.start, request
                request.computed += work.count
                self.cache.commit(request)
            if result.prompt_logprobs:
                request.prompt_logprobs += result.prompt_logprobs.get(work.request, ())
            drawn = (result.tokens[work.request],) if work.draws else ()
            request.tokens += drawn
            logprobs = (result.logprobs[work.request],) if drawn and work.request in result.logprobs else ()
            reason = self._end(request, work, complete=work.request in result.complete)
            if reason is not None:
                self._finish(request, reason)
            if drawn or reason is not None:
                outputs.append(_output(request, drawn, logprobs))
        return outputs

    def _end(self, request: Request, work: Work, *, complete: bool) -> FinishReason | None:
        """Why a request ends with a step that has landed, if it does; `complete`: nothing may follow."""
        if work.draws and (complete or request.tokens[-1] in request.stop_ids):
            return "stop"
        if request.limit:
            return "length" if request.produced >= request.limit else None
        return "length" if work.start + work.count == request.prompt else None

    def _fail(self, request: Request, fault: Fault) -> Output:
        """End a request that a step could not draw for; where numbers were broken, no cached prefix stays."""
        self._finish(request, "error")
        if fault == "logits":
            self.stats.corrupted += 1
            self.cache.forget()
        return _output(request, ())._replace(fault=fault)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish = reason
        del self._unfinished[request.id]
        if request.slot is None:
            self._waiting.remove(request)
            self.cache.release(request)
        else:
            self._vacate(request)

    def _vacate(self, request: Request) -> None:
        """Take slot and pages from a running request."""
        assert request.slot is not None, request
        self.cache.release(request)
        self._running.remove(request)
        self._slots.append(request.slot)
        request.slot = None
        request.held = False

    def abandon(self) -> list[Output]:
        """Forget the steps in flight after one of them failed, and return the outputs of the requests it took along.

        Those with a row in a step in flight are aborted. It is not known what the failed step and those after it have
        written, or where: so all others start again, and no cached prefix stays.
        """
        lost = {request: None for _, served in self._flying for request in served}
        self._flying.clear()
        outputs = []
        for request in lost:
            if not request.finished:
                self._finish(request, "abort")
                outputs.append(_output(request, ()))
        while self._running:
            self._preempt(self._running[-1])
        self.cache.forget()
        return outputs

    def check(self) -> None:
        """Assert the invariants of queues, slots, requests and pages."""
        self.cache.check(self._running)
        slots = [request.slot for request in self._running if request.slot is not None]
        assert sorted(slots + self._slots) == list(range(self._limits.max_seqs)), (slots, self._slots)
        everyone = [*self._running, *self._waiting]
        assert sorted(everyone, key=_number) == list(self._unfinished.values()), "lost or twice"
        queues = (self._running, self._waiting) if self._priorities else (everyone,)
        assert all(queue == sorted(queue, key=_order) for queue in queues), "out of order"
        for request in self._unfinished.values():
            rows = sum(request in served for _, served in self._flying)
            assert request.flights == rows and not request.finished, request
            assert 0 <= request.computed <= request.issued <= request.known, request
        for request in self._waiting:
            assert request.slot is None and request.issued == 0 and not request.held, request


def _order(request: Request) -> tuple[int, int]:
    return request.order


def _number(request: Request) -> int:
    return request.number


def _admission(request: Request) -> Admission:
    sampling = request.sampling
    assert sampling.seed is not None, request
    looked_up = sampling.penalizes or request.bad_words or request.grammar or request.reduce == "logprobs"
    return Admission(
        sampling=sampling,
        seed=sampling.seed,
        prompt=request.prompt,
        reduce=request.reduce,
        history=tuple(request.tokens) if looked_up else (),
        stop_ids=tuple(sorted(request.stop_ids)) if sampling.min_tokens else (),
        bad_words=request.bad_words,
        grammar=request.grammar,
    )


def _output(request: Request, drawn: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...] = ()) -> Output:
    produced = len(request.tokens) - request.prompt
    scored = None
    if request.reduce == "logprobs" and produced == len(drawn):
        scored = tuple(request.prompt_logprobs)
    usage = Usage(request.prompt, produced, request.cached)
    return Output(request.id, drawn, request.finish, usage, logprobs, scored)


def mixed(seed: int, number: int) -> int:
    """Return the seed, 63 bits, of the request with this number.

    Source: SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    """
    mask = 2**64 - 1
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return (z ^ z >> 31) >> 1
