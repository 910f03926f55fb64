"""The engine for asyncio, in a process of its own: token ids in, outputs as they come.

The engine's messages are always read at once, whoever waits for them: it never waits for a reader.
"""

import asyncio
import itertools
import logging
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from omniserve.base import log
from omniserve.base.config import Options
from omniserve.base.errors import OmniserveError, RequestError
from omniserve.base.structured import StructuredOutputs
from omniserve.base.types import FAULTS, Fault, Output, SamplingParams
from omniserve.engine.process import (
    COMPILING,
    START,
    Abort,
    Add,
    Compile,
    Compiled,
    Failed,
    Frames,
    FromEngine,
    Landed,
    Look,
    Null,
    Progress,
    Ready,
    Refused,
    Said,
    Start,
    Stop,
    View,
    Words,
    frame,
)

Sink = Callable[[Output | Exception], None]
"""Takes what comes for one request: outputs, the last of which has a finish reason, or one exception instead."""

WATCHDOG_SECONDS = 60.0
COMPILE_SECONDS = 2.0
"""Time for the grammar of a form."""
_LAST_WORDS_SECONDS = 5.0
_STOP_SECONDS = 1.0
_BUFFER = 256

_LOG = log.get(__name__)
_ENGINE_LOG = log.get("omniserve.engine")


class EngineDeadError(Exception):
    """The engine process has ended; no request can be served any more."""


class StepError(Exception):
    """The step that a request was part of has failed; other requests go on."""


class LogitsError(Exception):
    """The model's logits for this request were not finite numbers; other requests go on."""


class LoadError(Exception):
    """The engine could not be loaded, through no fault of the user."""


class AsyncEngine:
    """An engine in a process of its own. `start` loads it, `close` ends it.

    model, options    as for LLM; None if `options.shape` stands for a model
    null              instead: an engine without a model
    command           the engine's command line before the socket's path; default: `engine.process.work` in this Python
    watchdog_seconds  a step that takes longer has its stacks written to standard error and ends the process
    on_landed         called with each step's message, before the requests get their outputs
    on_progress       called as on_progress(phase, done, total) while the model loads

    ready  what was loaded, None before; dead: why the engine can serve no more, None while it can
    view   the answer to the last `look` that was answered
    """

    def __init__(
        self,
        model: str | Path | None,
        options: Options,
        *,
        null: Null | None = None,
        command: Sequence[str] | None = None,
        watchdog_seconds: float = WATCHDOG_SECONDS,
        on_landed: Callable[[Landed], None] | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        level = logging.getLevelName(logging.getLogger("omniserve").getEffectiveLevel()).lower()
        self._start = Start(
            model=None if model is None else str(model),
            options=options,
            null=null,
            log_level=level if level in log.LEVELS else "warning",
        )
        self._command = list(command or (sys.executable, "-P", "-c", START))
        self._watchdog_seconds = watchdog_seconds
        self._on_landed = on_landed
        self._on_progress = on_progress
        self._process: asyncio.subprocess.Process | None = None
        self._transport: asyncio.Transport | None = None
        self._loaded: asyncio.Future[Ready] | None = None
        self._ended = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        self._sinks: dict[str, Sink] = {}
        self._words: asyncio.Task[None] | None = None
        self._compiling: dict[str, asyncio.Future[str | None]] = {}
        self._turns = asyncio.Semaphore(COMPILING)
        self._numbers = itertools.count()
        self._busy = False
        self._heard = 0.0
        self._closing = False
        self.ready: Ready | None = None
        self.dead: str | None = None
        self.view: View | None = None
        self._looking = False

    # Life

    async def start(self) -> Ready:
        """Start the process and return once the model is loaded and warm.

        Raises OmniserveError for the user's mistakes, LoadError for what else went wrong.
        """
        assert self._process is None, "started twice"
        self._loaded = asyncio.get_running_loop().create_future()
        try:
            await self._connect()
            self._send(self._start)
            self.ready = await self._loaded
        except BaseException:
            await self.close()
            raise
        self._heard = time.monotonic()
        self._watch = asyncio.create_task(self._watchdog())
        return self.ready

    async def _connect(self) -> None:
        """Start the process and take its one connection; nothing of the socket stays in the file system."""
        loop = asyncio.get_running_loop()
        folder = Path(tempfile.mkdtemp(prefix="omniserve-"))  # 0700
        try:
            listener = listen(folder / "engine.sock")
            with listener:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    str(folder / "engine.sock"),
                    *sys.path,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C at the terminal is for the server, which ends the engine
                )
                sock = await self._accept(listener)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        await loop.connect_accepted_socket(lambda: _Wire(self), sock)

    async def _accept(self, listener: socket.socket) -> socket.socket:
        loop = asyncio.get_running_loop()
        assert self._process is not None
        accepting = asyncio.ensure_future(loop.sock_accept(listener))
        ending = asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait({accepting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not accepting.done():
                raise LoadError(f"the engine process ended at once (exit code {self._process.returncode})")
            sock, _ = accepting.result()
        finally:
            accepting.cancel()
            ending.cancel()
        peer, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if peer != self._process.pid:
            sock.close()
            raise LoadError(f"process {peer} spoke in place of the engine, which is {self._process.pid}")
        return sock

    async def close(self) -> None:
        """End the process; requests that are still open get EngineDeadError."""
        self._closing = True
        if self._watch is not None:
            self._watch.cancel()
        if self._transport is not None and not self._transport.is_closing():
            self._send(Stop())
        self._die("the engine was stopped")
        if self._process is not None:
            if self.ready is not None:
                try:
                    await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
                except TimeoutError:
                    _LOG.debug("killed %s", log.fields(process=self._process.pid))
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
        if self._transport is not None:
            self._transport.abort()

    async def died(self) -> str:
        """Return why the engine can serve no more, once that is so."""
        await self._ended.wait()
        assert self.dead is not None
        return self.dead

    @property
    def process(self) -> int | None:
        """Process id of the engine, None before it is started."""
        return None if self._process is None else self._process.pid

    # Requests

    @property
    def open(self) -> int:
        """Requests under way."""
        return len(self._sinks)

    def name(self) -> str:
        """Return an id for a request."""
        return str(next(self._numbers))

    def submit(self, request: Add, sink: Sink) -> None:
        """Hand a request to the engine; `sink` takes what comes, from the event loop. Raises EngineDeadError."""
        assert request.id not in self._sinks, request.id
        if self.dead is not None:
            raise EngineDeadError(self.dead)
        assert self.ready is not None, "not started"
        if not self._busy:
            self._busy, self._heard = True, time.monotonic()
        self._sinks[request.id] = sink
        self._send(request)

    async def compile(self, form: StructuredOutputs, words: Callable[[], Words]) -> None:
        """Have the engine make a form ready; requests may then have it.

        words  returns the vocabulary; called once, in a thread
        Raises RequestError for a form that allows nothing or takes too long, EngineDeadError.
        """
        if self._words is None or (self._words.done() and self._words.exception() is not None):
            self._words = asyncio.create_task(self._learn(words))
        await asyncio.shield(self._words)
        await self._turns.acquire()
        answer = self._ask(form)
        answer.add_done_callback(lambda _: self._turns.release())
        done, _ = await asyncio.wait({answer}, timeout=COMPILE_SECONDS)
        if not done:
            raise RequestError(
                f"structured_outputs: making a grammar of it took more than {COMPILE_SECONDS:g} s; make it simpler"
            )
        self._judge(answer)

    async def _learn(self, words: Callable[[], Words]) -> None:
        self._send(await asyncio.to_thread(words))
        answer = self._ask(None)
        await asyncio.wait({answer})
        self._judge(answer)

    def _ask(self, form: StructuredOutputs | None) -> "asyncio.Future[str | None]":
        if self.dead is not None:
            raise EngineDeadError(self.dead)
        name = self.name()
        self._compiling[name] = asyncio.get_running_loop().create_future()
        self._send(Compile(name, form))
        return self._compiling[name]

    def _judge(self, answer: "asyncio.Future[str | None]") -> None:
        if (sentence := answer.result()) is not None:
            raise EngineDeadError(self.dead) if self.dead is not None else RequestError(sentence)

    def abort(self, ids: Iterable[str]) -> None:
        """Drop requests: nothing comes for them any more. Those that have ended are none of its business."""
        gone = [name for name in ids if self._sinks.pop(name, None) is not None]
        if gone and self.dead is None:
            self._send(Abort(gone))

    def look(self) -> None:
        """Ask what the pages are used for; `view` will be the answer. Nothing happens while one is on its way."""
        if self.ready is not None and self.dead is None and not self._looking:
            self._looking = True
            self._send(Look())

    async def generate(
        self,
        tokens: Sequence[int],
        params: SamplingParams,
        *,
        limit: int | None = None,
        stop_ids: Iterable[int] = (),
        bad_words: Iterable[Sequence[int]] = (),
        salt: bytes = b"",
        priority: int = 0,
    ) -> AsyncIterator[Output]:
        """Continue a prompt, yielding outputs as they come; closing the iterator, or cancelling, aborts.

        limit  most tokens to produce; default: `params.max_tokens`, else the rest of the context
        A reader that is slow gets several outputs as one. Raises RequestError, LogitsError, StepError or
        EngineDeadError.
        """
        assert self.ready is not None, "not started"
        request = Add(
            id=self.name(),
            tokens=list(tokens),
            sampling=params,
            limit=limit or params.max_tokens or self.ready.config.limits.max_model_len,
            stop_ids=tuple(stop_ids),
            bad_words=tuple(map(tuple, bad_words)),
            prompt_logprobs=params.prompt_logprobs is not None,
            salt=salt,
            priority=priority,
        )
        outputs = _Outputs()
        self.submit(request, outputs.put)
        try:
            finished = False
            while not finished:
                output = await outputs.get()
                finished = output.finish is not None
                yield output
        finally:
            self.abort([request.id])

    async def drain(self, seconds: float) -> bool:
        """Wait until no request is under way, at most so long; return whether that is so."""
        until = time.monotonic() + seconds
        while self._sinks and time.monotonic() < until:
            await asyncio.sleep(0.02)
        return not self._sinks

    # Messages

    def _send(self, message: msgspec.Struct) -> None:
        assert self._transport is not None
        self._transport.write(frame(message))

    def _connected(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def _take(self, messages: Iterable[FromEngine]) -> None:
        """Take in what came at once. What several steps brought for one request is handed out as one.

        So a server that is behind catches up: text and events are made once per request instead of once per token.
        """
        self._heard = time.monotonic()
        outputs: dict[str, Output] = {}
        for message in messages:
            if not isinstance(message, Landed):
                self._note(message)
                continue
            self._busy = message.stats.running + message.stats.waiting > 0
            if self._on_landed is not None:
                self._on_landed(message)
            for output in message.outputs:
                earlier = outputs.pop(output.request, None)
                if earlier is not None and output.finish in ("error", "abort"):  # what came before is still an answer
                    self._hand_out(earlier)
                    earlier = None
                outputs[output.request] = output if earlier is None else joined(earlier, output)
        for output in outputs.values():
            self._hand_out(output)

    def _note(self, message: FromEngine) -> None:
        match message:
            case View():
                self.view, self._looking = message, False
            case Refused(name, sentence, user):
                if sink := self._sinks.pop(name, None):
                    sink(RequestError(sentence) if user else StepError(sentence))
            case Compiled(name, error):
                if (answer := self._compiling.pop(name, None)) is not None:
                    answer.set_result(error)
            case Said(level, text):
                _ENGINE_LOG.log(level, "%s", text)
            case Progress(phase, done, total):
                if self._on_progress is not None:
                    self._on_progress(phase, done, total)
            case Ready():
                assert self._loaded is not None
                if not self._loaded.done():
                    self._loaded.set_result(message)
            case Failed(sentence, user):
                assert self._loaded is not None
                if not self._loaded.done():
                    self._loaded.set_exception(OmniserveError(sentence) if user else LoadError(sentence))

    def _hand_out(self, output: Output) -> None:
        if output.finish is None:
            if sink := self._sinks.get(output.request):
                sink(output)
        elif sink := self._sinks.pop(output.request, None):
            if output.finish == "error":
                assert output.fault is not None, output
                sink(_error(output.fault))
            elif output.finish == "abort":  # who aborts a request takes its sink away first: this is the engine's own
                sink(StepError("the step that this request was part of has failed"))
            else:
                sink(output)

    def _lost(self) -> None:
        """The socket was closed."""
        if not self._closing:
            self._die("the engine process has ended")
            _LOG.error("engine ended %s", log.fields(process=self.process))

    def _die(self, why: str) -> None:
        if self.dead is not None:
            return
        self.dead = why
        if self._loaded is not None and not self._loaded.done():
            self._loaded.set_exception(LoadError(why))
            self._loaded.exception()  # known: nobody may be waiting
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink(EngineDeadError(why))
        compiling, self._compiling = self._compiling, {}
        for answer in compiling.values():
            answer.set_result(why)
        self._ended.set()

    async def _watchdog(self) -> None:
        """End the engine when it was busy and silent for too long; SIGABRT makes it write its stacks first."""
        while self.dead is None:
            await asyncio.sleep(min(1.0, self._watchdog_seconds / 4))
            silent = time.monotonic() - self._heard
            if not self._busy or silent < self._watchdog_seconds or self.dead is not None:
                continue
            assert self._process is not None
            _LOG.error("step stuck %s", log.fields(seconds=round(silent, 1), process=self._process.pid))
            self._die(f"a step was stuck for {silent:.0f} s")
            self._process.send_signal(signal.SIGABRT)
            try:
                await asyncio.wait_for(self._process.wait(), _LAST_WORDS_SECONDS)
            except TimeoutError:
                self._process.kill()


def _error(fault: Fault) -> Exception:
    return LogitsError(FAULTS[fault]) if fault == "logits" else RequestError(FAULTS[fault])


class _Outputs:
    """What has come for one request and was not read yet; when it is full, outputs become one."""

    def __init__(self) -> None:
        self._outputs: deque[Output] = deque()
        self._error: Exception | None = None
        self._there = asyncio.Event()

    def put(self, output: Output | Exception) -> None:
        if isinstance(output, Exception):
            self._error = output
        elif len(self._outputs) == _BUFFER:
            self._outputs.append(joined(self._outputs.pop(), output))
        else:
            self._outputs.append(output)
        self._there.set()

    async def get(self) -> Output:
        while not self._outputs:
            if self._error is not None:
                raise self._error
            self._there.clear()
            await self._there.wait()
        return self._outputs.popleft()


def joined(first: Output, second: Output) -> Output:
    """Return two outputs of a request, one after the other, as one."""
    return Output(
        request=first.request,
        new_tokens=first.new_tokens + second.new_tokens,
        finish=second.finish,
        usage=second.usage,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs if second.prompt_logprobs is None else second.prompt_logprobs,
    )


def apart(output: Output) -> Iterator[Output]:
    """Yield an output token by token, as it was before it was joined."""
    if len(output.new_tokens) < 2:
        yield output
        return
    last = len(output.new_tokens) - 1
    for place, token in enumerate(output.new_tokens):
        yield output._replace(
            new_tokens=(token,),
            finish=output.finish if place == last else None,
            logprobs=output.logprobs[place : place + 1],
            prompt_logprobs=None if place else output.prompt_logprobs,
        )


class _Wire(asyncio.Protocol):
    """Cuts the engine's bytes into messages."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._frames = Frames()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._engine._connected(transport)

    def data_received(self, data: bytes) -> None:
        self._engine._take([self._decoder.decode(one) for one in self._frames.feed(data)])

    def connection_lost(self, exc: Exception | None) -> None:
        self._engine._lost()


def listen(path: Path) -> socket.socket:
    """Return a socket that listens at `path` for one process of this user."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    listener.bind(str(path))
    os.chmod(path, 0o600)
    listener.listen(1)
    return listener
