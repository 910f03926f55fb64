"""`omniserve generate --prompt-file IN --output OUT`: one answer for each line of a file, of any size.

A line that cannot be answered gets its error and is reported; the others go on. What an answer says depends on its
line, the line's number and the settings alone, never on when it was made, so that a resumed run ends like one that was
not stopped (in exact arithmetic: docs/design.md section 2.6).
"""

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniserve.base.config import EngineConfig, Options, nearest
from omniserve.base.errors import ConfigError, OmniserveError, RequestError
from omniserve.base.types import SamplingParams
from omniserve.cli.jsonl import InOrder, Lines, Names, Output, fingerprint, job_file, json_object, short
from omniserve.cli.loading import load
from omniserve.cli.output import Bars, as_json, say

if TYPE_CHECKING:
    from omniserve import LLM
    from omniserve.llm import Prompt, RequestOutput, TokenOptions

AHEAD = 2
"""Requests handed to the engine, as a multiple of those that it runs at once: the next ones are always at hand."""
REPORTED = 20
"""Bad lines that are shown; the others stand in the output only."""
_SENTENCE = 400
"""Characters of what is said about a bad line, which may quote it."""

Id = str | int | float
SAMPLING = tuple(field.name for field in fields(SamplingParams))
SOURCES = ("prompt", "prompt_token_ids", "messages")
FIELDS = (*SOURCES, "id", "chat_template_kwargs", *SAMPLING)


def bulk(
    model: str | None,
    source: Path,
    target: Path,
    *,
    options: Options,
    params: SamplingParams,
    ordered: bool = True,
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    """Answer every line of `source` in `target`, going on where an earlier run was stopped.

    quiet  no bars, and the summary as a JSON object
    Raises ConfigError, before the model is loaded, for files that cannot be used or a run that does not fit the output.
    """
    check_files(source, target)
    with Bars(quiet=quiet) as bars:
        lines = Lines.scan(source, on_progress=lambda done, total: bars.update("read", done, total))
    facts: dict[str, object] = {
        "input": lines.digest,
        "model": options.shape if model is None else fingerprint(model),
        "revision": options.revision,
        "chat_template": None if options.chat_template is None else fingerprint(options.chat_template),
        "seed": options.seed,
        "ordered": ordered,
    }
    Output.check(target, facts, overwrite=overwrite)
    with load(model, options, quiet=quiet) as llm:
        tally = answer_lines(llm, lines, target, params, facts=facts, ordered=ordered, overwrite=overwrite, quiet=quiet)
    if quiet:
        as_json({"input": str(source), "output": str(target), **tally.as_object()})
    else:
        say(f"{target}: {tally.line()}")


def check_files(source: Path, target: Path) -> None:
    """Raise ConfigError unless the input can be read and the output written."""
    if not source.exists():
        raise ConfigError(f"{source}: no such prompt file")
    if not source.is_file():
        raise ConfigError(f"{source}: is no regular file, which a run that may be resumed needs")
    if not os.access(source, os.R_OK):
        raise ConfigError(f"{source}: cannot be read")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {target.parent}")
    if target.exists() and not target.is_file():
        raise ConfigError(f"{target}: is no regular file, which a run that may be resumed needs")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ConfigError(f"{target}: cannot be written")
    for path in (target, job_file(target)):
        if path.exists() and path.samefile(source):
            raise ConfigError(f"{path}: is the prompt file itself: give another --output")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A good line: what is asked, and how."""

    line: int
    id: Id
    fields: Mapping[str, Any]
    params: SamplingParams


class Reader:
    """Understands lines, and remembers their ids."""

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self._params = params
        self._seed = seed
        self._ids = Names()

    def identify(self, line: int, content: bytes | None) -> "tuple[Id | None, dict[str, Any]]":
        """Return a line's id and its fields, and remember the id. Raises RequestError, for another use of an id too."""
        given = json_object(line, content, "prompt, prompt_token_ids or messages")
        own = given.get("id", line)
        if type(own) not in (str, int, float) or (isinstance(own, float) and not math.isfinite(own)):
            raise RequestError(f"id={short(own)}: must be a text or a number")
        name = own if isinstance(own, str) else int(own) if own == int(own) else own
        first = self._ids.owner(name, line)
        if first != line:
            raise RequestError(f"id={short(own)}: is that of line {first} already, each line needs its own")
        return own, given

    def ask(self, line: int, own: Id, given: dict[str, Any]) -> Asked:
        """Return what a line asks. Raises RequestError."""
        from omniserve.engine.scheduler import mixed

        for name in given:
            if name not in FIELDS:
                raise RequestError(f"unknown field {short(name)}{nearest(name[:60], FIELDS)}")
        sources = [name for name in SOURCES if name in given]
        if len(sources) != 1:
            what = "all of them" if len(sources) == 3 else " and ".join(sources) or "none"
            raise RequestError(f"there must be one of {', '.join(SOURCES)}, here is {what}")
        if "chat_template_kwargs" in given and sources != ["messages"]:
            raise RequestError("chat_template_kwargs goes with messages only")
        own_params = {name: given[name] for name in SAMPLING if name in given}
        if isinstance(bias := own_params.get("logit_bias"), dict):  # keys of JSON objects are texts
            own_params["logit_bias"] = {int(k) if k.isascii() and k.isdigit() else k: v for k, v in bias.items()}
        try:
            params = replace(self._params, **own_params)
        except (TypeError, ValueError, AttributeError):
            raise RequestError(f"{', '.join(own_params)}: one of them has a value of a wrong type") from None
        if params.seed is None:
            params = replace(params, seed=mixed(self._seed, line - 1))
        return Asked(line=line, id=own, fields=given, params=params)


def prompt_of(llm: "LLM", fields: Mapping[str, Any]) -> "Prompt":
    """Return the prompt of a line's fields. Raises RequestError."""
    if "messages" in fields:
        variables = fields.get("chat_template_kwargs") or {}
        if not isinstance(variables, dict):
            raise RequestError(f"chat_template_kwargs={short(variables)}: must be an object")
        return llm.tokenizer.chat(fields["messages"], variables=variables)
    if "prompt" in fields:
        prompt = fields["prompt"]
        if not isinstance(prompt, str) or not prompt:
            raise RequestError(f"prompt={short(prompt)}: must be a text of at least one character")
        return prompt
    ids = fields["prompt_token_ids"]
    if not isinstance(ids, list) or not ids:
        raise RequestError(f"prompt_token_ids={short(ids)}: must be a list of at least one token id")
    return ids


def sentence_of(error: Exception) -> str:
    """Return what is said about a line, on one line and not too long."""
    sentence = " ".join(str(error).split())
    return sentence if len(sentence) <= _SENTENCE else sentence[: _SENTENCE - 3] + "..."


# The run


@dataclass(slots=True, kw_only=True)
class Tally:
    """What became of the lines. `found` of them were done by an earlier run; tokens and seconds are this run's."""

    lines: int
    found: int = 0
    answered: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def line(self) -> str:
        """Return it for people."""
        rate = self.completion_tokens / self.seconds if self.seconds else 0.0
        parts = [f"{self.lines:,} lines", f"{self.answered:,} answered", f"{self.errors:,} with an error"]
        if self.found:
            parts.append(f"{self.found:,} of them by an earlier run")
        parts.append(f"{self.completion_tokens:,} tokens in {self.seconds:.1f} s, {rate:.1f} tokens/s")
        return ", ".join(parts)

    def as_object(self) -> dict[str, object]:
        """Return it for programs."""
        return {**asdict(self), "tokens_per_second": self.completion_tokens / self.seconds if self.seconds else None}


def answer_lines(
    llm: "LLM",
    lines: Lines,
    target: Path,
    params: SamplingParams,
    *,
    facts: Mapping[str, object],
    ordered: bool = True,
    overwrite: bool = False,
    quiet: bool = False,
) -> Tally:
    """Answer the lines that are not in the output yet.

    facts  what the answers depend on beside `llm` and `params`
    """
    config = llm.config
    known = {
        **facts,
        **settled(config),
        "ordered": ordered,
        **{name: value for name, value in asdict(params).items() if name != "seed"},
    }
    with Output(target, known, lines.last, ordered=ordered, overwrite=overwrite) as output:
        tally = Tally(lines=lines.filled, found=output.filled)
        if output.torn:
            say(f"{target}: cut off {output.torn:,} bytes of a torn line")
        if tally.found:
            say(f"{target}: {tally.found:,} of {lines.filled:,} lines are there, going on")
        began = time.perf_counter()
        try:
            run = Run(llm, lines, output, Reader(params, config.seed), tally, ordered=ordered)
            with Bars(quiet=quiet) as bars:
                bars.update("answer", 0, lines.filled - tally.found)
                for _ in run.answers():
                    bars.update("answer", output.filled - tally.found, lines.filled - tally.found)
        except KeyboardInterrupt:
            there = f"{output.filled:,} of {lines.filled:,} lines"
            say(f"{target}: interrupted with {there} there; the same command goes on")
            raise
        tally.seconds = time.perf_counter() - began
        tally.answered, tally.errors = output.answered, output.errors
    return tally


def settled(config: EngineConfig) -> dict[str, object]:
    """Return the settings of an engine that its answers depend on."""
    reads: dict[str, object] | None = None
    if not config.sparsity.off:
        pattern = config.sparsity.pattern
        reads = {**asdict(config.sparsity), "pattern": None if pattern is None else fingerprint(pattern)}
        del reads["prefills"]  # it decides when a request begins, not what it reads
    return {
        "precision": config.precision.label,
        "dtype": config.dtype,
        "max_model_len": config.limits.max_model_len,
        "sparsity": reads,
    }


class Run:
    """Lines on their way from the input through the engine to the output."""

    def __init__(
        self, llm: "LLM", lines: Lines, output: Output, reader: Reader, tally: Tally, *, ordered: bool
    ) -> None:
        self._llm = llm
        self._lines = lines
        self._output = output
        self._reader = reader
        self._tally = tally
        self._answers = InOrder(output, ordered=ordered)
        self._shown = 0

    def answers(self) -> Iterator[int]:
        """Run, yielding the number of a line whenever one is answered."""
        ahead = AHEAD * self._llm.config.limits.max_seqs
        for asked, outcome in self._llm.run(self._asked(), ahead=ahead):
            if isinstance(outcome, OmniserveError):
                self._refuse(asked.line, asked.id, outcome)
            else:
                self._tally.prompt_tokens += outcome.usage.prompt_tokens
                self._tally.completion_tokens += outcome.usage.completion_tokens
                self._answers.write(asked.line, _answered(asked, outcome))
            yield asked.line
        assert self._answers.empty

    def _asked(self) -> "Iterator[tuple[Asked, Prompt, SamplingParams] | None]":
        """Yield what is to be answered; None while too many answers wait for an earlier one."""
        for line, content in self._lines:
            while self._answers.full:
                yield None
            own: Id | None = None
            done = line in self._output
            if not done:
                self._answers.take(line)
            try:
                own, fields = self._reader.identify(line, content)
                if done:
                    continue
                assert own is not None
                asked = self._reader.ask(line, own, fields)
                prompt = prompt_of(self._llm, asked.fields)
            except RequestError as error:
                if not done:
                    self._refuse(line, own, error)
                continue
            yield asked, prompt, asked.params

    def _refuse(self, line: int, own: Id | None, error: OmniserveError) -> None:
        sentence = sentence_of(error)
        if self._shown < REPORTED:
            say(f"omniserve: {self._lines.path} line {line}: {sentence}")
        elif self._shown == REPORTED:
            say(f"omniserve: further errors stand in {self._output.path} only")
        self._shown += 1
        self._answers.write(line, {"id": own, "line": line, "error": sentence})


def _answered(asked: Asked, outcome: "RequestOutput") -> dict[str, object]:
    """Return the line of the output for an answer. Nothing in it depends on when or beside what it was made."""
    usage, with_ids = outcome.usage, "prompt_token_ids" in asked.fields
    each: list[dict[str, object]] = []
    for one in outcome.outputs:
        each.append({"text": one.text, "finish_reason": one.finish_reason})
        if one.error is not None:
            each[-1]["error"] = one.error
        if with_ids:
            each[-1]["token_ids"] = list(one.token_ids)
        if one.logprobs is not None:
            each[-1]["logprobs"] = [_options(options) for options in one.logprobs]
    answer: dict[str, object] = {
        "id": asked.id,
        "line": asked.line,
        **(each[0] if len(each) == 1 else {"outputs": each}),
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        },
    }
    if outcome.prompt_logprobs is not None:
        answer["prompt_logprobs"] = [
            None if options is None else _options(options) for options in outcome.prompt_logprobs
        ]
    return answer


def _options(options: "TokenOptions") -> dict[str, dict[str, object]]:
    """Return how likely tokens are, by id, with what has no number in JSON as null."""
    return {str(token): {**asdict(one), "logprob": _finite(one.logprob)} for token, one in options.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
