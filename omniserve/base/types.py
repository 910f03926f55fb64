"""The words that the engine's floors exchange: requests, steps, results. Plain Python, no torch."""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple

from omniserve.base.errors import RequestError
from omniserve.base.structured import Grammar, StructuredOutputs

PAGE = 64
"""Tokens of a page. It is the format, not a setting (formats.md)."""

Reducer = Callable[[Any, Any], None]
"""Called as reduce(positions int64 [t], logits [t, V]) on the device of rank 0."""

Reduce = Reducer | Literal["logprobs"]
"""What becomes of the logits of prompt positions: a function of this process, or a built-in reducer by its name.

logprobs  log-probabilities of the prompt's tokens, which come back with the step's result
"""

FinishReason = Literal["stop", "length", "abort", "error"]

Fault = Literal["logits", "nothing", "grammar"]
"""Why one request of a step fails, and no other one: see `FAULTS`."""

FAULTS: Mapping[Fault, str] = {
    "logits": "the model's logits for this request are not finite numbers",
    "grammar": "structured_outputs: the grammar needs more time or memory than it may have; make it simpler",
    "nothing": "the request leaves no token that may be drawn: allow another one",
}
"""What is said to who asked."""

COLDEST = 1e-5
"""A temperature below this one is greedy, as in vLLM."""


class Kind(StrEnum):
    """The two kinds of key heads; a dense model has retrieval heads alone."""

    RETRIEVAL = "retrieval"
    STREAMING = "streaming"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when a request ends; validates itself. Names and meanings are vLLM's.

    n                   answers to one prompt; with a seed, answer 0 has it and the others have seeds made from it
    temperature         0 is greedy
    top_k               0 or -1 is off
    repetition_penalty  divides positive logits and multiplies negative ones, of tokens in the prompt and produced
    presence_penalty    is subtracted from the logits of produced tokens; frequency_penalty once for each time
    logit_bias          id -> what is added to its logit
    allowed_token_ids   nothing else is drawn; None allows all
    bad_words           texts that are not produced; of one that is several tokens the last is banned after the others
    seed                None draws one at admission
    max_tokens          None means the rest of the context
    min_tokens          no end of sequence, stop token or stop string before so many tokens
    stop                strings, found by the text floor; `stop_token_ids` are found by the scheduler
    ignore_eos          the model's own end of sequence does not end the request
    include_stop_str_in_output, skip_special_tokens
                        whether the text holds what stopped it, and lacks special tokens
    detokenize          False: token ids alone, the text stays empty; goes without stop strings
    logprobs            how many of the likeliest tokens are listed beside each produced one (0: it alone); None is off
    prompt_logprobs     the same for the prompt's tokens
    structured_outputs  the form of the text; where nothing may follow any more the answer ends, whatever min_tokens is

    Raises RequestError with what was given and what is allowed.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        _check_form(self)
        _check_numbers(self)
        _check_lists(self)

    @property
    def greedy(self) -> bool:
        """True when the likeliest token is taken."""
        return self.temperature < COLDEST

    @property
    def penalizes(self) -> bool:
        """True when tokens are counted."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def _check_numbers(params: SamplingParams) -> None:
    need = _Need(params)
    need.whole("n", 1, 128)
    need.number("temperature", 0, 2)
    need.that(_finite(params.top_p) and 0 < params.top_p <= 1, "top_p", "above 0 and at most 1")
    need.that(_integer(params.top_k) and params.top_k >= -1, "top_k", "a whole number, -1 or 0 for off")
    need.number("min_p", 0, 1)
    repetition = params.repetition_penalty
    need.that(_finite(repetition) and 0 < repetition <= 2, "repetition_penalty", "above 0 and at most 2")
    need.number("presence_penalty", -2, 2)
    need.number("frequency_penalty", -2, 2)
    need.that(
        params.seed is None or (_integer(params.seed) and -(2**63) <= params.seed < 2**63),
        "seed",
        "a 64-bit whole number or None",
    )
    most, least = params.max_tokens, params.min_tokens
    need.that(
        most is None or (_integer(most) and most >= 1), "max_tokens", "1 or more, or None for the rest of the context"
    )
    need.that(_integer(least) and least >= 0, "min_tokens", "a whole number, 0 or more")
    need.that(most is None or least <= most, "min_tokens", f"at most max_tokens={most}")
    for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"):
        need.that(isinstance(getattr(params, name), bool), name, "true or false")
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None:
            need.whole(name, 0, 20, " or None")


def _check_lists(params: SamplingParams) -> None:
    """Check what holds several values; lists become tuples, None becomes empty, the bias a dict of its own."""
    need = _Need(params)
    if isinstance(params.stop, str):
        object.__setattr__(params, "stop", (params.stop,))
    for name, count in (("stop", 16), ("bad_words", 128)):
        words = need.listed(name, "a non-empty string or a list of them")
        need.that(all(isinstance(s, str) and s for s in words), name, "a non-empty string or a list of them")
        need.that(len(words) <= count, name, f"at most {count} strings, not {len(words)}")
        longest = max(map(len, words), default=0)
        need.that(name != "stop" or not words or params.detokenize, name, "empty with detokenize=False")
        need.that(longest <= 256, name, f"strings of at most 256 characters, not {longest}")
    for name, count in (("stop_token_ids", 128), ("allowed_token_ids", 4096)):
        if name == "allowed_token_ids" and params.allowed_token_ids is None:
            continue
        ids = need.listed(name, "token ids, 0 or more")
        need.that(all(_integer(t) and t >= 0 for t in ids), name, "token ids, 0 or more")
        need.that(len(ids) <= count, name, f"at most {count} ids, not {len(ids)}")
    need.that(params.allowed_token_ids != (), "allowed_token_ids", "at least one token id, or None for all")
    bias = {} if params.logit_bias is None else params.logit_bias
    allowed = "a mapping of token ids, 0 or more, to numbers from -100 to 100"
    need.that(isinstance(bias, Mapping), "logit_bias", allowed)
    need.that(all(_integer(t) and t >= 0 for t in bias), "logit_bias", allowed)
    need.that(all(_finite(v) and -100 <= v <= 100 for v in bias.values()), "logit_bias", allowed)
    need.that(len(bias) <= 1024, "logit_bias", f"at most 1024 ids, not {len(bias)}")
    object.__setattr__(params, "logit_bias", dict(bias))


def _check_form(params: SamplingParams) -> None:
    """Make what describes a form one."""
    form: object = params.structured_outputs
    if isinstance(form, Mapping):
        object.__setattr__(params, "structured_outputs", StructuredOutputs.of(form))
    elif form is not None:
        _Need(params).that(isinstance(form, StructuredOutputs), "structured_outputs", "StructuredOutputs or None")


class _Need:
    """Raises RequestError unless a parameter is as it must be."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params

    def that(self, condition: bool, name: str, allowed: str) -> None:
        if not condition:
            given = repr(getattr(self._params, name))
            raise RequestError(f"{name}={given if len(given) <= 100 else given[:97] + '...'}: must be {allowed}")

    def number(self, name: str, low: float, high: float) -> None:
        value = getattr(self._params, name)
        self.that(_finite(value) and low <= value <= high, name, f"{low} to {high}")

    def whole(self, name: str, low: int, high: int, more: str = "") -> None:
        value = getattr(self._params, name)
        self.that(_integer(value) and low <= value <= high, name, f"a whole number from {low} to {high}{more}")

    def listed(self, name: str, allowed: str) -> tuple[Any, ...]:
        """Make a field a tuple and return it."""
        value = getattr(self._params, name)
        several = isinstance(value, Sequence | Set) and not isinstance(value, str | bytes)
        self.that(value is None or several, name, allowed)
        found = () if value is None else tuple(value)
        object.__setattr__(self._params, name, found)
        return found


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """How likely the token at one position was: log-softmax of the model's logits, before anything is done to them.

    Neither temperature nor penalties, biases or bans show in it.

    rank  1 for the likeliest token; among equals the smaller id comes first
    top   the likeliest tokens, id and log-probability, in order of rank
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """How likely a token was, and its text: what a user sees of `TokenLogprobs`."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One sequence. Mutable, owned by the scheduler.

    tokens      prompt, then every produced token the host has seen
    prompt      how many of them are prompt
    issued      tokens handed to a step; computed: tokens whose step has landed
    drawn       tokens that steps in flight are drawing (0 or 1): known but not yet on the host
    flights     steps in flight that hold a row of this request
    epoch       counts preemptions; a step's work of an older epoch no longer advances `computed`
    slot        place in the ranks' per-request state, None while waiting
    held        the last produced token lies in `last_token[slot]` on the device
    stop_ids    tokens that end the request (end of sequence and the user's)
    bad_words   token sequences that are not produced
    limit       largest number of produced tokens
    grammar     what the produced text must follow, None for anything
    reduce      positions' logits are wanted, for this; nothing is sampled when limit is 0
    leader      an earlier request with the same prompt and priority, whose pages this one waits for
    priority    smaller ones are served first and preempted last; number: how many requests arrived before
    scored      prompt tokens whose logits steps were asked for: after a preemption they are not asked for again
    cached      tokens found in the prefix cache at the first start
    prompt_logprobs
                what the built-in reducer has brought: for the prompt's tokens after the first
    """

    id: str
    tokens: list[int]
    prompt: int
    sampling: SamplingParams
    stop_ids: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    limit: int = 16
    grammar: Grammar | None = None
    reduce: Reduce | None = None
    leader: "Request | None" = None
    salt: bytes = b""
    priority: int = 0
    number: int = 0
    arrival: float = 0.0
    issued: int = 0
    computed: int = 0
    drawn: int = 0
    flights: int = 0
    epoch: int = 0
    slot: int | None = None
    held: bool = False
    scored: int = 0
    cached: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    preemptions: int = 0
    finish: FinishReason | None = None

    @property
    def order(self) -> tuple[int, int]:
        """The smaller one is served first."""
        return self.priority, self.number

    @property
    def known(self) -> int:
        """Tokens that exist: on the host, or being drawn by a step in flight."""
        return len(self.tokens) + self.drawn

    @property
    def remaining(self) -> int:
        """Known tokens that no step has been given yet."""
        return self.known - self.issued

    @property
    def produced(self) -> int:
        """Produced tokens the host has seen."""
        return len(self.tokens) - self.prompt

    @property
    def finished(self) -> bool:
        """True once a finish reason is set; such a request is never planned again."""
        return self.finish is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What a rank learns once, when a request takes a slot.

    history    the tokens known so far, prompt and produced, if something is counted or looked up in them; else empty
    stop_ids   tokens that are not drawn before `sampling.min_tokens`
    bad_words  token sequences that are not produced
    grammar    what the produced text must follow; of this process, like a reducer
    """

    sampling: SamplingParams
    seed: int
    prompt: int
    reduce: Reduce | None = None
    history: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: Grammar | None = None


class Work(NamedTuple):
    """One request's share of a step: tokens at positions [start, start + count).

    prompt      prompt length: positions below it are prompt, the others produced (single-query rows)
    new_tokens  the tokens, from the host; empty for a decode row, which reads last_token[slot]
    logits      of which tokens logits are computed; "last" draws a token
    sync        the step must be committed before the next one is planned
    admission   set in the first work after the request took its slot
    """

    request: str
    slot: int
    start: int
    count: int  # type: ignore[assignment]  # tuple.count is of no use here
    prompt: int
    new_tokens: tuple[int, ...]
    logits: Literal["none", "last", "all"]
    draws: bool
    sync: bool = False
    epoch: int = 0
    admission: Admission | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PageMoves:
    """How one kind's page tables change before a step: (slot, logical page, physical page) and (slot, logical page)."""

    appended: tuple[tuple[int, int, int], ...] = ()
    freed: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one pass of the model does. Plain numbers, the only thing that is sent to ranks."""

    works: tuple[Work, ...]
    moves: tuple[PageMoves, ...] = ()
    tokens: int = 0

    @property
    def sync(self) -> bool:
        """True when the step must be committed before the next one is planned."""
        return any(work.sync for work in self.works)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step brought, by request id.

    tokens           the tokens drawn; logprobs: how likely they were, where that was asked for
    prompt_logprobs  how likely the prompt's tokens were, of the positions that the step scored
    faults           requests that fail, and why; no token of theirs was drawn
    complete         requests whose grammar lets nothing follow the token drawn
    """

    tokens: dict[str, int] = field(default_factory=dict)
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    complete: frozenset[str] = frozenset()


class Usage(NamedTuple):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Output(NamedTuple):
    """What a step brought for one request; the text floor turns it into text.

    logprobs         of the new tokens, if they were asked for; else empty
    prompt_logprobs  of the prompt's tokens after the first, once, with the first output of a request that wants them
    fault            why the request failed, with the finish reason "error"
    """

    request: str
    new_tokens: tuple[int, ...]
    finish: FinishReason | None
    usage: Usage
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    fault: Fault | None = None


def check_prompt(ids: Sequence[int], vocab: int) -> None:
    """Raise RequestError unless `ids` is a non-empty list of token ids below `vocab`."""
    if not ids:
        raise RequestError("the prompt is empty: give at least one token")
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab:
        return  # less than half the time of the loop, which finds the token to blame
    for position, token in enumerate(ids):
        if not _integer(token) or not 0 <= token < vocab:
            raise RequestError(
                f"token id {token!r} at position {position}: must be a whole number from 0 to {vocab - 1}"
            )
