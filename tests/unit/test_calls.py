"""Reasoning and tool calls in text, wherever it is cut."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.base.structured import StructuredOutputs
from omniserve.engine.grammar import Grammars
from omniserve.formats.dummy import CONFIGS, DummySource
from omniserve.server.calls import (
    DIALECTS,
    CallFinder,
    Listener,
    Said,
    ThoughtFinder,
    after_thinking,
    dialect,
    grammar,
    joined,
    lark_of,
    reasons,
    thinking,
)
from omniserve.text import Tokenizer

HERMES, LLAMA, MISTRAL = (DIALECTS[name] for name in ("hermes", "llama3_json", "mistral"))
PARIS = '{"name": "weather", "arguments": {"city": "Paris", "days": [1, 2]}}'
LYON = '{"arguments": {"city": "Lyon \\"x\\" }{"}, "name": "weather"}'


def hear(name: str, text: str, cuts: tuple[int, ...] = (), *, many: bool = True) -> list[tuple[str, str, int]]:
    """What is found in a text that comes in these pieces."""
    finder = CallFinder(DIALECTS[name], many=many)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[begin:end] for begin, end in pairwise(places)] or [""]
    found = [said for piece in pieces[:-1] for said in finder.push(piece)] + finder.push(pieces[-1], True)
    return [(said.kind, said.text, said.index) for said in joined(found)]


def call(index: int, arguments: str, name: str = "weather") -> list[tuple[str, str, int]]:
    return [("call", name, index), ("arguments", arguments, index)]


CITY, OTHER = '{"city": "Paris", "days": [1, 2]}', '{"city": "Lyon \\"x\\" }{"}'
TEXTS: list[tuple[str, str, list[tuple[str, str, int]]]] = [
    ("hermes", "Just an answer < 3, {} and <tool.", [("content", "Just an answer < 3, {} and <tool.", 0)]),
    ("hermes", f"<tool_call>\n{PARIS}\n</tool_call>", call(0, CITY)),
    (
        "hermes",
        f"Let me see.\n<tool_call>\n{PARIS}\n</tool_call>\n<tool_call>{LYON}</tool_call>",
        [("content", "Let me see.\n", 0), *call(0, CITY), *call(1, OTHER)],
    ),
    ("hermes", f"<tool_call>{PARIS}</tool_call> Done, it is.", [*call(0, CITY), ("content", "Done, it is.", 0)]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', call(0, "{}", "now")),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', call(0, '{"a": 1}', "f")),
    ("hermes", '<tool_call>{"name": "f", "arguments": null , "x": true}\n', call(0, "null", "f")),
    (
        "hermes",
        '<tool_call>{"city": "Paris"}</tool_call>',
        [("content", '<tool_call>{"city": "Paris"}</tool_call>', 0)],
    ),
    ("hermes", "<tool_call>weather(Paris)</tool_call>", [("content", "<tool_call>weather(Paris)</tool_call>", 0)]),
    ("hermes", '<tool_call>{"name": 3}', [("content", '<tool_call>{"name": 3}', 0)]),
    ("hermes", '<tool_call>{"na', [("content", '<tool_call>{"na', 0)]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1, 2', call(0, '{"a": [1, 2', "f")),
    ("hermes", f"<tool_call>{PARIS}</tool", [*call(0, CITY), ("content", "</tool", 0)]),
    ("hermes", "", []),
    ("llama3_json", PARIS.replace("arguments", "parameters"), call(0, CITY)),
    ("llama3_json", f" {PARIS}; {LYON}", [*call(0, CITY), *call(1, OTHER)]),
    ("llama3_json", f"<|python_tag|>{PARIS}", call(0, CITY)),
    ("llama3_json", '{"answer": 42}', [("content", '{"answer": 42}', 0)]),
    ("llama3_json", f"Here: {PARIS}", [("content", f"Here: {PARIS}", 0)]),
    ("mistral", f"[TOOL_CALLS] [{PARIS}]", call(0, CITY)),
    ("mistral", f"[TOOL_CALLS][{PARIS}, {LYON}]", [*call(0, CITY), *call(1, OTHER)]),
    ("mistral", f"Well [1]. [TOOL_CALLS]{PARIS}", [("content", "Well [1]. ", 0), *call(0, CITY)]),
    ("mistral", "[TOOL_CALLS] none", [("content", "[TOOL_CALLS] none", 0)]),
]


@pytest.mark.parametrize(("name", "text", "expected"), TEXTS)
def test_calls(name: str, text: str, expected: list[tuple[str, str, int]]) -> None:
    assert hear(name, text) == expected
    assert hear(name, text, tuple(range(len(text)))) == expected


@given(number=st.integers(0, len(TEXTS) - 1), cuts=st.lists(st.integers(0, 150)).map(tuple))
def test_cuts_do_not_show(number: int, cuts: tuple[int, ...]) -> None:
    name, text, expected = TEXTS[number]
    assert hear(name, text, cuts) == expected


@given(
    name=st.sampled_from(sorted(DIALECTS)), text=st.text('<tool_call>/{}[]":,\\ \n;TOOLCALLS'), cut=st.integers(0, 99)
)
def test_rubbish_is_cut_anywhere_too(name: str, text: str, cut: int) -> None:
    found = hear(name, text)
    assert hear(name, text, (cut,)) == hear(name, text, tuple(range(len(text)))) == found
    if not any(kind == "call" for kind, _, _ in found):
        assert "".join(said for _, said, _ in found) == text.lstrip()


def test_arguments_come_while_they_are_written() -> None:
    finder = CallFinder(HERMES)
    found = [
        finder.push(piece) for piece in ('<tool_call>{"name": "f", ', '"arguments": {"a": "b', 'c"', "}}</tool_call>")
    ]
    assert found == [
        [Said(kind="call", text="f")],
        [Said(kind="arguments", text='{"a": "b')],
        [Said(kind="arguments", text='c"')],
        [Said(kind="arguments", text="}")],
    ]


def test_one_call_where_one_is_asked_for() -> None:
    text = f"<tool_call>{PARIS}</tool_call><tool_call>{LYON}</tool_call>"
    assert hear("hermes", text, many=False) == call(0, CITY)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% for tool in tools %}<tool_call>", "hermes"),
        ("{% if tools %}[AVAILABLE_TOOLS] ... [TOOL_CALLS]", "mistral"),
        ("{% if tools %}<|python_tag|>", "llama3_json"),
        ("{% if tools %} 'ipython' ... parameters", "llama3_json"),
        ("{% if tools %}<tool_call>\n<function=", None),
        ("<tool_call>", None),
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_dialects_are_told_by_the_template(template: str | None, name: str | None) -> None:
    found = dialect("auto", template)
    assert (found and found.name) == name
    assert dialect("mistral", template) is MISTRAL


def test_ids() -> None:
    assert HERMES.id() != HERMES.id()
    assert HERMES.id().startswith("call_")
    assert len(MISTRAL.id()) == 9
    assert MISTRAL.id().isalnum()


# Grammars

FUNCTIONS: list[dict[str, Any]] = [
    {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Paris", "Lyon"]}},
        },
    },
    {"name": "now"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DummySource("tiny", CONFIGS["tiny"], {}))


def follows(tokenizer: Tokenizer, lark: str, text: str) -> bool:
    """Whether a grammar allows a text."""
    matcher = Grammars(tokenizer.as_json, [], 256).compile(StructuredOutputs(grammar=lark)).matcher([])
    for token in tokenizer.encode(text, special=False):
        if matcher.done or not int.from_bytes(matcher.mask(), "little") >> token & 1:
            return False
        matcher.take([token])
    return not matcher.failed


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_forced_calls(tokenizer: Tokenizer, name: str) -> None:
    way = DIALECTS[name]
    one, two = (
        f'{{"name": "weather", "{way.arguments}": {{"city": "Lyon"}}}}',
        f'{{"name": "now", "{way.arguments}": {{}}}}',
    )
    wrong = one.replace("Lyon", "Rome")
    forms = {"hermes": "<tool_call>\n{}\n</tool_call>", "llama3_json": "{}", "mistral": "[TOOL_CALLS][{}]"}
    lark = grammar(way, FUNCTIONS, {}, many=True)
    for text in (one, two):
        assert follows(tokenizer, lark, forms[name].replace("{}", text, 1))
    assert not follows(tokenizer, lark, forms[name].replace("{}", wrong, 1))
    assert not follows(tokenizer, lark, "Hello")
    both = {
        "hermes": "\n".join(forms[name].replace("{}", text, 1) for text in (one, two)),
        "mistral": f"[TOOL_CALLS][{one}, {two}]",
    }.get(name)
    if both is not None:
        assert follows(tokenizer, lark, both)
        assert not follows(tokenizer, grammar(way, FUNCTIONS, {}, many=False), both)
        assert [kind for kind, _, _ in hear(name, both)] == ["call", "arguments"] * 2
    assert hear(name, forms[name].replace("{}", one, 1)) == call(0, '{"city": "Lyon"}')
    assert not follows(tokenizer, grammar(way, FUNCTIONS[1:], {}, many=False), forms[name].replace("{}", one, 1))


def test_special_tokens_are_drawn_as_such(tokenizer: Tokenizer) -> None:
    lark = grammar(MISTRAL, FUNCTIONS, {"[TOOL_CALLS]": 7}, many=False)
    assert lark.startswith('start: <[7]> "["')


@pytest.mark.parametrize(
    ("form", "text", "wrong"),
    [
        (StructuredOutputs(json={"type": "boolean"}), "true", "yes"),
        (StructuredOutputs(choice=("yes", 'n"o')), 'n"o', "maybe"),
        (StructuredOutputs(regex="[0-9]/[a-z]"), "3/x", "x/3"),
        (StructuredOutputs(json_object=True), "{}", "[]"),
    ],
)
def test_forms_follow_the_reasoning(tokenizer: Tokenizer, form: StructuredOutputs, text: str, wrong: str) -> None:
    plain = lark_of(form)
    assert plain is not None
    lark = after_thinking(plain, None)
    assert follows(tokenizer, lark, f"Hm. <b>\nSo</think>\n\n{text}")
    assert not follows(tokenizer, lark, f"Hm.</think>{wrong}")
    assert follows(tokenizer, lark, text)  # it may still think


def test_a_grammar_of_its_own_follows_nothing() -> None:
    assert lark_of(StructuredOutputs(grammar='start: "a"')) is None


# Reasoning


def think(text: str, cuts: tuple[int, ...] = (), *, within: bool = False) -> list[tuple[str, str]]:
    finder = ThoughtFinder(within=within)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[begin:end] for begin, end in pairwise(places)] or [""]
    found = [said for piece in pieces[:-1] for said in finder.push(piece)] + finder.push(pieces[-1], True)
    return [(said.kind, said.text) for said in joined(found)]


THOUGHTS: list[tuple[str, bool, list[tuple[str, str]]]] = [
    ("<think>\nHm.\n</think>\n\nYes.", False, [("reasoning", "Hm.\n"), ("content", "Yes.")]),
    ("\n<think>Hm.</think>Yes. </think>", False, [("reasoning", "Hm."), ("content", "Yes. </think>")]),
    ("Yes, <think>.", False, [("content", "Yes, <think>.")]),
    ("<thin", False, [("content", "<thin")]),
    ("Hm.</think>Yes.", True, [("reasoning", "Hm."), ("content", "Yes.")]),
    ("<think>\nHm. </thi", True, [("reasoning", "Hm. </thi")]),
    ("<think>\n\n</think>\n\nYes.", False, [("content", "Yes.")]),
    ("</think>Yes.", True, [("content", "Yes.")]),
    ("  </think>  ", True, []),
    ("<", True, [("reasoning", "<")]),
    ("", True, []),
    (" ", False, [("content", " ")]),
]


@pytest.mark.parametrize(("text", "within", "expected"), THOUGHTS)
def test_thoughts(text: str, within: bool, expected: list[tuple[str, str]]) -> None:
    assert think(text, within=within) == expected
    for cut in range(len(text)):
        assert think(text, (cut,), within=within) == expected
    assert think(text, tuple(range(len(text))), within=within) == expected


def test_calls_behind_reasoning() -> None:
    listener = Listener(ThoughtFinder(within=True), CallFinder(HERMES))
    found = [
        said
        for letter in f"I look <tool_call> up.</think>\n<tool_call>{PARIS}</tool_call>"
        for said in listener.push(letter)
    ]
    found += listener.push("", finished=True)
    assert [(one.kind, one.text) for one in joined(found)] == [
        ("reasoning", "I look <tool_call> up."),
        ("call", "weather"),
        ("arguments", CITY),
    ]
    assert listener.calls == 1
    assert json.loads(CITY)


def test_who_reasons() -> None:
    assert reasons("auto", "a <think> b")
    assert not reasons("auto", None)
    assert reasons("qwen3", None)
    assert thinking("<|im_start|>assistant\n<think>\n")
    assert not thinking("<think>\n\n</think>\n\n")
