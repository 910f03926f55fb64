"""The offline API: text in, text out, with the engine in this process."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from torch import Tensor

from omniserve.base.config import EngineConfig, Options, options_from, options_from_environment
from omniserve.base.errors import RequestError
from omniserve.base.spec import ModelSpec
from omniserve.base.types import FinishReason, Output, Request, SamplingParams, Usage, check_prompt
from omniserve.engine.build import LoadProgress, MemoryPlan, build
from omniserve.ops.dispatch import choices
from omniserve.text import TextStream, Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, str]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One generated continuation. token_ids ends with the token that stopped it, if one did."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What became of one prompt."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one step of a stream brought; finish_reason and usage come with the last one."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(slots=True, kw_only=True)
class _Open:
    """A request on its way through the engine, and its text so far."""

    prompt: str | None
    request: Request
    text: TextStream
    ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    usage: Usage | None = None

    def take(self, output: Output) -> Delta:
        """Add a step's tokens. A stop string ends the request here: later tokens are dropped."""
        self.ids += output.new_tokens
        emitted = self.text.push(output.new_tokens, output.finish is not None)
        self.usage = output.usage
        if self.text.stopped:
            self.finish = "stop"
        elif output.finish is not None:
            self.finish = output.finish
        ended = self.finish is not None
        return Delta(
            text=emitted,
            token_ids=output.new_tokens,
            finish_reason=self.finish,
            usage=self.usage if ended else None,
        )

    def result(self) -> RequestOutput:
        """Return the finished request."""
        assert self.finish is not None and self.usage is not None
        completion = CompletionOutput(text=self.text.text, token_ids=tuple(self.ids), finish_reason=self.finish)
        return RequestOutput(
            prompt=self.prompt,
            prompt_token_ids=tuple(self.request.tokens[: self.request.prompt]),
            outputs=(completion,),
            usage=self.usage,
        )


class LLM:
    """A model that is loaded and ready to generate.

    model     path of a .gguf file or of a Hugging Face folder
    keywords  the fields of `Options`, for instance precision="w8a8kv8"; they win over `OMNISERVE_<FLAG>` variables
    options   the fields all at once (the environment is then not read)
    on_load   called as on_load(phase, done, total) while the model loads

    Raises OmniserveError (ConfigError, CheckpointError, CapacityError) in one sentence.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        options: Options | None = None,
        on_load: LoadProgress | None = None,
        **keywords: Any,
    ) -> None:
        base = options if options is not None else options_from_environment()
        options = options_from(keywords, origin="LLM", base=base)
        built = build(model, options, on_load=on_load)
        self._engine = built.engine
        self._numbers = itertools.count()
        self._spares: dict[str, list[Output]] = {}
        self.spec: ModelSpec = built.spec
        self.config: EngineConfig = built.config
        self.plan: MemoryPlan = built.plan
        self.warnings: tuple[str, ...] = built.warnings
        self.tokenizer = Tokenizer.load(built.source, options.chat_template)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts (texts or lists of token ids) and return the results in their order.

        Raises RequestError for a prompt that cannot be served; then none of them runs.
        """
        many = _listed(prompts)
        opened = [self._open(prompt, param) for prompt, param in zip(many, _each(params, len(many)), strict=True)]
        return self._run(opened, on_progress)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations: lists of {"role": ..., "content": ...}."""
        many = [messages] if not messages or isinstance(messages[0], Mapping) else list(messages)
        ids = [self.tokenizer.chat(one) for one in many]  # type: ignore[arg-type]  # told apart above
        return self.generate(ids, params, on_progress=on_progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Continue one prompt, yielding text as it comes; closing the iterator aborts the request."""
        opened = self._open(prompt, params or SamplingParams())
        return self._stream(opened)

    def stream_chat(self, messages: Messages, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Answer one conversation, yielding text as it comes."""
        return self.stream(self.tokenizer.chat(messages), params)

    def score(self, ids: Sequence[int], reduce: Callable[[Tensor, Tensor], None]) -> None:
        """Give the logits of every position of `ids` to reduce(positions int64 [t], logits [t, V]), in order.

        The tokens go through the served path: paged and, if the precision says so, quantized keys and values.
        """
        check_prompt(ids, self.spec.vocab)
        if len(ids) > self.config.limits.max_model_len:
            raise RequestError(
                f"{len(ids)} tokens to score: max_model_len is {self.config.limits.max_model_len}; give fewer"
            )
        request = Request(
            id=self._name(),
            tokens=list(ids),
            prompt=len(ids),
            sampling=SamplingParams(temperature=0.0),
            limit=0,
            reduce=reduce,
        )
        self._engine.add(request)
        try:
            while not request.finished:
                self._step()
        except BaseException:
            self._engine.abort(request.id)
            raise

    def operations(self) -> dict[str, str]:
        """Return operation -> name of the implementation that serves it."""
        return choices(self.config.device.kind)

    def close(self) -> None:
        """Drop what is under way."""
        self._engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _name(self) -> str:
        return f"request-{next(self._numbers)}"

    def _open(self, prompt: Prompt, params: SamplingParams) -> _Open:
        text = prompt if isinstance(prompt, str) else None
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        check_prompt(ids, self.spec.vocab)
        room = self.config.limits.max_model_len - len(ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(ids)} tokens: max_model_len is {self.config.limits.max_model_len} and one "
                "must be left for the answer; shorten the prompt"
            )
        stops = frozenset(params.stop_token_ids)
        request = Request(
            id=self._name(),
            tokens=ids,
            prompt=len(ids),
            sampling=params,
            stop_ids=stops if params.ignore_eos else stops | self.tokenizer.eos_ids,
            limit=min(params.max_tokens or room, room),
        )
        return _Open(prompt=text, request=request, text=TextStream(self.tokenizer, params.stop))

    def _run(self, opened: list[_Open], on_progress: Progress | None) -> list[RequestOutput]:
        waiting = {one.request.id: one for one in opened}
        added = []
        try:
            for one in opened:
                self._engine.add(one.request)
                added.append(one.request.id)
            while waiting:
                for output in self._step():
                    one_open = waiting.get(output.request)
                    if one_open is None:
                        continue
                    one_open.take(output)
                    if one_open.finish is not None:
                        self._end(one_open)
                        del waiting[output.request]
                        if on_progress is not None:
                            on_progress(len(opened) - len(waiting), len(opened))
        except BaseException:
            for name in added:
                self._engine.abort(name)
            raise
        return [one.result() for one in opened]

    def _stream(self, opened: _Open) -> Iterator[Delta]:
        self._engine.add(opened.request)
        mine = self._spares.setdefault(opened.request.id, [])
        try:
            while opened.finish is None:
                if not mine:
                    self._step()
                while mine and opened.finish is None:
                    yield opened.take(mine.pop(0))
        finally:
            del self._spares[opened.request.id]
            self._engine.abort(opened.request.id)

    def _step(self) -> list[Output]:
        """Step the engine; outputs of open streams wait until their reader asks."""
        outputs = self._engine.step()
        for output in outputs:
            if output.request in self._spares:
                self._spares[output.request].append(output)
        return outputs

    def _end(self, opened: _Open) -> None:
        if not opened.request.finished:  # a stop string ended it, which the engine cannot know
            self._engine.abort(opened.request.id)


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts as a list: a text or a list that begins with a number is one prompt."""
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return cast(list[Prompt], [prompts] if one else list(prompts))


def _each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters for {count} prompts: give one, or one for each")
    return list(params)
