"""LangChain's OpenAI chat model against a server that has SmolLM2: `python use_langchain.py http://127.0.0.1:8000`."""

import asyncio
import sys
from importlib.metadata import version
from typing import Any, Literal

import checks
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import BaseModel

QUESTION = "What is the capital of France?"


def invoke(model: ChatOpenAI) -> str:
    answer = model.invoke(QUESTION)
    assert isinstance(answer, AIMessage)
    assert "Paris" in answer.content
    assert answer.response_metadata["finish_reason"] == "stop"
    usage = answer.usage_metadata
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]
    return repr(answer.content)


def messages(model: ChatOpenAI) -> str:
    asked: list[Any] = [
        SystemMessage("You answer in one short sentence."),
        HumanMessage("What is the capital of Italy?"),
        AIMessage("The capital of Italy is Rome."),
        HumanMessage(QUESTION),
    ]
    text = model.invoke(asked).content
    assert "Paris" in text
    return repr(text)


def stream(model: ChatOpenAI) -> str:
    chunks = list(model.stream(QUESTION, stream_usage=True))
    whole = model.invoke(QUESTION)
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.content == whole.content
    assert total.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]
    return f"{len(chunks)} chunks and their usage add up to the answer of invoke"


def asynchronous(model: ChatOpenAI) -> str:
    cities = {"France": "Paris", "Germany": "Berlin"}

    async def ask() -> list[Any]:
        return await asyncio.gather(*(model.ainvoke(f"What is the capital of {country}?") for country in cities))

    for answer, city in zip(asyncio.run(ask()), cities.values(), strict=True):
        assert city in answer.content, answer.content
    return f"{len(cities)} at once"


def chain(model: ChatOpenAI) -> str:
    answers = (ChatPromptTemplate.from_template("What is the capital of {country}?") | model).batch(
        [{"country": "France"}, {"country": "Japan"}]
    )
    assert "Paris" in answers[0].content
    assert "Tokyo" in answers[1].content
    return "a prompt template piped into the model, as a batch"


def log_probabilities(model: ChatOpenAI) -> str:
    answer = model.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    entries = answer.response_metadata["logprobs"]["content"]
    assert len(entries) == answer.usage_metadata["output_tokens"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    return f"{len(entries)} entries"


def stop(model: ChatOpenAI) -> str:
    text = model.invoke(QUESTION, stop=["Paris"]).content
    assert "Paris" not in text
    return repr(text)


class Capital(BaseModel):
    """The capital of a country."""

    country: Literal["France", "Germany", "Italy"]
    capital: Literal["Berlin", "Paris", "Rome"]


def structured_output(model: ChatOpenAI) -> str:
    answers = [
        model.with_structured_output(Capital, method=method).invoke(QUESTION)
        for method in ("json_schema", "function_calling")
    ]
    assert all(isinstance(answer, Capital) for answer in answers), answers
    return f"{answers[0]!r} as JSON, {answers[1]!r} as a call"


@tool
def weather(city: Literal["Paris", "Berlin"]) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


def tools(model: ChatOpenAI) -> str:
    """Strict: no other arguments than those of the function, which a small model would go on to invent."""
    question = HumanMessage("What is the weather in Paris?")
    answer = model.bind_tools([weather], strict=True, tool_choice="any", parallel_tool_calls=False).invoke([question])
    (call,) = answer.tool_calls
    assert call["name"] == "weather"
    result = weather.invoke(call)
    final = model.bind_tools([weather], strict=True, tool_choice="none").invoke([question, answer, result])
    assert isinstance(final.content, str)
    return f"weather({call['args']}) says {result.content!r}; then {final.content[:40]!r}..."


def tools_in_a_stream(model: ChatOpenAI) -> str:
    chunks = list(
        model.bind_tools([weather], strict=True, tool_choice="weather").stream("What is the weather in Berlin?")
    )
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    (call,) = total.tool_calls
    assert call["name"] == "weather"
    return f"{len(chunks)} chunks: weather({call['args']})"


CHECKS = [
    invoke,
    messages,
    stream,
    asynchronous,
    chain,
    log_probabilities,
    stop,
    structured_output,
    tools,
    tools_in_a_stream,
]


def main(url: str) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        name = client.models.list().data[0].id
    model = ChatOpenAI(
        base_url=f"{url}/v1", api_key="x", model=name, max_completion_tokens=96, temperature=0, max_retries=0
    )  # type: ignore[arg-type]  # a text is fine
    print(f"langchain-openai {version('langchain-openai')} at a server of {name}")
    checks.run(CHECKS, model)


if __name__ == "__main__":
    main(sys.argv[1])
