"""OpenAI's own client, unmodified: sync, async, streams, typed exceptions, what it retries."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.server.harness import Server, eventually, program

MESSAGES = [{"role": "user", "content": "Is water wet?"}]


@pytest.fixture
def client(served: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="x", http_client=httpx.Client(trust_env=False)) as made:
        yield made


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "omniserve"


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3, n=2, seed=3
    )  # type: ignore[call-overload]  # dictionaries are fine
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.content == answer.choices[1].message.content
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens / 2
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_chat_stream(client: OpenAI) -> None:
    ask = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**ask)  # type: ignore[call-overload]
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    *body, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert "".join(chunk.choices[0].delta.content or "" for chunk in body) == whole.choices[0].message.content
    assert body[0].choices[0].delta.role == "assistant"
    assert body[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    stopped = {**ask, "stop": [whole.choices[0].message.content[-1]]}
    with client.chat.completions.stream(**stopped) as stream:  # type: ignore[arg-type]
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "stop"
    assert whole.choices[0].message.content.startswith(final.message.content)


def test_completions(client: OpenAI) -> None:
    ask = {"model": "tiny", "prompt": ["a", "the dog"], "max_tokens": 6, "temperature": 0, "logprobs": 2, "echo": True}
    whole = client.completions.create(**ask)  # type: ignore[call-overload]
    assert whole.choices[1].text.startswith("the dog")
    assert whole.choices[0].logprobs.token_logprobs[0] is None
    chunks = list(client.completions.create(**ask, stream=True))  # type: ignore[call-overload]
    for choice in whole.choices:
        assert "".join(c.choices[0].text for c in chunks if c.choices[0].index == choice.index) == choice.text
    stopped = client.completions.create(
        model="tiny", prompt="the dog", max_tokens=20, temperature=0, stop=[whole.choices[1].text[-2:]]
    )
    assert stopped.choices[0].finish_reason == "stop"


def test_async(served: Server) -> None:
    async def ask() -> list[str]:
        http = httpx.AsyncClient(trust_env=False)
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", http_client=http) as client:

            async def one(number: int) -> str:
                stream = await client.completions.create(
                    model="tiny", prompt=f"number {number}", max_tokens=8, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(number % 4) for number in range(16)))

    texts = asyncio.run(ask())
    assert texts[:4] * 4 == texts


def test_a_stream_that_is_left(served: Server, client: OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt="a", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    eventually(served.idle, 1)


def test_typed_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": 5}])  # type: ignore[list-item,misc]
    assert (bad.value.status_code, bad.value.type) == (400, "BadRequestError")
    assert bad.value.param == "messages.0.content"
    assert str(bad.value.code) == "400"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.param == "model"
    assert missing.value.request_id


def test_what_is_not_implemented_is_not_tried_again(client: OpenAI, served: Server) -> None:
    before = served.log.count("status=501")
    with pytest.raises(openai.InternalServerError) as refused:
        client.with_options(max_retries=2).chat.completions.create(
            model="tiny", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )  # type: ignore[call-overload]
    assert refused.value.status_code == 501
    assert refused.value.param == "tools"
    served.until(rf"request id={refused.value.request_id} ")
    assert served.log.count("status=501") == before + 1


def test_nothing_was_pickled(client: OpenAI, served: Server) -> None:
    """Row 1: in neither process, from the start to the answers; logprobs, streams and templates included."""
    client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2, logprobs=True)  # type: ignore[arg-type]
    assert "a pickle asked for" not in served.log


def test_keys() -> None:
    server = program(null=0.001, server={"api_key": ["good"]})
    try:
        http = httpx.Client(trust_env=False)
        with OpenAI(base_url=f"{server.url}/v1", api_key="bad", http_client=http) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            assert client.with_options(api_key="good").models.list().data[0].id == "null"
    finally:
        server.close()


# The form of an answer, tools


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Lyon"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}}


def test_json_schema(client: OpenAI) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    ask = {"model": "tiny", "messages": MESSAGES, "max_tokens": 120, "seed": 5, "response_format": wanted}
    (choice,) = client.chat.completions.create(**ask).choices  # type: ignore[call-overload]
    value = json.loads(choice.message.content)
    assert value["city"] in ("Paris", "Lyon")
    assert choice.finish_reason == "stop"
    chunks = client.chat.completions.create(**ask, stream=True)  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content


def test_parsed_answers(client: OpenAI) -> None:
    """The helper of the client that makes a schema of a class and an object of the answer."""
    pydantic = pytest.importorskip("pydantic")
    trip = pydantic.create_model("Trip", city=(Literal["Paris", "Lyon"], ...), sure=(bool, ...))
    found = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, max_tokens=120, seed=5, response_format=trip
    ).choices[0]
    assert found.message.parsed.city in ("Paris", "Lyon")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools(tooled: Server, choice: Any) -> None:
    with OpenAI(base_url=f"{tooled.url}/v1", api_key="x", http_client=httpx.Client(trust_env=False)) as client:
        ask = {
            "model": "tiny", "messages": MESSAGES, "max_tokens": 150, "seed": 3, "tools": [TOOL], "tool_choice": choice,
            "parallel_tool_calls": False,
        }  # fmt: skip
        (answer,) = client.chat.completions.create(**ask).choices  # type: ignore[call-overload]
        assert answer.finish_reason == "tool_calls"
        (call,) = answer.message.tool_calls
        assert (call.type, call.function.name) == ("function", "weather")
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Lyon")
        name, arguments = "", ""
        for chunk in client.chat.completions.create(**ask, stream=True):  # type: ignore[call-overload]
            for delta in chunk.choices[0].delta.tool_calls or []:
                assert delta.index == 0
                name += delta.function.name or ""
                arguments += delta.function.arguments or ""
        assert (name, arguments) == ("weather", call.function.arguments)
        history = [
            *MESSAGES,
            {"role": "assistant", "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": "Rain."},
        ]
        more = client.chat.completions.create(model="tiny", messages=history, max_tokens=3, tools=[TOOL])  # type: ignore[call-overload]
        assert more.usage.completion_tokens == 3
