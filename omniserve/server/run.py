"""From settings to a process that serves, and how it ends: drained, at once, or because its engine has died."""

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import uvicorn

from omniserve.base import log
from omniserve.base.errors import ConfigError
from omniserve.base.serving import ServerOptions
from omniserve.server.app import application
from omniserve.server.errors import ApiError
from omniserve.server.http import connections
from omniserve.server.service import Service

OK, DIED, INTERRUPTED = 0, 3, 130
"""Exit codes (serving.md section 5)."""

_LOG = log.get(__name__)
_LINGER_SECONDS = 2.0
"""How long a server whose engine has died goes on saying so."""
_BACKLOG = 2048
_SEND_BUFFER = 64 << 10
"""Bytes that the kernel keeps for a reader that is slow; by itself it would keep megabytes."""


def serve(service: Service, *, on_ready: Callable[[str], None] = lambda address: None) -> int:
    """Serve until a signal or the engine's death, and return the exit code.

    on_ready  called with the address once requests are taken in
    Raises ConfigError if the port cannot be had, OmniserveError if the model cannot be loaded.
    """
    listener = bind(service.server)
    try:
        return asyncio.run(_serve(service, listener, on_ready))
    finally:
        listener.close()
        if service.server.uds is not None:
            Path(service.server.uds).unlink(missing_ok=True)


def bind(options: ServerOptions) -> socket.socket:
    """Return the listening socket. Raises ConfigError in one sentence."""
    if options.uds is not None:
        return _bind_path(Path(options.uds))
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError, OverflowError):
        raise ConfigError(f"host={options.host!r} port={options.port}: is no address of this machine") from None
    # asyncio sends small pieces at once (TCP_NODELAY) only where the socket names its protocol
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)  # its connections inherit it
    try:
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen on {options.host} port {options.port}: {reason}; give another --port"
        ) from None
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def _bind_path(path: Path) -> socket.socket:
    """Return a socket at a path that this user alone can connect to; one that nobody listens at is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise ConfigError(f"uds={str(path)!r}: another server listens there")
            path.unlink()
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
    except OSError as error:
        listener.close()
        raise ConfigError(f"uds={str(path)!r}: cannot be listened at: {error.strerror or error}") from None
    except ConfigError:
        listener.close()
        raise
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def address(options: ServerOptions, listener: socket.socket) -> str:
    """Return the URL of a server."""
    if options.uds is not None:
        return f"unix:{options.uds}"
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: this file has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def _serve(service: Service, listener: socket.socket, on_ready: Callable[[str], None]) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_stray)
    limits = service.server.limits
    http = _Uvicorn(
        uvicorn.Config(
            application(service),
            http=connections(limits),  # type: ignore[arg-type]  # whatever makes a protocol
            ws="none",
            lifespan="off",
            loop="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=round(limits.keep_alive),
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=limits.max_header_bytes,
        )
    )
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.put_nowait, number)
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    began = time.monotonic()
    where = address(service.server, listener)
    _LOG.info("listening %s", log.fields(address=where))
    loading = asyncio.create_task(service.load())
    signalled = asyncio.create_task(signals.get())
    died: asyncio.Task[str] | None = None
    try:
        await asyncio.wait({loading, signalled, serving}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            _LOG.info("ready %s", log.fields(address=where, seconds=round(time.monotonic() - began, 2)))
            on_ready(where)
            died = asyncio.create_task(service.died())
            await asyncio.wait({died, signalled, serving}, return_when=asyncio.FIRST_COMPLETED)
        if signalled.done():
            return await _signalled(service, signalled.result(), signals, died)
        if died is not None and died.done():
            _LOG.error("engine died %s", log.fields(reason=died.result(), open=len(service.replies)))
            await asyncio.sleep(_LINGER_SECONDS)
        if serving.done():
            serving.result()
        return DIED
    finally:
        service.drain()
        service.fail_all(ApiError(503, "the server is shutting down"))
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        http.should_exit = True
        await asyncio.gather(serving, service.close(), return_exceptions=True)


async def _signalled(
    service: Service, number: int, signals: "asyncio.Queue[int]", died: "asyncio.Task[str] | None"
) -> int:
    """Do what a signal asks for and return the exit code."""
    _LOG.info("signal %s", log.fields(name=signal.Signals(number).name, open=len(service.replies)))
    if number == signal.SIGINT:
        return INTERRUPTED
    service.drain()
    if died is None:
        return OK
    drained = asyncio.create_task(service.drained(service.server.shutdown_timeout))
    second = asyncio.create_task(signals.get())
    await asyncio.wait({drained, second, died}, return_when=asyncio.FIRST_COMPLETED)
    if died.done():
        return DIED
    _LOG.info("drained %s", log.fields(open=len(service.replies), second_signal=second.done()))
    drained.cancel()
    second.cancel()
    return OK


def _log_stray(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what no request and no task has caught."""
    error = context.get("exception")
    _LOG.error(
        "stray error %s",
        log.fields(message=context.get("message", ""), error=type(error).__name__),
        exc_info=error if isinstance(error, Exception) else None,
    )


# The log


class Lines(logging.Formatter):
    """One line per event: `time level event key=value`; tracebacks are escaped into it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return f"{self.formatTime(record, '%H:%M:%S')} {record.levelname} {_text(record)}"


class JsonLines(logging.Formatter):
    """One JSON object per event, with the line's keys."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        text = _text(record)
        pairs = re.findall(r"(?:^|\s)([A-Za-z_]\w*)=(.*?)(?=\s[A-Za-z_]\w*=|$)", text)
        event = re.split(r"\s[A-Za-z_]\w*=", text, maxsplit=1)[0]
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": moment, "level": record.levelname.lower(), "event": event} | {
            f"{key}_" if key in ("time", "level", "event") else key: value for key, value in pairs
        }
        return json.dumps(line, ensure_ascii=False)


def _text(record: logging.LogRecord) -> str:
    text = record.getMessage()
    if record.exc_info and record.exc_info[1] is not None:
        text += " " + log.fields(traceback=logging.Formatter().formatException(record.exc_info))
    return text


def configure_log(level: str, *, as_json: bool) -> None:
    """Send the package's log to standard error, one line per event; uvicorn's and asyncio's own words are dropped."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else Lines())
    root = logging.getLogger("omniserve")
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "asyncio"):
        other = logging.getLogger(name)
        other.handlers = [logging.NullHandler()]
        other.propagate = False
