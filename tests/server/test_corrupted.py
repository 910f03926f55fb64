"""A request that the model has no numbers for fails alone; who is urgent is served first."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers

from omniserve import LLM, SamplingParams
from tests.server.engines import poison
from tests.server.harness import Server, check_error, eventually, program, serving


@pytest.fixture(scope="module")
def letter(tiny: Path) -> int:
    """The token that is poisoned: the letter Z."""
    return int(tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json")).token_to_id("Z"))


@pytest.fixture(scope="module")
def server(tiny: Path, letter: int) -> Iterator[Server]:
    made = program(model=str(tiny), engine=f"poison {letter}", options={"precision": "w8a8kv8"})
    yield made
    made.close()


GOOD = {"prompt": "Is water wet?", "max_tokens": 40, "temperature": 0, "ignore_eos": True}


def test_nan_logits_are_contained(server: Server, served: Server) -> None:
    before = server.metric("corrupted_requests_total")
    expected = served.complete(**GOOD)["choices"]
    found: dict[str, object] = {}

    def ask(name: str) -> None:
        found[name] = server.complete(**GOOD)["choices"]

    peers = [threading.Thread(target=ask, args=(str(number),)) for number in range(3)]
    for peer in peers:
        peer.start()
    check_error(
        server.post("/v1/completions", {"prompt": "a Z", "max_tokens": 4}),
        500,
        "InternalServerError",
        "not finite numbers",
        param=None,
    )
    events = server.stream("/v1/completions", {"prompt": "Z", "max_tokens": 4})
    assert [event["error"]["code"] for event in events] == [500]
    chat = {"messages": [{"role": "user", "content": "Zzz"}], "max_tokens": 4}
    check_error(server.post("/v1/chat/completions", chat), 500, "InternalServerError", param=None)
    scored = {"prompt": "a Z a", "max_tokens": 1, "echo": True, "logprobs": 1}
    check_error(server.post("/v1/completions", scored), 500, "InternalServerError", param=None)
    for peer in peers:
        peer.join()
    assert list(found.values()) == [expected] * 3
    assert server.metric("corrupted_requests_total") == before + 4
    assert server.metric("request_success_total", finished_reason="error") == 4
    eventually(server.idle)
    assert server.complete(**GOOD)["choices"] == expected
    assert server.http.get("/health").status_code == 200


def test_nan_logits_offline(tiny: Path, letter: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    with LLM(tiny, precision="w8a8kv8") as llm:
        poison(llm._engine, letter)
        good, bad, also = llm.generate(["Is water wet?", "Z", "yes"], params)
        (output,) = bad.outputs
        assert (output.finish_reason, output.token_ids) == ("error", ())
        assert output.error is not None
        assert "not finite" in output.error
        for fine in (good, also):
            assert (fine.outputs[0].finish_reason, fine.outputs[0].error) == ("length", None)
            assert len(fine.outputs[0].token_ids) == 5
        (last,) = llm.stream("Z", params)
        assert (last.finish_reason, last.error) == ("error", output.error)


def test_priorities(tiny: Path) -> None:
    options = {"scheduling_policy": "priority", "max_num_seqs": 1}
    with serving(model=str(tiny), engine="float64", options={"precision": "w8a8kv8", **options}) as server:
        order: list[str] = []
        texts: dict[str, str] = {}

        def ask(name: str, priority: int) -> None:
            body = {"prompt": f"{name}: Is water wet?", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
            with server.http.stream("POST", "/v1/completions", json={**body, "priority": priority}) as answer:
                texts[name] = answer.read().decode()
            order.append(name)

        threads = []
        for name, priority in (("first", 0), ("late", 9), ("usual", 0), ("urgent", -5)):
            open_before = server.stats()["open_sequences"]
            threads.append(threading.Thread(target=ask, args=(name, priority)))
            threads[-1].start()
            eventually(lambda before=open_before: server.stats()["open_sequences"] > before or bool(order))  # type: ignore[misc]
        assert not order, "the first one ended before the others came: make it longer"
        for thread in threads:
            thread.join()
        assert order == ["first", "urgent", "usual", "late"]
        body = {"prompt": "late: Is water wet?", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
        assert server.complete(**body)["choices"][0]["text"] == texts_of(texts["late"])
        assert server.complete(**body, priority=-(2**31))["choices"][0]["finish_reason"] == "length"


def texts_of(answer: str) -> str:
    return str(json.loads(answer)["choices"][0]["text"])


def test_priorities_have_their_policy_and_their_bounds(served: Server) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    assert served.complete(**body, priority=0)["choices"]
    refused = served.post("/v1/completions", {**body, "priority": 1})
    check_error(refused, 400, "BadRequestError", "--scheduling-policy", param="priority")
    for value in (2**31, -(2**31) - 1, 0.5, "1"):
        refused = served.post("/v1/completions", {**body, "priority": value})
        check_error(refused, 400, "BadRequestError", param="priority")
