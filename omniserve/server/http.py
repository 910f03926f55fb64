"""HTTP/1.1 on a connection: uvicorn's h11 protocol with deadlines, a cap on connections and errors of our shape."""

import asyncio
import sys
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from omniserve.base.serving import ServerLimits
from omniserve.server.errors import ApiError

CHUNKS = "chunks"
"""Key of a request's `Chunks` in the state of its scope."""


class Chunks:
    """Writes parts of one answer's body past ASGI: for a token, that takes a third of the time."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._chunked = cycle.scope["http_version"] == "1.1"

    @property
    def free(self) -> bool:
        """Whether a part can be written now: the answer has begun, in chunks (HTTP/1.1), and its reader keeps up."""
        cycle = self._cycle
        return (
            self._chunked
            and cycle.response_started
            and not (cycle.response_complete or cycle.disconnected or cycle.flow.write_paused)
            and not cycle.transport.is_closing()
        )

    def write(self, data: bytes) -> None:
        """Write a part, which must not be empty, as h11 frames it. A connection that fails is cut, as if hung up."""
        try:
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        except OSError:
            self._cycle.transport.abort()


class Connection(H11Protocol):
    """One connection. It is closed when a request's header is not there in time, each time anew."""

    def __init__(self, *arguments: Any, limits: ServerLimits, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limits = limits
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """A connection has come."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            most = self._limits.max_connections
            self._refuse(ApiError(503, f"{most} connections are open, and no more may be", retry_after=1))
            return
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if self._header_timer is None and self.conn.their_state is h11.IDLE:
            self._arm()
        super().data_received(data)

    def handle_events(self) -> None:
        """Take in what the bytes say."""
        super().handle_events()
        if self.cycle is not None and CHUNKS not in self.cycle.scope["state"]:
            self.cycle.scope["state"][CHUNKS] = Chunks(self.cycle)
        if self.conn.their_state is not h11.IDLE:
            self._disarm()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._disarm()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer something that is no HTTP; called while h11's error is being handled."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if status == 431:
            most = self._limits.max_header_bytes
            self._refuse(ApiError(431, f"the header has more than {most} bytes"))
        else:
            self._refuse(ApiError(400, "the request is not valid HTTP/1.1"))

    def _refuse(self, error: ApiError) -> None:
        self._disarm()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = error.body
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            response = h11.Response(
                status_code=error.status,
                headers=list((headers | error.headers).items()),
                reason=HTTPStatus(error.status).phrase.encode(),
            )
            events = (response, h11.Data(data=body), h11.EndOfMessage())
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()

    def _arm(self) -> None:
        self._disarm()
        self._header_timer = self.loop.call_later(self._limits.header_deadline, self.transport.close)

    def _disarm(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


def connections(limits: ServerLimits) -> Callable[..., Connection]:
    """Return what makes the connections of a server."""
    return partial(Connection, limits=limits)
