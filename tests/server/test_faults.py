"""A fault anywhere: the right requests fail with the right status, the rest finish, the pool is whole."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.engines import PLAN, QUEUE, STEP
from tests.server.harness import Server, answer_of, check_error, events, eventually, request_bytes, serving

TOKENS = 150
BODY = {"prompt": [1, 2, 3], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
LETTERS = "".join(chr(ord("A") + place % 26) for place in range(3, 3 + TOKENS))
"""What the null model answers to three tokens."""

Ask = Callable[[Server, bool], httpx.Response]


@pytest.fixture(scope="module")
def faulty() -> Iterator[Server]:
    """No model; three slots, a step of 5 ms while the last one is taken in."""
    options = {"max_num_seqs": 3, "async_scheduling": True}
    with serving(null=0.005, engine="marked", faults=True, options=options) as server:
        yield server
        assert server.stop() == 0


def ask(**more: Any) -> Ask:
    def send(server: Server, stream: bool) -> httpx.Response:
        return server.post("/v1/completions", {**BODY, "stream": stream, **more})

    return send


REFUSED: dict[str, Ask] = {
    "tokenizer": ask(prompt="RAISE"),
    "tokenizer panics": ask(prompt="PANIC"),
    "long text in a thread panics": ask(prompt="PANIC" + "." * 5000),
}
FAILED: dict[str, Ask] = {
    "detokenizer": ask(skip_special_tokens=False),
    "one of three prompts at the detokenizer": ask(prompt=[[1], [2], [3]], skip_special_tokens=False),
    "queue": ask(prompt=[QUEUE, 2]),
    "one of two prompts at the queue": ask(prompt=[[1], [QUEUE, 2]]),
    "plan": ask(prompt=[PLAN, 2]),
    "plan of a long prompt": ask(prompt=[PLAN] * 3000),
    "one of two prompts at the plan": ask(prompt=[[1], [PLAN, 2]]),
}


class Healthy:
    """Five requests beside those that fail, some running and some waiting, whole and streamed."""

    def __init__(self, server: Server, pool: ThreadPoolExecutor) -> None:
        self.server = server
        eventually(server.idle)
        self.errors = server.metric("request_success_total", finished_reason="error")
        self.texts = [pool.submit(self.text, bool(number % 2)) for number in range(5)]
        eventually(lambda: server.stats()["running"] == 3 or any(text.done() for text in self.texts))

    def text(self, stream: bool) -> str:
        if stream:
            return "".join(event["choices"][0]["text"] for event in self.server.stream("/v1/completions", BODY))
        return str(self.server.complete(**BODY)["choices"][0]["text"])

    def check(self, failed: int) -> None:
        """All of them have finished; so many sequences have failed; nothing is left of any."""
        assert [text.result() for text in self.texts] == [LETTERS] * 5
        eventually(self.server.idle)
        assert self.server.metric("request_success_total", finished_reason="error") == self.errors + failed
        assert self.server.http.get("/health").status_code == 200


def check_failure(answer: httpx.Response) -> None:
    """A 500, or in a stream that has begun its like."""
    if answer.status_code == 200:
        found = events(iter(answer.text.splitlines()))
        assert (found[-1]["error"]["type"], found[-1]["error"]["code"]) == ("InternalServerError", 500)
    else:
        check_error(answer, 500, "InternalServerError")
    assert "secret" not in answer.text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("fault", [*REFUSED, *FAILED])
def test_a_fault_costs_its_request(faulty: Server, fault: str, stream: bool) -> None:
    with ThreadPoolExecutor(5) as pool:
        healthy = Healthy(faulty, pool)
        answer = (REFUSED | FAILED)[fault](faulty, stream)
        check_failure(answer)
        assert answer.status_code == (200 if stream and fault in FAILED else 500)
        healthy.check({"one of two": 2, "one of three": 3}.get(fault.split(" prompts")[0], fault in FAILED))
    assert re.search("ERROR .*(request failed|answer failed|not queued|step failed).*traceback=", faulty.log)


def test_a_step_costs_the_requests_in_flight(faulty: Server) -> None:
    """Two that run fail with the one that is to blame; those that wait finish."""
    eventually(faulty.idle)
    before = faulty.metric("request_success_total", finished_reason="error")
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(ask(max_tokens=8000), faulty, stream) for stream in (False, True)]
        eventually(lambda: faulty.stats()["running"] == 2)
        filling = pool.submit(ask(max_tokens=1000), faulty, False)
        eventually(lambda: faulty.stats()["running"] == 3)
        blamed = pool.submit(ask(prompt=[STEP, 2]), faulty, True)
        eventually(lambda: faulty.stats()["waiting"] == 1)
        waiting = [pool.submit(faulty.complete, **BODY) for _ in range(3)]
        for one in (*running, blamed):
            check_failure(one.result())
        assert filling.result().status_code == 200
        for one in waiting:
            assert one.result()["choices"][0]["text"] == LETTERS
    eventually(faulty.idle)
    assert faulty.metric("request_success_total", finished_reason="error") == before + 3


def test_a_socket_that_fails_costs_its_request(faulty: Server) -> None:
    """A write that fails: the connection is cut, its request is dropped within its time."""
    before = faulty.metric("request_success_total", finished_reason="abort")
    with ThreadPoolExecutor(5) as pool:
        healthy = Healthy(faulty, pool)
        request = request_bytes("/v1/completions", {**BODY, "max_tokens": 7000, "stream": True}, "X-Fault: write")
        answer = answer_of(faulty.raw(request))
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"[DONE]" not in answer
        healthy.check(0)
    assert faulty.metric("request_success_total", finished_reason="abort") == before + 1
