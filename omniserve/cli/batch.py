"""`omniserve batch IN OUT`: a file of requests in OpenAI's batch format, answered without a server.

Each line goes the way that a request to the server goes, behind HTTP: same checks, same engine in a process of its own,
same form of the answer. What an answer says depends on its line and the settings alone, its token counts of the prefix
cache and the time `created` apart, so that a run that was killed and resumed ends like one that was not.
"""

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from omniserve.base.config import Options, check_model
from omniserve.base.errors import ConfigError, OmniserveError, RequestError
from omniserve.base.serving import ServerLimits, ServerOptions
from omniserve.cli.bulk import AHEAD, REPORTED, Tally, check_files, sentence_of, settled
from omniserve.cli.flags import NO_FLAGS, Common, EngineFlags, settings
from omniserve.cli.jsonl import InOrder, Lines, Marks, Names, Output, fingerprint, json_object, short
from omniserve.cli.loading import leaving_at_once, need_torch
from omniserve.cli.output import Bars, as_json, say, warn

if TYPE_CHECKING:
    from omniserve.server.protocol import ChatRequest, CompletionRequest
    from omniserve.server.service import Service

URLS = ("/v1/chat/completions", "/v1/completions")
DIED = 3
"""Exit code when the engine has ended."""
_ID = "batch_req_"
_NEVER = 1 << 40


def _line_of(answer: Mapping[str, object]) -> int | None:
    name = answer.get("id")
    number = name.removeprefix(_ID) if isinstance(name, str) else ""
    return int(number) if number.isascii() and number.isdigit() else None


def _failed(answer: Mapping[str, object]) -> bool:
    response = answer.get("response")
    return not isinstance(response, dict) or response.get("status_code") != 200


MARKS = Marks(_line_of, _failed)
"""The id of an answer says its line; OpenAI's format has no other place for it."""


class LineError(Exception):
    """A line that is no request. code: OpenAI's word for what is wrong; custom_id: the line's, if it has one."""

    def __init__(self, code: str, sentence: str, custom_id: str | None = None) -> None:
        super().__init__(sentence)
        self.code = code
        self.custom_id = custom_id


def batch(
    source: Path,
    target: Path,
    /,
    *,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    engine: EngineFlags = NO_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> int:
    """Answer a file of requests in OpenAI's batch format, offline. Stopped at any moment, the same command goes on.

    Parameters
    ----------
    source
        JSON lines with custom_id, method (POST), url (/v1/chat/completions or /v1/completions) and body. The body's
        model is a .gguf file, a model folder or a name on huggingface.co, one for the whole file; with --dummy-weights
        it is the shape's name.
    target
        File that gets one JSON line for each line, in their order: id, custom_id, response and error.
    overwrite
        Start again, whatever the output holds.
    json
        Print what became of the lines as one JSON object.
    """
    options = settings(engine, common)
    check_files(source, target)
    with Bars(quiet=json) as bars:
        lines = Lines.scan(source, on_progress=lambda done, total: bars.update("read", done, total))
    model, name = _model(lines, options)
    check_model(model, options)
    facts: dict[str, object] = {
        "format": "OpenAI batch",
        "input": lines.digest,
        "model": options.shape if model is None else fingerprint(model),
        "revision": options.revision,
        "chat_template": None if options.chat_template is None else fingerprint(options.chat_template),
        "seed": options.seed,
    }
    Output.check(target, facts, overwrite=overwrite)
    need_torch()
    with leaving_at_once():
        from omniserve.server.service import Service
    with Bars(quiet=json) as bars:
        service = Service(model, options, _limits(name), on_progress=bars.update)
        job = Job(service, lines, target, facts, overwrite=overwrite)
        code = _run(job, bars)
    if code:
        return code
    if json:
        as_json({"input": str(source), "output": str(target), **job.tally.as_object()})
    else:
        say(f"{target}: {job.tally.line()}")
    return 0


def _run(job: "Job", bars: Bars) -> int:
    """Run and return the exit code. Raises OmniserveError."""
    from omniserve.client import EngineDeadError, LoadError

    try:
        asyncio.run(job.run(bars.update))
    except KeyboardInterrupt:
        say(f"{job.target}: interrupted with {job.there} there; the same command goes on")
        raise
    except LoadError as error:
        raise RuntimeError(f"the engine was not loaded: {error}") from None
    except EngineDeadError as error:
        say(f"omniserve: error: the engine has ended ({error}) with {job.there} there; the same command goes on")
        return DIED
    return 0


def _model(lines: Lines, options: Options) -> tuple[str | None, str]:
    """Return the model to load, None for a shape, and its name in the lines: that of the first that names one."""
    name = None
    for number, content in lines:
        try:
            body = json_object(number, content, "body").get("body")
        except RequestError:
            continue
        if isinstance(body, dict) and isinstance(body.get("model"), str) and body["model"]:
            name = body["model"]
            break
    if options.shape is not None:
        return None, options.shape
    if name is None:
        raise ConfigError(f"{lines.path}: no line names a model: body.model must be a .gguf file, a folder or ORG/NAME")
    return name, name


def _limits(name: str) -> ServerOptions:
    """Return the settings of a service that turns nothing away for want of time or room."""
    limits = ServerLimits(request_timeout=math.inf)
    return ServerOptions(served_model_name=(name,), max_num_queued_reqs=_NEVER, limits=limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A line that is a request. body: not checked yet."""

    line: int
    custom_id: str
    url: str
    body: dict[str, Any]


class Job:
    """Lines on their way from the input through the engine to the output, the file `target`."""

    def __init__(
        self,
        service: "Service",
        lines: Lines,
        target: Path,
        facts: Mapping[str, object],
        *,
        overwrite: bool,
    ) -> None:
        self._service = service
        self._lines = lines
        self.target = target
        self._facts = facts
        self._overwrite = overwrite
        self._names = Names()
        self._shown = 0
        self._output: Output | None = None
        self.tally = Tally(lines=lines.filled)

    @property
    def there(self) -> str:
        """How much of the output is there."""
        filled = 0 if self._output is None else self._output.filled
        return f"{filled:,} of {self._lines.filled:,} lines"

    async def run(self, on_progress: Callable[[str, int, int], None]) -> None:
        """Load the model and answer what is not in the output yet.

        Raises OmniserveError, LoadError, or EngineDeadError.
        """
        service = self._service
        try:
            ready = await service.load()
            for sentence in ready.warnings:
                warn(sentence)
            with Output(
                self.target,
                {**self._facts, **settled(ready.config)},
                self._lines.last,
                ordered=True,
                overwrite=self._overwrite,
                marks=MARKS,
            ) as output:
                self._output = output
                self.tally.found = output.filled
                if output.torn:
                    say(f"{self.target}: cut off {output.torn:,} bytes of a torn line")
                if output.filled:
                    say(f"{self.target}: {self.there} are there, going on")
                began = time.perf_counter()
                await self._answer(output, AHEAD * ready.config.limits.max_seqs, on_progress)
                self.tally.seconds = time.perf_counter() - began
                self.tally.answered, self.tally.errors = output.answered, output.errors
        finally:
            await service.close()

    async def _answer(self, output: Output, ahead: int, on_progress: Callable[[str, int, int], None]) -> None:
        from omniserve.client import EngineDeadError

        answers = InOrder(output, ordered=True)
        under_way: set[asyncio.Task[None]] = set()
        died = asyncio.create_task(self._service.died())
        left = self._lines.filled - output.filled

        async def one(asked: Asked) -> None:
            answers.write(asked.line, await self._outcome(asked))

        async def settle(most: int) -> None:
            """Wait until so few are under way, or as many as may wait for an earlier one."""
            while len(under_way) > most or (answers.full and under_way):
                done, _ = await asyncio.wait({*under_way, died}, return_when=asyncio.FIRST_COMPLETED)
                if died in done:
                    raise EngineDeadError(died.result())
                under_way.difference_update(done)
                for task in done:
                    task.result()
                on_progress("answer", output.filled - self.tally.found, left)

        try:
            on_progress("answer", 0, left)
            for line, content in self._lines:
                done = line in output
                if not done:
                    answers.take(line)
                try:
                    name, given = self._identify(line, content)
                    if done:
                        continue
                    asked = _asked(line, name, given)
                except LineError as error:
                    if not done:
                        answers.write(line, self._refused(line, error))
                    continue
                under_way.add(asyncio.create_task(one(asked)))
                await settle(ahead - 1)
            await settle(0)
            assert answers.empty
        finally:
            for task in (*under_way, died):
                task.cancel()
            await asyncio.gather(*under_way, died, return_exceptions=True)

    def _identify(self, line: int, content: bytes | None) -> tuple[str, dict[str, Any]]:
        """Return a line's custom_id and its fields, and remember the name. Raises LineError."""
        try:
            given = json_object(line, content, "custom_id, method, url and body")
        except RequestError as error:
            raise LineError("invalid_json_line", str(error)) from None
        name = given.get("custom_id")
        if not isinstance(name, str) or not name:
            what = "is missing" if name is None else f"must be a text, not {short(name)}"
            raise LineError("missing_required_parameter", f"custom_id {what}")
        if (first := self._names.owner(name, line)) != line:
            raise LineError("duplicate_custom_id", f"custom_id {short(name)} is that of line {first} already", name)
        return name, given

    def _refused(self, line: int, error: LineError) -> dict[str, object]:
        sentence = sentence_of(error)
        self._report(line, sentence)
        told = {"code": error.code, "message": sentence}
        return {"id": f"{_ID}{line}", "custom_id": error.custom_id, "response": None, "error": told}

    async def _outcome(self, asked: Asked) -> dict[str, object]:
        """Return the line of the output for a request. Raises EngineDeadError: that is no answer."""
        from fastapi.exceptions import RequestValidationError

        from omniserve.client import EngineDeadError, StepError
        from omniserve.server.errors import ApiError, from_exception

        mark = hashlib.blake2b(f"{self._lines.digest} {asked.line}".encode(), digest_size=16).hexdigest()
        status = 200
        try:
            body = await self._served(asked, mark)
        except (ApiError, OmniserveError, RequestValidationError, StepError, EngineDeadError) as error:
            if (why := self._service.engine.dead) is not None:
                raise EngineDeadError(why) from None
            refusal = from_exception(error)
            status, body = refusal.status, refusal.value
            self._report(asked.line, f"status {status}: {refusal.message}")
        response = {"status_code": status, "request_id": mark, "body": body}
        return {"id": f"{_ID}{asked.line}", "custom_id": asked.custom_id, "response": response, "error": None}

    async def _served(self, asked: Asked, mark: str) -> dict[str, Any]:
        """Return the body that a server would answer with."""
        import msgspec

        from omniserve.engine.scheduler import mixed
        from omniserve.server.errors import ApiError
        from omniserve.server.requests import begin
        from omniserve.server.stream import until_done, usage_of

        body = _parsed(asked)
        if body.stream:
            raise ApiError(400, "stream must be false in a batch: an answer is a line", param="stream")
        if body.seed is None:
            body.seed = mixed(self._service.options.seed, asked.line - 1)
        reply, form = await begin(self._service, body, None)
        await until_done(reply, _nobody_hangs_up)
        usage = reply.usage
        self.tally.prompt_tokens += usage.prompt_tokens
        self.tally.completion_tokens += usage.completion_tokens
        made = form.whole(reply) | {"id": f"{reply.prefix}-{mark}", "usage": usage_of(reply)}
        plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(made))  # an infinity becomes null
        return plain

    def _report(self, line: int, sentence: str) -> None:
        if self._shown < REPORTED:
            say(f"omniserve: {self._lines.path} line {line}: {sentence}")
        elif self._shown == REPORTED:
            say(f"omniserve: further errors stand in {self.target} only")
        self._shown += 1


def _asked(line: int, custom_id: str, given: Mapping[str, Any]) -> Asked:
    """Return what a line asks. Raises LineError."""
    for name in ("method", "url", "body"):
        if given.get(name) is None:
            raise LineError("missing_required_parameter", f"{name} is missing", custom_id)
    method, url, body = (given[name] for name in ("method", "url", "body"))
    if method != "POST":
        raise LineError("invalid_method", f"method {short(method)}: must be POST", custom_id)
    if url not in URLS:
        raise LineError("invalid_url", f"url {short(url)}: must be {' or '.join(URLS)}", custom_id)
    if not isinstance(body, dict):
        raise LineError("invalid_request", f"body {short(body)}: must be an object", custom_id)
    return Asked(line=line, custom_id=custom_id, url=url, body=body)


def _parsed(asked: Asked) -> "ChatRequest | CompletionRequest":
    """Return a line's body, checked as the server checks it. Raises RequestValidationError."""
    from fastapi.exceptions import RequestValidationError
    from pydantic import ValidationError

    from omniserve.server.protocol import ChatRequest, CompletionRequest

    kind: type[ChatRequest | CompletionRequest] = (
        ChatRequest if asked.url == "/v1/chat/completions" else CompletionRequest
    )
    try:
        return kind.model_validate(asked.body)
    except ValidationError as error:
        raise RequestValidationError(
            [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
        ) from None


async def _nobody_hangs_up() -> Any:
    await asyncio.Future()
