"""The routes. Everything that can be refused is refused before an answer begins, with its own status."""

from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.telemetry import TelemetryConfig
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp

from omniserve.base.errors import OmniserveError
from omniserve.base.version import VERSION
from omniserve.client import EngineDeadError
from omniserve.server import protocol
from omniserve.server.answers import Reply
from omniserve.server.errors import ApiError, from_exception
from omniserve.server.guard import CLIENT_GONE, Guard
from omniserve.server.metrics import CONTENT_TYPE
from omniserve.server.pages import add_pages
from omniserve.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from omniserve.server.requests import begin, conversation
from omniserve.server.service import Service
from omniserve.server.stream import EventStream, Feed, Form, until_done, whole
from omniserve.server.watch import Watch

POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
STATS_SECONDS = 0.25
_NO_TELEMETRY: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
_EVENTS: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    }
}
"""Server-sent events in an OpenAPI file; `itemSchema` is of OpenAPI 3.2, and unknown to older readers."""
_DESCRIPTIONS = {
    400: "a value, or the body, is not valid",
    401: "the API key is missing or wrong",
    403: "the header Host is not local",
    404: "no such model",
    408: "the body did not come in time",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "this key had its requests of this minute",
    431: "the header is too large",
    500: "a step has failed",
    501: "not implemented",
    503: "full, loading, shutting down or dead",
    504: "no token in time",
}


def application(service: Service) -> ASGIApp:
    """Return the ASGI application of a service."""
    app = FastAPI(
        title="omniserve",
        version=VERSION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        telemetry=_NO_TELEMETRY,
    )
    for kind in (ApiError, OmniserveError, RequestValidationError, HTTPException, EngineDeadError, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(ClientDisconnect, _note_hang_up)
    _add_models(app, service)
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_state(app, service)
    add_pages(app, service.server)
    guarded: ASGIApp = Guard(app, service, posts=POSTS)
    if service.server.allowed_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=service.server.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id"],
        )
    return guarded


async def _answer_error(request: Request, error: Exception) -> Response:
    return from_exception(error).response()


async def _note_hang_up(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


def _errors(*more: int) -> dict[int | str, dict[str, Any]]:
    """Return what an OpenAPI file says about the errors of a route; 401, 403 and 431 belong to all."""
    statuses = sorted({401, 403, 431, *more})
    return {status: {"model": protocol.Error, "description": _DESCRIPTIONS[status]} for status in statuses}


_POST = (400, 404, 408, 413, 415, 429, 503)


def _answers(model: type[BaseModel], *, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """Return what an OpenAPI file says about a route that takes a body."""
    errors = _errors(*_POST, 500, 501, 504) if stream else _errors(*_POST, 501)
    if stream:
        errors[200] = {
            "model": model,
            "description": "The answer, or server-sent events with its chunks",
            "content": _EVENTS,
        }
    else:
        errors[200] = {"model": model}
    return errors


# Models


def _add_models(app: FastAPI, service: Service) -> None:
    def card(name: str) -> dict[str, Any]:
        longest = 0 if service.ready is None else service.max_model_len
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "omniserve",
            "root": service.names[0],
            "max_model_len": longest,
        }

    @app.get("/v1/models", responses=_errors(), response_model=protocol.Cards)
    async def list_models() -> Response:
        """The served models."""
        return _as_json({"object": "list", "data": [card(name) for name in service.names]})

    @app.get("/v1/models/{model:path}", responses=_errors(404), response_model=protocol.Card)
    async def get_model(model: str) -> Response:
        """One of them."""
        return _as_json(card(service.known(model)))


# Generation


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=_answers(protocol.Completion, stream=True), response_model=None)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        return await _send(*await begin(service, body, _key(request)), request)

    @app.post("/v1/chat/completions", responses=_answers(protocol.ChatCompletion, stream=True), response_model=None)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await _send(*await begin(service, body, _key(request)), request)


def _key(request: Request) -> str | None:
    key: str | None = request.scope["state"].get("key")
    return key


async def _send(reply: Reply, form: Form, request: Request) -> Response:
    """Return the answer to a request that the engine has: its stream, or all of it once it is complete."""

    reply.traceparent = request.headers.get("traceparent")

    def note() -> None:
        request.scope["state"]["log"].update(_log_of(reply))

    if reply.stream:
        return EventStream(reply, form, on_done=note)
    try:
        await until_done(reply, request.receive)
        return whole(reply, form)
    finally:
        note()


def _log_of(reply: Reply) -> dict[str, Any]:
    """Return what a request's log line says about an answer: numbers, never texts."""
    usage = reply.usage
    first = [choice.first for choice in reply.choices if choice.first is not None]
    ends = {choice.finish or "abort" for choice in reply.choices}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "finish": "error" if reply.error is not None else ",".join(sorted(ends)),
        "ttft": round(min(first) - reply.arrival, 4) if first else None,
    }


# Tokens


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", responses=_answers(protocol.Tokens), response_model=None)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Tokens of a prompt or of a conversation."""
        service.accept()
        service.known(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give prompt or messages, one of the two", param="prompt")
        if body.prompt is not None:
            ids = await service.encode(body.prompt, special=body.add_special_tokens is not False)
        else:
            assert body.messages is not None
            ids, _ = await conversation(service, body.messages, body.add_generation_prompt)
        return _as_json({"tokens": ids, "count": len(ids), "max_model_len": service.max_model_len})

    @app.post("/detokenize", responses=_answers(protocol.Detokenized), response_model=None)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Text of tokens."""
        service.accept()
        service.known(body.model)
        most = service.server.limits.prompt_bytes(service.max_model_len)
        if len(body.tokens) > most:
            raise ApiError(400, f"{len(body.tokens)} tokens: at most {most} are taken", param="tokens")
        assert service.ready is not None
        if (largest := max(body.tokens, default=0)) >= service.ready.vocab:
            raise ApiError(400, f"token id {largest}: ids must be 0 to {service.ready.vocab - 1}", param="tokens")
        text = service.tokenizer.decode(body.tokens, skip_special=bool(body.skip_special_tokens))
        return _as_json({"prompt": text})


# State


def _add_state(app: FastAPI, service: Service) -> None:
    watch = Watch(service)

    @app.get("/health", responses={503: {"description": "the engine is dead"}}, response_class=Response)
    async def health() -> Response:
        """200 while the engine lives; the guard answers it."""
        raise AssertionError

    @app.get("/ready", responses=_errors(503), response_class=Response)
    async def ready() -> Response:
        """200 while requests are taken in."""
        if service.state != "ready":
            how_far = f" ({service.loading})" if service.state == "loading" else ""
            raise ApiError(503, f"not ready: {service.state}{how_far}")
        return Response()

    @app.get("/version", responses=_errors(), response_model=protocol.VersionBody)
    async def version() -> Response:
        """The version of omniserve."""
        return _as_json({"version": VERSION})

    @app.api_route("/metrics", methods=["GET", "HEAD"], response_model=None, include_in_schema=False)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    events = {"description": "Server-sent events without an end", "content": _EVENTS}

    @app.get("/engine/stats", responses=_errors() | {200: events}, response_class=Response)
    async def stats() -> Response:
        """What the engine is doing, a few times a second, as server-sent events."""
        return Feed(watch.snapshot, seconds=STATS_SECONDS, stopped=lambda: service.state in ("draining", "dead"))


def _as_json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
