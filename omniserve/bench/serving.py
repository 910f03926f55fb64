"""Requests to a server at given times, and what each of them met. Works with any server of OpenAI's API.

aiohttp rather than httpx: with 256 streams and 14,000 tokens a second the client must stay out of the way, and httpx
takes twice the processor's time. How late the client itself was is measured beside everything else.
"""

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from omniserve.base.errors import ConfigError
from omniserve.bench.workload import Planned, Prompts
from omniserve.remote import CONNECT_SECONDS, SILENCE_SECONDS, Place, refusal

if TYPE_CHECKING:
    import aiohttp

Endpoint = Literal["completions", "chat"]
PATHS: Mapping[Endpoint, str] = {"completions": "completions", "chat": "chat/completions"}
AHEAD = 64
"""Bodies that are made before their time, so that making one delays no request."""
_LONGEST_LINE = 1 << 22
_BEAT_SECONDS = 0.01


@dataclass(slots=True, kw_only=True)
class Record:
    """What one request met. Times in seconds of one clock; None has not happened.

    planned  when it was to be sent; sent: when it was
    gaps     between the chunks that hold text
    tokens   of the answer, as the server counts them; its chunks if it does not
    counted  whether the server did
    error    what went wrong, in one sentence; such a request counts nowhere else
    """

    asked: Planned
    planned: float
    sent: float = 0.0
    first: float | None = None
    last: float | None = None
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    counted: bool = False
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first text."""
        assert self.first is not None, self.error
        return self.first - self.sent

    @property
    def latency(self) -> float:
        """Seconds to the last text."""
        assert self.last is not None, self.error
        return self.last - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for a single token."""
        return (self.latency - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished test. seconds: from the first request to the last answer; lag: how late the client was, in seconds."""

    records: list[Record]
    seconds: float
    lag: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is asked of whom, and how. ignore_eos: answers are made as long as planned (vLLM's field, and ours)."""

    place: Place
    model: str
    endpoint: Endpoint
    prompts: Prompts
    ignore_eos: bool = True

    def body(self, number: int, request: Planned) -> bytes:
        """Return a request's body."""
        fields: dict[str, Any] = {"model": self.model}
        if self.endpoint == "completions":
            fields |= {"prompt": self.prompts.ids(number, request), "max_tokens": request.output_len}
        else:
            message = {"role": "user", "content": self.prompts.text(number, request)}
            fields |= {"messages": [message], "max_completion_tokens": request.output_len}
        fields |= {"temperature": 0.0, "stream": True, "stream_options": {"include_usage": True}}
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return json.dumps(fields).encode()


def measure(
    target: Target,
    requests: Sequence[Planned],
    *,
    concurrency: int | None = None,
    warmups: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Run:
    """Send the requests at their times and return what they met.

    concurrency  most requests under way; one whose time has come waits for its turn
    warmups      requests before the test, which are not counted; one that fails raises ConfigError
    """
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise ConfigError("bench serving needs aiohttp: pip install 'omniserve[bench]'") from None
    return asyncio.run(_measure(target, requests, concurrency, warmups, on_progress))


async def _measure(
    target: Target,
    requests: Sequence[Planned],
    concurrency: int | None,
    warmups: int,
    on_progress: Callable[[int, int], None] | None,
) -> Run:
    import aiohttp

    place = target.place
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS),
        headers={**place.headers, "content-type": "application/json"},
        trust_env=place.proxied,
        read_bufsize=_LONGEST_LINE,
    )
    url = f"{place.base}/{PATHS[target.endpoint]}"
    async with session:
        for number in range(warmups):
            asked = requests[number % len(requests)]
            record = Record(asked=asked, planned=0.0)
            # A prompt of its own, so that the test finds nothing of it in a prefix cache.
            body = target.body(len(requests) + number, replace(asked, blocks=()))
            await _ask(session, url, body, record)
            if record.error is not None:
                raise ConfigError(f"{url}: the first request failed, so nothing was measured: {record.error}")
        lag: list[float] = []
        beating = asyncio.create_task(_beat(lag))
        try:
            records, began = await _send_all(session, url, target, requests, concurrency, on_progress)
        finally:
            beating.cancel()
            with suppress(asyncio.CancelledError):
                await beating
    ends = [record.last for record in records if record.last is not None]
    return Run(records=records, seconds=max(ends, default=time.perf_counter()) - began, lag=lag)


async def _send_all(
    session: "aiohttp.ClientSession",
    url: str,
    target: Target,
    requests: Sequence[Planned],
    concurrency: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[list[Record], float]:
    """Return the records and when the test began."""
    turns = asyncio.Semaphore(concurrency or len(requests))
    records: list[Record] = []
    done = 0

    async def one(body: bytes, record: Record) -> None:
        nonlocal done
        try:
            await _ask(session, url, body, record)
        finally:
            turns.release()
        done += 1
        if on_progress is not None:
            on_progress(done, len(requests))

    making: Iterator[bytes] = (target.body(number, request) for number, request in enumerate(requests))
    bodies = deque(islice(making, AHEAD))
    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for request in requests:
            record = Record(asked=request, planned=began + request.at)
            if (early := record.planned - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            await turns.acquire()
            records.append(record)
            tasks.create_task(one(bodies.popleft(), record))
            bodies.extend(islice(making, 1))
    return records, began


async def _ask(session: "aiohttp.ClientSession", url: str, body: bytes, record: Record) -> None:
    """Send one request and read its answer into `record`."""
    import aiohttp

    record.sent = time.perf_counter()
    try:
        async with session.post(url, data=body) as answer:
            if answer.status != 200:
                record.error = refusal(answer.status, await answer.read())
                return
            await _read(answer, record)
    except aiohttp.ClientError as error:
        record.error = f"the connection failed: {' '.join(str(error).split()) or type(error).__name__}"
    except (TimeoutError, ValueError, LookupError, TypeError, AttributeError) as error:
        record.error = f"the answer is no stream of OpenAI's API ({type(error).__name__})"
        if isinstance(error, TimeoutError):
            record.error = f"the server was silent for {SILENCE_SECONDS:g} s"


async def _read(answer: "aiohttp.ClientResponse", record: Record) -> None:
    """Read a stream: when its chunks come, and the token counts at its end."""
    chunks = 0
    whole = False
    async for line in answer.content:
        if not line.startswith(b"data:"):
            continue
        now = time.perf_counter()
        data = line[5:].strip()
        if data == b"[DONE]":
            whole = True
            break
        event = json.loads(data)
        if event.get("error"):
            record.error = refusal(200, data).removeprefix("status 200: ")
            return
        if usage := event.get("usage"):
            record.counted = True
            record.tokens = usage["completion_tokens"]
            record.prompt_tokens = usage["prompt_tokens"]
            record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or choice
            if delta.get("text") or delta.get("content") or delta.get("reasoning_content"):
                chunks += 1
                if record.last is None:
                    record.first = now
                else:
                    record.gaps.append(now - record.last)
                record.last = now
    if not whole:
        record.error = "the server closed the stream before its end"
    elif record.first is None:  # tokens without a text of their own, such as a special one
        record.first = record.last = time.perf_counter()
    if not record.counted:
        record.tokens = chunks


async def _beat(lag: list[float]) -> None:
    """Note how late a timer of this process rings: what everything else that it measures may be late by."""
    while True:
        due = time.perf_counter() + _BEAT_SECONDS
        await asyncio.sleep(_BEAT_SECONDS)
        lag.append(max(0.0, time.perf_counter() - due))
