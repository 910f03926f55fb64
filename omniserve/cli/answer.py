"""`omniserve generate` and `omniserve chat`: text out of a model, as it is produced."""

import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, cast

from cyclopts import Parameter

from omniserve.base.errors import ConfigError, OmniserveError, RequestError
from omniserve.base.types import FinishReason, SamplingParams, Usage
from omniserve.cli.bulk import bulk
from omniserve.cli.flags import NO_FLAGS, SAMPLING, Common, EngineFlags, SamplingFlags, given, settings
from omniserve.cli.loading import load
from omniserve.cli.output import as_json, piece, result, say

if TYPE_CHECKING:
    from omniserve import LLM
    from omniserve.llm import Delta

Message = dict[str, str]


@Parameter(name="*", group=SAMPLING)
@dataclass(frozen=True, kw_only=True)
class AnswerFlags(SamplingFlags):
    """How tokens are drawn, with what counts the tokens before.

    Parameters
    ----------
    repetition_penalty
        Above 1: less of what the prompt and the answer hold already; 1 is off, at most 2.
    presence_penalty
        Above 0: less of what the answer holds already; -2 to 2.
    frequency_penalty
        The same, once for each time; -2 to 2.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def params(self, *, max_tokens: int | None, seed: int | None) -> SamplingParams:
        """Return the parameters of a request; `max_tokens` holds where the flag was not given."""
        return replace(
            super().params(max_tokens=max_tokens, seed=seed),
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )


@dataclass(slots=True, kw_only=True)
class Answer:
    """What a stream has brought so far, and when."""

    began: float
    first: float | None = None
    last: float | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None

    @property
    def ttft_seconds(self) -> float | None:
        """Seconds from the call to the first token."""
        return None if self.first is None else self.first - self.began

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first one, divided by the seconds they took."""
        if self.first is None or self.last is None or self.last <= self.first:
            return None
        return (len(self.token_ids) - 1) / (self.last - self.first)

    def line(self) -> str:
        """Return the numbers for people."""
        parts = [f"{len(self.token_ids)} tokens"]
        if self.usage is not None:
            parts = [f"{self.usage.prompt_tokens} prompt tokens ({self.usage.cached_tokens} cached)", *parts]
        if self.ttft_seconds is not None:
            parts.append(f"first after {1000 * self.ttft_seconds:.0f} ms")
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:.1f} tokens/s")
        return ", ".join(parts)


def collect(
    start: "Callable[[], Iterator[Delta]]",
    *,
    write: Callable[[str], None] | None,
    stop: Callable[[], bool] = lambda: False,
) -> Answer:
    """Return the whole answer of a stream, writing each piece of text as it comes; `stop` ends it early."""
    answer = Answer(began=time.perf_counter())
    with closing(cast("Generator[Delta]", start())) as deltas:
        for delta in deltas:
            if delta.token_ids:
                answer.last = time.perf_counter()
                answer.first = answer.first or answer.last
                answer.token_ids.extend(delta.token_ids)
            if delta.text:
                answer.text += delta.text
                if write is not None:
                    write(delta.text)
            answer.finish_reason = delta.finish_reason or answer.finish_reason
            answer.usage = delta.usage or answer.usage
            if stop():
                answer.finish_reason = "abort"
                break
    return answer


def generate(
    model: str | None = None,
    /,
    *,
    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    prompt_file: Path | None = None,
    output: Path | None = None,
    ordered: bool | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    sampling: AnswerFlags = AnswerFlags(),
    engine: EngineFlags = NO_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> None:
    """Continue a text, or each line of a file, without a server.

    Parameters
    ----------
    model
        A .gguf file, a model folder or a name on huggingface.co (ORG/NAME); with --dummy-weights none.
    prompt
        The text to continue; no chat template is applied. The result goes to standard output.
    prompt_file
        Instead of --prompt: a file of JSON lines with prompt, prompt_token_ids or messages each, with id and sampling
        parameters (temperature, max_tokens, ...) if wanted.
    output
        With --prompt-file: the file that gets one JSON line for each line: id, line, text, finish_reason and usage, or
        error. Stopped at any moment, the same command goes on where it was; exit code 0 once every line has its line.
    ordered
        With --prompt-file: lines in the order of the input (default), or as they are done.
    overwrite
        With --prompt-file: start again, whatever the output holds.
    json
        Print one JSON object: text, token ids, finish reason, usage, time to first token, tokens per second; with
        --prompt-file what became of the lines.
    """
    options = settings(engine, common)
    if prompt_file is not None:
        if prompt is not None:
            raise ConfigError("--prompt and --prompt-file: give one of the two")
        if output is None:
            raise ConfigError("--prompt-file needs --output OUT.jsonl, the file for the answers")
        bulk(
            model,
            prompt_file,
            output,
            options=options,
            params=sampling.params(max_tokens=128, seed=None),
            ordered=ordered is not False,
            overwrite=overwrite,
            quiet=json,
        )
        return
    if prompt is None:
        raise ConfigError("give --prompt TEXT, or --prompt-file IN.jsonl with --output OUT.jsonl")
    for given_flag, flag in ((output, "--output"), (ordered, "--ordered"), (overwrite or None, "--overwrite")):
        if given_flag is not None:
            raise ConfigError(f"{flag} goes with --prompt-file, the answer to --prompt is printed")
    params = sampling.params(max_tokens=128, seed=given(engine).get("seed"))
    check_text(prompt, "prompt")
    with load(model, options, quiet=json) as llm:
        answer = collect(lambda: llm.stream(prompt, params), write=None if json else piece)
        if json:
            as_json(as_object(llm, answer))
        else:
            result("")


def chat(
    model: str | None = None,
    /,
    *,
    question: Annotated[str | None, Parameter(name="-q", allow_leading_hyphen=True)] = None,
    system: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    stats: Annotated[bool, Parameter(negative="")] = False,
    sampling: AnswerFlags = AnswerFlags(),
    engine: EngineFlags = NO_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> None:
    """Talk with a model in the terminal. Ctrl-C ends an answer, Ctrl-D the conversation; /clear forgets it.

    Parameters
    ----------
    model
        A .gguf file, a model folder or a name on huggingface.co (ORG/NAME); with --dummy-weights none.
    question
        Answer this question and leave.
    system
        System message at the start of the conversation.
    stats
        After each answer, print token counts, time to first token and tokens per second.
    """
    options = settings(engine, common)
    params = sampling.params(max_tokens=None, seed=given(engine).get("seed"))
    for text, name in ((question, "question"), (system, "system message")):
        if text is not None:
            check_text(text, name)
    start = [] if system is None else [{"role": "system", "content": system}]
    with load(model, options, brief=not sys.stderr.isatty()) as llm:
        if question is not None:
            answer = collect(lambda: llm.stream_chat([*start, _user(question)], params), write=piece)
            result("")
            if stats:
                say(answer.line())
            return
        _converse(llm, start, params, stats=stats)


def check_text(text: str, name: str) -> None:
    """Raise RequestError unless the text is there and is proper Unicode."""
    if not text:
        raise RequestError(f"the {name} is empty: give at least one character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"the {name} is not valid UTF-8 (character {error.start})") from None


def as_object(llm: "LLM", answer: Answer) -> dict[str, Any]:
    """Return an answer as the object that `--json` prints."""
    usage = answer.usage
    return {
        "model": llm.plan.model,
        "precision": llm.config.precision.label,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "usage": None
        if usage is None
        else {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        },
        "ttft_ms": None if answer.ttft_seconds is None else 1000 * answer.ttft_seconds,
        "tokens_per_second": answer.tokens_per_second,
    }


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _converse(llm: "LLM", start: list[Message], params: SamplingParams, *, stats: bool) -> None:
    """Answer line after line until the end of input; a refused line leaves the conversation as it was."""
    history = list(start)
    for line in _lines():
        if line == "/clear":
            history = list(start)
            continue
        if line == "/exit":
            return
        try:
            check_text(line, "message")
            with _interruption() as interrupted:
                messages = [*history, _user(line)]
                answer = collect(partial(llm.stream_chat, messages, params), write=piece, stop=interrupted)
        except OmniserveError as error:
            say(f"omniserve: error: {error} (/clear starts a new conversation)")
            continue
        result("")
        history += [_user(line), {"role": "assistant", "content": answer.text}]
        if stats:
            say(answer.line())


def _lines() -> Iterator[str]:
    """Yield the lines of standard input that hold something, with a prompt and line editing at a terminal."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
        return
    import readline  # noqa: F401  # input() edits lines and remembers them once this is imported

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            say("")
            return
        if line:
            yield line


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C set what the yielded function tells, and the second one interrupt as usual.

    A step is never torn apart that way, so the engine can go on with the next question.
    """
    count = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)
