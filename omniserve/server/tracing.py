"""OpenTelemetry spans of requests: queue, prefill, decode. Numbers and settings only, never a prompt or an answer.

A request's spans are made at its end, from the times that were noted on the way: tracing costs nothing in between.
Names and attributes are those of OpenTelemetry's conventions for generative AI.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from omniserve.base.errors import ConfigError
from omniserve.base.version import VERSION
from omniserve.server.answers import Choice, Reply
from omniserve.server.errors import TYPES

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_OPERATIONS = {"chatcmpl": "chat", "cmpl": "text_completion"}
_FLUSH_SECONDS = 1.0
_SAMPLING = ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed", "max_tokens")


def tracing(endpoint: str | None) -> "Tracing | None":
    """Return what sends spans to a collector by OTLP over HTTP; None without an endpoint.

    Raises ConfigError for an endpoint that is no URL, and where the extra is not installed.
    """
    if endpoint is None:
        return None
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.netloc:
        raise ConfigError(
            f"otlp_traces_endpoint={endpoint!r}: must be a URL, for instance http://127.0.0.1:4318/v1/traces"
        )
    try:
        import opentelemetry.sdk.trace  # noqa: F401
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigError("otlp_traces_endpoint needs an extra: pip install 'omniserve[otel]'") from None
    return Tracing(OTLPSpanExporter(endpoint=endpoint))


class Tracing:
    """Makes spans and hands them to an exporter, in a thread of its own; `at_once`: as they end, for tests."""

    def __init__(self, exporter: "SpanExporter", *, at_once: bool = False) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "omniserve", "service.version": VERSION})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor((SimpleSpanProcessor if at_once else BatchSpanProcessor)(exporter))
        self._tracer = self._provider.get_tracer("omniserve", VERSION)
        self._context = TraceContextTextMapPropagator()
        words = logging.getLogger("opentelemetry")  # a collector that is away is told of in our log, by its rules
        words.handlers = logging.getLogger("omniserve").handlers
        words.propagate = False

    def ended(self, reply: Reply) -> None:
        """A request has ended, one way or another."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        operation = _OPERATIONS[reply.prefix]
        now = time.monotonic()
        wall = time.time_ns() - round(1e9 * now)

        def moment(monotonic: float) -> int:
            return wall + round(1e9 * monotonic)

        span = self._tracer.start_span(
            f"{operation} {reply.model}",
            context=self._context.extract({} if reply.traceparent is None else {"traceparent": reply.traceparent}),
            kind=SpanKind.SERVER,
            attributes=_attributes(reply, operation),
            start_time=moment(reply.arrival),
        )
        if reply.error is not None:
            span.set_attribute("error.type", TYPES[reply.error.status])
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span)
        for choice in reply.choices:
            for name, start, end in _phases(choice, now):
                part = self._tracer.start_span(
                    name,
                    context=inside,
                    attributes={"omniserve.choice.index": choice.index},
                    start_time=moment(start),
                )
                part.end(moment(end))
        span.end(moment(now))

    async def close(self) -> None:
        """Send what is left; a collector that does not answer gets a second."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            loop.call_soon_threadsafe(done.set)

        threading.Thread(target=shut_down, daemon=True).start()
        try:
            await asyncio.wait_for(done.wait(), _FLUSH_SECONDS)
        except TimeoutError:
            logging.getLogger("omniserve.server").warning("spans lost: the collector does not answer")


def _phases(choice: Choice, now: float) -> list[tuple[str, float, float]]:
    """Return name, start and end of what became of a continuation, as far as it came."""
    arrival = choice.reply.arrival
    if choice.admitted is None:
        return [("queue", arrival, now)]
    admitted = max(choice.admitted, arrival)
    if choice.first is None:
        return [("queue", arrival, admitted), ("prefill", admitted, now)]
    first = max(choice.first, admitted)
    return [("queue", arrival, admitted), ("prefill", admitted, first), ("decode", first, max(choice.last, first))]


def _attributes(reply: Reply, operation: str) -> Mapping[str, Any]:
    usage, params = reply.usage, reply.choices[0].request.sampling
    first = [choice.first for choice in reply.choices if choice.first is not None]
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "omniserve",
        "gen_ai.request.model": reply.model,
        "gen_ai.request.stream": reply.stream,
        "gen_ai.request.choice.count": reply.n,
        "gen_ai.response.model": reply.model,
        "gen_ai.response.id": reply.id,
        "gen_ai.response.finish_reasons": [
            choice.finish or ("error" if reply.error is not None else "abort") for choice in reply.choices
        ],
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
    }
    if first:
        found["gen_ai.response.time_to_first_chunk"] = min(first) - reply.arrival
    for name in _SAMPLING:
        if (value := getattr(params, name)) is not None:
            found[f"gen_ai.request.{name}"] = value
    return found
