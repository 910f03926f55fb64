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

from omniserve.base.errors import RequestError
from omniserve.base.types import FinishReason, Output, SamplingParams, TokenLogprobs, Usage
from omniserve.engine.process import Add
from omniserve.server.errors import ApiError, from_exception

if TYPE_CHECKING:
    from omniserve.text import Tokenizer

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Sampling parameters that fit the model, and what their texts are in tokens."""

    params: SamplingParams
    stop_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]


def check(params: SamplingParams, tokenizer: "Tokenizer", vocab: int) -> Checked:
    """Raise RequestError unless the model has all the ids, and something is left to draw."""
    allowed = params.allowed_token_ids or ()
    for name, ids in (
        ("logit_bias", params.logit_bias),
        ("allowed_token_ids", allowed),
        ("stop_token_ids", params.stop_token_ids),
    ):
        if (largest := max(ids, default=0)) >= vocab:
            raise RequestError(f"{name}={largest}: the model has {vocab} tokens, ids must be 0 to {vocab - 1}")
    bad_words = tuple(sequence for word in params.bad_words for sequence in _bad_word(word, tokenizer, vocab))
    own = frozenset[int]() if params.ignore_eos else tokenizer.eos_ids
    stop_ids = frozenset(token for token in own if token < vocab) | frozenset(params.stop_token_ids)
    forbidden = {sequence[0] for sequence in bad_words if len(sequence) == 1}
    if params.min_tokens:
        forbidden |= stop_ids
    if not (set(allowed) - forbidden if allowed else vocab - len(forbidden)):
        raise RequestError("allowed_token_ids, bad_words and min_tokens together leave no token: allow another one")
    return Checked(params=params, stop_ids=tuple(stop_ids), bad_words=bad_words)


def _bad_word(word: str, tokenizer: "Tokenizer", vocab: int) -> list[tuple[int, ...]]:
    """Return the token sequences of a word, at the start of a text and behind a space.

    Source: vLLM's SamplingParams.update_from_tokenizer.
    """
    text = word.lstrip()
    plain, spaced = (tuple(tokenizer.encode(start + text, special=False)) for start in ("", " "))
    if not text or not plain:
        raise RequestError(f"bad_words: {word!r} holds no token; give words that hold more than spaces")
    if max(plain + spaced) >= vocab:
        raise RequestError(f"bad_words: {word!r} holds a token that the model does not have; leave it out")
    another = len(plain) == len(spaced) and plain[0] != spaced[0]
    return [plain, spaced] if another else [plain]


class Choice:
    """One continuation under way.

    arrival, admitted, first, last  when its request came, took a slot, brought its first and its latest token
    pieces                          what was not taken yet
    prompt_logprobs                 of the prompt's tokens after the first, if they were asked for
    """

    def __init__(self, reply: "Reply", index: int, prompt: Prompt, request: Add, tokenizer: "Tokenizer") -> None:
        from omniserve.text import Detokenizer, StopFinder

        params = request.sampling
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
        self._detokenizer = Detokenizer(tokenizer, skip_special=params.skip_special_tokens)
        self._finder = StopFinder(params.stop, include_stop=params.include_stop_str_in_output) if params.stop else None
        self._keeps_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens

    def take(self, output: Output | Exception) -> None:
        """Take what comes from the engine."""
        if isinstance(output, Exception):
            self.reply.fail(output)
            return
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
        text = self._text(output)
        self.finish = "stop" if self._finder is not None and self._finder.found is not None else output.finish
        if text or output.logprobs or self.finish is not None:
            self._keep(Piece(text=text, logprobs=list(output.logprobs), completion_tokens=self.tokens))
        if self.finish is not None:
            self.pieces[-1].finish = self.finish
            reply.ended(self)
        elif reply.stream:
            reply.wake.set()

    def _text(self, output: Output) -> str:
        """Return the text of a step's tokens. A token that ends the request is no text, unless that is asked for.

        In the text of the first `min_tokens` tokens no stop string is looked for.
        """
        ids = output.new_tokens
        done = output.finish is not None
        if output.finish == "stop" and not self._keeps_stop:
            ids = ids[:-1]
        text = self._detokenizer.push(ids)
        if done:
            text += self._detokenizer.flush()
        if self._finder is None:
            return text
        if self.tokens > self._min_tokens:
            text = self._finder.push(text)
        return text + self._finder.flush() if done else text

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
    engine_stats: bool = False
    echo: bool = False
    logprobs: int | None = None
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))
    arrival: float = field(default_factory=time.monotonic)
    choices: list[Choice] = field(default_factory=list)
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
