"""`bench serving`: arrivals, traces, prompts, what is counted, and the whole against servers without a model."""

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from omniserve.base.errors import ConfigError
from omniserve.bench.latency import Report, goodput_terms, kept
from omniserve.bench.serving import Record, Run
from omniserve.bench.workload import BLOCK, WORDS, Planned, Prompts, arrivals, cut, drawn, read_trace
from tests.cli.commands import Ran, check_refusal
from tests.cli.others import other
from tests.server.harness import Server, program

Command = Callable[..., Ran]
TRACES = Path(__file__).parent / "traces"


# What is asked, and when


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_arrivals(burstiness: float, variation: float) -> None:
    """The average rate is exact; gaps vary as those of a gamma distribution do: 1 / sqrt(shape)."""
    times = arrivals(4000, 50.0, burstiness, seed=1)
    assert times == arrivals(4000, 50.0, burstiness, seed=1) != arrivals(4000, 50.0, burstiness, seed=2)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(80)
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(variation, rel=0.1)


def test_all_at_once() -> None:
    assert arrivals(3, float("inf"), 1.0, seed=0) == [0.0, 0.0, 0.0]


def test_drawn_lengths() -> None:
    assert {(one.input_len, one.output_len) for one in drawn(50, 10, 4, spread=0.0, seed=0)} == {(10, 4)}
    spread = drawn(2000, 10, 4, spread=0.5, seed=0)
    assert {one.input_len for one in spread} == set(range(5, 16))
    assert {one.output_len for one in spread} == {2, 3, 4, 5, 6}
    assert spread == drawn(2000, 10, 4, spread=0.5, seed=0) != drawn(2000, 10, 4, spread=0.5, seed=1)
    assert min(one.output_len for one in drawn(200, 1, 1, spread=1.0, seed=0)) == 1


def test_azure_trace() -> None:
    found = read_trace(TRACES / "azure.csv", speedup=2)
    assert [(one.input_len, one.output_len) for one in found] == [(48, 10), (31, 8), (110, 7)]
    assert [one.at for one in found] == pytest.approx([0, 0.026, 1.25])
    assert len(read_trace(TRACES / "azure.csv", most=2)) == 2


def test_mooncake_trace() -> None:
    found = read_trace(TRACES / "mooncake.jsonl")
    assert [one.at for one in found] == [0, 0, 0.5, 0.5]
    assert found[2] == Planned(at=0.5, input_len=1100, output_len=3, blocks=(7, 8, 11))
    assert len(read_trace(TRACES / "mooncake.jsonl", most=3)) == 3


GOOD = '{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [1]}\n'
BROKEN = {
    "json": (GOOD + "{\n", "line 2: "),
    "field": ('{"timestamp": 0, "input_length": 3, "hash_ids": [1]}', "line 1: 'output_length' is missing"),
    "length": (GOOD.replace("3", "0"), "line 1: 0 tokens of the prompt"),
    "half": (GOOD.replace("3", "2.5"), "line 1: 2.5 tokens of the prompt"),
    "answer": (GOOD.replace('h": 1', 'h": "1"'), "line 1: '1' tokens of the answer"),
    "hashes": (GOOD.replace("3", "600"), "line 1: 1 hash_ids for 600 tokens"),
    "hash": (GOOD.replace("[1]", "[-1]"), "line 1: hash_ids must be whole numbers"),
    "time": (GOOD.replace('p": 0', 'p": 1e999'), "line 1: the time inf"),
    "list": (GOOD + "[1]\n", "line 2: "),
    "no trace": ("a,b\n1,2\n", "is no trace: must begin with TIMESTAMP,ContextTokens,GeneratedTokens"),
    "empty": ("", "is no trace"),
    "header alone": ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no requests"),
    "azure time": ("TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,2\n", "line 2: "),
    "azure row": ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1\n", "line 2: "),
    "azure number": ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1,x\n", "line 2: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_traces(run: Command, tmp_path: Path, name: str) -> None:
    content, words = BROKEN[name]
    (tmp_path / "trace").write_text(content)
    check_refusal(run("bench", "serving", "--trace", "trace"), "trace", words)


def test_cut() -> None:
    asked = [Planned(at=0, input_len=10, output_len=5), Planned(at=0, input_len=3, output_len=3)]
    assert cut(asked, None, None) == (asked, 0)
    made, count = cut(asked, 4, 4)
    assert [(one.input_len, one.output_len) for one in made] == [(4, 4), (3, 3)]
    assert count == 1


def test_equal_blocks_are_equal_parts() -> None:
    prompts = Prompts(vocab=200, seed=3)
    asked = read_trace(TRACES / "mooncake.jsonl")
    ids = [prompts.ids(number, one) for number, one in enumerate(asked)]
    assert [len(one) for one in ids] == [one.input_len for one in asked]
    assert all(0 <= token < 200 for one in ids for token in one)
    assert ids[0][: 2 * BLOCK] == ids[2][: 2 * BLOCK]
    assert ids[0][:BLOCK] == ids[1][:BLOCK]
    assert ids[0][2 * BLOCK :] != ids[2][2 * BLOCK :]
    assert ids[3] != ids[0][:300]
    assert Prompts(vocab=200, seed=3).ids(0, asked[0]) == ids[0] != Prompts(vocab=200, seed=4).ids(0, asked[0])
    shorter, _ = cut(asked, 520, None)
    assert prompts.ids(0, shorter[0]) == ids[0][:520]
    alone = Planned(at=0, input_len=50, output_len=1)
    assert prompts.ids(0, alone) != prompts.ids(1, alone)
    text = prompts.text(0, alone)
    assert len(text.split()) == 50
    assert set(text.split()) <= set(WORDS)


# What is counted


def record(ttft: float, gaps: list[float], tokens: int, *, sent: float = 10.0, planned: float | None = None) -> Record:
    asked = Planned(at=sent - 10, input_len=4, output_len=tokens)
    first = sent + ttft
    return Record(
        asked=asked,
        planned=sent if planned is None else planned,
        sent=sent,
        first=first,
        last=first + sum(gaps),
        gaps=gaps,
        prompt_tokens=4,
        tokens=tokens,
        counted=True,
    )


def test_numbers_of_a_report() -> None:
    """Two tokens in one chunk are one gap, and two tokens for the time per token."""
    bad = Record(asked=Planned(at=0, input_len=1, output_len=1), planned=0.0, error="no")
    records = [record(0.1, [0.2, 0.2], 5), record(0.3, [], 1, sent=10.2, planned=10.1), bad]
    run = Run(records=records, seconds=2.0, lag=[0.001, 0.003])
    found = Report(run=run, percentiles=(50.0,), terms={"ttft": 200.0, "tpot": 100.1}).as_object()
    assert (found["requests"], found["completed"], found["failed"], found["errors"]) == (3, 2, 1, {"no": 1})
    assert found["ttft_ms"]["p50"] == pytest.approx(200)
    assert found["ttft_ms"]["max"] == pytest.approx(300)
    assert found["itl_ms"] == pytest.approx({"mean": 200, "std": 0, "p50": 200, "max": 200}, abs=1e-9)
    assert found["tpot_ms"]["mean"] == pytest.approx(100)
    assert found["e2el_ms"]["mean"] == pytest.approx(400)
    assert found["requests_per_second"] == 1
    assert found["output_tokens_per_second"] == 3
    assert found["total_tokens_per_second"] == 7
    assert found["goodput_requests_per_second"] == 0.5  # the second request's first token comes too late
    assert found["goodput_share"] == pytest.approx(1 / 3)
    assert found["most_at_once"] == 2
    assert found["sent_late_ms"]["max"] == pytest.approx(100)
    assert found["client_lag_ms"]["mean"] == pytest.approx(2)


def test_goodput_terms() -> None:
    assert goodput_terms(["ttft:200", "tpot:50", "e2el:5e3"]) == {"ttft": 200, "tpot": 50, "e2el": 5000}
    one = record(0.1, [0.2, 0.2], 3)
    assert kept(one, {})
    assert kept(one, {"ttft": 100.1, "tpot": 200.1, "e2el": 500.1})
    assert not kept(one, {"e2el": 499})
    assert not kept(one, {"tpot": 199})
    for word in ("itl:3", "ttft", "ttft:", "ttft:-1", "ttft:nan", "ttft:inf", "200"):
        with pytest.raises(ConfigError, match="NAME:MILLISECONDS"):
            goodput_terms([word])
    with pytest.raises(ConfigError, match="twice"):
        goodput_terms(["ttft:1", "ttft:2"])


# Against servers


@pytest.fixture(scope="module")
def null() -> Iterator[Server]:
    """No model, steps of 2 ms."""
    server = program(null=0.002, options={"max_num_seqs": 16, "async_scheduling": True})
    yield server
    server.close()


def measured(ran: Ran) -> dict[str, Any]:
    assert ran.code == 0, ran
    return dict(json.loads(ran.out))


def test_closed_loop(run: Command, null: Server) -> None:
    flags = ("--num-prompts", "12", "--input-len", "20", "--output-len", "6", "--max-concurrency", "3")
    found = measured(run("bench", "serving", "--url", null.url, *flags, "--json", "--goodput", "ttft:1e6", "e2el:1e-3"))
    assert (found["completed"], found["prompt_tokens"], found["output_tokens"]) == (12, 240, 72)
    assert found["most_at_once"] == 3
    assert found["other_length"] == 0
    assert found["tokens_counted_by_server"]
    assert found["goodput_share"] == 0
    assert found["sent_late_ms"] is None
    assert found["ttft_ms"]["p50"] <= found["e2el_ms"]["p50"]
    assert found["model"] == "null"


def test_open_loop_and_table(run: Command, null: Server, tmp_path: Path) -> None:
    flags = ("--num-prompts", "20", "--output-len", "4", "--request-rate", "200", "--burstiness", "0.5", "--seed", "3")
    more = ("--metric-percentiles", "25,99.9", "--goodput", "ttft:1e6", "--plot", "p.png")
    ran = run("bench", "serving", "--url", null.url, *flags, *more)
    assert ran.code == 0, ran
    for words in ("20 of 20", "time to first token", "p25", "p99.9", "goodput/s (ttft:1e+06)", "(100%)", "sent late"):
        assert words in ran.out
    assert "20 requests, 200 requests/s, burstiness 0.5" in ran.err
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_traces_against_a_server(run: Command, null: Server) -> None:
    """Equal blocks of 512 tokens are found in the prefix cache: 2 of them by the third request, 1 by the second."""
    flags = ("--trace", TRACES / "mooncake.jsonl", "--max-concurrency", "1", "--json", "--speedup", "1000")
    found = measured(run("bench", "serving", "--url", null.url, *flags))
    assert (found["completed"], found["prompt_tokens"], found["output_tokens"]) == (4, 3100, 14)
    assert found["cached_tokens"] == 3 * BLOCK
    assert (found["trace"], found["cut"]) == ("mooncake.jsonl", 0)
    azure = ("--trace", TRACES / "azure.csv", "--request-rate", "100", "--max-output-len", "7", "--json")
    ran = run("bench", "serving", "--url", null.url, *azure)
    found = measured(ran)
    assert (found["prompt_tokens"], found["output_tokens"], found["cut"]) == (189, 21, 2)
    assert "2 of 3 requests were cut" in ran.err


def test_requests_that_do_not_fit(run: Command, null: Server) -> None:
    flags = ("bench", "serving", "--url", null.url, "--num-prompts", "2", "--input-len", "999999")
    check_refusal(run(*flags), "2 of 2 requests need more than the server's max_model_len of", "--max-input-len")


CHUNK = b'data: {"choices": [{"text": "a"}]}\n\n'
ANSWER = CHUNK + CHUNK + b"data: [DONE]\n\n"
FLAGS = ("--num-prompts", "6", "--output-len", "2", "--max-concurrency", "1", "--json")


def test_a_server_that_counts_nothing_and_fails_at_times(run: Command) -> None:
    with other(ANSWER, None, CHUNK) as (url, kind):
        ran = run("bench", "serving", "--url", url, *FLAGS)
    found = measured(ran)
    assert (found["completed"], found["failed"], found["output_tokens"]) == (2, 4, 4)
    assert found["errors"] == {"status 500: out of order": 2, "the server closed the stream before its end": 2}
    assert not found["tokens_counted_by_server"]
    assert "4 of 6 requests failed: 2 times status 500: out of order" in ran.err
    assert "chunks are counted instead" in ran.err
    assert [len(body["prompt"]) for body in kind.asked] == [128] * 7
    first = kind.asked[0]
    assert (first["max_tokens"], first["ignore_eos"], first["stream_options"]) == (2, True, {"include_usage": True})


def test_chat_endpoint_and_fields(run: Command) -> None:
    with other(ANSWER.replace(b'"text": "a"', b'"delta": {"content": "a"}')) as (url, kind):
        found = measured(run("bench", "serving", "--url", url, *FLAGS, "--endpoint", "chat", "--no-ignore-eos"))
    assert found["output_tokens"] == 12
    (message,) = kind.asked[1]["messages"]
    assert len(message["content"].split()) == 128
    assert kind.asked[1]["max_completion_tokens"] == 2
    assert "ignore_eos" not in kind.asked[1]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (None, "status 500: out of order"),
        (b"<html>", "closed the stream before its end"),
        (b"data: {\n\n", "no stream of OpenAI's API"),
        (b"data: [3]\n\n", "no stream of OpenAI's API"),
        (b'data: {"error": {"message": "a step failed"}}\n\n', "a step failed"),
    ],
)
def test_a_server_that_always_fails(run: Command, body: bytes | None, words: str) -> None:
    with other(body) as (url, _):
        check_refusal(run("bench", "serving", "--url", url, *FLAGS), "the first request failed", words)
        check_refusal(
            run("bench", "serving", "--url", url, *FLAGS, "--num-warmups", "0"), "all 6 requests failed", words
        )


REFUSED = {
    "no server": (["--url", "http://127.0.0.1:1"], ["no server answers at http://127.0.0.1:1/v1"]),
    "rate": (["--request-rate", "0"], ["--request-rate 0: must be above 0"]),
    "nan": (["--request-rate", "nan"], ["--request-rate nan"]),
    "burstiness": (["--burstiness", "2"], ["--burstiness goes with --request-rate"]),
    "prompts": (["--num-prompts", "0"], ["--num-prompts 0: must be 1 or more"]),
    "concurrency": (["--max-concurrency", "0"], ["--max-concurrency 0"]),
    "ratio": (["--range-ratio", "2"], ["--range-ratio 2: must be 0 to 1"]),
    "lengths": (["--trace", "x", "--input-len", "3"], ["--input-len does not go with --trace"]),
    "cut": (["--max-input-len", "3"], ["--max-input-len goes with --trace"]),
    "times": (["--trace", "x", "--speedup", "2", "--request-rate", "1"], ["--speedup and --request-rate"]),
    "trace": (["--trace", "nowhere"], ["nowhere: no such trace"]),
    "percentiles": (["--metric-percentiles", "50,100"], ["--metric-percentiles 50,100"]),
    "goodput": (["--goodput", "fast"], ["--goodput fast", "ttft, tpot, e2el"]),
    "plot": (["--plot", "p.jpg"], ["--plot p.jpg", ".png"]),
    "seed": (["--seed", "-1"], ["--seed -1"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(run: Command, name: str) -> None:
    flags, words = REFUSED[name]
    check_refusal(run("bench", "serving", *flags), *words)
