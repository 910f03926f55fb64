"""The environment as settings: `OMNISERVE_<FLAG>` and `OMNISERVE_LIMIT_<NAME>`. No other module reads it.

Every command knows every variable: one that is unknown is an error, those of the server have an effect in
`omniserve serve` only.
"""

import os
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args, get_origin

from omniserve.base.config import Options, nearest, options_from
from omniserve.base.errors import ConfigError
from omniserve.base.serving import ServerLimits, ServerOptions

PREFIX = "OMNISERVE_"
_LIMIT = "limit_"
_OF_THE_TESTS = ("OMNISERVE_TEST_MODELS",)
"""Variables that tell the tests where things are; they are no options."""
_WORDS = {
    "1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False,
}  # fmt: skip


def options_from_environment(base: Options | None = None) -> Options:
    """Return `base` with the values of `OMNISERVE_<FLAG>` variables; an unknown one is a ConfigError."""
    return options_from(environment(), origin="environment", base=base)


def environment() -> dict[str, Any]:
    """Return the options of an engine that variables set. Raises ConfigError for an unknown variable or a bad value."""
    return {name: value for kind, name, value in _read() if kind is Options}


def server_environment() -> dict[str, Any]:
    """Return the options of a server that variables set, limits under `limits`. Raises ConfigError as above."""
    values: dict[str, Any] = {}
    for kind, name, value in _read():
        if kind is ServerOptions:
            values[name] = value
        elif kind is ServerLimits:
            values.setdefault("limits", {})[name] = value
    return values


def _read() -> Iterator[tuple[type[Any], str, Any]]:
    """Yield what each variable is about: the dataclass, its field, the value."""
    kinds = {one.name: (kind, one) for kind in (Options, ServerOptions) for one in fields(kind) if one.name != "limits"}
    limits = {_LIMIT + one.name: (ServerLimits, one) for one in fields(ServerLimits)}
    known = kinds | limits
    for variable, text in os.environ.items():
        if not variable.startswith(PREFIX) or variable in _OF_THE_TESTS:
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in known:
            raise ConfigError(f"environment: unknown option {variable}{nearest(name, known)}")
        kind, one = known[name]
        yield kind, one.name, _from_text(variable, one.type, text)


def _from_text(variable: str, annotation: Any, text: str) -> Any:
    if annotation == tuple[str, ...]:
        return [part.strip() for part in text.split(",")]
    kinds = get_args(annotation) if get_origin(annotation) is not None else (annotation,)
    if bool in kinds:
        if text.lower() in _WORDS:
            return _WORDS[text.lower()]
        raise ConfigError(f"{variable}={text!r}: must be true or false")
    for number in (int, float):
        if number in kinds:
            try:
                return number(text)
            except ValueError:
                raise ConfigError(f"{variable}={text!r}: must be a number") from None
    return text
