"""`chat --url`: the conversation of `chat MODEL`, with a server at the other end; servers that misbehave."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from omniserve.base.errors import ConfigError, ServerError
from omniserve.base.types import SamplingParams
from omniserve.remote import Place, RemoteModel, events, lines, request_fields
from tests.cli.commands import Ran, check_refusal
from tests.cli.others import other
from tests.server.harness import Server, program

Run = Callable[..., Ran]
PRECISE = ("--precision", "w16a16kv32", "--dtype", "float32")
KEY = "first-key"


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[Server]:
    """The tiny model, in the arithmetic of PRECISE, behind a key."""
    options = {"precision": "w16a16kv32", "dtype": "float32"}
    server = program(model=str(tiny), options=options, server={"api_key": [KEY, "second-key"]})
    yield server
    server.close()


def test_one_question_is_answered_as_by_the_model_itself(run: Run, tiny: Path, served: Server) -> None:
    flags = ("-q", "Is water wet?", "--max-tokens", "8", "--ignore-eos", "--repetition-penalty", "1.2", "--stats")
    local = run("chat", tiny, *flags, *PRECISE)
    remote = run("chat", "--url", served.url, "--api-key", KEY, *flags)
    assert (local.code, remote.code) == (0, 0), (local, remote)
    assert remote.out == local.out != "\n"
    for ran in (local, remote):
        assert "8 tokens, first after" in ran.err
    told = [ran.err.splitlines()[-1].split(" (")[0] for ran in (local, remote)]
    assert told[0] == told[1]  # prompt tokens
    hot = ("-q", "Is water wet?", "--max-tokens", "12", "--temperature", "1.5", "--ignore-eos")
    url = f"{served.url}/v1/"
    texts = [run("chat", "--url", url, "--api-key", KEY, *hot, "--seed", seed).out for seed in ("5", "5", "6")]
    assert texts[0] == texts[1] != texts[2]


def test_conversation(run: Run, served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """History grows, a line that the server refuses leaves it as it was, /clear forgets it."""
    monkeypatch.setenv("OMNISERVE_API_KEY", KEY)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(["one", "one", "Zq" * 400, "/clear", "one"])))
    ran = run("chat", "--url", served.url, "--max-tokens", "6", "--ignore-eos", "--stats")
    assert ran.code == 0, ran
    counts = [int(line.split()[0]) for line in ran.err.splitlines() if "prompt tokens" in line]
    assert len(counts) == 3
    assert counts[1] > counts[0] == counts[2]
    (error,) = [line for line in ran.err.splitlines() if line.startswith("omniserve: error: ")]
    assert "status 400: " in error
    assert "max_model_len is 256" in error
    assert "/clear starts a new conversation" in error


def test_an_interrupted_answer_is_dropped_by_the_server(
    run: Run, served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    stream_chat = RemoteModel.stream_chat
    asked: list[int] = []

    def interrupted(self: RemoteModel, messages: Any, params: Any) -> Any:
        asked.append(len(messages))
        for place, chunk in enumerate(stream_chat(self, messages, params)):
            if len(asked) == 1 and place == 3:
                signal.raise_signal(signal.SIGINT)
            yield chunk

    monkeypatch.setattr(RemoteModel, "stream_chat", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    flags = ("--max-tokens", "150", "--ignore-eos", "--stats", "--api-key", KEY)
    before = served.http.get("/metrics", headers={"authorization": f"Bearer {KEY}"}).text
    ran = run("chat", "--url", served.url, *flags)
    assert ran.code == 0, ran
    assert asked == [1, 3]
    stats = [line for line in ran.err.splitlines() if "first after" in line]
    assert not stats[0].startswith("150 tokens")
    assert "150 tokens," in stats[1]
    ended = 'request_success_total{finished_reason="abort"'
    after = served.http.get("/metrics", headers={"authorization": f"Bearer {KEY}"}).text
    assert _count(after, ended) == _count(before, ended) + 1


def _count(text: str, start: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if start in line)


def test_where_the_key_comes_from(run: Run, served: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("chat", "--url", served.url, "-q", "a", "--max-tokens", "1")
    check_refusal(run(*flags), "status 401")
    check_refusal(run(*flags, "--api-key", "wrong"), "status 401")
    (tmp_path / "c.yaml").write_text(f"api-key: [{KEY}, other]\nport: 9\nprecision: w8a8\n")
    assert run(*flags, "--config", "c.yaml").code == 0
    monkeypatch.setenv("OMNISERVE_API_KEY", "wrong")
    check_refusal(run(*flags, "--config", "c.yaml"), "status 401")
    assert run(*flags, "--config", "c.yaml", "--api-key", KEY).code == 0
    for ran in (run(*flags), run(*flags, "--api-key", "a-wrong-key")):
        assert "wrong-key" not in ran.err


def test_which_model(run: Run, served: Server) -> None:
    flags = ("chat", "--url", served.url, "--api-key", KEY, "-q", "a", "--max-tokens", "1", "--served-model-name")
    assert run(*flags, "tiny").code == 0
    check_refusal(run(*flags, "big"), "no model 'big'", "tiny")


def test_no_server(run: Run) -> None:
    check_refusal(
        run("chat", "--url", "http://127.0.0.1:1", "-q", "a"),
        "http://127.0.0.1:1/v1",
        "refused",
        "omniserve serve MODEL",
    )


# Servers that misbehave


TEXT = "a\u2028b\x85c\x0bd\n"
GOOD = (
    b': ping\n\ndata: {"choices": [{"delta": {"role": "assistant", "content": null}}]}\n\n'
    + f"data: {json.dumps({'choices': [{'delta': {'content': TEXT}}]}, ensure_ascii=False)}\r\n\r\n".encode()
    + b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: {"choices": [], "usage": null}\n\n'
)


def test_another_server(run: Run) -> None:
    """A server that knows OpenAI's fields alone and counts nothing: what is not needed is not sent."""
    with other(GOOD + b"data: [DONE]\n\n") as (url, kind):
        ran = run("chat", "--url", f"{url}/v1", "-q", "hi", "--stats", "--system", "Be brief.")
    assert (ran.code, ran.out) == (0, TEXT + "\n")
    assert ran.err.startswith("first after ")
    (body,) = kind.asked
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert set(body) == {"model", "messages", "stream", "stream_options", "temperature", "top_p"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (GOOD, "closed the stream before its end"),
        (b"data: {\n\n", "no JSON object"),
        (b"data: [1]\n\n", "no JSON object"),
        (b'data: {"choices": 3}\n\n', "no chunk of a chat"),
        (b'data: {"choices": [{"delta": {"content": 3}}]}\n\n', "no chunk of a chat"),
        (b'data: {"error": {"message": "the step has failed", "code": 500}}\n\n', "the step has failed"),
        (b"<html>", "closed the stream before its end"),
    ],
)
def test_streams_that_are_none(run: Run, body: bytes, words: str) -> None:
    with other(body) as (url, _):
        ran = run("chat", "--url", url, "-q", "hi")
    assert ran.code == 2
    assert ran.err.strip().splitlines()[-1].startswith("omniserve: error: ")
    assert words in ran.err


@pytest.mark.parametrize("models", [b"<html>", b"{}", b'{"data": [{}]}', b"[]"])
def test_models_that_are_none(run: Run, models: bytes) -> None:
    with other(models=models) as (url, _):
        check_refusal(run("chat", "--url", url, "-q", "hi"), "is this OpenAI's API?")


def test_places() -> None:
    assert (
        Place.at("http://h:1").base
        == Place.at("http://h:1/").base
        == Place.at("http://h:1/v1/").base
        == "http://h:1/v1"
    )
    assert Place.at("https://h/api/v1").root == "https://h/api"
    assert Place.at("https://h/openai").base == "https://h/openai"
    assert [Place.at(f"http://{host}").proxied for host in ("127.0.0.1", "[::1]", "localhost", "h", "10.0.0.1")] == [
        False, False, False, True, True,
    ]  # fmt: skip
    for url in ("ftp://h", "http://u:p@h", "http://h?a=b", "h", ""):
        with pytest.raises(ConfigError, match="url="):
            Place.at(url)


def test_lines_in_any_pieces() -> None:
    data = GOOD + b"data: [DONE]"
    whole = list(events(data.split(b"\n")))
    assert len(whole) == 4
    for size in (1, 7, 1000):
        pieces = [data[place : place + size] for place in range(0, len(data), size)]
        assert [json.dumps(one) for one in events(lines(pieces))] == [
            json.dumps(one) for one in events(data.split(b"\n"))
        ]
    with pytest.raises(ServerError, match="before its end"):
        list(events(lines([b"data: {}\n\n"])))


def test_fields_of_a_request() -> None:
    params = SamplingParams(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, max_tokens=3, stop=("x",), seed=4, presence_penalty=1.0
    )
    assert request_fields(params) == {
        "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.5, "top_p": 0.9, "top_k": 7,
        "min_p": 0.1, "max_completion_tokens": 3, "stop": ["x"], "seed": 4, "presence_penalty": 1.0,
    }  # fmt: skip
