"""What an answer must look like, and what keeps it to that. Plain Python: engine/grammar.py makes the grammars."""

import json as json_text
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from omniserve.base.errors import RequestError

LONGEST = 64 << 10
"""Bytes of a schema, a regular expression or a grammar."""
FORMS = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """The form of the produced text; exactly one field is set. Names and meanings are vLLM's.

    json         a JSON Schema, as an object or as its text
    json_object  any JSON object
    regex        a regular expression (of Rust's crate `regex`) that the whole text matches
    choice       one of these texts
    grammar      a context-free grammar in llguidance's Lark syntax

    Raises RequestError with what was given and what is allowed.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in FORMS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            what = f"{' and '.join(given)} are given" if given else "none is given"
            raise RequestError(f"structured_outputs: give one of {', '.join(FORMS)}, {what}")
        name = given[0]
        if name == "json" and isinstance(self.json, dict):
            object.__setattr__(self, "json", _text(self.json))
        elif name == "choice":
            object.__setattr__(self, "choice", _choices(self.choice))
        elif name == "json_object" and self.json_object is not True:
            raise RequestError("structured_outputs.json_object: must be true or left out")
        elif name != "json_object" and not isinstance(getattr(self, name), str):
            raise RequestError(f"structured_outputs.{name}: must be a text{' or an object' * (name == 'json')}")
        kind, text = self.form
        if not text:
            raise RequestError(f"structured_outputs.{kind}: is empty, it allows nothing")
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise RequestError(f"structured_outputs.{kind}: is not valid Unicode") from None
        if size > LONGEST:
            raise RequestError(f"structured_outputs.{kind}: has {size} bytes, at most {LONGEST} are taken")

    @property
    def form(self) -> tuple[str, str]:
        """The name of the one field, and its value as a text; equal forms have equal ones."""
        if self.json is not None:
            assert isinstance(self.json, str)
            return "json", self.json
        if self.regex is not None:
            return "regex", self.regex
        if self.choice is not None:
            return "choice", _text(self.choice)
        if self.grammar is not None:
            return "grammar", self.grammar
        return "json_object", "{}"

    @staticmethod
    def of(given: Mapping[str, Any]) -> "StructuredOutputs":
        """Return the form that a mapping of those names describes. Raises RequestError."""
        known = {field.name for field in fields(StructuredOutputs)}
        if unknown := sorted(str(name) for name in given.keys() - known):
            raise RequestError(f"structured_outputs: {unknown[0][:60]!r} is none of {', '.join(FORMS)}")
        return StructuredOutputs(**given)


def _text(value: object) -> str:
    try:
        return json_text.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise RequestError("structured_outputs.json: must be of JSON's types, and not deep") from None


def _choices(given: object) -> tuple[str, ...]:
    several = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    texts: tuple[Any, ...] = tuple(given) if isinstance(given, Sequence) and several else ()
    if not texts or not all(isinstance(one, str) and one for one in texts):
        raise RequestError("structured_outputs.choice: must be a list of non-empty texts")
    return texts


class Matcher(Protocol):
    """Where one answer is in its grammar. Mutable.

    done    nothing may follow; failed: the grammar needs more than it may have, and knows nothing any more
    """

    done: bool
    failed: bool

    def mask(self) -> bytes:
        """Return which tokens may follow: one bit each, the lowest first."""

    def take(self, tokens: Sequence[int]) -> None:
        """Go on by tokens that were allowed."""


class Grammar(Protocol):
    """A form, made ready for one vocabulary. Immutable."""

    def matcher(self, produced: Sequence[int]) -> Matcher:
        """Return a matcher that has taken these tokens."""
