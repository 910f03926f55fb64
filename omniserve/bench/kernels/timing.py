"""Microseconds of GPU work: CUDA graphs replayed, so that the host's time to launch does not count."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

COLD = 200e6
"""Bytes that are read between two calls with the same inputs: several times an L2 cache."""

LEAST = 300.0
"""Microseconds that a captured graph takes at least: short calls are repeated in it."""

AWAKE = 0.05
"""Seconds that the card is kept busy before a measurement: an idle H200 was seen at 345 of its 1,980 MHz."""

MOST = 5e5
"""Microseconds after which there are no more than three replays."""


def microseconds(calls: Sequence[Callable[[], Any]], *, replays: int) -> float:
    """Return the median time of one of the calls, which have inputs of their own and run one after the other.

    They must not look at the device from the host. Three replays warm up.
    """
    _run(calls)  # kernels are compiled
    _wake()
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
    _wake()
    for _ in range(3):
        graph.replay()
    return _timed(graph.replay, replays=replays) / (rounds * len(calls))


def _wake() -> None:
    """Keep the card busy until its clock is that of work."""
    square = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    ended = time.perf_counter() + AWAKE
    while time.perf_counter() < ended:
        for _ in range(4):
            square @ square
        torch.cuda.synchronize()


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
