"""The form of an answer: JSON, schemas, regular expressions, choices, grammars; and what hostile ones come to."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from omniserve import LLM, SamplingParams, StructuredOutputs
from tests.engine.test_grammar import BOMBS
from tests.server.harness import Server, check_error, eventually, program, serving

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ASK: dict[str, Any] = {"temperature": 1, "seed": 1, "max_tokens": 200}
CHAT = {**ASK, "messages": [{"role": "user", "content": "A person, please."}]}


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": value, "strict": True}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_answers_follow_their_schema(served: Server, stream: bool, seed: int) -> None:
    body = {**CHAT, "seed": seed, "response_format": schema(SCHEMA)}
    if stream:
        events = served.stream("/v1/chat/completions", body)
        text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
        finish = events[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = served.post("/v1/chat/completions", body).json()["choices"]
        text, finish = choice["message"]["content"], choice["finish_reason"]
    jsonschema.validate(json.loads(text), SCHEMA)
    assert finish == "stop"


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-c]{2}"}, "[0-9]{3}-[a-c]{2}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'start: "(" start ")" | /[xy]{3}/'}, r"\(*[xy]{3}\)*"),
        ({"json": '{"enum": [1, 22, "a"]}', "regex": None}, '1|22|"a"'),
        ({"json": {"type": "boolean"}}, "true|false"),
    ],
)
def test_extensions(served: Server, form: dict[str, Any], pattern: str) -> None:
    answer = served.complete("Say: ", **ASK, n=3, structured_outputs=form)
    for choice in answer["choices"]:
        assert re.fullmatch(pattern, choice["text"]), choice
        assert choice["finish_reason"] == "stop"


def test_json_object(served: Server) -> None:
    body = {**CHAT, "max_tokens": 60, "response_format": {"type": "json_object"}}
    text = served.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert text.startswith("{")


def test_the_length_ends_what_is_not_complete(served: Server) -> None:
    (choice,) = served.complete("a", temperature=0, max_tokens=3, structured_outputs={"regex": "[ab]{9}"})["choices"]
    assert (len(choice["text"]), choice["finish_reason"]) == (3, "length")


def test_the_end_of_a_form_needs_no_end_token(served: Server) -> None:
    answer = served.complete("a", **ASK, ignore_eos=True, min_tokens=5, structured_outputs={"regex": "[ab]{2}"})
    (choice,) = answer["choices"]
    assert (len(choice["text"]), choice["finish_reason"]) == (2, "stop")
    assert answer["usage"]["completion_tokens"] <= 2


def test_server_and_offline_say_the_same_whatever_runs_beside(served: Server, tiny: Path) -> None:
    forms: list[dict[str, Any] | None] = [{"regex": "[a-z ]{20}"}, None, {"json": SCHEMA}, None, {"choice": ["a", "b"]}]
    asks = [{**ASK, "max_tokens": 30, "seed": n, "structured_outputs": form} for n, form in enumerate(forms * 3)]
    alone = [served.complete("Is water wet?", **ask)["choices"][0]["text"] for ask in asks]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda ask: served.complete("Is water wet?", **ask)["choices"][0]["text"], asks))
    assert found == alone
    params = [
        SamplingParams(**{**ask, "structured_outputs": None if form is None else StructuredOutputs(**form)})
        for ask, form in zip(asks, forms * 3, strict=True)
    ]
    with LLM(tiny, precision="w8a8kv8") as llm:  # in float32: where nothing is close to a border, the same
        texts = [one.outputs[0].text for one in llm.generate(["Is water wet?"] * len(asks), params)]
    for text, form in zip(texts, forms * 3, strict=True):
        if form == {"regex": "[a-z ]{20}"}:
            assert re.fullmatch("[a-z ]{20}", text)


@pytest.mark.parametrize(
    ("field", "value", "words", "param"),
    [
        ("response_format", {"type": "json_schema"}, "must be a JSON Schema", "response_format.json_schema.schema"),
        ("response_format", schema({"type": 3}), "", "response_format.json_schema.schema"),
        ("response_format", schema({"uniqueItems": True, "type": "array"}), "uniqueItems", None),
        ("response_format", schema({"type": "string", "pattern": "("}), "regex", None),
        ("response_format", {"type": "yaml"}, "json_object", "response_format.type"),
        ("structured_outputs", {"regex": "(a"}, "unclosed group", "structured_outputs"),
        ("structured_outputs", {"regex": "a", "choice": ["b"]}, "regex and choice", "structured_outputs"),
        ("structured_outputs", {"regx": "a"}, "'regx' is none of", "structured_outputs"),
        ("structured_outputs", {"regex": 3}, "must be a text", "structured_outputs"),
        ("structured_outputs", {"grammar": "}{"}, "", "structured_outputs"),
        ("structured_outputs", {"regex": "x" * 65537}, "65537 bytes, at most 65536", "structured_outputs"),
        ("structured_outputs", "a+", "", "structured_outputs"),
    ],
)
def test_forms_that_are_none(served: Server, field: str, value: object, words: str, param: str | None) -> None:
    for stream in (False, True):
        answer = served.post("/v1/completions", {"prompt": "a", field: value, "stream": stream})
        check_error(answer, 400, "BadRequestError", words)
        if param is not None:
            assert answer.json()["error"]["param"] == param


def test_one_form_is_enough(served: Server) -> None:
    both = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    check_error(served.post("/v1/completions", {"prompt": "a", **both}), 400, "BadRequestError", "one of the two")


def test_bans_that_leave_nothing_fail_alone(served: Server) -> None:
    token = served.post("/tokenize", {"prompt": "x"}).json()["tokens"][0]
    body = {"prompt": "a", "structured_outputs": {"regex": "[ab]{9}"}, "allowed_token_ids": [token]}
    check_error(served.post("/v1/completions", body), 400, "BadRequestError", "leaves no token")
    events = served.stream("/v1/completions", body)
    assert [event["error"]["code"] for event in events] == [400]
    eventually(served.idle)


def test_bombs_leave_the_server_whole(served: Server) -> None:
    with ThreadPoolExecutor(8) as pool:

        def drop(form: StructuredOutputs) -> int:
            kind, text = form.form
            body = {"prompt": "a", "max_tokens": 8, "structured_outputs": {kind: text}}
            return served.post("/v1/completions", body).status_code

        codes = dict(zip(BOMBS, pool.map(drop, BOMBS.values()), strict=True))
    assert set(codes.values()) == {200, 400}, codes
    assert codes["stars"] == codes["long"] == 200
    assert codes["deep"] == codes["bad regex"] == codes["cycle"] == 400
    eventually(served.idle)
    assert served.complete("a", max_tokens=2)["choices"]


@pytest.mark.long
def test_bombs_do_not_slow_others_down() -> None:
    """Row 4: beside grammar bombs the median time between another stream's tokens stays below twice what it was."""
    with serving(options={"load_format": "dummy", "shape": "tiny", "precision": "w8a8kv8"}, model=None) as server:

        def median() -> float:
            times: list[float] = []
            body = {"prompt": "a", "max_tokens": 400, "temperature": 0, "stream": True}
            with server.http.stream("POST", "/v1/completions", json=body) as answer:
                times += [time.perf_counter() for line in answer.iter_lines() if line.startswith("data: {")]
            return sorted(after - before for before, after in pairwise(times))[len(times) // 2]

        calm = median()
        over = threading.Event()

        def bomb(form: StructuredOutputs) -> None:
            kind, text = form.form
            while not over.is_set():
                name = text.replace("p1", f"q{time.monotonic_ns()}") if kind == "json" else text
                server.post("/v1/completions", {"prompt": "a", "max_tokens": 4, "structured_outputs": {kind: name}})

        threads = [threading.Thread(target=bomb, args=(BOMBS[name],)) for name in ("wide", "stars", "many", "dots")]
        for thread in threads:
            thread.start()
        try:
            stormy = median()
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert stormy < 2 * calm + 0.005, (calm, stormy)


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Any:
    server = program(model=str(smollm2), options={"precision": "w8a8kv8", "max_model_len": 1024})
    yield server
    server.close()


def test_the_real_model_writes_json(real: Server) -> None:
    wanted = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "population": {"type": "integer", "maximum": 100_000_000},
            "capital": {"type": "boolean"},
        },
        "required": ["city", "population", "capital"],
        "additionalProperties": False,
    }
    body = {
        "messages": [{"role": "user", "content": "Tell me about Paris, as JSON."}],
        "temperature": 0,
        "max_tokens": 120,
        "response_format": schema(wanted),
    }
    (choice,) = real.post("/v1/chat/completions", body).json()["choices"]
    value = json.loads(choice["message"]["content"])
    jsonschema.validate(value, wanted)
    assert choice["finish_reason"] == "stop"
    assert "Paris" in value["city"]
