"""Chat templates, rendered in a process of their own: a template is the model's code, which nobody has read.

The sandbox keeps it from Python's internals; the process keeps an endless loop or a huge string from the program that
asks. Conversations and answers travel as lines of JSON. The worker's half of this file never imports torch.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, NoReturn

from omniserve.base.errors import RequestError
from omniserve.base.numbers import human_bytes

if TYPE_CHECKING:
    import jinja2

RENDER_SECONDS = 2.0
"""Time for one conversation, the template's compilation included."""
RENDER_BYTES = 256 << 20
"""Memory for one conversation, beyond what the idle worker holds."""
_START_SECONDS = 60.0
_START = "import sys; sys.path[:] = sys.argv[1:]; from omniserve.templates import work; work()"


class ChatTemplate:
    """A Jinja chat template. Its worker starts with the first conversation, ends with this object or the program, and
    is replaced after a conversation that broke its limits. Threads take turns.
    """

    def __init__(self, source: str, *, seconds: float = RENDER_SECONDS, memory_bytes: int = RENDER_BYTES) -> None:
        self.source = source
        self._seconds = seconds
        self._memory = memory_bytes
        self._turn = threading.Lock()
        self._worker: _Worker | None = None
        self._end: weakref.finalize[[], ChatTemplate] | None = None

    def render(self, values: Mapping[str, object], *, max_bytes: int) -> str:
        """Return what the template writes for these values (JSON's types) in at most `max_bytes` of UTF-8.

        Raises RequestError if it refuses them or needs more time, memory or output than it may have.
        """
        try:
            request = _line({"values": values, "max_bytes": max_bytes})
        except (TypeError, ValueError, RecursionError):
            raise RequestError("the messages must hold texts, numbers, true, false, null, lists and objects") from None
        with self._turn:
            worker = self._worker if self._worker is not None and self._worker.alive else self._start()
            reply: dict[str, object] = {}
            try:
                reply = worker.ask(request, most=6 * max_bytes + 4096, seconds=self._seconds)
            finally:
                if "text" not in reply and "refused" not in reply:
                    self._drop()
        match reply:
            case {"text": str(text)}:
                return text
            case {"refused": str(sentence)}:
                raise RequestError(f"the chat template refuses the conversation: {sentence}")
            case {"exceeded": "seconds"}:
                raise RequestError(f"the chat template ran for more than {self._seconds:g} s: {_ADVICE}")
            case {"exceeded": "memory"}:
                raise RequestError(f"the chat template needs more than {human_bytes(self._memory)}: {_ADVICE}")
            case {"exceeded": "output"}:
                raise RequestError(
                    f"the chat template writes more than {max_bytes} bytes for this conversation: shorten it"
                )
        raise RequestError(f"the chat template ended the process that renders it: {_ADVICE}")

    def close(self) -> None:
        """End the worker; the next conversation starts another."""
        with self._turn:
            self._drop()

    @property
    def worker(self) -> int | None:
        """Process id of the worker, None while there is none."""
        return None if self._worker is None else self._worker.process.pid

    def _start(self) -> "_Worker":
        self._drop()
        self._worker = worker = _Worker()
        self._end = weakref.finalize(self, worker.end)
        terms = {"source": self.source, "seconds": self._seconds, "memory_bytes": self._memory}
        if "ready" not in worker.ask(_line(terms), most=4096, seconds=_START_SECONDS):
            self._drop()
            raise RuntimeError("the worker process for chat templates did not start")
        return worker

    def _drop(self) -> None:
        if self._end is not None:
            self._end()
        self._worker = self._end = None


_PIECE = 1 << 16
_ADVICE = "mend it, or give another with --chat-template FILE"


class _Worker:
    """The process, seen from outside. It is killed rather than asked: it holds nothing that could be lost."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C at the terminal is not for it
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        for pipe in (self._stdin, self._stdout):
            os.set_blocking(pipe.fileno(), False)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, request: bytes, *, most: int, seconds: float) -> dict[str, object]:
        """Send a line and return the object that answers it: {"exceeded": ...}, or {} if the worker is no more."""
        until = time.monotonic() + seconds
        left, reply = memoryview(request), bytearray()
        poll = select.poll()
        poll.register(self._stdin, select.POLLOUT)
        poll.register(self._stdout, select.POLLIN)
        try:
            while not reply.endswith(b"\n"):
                if len(reply) > most or (wait := until - time.monotonic()) <= 0:
                    return {"exceeded": "output" if len(reply) > most else "seconds"}
                for pipe, event in poll.poll(1000 * wait):
                    if pipe == self._stdin.fileno():
                        left = left[os.write(pipe, left[:_PIECE]) :]
                        if not left:
                            poll.unregister(self._stdin)
                    elif event & select.POLLIN:
                        reply += os.read(pipe, _PIECE)
                    else:
                        return {}
            answer = json.loads(reply)
        except (BrokenPipeError, ValueError):
            return {}
        return answer if isinstance(answer, dict) else {}

    def end(self) -> None:
        """Kill the process, if it lives, and wait until it is gone."""
        self.process.kill()
        self.process.wait()
        self._stdin.close()
        self._stdout.close()


def _line(message: Mapping[str, object]) -> bytes:
    return json.dumps(message).encode() + b"\n"


# The worker's half

_NO_MEMORY = _line({"exceeded": "memory"})
_LONGEST = 500
"""Characters of a refusal, which may quote the conversation."""


def work() -> None:
    """Render the conversations that come as lines of standard input, until it ends."""
    terms = json.loads(sys.stdin.buffer.readline() or "{}")
    if not terms:
        return
    template: jinja2.Template | None = None
    _import_all()
    _confine(terms["memory_bytes"])
    _send(_line({"ready": True}))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, terms["seconds"] + 1)  # ends the process if the one that asks is gone
        try:
            request = json.loads(line)
            template = template or compile_template(terms["source"])
            reply = _line(_render(template, request["values"], request["max_bytes"]))
        except MemoryError:
            reply = _NO_MEMORY
        except Exception as error:  # whatever the template's expressions raise is about this conversation
            reply = _line({"refused": " ".join(str(error).split())[:_LONGEST] or type(error).__name__})
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(reply)


def _render(template: "jinja2.Template", values: dict[str, object], most: int) -> dict[str, object]:
    pieces, size = [], 0
    for piece in template.generate(values):
        size += len(piece.encode("utf-8", "surrogatepass"))
        if size > most:
            return {"exceeded": "output"}
        pieces.append(piece)
    return {"text": "".join(pieces)}


def _send(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def _import_all() -> None:
    """Load what Jinja and the standard library load when first needed: no file can be opened later."""
    import pprint  # noqa: F401
    import textwrap  # noqa: F401

    import jinja2.constants
    import jinja2.debug  # noqa: F401

    compile_template("{{ strftime_now('%c') }}").render()


def _confine(memory_bytes: int) -> None:
    """Give up memory beyond what is used now, files, processes and standard error."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    with open("/proc/self/statm", "rb") as sizes:
        used = int(sizes.read().split()[0]) * resource.getpagesize()
    for limit, most in (
        (resource.RLIMIT_AS, used + memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))


def compile_template(source: str) -> "jinja2.Template":
    """Compile a chat template in the environment that templates are written for (transformers').

    The sandbox keeps a model's template from Python's internals; `namespace` and `dict` are replaced because Jinja's
    own let a template set underscored attributes.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the model wrote, for training; here it shows its body."""

        tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

        def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        def __init__(self, /, *args: object, **values: object) -> None:
            for name in dict(*args, **values):
                _refuse_underscore(name)
            super().__init__(*args, **values)

        def __setitem__(self, name: str, value: object) -> None:
            _refuse_underscore(name)
            super().__setitem__(name, value)

    def _refuse_underscore(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"{name!r} must not begin with an underscore")

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": Namespace,
        "dict": lambda *args, **values: dict(*args, **values),
    }
    return environment.from_string(source)
