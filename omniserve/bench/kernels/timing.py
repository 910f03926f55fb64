"""Microseconds of GPU work: CUDA graphs replayed, so that the host's time to launch does not count."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

COLD = 200e6
"""Bytes that are read between two calls with the same inputs: several times an L2 cache."""

LEAST = 300.0
"""Microseconds that a captured graph takes at least: short calls are repeated in it."""

MOST = 5e5
"""Microseconds after which there are no more than three replays."""


def microseconds(calls: Sequence[Callable[[], Any]], *, replays: int) -> float:
    """Return the median time of one of the calls, which have inputs of their own and run one after the other.

    They must not look at the device from the host. Three replays warm up.
    """
    _run(calls)  # kernels are compiled
    first = _timed(lambda: _run(calls), replays=1)
    rounds = max(1, min(50, int(LEAST / max(first, 1.0))))
    replays = min(replays, max(3, int(MOST / max(first, 1.0))))
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch says no more
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _run(calls)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            _run(calls)
    for _ in range(3):
        graph.replay()
    return _timed(graph.replay, replays=replays) / (rounds * len(calls))


def _run(calls: Sequence[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def _timed(run: Callable[[], None], *, replays: int) -> float:
    times: list[float] = []
    for _ in range(replays):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(1000 * began.elapsed_time(ended))
    return statistics.median(times)
