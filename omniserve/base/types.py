"""The words that the engine's floors exchange: requests, steps, results. Plain Python, no torch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from omniserve.base.errors import RequestError

PAGE = 64
"""Tokens of a page. It is the format, not a setting (formats.md)."""

Reducer = Callable[[Any, Any], None]
"""Called as reduce(positions int64 [t], logits [t, V]) on the device of rank 0."""

FinishReason = Literal["stop", "length", "abort"]


class Kind(StrEnum):
    """The two kinds of key heads; a dense model has retrieval heads alone."""

    RETRIEVAL = "retrieval"
    STREAMING = "streaming"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when a request ends; validates itself.

    temperature 0 is greedy. `seed` None draws one at admission. `stop` strings are found by the text
    floor; `stop_token_ids` by the scheduler. `max_tokens` None means the rest of the context.
    Raises RequestError with what was given and what is allowed.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def need(condition: bool, name: str, allowed: str) -> None:
            if not condition:
                raise RequestError(f"{name}={getattr(self, name)!r}: must be {allowed}")

        need(_finite(self.temperature) and 0 <= self.temperature <= 2, "temperature", "0 to 2")
        need(_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        need(_integer(self.top_k) and self.top_k >= -1, "top_k", "a whole number, -1 or 0 for off")
        need(_finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", "0 to 1")
        need(
            self.seed is None or (_integer(self.seed) and -(2**63) <= self.seed < 2**63),
            "seed",
            "a 64-bit whole number or None",
        )
        need(
            self.max_tokens is None or (_integer(self.max_tokens) and self.max_tokens >= 1),
            "max_tokens",
            "1 or more, or None for the rest of the context",
        )
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        need(
            all(isinstance(s, str) and s for s in self.stop),
            "stop",
            "a non-empty string or a list of them",
        )
        object.__setattr__(self, "stop", tuple(self.stop))
        need(
            all(_integer(t) and t >= 0 for t in self.stop_token_ids),
            "stop_token_ids",
            "token ids, 0 or more",
        )
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
    limit       largest number of produced tokens
    score       positions' logits are wanted (`reduce`), nothing is sampled when limit is 0
    scored      prompt tokens whose logits steps were asked for: after a preemption they are not asked for again
    cached      tokens found in the prefix cache at the first start
    """

    id: str
    tokens: list[int]
    prompt: int
    sampling: SamplingParams
    stop_ids: frozenset[int] = frozenset()
    limit: int = 16
    reduce: Reducer | None = None
    salt: bytes = b""
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
    preemptions: int = 0
    finish: FinishReason | None = None

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
    """What a rank learns once, when a request takes a slot."""

    sampling: SamplingParams
    seed: int
    prompt: int
    reduce: Reducer | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
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
    count: int
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
    """Tokens drawn by a step, by request id."""

    tokens: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a step brought for one request; the text floor turns it into text."""

    request: str
    new_tokens: tuple[int, ...]
    finish: FinishReason | None
    usage: Usage


def check_prompt(ids: Sequence[int], vocab: int) -> None:
    """Raise RequestError unless `ids` is a non-empty list of token ids below `vocab`."""
    if not ids:
        raise RequestError("the prompt is empty: give at least one token")
    for position, token in enumerate(ids):
        if not _integer(token) or not 0 <= token < vocab:
            raise RequestError(
                f"token id {token!r} at position {position}: must be a whole number from 0 to {vocab - 1}"
            )
