"""OpenTelemetry: the spans of a request, what is never in them, a collector that is there and one that is not."""

import asyncio
import http.server
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from omniserve.base.config import Options
from omniserve.base.errors import ConfigError
from omniserve.base.serving import ServerOptions
from omniserve.engine.process import Null
from omniserve.server.app import application
from omniserve.server.errors import ApiError
from omniserve.server.service import Service
from omniserve.server.tracing import Tracing, tracing
from tests.cli.commands import Ran, check_refusal
from tests.server.harness import serving

SECRET = "the-words-of-the-prompt"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
Test = Callable[[Service, httpx.AsyncClient], Awaitable[None]]


def traced(test: Test) -> list[ReadableSpan]:
    """The spans that are made while a test uses a server without a model, one slot wide."""
    exporter = InMemorySpanExporter()

    async def main() -> None:
        service = Service(None, Options(max_num_seqs=1), ServerOptions(), null=Null(step_seconds=0.003))
        assert service.tracing is None, "off by default"
        service.tracing = Tracing(exporter, at_once=True)
        await service.load()
        try:
            transport = httpx.ASGITransport(app=application(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
                await asyncio.wait_for(test(service, client), 60)
        finally:
            await service.close()

    asyncio.run(main())
    return list(exporter.get_finished_spans())


def parts(spans: list[ReadableSpan], parent: ReadableSpan) -> dict[str, ReadableSpan]:
    assert parent.context
    return {span.name: span for span in spans if span.parent and span.parent.span_id == parent.context.span_id}


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_request_has_three_phases() -> None:
    body = {"prompt": SECRET, "max_tokens": 20, "temperature": 0.5, "seed": 7, "top_p": 0.9, "user": SECRET}
    before = time.time_ns()

    async def test(service: Service, client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/completions", json=body, headers={"traceparent": PARENT})
        assert answer.status_code == 200, answer.text

    spans = traced(test)
    (whole,) = [span for span in spans if span.kind is SpanKind.SERVER]
    assert whole.name == "text_completion null"
    assert whole.context
    assert whole.parent
    assert f"{whole.context.trace_id:032x}-{whole.parent.span_id:016x}" == PARENT[3:-3]
    attributes = dict(whole.attributes or {})
    times = attributes.pop("gen_ai.response.time_to_first_chunk")
    assert isinstance(times, float)
    assert str(attributes.pop("gen_ai.response.id")).startswith("cmpl-")
    assert attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "omniserve",
        "gen_ai.request.model": "null",
        "gen_ai.request.stream": False,
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.max_tokens": 20,
        "gen_ai.response.model": "null",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": len(SECRET),
        "gen_ai.usage.output_tokens": 20,
        "gen_ai.usage.cache_read.input_tokens": 0,
    }
    found = parts(spans, whole)
    assert list(found) == ["queue", "prefill", "decode"]
    queue, prefill, decode = found.values()
    assert before <= (whole.start_time or 0) == queue.start_time
    assert queue.end_time == prefill.start_time
    assert prefill.end_time == decode.start_time
    assert (decode.end_time or 0) <= (whole.end_time or 0) <= time.time_ns()
    assert seconds(decode) > 19 * 0.003 * 0.9
    assert seconds(queue) + seconds(prefill) == pytest.approx(times, abs=1e-3)
    assert SECRET not in "".join(span.to_json() for span in spans)


def test_what_waits_is_in_the_queue_and_what_fails_is_marked() -> None:
    async def test(service: Service, client: httpx.AsyncClient) -> None:
        def ask(tokens: int) -> "asyncio.Task[httpx.Response]":
            body = {"prompt": [5, 6], "max_tokens": tokens}
            return asyncio.create_task(client.post("/v1/completions", json=body))

        first, second = ask(100), ask(1)
        await asyncio.gather(first, second)
        third = ask(8000)
        while not any(reply.started for reply in service.replies):
            await asyncio.sleep(0.01)
        service.fail_all(ApiError(504, "too late"))
        assert (await third).status_code == 504

    spans = traced(test)
    wholes = [span for span in spans if span.kind is SpanKind.SERVER]
    assert len(wholes) == 3
    assert [span.status.status_code for span in wholes] == [StatusCode.UNSET, StatusCode.UNSET, StatusCode.ERROR]
    assert seconds(parts(spans, wholes[1])["queue"]) > 0.5 * seconds(parts(spans, wholes[0])["decode"])
    failed = dict(wholes[2].attributes or {})
    assert failed["error.type"] == "TimeoutError"
    assert failed["gen_ai.response.finish_reasons"] == ("error",)


def test_samples_have_phases_of_their_own() -> None:
    async def test(service: Service, client: httpx.AsyncClient) -> None:
        body = {"prompt": [5, 6], "max_tokens": 3, "n": 3}
        assert (await client.post("/v1/completions", json=body)).status_code == 200

    spans = traced(test)
    indices = [(span.attributes or {})["omniserve.choice.index"] for span in spans if span.name == "decode"]
    assert indices == [0, 1, 2]


class Collector(http.server.BaseHTTPRequestHandler):
    bodies: list[bytes]

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """A collector's URL and the bodies that it gets."""
    handler = type("Handler", (Collector,), {"bodies": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", handler.bodies
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def test_a_collector_gets_them_before_the_server_ends() -> None:
    with collector() as (url, bodies), serving(null=0.002, server={"otlp_traces_endpoint": url}) as server:
        server.complete(SECRET, max_tokens=3)
        assert server.stop(signal.SIGTERM) == 0
    found = ExportTraceServiceRequest.FromString(b"".join(bodies))
    spans = [span for one in found.resource_spans for scope in one.scope_spans for span in scope.spans]
    assert {span.name for span in spans} == {"text_completion null", "queue", "prefill", "decode"}
    names = {one.key: one.value.string_value for one in found.resource_spans[0].resource.attributes}
    assert names["service.name"] == "omniserve"
    assert SECRET.encode() not in b"".join(bodies)


def test_a_collector_that_is_away_disturbs_nobody() -> None:
    with serving(null=0.002, server={"otlp_traces_endpoint": "http://127.0.0.1:9/v1/traces"}) as server:
        server.complete(SECRET, max_tokens=3)
        began = time.monotonic()
        assert server.stop(signal.SIGINT) == 130
        assert time.monotonic() - began < 20
        assert SECRET not in server.log
        assert "Traceback" not in server.log


def test_endpoints_that_are_none_are_refused() -> None:
    assert tracing(None) is None
    for endpoint in ("127.0.0.1:4318", "grpc://127.0.0.1:4317", "http://", ""):
        with pytest.raises(ConfigError, match="must be a URL, for instance http"):
            tracing(endpoint)


def test_without_the_extra(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    ran = run(
        "serve", "--dummy-weights", "--shape", "tiny", "--otlp-traces-endpoint", "http://127.0.0.1:4318/v1/traces"
    )
    check_refusal(ran, "pip install 'omniserve[otel]'")
