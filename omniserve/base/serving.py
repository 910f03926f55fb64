"""Settings of the server: what a user may say about it, and its limits. Plain values, checked one by one.

Names and meanings are those of the flags of `omniserve serve`; the section `limits:` of a config file and the variables
`OMNISERVE_LIMIT_<NAME>` fill `ServerLimits`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

from omniserve.base.config import nearest
from omniserve.base.errors import ConfigError
from omniserve.base.log import LEVELS

CALL_PARSERS = ("auto", "hermes", "llama3_json", "mistral")
REASONING_PARSERS = ("auto", "deepseek_r1", "qwen3")
"""How answers are read: vLLM's names."""
_SMALLEST_BODY_LIMIT = 8 << 20
_LAST_PORT = 65535


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
    """What a user may say about the server; names and meanings are those of the flags of `omniserve serve`.

    Texts of several values, such as keys, are lists in a file and have commas between them in the environment.
    """

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
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    log_level: str = "info"
    log_json: bool = False
    otlp_traces_endpoint: str | None = None
    limits: ServerLimits = field(default_factory=ServerLimits)

    @property
    def loopback(self) -> bool:
        """True when only this machine can reach the port."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


_ABOVE_ZERO = {"max_num_queued_reqs"} | {one.name for one in fields(ServerLimits)} - {"key_requests_per_minute"}
NAMES = frozenset(one.name for one in fields(ServerOptions))
"""Names of the settings of a server."""


def server_options(values: Mapping[str, Any], *, origin: str, base: ServerOptions | None = None) -> ServerOptions:
    """Return `base` with the named values replaced, of the limits those that are named.

    Raises ConfigError for unknown names and wrong values.
    """
    base = base or ServerOptions()
    made = replace(base, **_checked(base, values, origin))
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", made.metrics_prefix):
        raise ConfigError(f"{origin}: metrics_prefix={made.metrics_prefix!r}: must be letters, digits and underscores")
    for name, allowed in (
        ("log_level", LEVELS),
        ("tool_call_parser", CALL_PARSERS),
        ("reasoning_parser", REASONING_PARSERS),
    ):
        if getattr(made, name) not in allowed:
            raise ConfigError(f"{origin}: {name}={getattr(made, name)!r}: must be one of {', '.join(allowed)}")
    if made.port > _LAST_PORT:
        raise ConfigError(f"{origin}: port={made.port}: must be 0 to {_LAST_PORT}; 0 takes any that is free")
    return made


def _checked(base: ServerOptions | ServerLimits, values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    known = {one.name: one for one in fields(base)}
    found = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{origin}: unknown option {name!r}{nearest(name, known)}")
        if name == "limits":
            if not isinstance(value, Mapping):
                raise ConfigError(f"{origin}: limits must hold `name: number` lines")
            limits: ServerLimits = getattr(base, name)
            found[name] = replace(limits, **_checked(limits, value, f"{origin}: limits"))
        else:
            made = found[name] = _value(name, known[name].type, value, origin)
            if name in _ABOVE_ZERO and made == 0:
                raise ConfigError(f"{origin}: {name}=0: must be above 0")
    return found


def _value(name: str, kind: Any, value: Any, origin: str) -> Any:
    if kind == tuple[str, ...]:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list | tuple) and all(isinstance(text, str) and text for text in texts):
            return tuple(texts)
        raise ConfigError(f"{origin}: {name} must be a text or a list of texts, none of them empty")
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
