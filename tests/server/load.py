"""Many streams at once, read as cheaply as Python can: `python -m tests.server.load JSON`, as `run` sends it.

Keys: port, streams, tokens (of each answer), seconds (every stream begins again until then; 0: once), cancelled (share
of the answers that are cut off once they have begun; they are `long` tokens long). Prints one JSON object: counts of
finished, cancelled and failed answers, pieces, what went wrong first; and over the time in which all streams ran
letters per second (each token of the null model is one) and the median seconds between two pieces of a stream.
"""

import asyncio
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

_LETTERS = re.compile(rb'"text":"([A-Z]+)"')


class Stream(asyncio.Protocol):
    """One answer; `done` gets its end: finished, cancelled, or what went wrong."""

    def __init__(self, request: bytes, cancel_after: int | None, done: "asyncio.Future[str]") -> None:
        self.request = request
        self.cancel_after = cancel_after
        self.done = done
        self.marks: list[tuple[float, int]] = []
        self.pieces = 0
        self.status = b""
        self.tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.status = self.status or data[9:12]
        self.marks.append((time.perf_counter(), sum(map(len, _LETTERS.findall(data)))))
        self.pieces += data.count(b"data: {")
        self.tail = (self.tail + data)[-400:]
        if b"[DONE]" in self.tail:
            self.transport.close()
        elif self.cancel_after is not None and self.pieces >= self.cancel_after:
            self._end("cancelled")
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        good = self.status == b"200" and b"[DONE]" in self.tail and b'"error"' not in self.tail
        self._end("finished" if good else f"{self.status!r} {exc!r} {self.tail!r}")

    def _end(self, how: str) -> None:
        if not self.done.done():
            self.done.set_result(how)


@dataclass
class Found:
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    pieces: int = 0
    wrong: str = ""
    tokens_per_second: float = 0.0
    median_gap: float = 0.0
    streams: list[Stream] = field(default_factory=list)


def request_of(tokens: int) -> bytes:
    body = {"prompt": [1, 2, 3], "max_tokens": tokens, "stream": True, "temperature": 0, "ignore_eos": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    return (head + "Content-Type: application/json\r\n\r\n").encode() + data


async def load(
    port: int, streams: int, tokens: int, seconds: float = 0.0, cancelled: float = 0.0, long: int = 7000
) -> Found:
    loop = asyncio.get_running_loop()
    end = time.perf_counter() + seconds
    found = Found()

    async def one(number: int) -> None:
        cut = number % 100 < 100 * cancelled
        stream = Stream(request_of(long if cut else tokens), 1 + number % 8 if cut else None, loop.create_future())
        await loop.create_connection(lambda: stream, "127.0.0.1", port)
        if not seconds:
            found.streams.append(stream)
        how = await stream.done
        found.pieces += stream.pieces
        if how in ("finished", "cancelled"):
            setattr(found, how, getattr(found, how) + 1)
        else:
            found.failed += 1
            found.wrong = found.wrong or how

    async def again(number: int) -> None:
        await one(number)
        while time.perf_counter() < end:
            number += 37
            await one(number)

    await asyncio.gather(*(again(number) for number in range(streams)))
    if not seconds and not found.failed:
        measure(found)
    return found


def measure(found: Found) -> None:
    """Fill in speeds, over the time in which all streams ran."""
    marks = [[mark for mark in stream.marks if mark[1]] for stream in found.streams]
    marks = [one for one in marks if len(one) > 1]
    if not marks:
        return
    start, end = max(one[0][0] for one in marks), min(one[-1][0] for one in marks)
    within = sum(letters for one in marks for when, letters in one if start < when <= end)
    gaps = [later - earlier for one in marks for (earlier, _), (later, _) in itertools.pairwise(one) if start < earlier]
    if end > start and gaps:
        found.tokens_per_second = within / (end - start)
        found.median_gap = statistics.median(gaps)


def run(environment: dict[str, str], cwd: Any, **settings: Any) -> dict[str, Any]:
    """Run this program in a process of its own and return what it found."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.server.load", json.dumps(settings)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        timeout=settings.get("seconds", 0) + 300,
    )
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(ran.stdout))


if __name__ == "__main__":
    result = asyncio.run(load(**json.loads(sys.argv[1])))
    result.streams.clear()
    sys.stdout.write(json.dumps(asdict(result)) + "\n")
