"""What becomes of a request: its prompts, their continuations under way, and their text.

Text is made as tokens come in, whether or not somebody reads it, so that a stop string ends a request at once. What a
slow reader has not taken yet waits in a bounded list of pieces.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omniserve.base import log
from omniserve.base.config import Sparsity
from omniserve.base.types import FinishReason, Output, TokenLogprobs, Usage
from omniserve.client import apart
from omniserve.engine.process import Add
from omniserve.server.errors import INTERNAL, ApiError, from_exception

if TYPE_CHECKING:
    from omniserve.text import Tokenizer

_LOG = log.get(__name__)
BUFFER = 256
"""Pieces that wait for a slow reader; further ones are joined with the last of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt as it came and in tokens; text is None where ids came."""

    text: str | None
    ids: list[int]


@dataclass(slots=True, kw_only=True)
class Piece:
    """What a step brought for one continuation; completion_tokens: of this continuation until then."""

    text: str
    logprobs: list[TokenLogprobs]
    completion_tokens: int
    finish: FinishReason | None = None


class Choice:
    """One continuation under way.

    arrival, admitted, first, last  when its request came, took a slot, brought its first and its latest token
    pieces                          what was not taken yet
    prompt_logprobs                 of the prompt's tokens after the first, if they were asked for
    """

    def __init__(self, reply: "Reply", index: int, prompt: Prompt, request: Add, tokenizer: "Tokenizer") -> None:
        from omniserve.generation import Answer

        self.reply = reply
        self.index = index
        self.prompt = prompt
        self.request = request
        self.admitted: float | None = None
        self.first: float | None = None
        self.last = 0.0
        self.tokens = 0
        self.usage = Usage(prompt_tokens=len(prompt.ids), completion_tokens=0)
        self.finish: FinishReason | None = None
        self.closed = False
        self.pieces: list[Piece] = []
        self.prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
        self._answer = Answer(request.sampling, request.stop_ids, tokenizer)

    def take(self, output: Output | Exception) -> None:
        """Take what comes from the engine. What fails on the way to a text is this answer's failure and no other's."""
        try:
            if isinstance(output, Exception):
                self.reply.fail(output)
            elif self.request.sampling.stop:  # which token ends an answer must not depend on how many came at once
                for one in apart(output):
                    self._take(one)
            else:
                self._take(output)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            _LOG.error("answer failed %s", log.fields(id=self.reply.id, error=type(error).__name__), exc_info=True)
            self.reply.fail(ApiError(500, INTERNAL))

    def _take(self, output: Output) -> None:
        if self.closed:
            return
        now = time.monotonic()
        reply = self.reply
        if output.new_tokens:
            if self.first is None:
                self.first = now
                reply.on_first(self)
            else:
                reply.on_gap(now - self.last, len(output.new_tokens))
            self.last = now
            self.tokens += len(output.new_tokens)
        self.usage = output.usage
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        text = self._answer.take(output)
        self.finish = self._answer.finish
        if text or output.logprobs or self.finish is not None:
            self._keep(Piece(text=text, logprobs=list(output.logprobs), completion_tokens=self.tokens))
        if self.finish is not None:
            self.pieces[-1].finish = self.finish
            reply.ended(self)
        elif reply.stream and not reply.on_pieces():
            reply.wake.set()

    def _keep(self, piece: Piece) -> None:
        if self.reply.stream and len(self.pieces) >= BUFFER:
            last = self.pieces[-1]
            last.text += piece.text
            last.logprobs += piece.logprobs
            last.completion_tokens = piece.completion_tokens
        else:
            self.pieces.append(piece)


@dataclass(slots=True, kw_only=True, eq=False)
class Reply:
    """The answer to one HTTP request: p prompts with n continuations each, by index.

    on_first, on_gap, on_end  are told of a continuation's first token, the seconds before later ones, and its end
    abort                     drops requests of the engine
    engine_stats              the engine's sparsity, if the answer is to tell what it took
    traceparent               of the request, for spans (`tracing.py`)
    on_pieces                 is told that there are pieces to read; returns whether it has read them
    wake                      is set when there is something to read: pieces, the end, an error, a ping to send
    """

    prefix: str
    model: str
    stream: bool
    n: int
    on_first: Callable[[Choice], None]
    on_gap: Callable[[float, int], None]
    on_end: Callable[[Choice], None]
    abort: Callable[[Iterable[str]], None]
    include_usage: bool = False
    continuous_usage: bool = False
    engine_stats: Sparsity | None = None
    echo: bool = False
    logprobs: int | None = None
    traceparent: str | None = None
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))
    arrival: float = field(default_factory=time.monotonic)
    choices: list[Choice] = field(default_factory=list)
    on_pieces: Callable[[], bool] = lambda: False
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    error: ApiError | None = None
    open: int = 0
    sent: float = field(default_factory=time.monotonic)
    ping: bool = False

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"

    @property
    def started(self) -> bool:
        """True once a token has come."""
        return any(choice.first is not None for choice in self.choices)

    def add(self, choice: Choice) -> None:
        """Take in a continuation that the engine is about to get."""
        self.choices.append(choice)
        self.open += 1

    def ended(self, choice: Choice) -> None:
        """A continuation is complete; the engine may not know it yet."""
        self._close(choice)
        if choice.finish == "stop":
            self.abort([choice.request.id])
        if self.stream or not self.open:
            self.wake.set()

    def fail(self, error: Exception) -> None:
        """End with an error, whatever is under way."""
        if self.error is None and self.open:
            self.error = from_exception(error)
        self.close()

    def close(self) -> None:
        """Drop what is under way."""
        left = [choice for choice in self.choices if not choice.closed]
        if left:
            self.abort([choice.request.id for choice in left])
        for choice in left:
            self._close(choice)
        self.wake.set()

    def _close(self, choice: Choice) -> None:
        if not choice.closed:
            choice.closed = True
            self.open -= 1
            self.on_end(choice)

    @property
    def usage(self) -> Usage:
        """Token counts of all prompts and continuations; a prompt counts once."""
        prompts = self.choices[:: self.n]
        return Usage(
            prompt_tokens=sum(len(choice.prompt.ids) for choice in prompts),
            completion_tokens=sum(choice.tokens for choice in self.choices),
            cached_tokens=sum(choice.usage.cached_tokens for choice in prompts),
        )
