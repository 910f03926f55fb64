"""Faults in the server's own process, for requests that ask for them; tests.server.program puts them in.

tokenizer     a prompt that holds RAISE, or PANIC (as a panic of the library: no Exception)
detokenizer   `skip_special_tokens: false`, at the third token
socket write  the header `X-Fault: write`, at the fourth write
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from omniserve import text
from omniserve.base.serving import ServerLimits
from omniserve.server import run
from omniserve.server.http import Connection

WRITES = 3


class Panic(BaseException):
    """As pyo3_runtime.PanicException."""


def fail() -> None:
    raise RuntimeError("a fault at /secret/path 0xdeadbeef")


class FaultyTokenizer(text.Tokenizer):
    def encode(self, prompt: str, *, special: bool = True) -> list[int]:
        if "RAISE" in prompt:
            fail()
        if "PANIC" in prompt:
            raise Panic("a fault at /secret/path 0xdeadbeef")
        return super().encode(prompt, special=special)


class FaultyDetokenizer(text.Detokenizer):
    def __init__(self, tokenizer: text.Tokenizer, *, skip_special: bool = True) -> None:
        super().__init__(tokenizer, skip_special=skip_special)
        self.left = None if skip_special else 2

    def push(self, ids: Sequence[int]) -> str:
        if self.left == 0:
            fail()
        if self.left is not None:
            self.left -= 1
        return super().push(ids)


class FaultyTransport:
    """A transport whose fourth write fails."""

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self.left = WRITES

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        if self.left == 0:
            raise OSError(105, "No buffer space available")
        self.left -= 1
        self.transport.write(data)


class FaultyConnection(Connection):
    def data_received(self, data: bytes) -> None:
        if b"x-fault: write" in data.lower():
            self.transport = FaultyTransport(self.transport)
        super().data_received(data)


def install() -> None:
    """Put the faults in the places of what they imitate."""

    def connections(limits: ServerLimits) -> Callable[..., Connection]:
        return partial(FaultyConnection, limits=limits)

    text.Tokenizer = FaultyTokenizer  # type: ignore[misc]
    text.Detokenizer = FaultyDetokenizer  # type: ignore[misc]
    run.connections = connections
