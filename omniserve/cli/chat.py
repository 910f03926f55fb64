"""`omniserve chat`: a conversation in the terminal, with a model in this process or behind a server."""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Annotated, Protocol

from cyclopts import Group, Parameter

from omniserve.base.errors import ConfigError, OmniserveError
from omniserve.base.types import SamplingParams
from omniserve.cli.answer import AnswerFlags, Said, check_text, collect
from omniserve.cli.connection import place
from omniserve.cli.flags import NO_FLAGS, Common, EngineFlags, given, settings
from omniserve.cli.loading import load
from omniserve.cli.output import piece, result, say

REMOTE = Group("Server, instead of MODEL", sort_key=0)
Message = dict[str, str]


class Speaker(Protocol):
    """What answers: `LLM`, or `RemoteModel`."""

    def stream_chat(self, messages: Sequence[Message], params: SamplingParams, /) -> Iterator[Said]:
        """Answer one conversation, yielding text as it comes; closing the iterator drops the request."""


def chat(
    model: str | None = None,
    /,
    *,
    question: Annotated[str | None, Parameter(name="-q", allow_leading_hyphen=True)] = None,
    system: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    stats: Annotated[bool, Parameter(negative="")] = False,
    url: Annotated[str | None, Parameter(group=REMOTE)] = None,
    api_key: Annotated[str | None, Parameter(group=REMOTE)] = None,
    served_model_name: Annotated[str | None, Parameter(group=REMOTE)] = None,
    sampling: AnswerFlags = AnswerFlags(),  # noqa: B008  # frozen
    engine: EngineFlags = NO_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> None:
    """Talk with a model in the terminal. Ctrl-C ends an answer, Ctrl-D the conversation; /clear forgets it.

    Parameters
    ----------
    model
        A .gguf file, a model folder or a name on huggingface.co (ORG/NAME); with --dummy-weights none. Without it a
        server answers.
    question
        Answer this question and leave.
    system
        System message at the start of the conversation.
    stats
        After each answer, print token counts, time to first token and tokens per second.
    url
        Where an OpenAI-compatible server is (default http://127.0.0.1:8000/v1).
    api_key
        Its key; better kept in OMNISERVE_API_KEY, or as api-key in the --config file.
    served_model_name
        The model to ask for (default: the first that the server lists).
    """
    params = sampling.params(max_tokens=None, seed=given(engine).get("seed"))
    for text, name in ((question, "question"), (system, "system message")):
        if text is not None:
            check_text(text, name)
    start = [] if system is None else [{"role": "system", "content": system}]
    if _local(model, url, engine):
        for value, flag in ((api_key, "--api-key"), (served_model_name, "--served-model-name")):
            if value is not None:
                raise ConfigError(f"{flag} goes with --url, and here is a model")
        with load(model, settings(engine, common), brief=not sys.stderr.isatty()) as llm:
            _talk(llm, start, params, question=question, stats=stats)
        return
    where = place(url, api_key, common)
    from omniserve.remote import RemoteModel

    with RemoteModel(where, served_model_name) as remote:
        if sys.stderr.isatty():
            say(f"{remote.model} at {where.base}")
        _talk(remote, start, params, question=question, stats=stats)


def _local(model: str | None, url: str | None, engine: EngineFlags) -> bool:
    """Return whether a model of this process is to answer. Raises ConfigError if the command line says both."""
    flags = {name: value for name, value in given(engine).items() if name != "seed"}
    local = model is not None or "shape" in flags or flags.get("load_format") == "dummy"
    if not local and flags:
        name = next(iter(flags))
        raise ConfigError(
            f"--{name.replace('_', '-')} goes with MODEL, and there is none: a server has its own settings"
        )
    if local and url is not None:
        raise ConfigError("MODEL and --url: give one of the two")
    return local


def _talk(speaker: Speaker, start: list[Message], params: SamplingParams, *, question: str | None, stats: bool) -> None:
    """Answer one question, or line after line."""
    if question is None:
        _converse(speaker, start, params, stats=stats)
        return
    answer = collect(lambda: speaker.stream_chat([*start, _user(question)], params), write=piece)
    result("")
    if stats:
        say(answer.line())


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _converse(speaker: Speaker, start: list[Message], params: SamplingParams, *, stats: bool) -> None:
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
                answer = collect(partial(speaker.stream_chat, messages, params), write=piece, stop=interrupted)
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

    A step is never torn apart that way, so an engine can go on with the next question.
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
