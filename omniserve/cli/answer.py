"""`omniserve generate`: text out of a model, as it is produced."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast

from cyclopts import Parameter

from omniserve.base.errors import ConfigError, RequestError
from omniserve.base.types import SamplingParams, Usage
from omniserve.cli.bulk import bulk
from omniserve.cli.flags import NO_FLAGS, SAMPLING, Common, EngineFlags, SamplingFlags, given, settings
from omniserve.cli.loading import load
from omniserve.cli.output import as_json, piece, result

if TYPE_CHECKING:
    from omniserve import LLM


class Said(Protocol):
    """What a step of an answer brought; a server tells texts but no ids."""

    @property
    def text(self) -> str: ...  # noqa: D102
    @property
    def token_ids(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def finish_reason(self) -> str | None: ...  # noqa: D102
    @property
    def usage(self) -> Usage | None: ...  # noqa: D102
    @property
    def error(self) -> str | None: ...  # noqa: D102


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
    finish_reason: str | None = None
    usage: Usage | None = None

    @property
    def tokens(self) -> int:
        """How many tokens were produced, as far as is known."""
        return len(self.token_ids) or (0 if self.usage is None else self.usage.completion_tokens)

    @property
    def ttft_seconds(self) -> float | None:
        """Seconds from the call to the first token."""
        return None if self.first is None else self.first - self.began

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first one, divided by the seconds they took."""
        if self.first is None or self.last is None or self.last <= self.first or not self.tokens:
            return None
        return (self.tokens - 1) / (self.last - self.first)

    def line(self) -> str:
        """Return the numbers for people."""
        parts = [f"{self.tokens} tokens"] if self.tokens else []
        if self.usage is not None:
            parts = [f"{self.usage.prompt_tokens} prompt tokens ({self.usage.cached_tokens} cached)", *parts]
        if self.ttft_seconds is not None:
            parts.append(f"first after {1000 * self.ttft_seconds:.0f} ms")
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:.1f} tokens/s")
        return ", ".join(parts)


def collect(
    start: Callable[[], Iterator[Said]],
    *,
    write: Callable[[str], None] | None,
    stop: Callable[[], bool] = lambda: False,
) -> Answer:
    """Return the whole answer of a stream, writing each piece of text as it comes; `stop` ends it early."""
    answer = Answer(began=time.perf_counter())
    with closing(cast("Generator[Said]", start())) as deltas:
        for delta in deltas:
            if delta.token_ids or delta.text:
                answer.last = time.perf_counter()
                answer.first = answer.first or answer.last
                answer.token_ids.extend(delta.token_ids)
            if delta.text:
                answer.text += delta.text
                if write is not None:
                    write(delta.text)
            answer.finish_reason = delta.finish_reason or answer.finish_reason
            answer.usage = delta.usage or answer.usage
            if delta.error is not None:
                raise RuntimeError(delta.error)
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
