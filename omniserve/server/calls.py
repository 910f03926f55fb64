"""Tool calls: how a family of models writes them, which grammar makes it write one, and what its text comes to.

Text comes bit by bit; what an answer was cut into never shows. Arguments are passed on as the model wrote them, so they
can be sent while they are written; what cannot become a call is content.
"""

import json
import re
import secrets
import string
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from omniserve.base.structured import StructuredOutputs

Result = TypeVar("Result")
Letters = Generator[None, str, Result]
"""What takes a letter each time it goes on."""
Kind = Literal["content", "reasoning", "call", "arguments"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A bit of what the model says: content or reasoning, the name of a function that is called, or arguments of it."""

    kind: Kind
    text: str
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How a family writes calls.

    begin      what comes before a call, or before the list of them; end: after it
    arguments  the key of a call's arguments
    listed     calls are a JSON list; bare: a call needs no `begin`, but nothing comes before it
    digits     ids are so many letters and digits, which its template insists on; 0: free
    """

    name: str
    begin: str
    end: str = ""
    arguments: str = "arguments"
    listed: bool = False
    bare: bool = False
    digits: int = 0

    def id(self) -> str:
        """Return an id for a call."""
        if self.digits:
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(self.digits))
        return f"call_{secrets.token_hex(12)}"


DIALECTS = {
    one.name: one
    for one in (
        Dialect(name="hermes", begin="<tool_call>", end="</tool_call>"),
        Dialect(name="llama3_json", begin="<|python_tag|>", arguments="parameters", bare=True),
        Dialect(name="mistral", begin="[TOOL_CALLS]", listed=True, digits=9),
    )
}


def dialect(parser: str, template: str | None) -> Dialect | None:
    """Return how a model with this chat template writes calls; None if that is not known.

    parser  value of --tool-call-parser: auto looks at the template
    """
    if parser != "auto":
        return DIALECTS[parser]
    source = template or ""
    if "tools" not in source or "<function=" in source:
        return None
    if "<tool_call>" in source:
        return DIALECTS["hermes"]
    if "[TOOL_CALLS]" in source:
        return DIALECTS["mistral"]
    if "<|python_tag|>" in source or ("ipython" in source and "parameters" in source):
        return DIALECTS["llama3_json"]
    return None


# The grammar of calls


def grammar(way: Dialect, functions: Sequence[Mapping[str, Any]], markers: Mapping[str, int], *, many: bool) -> str:
    """Return a Lark grammar of calls of these functions.

    functions  as in a request: name and parameters, a JSON Schema
    markers    ids of those texts that are special tokens: no text is written like them
    many       more than one call may follow
    """

    def marker(text: str) -> str:
        return f"<[{markers[text]}]>" if text in markers else json.dumps(text)

    names = [f"call{number}" for number in range(len(functions))]
    rules = [f"{name}: %json {_call(way, function)}" for name, function in zip(names, functions, strict=True)]
    rules.append("call: " + " | ".join(names))
    if way.listed:
        more = ' (", " call)*' if many else ""
        start = f'{marker(way.begin)} "[" call{more} "]"'
    elif way.bare:
        start = "call"
    else:
        one = f'{marker(way.begin)} "\\n" call "\\n" {marker(way.end)}'
        start = f'{one} ("\\n" {one})*' if many else one
    return "\n".join([f"start: {start}", *rules])


def _call(way: Dialect, function: Mapping[str, Any]) -> str:
    """Return the schema of a call. Definitions move to its root, where references look for them."""
    parameters = dict(function.get("parameters") or {"type": "object"})
    shared = {key: parameters.pop(key) for key in ("$defs", "definitions") if key in parameters}
    schema = {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, way.arguments: parameters},
        "required": ["name", way.arguments],
        "additionalProperties": False,
        "x-guidance": {"whitespace_pattern": r"[\x20\x0A]{1,4}"},
        **shared,
    }
    return json.dumps(schema, ensure_ascii=False)


# From text to calls


class CallFinder:
    """Finds calls in text that comes bit by bit, letter by letter.

    calls  how many were found; with `many` False nothing is told of those after the first
    """

    def __init__(self, way: Dialect, *, many: bool = True) -> None:
        self.calls = 0
        self._way = way
        self._many = many
        self._held = ""  # taken in, and not told yet
        self._said: list[Said] = []
        self._quiet = True  # nothing but white space was said since the beginning, or the last call
        self._within = False  # a call that was told of goes on
        self._machine = self._listen()
        next(self._machine)

    def push(self, text: str, finished: bool = False) -> list[Said]:
        """Return what this text brings; `finished` returns what was held back as well."""
        self._said = []
        for letter in text:
            self._held += letter
            self._machine.send(letter)
            if self._within:
                self._held = ""
        if finished:
            self._tell(len(self._held))
        return joined(self._said)

    def _listen(self) -> Letters[None]:
        """Take letters for ever."""
        way = self._way
        if way.bare:
            letter = yield from _solid()
            if letter == "{":
                yield from self._row(letter, ";")
        while True:
            yield from self._speak()
            letter = yield from _solid()
            if way.listed and letter == "[":
                letter = yield from _solid()
                after = yield from self._row(letter, ",")
                if after == "]":
                    self._held = ""
            elif way.end:
                after = yield from self._row(letter, "")
                if after == way.end[0]:
                    yield from self._ending()
            else:
                yield from self._row(letter, ";" if way.bare else "")

    def _speak(self) -> Letters[None]:
        """Tell content until a call may begin."""
        begin = self._way.begin
        while not self._held.endswith(begin):
            self._tell(len(self._held) - _overlap(self._held, begin))
            yield
        self._tell(len(self._held) - len(begin))

    def _row(self, letter: str, separator: str) -> Letters[str]:
        """Take calls with something between them, and return the first letter that is none of it."""
        while True:
            try:
                yield from self._call(letter)
            except ValueError:  # it was no call: what is held of it becomes content
                self._within = False
                return ""
            letter = yield from _solid()
            if letter != separator:
                return letter
            self._held = ""
            letter = yield from _solid()

    def _call(self, letter: str) -> Letters[None]:
        """Take a JSON object with the name of a function and its arguments. ValueError if it is none."""
        if letter != "{":
            raise ValueError
        name: str | None = None
        written: list[str] = []  # arguments, before they can be told

        def note(letter: str) -> None:
            if name is None or written:
                written.append(letter)
            else:
                self._add("arguments", letter)

        given = False
        letter = yield from _solid()
        while letter != "}":
            key = json.loads((yield from _value(letter, lambda _: None))[0])
            if (yield from _solid()) != ":":
                raise ValueError
            letter = yield from _solid()
            if key in (self._way.arguments, "arguments", "parameters") and not given:
                given = True
                if letter == '"':  # an object that is written as a text
                    text, letter = yield from _value(letter, lambda _: None)
                    for one in str(json.loads(text)):
                        note(one)
                else:
                    _, letter = yield from _value(letter, note)
            else:
                text, letter = yield from _value(letter, lambda _: None)
                if key == "name" and name is None:
                    name = json.loads(text)
                    if not isinstance(name, str) or not name:
                        raise ValueError
                    self.calls += 1
                    self._within = True
                    self._add("call", name)
                    self._add("arguments", "".join(written))
                    written.clear()
            letter = letter or (yield from _solid())
            if letter == ",":
                letter = yield from _solid()
            elif letter != "}":
                raise ValueError
        if name is None:
            raise ValueError
        if not given:
            self._add("arguments", "{}")
        self._within, self._quiet, self._held = False, True, ""

    def _ending(self) -> Letters[None]:
        """Drop what ends a call; anything else is content."""
        end = self._way.end
        while end.startswith(self._held.lstrip()):
            if self._held.lstrip() == end:
                self._held = ""
                return
            yield

    def _add(self, kind: Kind, text: str) -> None:
        if self._many or self.calls <= 1:
            self._said.append(Said(kind=kind, text=text, index=self.calls - 1))

    def _tell(self, count: int) -> None:
        """Tell what was held first; white space does not begin content."""
        text, self._held = self._held[:count], self._held[count:]
        text = text.lstrip() if self._quiet else text
        if text:
            self._quiet = False
            self._said.append(Said(kind="content", text=text))


def _solid() -> Letters[str]:
    """Take letters until one is no white space, and return it."""
    while (letter := (yield)).isspace():
        pass
    return letter


def _value(letter: str, note: Callable[[str], None]) -> Letters[tuple[str, str]]:
    """Take a JSON value that begins with this letter, noting each letter of it.

    Returns its text, and the letter after it if that was needed to see its end. What is within is not looked at.
    """
    text = letter
    note(letter)
    if letter in ",:]}":
        raise ValueError
    depth, quoted, escaped = int(letter in "[{"), letter == '"', False
    closed = False
    while not closed:
        letter = yield
        if text[0] not in '[{"' and (letter in ",]}" or letter.isspace()):
            return text, "" if letter.isspace() else letter
        text += letter
        note(letter)
        if quoted:
            quoted = escaped or letter != '"'
            escaped = letter == "\\" and not escaped
        elif letter == '"':
            quoted = True
        else:
            depth += (letter in "[{") - (letter in "]}")
        closed = text[0] in '[{"' and not depth and not quoted
    return text, ""


def _overlap(text: str, mark: str) -> int:
    """Return how many characters at the end of `text` begin `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(mark[:count])), 0)


# Reasoning

THINK, THOUGHT = "<think>", "</think>"


def reasons(parser: str, template: str | None) -> bool:
    """Return whether answers hold reasoning between <think> and </think>; auto looks at the template."""
    return parser != "auto" or THINK in (template or "") or THOUGHT in (template or "")


def thinking(prompt: str) -> bool:
    """Return whether a rendered conversation ends within the reasoning."""
    return prompt.rstrip().endswith(THINK)


class ThoughtFinder:
    """Splits an answer into reasoning and what follows it, bit by bit. within: it begins in the reasoning."""

    def __init__(self, *, within: bool) -> None:
        self._state: Literal["begin", "within", "after", "over"] = "within" if within else "begin"
        self._held = ""
        self._spaces = within

    def push(self, text: str, finished: bool = False) -> list[Said]:
        """Return what this text brings; `finished` returns what was held back as well."""
        self._held += text
        found: list[Said] = []
        if self._state == "begin":
            start = self._held.lstrip()
            if start.startswith(THINK):
                self._state, self._held, self._spaces = "within", start[len(THINK) :], True
            elif not THINK.startswith(start) or finished:
                self._state = "over"
        if self._state == "within":
            found += self._think(finished)
        if self._state == "after":
            self._held = self._held.lstrip()
            self._state = "over" if self._held else "after"
        if self._state == "over":
            found.append(Said(kind="content", text=self._held))
            self._held = ""
        return [one for one in found if one.text]

    def _think(self, finished: bool) -> Iterator[Said]:
        if self._spaces:
            self._held = self._held.removeprefix(THINK).lstrip()
            self._spaces = not self._held or THINK.startswith(self._held)
            if self._spaces and not finished:
                return
        place = self._held.find(THOUGHT)
        if place >= 0:
            thought, self._held, self._state = self._held[:place], self._held[place + len(THOUGHT) :], "after"
        else:
            keep = 0 if finished else _overlap(self._held, THOUGHT)
            thought, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        yield Said(kind="reasoning", text=thought)


class Listener:
    """What one answer says: reasoning first, then content and calls."""

    def __init__(self, thoughts: ThoughtFinder | None, finder: CallFinder | None) -> None:
        self._thoughts = thoughts
        self._finder = finder

    @property
    def calls(self) -> int:
        """Functions that were called so far."""
        return 0 if self._finder is None else self._finder.calls

    def push(self, text: str, finished: bool = False) -> list[Said]:
        """Return what this text brings; `finished` returns what was held back as well. Neighbours of a kind are one."""
        said = [Said(kind="content", text=text)] if self._thoughts is None else self._thoughts.push(text, finished)
        if self._finder is None:
            return joined(said)
        found: list[Said] = []
        for one in said:
            found += self._finder.push(one.text) if one.kind == "content" else [one]
        return joined(found + self._finder.push("", finished)) if finished else joined(found)


def joined(said: Iterable[Said]) -> list[Said]:
    """Return the same with neighbours of a kind as one."""
    made: list[Said] = []
    for one in said:
        last = made[-1] if made else None
        if last is not None and (last.kind, last.index) == (one.kind, one.index) and one.kind != "call":
            made[-1] = Said(kind=one.kind, text=last.text + one.text, index=one.index)
        elif one.text or one.kind == "call":
            made.append(one)
    return made


def lark_of(form: StructuredOutputs) -> str | None:
    """Return a form as a Lark grammar; None for one that is a grammar of its own."""
    kind, text = form.form
    match kind:
        case "json" | "json_object":
            schema = json.loads(text) if kind == "json" else {"type": "object"}
            return f"start: %json {json.dumps(schema, ensure_ascii=False)}"
        case "choice":
            return "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in json.loads(text))
        case "regex":
            import llguidance

            return f"start: /{llguidance.regex_to_lark(text, use_ascii='')}/"
    return None


def after_thinking(lark: str, thought: int | None) -> str:
    """Return a grammar of ours that lets the reasoning end first. thought: id of what ends it, if that is special."""
    body = re.sub(r"^start:", "body:", lark, flags=re.MULTILINE)
    ending = f"/(?s:.*)/ <[{thought}]>" if thought is not None else "thought"
    text = "" if thought is not None else f"thought[suffix={json.dumps(THOUGHT)}]: /(?s:.*)/\n"
    return f"start: {ending} SPACE? body\n{text}SPACE: /[ \\n]{{1,4}}/\n{body}"
