"""Tool calls and reasoning: what a model writes, as clients of OpenAI's API get it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.harness import Server, check_error, eventually, serving

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Lyon"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
ONE, TWO = '{"name": "weather", "arguments": {"city": "Paris"}}', '{"name": "now", "arguments": {}}'
TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
HERMES = "{% if tools %}<tool_call>{% endif %}"
SAYS = {
    "hermes": (HERMES, f"Well.\n<tool_call>\n{ONE}\n</tool_call>\n<tool_call>{TWO}</tool_call>"),
    "mistral": ("{% if tools %}[TOOL_CALLS]{% endif %}", f"Well.\n[TOOL_CALLS] [{ONE}, {TWO}]"),
    "llama3_json": ("{% if tools %}<|python_tag|>{% endif %}", f"{ONE}; {TWO}".replace("arguments", "parameters")),
    "thinking": (HERMES + "{# <think> #}", f"<think>\nHm, rain?\n</think>\n\n<tool_call>{ONE}</tool_call>"),
    "thinks": (TURNS + "<think>\n{# {{ tools }} <tool_call> #}", "Hm, rain?</think>\n\nYes."),
    "silent": ("", "Nothing is called."),
}
END = "$"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Rain?"}], "tools": TOOLS, "stop": END}
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module", params=sorted(SAYS))
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Server]]:
    """A server whose model always says the same."""
    template, text = SAYS[request.param]
    file = tmp_path_factory.mktemp("templates") / "template.jinja"
    file.write_text(template if template.startswith(TURNS) else template + TURNS)
    with serving(null=0.001, engine=f"say {text}{END}", options={"chat_template": str(file)}) as server:
        yield request.param, server


def streamed(server: Server, body: dict[str, Any]) -> tuple[dict[str, Any], str, list[dict[str, Any]]]:
    """The message that the chunks of a stream make, why it ended, and all its deltas."""
    message: dict[str, Any] = {"content": ""}
    calls: list[dict[str, Any]] = []
    finish, deltas = None, []
    for event in server.stream(PATH, body):
        (choice,) = event["choices"]
        delta = choice["delta"]
        deltas.append(delta)
        finish = choice["finish_reason"] or finish
        for name in ("content", "reasoning_content"):
            if delta.get(name):
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append({**call, "function": dict(call["function"])})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    if calls:
        message["tool_calls"] = calls
    assert finish is not None
    return message, finish, deltas


def shape(message: dict[str, Any]) -> dict[str, Any]:
    """A message without ids, which differ."""
    calls = [(call["type"], call["function"]) for call in message.get("tool_calls") or ()]
    return {
        "content": message["content"] or None,
        "reasoning": message.get("reasoning_content"),
        "calls": calls,
    }


PARIS = ("function", {"name": "weather", "arguments": '{"city": "Paris"}'})
NOW = ("function", {"name": "now", "arguments": "{}"})
EXPECTED: dict[str, tuple[dict[str, Any], str]] = {
    "hermes": ({"content": "Well.\n", "reasoning": None, "calls": [PARIS, NOW]}, "tool_calls"),
    "mistral": ({"content": "Well.\n", "reasoning": None, "calls": [PARIS, NOW]}, "tool_calls"),
    "llama3_json": ({"content": None, "reasoning": None, "calls": [PARIS, NOW]}, "tool_calls"),
    "thinking": ({"content": None, "reasoning": "Hm, rain?\n", "calls": [PARIS]}, "tool_calls"),
    "thinks": ({"content": "Yes.", "reasoning": "Hm, rain?", "calls": []}, "stop"),
}


def test_what_is_said(said: tuple[str, Server]) -> None:
    name, server = said
    if name == "silent":
        answer = server.post(PATH, BODY)
        check_error(answer, 501, "NotImplementedError", "--tool-call-parser", param="tools")
        assert answer.headers["x-should-retry"] == "false"
        assert server.post(PATH, {**BODY, "tool_choice": "none"}).status_code == 200
        return
    body = {key: value for key, value in BODY.items() if key != "tools"} if name == "thinks" else BODY
    (choice,) = server.post(PATH, body).json()["choices"]
    assert (shape(choice["message"]), choice["finish_reason"]) == EXPECTED[name]
    message, finish, deltas = streamed(server, body)
    assert (shape(message), finish) == EXPECTED[name]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    for call in (*message.get("tool_calls", ()), *choice["message"].get("tool_calls", ())):
        assert re.fullmatch("[A-Za-z0-9]{9}" if name == "mistral" else "call_[0-9a-f]{24}", call["id"])
    eventually(server.idle)


def test_tools_may_be_left_alone(said: tuple[str, Server]) -> None:
    name, server = said
    (choice,) = server.post(PATH, {**BODY, "tool_choice": "none"}).json()["choices"]
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"
    if name in ("hermes", "mistral"):
        assert choice["message"]["content"] == SAYS[name][1]


def test_one_call_where_one_is_asked_for(said: tuple[str, Server]) -> None:
    name, server = said
    if len(EXPECTED.get(name, ({"calls": []}, ""))[0]["calls"]) == 2:
        body = {**BODY, "parallel_tool_calls": False}
        (choice,) = server.post(PATH, body).json()["choices"]
        assert shape(choice["message"])["calls"] == shape(streamed(server, body)[0])["calls"] == [PARIS]


def test_the_length_cuts_a_call_short(said: tuple[str, Server]) -> None:
    name, server = said
    if name == "hermes":
        size = len(SAYS[name][1].split("Par", maxsplit=1)[0])
        (choice,) = server.post(PATH, {**BODY, "max_tokens": size}).json()["choices"]
        assert choice["finish_reason"] == "length"
        assert shape(choice["message"])["calls"] == [("function", {"name": "weather", "arguments": '{"city": "'})]


def test_logprobs_are_all_there(said: tuple[str, Server]) -> None:
    """Of a text that is held back, too: each token is told once."""
    name, server = said
    if name == "silent":
        return
    entries = 0
    for event in server.stream(PATH, {**BODY, "logprobs": True, "max_tokens": 40, "stop": None, "tool_choice": "auto"}):
        logprobs = event["choices"][0]["logprobs"]
        entries += 0 if logprobs is None else len(logprobs["content"])
    assert entries in (0, 40)  # a null model has none


# With a model that could say anything


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"weather", "now"}), ({"type": "function", "function": {"name": "weather"}}, {"weather"})],
)
def test_forced_calls(tooled: Server, choice: Any, names: set[str], seed: int) -> None:
    body = {**BODY, "stop": None, "seed": seed, "max_tokens": 150, "tool_choice": choice, "parallel_tool_calls": False}
    (found,) = tooled.post(PATH, body).json()["choices"]
    assert found["finish_reason"] == "tool_calls"
    assert found["message"]["content"] is None
    (call,) = found["message"]["tool_calls"]
    assert call["function"]["name"] in names
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "weather":
        assert arguments in ({"city": "Paris"}, {"city": "Lyon"})
    message, finish, _ = streamed(tooled, body)
    assert (shape(message), finish) == (shape(found["message"]), "tool_calls")


def test_conversations_with_tools(tooled: Server) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        *BODY["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
    ]
    tokens = tooled.post("/tokenize", {"messages": messages}).json()["tokens"]
    text = tooled.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert text == '<|user|>Rain?<|assistant|>!weather{"city": "Paris"}<|tool|>Rain.<|assistant|>'
    answer = tooled.post(PATH, {"messages": messages, "tools": TOOLS, "max_tokens": 2})
    told = len("[weather][now]")
    assert answer.json()["usage"]["prompt_tokens"] <= len(tokens) + told
    assert answer.json()["usage"]["prompt_tokens"] > len(tokens)


@pytest.mark.parametrize(
    ("change", "words", "param"),
    [
        ({"tool_choice": "maybe"}, "none, auto, required", "tool_choice"),
        ({"tool_choice": "=weather"}, "none, auto, required", "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "none, auto, required", "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "tides"}}}, "'tides': weather, now", "tool_choice"),
        ({"tool_choice": "required", "tools": None}, "there are none", "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "there are none", "tool_choice"),
        ({"tools": [{"type": "function"}]}, "missing", "tools.0.function"),
        ({"tools": [{"type": "retrieval"}]}, "", "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "", "tools.0.function.name"),
        ({"tools": TOOLS * 65}, "128", "tools"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}],
                "tool_choice": "required",
            },
            "",
            "tools",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
                    *BODY["messages"],
                ]
            },
            "JSON object",
            "messages.0.tool_calls.0.function.arguments",
        ),
    ],
)
def test_mistakes(tooled: Server, change: dict[str, Any], words: str, param: str) -> None:
    check_error(tooled.post(PATH, {**BODY, **change}), 400, "BadRequestError", words, param=param)


def test_a_form_beside_tools_is_not_implemented(tooled: Server) -> None:
    answer = tooled.post(PATH, {**BODY, "response_format": {"type": "json_object"}})
    check_error(answer, 501, "NotImplementedError", param="response_format")


def test_forms_follow_the_reasoning(tiny: Path, tmp_path: Path) -> None:
    """A template that opens the reasoning: the schema is about what follows it."""
    template = tmp_path / "think.jinja"
    template.write_text(TURNS + "<think>")
    options = {"precision": "w8a8kv8", "chat_template": str(template)}
    with serving(model=str(tiny), engine="float64", options=options) as server:
        body = {
            "messages": BODY["messages"], "max_tokens": 60, "seed": 1, "structured_outputs": {"choice": ["yes", "no"]}
        }  # fmt: skip
        (choice,) = server.post(PATH, body).json()["choices"]
        message = choice["message"]
        if choice["finish_reason"] == "stop":
            assert message["content"] in ("yes", "no")
        else:
            assert message["content"] is None
            assert message["reasoning_content"]
        refused = server.post(PATH, {**body, "structured_outputs": {"grammar": 'start: "a"'}})
        check_error(refused, 501, "NotImplementedError", param="structured_outputs")
