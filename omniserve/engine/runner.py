"""One rank: the model, its pages, and the state of its request slots."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from omniserve.base.config import TILE
from omniserve.base.types import Admission, Fault, Step, StepResult, TokenLogprobs, Work
from omniserve.engine.assemble import KEEPING, Assembler
from omniserve.engine.grammar import Matchers, Taking
from omniserve.engine.graphs import PRODUCED, DecodeGraphs, MixedGraphs, Numbers
from omniserve.engine.mixture import Mixture, decodes
from omniserve.models.decoder import Decoder, LayerStores
from omniserve.ops.batch import Most, Workspace
from omniserve.ops.sample import CORRUPTED, EXHAUSTED, Logprobs, SampleState, logprobs, sample, warm
from omniserve.ops.transfer import Arriving, sent
from omniserve.sparsity.policy import Policy

_FAULTS: dict[int, Fault] = {CORRUPTED: "logits", EXHAUSTED: "nothing"}
PROMPTS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Tokens of the prompts that a GPU's kernels are compiled with before the first request."""
ROWS = (2, 3, 4, 8, 9, 16, 17, 32)
LENGTHS = (40, 1000, 1024)
REPLAYED = 41
"""Prompts of a step, and their tokens, likewise: launches differ by what divides these numbers."""
SCORE_TILE = 128
"""Positions whose logits a reducer gets at once; bounds the memory of large vocabularies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """Log-probabilities of tokens on their way to the host; per token its request and how many of `top` it gets."""

    requests: tuple[str, ...]
    counts: tuple[int, ...]
    tokens: Arriving
    logprob: Arriving
    rank: Arriving
    top_ids: Arriving
    top_logprobs: Arriving

    @staticmethod
    def of(requests: tuple[str, ...], counts: tuple[int, ...], tokens: Tensor, values: Logprobs) -> "Listed":
        """Return what begins its way to the host."""
        return Listed(
            requests=requests,
            counts=counts,
            tokens=Arriving(tokens),
            logprob=Arriving(values.logprob),
            rank=Arriving(values.rank),
            top_ids=Arriving(values.top_ids),
            top_logprobs=Arriving(values.top_logprobs),
        )

    def entries(self) -> Iterator[tuple[str, TokenLogprobs]]:
        """Wait for the step and yield each token's entry."""
        ids, tops = self.top_ids.tolist(), self.top_logprobs.tolist()
        chosen = zip(self.tokens.tolist(), self.logprob.tolist(), self.rank.tolist(), strict=True)
        for place, (token, logprob, rank) in enumerate(chosen):
            top = tuple(zip(ids[place], tops[place], strict=True))[: self.counts[place]]
            yield self.requests[place], TokenLogprobs(token=token, logprob=logprob, rank=rank, top=top)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What a step has brought, on its way to the host: tokens int64 [S] and whose they are, log-probabilities.

    taking  the tokens of requests with a grammar, on their way to the host
    """

    requests: tuple[str, ...] = ()
    tokens: Arriving | None = None
    logprobs: Listed | None = None
    prompt_logprobs: tuple[Listed, ...] = ()
    taking: Taking | None = None

    def result(self) -> StepResult:
        """Wait for the step and return what it brought."""
        drawn = dict(zip(self.requests, [] if self.tokens is None else self.tokens.tolist(), strict=True))
        faults = {request: _FAULTS[token] for request, token in drawn.items() if token in _FAULTS}
        complete = frozenset[str]()
        if self.taking is not None:
            complete, failed = self.taking.verdicts()
            faults |= failed  # a grammar that has failed may have left nothing
        prompts: defaultdict[str, list[TokenLogprobs]] = defaultdict(list)
        for listed in self.prompt_logprobs:
            for request, entry in listed.entries():
                prompts[request].append(entry)
                if not math.isfinite(entry.logprob):
                    faults[request] = "logits"
        return StepResult(
            tokens={request: token for request, token in drawn.items() if request not in faults},
            logprobs={} if self.logprobs is None else dict(self.logprobs.entries()),
            prompt_logprobs={request: tuple(entries) for request, entries in prompts.items()},
            faults=faults,
            complete=complete,
        )


def _idle_work(slot: int, count: int, start: int = 0, prompt: int | None = None) -> Work:
    return Work(
        request="", slot=slot, start=start, count=count, prompt=start + count if prompt is None else prompt,
        new_tokens=(0,) * count, logits="none", draws=False,
    )  # fmt: skip


class Runner:
    """Runs steps in order. Mutable: pages, page tables, last tokens and what sampling needs by slot."""

    def __init__(
        self,
        model: Decoder,
        stores: LayerStores,
        policy: Policy,
        *,
        slots: int,
        max_len: int,
        max_step_tokens: int,
    ) -> None:
        device, dtype = model.embedding.device, model.embedding.dtype
        spec = model.spec
        self.model = model
        self.stores = stores
        self.assembler = Assembler(policy, slots=slots, max_len=max_len, device=device)
        self._sampling = SampleState(slots, spec.vocab, device)
        self._matchers = Matchers(spec.vocab, device)
        self._logprobs: dict[int, int] = {}  # by slot, how many are asked for
        # A step that is full of prompts and produced tokens is padded beyond its budget, to be one of those captured.
        room = max_step_tokens + min(slots, PRODUCED[-1])
        self._work = Workspace(out=torch.empty(room, spec.heads, spec.head_dim, dtype=dtype, device=device))
        self._most = max_step_tokens
        self._scored: dict[int, Admission] = {}
        self._device = device
        self._max_len = max_len
        self._graphs: DecodeGraphs | None = None
        self._keeping: DecodeGraphs | None = None
        self._mixed: MixedGraphs | None = None

    @torch.inference_mode()
    def run(self, step: Step) -> Drawn:
        """Run one step; what it drew stays on the device until the result is asked for."""

        for work in step.works:
            if work.admission is not None:
                self._admit(work.slot, work.admission)
        self.assembler.move(step.moves)
        if all(map(decodes, step.works)):
            return self._sample(step.works, *self._decode(step.works))
        hidden, spans = self._mix(step)
        scored: list[Listed] = []
        for number, work in enumerate(step.works):
            if work.logits == "all":
                scored += self._score(work, hidden, spans[number])
        return self._draw(step.works, hidden, [each[-1].stop - 1 for each in spans], tuple(scored))

    @torch.inference_mode()
    def prepare(self, *, graphs: bool, on_done: Callable[[str, int, int], None] | None = None) -> None:
        """Run steps of no request, so that no kernel is compiled, and no graph captured, within one.

        on_done  called as on_done(phase, done, total): kernels by steps that have run, graphs by captures
        """
        on_done = on_done or (lambda phase, done, total: None)
        model, idle, most = self.model, self.assembler.idle, self._most
        longest = self._max_len
        sizes = sorted({most} | {min(size + odd, most) for size in PROMPTS for odd in (0, 1)})
        steps = [[min(longest, tokens - first) for first in range(0, tokens, longest)] for tokens in sizes]
        steps += [[min(longest, size)] * rows for rows in ROWS for size in LENGTHS if rows * min(longest, size) <= most]
        # The largest first: torch keeps their memory and cuts what the others ask for from it. Ends of the longest
        # prompts, whose keys take the most room beside the activations, before all.
        end = min(longest, LENGTHS[0])
        far = _idle_work(idle, end, (longest - end) // TILE * TILE)
        batches = [[far] * min(rows, most // end) for rows in (min(idle, ROWS[-1]), 1)]
        border = self.assembler.tiles_from
        if border is not None and longest > border:  # tiles alone, of one prompt, with the most pages to choose from
            first = max(border, (longest - most) // TILE * TILE)
            batches.insert(0, [_idle_work(idle, min(most, longest - first), first)])
        steps.sort(key=sum, reverse=True)
        batches += [[_idle_work(idle, count) for count in chunks] for chunks in steps]
        # Produced tokens computed again after a preemption: more rows of one token than `max_num_seqs` may be.
        batches.append([_idle_work(idle, min(REPLAYED, longest, most), prompt=1)])
        if graphs:  # first: a capture gives back all memory that torch keeps for later, and the plan would not count it
            self._capture(partial(on_done, "graphs"), partial(on_done, "mixed graphs"))
        for done, works in enumerate(batches, 1):
            assembled = self.assembler.assemble(Step(works=tuple(works)), self._work)
            hidden = model.hidden(assembled.batch, self.stores)
            model.logits(hidden[list(assembled.ends)])
            if len(hidden) == most:  # what a step takes at most: all its tokens, and a draw for every sequence
                warm(model.logits(hidden[:idle]))
            del hidden
            on_done("kernels", done, len(batches))

    def _mix(self, step: Step) -> tuple[Tensor, Sequence[Sequence[slice]]]:
        """Return the residual stream [T, C] of any step, and per work where its tokens are, in position order."""
        mixture = None if self._mixed is None else Mixture.of(step.works, self.assembler.tiles_from)
        found = None if self._mixed is None or mixture is None else self._mixed.run(mixture)
        if found is not None:
            return found[0], [(span,) for span in found[1]]
        assembled = self.assembler.assemble(step, self._work)
        return self.model.hidden(assembled.batch, self.stores), assembled.spans

    def _mixture(self, numbers: Sequence[Tensor], most: Most) -> Tensor:
        """Return the residual stream of a padded mixture; nothing in it looks from the host."""
        return self.model.hidden(self.assembler.mix(numbers, most, self._work), self.stores)

    def _capture(self, decodes: Callable[[int, int], None], mixed: Callable[[int, int], None]) -> None:
        """Capture all steps that are replayed; each kind tells its own progress."""
        idle, device, pool = self.assembler.idle, self._device, torch.cuda.graph_pool_handle()
        row, most = (idle, 0, 0), self._work.out.shape[0]
        self._graphs = DecodeGraphs(self._produce, row, most=idle, device=device, pool=pool, on_done=decodes)
        if self.assembler.keeps([1], [0]):
            self._keeping = DecodeGraphs(self._keep, row, most=min(idle, KEEPING), device=device, pool=pool)
        self._mixed = MixedGraphs(self._mixture, idle, seqs=idle, tokens=most, device=device, pool=pool, on_done=mixed)

    def _decode(self, works: Sequence[Work]) -> tuple[Tensor, Tensor]:
        """Return the logits [R, V] of works of one produced position each, and their slots on the device."""
        lists = [work.slot for work in works], [work.start for work in works], [work.prompt for work in works]
        keeps = self.assembler.keeps(*lists[1:])
        graphs = self._keeping if keeps else self._graphs
        if graphs is not None and len(works) <= graphs.most:
            return graphs.run(lists)
        slots, positions, prompts = sent(lists, self._device)
        return (self._keep if keeps else self._produce)((slots, positions, prompts)), slots

    def _produce(self, numbers: Numbers) -> Tensor:
        """Return the logits of rows that read the last tokens of their slots; nothing in it looks from the host."""
        return self.model.produce(self.assembler.decode(*numbers, self._work, keeps=False), self.stores)

    def _keep(self, numbers: Numbers) -> Tensor:
        """Do the same for rows none of which chooses pages: nothing in it scores any."""
        return self.model.produce(self.assembler.decode(*numbers, self._work, keeps=True), self.stores)

    def _admit(self, slot: int, admission: Admission) -> None:
        self._sampling.set(slot, admission)
        self._matchers.set(slot, admission)
        wanted = admission.sampling.logprobs
        if wanted is None:
            self._logprobs.pop(slot, None)
        else:
            self._logprobs[slot] = wanted
        if admission.reduce is None:
            self._scored.pop(slot, None)
        else:
            self._scored[slot] = admission

    def _score(self, work: Work, hidden: Tensor, spans: Sequence[slice]) -> Iterator[Listed]:
        """Reduce the logits of a work's positions; what the built-in reducer makes of them is yielded."""
        admission = self._scored[work.slot]
        assert admission.reduce is not None, work
        first = work.start
        for span in spans:
            for begin in range(span.start, span.stop, SCORE_TILE):
                end = min(begin + SCORE_TILE, span.stop)
                positions = range(first, first + end - begin)
                first = positions.stop
                logits = self.model.logits(hidden[begin:end])
                if admission.reduce != "logprobs":
                    admission.reduce(torch.arange(positions.start, positions.stop, device=hidden.device), logits)
                    continue
                targets = admission.history[positions.start + 1 : min(positions.stop + 1, admission.prompt)]
                if targets:
                    count = admission.sampling.prompt_logprobs or 0
                    yield self._listed(work, logits[: len(targets)], targets, count)

    def _listed(self, work: Work, logits: Tensor, targets: Sequence[int], count: int) -> Listed:
        (tokens,) = sent([targets], logits.device)
        size = len(targets)
        return Listed.of((work.request,) * size, (count,) * size, tokens, logprobs(logits, tokens, count))

    def _draw(self, works: Sequence[Work], hidden: Tensor, ends: Sequence[int], scored: tuple[Listed, ...]) -> Drawn:
        drawing = [(work, end) for work, end in zip(works, ends, strict=True) if work.draws]
        if not drawing:
            return Drawn(prompt_logprobs=scored)
        works = [work for work, _ in drawing]
        last, slots = sent([[end for _, end in drawing], [work.slot for work in works]], hidden.device)
        return self._sample(works, self.model.logits(hidden[last]), slots, scored)

    def _sample(self, works: Sequence[Work], logits: Tensor, where: Tensor, scored: tuple[Listed, ...] = ()) -> Drawn:
        """Draw a token for each work from its row of logits [S, V]; `where`: their slots on the device, int64 [S]."""
        slots = [work.slot for work in works]
        rows = self._sampling.rows(slots, [work.start + work.count for work in works])
        masked = self._matchers.rows(slots)
        tokens = sample(logits, rows if masked is None else replace(rows, masked=masked))
        valid = tokens.clamp(min=0)  # what fails may have a row in the next step all the same
        self._sampling.note(rows, valid)
        self.assembler.last_token[where] = valid
        requests = tuple(work.request for work in works)
        taking = self._matchers.note(requests, slots, tokens)
        listed = self._of_draws(requests, slots, logits, valid)
        return Drawn(requests=requests, tokens=Arriving(tokens), logprobs=listed, prompt_logprobs=scored, taking=taking)

    def _of_draws(
        self, requests: tuple[str, ...], slots: Sequence[int], logits: Tensor, tokens: Tensor
    ) -> Listed | None:
        asking = [row for row, slot in enumerate(slots) if slot in self._logprobs] if self._logprobs else []
        if not asking:
            return None
        counts = tuple(self._logprobs[slots[row]] for row in asking)
        (rows,) = sent([asking], logits.device)
        chosen = tokens[rows]
        names = tuple(requests[row] for row in asking)
        return Listed.of(names, counts, chosen, logprobs(logits[rows], chosen, max(counts)))
