"""Answers as JSON, whole or as server-sent events."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE, Kind, TokenLogprobs
from omniserve.server.answers import Choice, Piece, Reply
from omniserve.server.calls import Dialect, Listener, Said
from omniserve.server.http import CHUNKS, Chunks

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

Texts = Callable[[int], str]
"""Returns the text of one token."""

_json = msgspec.json.Encoder().encode


class Form(Protocol):
    """How one endpoint writes its answers."""

    def whole(self, reply: Reply) -> dict[str, Any]:
        """Return the answer as one object, without usage."""

    def head(self, reply: Reply) -> bytes:
        """Return what every chunk begins with, up to the list of choices."""

    def chunks(self, choice: Choice, first: bool) -> Iterable[tuple[bytes, Piece | None]]:
        """Yield the choices of the chunks that a continuation's pieces make, which are then gone."""


# Log-probabilities


def top_of(entry: TokenLogprobs, texts: Texts) -> dict[str, float]:
    """Return text -> log-probability of the token and the likeliest ones; of two with the same text the likelier one.

    The token has the same float here as alone: clients compare them.
    """
    found = {texts(entry.token): entry.logprob}
    for token, logprob in entry.top:
        if token != entry.token:
            text = texts(token)
            found[text] = max(logprob, found.get(text, logprob))
    return found


class _Completion:
    """Collects the four lists of /v1/completions."""

    def __init__(self, texts: Texts, offset: int = 0) -> None:
        self._texts = texts
        self.offset = offset
        self.value: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def first(self, token: int) -> None:
        """Add the token that nothing comes before."""
        self._add(token, None, None)

    def add(self, entries: Iterable[TokenLogprobs]) -> None:
        for entry in entries:
            self._add(entry.token, entry.logprob, top_of(entry, self._texts))

    def _add(self, token: int, logprob: float | None, top: dict[str, float] | None) -> None:
        text = self._texts(token)
        for name, value in zip(self.value, (text, logprob, top, self.offset), strict=True):
            self.value[name].append(value)
        self.offset += len(text)


def chat_logprobs(entries: Iterable[TokenLogprobs], texts: Texts) -> dict[str, Any]:
    """Return what /v1/chat/completions says about tokens."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        text = texts(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    content = []
    for entry in entries:
        top = [one(token, entry.logprob if token == entry.token else logprob) for token, logprob in entry.top]
        content.append(one(entry.token, entry.logprob) | {"top_logprobs": top})
    return {"content": content}


# The two endpoints


class ChatForm:
    """Answers of /v1/chat/completions.

    listen  makes what finds reasoning and calls in one answer; without it all is content
    way     how ids of calls look
    """

    def __init__(self, texts: Texts, listen: Callable[[], Listener] | None = None, way: Dialect | None = None) -> None:
        self._texts = texts
        self._listen = listen
        self._way = way
        self._listeners: dict[int, Listener] = {}

    def whole(self, reply: Reply) -> dict[str, Any]:
        """Return the answer as one object, without usage."""
        return _frame(reply, "chat.completion") | {"choices": [self._choice(choice) for choice in reply.choices]}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        entries = [entry for piece in choice.pieces for entry in piece.logprobs]
        message, finish = self._message("".join(piece.text for piece in choice.pieces), choice.finish)
        return {
            "index": choice.index,
            "message": {"role": "assistant", **message},
            "logprobs": None if choice.reply.logprobs is None else chat_logprobs(entries, self._texts),
            "finish_reason": finish,
        }

    def _message(self, text: str, finish: str | None) -> tuple[dict[str, Any], str | None]:
        """Return what an answer says, and why it ended."""
        if self._listen is None:
            return {"content": text}, finish
        listener = self._listen()
        texts = {"content": "", "reasoning": ""}
        calls: list[dict[str, Any]] = []
        for said in listener.push(text, finished=True):
            match said.kind:
                case "call":
                    calls.append(self._call(said))
                case "arguments":
                    calls[said.index]["function"]["arguments"] += said.text
                case _:
                    texts[said.kind] += said.text
        empty = None if calls or texts["reasoning"] else ""
        message: dict[str, Any] = {"content": texts["content"] or empty}
        if texts["reasoning"]:
            message["reasoning_content"] = texts["reasoning"]
        if calls:
            message["tool_calls"] = calls
        return message, _why(listener, finish)

    def _call(self, said: Said) -> dict[str, Any]:
        assert self._way is not None, said
        return {"id": self._way.id(), "type": "function", "function": {"name": said.text, "arguments": ""}}

    def head(self, reply: Reply) -> bytes:
        """Return what every chunk begins with."""
        return _head(reply, "chat.completion.chunk")

    def chunks(self, choice: Choice, first: bool) -> Iterable[tuple[bytes, Piece | None]]:
        """Yield the choices of the chunks that a continuation's pieces make."""
        index = b'{"index":%d,"delta":' % choice.index
        if first:
            yield index + b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}', None
        for piece in _taken(choice):
            logprobs = b"null" if not piece.logprobs else _json(chat_logprobs(piece.logprobs, self._texts))
            for delta in self._deltas(choice, piece):
                yield index + delta + b',"logprobs":' + logprobs + b',"finish_reason":null}', piece
                logprobs = b"null"
            if piece.finish is not None:
                finish = _why(self._listeners.get(choice.index), piece.finish)
                yield index + b'{},"logprobs":null,"finish_reason":%s}' % _json(finish), piece

    def _deltas(self, choice: Choice, piece: Piece) -> list[bytes]:
        """Return what a piece adds to the message."""
        if self._listen is None:
            return [b'{"content":' + _json(piece.text) + b"}"] if piece.text or piece.logprobs else []
        listener = self._listeners.setdefault(choice.index, self._listen())
        said = listener.push(piece.text, piece.finish is not None)
        deltas = [_json(self._delta(one)) for one in said]
        return deltas or ([b'{"content":""}'] if piece.logprobs else [])

    def _delta(self, said: Said) -> dict[str, Any]:
        match said.kind:
            case "content":
                return {"content": said.text}
            case "reasoning":
                return {"reasoning_content": said.text}
            case "call":
                return {"tool_calls": [{"index": said.index, **self._call(said)}]}
            case "arguments":
                return {"tool_calls": [{"index": said.index, "function": {"arguments": said.text}}]}


def _why(listener: Listener | None, finish: str | None) -> str | None:
    """Return why an answer ended: to have a function called, if it ended by itself and calls one."""
    return "tool_calls" if listener is not None and listener.calls and finish == "stop" else finish


class CompletionForm:
    """Answers of /v1/completions."""

    def __init__(self, texts: Texts, decode: Callable[[list[int]], str]) -> None:
        self._texts = texts
        self._decode = decode
        self._offsets: dict[int, int] = {}

    def whole(self, reply: Reply) -> dict[str, Any]:
        """Return the answer as one object, without usage."""
        return _frame(reply, "text_completion") | {"choices": [self._choice(choice) for choice in reply.choices]}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        text, logprobs = self._begin(choice)
        if logprobs is not None:
            for piece in choice.pieces:
                logprobs.add(piece.logprobs)
        return {
            "index": choice.index,
            "text": text + "".join(piece.text for piece in choice.pieces),
            "logprobs": None if logprobs is None else logprobs.value,
            "finish_reason": choice.finish,
        }

    def _begin(self, choice: Choice) -> tuple[str, _Completion | None]:
        """Return what comes before the continuation: with echo the prompt, and how likely its tokens were."""
        reply, prompt = choice.reply, choice.prompt
        logprobs = None if reply.logprobs is None else _Completion(self._texts)
        if not reply.echo:
            return "", logprobs
        if logprobs is not None:
            logprobs.first(prompt.ids[0])
            logprobs.add(choice.prompt_logprobs or ())
        return self._decode(prompt.ids) if prompt.text is None else prompt.text, logprobs

    def head(self, reply: Reply) -> bytes:
        """Return what every chunk begins with."""
        return _head(reply, "text_completion")

    def chunks(self, choice: Choice, first: bool) -> Iterable[tuple[bytes, Piece | None]]:
        """Yield the choices of the chunks that a continuation's pieces make."""
        if first and choice.reply.echo:
            text, logprobs = self._begin(choice)
            self._offsets[choice.index] = 0 if logprobs is None else logprobs.offset
            yield self._chunk(choice, text, logprobs), None
        for piece in _taken(choice):
            if piece.text or piece.logprobs:
                logprobs = None
                if choice.reply.logprobs is not None:
                    logprobs = _Completion(self._texts, self._offsets.get(choice.index, 0))
                    logprobs.add(piece.logprobs)
                    self._offsets[choice.index] = logprobs.offset
                yield self._chunk(choice, piece.text, logprobs), piece
            if piece.finish is not None:
                yield self._chunk(choice, "", None, piece.finish), piece

    def _chunk(self, choice: Choice, text: str, logprobs: _Completion | None, finish: str | None = None) -> bytes:
        return b'{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s}' % (
            choice.index,
            _json(text),
            b"null" if logprobs is None else _json(logprobs.value),
            _json(finish),
        )


def _taken(choice: Choice) -> list[Piece]:
    pieces, choice.pieces = choice.pieces, []
    return pieces


def _frame(reply: Reply, kind: str) -> dict[str, Any]:
    return {"id": reply.id, "object": kind, "created": reply.created, "model": reply.model}


def _head(reply: Reply, kind: str) -> bytes:
    return b"data: " + _json(_frame(reply, kind))[:-1] + b',"choices":['


def usage_of(reply: Reply) -> dict[str, Any]:
    """Return token counts as clients get them."""
    usage = reply.usage
    value: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if reply.engine_stats is not None:
        value["omniserve"] = _engine_stats(reply)
    return value


def _engine_stats(reply: Reply) -> dict[str, float]:
    """Return what one answer took. What sparse attention skips in prefill is not counted yet, and not told."""
    assert reply.engine_stats is not None
    held = [ceil_div(len(choice.prompt.ids) + choice.tokens, PAGE) for choice in reply.choices]
    read = sum(reply.engine_stats.pages_read(Kind.RETRIEVAL, pages) for pages in held)
    first = min((choice.first for choice in reply.choices if choice.first is not None), default=reply.arrival)
    gaps = sum(choice.tokens - 1 for choice in reply.choices if choice.tokens > 1)
    spent = sum(choice.last - choice.first for choice in reply.choices if choice.first is not None)
    return {
        "kv_pages_held": sum(held),
        "kv_pages_read_ratio": round(read / sum(held), 4),
        **({"prefill_blocks_skipped_ratio": 0.0} if reply.engine_stats.off else {}),
        "ttft_ms": round(1000 * (first - reply.arrival), 3),
        "tpot_ms": round(1000 * spent / gaps, 3) if gaps else 0.0,
    }


# Sending


def whole(reply: Reply, form: Form) -> Response:
    """Return a finished answer as one JSON object."""
    return Response(_json(form.whole(reply) | {"usage": usage_of(reply)}), media_type="application/json")


async def until_done(reply: Reply, receive: Receive) -> None:
    """Wait until an answer is complete. Raises its error, or ClientDisconnect when nobody waits for it any more."""
    watcher = asyncio.create_task(_hang_up(receive, reply))
    try:
        while reply.open:
            await reply.wake.wait()
            reply.wake.clear()
    finally:
        await _ended(watcher)
        reply.close()
    if reply.error is not None:
        raise reply.error
    if any(choice.finish is None for choice in reply.choices):
        raise ClientDisconnect


class EventStream(Response):
    """An answer as server-sent events, written as it comes. When the client goes, what is under way is dropped.

    What a step brings is written by whoever brings it, if the connection takes it at once; else, and at the ends of the
    stream, by this response's own task.
    """

    media_type = "text/event-stream"

    def __init__(self, reply: Reply, form: Form, on_done: Callable[[], None] = lambda: None) -> None:
        super().__init__(headers=STREAM_HEADERS)
        del self.headers["content-length"]
        self._reply = reply
        self._form = form
        self._on_done = on_done
        self._head = form.head(reply)
        self._tail = b'],"usage":null}\n\n' if reply.include_usage else b"]}\n\n"
        self._begun: set[int] = set()
        self._sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        reply = self._reply
        watcher = asyncio.create_task(_hang_up(receive, reply))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            chunks = scope["state"].get(CHUNKS)
            if chunks is not None:
                reply.on_pieces = partial(self._at_once, chunks)
            await self._write(send)
        finally:
            reply.close()
            await _ended(watcher)
            self._on_done()

    def _at_once(self, chunks: Chunks) -> bool:
        """Write what there is; False if the connection does not take it now."""
        if self._sending or not chunks.free:
            return False
        if lines := self._lines():
            chunks.write(b"".join(lines))
            self._reply.sent = time.monotonic()
        return True

    async def _write(self, send: Send) -> None:
        reply = self._reply
        more = True
        while more:
            await reply.wake.wait()
            reply.wake.clear()
            more = reply.open > 0
            lines = self._lines()
            if not more:
                lines.append(self._end(self._head))
            elif not lines and reply.ping:
                lines.append(PING)
            reply.ping = False
            if lines:
                self._sending = True
                await send({"type": "http.response.body", "body": b"".join(lines), "more_body": more})
                self._sending = False
                reply.sent = time.monotonic()

    def _lines(self) -> list[bytes]:
        """Return the chunks that make up what was not taken yet."""
        reply, form = self._reply, self._form
        lines: list[bytes] = []
        for choice in reply.choices:
            if not choice.pieces:
                continue
            for chunk, piece in form.chunks(choice, choice.index not in self._begun):
                tail = self._tail
                if reply.continuous_usage:
                    tail = b'],"usage":' + _json(_usage_at(reply, choice, piece)) + b"}\n\n"
                lines += (self._head, chunk, tail)
            self._begun.add(choice.index)
        return lines

    def _end(self, head: bytes) -> bytes:
        reply = self._reply
        if reply.error is not None:
            return b"data: " + reply.error.body + b"\n\n" + DONE
        if reply.include_usage:
            return head + b'],"usage":' + _json(usage_of(reply)) + b"}\n\n" + DONE
        return DONE


def _usage_at(reply: Reply, choice: Choice, piece: Piece | None) -> dict[str, Any]:
    """Token counts up to a piece of one continuation, with what the others have brought."""
    usage = usage_of(reply)
    produced = usage["completion_tokens"] - choice.tokens + (0 if piece is None else piece.completion_tokens)
    return usage | {"completion_tokens": produced, "total_tokens": usage["prompt_tokens"] + produced}


async def _hang_up(receive: Receive, reply: Reply) -> None:
    """Drop an answer when its client has gone."""
    await gone(receive)
    reply.close()


async def gone(receive: Receive) -> None:
    """Return once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


class Feed(Response):
    """An endless stream of JSON objects, one for each interval, until `stopped` or the client goes."""

    media_type = "text/event-stream"

    def __init__(self, value: Callable[[], Mapping[str, Any]], *, seconds: float, stopped: Callable[[], bool]) -> None:
        super().__init__(headers=STREAM_HEADERS)
        del self.headers["content-length"]
        self._value = value
        self._seconds = seconds
        self._stopped = stopped

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        writer = asyncio.create_task(self._write(send))
        watcher = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait({writer, watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writer, watcher):
                await _ended(task)

    async def _write(self, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        while not self._stopped():
            body = b"data: " + _json(self._value()) + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await asyncio.sleep(self._seconds)
        await send({"type": "http.response.body", "body": DONE, "more_body": False})
