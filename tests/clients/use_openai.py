"""OpenAI's own client against a server that has SmolLM2: `python use_openai.py http://127.0.0.1:8000`.

Runs with openai 2 and 3. Every check prints one line; the first that fails ends the script.
"""

import asyncio
import json
import sys
from dataclasses import dataclass
from typing import Any, Literal

import checks
import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


@dataclass(frozen=True)
class Served:
    url: str
    client: OpenAI
    model: str

    def chat(self, **more: Any) -> Any:
        return self.client.chat.completions.create(model=self.model, **{"messages": CAPITAL, **GREEDY, **more})

    def complete(self, **more: Any) -> Any:
        return self.client.completions.create(model=self.model, **{**GREEDY, **more})


def models(served: Served) -> str:
    card = served.client.models.retrieve(served.model)
    assert (card.id, card.object, card.owned_by) == (served.model, "model", "omniserve")
    return card.id


def chat(served: Served) -> str:
    answer = served.chat()
    text = answer.choices[0].message.content
    assert "Paris" in text, text
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answer.id.startswith("chatcmpl-")
    return repr(text)


def chat_stream_and_usage_chunk(served: Served) -> str:
    whole = served.chat()
    *body, last = served.chat(stream=True, stream_options={"include_usage": True})
    assert body[0].choices[0].delta.role == "assistant"
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in body)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in body) == whole.choices[0].message.content
    ends = [chunk.choices[0].finish_reason for chunk in body]
    assert ends == [None] * (len(body) - 1) + [whole.choices[0].finish_reason]
    assert last.choices == []
    counts = last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens
    assert counts == (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens)
    return f"{len(body)} chunks equal the whole answer; usage {counts} in a chunk of its own"


def stream_helper(served: Served) -> str:
    with served.client.chat.completions.stream(model=served.model, messages=CAPITAL, **GREEDY) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
    assert final.choices[0].message.content == served.chat().choices[0].message.content
    return f"events {', '.join(sorted(kinds))}"


def completions(served: Served) -> str:
    ask = {"prompt": "The capital of France is", "echo": True, "logprobs": 2, "max_tokens": 4}
    (whole,) = served.complete(**ask).choices
    assert "Paris" in whole.text
    assert "".join(chunk.choices[0].text for chunk in served.complete(**ask, stream=True)) == whole.text
    found = whole.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    assert found.token_logprobs[0] is None
    assert all(value <= 0 for value in found.token_logprobs[1:])
    return repr(whole.text)


def prompts_of_every_kind(served: Served) -> str:
    water = [12615, 314]
    two = served.complete(prompt=["Water is", "The capital of France is"], max_tokens=4).choices
    assert [choice.index for choice in two] == [0, 1]
    assert "Paris" in two[1].text
    texts = [served.complete(prompt=prompt, max_tokens=4).choices[0].text for prompt in ("Water is", water, [water])]
    assert len(set(texts)) == 1, texts
    return f"a text, ids and a list of lists of ids: {texts[0]!r}; two texts: indices 0 and 1"


def log_probabilities(served: Served) -> str:
    entries = served.chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob == max(top.logprob for top in entry.top_logprobs)
    text = b"".join(bytes(entry.bytes or b"") for entry in entries).decode()
    assert "Paris" in text
    return f"first token {entries[0].token!r} {entries[0].logprob:.4f}, greedy tokens are the likeliest"


def samples_and_seeds(served: Served) -> str:
    """A request that is alone is computed in the same way each time; samples of one request may share their steps."""
    ask = {"seed": 7, "temperature": 1.0, "top_p": 0.95, "max_tokens": 12}
    first, second = (served.chat(**ask).choices[0].message.content for _ in range(2))
    assert first == second
    three = served.chat(**ask, n=3).choices
    assert [choice.index for choice in three] == [0, 1, 2]
    assert len({choice.message.content for choice in three}) > 1
    assert all("Paris" in choice.message.content for choice in served.chat(n=2).choices)
    return f"seed 7, twice: {first!r}; n=3: different texts"


def stop_strings(served: Served) -> str:
    stopped = served.chat(stop=["Paris"]).choices[0]
    assert stopped.finish_reason == "stop"
    assert "Paris" not in stopped.message.content
    assert served.chat().choices[0].message.content.startswith(stopped.message.content)
    length = served.chat(max_tokens=2).choices[0]
    assert length.finish_reason == "length"
    return f"{stopped.message.content!r} before 'Paris'"


def content_as_parts(served: Served) -> str:
    parts = [{"role": "user", "content": [{"type": "text", "text": CAPITAL[0]["content"]}]}]
    assert served.chat(messages=parts).choices[0].message.content == served.chat().choices[0].message.content
    return "the same answer as to a text"


class Capital(BaseModel):
    """Bounded, so that even a small model comes to an end."""

    country: Literal["France", "Germany", "Italy"]
    capital: Literal["Berlin", "Paris", "Rome"]
    sure: bool


def json_schema(served: Served) -> str:
    ask = {"model": served.model, "messages": CAPITAL, "temperature": 0, "max_tokens": 100}
    parsed = served.client.chat.completions.parse(response_format=Capital, **ask).choices[0].message.parsed
    assert isinstance(parsed, Capital)
    with served.client.chat.completions.stream(response_format=Capital, **ask) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_completion().choices[0].message.parsed == parsed
    assert "content.delta" in kinds
    return f"{parsed!r}, whole and as a stream"


def json_object(served: Served) -> str:
    text = served.chat(response_format={"type": "json_object"}, max_tokens=24).choices[0].message.content
    assert text.lstrip().startswith("{"), text
    return repr(text[:40])


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Berlin", "Rome"]},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
FORCED: dict[str, Any] = {"type": "function", "function": {"name": "get_weather"}}


def tools(served: Served) -> str:
    """A small model must be told to call; what it then calls with follows the schema."""
    asked = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]
    ask = {"messages": asked, "tools": [WEATHER], "max_tokens": 100}
    choice = served.chat(**ask, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in WEATHER["function"]["parameters"]["properties"]["city"]["enum"]
    answer = served.chat(
        messages=[*asked, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "21 degrees, sunny"}]
    )
    assert answer.choices[0].message.content
    return f"get_weather({arguments}), then {answer.choices[0].message.content!r}"


def tools_in_a_stream(served: Served) -> str:
    asked = [{"role": "user", "content": "What is the weather in Berlin, in fahrenheit?"}]
    ask = {"messages": asked, "tools": [WEATHER], "tool_choice": FORCED, "max_tokens": 100}
    choice = served.chat(**ask).choices[0]
    (whole,) = choice.message.tool_calls
    chunks = list(served.chat(**ask, stream=True))
    pieces = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or []]
    assert [piece.function.name for piece in pieces if piece.function.name] == ["get_weather"]
    assert len([piece.id for piece in pieces if piece.id]) == 1
    assert {piece.index for piece in pieces} == {0}
    arguments = "".join(piece.function.arguments or "" for piece in pieces)
    assert json.loads(arguments) == json.loads(whole.function.arguments)
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason
    return f"{len(pieces)} pieces of {json.loads(arguments)}"


def typed_exceptions(served: Served) -> str:
    seen = []

    def expect(kind: type[openai.APIStatusError], status: int, name: str, param: str | None, **ask: Any) -> None:
        try:
            served.chat(**ask)
        except kind as error:
            assert (error.status_code, error.type, error.param) == (status, name, param), error
            assert str(error.code) == str(status)
            assert error.request_id
            seen.append(f"{type(error).__name__} {param}")
        else:
            raise AssertionError(f"{ask} was answered")

    expect(openai.BadRequestError, 400, "BadRequestError", "temperature", temperature=3)
    expect(openai.BadRequestError, 400, "BadRequestError", "messages.0.content", messages=[{"role": "user"}])
    expect(openai.NotFoundError, 404, "NotFoundError", "model", extra_body={"model": "other"})
    picture = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/cat.png"}}]
    place = "messages.0.content.0.type"
    expect(
        openai.InternalServerError, 501, "NotImplementedError", place, messages=[{"role": "user", "content": picture}]
    )
    hurried = served.client.with_options(timeout=0.05, max_retries=0)
    try:
        hurried.completions.create(model=served.model, prompt="a", max_tokens=500, extra_body={"ignore_eos": True})
    except openai.APITimeoutError as error:
        seen.append(type(error).__name__)
    assert len(seen) == 5, seen
    return "; ".join(seen)


def raw_response(served: Served) -> str:
    raw = served.client.chat.completions.with_raw_response.create(
        model=served.model, messages=CAPITAL, **GREEDY, extra_headers={"X-Request-Id": "check-1"}
    )  # type: ignore[call-overload]  # dictionaries are fine
    assert raw.headers["x-request-id"] == "check-1"
    assert raw.headers["content-type"] == "application/json"
    assert "Paris" in raw.parse().choices[0].message.content
    return "X-Request-Id comes back"


def concurrent_async(served: Served) -> str:
    """Batches may change the last bits of a 32-bit sum, so texts are not compared but read."""
    cities = {"France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Japan": "Tokyo"}

    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
            create = client.chat.completions.create

            def about(country: str) -> dict[str, Any]:
                question = {"role": "user", "content": f"What is the capital of {country}?"}
                return {"model": served.model, "messages": [question], **GREEDY}

            async def whole(country: str) -> str:
                return str((await create(**about(country))).choices[0].message.content)

            async def streamed(country: str) -> str:
                stream = await create(**about(country), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(call(country) for call in (whole, streamed) for country in cities))

    texts = asyncio.run(ask())
    for text, city in zip(texts, [*cities.values()] * 2, strict=True):
        assert city in text, (city, text)
    return f"{len(texts)} answers, half of them streams, all at once: {texts[1]!r}, ..."


def a_stream_that_is_left(served: Served) -> str:
    stream = served.chat(max_tokens=1000, stream=True, extra_body={"ignore_eos": True})
    seen = [next(iter(stream)) for _ in range(3)]
    stream.close()
    return f"closed after {len(seen)} chunks"


CHECKS = [
    models,
    chat,
    chat_stream_and_usage_chunk,
    stream_helper,
    completions,
    prompts_of_every_kind,
    log_probabilities,
    samples_and_seeds,
    stop_strings,
    content_as_parts,
    json_schema,
    json_object,
    tools,
    tools_in_a_stream,
    typed_exceptions,
    raw_response,
    concurrent_async,
    a_stream_that_is_left,
]


def main(url: str) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        (model,) = client.models.list().data
        print(f"openai {openai.__version__} at a server of {model.id}")
        checks.run(CHECKS, Served(url, client, model.id))


if __name__ == "__main__":
    main(sys.argv[1])
