"""Prometheus metrics, by vLLM's names behind our prefix. No label but the model's name and closed sets of words."""

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from omniserve.base.config import EngineConfig, Sparsity
from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE, Kind
from omniserve.base.version import VERSION
from omniserve.engine.process import Landed, Ready, Stats
from omniserve.server.answers import Choice
from omniserve.server.recent import Recent

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The classic text format: in OpenMetrics the library would rewrite the colon of our prefix."""

_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_ITL = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
_E2E = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_STEP = tuple(float(2**power) for power in range(15))
_RATIO = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
_BITS = {"w4a8": 4, "w8a8": 8, "w16a16": 16, "kv4": 4, "kv8": 8, "kv16": 16, "kv32": 32}

REJECTIONS = ("reqs", "tokens", "draining", "loading")
PHASES = ("open", "load", "prepare", "warmup")
"""Of a start: find and download, read and quantize, compile kernels and capture decode steps, a first request."""
ENDS = ("stop", "length", "abort", "error")


class Tally(Collector):
    """A histogram for what happens with every token: a value costs a tenth of what the library's own takes."""

    def __init__(self, name: str, text: str, model: str, edges: Sequence[float]) -> None:
        self._name, self._text, self._model = name, text, model
        self._edges = tuple(edges)
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0

    def add(self, value: float, times: int) -> None:
        """Take in a value so many times."""
        self._counts[bisect.bisect_left(self._edges, value)] += times
        self._sum += value * times

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the one metric."""
        names = map(floatToGoString, (*self._edges, float("inf")))
        found = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        found.add_metric(
            [self._model], list(zip(names, itertools.accumulate(self._counts), strict=True)), sum_value=self._sum
        )
        yield found


class Metrics:
    """What the server counts and measures."""

    def __init__(self, model: str, prefix: str = "omniserve") -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._prefix = prefix
        self._model = model
        self.running = self._gauge("num_requests_running", "Requests with a slot")
        self.waiting = self._gauge("num_requests_waiting", "Requests without a slot")
        self.usage = self._gauge("kv_cache_usage_perc", "Share of the KV pages that requests hold, 0 to 1")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that brought a token")
        self.tokens = self._counter("generation_tokens", "Tokens produced")
        self.cached_tokens = self._counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache")
        self.preemptions = self._counter("num_preemptions", "Requests whose pages were taken away")
        self.prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self.prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found by those")
        self.corrupted = self._counter("corrupted_requests", "Requests whose logits were not finite numbers")
        self._ends = self._counters("request_success", "Requests that ended, by reason", "finished_reason", ENDS)
        self._rejections = self._counters(
            "admission_rejections", "Requests turned away, by reason", "reason", REJECTIONS
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token", _TTFT)
        self._itl = Tally(self._name("inter_token_latency_seconds"), "Between a request's tokens", model, _ITL)
        self.registry.register(self._itl)
        self._tpot = self._histogram("request_time_per_output_token_seconds", "The same, a request's mean", _ITL)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the last token", _E2E)
        self._queued = self._histogram("request_queue_time_seconds", "From arrival to a slot", _E2E)
        self._prefill = self._histogram("request_prefill_time_seconds", "From a slot to the first token", _E2E)
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last", _E2E)
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self._produced = self._histogram("request_generation_tokens", "Tokens produced for a request", _TOKENS)
        self._iteration = self._histogram("iteration_tokens_total", "Tokens of a step, prompt and produced", _STEP)
        self._read = self._histogram(
            "decode_pages_read_ratio", "Pages that a retrieval head reads of those held, at a request's end", _RATIO
        )
        self._histogram("prefill_blocks_skipped_ratio", "Blocks of attention skipped in prefill", _RATIO)
        self._counter("selector_reuse", "Steps that read the pages of an earlier selection")
        self._used: dict[str, Any] = {}
        self._seen = Stats(0, 0, 0, 0, 0, {}, {})
        self._pages: Mapping[str, int] = {}
        self._sparsity = Sparsity()
        self.recent = Recent()

    def _name(self, name: str) -> str:
        return f"{self._prefix}:{name}"

    def _gauge(self, name: str, text: str, **labels: str) -> Any:
        made = Gauge(self._name(name), text, ["model_name", *labels], registry=self.registry)
        return made.labels(self._model, *labels.values())

    def _counter(self, name: str, text: str) -> Any:
        return Counter(self._name(name), text, ["model_name"], registry=self.registry).labels(self._model)

    def _counters(self, name: str, text: str, label: str, words: Sequence[str]) -> dict[str, Any]:
        made = Counter(self._name(name), text, ["model_name", label], registry=self.registry)
        return {word: made.labels(self._model, word) for word in words}

    def _histogram(self, name: str, text: str, edges: Sequence[float]) -> Any:
        made = Histogram(self._name(name), text, ["model_name"], buckets=edges, registry=self.registry)
        return made.labels(self._model)

    def loaded(self, ready: Ready) -> None:
        """Note what does not change any more."""
        config = ready.config
        self._pages = ready.pages
        self._sparsity = config.sparsity
        self._gauge("cache_config_info", "Settings of the KV cache, as labels", **_cache_labels(config, ready)).set(1)
        self._gauge("build_info", "Version and precision, as labels", **_build_labels(config)).set(1)
        self._gauge("kv_bytes_per_token", "Bytes of a token in the KV cache").set(ready.kv_token_bytes)
        self._gauge("weight_bits", "Bits of a weight").set(_BITS[config.precision.weight])
        self._gauge("kv_bits", "Bits of a number in the KV cache").set(_BITS[config.precision.kv])
        capacity = Gauge(
            self._name("kv_pages_capacity"), "KV pages there are", ["model_name", "kind"], registry=self.registry
        )
        used = Gauge(
            self._name("kv_pages_used"), "KV pages that requests hold", ["model_name", "kind"], registry=self.registry
        )
        for kind, pages in ready.pages.items():
            capacity.labels(self._model, kind).set(pages)
            self._used[kind] = used.labels(self._model, kind)
        seconds = Gauge(
            self._name("startup_seconds"), "Seconds to load, by phase", ["model_name", "phase"], registry=self.registry
        )
        for phase in PHASES:
            seconds.labels(self._model, phase).set(ready.seconds.get(phase, 0.0))

    def landed(self, message: Landed) -> None:
        """Take in what a step reports."""
        stats, seen = message.stats, self._seen
        if message.tokens:
            self._iteration.observe(message.tokens)
        produced = sum(len(output.new_tokens) for output in message.outputs)
        self.tokens.inc(produced)
        self.recent.count(0, produced)
        self.running.set(stats.running)
        self.waiting.set(stats.waiting)
        for kind, gauge in self._used.items():
            gauge.set(stats.held[kind])
        if self._pages:
            self.usage.set(max(stats.held[kind] / pages for kind, pages in self._pages.items()))
        self.preemptions.inc(stats.preemptions - seen.preemptions)
        self.prefix_queries.inc(stats.prefix_queries - seen.prefix_queries)
        self.prefix_hits.inc(stats.prefix_hits - seen.prefix_hits)
        self.corrupted.inc(stats.corrupted - seen.corrupted)
        self._seen = stats

    @property
    def stats(self) -> Stats:
        """What the engine said last."""
        return self._seen

    def first(self, choice: Choice) -> None:
        """A request brought its first token."""
        assert choice.first is not None
        spent = choice.first - choice.reply.arrival
        self._ttft.observe(spent)
        self.recent.ttft.add(spent)
        self.prompt_tokens.inc(len(choice.prompt.ids))
        self.cached_tokens.inc(choice.usage.cached_tokens)
        self.recent.count(len(choice.prompt.ids), 0)
        if choice.admitted is not None:
            self._queued.observe(max(choice.admitted - choice.reply.arrival, 0.0))
            self._prefill.observe(max(choice.first - choice.admitted, 0.0))

    def gap(self, seconds: float, tokens: int) -> None:
        """A request brought further tokens, so many seconds after the ones before."""
        self._itl.add(seconds / tokens, tokens)
        self.recent.itl.add(seconds / tokens)

    def ended(self, choice: Choice) -> None:
        """A request ended."""
        reason: str = choice.finish or ("error" if choice.reply.error is not None else "abort")
        self._ends[reason].inc()
        self._prompt.observe(len(choice.prompt.ids))
        self._produced.observe(choice.tokens)
        if choice.first is None or choice.finish is None:
            return
        self._e2e.observe(choice.last - choice.reply.arrival)
        self._decode.observe(choice.last - choice.first)
        if self._sparsity.budget is not None:
            held = ceil_div(len(choice.prompt.ids) + choice.tokens, PAGE)
            self._read.observe(self._sparsity.pages_read(Kind.RETRIEVAL, held) / held)
        if choice.tokens > 1:
            self._tpot.observe((choice.last - choice.first) / (choice.tokens - 1))

    def rejected(self, reason: str) -> None:
        """A request was turned away."""
        self._rejections[reason].inc()

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry)


def _cache_labels(config: EngineConfig, ready: Ready) -> dict[str, str]:
    return {
        "block_size": "64",
        "cache_dtype": config.precision.kv,
        "num_gpu_blocks": str(sum(ready.pages.values())),
        "enable_prefix_caching": str(config.cache.prefix_caching),
        "memory_bytes": str(config.cache.memory_bytes),
    }


def _build_labels(config: EngineConfig) -> dict[str, str]:
    return {"version": VERSION, "precision": config.precision.name, "device": config.device.kind}
