"""Microseconds of GPU work: CUDA graphs replayed, so that the host's time to launch does not count."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

COLD = 200e6
"""Bytes that are read between two calls with the same inputs: several times an L2 cache."""

LEAST = 1000.0
"""Microseconds that a captured graph takes at least: short calls are repeated in it."""

AWAKE = 0.04
"""Seconds that a graph is replayed before it is measured: an idle H200 was seen at 345 of its 1,980 MHz. Other, heavier
work for that would take the card to its power limit, and lower clocks would be those of the measurement."""

MOST = 5e5
"""Microseconds after which there are no more than three replays."""

WARM = 3
"""Replays that do not count."""


def microseconds(calls: Sequence[Callable[[], Any]], *, replays: int) -> float:
    """Return the median time of one of the calls, which have inputs of their own and run one after the other.

    They must not look at the device from the host.
    """
    _run(calls)  # kernels are compiled
    graph = _captured(calls, rounds=1)
    _wake(graph)
    once = statistics.median(_replayed(graph, 3))
    rounds = max(1, min(50, int(LEAST / max(once, 1.0))))
    if rounds > 1:
        graph = _captured(calls, rounds=rounds)
        _wake(graph)
    replays = min(replays, max(3, int(MOST / max(once * rounds, 1.0))))
    return statistics.median(_replayed(graph, WARM + replays)[WARM:]) / (rounds * len(calls))


def _captured(calls: Sequence[Callable[[], Any]], *, rounds: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch says no more
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _run(calls)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            _run(calls)
    return graph


def _replayed(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    """Return the microseconds from the end of a replay to the end of the next one; the host is ahead of the card."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    marks[-1].synchronize()
    return [1000 * before.elapsed_time(after) for before, after in itertools.pairwise(marks)]


def _wake(graph: torch.cuda.CUDAGraph) -> None:
    """Keep the card busy until its clock is that of this work."""
    ended = time.perf_counter() + AWAKE
    while time.perf_counter() < ended:
        graph.replay()
        torch.cuda.synchronize()


def _run(calls: Sequence[Callable[[], Any]]) -> None:
    for call in calls:
        call()
