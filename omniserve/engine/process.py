"""The engine as a process of its own: msgspec messages over a unix socket, never pickle.

The server starts the process, which connects to its socket, is told what to load, and then steps while it has work and
waits for messages while it has none. torch is imported when the model is loaded, not before: the messages are the
server's words too.
"""

import faulthandler
import logging
import os
import queue
import select
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NoReturn

import msgspec

from omniserve.base import log
from omniserve.base.config import EngineConfig, Options, Sparsity, resolve
from omniserve.base.errors import OmniserveError, RequestError
from omniserve.base.spec import Device, ModelSpec
from omniserve.base.structured import Grammar, StructuredOutputs
from omniserve.base.types import PAGE, Kind, Output, Request, SamplingParams, Step, StepResult

if TYPE_CHECKING:
    from omniserve.engine.build import Built
    from omniserve.engine.engine import Engine, Executor, Handle
    from omniserve.engine.grammar import Grammars

START = (
    "import sys; path = sys.argv[1]; sys.path[:] = sys.argv[2:]; from omniserve.engine.process import work; work(path)"
)
"""What `python -c` runs, with the socket's path and the module paths as arguments."""
DIED = 3
"""Exit code of an engine that cannot go on."""

COMPILING = 2
"""Forms that are compiled at once."""

_LOG = log.get(__name__)
_FATAL_FAILURES = 3
_LARGEST = 1 << 30
_SENDS = 1 << 20


# Messages to the engine


class Null(msgspec.Struct, frozen=True, kw_only=True):
    """An engine without a model: every step takes this long and draws some letter for each request."""

    step_seconds: float


class Start(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """What to load; the first message."""

    model: str | None
    options: Options
    null: Null | None = None
    log_level: str = "info"


class Add(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A request. leader: id of an open one with the same prompt, whose pages this one shares."""

    id: str
    tokens: list[int]
    sampling: SamplingParams
    limit: int
    stop_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    prompt_logprobs: bool = False
    leader: str | None = None
    salt: bytes = b""
    priority: int = 0


class Words(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The vocabulary, for grammars: the text of a tokenizer.json. Before the first form."""

    tokenizer: str
    eos_ids: tuple[int, ...]


class Compile(msgspec.Struct, tag=True, frozen=True):
    """A form that a request is about to have; None: only make the vocabulary ready. Answered by Compiled."""

    id: str
    form: StructuredOutputs | None


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Requests that nobody waits for any more."""

    ids: list[str]


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Drop everything and end."""


class Look(msgspec.Struct, tag=True, frozen=True):
    """Somebody watches: say what the pages are used for."""


ToEngine = Start | Words | Compile | Add | Abort | Look | Stop


# Messages from the engine


class Progress(msgspec.Struct, tag=True, frozen=True):
    """How far a phase of loading has come."""

    phase: str
    done: int
    total: int


class Ready(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """What was loaded.

    capacity               tokens that one request can have
    pages                  of each kind of heads
    kv_token_bytes         of a token in the KV cache; kv_token_bytes_fp16: the same in 16 bits, without scales
    heads                  per layer, the first letter of each key head's kind
    """

    model: str
    path: str
    config: EngineConfig
    vocab: int
    capacity: int
    pages: dict[str, int]
    weight_bytes: int
    kv_bytes: int
    kv_token_bytes: int
    kv_token_bytes_fp16: int
    heads: tuple[str, ...]
    rounding: str
    seconds: dict[str, float]
    operations: dict[str, str]
    warnings: tuple[str, ...]


class Failed(msgspec.Struct, tag=True, frozen=True):
    """Nothing was loaded. user: the sentence is about something that the user can mend."""

    sentence: str
    user: bool


class Stats(msgspec.Struct, frozen=True, array_like=True):
    """What the engine holds; the counters count from its start, prefix queries and hits in tokens."""

    running: int
    waiting: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    held: dict[str, int]
    cached: dict[str, int]
    corrupted: int = 0


class Landed(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """What a step brought.

    tokens    of the steps handed to the device since the last message, prompt and produced
    admitted  requests that took a slot in them, and when (time.monotonic, which all processes share)
    """

    outputs: list[Output]
    tokens: int
    admitted: list[tuple[str, float]]
    stats: Stats


class View(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """What the pages are used for.

    states    of the pages of each kind of heads, a byte each (`cache/pool.py`); those after the last byte are free
    requests  of each running one: pages held, and pages that its next token reads at most
    """

    states: dict[str, bytes]
    requests: list[tuple[int, int]]


class Refused(msgspec.Struct, tag=True, frozen=True):
    """A request that can never be served. user: the sentence is about something that the user can mend."""

    id: str
    sentence: str
    user: bool


class Compiled(msgspec.Struct, tag=True, frozen=True):
    """A form is ready, or cannot be: why."""

    id: str
    error: str | None


class Said(msgspec.Struct, tag=True, frozen=True):
    """A line for the log: one process writes it."""

    level: int
    text: str


FromEngine = Progress | Ready | Failed | Landed | View | Refused | Compiled | Said


# The wire


_ENCODER = msgspec.msgpack.Encoder()


def frame(message: msgspec.Struct) -> bytearray:
    """Return a message as it goes over the wire: its length in 4 bytes, little end first, then msgpack."""
    data = bytearray(4)
    _ENCODER.encode_into(message, data, 4)
    assert len(data) - 4 <= _LARGEST, len(data)
    struct.pack_into("<I", data, 0, len(data) - 4)
    return data


class Frames:
    """Cuts what comes over the wire into messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take in bytes and yield each whole message."""
        self._data += data
        start = 0
        try:
            while len(self._data) - start >= 4:
                (size,) = struct.unpack_from("<I", self._data, start)
                if size > _LARGEST:
                    raise ConnectionError(f"a message of {size} bytes")
                if len(self._data) - start - 4 < size:
                    break
                start += 4 + size
                yield bytes(memoryview(self._data)[start - size : start])
        finally:
            del self._data[:start]


class Link:
    """The engine's end of the socket. Sending never waits: what the socket does not take is kept for later."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SENDS)
        self._sock = sock
        self._frames = Frames()
        self._out = bytearray()
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        self._poll = select.poll()
        self._woken = os.eventfd(0, os.EFD_NONBLOCK)
        self._poll.register(self._woken, select.POLLIN)

    def send(self, message: msgspec.Struct) -> None:
        """Hand a message over."""
        self._out += frame(message)
        self._flush()

    def wake(self) -> None:
        """Let `receive` return with what has come, if it waits. For other threads."""
        os.eventfd_write(self._woken, 1)

    def receive(self, *, wait: bool) -> list[ToEngine]:
        """Return what has come. `wait`: until something comes, or `wake` is called.

        Raises EOFError when the other end is gone.
        """
        while True:
            if wait or self._out:
                self._poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._out else 0))
                ready = self._poll.poll(None if wait else 0)
                if any(which == self._woken for which, _ in ready):
                    os.eventfd_read(self._woken)
                    wait = False
            self._flush()
            try:
                data = self._sock.recv(1 << 18)
            except BlockingIOError:
                data = None
            if data == b"":
                raise EOFError
            messages = [] if data is None else [self._decoder.decode(one) for one in self._frames.feed(data)]
            if messages or not wait:
                return messages

    def flush(self) -> None:
        """Send what is kept, waiting for the other end."""
        self._sock.setblocking(True)
        self._sock.sendall(self._out)
        self._out.clear()

    def _flush(self) -> None:
        while self._out:
            try:
                sent = self._sock.send(memoryview(self._out)[:_SENDS])
            except BlockingIOError:
                return
            del self._out[:sent]


class _Forward(logging.Handler):
    """Sends the log to the process that writes it."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += " " + log.fields(traceback="".join(traceback.format_exception(record.exc_info[1])))
        self._link.send(Said(record.levelno, text))


# The process


Load = Callable[[Start, Link], "tuple[Engine, Ready]"]


def work(path: str, load: Load | None = None) -> NoReturn:
    """Be the engine of the server that listens at `path`, as `load` makes it; ends the process."""
    faulthandler.enable()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(path)
    link = Link(sock)
    code = _work(link, load or load_engine)
    try:
        link.flush()
    except OSError:
        code = code or 0
    sys.stderr.flush()
    os._exit(code)  # nothing is left to save, and a thread of a library may hang


def _work(link: Link, load: Load) -> int:
    try:
        (start, *_) = link.receive(wait=True)
        assert isinstance(start, Start), start
        root = logging.getLogger("omniserve")
        root.handlers = [_Forward(link)]
        root.setLevel(start.log_level.upper())
        try:
            engine, ready = load(start, link)
            warm_up = _warm_up(engine)
        except OmniserveError as error:
            link.send(Failed(str(error), user=True))
            return 2
        except ConnectionError:
            raise
        except Exception as error:  # the process's top level: whatever it is, it is reported in one line
            _LOG.debug("not loaded", exc_info=True)
            link.send(Failed(f"{type(error).__name__}: {' '.join(str(error).split())}", user=False))
            return 1
        serve(engine, link, msgspec.structs.replace(ready, seconds={**ready.seconds, "warmup": warm_up}))
    except (EOFError, ConnectionError):
        pass  # the server is gone, and nobody is left to tell
    except Exception:
        _LOG.error("engine died", exc_info=True)
        return DIED
    return 0


def serve(engine: "Engine", link: Link, ready: Ready) -> None:
    """Say that the engine is ready and run it until the server says Stop, or is gone (EOFError).

    A step that fails takes the requests in flight with it; after three in a row its error is raised.
    """
    observed = _Observed(engine.executor)
    engine.executor = observed
    link.send(ready)
    requests: dict[str, Request] = {}
    grammars = _Compiling(link, ready.vocab)
    failures = 0
    while True:
        aborted = False
        for message in link.receive(wait=not engine.has_work):
            match message:
                case Add():
                    _add(engine, message, requests, grammars, link)
                case Words():
                    grammars.learn(message)
                case Compile():
                    grammars.submit(message)
                case Abort(ids):
                    for name in ids:
                        engine.abort(name)
                        requests.pop(name, None)
                    aborted = True
                case Look():
                    link.send(_view(engine, ready.config.sparsity))
                case Stop():
                    engine.close()
                    return
                case Start():
                    raise AssertionError(message)
        grammars.report()
        outputs: list[Output] = []
        tokens, admitted = 0, list[tuple[str, float]]()
        if engine.has_work:
            try:
                outputs = engine.step()
            except Exception as error:  # what a step can raise is not known here; the requests it took along are told
                failures += 1
                _LOG.error("step failed %s", log.fields(error=type(error).__name__, in_a_row=failures), exc_info=True)
                if failures == _FATAL_FAILURES:
                    raise
                observed.drain()
            else:
                tokens, admitted = observed.drain()
                failures = 0 if tokens else failures
        elif not aborted:
            continue
        for output in outputs:
            if output.finish is not None:
                requests.pop(output.request, None)
        link.send(Landed(outputs=outputs, tokens=tokens, admitted=admitted, stats=_stats(engine)))


class _Compiling:
    """Forms on their way to grammars, in threads beside the steps."""

    def __init__(self, link: Link, vocab: int) -> None:
        self._link = link
        self._vocab = vocab
        self._threads = ThreadPoolExecutor(COMPILING, thread_name_prefix="grammar")
        self._done: queue.SimpleQueue[Compiled] = queue.SimpleQueue()
        self._grammars: Grammars | None = None

    def learn(self, words: Words) -> None:
        """Take in the vocabulary."""
        from omniserve.engine.grammar import Grammars

        self._grammars = Grammars(lambda: words.tokenizer, words.eos_ids, self._vocab)

    def submit(self, wanted: Compile) -> None:
        """Begin with a form."""
        self._threads.submit(self._compile, wanted)

    def _compile(self, wanted: Compile) -> None:
        error = None
        try:
            assert self._grammars is not None, "a form before the vocabulary"
            if wanted.form is None:
                self._grammars.ready()
            else:
                self._grammars.compile(wanted.form)
        except OmniserveError as refusal:
            error = str(refusal)
        except BaseException:  # of the library: whoever waits for the form must hear of it
            _LOG.error("form not compiled", exc_info=True)
            error = "structured_outputs: the form could not be compiled"
        self._done.put(Compiled(wanted.id, error))
        self._link.wake()

    def report(self) -> None:
        """Say what is ready."""
        while not self._done.empty():
            self._link.send(self._done.get())

    def grammar(self, form: StructuredOutputs) -> Grammar:
        """Return a form's grammar, which is kept from its compilation. Raises RequestError."""
        if self._grammars is None:
            raise RequestError("structured_outputs: the engine has not been told the vocabulary")
        return self._grammars.compile(form)


def _add(engine: "Engine", add: Add, requests: dict[str, Request], grammars: _Compiling, link: Link) -> None:
    form = add.sampling.structured_outputs
    request = Request(
        id=add.id,
        tokens=add.tokens,
        prompt=len(add.tokens),
        sampling=add.sampling,
        stop_ids=frozenset(add.stop_ids),
        bad_words=add.bad_words,
        limit=add.limit,
        reduce="logprobs" if add.prompt_logprobs else None,
        leader=None if add.leader is None else requests.get(add.leader),
        salt=add.salt,
        priority=add.priority,
    )
    try:
        if form is not None:
            request.grammar = grammars.grammar(form)
        engine.add(request)
    except OmniserveError as error:
        link.send(Refused(add.id, str(error), user=True))
    except Exception as error:  # whatever it is, it is this request's failure and no other's
        _LOG.error("request not queued %s", log.fields(error=type(error).__name__), exc_info=True)
        link.send(Refused(add.id, "the request could not be queued", user=False))
    else:
        requests[add.id] = request


def _stats(engine: "Engine") -> Stats:
    scheduler = engine.scheduler
    pools = scheduler.cache.pools
    return Stats(
        running=scheduler.running,
        waiting=scheduler.waiting,
        preemptions=scheduler.stats.preemptions,
        prefix_queries=scheduler.stats.prefix_queries,
        prefix_hits=scheduler.stats.prefix_hits,
        held={kind.value: pool.held for kind, pool in pools.items()},
        cached={kind.value: pool.cached for kind, pool in pools.items()},
        corrupted=scheduler.stats.corrupted,
    )


def _view(engine: "Engine", sparsity: Sparsity) -> View:
    cache = engine.scheduler.cache
    return View(
        states={kind.value: pool.states for kind, pool in cache.pools.items()},
        requests=[
            (sum(held.values()), sum(sparsity.pages_read(kind, count) for kind, count in held.items()))
            for held in cache.holdings()
        ],
    )


class _Observed:
    """An executor that notes what goes through it."""

    def __init__(self, executor: "Executor") -> None:
        self._executor = executor
        self._tokens = 0
        self._admitted: list[tuple[str, float]] = []

    def submit(self, step: Step) -> "Handle":
        self._tokens += step.tokens
        for work in step.works:
            if work.admission is not None:
                self._admitted.append((work.request, time.monotonic()))
        return self._executor.submit(step)

    def drain(self) -> tuple[int, list[tuple[str, float]]]:
        """Return tokens and admissions since the last call."""
        tokens, admitted = self._tokens, self._admitted
        self._tokens, self._admitted = 0, []
        return tokens, admitted

    def close(self) -> None:
        self._executor.close()


# Loading


def load_engine(start: Start, link: Link) -> tuple["Engine", Ready]:
    """Return the engine that a server asks for. Raises OmniserveError."""
    if start.null is not None:
        return null_engine(start.null.step_seconds, start.options)
    from omniserve.engine.build import build

    built = build(start.model, start.options, on_load=lambda *progress: link.send(Progress(*progress)))
    return built.engine, described(built)


def described(built: "Built") -> Ready:
    """Return what a server is told about a loaded engine."""
    from omniserve.ops.dispatch import choices

    pools, spec = built.engine.scheduler.cache.pools, built.spec
    return Ready(
        model=built.plan.model,
        path=str(built.source.path),
        config=built.config,
        vocab=spec.vocab,
        # Streaming heads alone hold a window, whatever the length: then the model's limit is what counts.
        capacity=min(
            built.engine.scheduler.cache.capacity, max(built.plan.kv_tokens, built.config.limits.max_model_len)
        ),
        pages={kind.value: pool.total for kind, pool in pools.items()},
        weight_bytes=built.plan.weight_bytes,
        kv_bytes=built.plan.kv_bytes,
        kv_token_bytes=built.plan.kv_token_bytes,
        kv_token_bytes_fp16=4 * spec.layers * spec.kv_heads * spec.head_dim,
        heads=built.heads,
        rounding=built.plan.rounding,
        seconds=built.plan.seconds,
        operations=choices(built.config.device.kind, reference=built.config.backend == "reference"),
        warnings=built.warnings,
    )


def _warm_up(engine: "Engine") -> float:
    """Run a prompt and a token, so that the first request finds everything in place, and return the seconds it took."""
    started = time.perf_counter()
    greedy = SamplingParams(temperature=0.0, seed=0, max_tokens=2)
    engine.add(Request(id="warm-up", tokens=[0] * 8, prompt=8, sampling=greedy, limit=2))
    engine.drain()
    spent = time.perf_counter() - started
    _LOG.info("warm-up %s", log.fields(seconds=round(spent, 3)))
    return spent


def null_engine(step_seconds: float, options: Options) -> tuple["Engine", Ready]:
    """Return an engine that has all but a model: what it takes to serve can be measured with it."""
    from omniserve.cache.manager import CacheManager
    from omniserve.cache.pool import PagePool
    from omniserve.engine.engine import Engine
    from omniserve.engine.scheduler import Scheduler

    spec = ModelSpec(
        family="null", layers=1, hidden=1, heads=1, kv_heads=1, head_dim=1, ffn=1, vocab=256, context=8192, norm_eps=0.0
    )
    device = Device(kind="cpu", memory_bytes=1 << 40)
    resolved = resolve(
        options, spec, device, stored=None, dtype="float32", token_bytes=1, free_bytes=device.memory_bytes
    )
    pool = PagePool(resolved.cache.memory_bytes // PAGE)
    cache = CacheManager({Kind.RETRIEVAL: pool}, prefix_caching=resolved.cache.prefix_caching)
    scheduler = Scheduler(resolved.limits, cache, seed=resolved.seed, priorities=resolved.policy == "priority")
    ready = Ready(
        model="null",
        path="null",
        config=resolved,
        vocab=spec.vocab,
        capacity=pool.total * PAGE,
        pages={Kind.RETRIEVAL.value: pool.total},
        weight_bytes=0,
        kv_bytes=0,
        kv_token_bytes=1,
        kv_token_bytes_fp16=1,
        heads=(),
        rounding="",
        seconds={},
        operations={},
        warnings=(f"no model: every step takes {1000 * step_seconds:g} ms and draws letters",),
    )
    return Engine(scheduler, NullExecutor(step_seconds), overlap=resolved.overlap), ready


class NullExecutor:
    """A device without a model, which works while the host goes on: steps follow each other, each takes `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._free = 0.0

    def submit(self, step: Step) -> "_NullHandle":
        """Begin a step once those before it have ended."""
        self._free = max(self._free, time.monotonic()) + self._seconds
        tokens = {work.request: _LETTER + (work.start + work.count) % 26 for work in step.works if work.draws}
        return _NullHandle(StepResult(tokens=tokens), self._free)

    def close(self) -> None:
        """Nothing to stop."""


_LETTER = ord("A") - ord("!")
"""Id of the letter A among the bytes that the tokenizer of dummy weights knows, in the order of their signs."""


class _NullHandle:
    def __init__(self, result: StepResult, end: float) -> None:
        self._result = result
        self._end = end

    def result(self) -> StepResult:
        time.sleep(max(self._end - time.monotonic(), 0.0))
        return self._result
