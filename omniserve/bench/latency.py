"""What a load test says: throughput, percentiles of latencies, the share that kept its promises, and a picture."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omniserve.base.errors import ConfigError
from omniserve.bench.serving import Record, Run

METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between chunks",
    "e2el": "end to end",
}
PROMISED = ("ttft", "tpot", "e2el")
"""Metrics that a request can be held to; names as in vLLM."""


def goodput_terms(words: Sequence[str]) -> dict[str, float]:
    """Return milliseconds by metric, from words such as ttft:200. Raises ConfigError."""
    terms: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition(":")
        try:
            milliseconds = float(value)
        except ValueError:
            milliseconds = float("nan")
        if name not in PROMISED or not 0 < milliseconds < float("inf"):
            raise ConfigError(
                f"--goodput {word}: must be NAME:MILLISECONDS, for instance ttft:200 tpot:50; names are "
                f"{', '.join(PROMISED)}"
            )
        if name in terms:
            raise ConfigError(f"--goodput {word}: {name} is given twice")
        terms[name] = milliseconds
    return terms


def values(records: Sequence[Record]) -> dict[str, list[float]]:
    """Return the milliseconds of every metric."""
    return {
        "ttft": [1000 * one.ttft for one in records],
        "tpot": [1000 * one.tpot for one in records if one.tpot is not None],
        "itl": [1000 * gap for one in records for gap in one.gaps],
        "e2el": [1000 * one.latency for one in records],
    }


def kept(record: Record, terms: Mapping[str, float]) -> bool:
    """Whether a request kept all terms; one of a single token has no tpot to break."""
    found = {"ttft": record.ttft, "tpot": record.tpot, "e2el": record.latency}
    return all((value := found[name]) is None or 1000 * value <= most for name, most in terms.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The numbers of a run. percentiles: which ones; terms: the goodput's, in milliseconds by metric."""

    run: Run
    percentiles: tuple[float, ...]
    terms: Mapping[str, float]

    @property
    def good(self) -> list[Record]:
        """Requests that were answered."""
        return [record for record in self.run.records if record.error is None]

    def as_object(self) -> dict[str, Any]:
        """Return it for programs. Times in milliseconds unless they say seconds; rates per second."""
        run, good = self.run, self.good
        seconds = run.seconds if good else 0.0

        def rate(count: float) -> float:
            return count / seconds if seconds else 0.0

        prompt, produced = sum(one.prompt_tokens for one in good), sum(one.tokens for one in good)
        errors = Counter(one.error for one in run.records if one.error is not None)
        late = [1000 * max(0.0, one.sent - one.planned) for one in run.records]
        promised = sum(kept(one, self.terms) for one in good)
        return {
            "requests": len(run.records),
            "completed": len(good),
            "failed": len(run.records) - len(good),
            "errors": dict(errors.most_common()),
            "duration_seconds": seconds,
            "prompt_tokens": prompt,
            "cached_tokens": sum(one.cached_tokens for one in good),
            "output_tokens": produced,
            "other_length": sum(one.tokens != one.asked.output_len for one in good if one.counted),
            "tokens_counted_by_server": all(one.counted for one in good),
            "requests_per_second": rate(len(good)),
            "goodput_requests_per_second": rate(promised) if self.terms else None,
            "goodput_share": promised / len(run.records) if self.terms else None,
            "goodput_terms_ms": dict(self.terms),
            "output_tokens_per_second": rate(produced),
            "total_tokens_per_second": rate(prompt + produced),
            "most_at_once": most_at_once(good),
            **{f"{name}_ms": self._spread(found) for name, found in values(good).items()},
            "sent_late_ms": self._spread(late) if any(one.asked.at for one in run.records) else None,
            "client_lag_ms": self._spread([1000 * one for one in run.lag]),
        }

    def _spread(self, found: Sequence[float]) -> dict[str, float] | None:
        if not found:
            return None
        spread = {"mean": float(np.mean(found)), "std": float(np.std(found))}
        for percentile in self.percentiles:
            spread[f"p{percentile:g}"] = float(np.percentile(found, percentile))
        return spread | {"max": max(found)}


def most_at_once(records: Sequence[Record]) -> int:
    """Return how many requests were under way at the busiest moment."""
    return max((count for _, count in _under_way(records)), default=0)


def _under_way(records: Sequence[Record]) -> list[tuple[float, int]]:
    """Return how many requests were under way, from each moment at which that changed."""
    changes = [(one.sent, 1) for one in records] + [(one.sent + one.latency, -1) for one in records]
    made, count = [], 0
    for moment, change in sorted(changes):
        count += change
        made.append((moment, count))
    return made


def plot(report: Report, path: Path, *, title: str) -> None:
    """Write a picture: distributions of the latencies, and requests and tokens over time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    found = values(report.good)
    for place, (name, words) in enumerate(METRICS.items(), start=1):
        axes = figure.add_subplot(2, 3, place)
        _distribution(axes, found[name], f"{name.upper()}: {words}", report.terms.get(name))
    _time_line(figure.add_subplot(2, 3, 5), report.good)
    _rate_line(figure.add_subplot(2, 3, 6), report.good)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the plot cannot be written: {error}") from None


def _distribution(axes: Any, found: Sequence[float], title: str, most: float | None) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("ms")
    axes.set_ylabel("share")
    axes.grid(alpha=0.3)
    if found:
        ordered = np.sort(found)
        axes.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post")
        axes.set_ylim(0, 1)
    if most is not None:
        axes.axvline(most, color="tab:red", linestyle="--", label=f"{most:g} ms")
        axes.legend(fontsize=8)


def _time_line(axes: Any, records: Sequence[Record]) -> None:
    axes.set_title("requests under way", fontsize=10)
    axes.set_xlabel("s")
    axes.grid(alpha=0.3)
    line = _under_way(records)
    if line:
        start = line[0][0]
        axes.step([moment - start for moment, _ in line], [count for _, count in line], where="post")
        axes.set_ylim(bottom=0)


def _rate_line(axes: Any, records: Sequence[Record]) -> None:
    axes.set_title("chunks per second", fontsize=10)
    axes.set_xlabel("s")
    axes.grid(alpha=0.3)
    moments = [one.first + passed for one in records if one.first is not None for passed in (0.0, *np.cumsum(one.gaps))]
    if moments:
        start = min(one.sent for one in records)
        length = max(moments) - start
        bins = max(10, min(100, int(length)))
        counts, edges = np.histogram(np.array(moments) - start, bins=bins, range=(0, max(length, 1e-3)))
        axes.step(edges[:-1], counts / (edges[1] - edges[0]), where="post")
        axes.set_ylim(bottom=0)
