"""The offline API: text in, text out, with the engine in this process."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

from torch import Tensor

from omniserve.base.config import EngineConfig, Options, options_from
from omniserve.base.environment import options_from_environment
from omniserve.base.errors import OmniserveError, RequestError
from omniserve.base.spec import ModelSpec
from omniserve.base.types import (
    FAULTS,
    FinishReason,
    Logprob,
    Output,
    Request,
    SamplingParams,
    TokenLogprobs,
    Usage,
    check_prompt,
)
from omniserve.engine.build import LoadProgress, MemoryPlan, build
from omniserve.engine.grammar import Grammars
from omniserve.generation import Answer, Checked, check, generation_defaults, seeded
from omniserve.ops.dispatch import choices
from omniserve.text import Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, str]]
Progress = Callable[[int, int], None]
Value = TypeVar("Value", int, SamplingParams)
Key = TypeVar("Key")
"""What `LLM.run` hands back beside a result, so that its caller knows whose it is."""
TokenOptions = Mapping[int, Logprob]
"""The token at one position, and the likeliest ones: id -> how likely, the token itself first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One generated continuation. token_ids ends with the token that stopped it, if one did.

    index     place among the prompt's n continuations
    logprobs  for each token what `SamplingParams.logprobs` asks for; None if it asks for nothing
    error     what went wrong, where finish_reason is "error": this continuation ended early, others did not
    times     when each token had come, by the clock of `time.perf_counter`
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    index: int = 0
    logprobs: tuple[TokenOptions, ...] | None = None
    error: str | None = None
    times: tuple[float, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What became of one prompt.

    prompt_logprobs  for each of the prompt's tokens what `SamplingParams.prompt_logprobs` asks for, None for the first
    usage            of all continuations together; the prompt counts once
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenOptions | None, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one step of a stream brought for one continuation; finish_reason and usage come with its last one."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    index: int = 0
    logprobs: tuple[TokenOptions, ...] | None = None
    error: str | None = None


class _Open:
    """A request on its way through the engine, and its text so far."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer) -> None:
        self.request = request
        self.index = index
        self.ids: list[int] = []
        self.times: list[float] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
        self.usage: Usage | None = None
        self.error: str | None = None
        self._held: list[int] = []
        self._answer = Answer(request.sampling, request.stop_ids, tokenizer)

    @property
    def text(self) -> str:
        """All text so far."""
        return self._answer.text

    @property
    def finish(self) -> FinishReason | None:
        """Why it ended, None while it goes on."""
        return self._answer.finish

    def hold(self, output: Output, when: float) -> bool:
        """Add a step's tokens, which came at `when`, and leave their text for later.

        False, and nothing done, if they may end the answer.
        """
        if output.finish is not None or self.request.sampling.stop or output.prompt_logprobs:
            return False
        self._held += output.new_tokens
        self.ids += output.new_tokens
        self.times += [when] * len(output.new_tokens)
        self.logprobs += output.logprobs
        return True

    def take(self, output: Output, when: float) -> str:
        """Add a step's tokens, which came at `when`, and return the text that has come since the last time."""
        self.ids += output.new_tokens
        self.times += [when] * len(output.new_tokens)
        self.logprobs += output.logprobs
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
        self.usage = output.usage
        self.error = None if output.fault is None else FAULTS[output.fault]
        held, self._held = self._held, []
        return self._answer.take(output._replace(new_tokens=(*held, *output.new_tokens)) if held else output)


@dataclass(slots=True, kw_only=True)
class _Group:
    """A prompt and its continuations under way."""

    prompt: str | None
    members: list[_Open]
    deltas: deque[tuple[_Open, Output]] = field(default_factory=deque)

    @property
    def finished(self) -> bool:
        """True once all continuations have ended."""
        return all(member.finish is not None for member in self.members)

    @property
    def usage(self) -> Usage:
        """Token counts of all continuations; the prompt counts once."""
        all_usages = [member.usage for member in self.members if member.usage is not None]
        return all_usages[0]._replace(completion_tokens=sum(usage.completion_tokens for usage in all_usages))


class LLM:
    """A model that is loaded and ready to generate.

    model     path of a .gguf file or of a Hugging Face folder, or a name on huggingface.co; none with a shape
    keywords  the fields of `Options`, for instance precision="w8a8kv8"; they win over `OMNISERVE_<FLAG>` variables
    options   the fields all at once (the environment is then not read)
    on_load   called as on_load(phase, done, total) while the model loads

    Raises OmniserveError (ConfigError, CheckpointError, CapacityError) in one sentence.
    """

    def __init__(
        self,
        model: str | Path | None = None,
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
        self._streams: dict[str, tuple[_Group, _Open]] = {}
        self._texts: dict[int, str] = {}
        self._stepped = 0.0
        self.spec: ModelSpec = built.spec
        self.config: EngineConfig = built.config
        self.plan: MemoryPlan = built.plan
        self.warnings: tuple[str, ...] = built.warnings
        longest = 16 * built.config.limits.max_model_len
        self.tokenizer = Tokenizer.load(built.source, options.chat_template, max_prompt_bytes=longest)
        self._grammars = Grammars(self.tokenizer.as_json, sorted(self.tokenizer.eos_ids), self.spec.vocab)
        self._defaults = generation_defaults(built.source.path)

    def default_params(self) -> SamplingParams:
        """Return what the model's generation_config.json asks for, and the usual values for the rest.

        temperature, top_p, top_k, min_p and repetition_penalty are taken from it; a GGUF file has none. They hold where
        the caller gives no SamplingParams at all. Raises RequestError for a value that is not allowed.
        """
        try:
            return SamplingParams(**self._defaults)
        except RequestError as error:
            raise RequestError(f"the model's generation_config.json: {error}; give SamplingParams") from None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        on_progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts (texts or lists of token ids) and return the results in their order.

        params    one for all or one for each; None: `default_params`
        priority  one for all or one for each: smaller ones are served first (with scheduling_policy="priority")
        Raises RequestError for a prompt that cannot be served; then none of them runs.
        """
        many = _listed(prompts)
        each = _each(self.default_params() if params is None else params, len(many))
        checked = {key: self._check(one) for key, one in {id(one): one for one in each}.items()}
        urgent = _each(priority, len(many))
        groups = [
            self._open(prompt, checked[id(one)], number) for prompt, one, number in zip(many, each, urgent, strict=True)
        ]
        return self._run(groups, on_progress)

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
        group = self._open(prompt, self._check(self.default_params() if params is None else params))
        return self._stream(group)

    def stream_chat(self, messages: Messages, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Answer one conversation, yielding text as it comes."""
        return self.stream(self.tokenizer.chat(messages), params)

    def run(
        self, requests: Iterable[tuple[Key, Prompt, SamplingParams] | None], *, ahead: int
    ) -> Iterator[tuple[Key, RequestOutput | OmniserveError]]:
        """Continue prompts as an iterator brings them, yielding (key, result) in the order in which they end.

        ahead  prompts under way at once: more are not taken from the iterator, which may be endless
        A None among the requests means that there is none now: the iterator is asked again after the next step. A
        prompt that cannot be served yields its error, and the others go on. Closing the result aborts what is under
        way.
        """
        assert ahead >= 1, ahead
        source, more = iter(requests), True
        numbers = itertools.count()
        under_way: dict[int, tuple[Key, _Group]] = {}
        try:
            while more or under_way:
                while more and len(under_way) < ahead:
                    try:
                        asked = next(source)
                    except StopIteration:
                        more = False
                        break
                    if asked is None:
                        break
                    key, prompt, params = asked
                    try:
                        group = self._open(prompt, self._check(params))
                        self._enter(group)
                    except OmniserveError as error:
                        yield key, error
                        continue
                    under_way[next(numbers)] = key, group
                if under_way:
                    self._step()
                for number, (key, group) in list(under_way.items()):
                    self._take_in(group)
                    if group.finished:
                        del under_way[number]
                        self._leave(group)
                        yield key, self._result(group)
        finally:
            for _, group in under_way.values():
                self._leave(group)

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
        return choices(self.config.device.kind, reference=self.config.backend == "reference")

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

    def _check(self, params: SamplingParams) -> Checked:
        return check(params, self.tokenizer, self.spec.vocab)

    def _open(self, prompt: Prompt, checked: Checked, priority: int = 0) -> _Group:
        text = prompt if isinstance(prompt, str) else None
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        check_prompt(ids, self.spec.vocab)
        room = self.config.limits.max_model_len - len(ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(ids)} tokens: max_model_len is {self.config.limits.max_model_len} and one "
                "must be left for the answer; shorten the prompt"
            )
        params = checked.params
        form = params.structured_outputs
        grammar = None if form is None else self._grammars.compile(form)
        members: list[_Open] = []
        for index in range(params.n):
            request = Request(
                id=self._name(),
                tokens=list(ids),
                prompt=len(ids),
                sampling=seeded(params, index),
                stop_ids=frozenset(checked.stop_ids),
                bad_words=checked.bad_words,
                limit=min(params.max_tokens or room, room),
                reduce="logprobs" if params.prompt_logprobs is not None and index == 0 else None,
                leader=members[0].request if members else None,
                grammar=grammar,
                priority=priority,
            )
            members.append(_Open(request, index, self.tokenizer))
        return _Group(prompt=text, members=members)

    def _run(self, groups: list[_Group], on_progress: Progress | None) -> list[RequestOutput]:
        waiting = {member.request.id: (group, member) for group in groups for member in group.members}
        added, done = [], 0
        try:
            for name, (_, member) in waiting.items():
                self._engine.add(member.request)
                added.append(name)
            while waiting:
                for output in self._step():
                    if output.request not in waiting:
                        continue
                    group, member = waiting[output.request]
                    if member.hold(output, self._stepped):  # nobody reads along: text is made once, at the end
                        continue
                    member.take(output, self._stepped)
                    if member.finish is not None:
                        self._end(member)
                        del waiting[output.request]
                        if group.finished:
                            done += 1
                            if on_progress is not None:
                                on_progress(done, len(groups))
        except BaseException:
            for name in added:
                self._engine.abort(name)
            raise
        return [self._result(group) for group in groups]

    def _result(self, group: _Group) -> RequestOutput:
        outputs = []
        for member in group.members:
            assert member.finish is not None, member.request
            outputs.append(
                CompletionOutput(
                    text=member.text,
                    token_ids=tuple(member.ids),
                    finish_reason=member.finish,
                    index=member.index,
                    logprobs=self._shown(member.request.sampling, member.logprobs),
                    error=member.error,
                    times=tuple(member.times),
                )
            )
        first = group.members[0]
        prompt_logprobs = None
        if first.request.reduce == "logprobs":
            prompt_logprobs = (None, *map(self._options, first.prompt_logprobs or ()))
        return RequestOutput(
            prompt=group.prompt,
            prompt_token_ids=tuple(first.request.tokens[: first.request.prompt]),
            outputs=tuple(outputs),
            usage=group.usage,
            prompt_logprobs=prompt_logprobs,
        )

    def _enter(self, group: _Group) -> None:
        """Hand a prompt's continuations to the engine: all or none."""
        try:
            for member in group.members:
                self._streams[member.request.id] = group, member
                self._engine.add(member.request)
        except BaseException:
            self._leave(group)
            raise

    def _leave(self, group: _Group) -> None:
        """Forget a prompt's continuations; those that have not ended are aborted."""
        for member in group.members:
            self._streams.pop(member.request.id, None)
            self._engine.abort(member.request.id)

    def _stream(self, group: _Group) -> Iterator[Delta]:
        try:
            self._enter(group)
            while not group.finished:
                if not group.deltas:
                    self._step()
                while group.deltas:
                    member, output = group.deltas.popleft()
                    if member.finish is None:
                        yield self._delta(member, output)
        finally:
            self._leave(group)

    def _take_in(self, group: _Group) -> None:
        """Give a prompt's continuations what has come for them."""
        while group.deltas:
            member, output = group.deltas.popleft()
            if member.finish is None:
                member.take(output, self._stepped)
                if member.finish is not None:
                    self._end(member)

    def _delta(self, member: _Open, output: Output) -> Delta:
        text = member.take(output, self._stepped)
        if member.finish is not None:
            self._end(member)
        return Delta(
            text=text,
            token_ids=output.new_tokens,
            finish_reason=member.finish,
            usage=None if member.finish is None else member.usage,
            index=member.index,
            logprobs=self._shown(member.request.sampling, output.logprobs),
            error=member.error,
        )

    def _step(self) -> list[Output]:
        """Step the engine; outputs of open streams wait until their reader asks."""
        outputs = self._engine.step()
        self._stepped = time.perf_counter()
        for output in outputs:
            if output.request in self._streams:
                group, member = self._streams[output.request]
                group.deltas.append((member, output))
        return outputs

    def _end(self, opened: _Open) -> None:
        if not opened.request.finished:  # a stop string ended it, which the engine cannot know
            self._engine.abort(opened.request.id)

    def _shown(self, params: SamplingParams, logprobs: Iterable[TokenLogprobs]) -> tuple[TokenOptions, ...] | None:
        return None if params.logprobs is None else tuple(map(self._options, logprobs))

    def _options(self, one: TokenLogprobs) -> TokenOptions:
        options = {one.token: Logprob(logprob=one.logprob, rank=one.rank, decoded_token=self._text(one.token))}
        for rank, (token, logprob) in enumerate(one.top, 1):
            if token not in options:
                options[token] = Logprob(logprob=logprob, rank=rank, decoded_token=self._text(token))
        return options

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([token], skip_special=False)
        return self._texts[token]


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts as a list: a text or a list that begins with a number is one prompt."""
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return cast(list[Prompt], [prompts] if one else list(prompts))


def _each(given: Value | Sequence[Value], count: int) -> list[Value]:
    """Return one for each prompt."""
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        what = "priorities" if given and isinstance(given[0], int) else "sampling parameters"
        raise RequestError(f"{len(given)} {what} for {count} prompts: give one, or one for each")
    return list(given)
