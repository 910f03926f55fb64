"""The server's one state: the engine, its tokenizer, what is under way, and whether more is taken in."""

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from omniserve.base import log
from omniserve.base.config import Options
from omniserve.base.errors import RequestError
from omniserve.base.serving import ServerOptions
from omniserve.base.structured import StructuredOutputs
from omniserve.base.types import SamplingParams, check_prompt
from omniserve.client import AsyncEngine
from omniserve.engine.process import Add, Landed, Null, Ready, Words
from omniserve.server.answers import Choice, Prompt, Reply
from omniserve.server.calls import Dialect, dialect, reasons, thinking
from omniserve.server.errors import LONGEST_RETRY, ApiError
from omniserve.server.limits import Queue, Rates
from omniserve.server.metrics import Metrics
from omniserve.server.protocol import Sampling
from omniserve.server.tracing import tracing

if TYPE_CHECKING:
    from omniserve.text import Tokenizer

Result = TypeVar("Result")
State = Literal["loading", "ready", "draining", "dead"]

_LOG = log.get(__name__)
_REPORT_SECONDS = 10.0
_PROGRESS_SECONDS = 5.0
_INLINE = 4096
"""Characters that are tokenized in the event loop; longer texts go to a thread."""


class Service:
    """One model behind one port.

    state   loading, then ready; draining once it is to stop, dead once the engine has ended
    dialect  how the model writes tool calls, if it does; reasons: whether it writes its reasoning
    loading  how far the loading has come, in words
    names   by which clients ask for the model; the first is the one that answers name
    """

    def __init__(
        self,
        model: str | None,
        options: Options,
        server: ServerOptions,
        *,
        null: Null | None = None,
        command: Sequence[str] | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.options = options
        self.server = server
        self.names = server.served_model_name or (_default_name(model, options, null),)
        self.state: State = "loading"
        self.created = int(time.time())
        self.metrics = Metrics(self.names[0], server.metrics_prefix)
        self.queue = Queue(server.max_num_queued_reqs, server.max_num_queued_tokens)
        self.tracing = tracing(server.otlp_traces_endpoint)
        self.rates = Rates(server.limits.key_requests_per_minute)
        self.engine = AsyncEngine(
            model,
            options,
            null=null,
            command=command,
            watchdog_seconds=server.limits.watchdog,
            on_landed=self._landed,
            on_progress=self._progress,
        )
        self.loading = "started"
        self._on_progress = on_progress
        self._told = time.monotonic()
        self.ready: Ready | None = None
        self.replies: set[Reply] = set()
        self._null = null is not None
        self._tokenizer: Tokenizer | None = None
        self.dialect: Dialect | None = None
        self.reasons = False
        self._defaults: Mapping[str, Any] = {}
        self._choices: dict[str, Choice] = {}
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="tokenizer")
        self._ticking: asyncio.Task[None] | None = None

    # Life

    async def load(self) -> Ready:
        """Load the model and its tokenizer. Raises OmniserveError or LoadError."""
        imported = asyncio.get_running_loop().run_in_executor(self._threads, _import_text)
        ready = await self.engine.start()
        await imported
        from omniserve.generation import generation_defaults

        self._tokenizer = await self._in_thread(self._load_tokenizer, ready)
        self.dialect = dialect(self.server.tool_call_parser, self._tokenizer.template)
        self.reasons = reasons(self.server.reasoning_parser, self._tokenizer.template)
        self._defaults = generation_defaults(Path(ready.path))
        SamplingParams(**self._defaults)  # a value that is not allowed is refused now, not in each request
        self.ready = ready
        self.metrics.loaded(ready)
        self._ticking = asyncio.create_task(self._tick())
        if self.state == "loading":
            self.state = "ready"
        return ready

    def _progress(self, phase: str, done: int, total: int) -> None:
        """Note how far a phase of loading has come; the log tells it now and then, for who sees no bars."""
        self.loading = f"{phase} {done} of {total}"
        if self._on_progress is not None:
            self._on_progress(phase, done, total)
        if time.monotonic() - self._told >= _PROGRESS_SECONDS:
            self._told = time.monotonic()
            _LOG.info("loading %s", log.fields(phase=phase, done=done, total=total))

    def _load_tokenizer(self, ready: Ready) -> "Tokenizer":
        from omniserve.formats.dummy import CONFIGS, DummySource
        from omniserve.text import Tokenizer

        shape = "tiny" if self._null else self.options.shape
        source = Path(ready.path) if shape is None else DummySource(shape, CONFIGS[shape], {})
        most = self.server.limits.prompt_bytes(ready.config.limits.max_model_len)
        tokenizer = Tokenizer.load(source, self.options.chat_template, max_prompt_bytes=most)
        try:
            tokenizer.render([{"role": "user", "content": "a"}])  # starts the process that renders
        except RequestError as error:
            _LOG.info("no chat %s", log.fields(reason=error))
        return tokenizer

    async def died(self) -> str:
        """Return why the engine has ended, once it has."""
        why = await self.engine.died()
        self.state = "dead"
        return why

    def drain(self) -> None:
        """Take in no more requests."""
        if self.state != "dead":
            self.state = "draining"

    async def drained(self, seconds: float) -> bool:
        """Wait until nothing is under way, at most so long; return whether that is so."""
        until = time.monotonic() + seconds
        while self.replies and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return not self.replies

    def fail_all(self, error: Exception) -> None:
        """End everything that is under way with an error."""
        for reply in list(self.replies):
            reply.fail(error)

    async def close(self) -> None:
        """End the engine and what belongs to it."""
        if self._ticking is not None:
            self._ticking.cancel()
        await self.engine.close()
        if self.tracing is not None:
            await self.tracing.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # What requests need

    @property
    def tokenizer(self) -> "Tokenizer":
        """The model's tokenizer; there is one once the server is ready."""
        assert self._tokenizer is not None, self.state
        return self._tokenizer

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and answer."""
        assert self.ready is not None, self.state
        return self.ready.config.limits.max_model_len

    def text(self, token: int) -> str:
        """Return the text of one token."""
        return self.tokenizer.decode_one(token)

    def accept(self) -> None:
        """Raise ApiError 503 unless requests are taken in."""
        match self.state:
            case "loading":
                self.metrics.rejected("loading")
                raise ApiError(503, "the model is still loading", retry_after=5)
            case "draining":
                self.metrics.rejected("draining")
                raise ApiError(503, "the server is shutting down", retry_after=LONGEST_RETRY)
            case "dead":
                raise ApiError(
                    503, "the engine has stopped: the server must be started again", retry_after=LONGEST_RETRY
                )

    def known(self, model: str | None) -> str:
        """Return the name of the model that a request asks for. Raises ApiError 404."""
        if model is None:
            return self.names[0]
        if model not in self.names:
            raise ApiError(404, f"no model {_short(model)}: this server has {', '.join(self.names)}", param="model")
        return model

    def defaults(self) -> Mapping[str, Any]:
        """Sampling parameters that the model's generation_config.json sets."""
        return self._defaults

    async def encode(self, text: str, *, special: bool = True, param: str = "prompt") -> list[int]:
        """Return the tokens of a text. Raises ApiError 400 for one that is too long to be tokenized."""
        self.check_bytes(len(text), param)
        if len(text) <= _INLINE:
            return self.tokenizer.encode(text, special=special)
        return await self._in_thread(lambda: self.tokenizer.encode(text, special=special))

    async def encode_chat(self, messages: list[dict[str, Any]], **options: Any) -> tuple[list[int], bool]:
        """Return the tokens of a conversation, and whether it ends within the model's reasoning.

        Raises ApiError or RequestError.
        """
        self.check_bytes(sum(len(str(message["content"])) for message in messages), "messages")

        def chat() -> tuple[list[int], bool]:
            text = self.tokenizer.render(messages, **options)
            return self.tokenizer.encode(text, special=False), thinking(text)

        return await self._in_thread(chat)

    def check_bytes(self, size: int, param: str) -> None:
        """Raise ApiError 400 for a prompt of more characters than it may have bytes."""
        most = self.server.limits.prompt_bytes(self.max_model_len)
        if size > most:
            raise ApiError(
                400,
                f"{param} has {size} characters: at most {most} bytes are tokenized (max_model_len is "
                f"{self.max_model_len} tokens)",
                param=param,
            )

    async def compile(self, form: StructuredOutputs) -> None:
        """Make a form ready for a request. Raises RequestError or EngineDeadError."""
        tokenizer = self.tokenizer

        def words() -> Words:
            return Words(tokenizer=tokenizer.as_json(), eos_ids=tuple(sorted(tokenizer.eos_ids)))

        await self.engine.compile(form, words)

    async def _in_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    # Admission

    def turn_away(self, sequences: int, tokens: int = 0) -> None:
        """Raise ApiError unless so many sequences and prompt tokens find a place now."""
        self.queue.fits(sequences)
        reason = self.queue.full(sequences, tokens)
        if reason is None:
            return
        self.metrics.rejected(reason)
        under_way = f"{self.queue.sequences} sequences and {self.queue.tokens} prompt tokens are under way"
        most = self.server.max_num_queued_reqs if reason == "reqs" else self.server.max_num_queued_tokens
        raise ApiError(
            503,
            f"the queue is full: {under_way}, at most {most} {'sequences' if reason == 'reqs' else 'tokens'} may be",
            retry_after=self.queue.seconds(),
        )

    def open(
        self,
        body: Sampling,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        prefix: str,
        key: str | None,
        echo: bool = False,
    ) -> Reply:
        """Hand a request to the engine, all of it or nothing. Raises ApiError, RequestError or EngineDeadError."""
        from omniserve.generation import check, seeded

        self.accept()
        assert self.ready is not None
        checked = check(params, self.tokenizer, self.ready.vocab)
        if body.priority and self.ready.config.policy != "priority":
            raise ApiError(
                400,
                f"priority must be 0, not {body.priority}: this server answers in order of arrival "
                "(--scheduling-policy fcfs)",
                param="priority",
            )
        limits = [self._limit(prompt, params) for prompt in prompts]
        tokens = sum(len(prompt.ids) for prompt in prompts)
        self.turn_away(len(prompts) * params.n, tokens * params.n)
        options = body.stream_options
        reply = Reply(
            prefix=prefix,
            model=self.known(body.model),
            stream=bool(body.stream),
            n=params.n,
            on_first=self._first,
            on_gap=self.metrics.gap,
            on_end=self._ended,
            abort=self.engine.abort,
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
            engine_stats=self.ready.config.sparsity if body.include_engine_stats else None,
            echo=echo,
            logprobs=params.logprobs,
        )
        salt = _salt(key, body.cache_salt)
        for prompt, limit in zip(prompts, limits, strict=True):
            leader: str | None = None
            for place in range(params.n):
                request = Add(
                    id=self.engine.name(),
                    tokens=prompt.ids,
                    sampling=seeded(params, place),
                    limit=limit,
                    stop_ids=checked.stop_ids,
                    bad_words=checked.bad_words,
                    prompt_logprobs=params.prompt_logprobs is not None,
                    leader=leader,
                    salt=salt,
                    priority=body.priority or 0,
                )
                leader = leader or request.id
                choice = Choice(reply, len(reply.choices), prompt, request, self.tokenizer)
                reply.add(choice)
                self._choices[request.id] = choice
                self.queue.enter(len(prompt.ids))
        self.replies.add(reply)
        try:
            for choice in reply.choices:
                self.engine.submit(choice.request, choice.take)
        except BaseException:
            reply.close()
            raise
        return reply

    def _limit(self, prompt: Prompt, params: SamplingParams) -> int:
        """Return how many tokens a prompt can be continued by. Raises RequestError or ApiError."""
        assert self.ready is not None
        check_prompt(prompt.ids, self.ready.vocab)
        size, longest = len(prompt.ids), self.max_model_len
        if size >= longest:
            raise ApiError(
                400,
                f"the prompt has {size} tokens: max_model_len is {longest} and one must be left for the answer",
                param="prompt",
            )
        limit = min(params.max_tokens or longest, longest - size)
        if size + limit > self.ready.capacity:
            raise ApiError(
                400,
                f"the request needs {size + limit} tokens of KV cache ({size} prompt, {limit} to produce): the pool "
                f"holds {self.ready.capacity}",
                param="max_tokens",
            )
        return limit

    # What happens to requests

    def _landed(self, message: Landed) -> None:
        self.metrics.landed(message)
        for name, when in message.admitted:
            choice = self._choices.get(name)
            if choice is not None and choice.admitted is None:
                choice.admitted = when

    def _first(self, choice: Choice) -> None:
        self.queue.prefilled(len(choice.prompt.ids))
        self.metrics.first(choice)

    def _ended(self, choice: Choice) -> None:
        self._choices.pop(choice.request.id, None)
        if choice.first is None:
            self.queue.prefilled(len(choice.prompt.ids))
        self.queue.leave()
        self.metrics.ended(choice)
        if not choice.reply.open:
            self.replies.discard(choice.reply)
            if self.tracing is not None:
                self.tracing.ended(choice.reply)

    async def _tick(self) -> None:
        """Once a second: answers that wait too long fail, silent streams are told that they live."""
        reported = time.monotonic()
        while True:
            await asyncio.sleep(1)
            now = time.monotonic()
            self.metrics.recent.mark()
            for reply in list(self.replies):
                most = self.server.limits.request_timeout
                if now - reply.arrival > most and not reply.started:
                    reply.fail(ApiError(504, f"no token within {most:g} s"))
                elif reply.stream and now - reply.sent > self.server.limits.ping:
                    reply.ping = True
                    reply.wake.set()
            if now - reported >= _REPORT_SECONDS:
                reported = now
                self._report()

    def _report(self) -> None:
        prompt, produced = self.metrics.recent.speeds()
        if not self.replies and not produced and not prompt:
            return
        stats = self.metrics.stats
        _LOG.info(
            "throughput %s",
            log.fields(
                prompt_tokens_per_second=round(prompt, 1),
                tokens_per_second=round(produced, 1),
                running=stats.running,
                waiting=stats.waiting,
                kv_pages_used=sum(stats.held.values()),
            ),
        )

    def queue_age(self) -> float:
        """Return how many seconds the oldest request without a slot has waited."""
        waiting = (choice.reply.arrival for choice in self._choices.values() if choice.admitted is None)
        return round(max(time.monotonic() - next(waiting, time.monotonic()), 0.0), 2)


def _import_text() -> None:
    """Import the tokenizers while the engine loads."""
    import omniserve.generation  # noqa: F401


def _default_name(model: str | None, options: Options, null: Null | None) -> str:
    if null is not None:
        return "null"
    if model is None:
        return str(options.shape)
    return Path(model).name if Path(model).exists() else model


def _salt(key: str | None, salt: str | None) -> bytes:
    """Return what keeps prefixes apart: those of different keys, and of different salts."""
    if key is None and not salt:
        return b""
    return hashlib.sha256(hashlib.sha256((key or "").encode()).digest() + (salt or "").encode()).digest()


def _short(text: str) -> str:
    return repr(text[:80])
