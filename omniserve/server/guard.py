"""What every request passes before it is routed: caps, host, key, body; and the one log line it leaves."""

import asyncio
import hmac
import re
import time
import uuid
from collections.abc import Iterable, MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omniserve.base import log
from omniserve.server.errors import INTERNAL, ApiError, from_exception
from omniserve.server.service import Service

OPEN = frozenset({"/", "/health", "/ready", "/version"})
"""Paths that need no key."""
CLOSE = {"connection": "close"}
CLIENT_GONE = 499
"""Status in the log of a request whose client did not wait."""
_QUIET = frozenset({"/health", "/ready", "/metrics"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOCAL = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
_JSON = re.compile(r"application/([\w.+-]+\+)?json\s*(;.*)?", re.IGNORECASE)
_LOG = log.get(__name__)


class Guard:
    """An ASGI application around another one. `posts` are the paths that take a body."""

    def __init__(self, app: ASGIApp, service: Service, *, posts: Iterable[str]) -> None:
        self._app = app
        self._service = service
        self._posts = frozenset(posts)
        self._keys = [key.encode() for key in service.server.api_key]
        self._local = service.server.loopback and service.server.uds is None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        assert scope["type"] == "http", scope["type"]
        if scope["path"] == "/health":  # must cost next to nothing
            await self._health(scope, send)
            return
        call = _Call(scope, send)
        try:
            self._admit(scope, call)
            if scope["method"] == "POST" and scope["path"] in self._posts:
                receive = await self._body(scope, receive)
            await self._app(scope, receive, call.send)
        except ClientDisconnect:
            call.status = CLIENT_GONE
        except ApiError as error:
            await call.refuse(error)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a request's top level; a panic of the tokenizers library is no Exception
            _LOG.error("request failed %s", log.fields(id=call.id, error=type(error).__name__), exc_info=True)
            await call.refuse(from_exception(error) if isinstance(error, Exception) else ApiError(500, INTERNAL))
        finally:
            call.log()

    async def _health(self, scope: Scope, send: Send) -> None:
        if self._local and not _is_local(scope):
            await ApiError(403, _NOT_LOCAL).response()(scope, _nothing, send)
        elif scope["method"] not in ("GET", "HEAD"):
            error = ApiError(405, "this route takes GET and HEAD only", headers={"allow": "GET, HEAD"})
            await error.response()(scope, _nothing, send)
        else:
            status = 503 if self._service.state == "dead" else 200
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

    def _admit(self, scope: Scope, call: "_Call") -> None:
        """Raise ApiError for a request that is refused by its header."""
        limits = self._service.server.limits
        headers = scope["headers"]
        size = sum(len(name) + len(value) + 4 for name, value in headers) + len(scope["raw_path"])
        size += len(scope["query_string"])
        if size > limits.max_header_bytes or len(headers) > limits.max_headers:
            raise ApiError(
                431,
                f"the header has {size} bytes in {len(headers)} lines: at most {limits.max_header_bytes} bytes in "
                f"{limits.max_headers} lines are read",
                headers=CLOSE,
            )
        if self._local and not _is_local(scope):
            raise ApiError(403, _NOT_LOCAL)
        path = scope["path"]
        if self._keys and path not in OPEN and not (path == "/metrics" and self._service.server.metrics_public):
            place = self._key(scope)
            if place is None:
                raise ApiError(401, "the API key is missing or wrong: send the header Authorization: Bearer KEY")
            call.state["key"] = self._service.server.api_key[place]
            if scope["method"] == "POST":
                self._service.rates.take(place)

    def _key(self, scope: Scope) -> int | None:
        """Return the place of the key that a request brings; all keys are compared, in a time that tells nothing."""
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        found = None
        for place, known in enumerate(self._keys):
            if hmac.compare_digest(key.strip(), known) and kind.lower() == b"bearer":
                found = place
        return found

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the whole body, within its bounds, and return what hands it on."""
        service, limits = self._service, self._service.server.limits
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"").decode("latin-1")
        if not _JSON.fullmatch(kind):
            raise ApiError(415, f"the body must be application/json, not {kind[:80] or 'of no type'!r}")
        most = limits.body_bytes(0 if service.ready is None else service.max_model_len)
        declared = headers.get(b"content-length", b"0")
        if int(declared) > most:
            raise ApiError(413, f"the body has {int(declared)} bytes: at most {most} are read", headers=CLOSE)
        body = bytearray()
        try:
            async with asyncio.timeout(limits.body_deadline):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise ApiError(413, f"the body has more than {most} bytes", headers=CLOSE)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {limits.body_deadline:g} s", headers=CLOSE) from None
        return _replayed(bytes(body), receive)


_NOT_LOCAL = "this server is for this machine only: the header Host must name localhost, 127.0.0.1 or [::1]"


def _is_local(scope: Scope) -> bool:
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    return len(hosts) == 1 and _LOCAL.fullmatch(hosts[0].decode("latin-1")) is not None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that brings a body first."""
    left = [body]

    async def again() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return again


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


class _Call:
    """One request: its id, which every answer carries, and what its log line says."""

    def __init__(self, scope: Scope, send: Send) -> None:
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        self.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.status = 0
        self.state: MutableMapping[str, Any] = scope.setdefault("state", {})
        self.state["log"] = {}
        self._scope = scope
        self._send = send
        self._began = time.monotonic()
        self._complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
        else:
            self._complete = not message.get("more_body", False)
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error, unless there is an answer; one that has begun is cut off."""
        if not self.status:
            await error.response()(self._scope, _nothing, self.send)
        elif not self._complete:
            raise error

    def log(self) -> None:
        if self._scope["path"] in _QUIET:
            return
        _LOG.info(
            "request %s",
            log.fields(
                id=self.id,
                method=self._scope["method"],
                path=self._scope["raw_path"][:200].decode("latin-1"),  # a decoded one could pass for further fields
                status=self.status,
                seconds=round(time.monotonic() - self._began, 4),
                **self.state["log"],
            ),
        )
