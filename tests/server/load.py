"""Many streams at once, read as cheaply as Python can: `python -m tests.server.load PORT STREAMS TOKENS`.

Prints one JSON object: tokens per second over the time in which all streams ran, and the median seconds between the
pieces of a stream. Each token of the null model is one letter.
"""

import asyncio
import json
import re
import statistics
import sys
import time

_LETTERS = re.compile(rb'"text":"([A-Z]+)"')


class Stream(asyncio.Protocol):
    def __init__(self, request: bytes, done: "asyncio.Future[None]") -> None:
        self.request = request
        self.done = done
        self.marks: list[tuple[float, int]] = []
        self.status = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.status = self.status or data[9:12]
        letters = sum(map(len, _LETTERS.findall(data)))
        if letters:
            self.marks.append((time.perf_counter(), letters))
        if b"[DONE]" in data:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def load(port: int, streams: int, tokens: int) -> dict[str, float]:
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": tokens, "stream": True, "temperature": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    loop = asyncio.get_running_loop()
    opened = []
    for _ in range(streams):
        stream = Stream(head.encode() + body, loop.create_future())
        await loop.create_connection(lambda stream=stream: stream, "127.0.0.1", port)
        opened.append(stream)
    await asyncio.gather(*(stream.done for stream in opened))
    assert all(stream.status == b"200" for stream in opened), {stream.status for stream in opened}
    total = sum(letters for stream in opened for _, letters in stream.marks)
    start = max(stream.marks[0][0] for stream in opened)
    end = min(stream.marks[-1][0] for stream in opened)
    within = sum(letters for stream in opened for when, letters in stream.marks if start < when <= end)
    gaps = [
        later - earlier
        for stream in opened
        for (earlier, _), (later, _) in zip(stream.marks, stream.marks[1:], strict=False)
        if start < earlier
    ]
    return {
        "tokens": total,
        "tokens_per_second": within / (end - start),
        "median_gap": statistics.median(gaps),
        "seconds": end - start,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(load(*map(int, sys.argv[1:4])))) + "\n")
