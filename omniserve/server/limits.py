"""What the server takes in: caps on connections, requests and queues, and who is turned away when they are reached."""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from omniserve.base.config import nearest
from omniserve.base.errors import ConfigError
from omniserve.server.errors import ApiError

_SMALLEST_BODY_LIMIT = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Caps of one server; config section `limits:`. Deadlines in seconds; None follows from the model's context.

    header_deadline          to send a request's header, from the first byte of it or the start of the connection
    body_deadline            to send its body
    keep_alive               between two requests of a connection
    max_header_bytes         request line and header; max_headers: lines of it
    max_prompt_bytes         UTF-8 bytes of a prompt or conversation, checked before it is tokenized
    request_timeout          to the first token
    watchdog                 a step may take
    ping                     after which a silent stream gets a comment
    key_requests_per_minute  of one API key, 0: no limit
    """

    max_connections: int = 1024
    header_deadline: float = 10.0
    body_deadline: float = 30.0
    keep_alive: float = 30.0
    max_header_bytes: int = 32 << 10
    max_headers: int = 128
    max_body_bytes: int | None = None
    max_prompt_bytes: int | None = None
    max_prompts: int = 256
    max_messages: int = 2048
    request_timeout: float = 600.0
    watchdog: float = 60.0
    ping: float = 15.0
    key_requests_per_minute: int = 0

    def body_bytes(self, max_model_len: int) -> int:
        """Largest body."""
        return self.max_body_bytes or max(_SMALLEST_BODY_LIMIT, 32 * max_model_len)

    def prompt_bytes(self, max_model_len: int) -> int:
        """Longest prompt, in bytes."""
        return self.max_prompt_bytes or 16 * max_model_len


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What a user may say about the server; names and meanings are those of the flags of `omniserve serve`."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    api_key: tuple[str, ...] = ()
    served_model_name: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    ui: bool = True
    metrics_prefix: str = "omniserve"
    metrics_public: bool = False
    shutdown_timeout: float = 30.0
    max_num_queued_reqs: int = 1024
    max_num_queued_tokens: int | None = None
    limits: ServerLimits = field(default_factory=ServerLimits)

    @property
    def loopback(self) -> bool:
        """True when only this machine can reach the port."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def _checked(kind: type[Any], values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    known = {one.name: one for one in fields(kind)}
    found = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{origin}: unknown option {name!r}{nearest(name, known)}")
        found[name] = _value(name, known[name].type, value, origin)
    return found


def _value(name: str, kind: Any, value: Any, origin: str) -> Any:
    if kind == tuple[str, ...]:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list | tuple) and all(isinstance(text, str) and text for text in texts):
            return tuple(texts)
        raise ConfigError(f"{origin}: {name} must be a text or a list of texts")
    if kind is ServerLimits:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{origin}: limits must hold `name: number` lines")
        return ServerLimits(**_checked(ServerLimits, value, f"{origin}: limits"))
    kinds = get_args(kind) or (kind,)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None and type(None) in kinds:
        return None
    if (bool in kinds and isinstance(value, bool)) or (str in kinds and isinstance(value, str)):
        return value
    if number and float in kinds and math.isfinite(value) and value >= 0:
        return float(value)
    if number and int in kinds and isinstance(value, int) and value >= 0:
        return value
    words = {int: "a whole number, 0 or more", float: "a number, 0 or more", str: "a text", bool: "true or false"}
    raise ConfigError(f"{origin}: {name}={str(value)[:80]!r}: must be {words[kinds[0]]}")


def server_options(values: Mapping[str, Any], *, origin: str, base: ServerOptions | None = None) -> ServerOptions:
    """Return `base` with the named values replaced. Raises ConfigError for unknown names and wrong values."""
    base = base or ServerOptions()
    kept = {one.name: getattr(base, one.name) for one in fields(ServerOptions)}
    made = ServerOptions(**kept | _checked(ServerOptions, values, origin))
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", made.metrics_prefix):
        raise ConfigError(f"{origin}: metrics_prefix={made.metrics_prefix!r}: must be letters, digits and underscores")
    return made


class Queue:
    """Counts the sequences and prompt tokens under way. Invariant: both are 0 when nothing is open."""

    def __init__(self, sequences: int, tokens: int | None) -> None:
        self._most = sequences
        self._most_tokens = tokens
        self.sequences = 0
        self.tokens = 0
        self._ends: list[float] = []

    def fits(self, sequences: int) -> None:
        """Raise ApiError 400 for more sequences than can ever be queued."""
        if sequences > self._most:
            raise ApiError(
                400, f"{sequences} sequences (prompts x n): at most {self._most} can be queued; send fewer", param="n"
            )

    def full(self, sequences: int, tokens: int = 0) -> str | None:
        """Return why so much more finds no place, "reqs" or "tokens"; None if it does."""
        if self.sequences + sequences > self._most:
            return "reqs"
        if self._most_tokens is not None and self.tokens and self.tokens + tokens > self._most_tokens:
            return "tokens"
        return None

    def enter(self, tokens: int) -> None:
        """Count a sequence and the tokens of its prompt."""
        self.sequences += 1
        self.tokens += tokens

    def prefilled(self, tokens: int) -> None:
        """Count the tokens of a prompt no more."""
        self.tokens -= tokens

    def leave(self) -> None:
        """Count a sequence no more."""
        self.sequences -= 1
        self._ends.append(time.monotonic())
        if len(self._ends) > 64:
            del self._ends[:32]

    def seconds(self) -> float:
        """Guess how long it takes until a place is free, from how fast sequences have ended lately."""
        now = time.monotonic()
        recent = [end for end in self._ends if now - end < 30]
        return 30 / len(recent) if recent else 5.0


class Rates:
    """Requests per key and minute: a bucket that fills evenly and holds a minute's worth."""

    def __init__(self, per_minute: int) -> None:
        self._rate = per_minute / 60
        self._most = float(per_minute)
        self._left: dict[int, tuple[float, float]] = {}

    def take(self, key: int) -> None:
        """Count a request of a key, by its place in the list of keys. Raises ApiError 429 if it had its share."""
        if not self._rate:
            return
        now = time.monotonic()
        left, since = self._left.get(key, (self._most, now))
        left = min(self._most, left + (now - since) * self._rate)
        if left < 1:
            wait = (1 - left) / self._rate
            raise ApiError(
                429, f"this key may send {self._most:g} requests in a minute: wait {wait:.1f} s", retry_after=wait
            )
        self._left[key] = left - 1, now
