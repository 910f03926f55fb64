"""A server in a process of its own, and requests to it: through httpx, or byte by byte."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from tests.cli.commands import ROOT, environment

START_SECONDS = 90.0
"""A generous bound: the machine may be busy."""


class Server:
    """A server that is ready; `log` is what it wrote to standard error so far."""

    COMMAND = (sys.executable, "-m")
    environment = staticmethod(environment)

    def __init__(self, arguments: Sequence[str], *, wait: bool = True) -> None:
        self.process = subprocess.Popen(
            [*self.COMMAND, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(),
        )
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        found = self.until(
            r"Ready on (http://[\d.]+:(\d+))"
            if wait
            else r"address=(http://[\d.]+:(\d+))|\"address\": \"(http://[\d.]+:(\d+))"
        )
        self.url, port = (group for group in found.groups() if group)
        self.port = int(port)
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self._lines.append(line)
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def log(self) -> str:
        with self._news:
            return "".join(self._lines)

    def until(self, pattern: str, seconds: float = START_SECONDS, *, after: int = 0) -> re.Match[str]:
        """Wait until a pattern appears in the log, behind so many lines."""
        end = time.monotonic() + seconds
        with self._news:
            while (found := re.search(pattern, "".join(self._lines[after:]))) is None:
                left = end - time.monotonic()
                assert left > 0, "".join(self._lines)
                assert self._reader.is_alive(), "".join(self._lines)
                self._news.wait(min(left, 1.0))
        return found

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.ended(seconds)

    def ended(self, seconds: float = 60) -> int:
        """Wait for the end and return the exit code."""
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    # Requests

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return self.http.post(path, json=body, **more)

    def complete(self, prompt: Any, **more: Any) -> dict[str, Any]:
        """A completion that must succeed."""
        answer = self.post("/v1/completions", {"prompt": prompt, **more})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """All objects of a stream; the last line must be [DONE]."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            return events(answer.iter_lines())

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric."""
        for line in self.http.get("/metrics").text.splitlines():
            wanted = (f'{key}="{value}"' in line for key, value in labels.items())
            if line.startswith(f"omniserve:{name}{{") and all(wanted):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(name)

    def idle(self) -> bool:
        """Whether nothing runs, waits or holds pages."""
        stats = self.stats()
        held = sum(kind["held"] for kind in stats["kv_pages"].values())
        return not (stats["running"] or stats["waiting"] or stats["open_sequences"] or held)

    def stats(self) -> dict[str, Any]:
        """The first object of /engine/stats."""
        with self.http.stream("GET", "/engine/stats") as answer:
            line = next(line for line in answer.iter_lines() if line)
            return dict(json.loads(line.removeprefix("data: ")))

    def raw(self, data: bytes, *, seconds: float = 60, receive: int | None = None) -> socket.socket:
        """A connection on which these bytes were sent; `receive` bounds the buffer of the reader."""
        sock = socket.socket()
        if receive is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        sock.settimeout(seconds)
        sock.connect(("127.0.0.1", self.port))
        with suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
        return sock

    def memory(self) -> int:
        """Resident bytes of the server process."""
        return resident(self.process.pid)

    def processor_seconds(self) -> float:
        """Seconds that the server process has spent on a core."""
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def engine(self) -> int:
        """Process id of the engine, the first child."""
        return self.children()[0]

    def files(self) -> tuple[int, int]:
        """Open file descriptors of server and engine."""
        server, engine = (len(os.listdir(f"/proc/{pid}/fd")) for pid in (self.process.pid, self.engine))
        return server, engine

    def counted(self) -> dict[str, int]:
        """Tasks and threads of a server of tests.server.program."""
        lines = len(self._lines)
        self.process.send_signal(signal.SIGUSR1)
        line = self.until(r"counted tasks=(\d+) threads=(\d+)", after=lines)
        return {"tasks": int(line[1]), "threads": int(line[2])}

    def children(self) -> list[int]:
        """Process ids of its children: the engine, and the one that renders templates."""
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(word) for word in text.split()]


def resident(process: int) -> int:
    """Resident bytes of a process."""
    pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def events(lines: Iterator[str]) -> list[Any]:
    """The objects of server-sent events."""
    found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert found[-1] == "[DONE]", found[-3:]
    return [json.loads(line) for line in found[:-1]]


def answer_of(sock: socket.socket) -> bytes:
    """Everything that comes until the other side closes, which it must."""
    data = b""
    with sock, suppress(ConnectionResetError):
        while piece := sock.recv(1 << 16):
            data += piece
    return data


def request_bytes(path: str, body: Any, *more: str) -> bytes:
    """A POST request as it goes over the wire."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more]
    return "\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def allowed(seconds: float) -> float:
    """What takes so long on a quiet machine may take longer on one whose cores others use as well."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def until_quiet(seconds: float) -> None:
    """Wait until others leave a core to us, at most so long."""
    end = time.monotonic() + seconds
    while os.getloadavg()[0] > 1.0 and time.monotonic() < end:
        time.sleep(1)


def program(**settings: Any) -> Server:
    """A server of tests.server.program."""
    return Server(["tests.server.program", json.dumps(settings)])


@contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    """The same, for a while."""
    server = program(**settings)
    try:
        yield server
    finally:
        server.close()


def check_error(answer: httpx.Response, status: int, kind: str, *words: str, param: str | None = "?") -> None:
    """The one shape of all errors."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    value = answer.json()
    assert set(value) == {"error"}
    error = value["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (kind, status), error
    for word in words:
        assert word in error["message"], error
    if param != "?":
        assert error["param"] == param, error
    assert "0x" not in error["message"]
    assert "Traceback" not in error["message"]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports
