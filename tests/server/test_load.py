"""Many requests at once: what clients get, what is freed, who is hurt (rows 13, 17, 22, 26 of docs/security.md)."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import ROOT, environment
from tests.server.harness import (
    Server,
    answer_of,
    check_error,
    events,
    eventually,
    request_bytes,
    serving,
    until_quiet,
)
from tests.server.load import run

LETTERS = {"prompt": [1, 2, 3], "temperature": 0, "ignore_eos": True}


def test_streams_of_old_clients_come_without_chunks(null: Server) -> None:
    """HTTP/1.0 knows none: its events are the same, one after another, until the connection is closed."""
    request = request_bytes("/v1/completions", {**LETTERS, "max_tokens": 50, "stream": True})
    old = answer_of(null.raw(request.replace(b"HTTP/1.1", b"HTTP/1.0")))
    head, _, body = old.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert body.startswith(b"data: ")
    assert body.endswith(b"data: [DONE]\n\n")
    texts = [event["choices"][0]["text"] for event in events(iter(body.decode().splitlines()))]
    new = [event["choices"][0]["text"] for event in null.stream("/v1/completions", {**LETTERS, "max_tokens": 50})]
    assert "".join(texts) == "".join(new)
    assert len("".join(new)) == 50


# Row 26


def load(server: Server, streams: int, tokens: int) -> dict[str, Any]:
    """Run tests.server.load against a server; no answer may fail."""
    found = run(environment(), ROOT, port=server.port, streams=streams, tokens=tokens)
    assert (found["finished"], found["failed"]) == (streams, 0), found
    return found


@pytest.fixture(scope="module")
def wide() -> Iterator[Server]:
    """No model, 256 streams, 14,000 tokens/s."""
    options = {"max_num_seqs": 256, "async_scheduling": True, "max_num_batched_tokens": 8192}
    with serving(null=256 / 14_000, options=options, log="warning") as server:
        yield server


def best(measure: Callable[[], float], enough: Callable[[float], bool], tries: int = 10) -> float:
    """The first of some measurements that is good enough, or the last: the machine may be busy for a while."""
    for left in range(tries, 0, -1):
        found = measure()
        if enough(found) or left == 1:
            break
        until_quiet(30)
    return found


def test_256_streams_get_everything(wide: Server) -> None:
    """Row 26, without its clock: no letter is lost, and 14,000 in a second are well within what a core can do."""

    def share() -> float:
        produced, before = wide.metric("generation_tokens_total"), wide.processor_seconds()
        load(wide, 256, 60)
        assert wide.metric("generation_tokens_total") - produced == 256 * 60
        return (wide.processor_seconds() - before) / (256 * 60) * 14_000

    # On a busy machine a core does less in a second: 0.82 was seen beside two other processes on two cores.
    assert best(share, lambda found: found < 0.8, tries=4) < 0.8
    eventually(wide.idle)


@pytest.mark.long
def test_the_server_keeps_up_with_the_engine(wide: Server) -> None:
    """Row 26: 0.9 of 14,000 tokens/s over 256 streams."""
    rate = best(lambda: load(wide, 256, 150)["tokens_per_second"], lambda rate: rate >= 0.9 * 14_000)
    assert rate >= 0.9 * 14_000


@pytest.mark.long
@pytest.mark.parametrize("streams", [1, 8])
def test_a_step_is_not_much_longer_for_the_client(null: Server, streams: int) -> None:
    """Row 26: a step of 4 ms gets less than 1 ms longer at the median."""
    assert best(lambda: load(null, streams, 300)["median_gap"], lambda gap: gap < 0.005) < 0.005


# Row 22


@pytest.fixture
def unread(null: Server) -> Iterator[list[socket.socket]]:
    """Connections on which long answers come that nobody reads."""
    body = {**LETTERS, "max_tokens": 1300, "stream": True, "stream_options": {"continuous_usage_stats": True}}
    request = request_bytes("/v1/completions", body, "Connection: close")
    slow = [null.raw(request, receive=2048) for _ in range(16)]
    for sock in slow:
        assert sock.recv(1) == b"H"
    yield slow
    for sock in slow:
        sock.close()
    eventually(null.idle)


def test_slow_readers_hurt_only_themselves(null: Server, unread: list[socket.socket]) -> None:
    """Row 22: others go on, the engine does not wait, and what is kept for the slow ones is bounded."""
    before = null.memory()
    load(null, 4, 150)
    eventually(lambda: null.stats()["running"] == 0)  # produced to the end, although nobody reads
    assert null.stats()["open_sequences"] == 0
    assert null.memory() - before < 32 << 20
    answer = answer_of(unread[0]).decode()  # the patient one gets everything
    texts = [event["choices"][0]["text"] for event in events(iter(("H" + answer).splitlines()))]
    assert len("".join(texts)) == 1300
    assert max(map(len, texts)) > 1  # what found no place was joined


@pytest.mark.long
def test_slow_readers_slow_nobody_down(null: Server, request: pytest.FixtureRequest) -> None:
    """Row 22, as a measurement."""
    calm = best(lambda: load(null, 4, 150)["median_gap"], lambda gap: gap < 0.006)
    request.getfixturevalue("unread")
    assert best(lambda: load(null, 4, 150)["median_gap"], lambda gap: gap < 2 * calm, 3) < 2 * calm


# Rows 13 and 17, and what an answer does not depend on


def greedy(server: Server, prompts: list[list[int]], tokens: int) -> list[str]:
    """Answers to prompts that are sent all at once."""

    def ask(ids: list[int]) -> str:
        answer = server.complete(ids, max_tokens=tokens, temperature=0, ignore_eos=True)
        return str(answer["choices"][0]["text"])

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, prompts))


def test_too_few_pages_slow_down_but_change_nothing(served: Server, tiny: Path) -> None:
    """Row 13: 32 pages, 64 long requests: all finish, as in an engine that has room."""
    prompts = [[30 + (n * 7 + k * (n % 5 + 1)) % 60 for k in range(60 + n)] for n in range(64)]
    token_bytes = served.stats()["kv_bytes_per_token"]
    options = {"precision": "w8a8kv8", "max_num_seqs": 32, "kv_cache_memory_bytes": 32 * 64 * token_bytes}
    with serving(model=str(tiny), engine="float64", options=options) as small:
        assert small.stats()["kv_pages"]["retrieval"]["total"] == 32
        answers = greedy(small, prompts, 40)
        assert small.metric("num_preemptions_total") > 0
        eventually(small.idle)
    assert answers == greedy(served, prompts, 40)


def test_batches_change_nothing(served: Server) -> None:
    """Row 17: alone, among 8, among 32."""
    prompts = [[40 + n, 50, 60 + n, 70] for n in range(32)]
    alone = [greedy(served, [prompt], 16)[0] for prompt in prompts[:4]]
    assert greedy(served, prompts[:8], 16)[:4] == alone
    assert greedy(served, prompts, 16)[:4] == alone
    assert len(set(alone)) == 4


def test_the_server_says_what_the_offline_engine_says(served: Server, tiny: Path) -> None:
    """Done 5 of the issue, in float64, token for token: whole and streamed, many at once, greedy and drawn."""
    from omniserve.base.config import Options
    from omniserve.base.types import Request, SamplingParams
    from omniserve.engine.build import build
    from omniserve.text import Tokenizer

    prompts = [f"The quick brown fox number {n} jumps" for n in range(12)]
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0} if n % 2 else {"temperature": 1.0, "top_p": 0.9, "seed": n} for n in range(12)
    ]
    built = build(tiny, Options(precision="w8a8kv8"), dtype="float64")
    tokenizer = Tokenizer.load(tiny)
    requests = []
    for number, (prompt, setting) in enumerate(zip(prompts, settings, strict=True)):
        ids = tokenizer.encode(prompt)
        params = SamplingParams(**setting, max_tokens=24)
        request = Request(
            id=str(number), tokens=ids, prompt=len(ids), sampling=params, stop_ids=tokenizer.eos_ids, limit=24
        )
        built.engine.add(request)
        requests.append(request)
    built.engine.drain()
    expected = [
        tokenizer.decode([token for token in request.tokens[request.prompt :] if token not in request.stop_ids])
        for request in requests
    ]

    def whole(number: int) -> str:
        return str(served.complete(prompts[number], max_tokens=24, **settings[number])["choices"][0]["text"])

    def streamed(number: int) -> str:
        body = {"prompt": prompts[number], "max_tokens": 24, **settings[number]}
        return "".join(event["choices"][0]["text"] for event in served.stream("/v1/completions", body))

    with ThreadPoolExecutor(24) as pool:
        wholes, streams = pool.map(whole, range(12)), pool.map(streamed, range(12))
        assert list(wholes) == expected
        assert list(streams) == expected


# Admission


def test_a_full_queue_turns_away() -> None:
    with serving(null=0.02, server={"max_num_queued_reqs": 4, "max_num_queued_tokens": 1000}) as server:
        sockets = [server.raw(request_bytes("/v1/completions", {**LETTERS, "max_tokens": 5000})) for _ in range(3)]
        eventually(lambda: server.stats()["open_sequences"] == 3)
        full = server.post("/v1/completions", {**LETTERS, "n": 2})
        check_error(full, 503, "ServiceUnavailableError", "3 sequences", "at most 4")
        assert 1 <= int(full.headers["retry-after"]) <= 30
        check_error(server.post("/v1/completions", {**LETTERS, "n": 5}), 400, "BadRequestError", "5", "4", param="n")
        assert server.complete([1], max_tokens=1)["usage"]["total_tokens"] == 2
        assert server.metric("admission_rejections_total", reason="reqs") == 1
        for sock in sockets:
            sock.close()
        eventually(server.idle)


def test_keys_have_a_rate() -> None:
    with serving(null=0.001, server={"api_key": ["a", "b"], "limits": {"key_requests_per_minute": 5}}) as server:
        for key in ("a", "b"):
            server.http.headers["authorization"] = f"Bearer {key}"
            answers = [server.post("/v1/completions", {**LETTERS, "max_tokens": 1}) for _ in range(6)]
            assert [answer.status_code for answer in answers] == [200] * 5 + [429]
            check_error(answers[-1], 429, "RateLimitError", "5 requests")
            assert 1 <= int(answers[-1].headers["retry-after"]) <= 30
            assert server.http.get("/v1/models").status_code == 200


def test_keys_share_no_prefixes() -> None:
    """Row 11."""
    with serving(null=0.001, server={"api_key": ["a", "b"]}) as server:
        found = []
        for key in ("a", "b", "a", "b"):
            server.http.headers["authorization"] = f"Bearer {key}"
            usage = server.complete([7] * 140, max_tokens=1)["usage"]
            found.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert found == [0, 0, 128, 128]


def test_no_token_in_time() -> None:
    """504, and meanwhile a stream is told that somebody is there."""
    with serving(null=0.001, engine="hang 3", server={"limits": {"request_timeout": 4, "ping": 0.5}}) as server:
        body = {**LETTERS, "max_tokens": 3}
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(server.post, "/v1/completions", body)
            streamed = pool.submit(server.post, "/v1/completions", {**body, "stream": True})
            check_error(whole.result(), 504, "TimeoutError", "4 s")
            lines = streamed.result().text.splitlines()
            assert lines[0] == ": ping"
            assert events(iter(lines))[-1]["error"]["code"] == 504
