"""What happened lately: tokens per second, and percentiles of latencies."""

import bisect
import time
from collections import deque

PERCENTILES = (50, 90, 99)


class Window:
    """The latest values of the last seconds, at most `most` of them."""

    def __init__(self, most: int, *, seconds: float = 10.0) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=most)
        self._seconds = seconds

    def add(self, value: float) -> None:
        """Take in a value."""
        self._values.append((time.monotonic(), value))

    def percentiles(self) -> dict[str, float] | None:
        """Return p50, p90 and p99 in milliseconds (nearest rank), None where nothing happened lately."""
        since = time.monotonic() - self._seconds
        values = sorted(value for when, value in self._values if when >= since)
        if not values:
            return None
        return {f"p{share}": round(1000 * values[(len(values) - 1) * share // 100], 3) for share in PERCENTILES}


class Recent:
    """Latencies of the last ten seconds, and tokens per second over a few."""

    def __init__(self) -> None:
        self.ttft = Window(256)
        self.itl = Window(1024)
        self._prompt = 0
        self._produced = 0
        self._marks: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)], maxlen=16)

    def count(self, prompt: int, produced: int) -> None:
        """Count tokens."""
        self._prompt += prompt
        self._produced += produced

    def mark(self) -> None:
        """Remember now; called about once a second."""
        self._marks.append((time.monotonic(), self._prompt, self._produced))

    def speeds(self, seconds: float = 10.0) -> tuple[float, float]:
        """Return prompt and produced tokens per second since the mark that is about so old."""
        now = time.monotonic()
        times = [mark[0] for mark in self._marks]
        then, prompt, produced = self._marks[min(bisect.bisect(times, now - seconds), len(times) - 1)]
        spent = max(now - then, 1e-3)
        return (self._prompt - prompt) / spent, (self._produced - produced) / spent
