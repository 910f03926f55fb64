"""One request at a time: time to the first token, and from token to token, against the length of its context.

A real prompt fills the context; sampling and the making of text are inside the clock, which is the reader's. The prefix
cache must be off, or all but the first prompt would be found in it.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from omniserve.base.types import SamplingParams
from omniserve.bench.throughput import random_prompts

if TYPE_CHECKING:
    from omniserve.llm import LLM

SETTLING = 8
"""Tokens after the first one whose gaps do not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """One length of context; medians over the repeats, in seconds.

    first      from submit to the first token
    mean, p99  of the gaps between the tokens that count
    """

    context: int
    first: float
    mean: float
    p99: float


def measure(
    llm: "LLM",
    context: int,
    *,
    tokens: int,
    repeats: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Latency:
    """Return the latencies behind a prompt of so many tokens; `tokens` gaps count, after `SETTLING` ones."""
    count = 1 + SETTLING + tokens
    firsts, gaps = [], []
    for repeat, prompt in enumerate(random_prompts(repeats, context, llm.spec.vocab, seed)):
        times = _times(llm, prompt, count)
        firsts.append(times[1] - times[0])
        gaps.append([after - before for before, after in itertools.pairwise(times[1 + SETTLING :])])
        if on_progress is not None:
            on_progress(repeat + 1, repeats)
    return Latency(
        context=context,
        first=statistics.median(firsts),
        mean=statistics.median(statistics.fmean(each) for each in gaps),
        p99=statistics.median(float(np.percentile(each, 99)) for each in gaps),
    )


def warm_up(llm: "LLM", longest: int, seed: int) -> None:
    """Run a prompt of two of the engine's largest steps, so that nothing is compiled or captured in a measurement."""
    (prompt,) = random_prompts(1, min(2 * llm.config.limits.max_step_tokens, longest), llm.spec.vocab, seed + 1)
    _times(llm, prompt, 1 + SETTLING)


def _times(llm: "LLM", prompt: list[int], count: int) -> list[float]:
    """Return the moment of the submit and those at which each of `count` tokens was there as text."""
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    times = [time.perf_counter()]
    for delta in llm.stream(prompt, params):
        times += [time.perf_counter()] * len(delta.token_ids)
    assert len(times) == 1 + count, (len(times), count)
    return times
