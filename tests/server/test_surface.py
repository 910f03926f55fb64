"""The endpoints and their answers (serving.md section 1), on the tiny model."""

import re
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from omniserve.server.metrics import Tally
from tests.server.harness import Server, check_error, events

FOX = "The quick brown fox jumps over"
GREEDY = {"temperature": 0, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "Is water wet?"}], **GREEDY}


def test_models(served: Server) -> None:
    cards = served.http.get("/v1/models").json()
    (card,) = cards["data"]
    assert cards["object"] == "list"
    assert card | {"created": 0} == {
        "id": "tiny",
        "object": "model",
        "created": 0,
        "owned_by": "omniserve",
        "root": "tiny",
        "max_model_len": 256,
    }
    assert served.http.get("/v1/models/tiny").json() == card
    check_error(served.http.get("/v1/models/../../etc/passwd"), 404, "NotFoundError")
    check_error(served.http.get("/v1/models/%2e%2e%2fetc%2fpasswd"), 404, "NotFoundError", "tiny", param="model")


def test_small_routes(served: Server) -> None:
    from omniserve import __version__

    health = served.http.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    assert served.http.get("/ready").status_code == 200
    assert served.http.get("/version").json() == {"version": __version__}
    page = served.http.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    docs = served.http.get("/docs").text
    for path in ("/v1/chat/completions", "/metrics", "/engine/stats"):
        assert path in docs
    assert "http" not in re.sub(r"openapi.json|httpx?://localhost", "", docs).replace("HTTP", "")
    paths = served.http.get("/openapi.json").json()["paths"]
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"} < set(paths)


def test_tokenize(served: Server) -> None:
    made = served.post("/tokenize", {"prompt": FOX}).json()
    assert made["count"] == len(made["tokens"]) > 0
    assert made["max_model_len"] == 256
    assert served.post("/detokenize", {"tokens": made["tokens"]}).json() == {"prompt": FOX}
    chat = served.post("/tokenize", {"messages": CHAT["messages"]}).json()
    text = served.post("/detokenize", {"tokens": chat["tokens"]}).json()["prompt"]
    assert text == "<|user|>Is water wet?\n<|assistant|>"
    bare = served.post("/tokenize", {"messages": CHAT["messages"], "add_generation_prompt": False}).json()
    assert bare["count"] < chat["count"]
    check_error(served.post("/tokenize", {}), 400, "BadRequestError", "prompt or messages")
    check_error(served.post("/detokenize", {"tokens": [10**6]}), 400, "BadRequestError", "1000000")


def test_completion(served: Server) -> None:
    answer = served.complete(FOX, max_tokens=7, user="me", cache_salt="s", unknown_field=1, **GREEDY)
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", answer["id"])
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["completion_tokens"] == 7
    assert usage["total_tokens"] == 7 + usage["prompt_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert served.complete(FOX, **GREEDY)["usage"]["completion_tokens"] == 16


def test_many_prompts_and_samples(served: Server) -> None:
    ids = served.post("/tokenize", {"prompt": FOX}).json()["tokens"]
    alone = served.complete(FOX, max_tokens=6, **GREEDY)["choices"][0]["text"]
    for prompt in ([FOX, "water"], [ids, [5, 6, 7]]):
        answer = served.complete(prompt, max_tokens=6, n=2, **GREEDY)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        texts = [choice["text"] for choice in answer["choices"]]
        assert texts[:2] == [alone, alone]
        assert texts[2] == texts[3] != alone
        assert answer["usage"]["completion_tokens"] == 24
    assert served.complete(ids, max_tokens=6, **GREEDY)["choices"][0]["text"] == alone
    drawn = served.complete(FOX, max_tokens=12, n=3, seed=-5, temperature=1.5, ignore_eos=True)
    again = served.complete(FOX, max_tokens=12, n=3, seed=-5, temperature=1.5, ignore_eos=True)
    texts = [choice["text"] for choice in drawn["choices"]]
    assert texts == [choice["text"] for choice in again["choices"]]
    assert len(set(texts)) == 3


def test_stop(served: Server) -> None:
    text = served.complete(FOX, max_tokens=24, **GREEDY)["choices"][0]["text"]
    stop = text[8:10]
    first = text.index(stop)
    cut = served.complete(FOX, max_tokens=24, stop=[stop, "\x07"], **GREEDY)
    assert cut["choices"][0] == {"index": 0, "text": text[:first], "logprobs": None, "finish_reason": "stop"}
    kept = served.complete(FOX, max_tokens=24, stop=stop, include_stop_str_in_output=True, **GREEDY)
    assert kept["choices"][0]["text"] == text[: first + len(stop)]
    streamed = served.stream("/v1/completions", {"prompt": FOX, "max_tokens": 24, "stop": stop, **GREEDY})
    assert "".join(event["choices"][0]["text"] for event in streamed) == text[:first]
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("more", [{}, {"logprobs": 3, "echo": True}, {"echo": True}, {"n": 2}, {"logprobs": 0}])
def test_streamed_completion_equals_the_whole_one(served: Server, more: dict[str, Any]) -> None:
    body = {"prompt": [FOX, "dog"], "max_tokens": 9, **GREEDY, **more}
    whole = served.post("/v1/completions", body).json()
    chunks = served.stream("/v1/completions", {**body, "stream_options": {"include_usage": True}})
    *chunks, last = chunks
    assert last["choices"] == []
    assert last["usage"] == whole["usage"] | {"prompt_tokens_details": last["usage"]["prompt_tokens_details"]}
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    for choice in whole["choices"]:
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(one["text"] for one in mine) == choice["text"]
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + ["length"]
        for name in choice["logprobs"] or {}:
            listed = [entry for one in mine if one["logprobs"] for entry in one["logprobs"][name]]
            assert without_noise(listed) == without_noise(choice["logprobs"][name])


def without_noise(value: Any) -> Any:
    """Floats of float64, which depend on the batch in their last digits, with 9 digits."""
    match value:
        case float():
            return round(value, 9)
        case list():
            return [without_noise(one) for one in value]
        case dict():
            return {key: without_noise(one) for key, one in value.items()}
    return value


def test_streamed_chat_equals_the_whole_one(served: Server) -> None:
    body = {**CHAT, "max_completion_tokens": 9, "max_tokens": 200, "logprobs": True, "top_logprobs": 2}
    whole = served.post("/v1/chat/completions", body).json()
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", whole["id"])
    (choice,) = whole["choices"]
    assert choice["message"]["role"] == "assistant"
    assert whole["usage"]["completion_tokens"] == 9
    entries = choice["logprobs"]["content"]
    assert len(entries) == 9
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in entries)  # greedy
    chunks = served.stream("/v1/chat/completions", {**body, "stream_options": {"continuous_usage_stats": True}})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(delta["content"] for delta in deltas[:-1]) == choice["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    streamed = [entry for one in logprobs if one for entry in one["content"]]
    assert without_noise(streamed) == without_noise(entries)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 9


def test_chat_takes_the_rest_of_the_context(served: Server) -> None:
    answer = served.post("/v1/chat/completions", CHAT).json()
    assert answer["usage"]["total_tokens"] == 256


def test_content_as_parts(served: Server) -> None:
    parts = [{"type": "text", "text": "Is water"}, {"type": "text", "text": "wet?"}]
    one = served.post("/tokenize", {"messages": [{"role": "user", "content": parts}]}).json()
    other = served.post("/tokenize", {"messages": [{"role": "user", "content": "Is water\nwet?"}]}).json()
    assert one == other


def test_stream_headers(served: Server) -> None:
    body = {"prompt": FOX, "max_tokens": 2, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "mine.1"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["x-request-id"] == "mine.1"
        events(answer.iter_lines())


def test_log_probabilities_of_prompts(served: Server) -> None:
    """What lm-eval sends, and how it reads the answer."""
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    body = {"max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0, "seed": 1234}
    answer = served.complete(prompts, model="tiny", **body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        lists = choice["logprobs"]
        assert {len(lists[name]) for name in lists} == {len(prompt) + 1}
        assert lists["token_logprobs"][0] is None
        assert lists["top_logprobs"][0] is None
        assert lists["text_offset"][0] == 0
        for actual, top in zip(lists["token_logprobs"][1:], lists["top_logprobs"][1:], strict=True):
            assert actual in top.values()
            assert len(top) <= 2
        assert lists["token_logprobs"][-1] == max(lists["top_logprobs"][-1].values())
    apart = [served.complete([prompt], **body)["choices"][0]["logprobs"]["token_logprobs"] for prompt in prompts]
    for one, choice in zip(apart, answer["choices"], strict=True):
        assert one[1:] == pytest.approx(choice["logprobs"]["token_logprobs"][1:], abs=1e-9)


def test_what_steers_sampling(served: Server) -> None:
    allowed = served.complete(FOX, max_tokens=4, allowed_token_ids=[70], ignore_eos=True)["choices"][0]["text"]
    letter = served.post("/detokenize", {"tokens": [70]}).json()["prompt"]
    assert allowed == letter * 4
    biased = served.complete(FOX, max_tokens=4, logit_bias={"70": 100}, **GREEDY)["choices"][0]["text"]
    assert biased == letter * 4
    answer = served.complete(FOX, max_tokens=4, logit_bias={"0": 100}, temperature=0)
    assert answer["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    longer = served.complete(FOX, max_tokens=6, min_tokens=4, logit_bias={"0": 100}, temperature=0)
    assert longer["usage"]["completion_tokens"] > 4
    stopped = served.complete(FOX, max_tokens=9, logit_bias={"70": 100}, stop_token_ids=[70], **GREEDY)
    assert stopped["choices"][0]["finish_reason"] == "stop"


def test_engine_stats(served: Server) -> None:
    answer = served.complete(FOX, max_tokens=3, include_engine_stats=True, **GREEDY)
    own = answer["usage"]["omniserve"]
    assert own["kv_pages_held"] == 1
    assert own["ttft_ms"] > 0
    assert own["tpot_ms"] > 0
    stats = served.stats()
    assert stats["state"] == "ready"
    assert stats["kv_pages"]["retrieval"]["total"] > 0
    assert FOX not in str(stats)


def test_metrics(served: Server) -> None:
    before = served.metric("generation_tokens_total")
    served.complete(FOX, max_tokens=3, **GREEDY)
    answer = served.http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert served.http.head("/metrics").status_code == 200
    assert served.metric("generation_tokens_total") == before + 3
    assert served.metric("request_success_total", finished_reason="length") > 0
    assert served.metric("inter_token_latency_seconds_count") > 0
    assert served.metric("weight_bits") == 8
    assert served.metric("kv_pages_capacity", kind="retrieval") > 0
    names = set(re.findall(r"^# TYPE omniserve:(\w+) \w+$", answer.text, re.MULTILINE))
    assert {
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info",
        "prompt_tokens_total", "prompt_tokens_cached_total", "num_preemptions_total", "prefix_cache_queries_total",
        "prefix_cache_hits_total", "corrupted_requests_total", "admission_rejections_total",
        "time_to_first_token_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
        "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
        "request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total", "kv_pages_used",
        "kv_bytes_per_token", "kv_bits", "decode_pages_read_ratio", "prefill_blocks_skipped_ratio",
        "selector_reuse_total", "startup_seconds", "build_info",
    } <= names  # fmt: skip
    for line in answer.text.splitlines():
        if line.startswith("omniserve:"):
            assert 'model_name="tiny"' in line
            assert "_created" not in line


def test_a_tally_says_what_a_histogram_says() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    edges = (0.001, 0.01, 1.0)
    tally = Tally("m:gap_seconds", "text", "x", edges)
    ours.register(tally)
    made = Histogram("m:gap_seconds", "text", ["model_name"], buckets=edges, registry=theirs).labels("x")
    assert generate_latest(ours) == re.sub(rb".*_created.*\n", b"", generate_latest(theirs))
    for value, times in ((0.0005, 1), (0.001, 2), (0.002, 3), (1.5, 1), (1.0, 2)):
        tally.add(value, times)
        for _ in range(times):
            made.observe(value)
    said, expected = (
        {line.rsplit(b" ", 1)[0]: float(line.rsplit(b" ", 1)[1]) for line in text.splitlines() if line[:1] != b"#"}
        for text in (generate_latest(ours), generate_latest(theirs))
    )
    assert said == pytest.approx({name: value for name, value in expected.items() if b"_created" not in name})


def test_prefixes_are_shared_by_salt_only(served: Server) -> None:
    """Row 11."""
    ids = [30 + n % 50 for n in range(140)]

    def cached(**more: Any) -> int:
        usage = served.complete(ids, max_tokens=1, **GREEDY, **more)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [cached(cache_salt="one"), cached(cache_salt="one")] == [0, 128]
    assert cached(cache_salt="two") == 0
    assert cached() == 0
    assert cached() == 128


def test_errors(served: Server) -> None:
    check_error(served.http.get("/nothing"), 404, "NotFoundError")
    wrong = served.http.delete("/v1/completions")
    check_error(wrong, 405, "MethodNotAllowedError")
    assert wrong.headers["allow"] == "POST"
    for method in ("QUERY", "TRACE", "OPTIONS"):
        assert served.http.request(method, "/v1/models").status_code == 405
    assert served.http.post("/health").headers["allow"] == "GET, HEAD"
    check_error(served.post("/v1/completions", {"prompt": FOX, "model": "gpt"}), 404, "NotFoundError", "tiny", "gpt")
    typed = {"content-type": "text/plain"}
    check_error(served.http.post("/v1/completions", content=b"{}", headers=typed), 415, "BadRequestError", "text/plain")
    long = served.post("/v1/completions", {"prompt": [5] * 256})
    check_error(long, 400, "BadRequestError", "256", "max_model_len", param="prompt")
    check_error(served.post("/v1/completions", {"prompt": "a " * 4096}), 400, "BadRequestError", "8192", "4096")
    check_error(served.post("/v1/completions", {"prompt": ["a"] * 257}), 400, "BadRequestError", "257", "256")
    many = served.post("/v1/completions", {"prompt": ["a"] * 9, "n": 128})
    check_error(many, 400, "BadRequestError", "1152", "1024", param="n")
    messages = [{"role": "user", "content": ""}] * 2049
    check_error(served.post("/v1/chat/completions", {"messages": messages}), 400, "BadRequestError", "2049", "2048")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2),
        ("suffix", "x"),
        ("structured_outputs", {"structural_tag": "x"}),
        ("guided_json", {"type": "object"}),
        ("use_beam_search", True),
        ("prompt_logprobs", 1),
    ],
)
def test_what_is_not_implemented_is_said(served: Server, field: str, value: object) -> None:
    answer = served.post("/v1/completions", {"prompt": FOX, field: value})
    check_error(answer, 501, "NotImplementedError")
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["param"].split(".")[0] == field


def test_neutral_values_of_those_fields_are_fine(served: Server) -> None:
    served.complete(
        FOX, max_tokens=1, best_of=1, suffix=None, response_format={"type": "text"}, priority=0, use_beam_search=False
    )
    answer = served.post("/v1/chat/completions", {**CHAT, "tools": [], "tool_choice": "none", "max_tokens": 1})
    assert answer.status_code == 200
