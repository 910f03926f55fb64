"""Batch files: every line gets its line, as a server would have answered it, whatever happens to the process."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from omniserve.base.config import Options
from omniserve.cli.batch import MARKS, Job
from omniserve.cli.jsonl import Lines, Output
from omniserve.client import EngineDeadError
from omniserve.engine.process import Null
from omniserve.server.service import Service
from tests.cli.commands import Ran, check_refusal, environment
from tests.server.engines import command
from tests.server.harness import Server, program

Run = Callable[..., Ran]
EXACT = ("--precision", "w16a16kv32", "--dtype", "float32")
"""Settings under which no answer of these tests depends on the batch."""
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def request(name: Any, url: str, body: Any, **more: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": body, **more}


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rounded(value: Any) -> Any:
    """A value of JSON with log-probabilities to three digits: they feel the batch a little."""
    if isinstance(value, float):
        return round(value, 3) + 0.0
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def choices(answers: list[dict[str, Any]]) -> list[Any]:
    return [(one["id"], one["custom_id"], one["response"]["body"]["choices"]) for one in answers]


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[Server]:
    server = program(model=str(tiny), options={"precision": "w16a16kv32", "dtype": "float32"})
    yield server
    server.close()


BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": said("Is water wet?"), "max_completion_tokens": 7, "temperature": 0}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "max_tokens": 3, "seed": 4}),
    (CHAT, {"messages": said("fox"), "max_tokens": 4, "logprobs": True, "top_logprobs": 2, "n": 2, "seed": 1}),
    (TEXT, {"prompt": "The quick", "max_tokens": 5, "temperature": 0, "echo": True, "logprobs": 1}),
    (TEXT, {"prompt": [[1, 2, 3], [4, 5]], "max_tokens": 6, "temperature": 0, "ignore_eos": True}),
    (TEXT, {"prompt": ["a", "b"], "n": 2, "max_tokens": 20, "seed": 9, "stop": ["e", "\n"]}),
    (TEXT, {"prompt": "x", "allowed_token_ids": [70], "logprobs": 3, "max_tokens": 2, "seed": 3}),
    (CHAT, {"messages": said("n"), "structured_outputs": {"regex": "[0-9]{3}"}, "max_tokens": 9, "seed": 2}),
]


def test_lines_are_answered_as_by_a_server(run: Run, tiny: Path, served: Server, tmp_path: Path) -> None:
    rows = [request(f"é-{n}", url, {"model": str(tiny), **body}) for n, (url, body) in enumerate(BODIES)]
    write(tmp_path / "in.jsonl", rows)
    ran = run("batch", "in.jsonl", "out.jsonl", *EXACT)
    assert (ran.code, ran.out) == (0, ""), ran
    assert "out.jsonl: 8 lines, 8 answered, 0 with an error, " in ran.err
    found = read(tmp_path / "out.jsonl")
    assert [one["custom_id"] for one in found] == [row["custom_id"] for row in rows]
    for one, (url, body) in zip(found, BODIES, strict=True):
        expected = served.post(url, body).json()
        assert set(one) == {"id", "custom_id", "response", "error"}
        assert (one["error"], one["response"]["status_code"]) == (None, 200)
        answer = one["response"]["body"]
        assert rounded(answer["choices"]) == rounded(expected["choices"])
        assert set(answer) == set(expected)
        assert (answer["object"], answer["model"]) == (expected["object"], str(tiny))
        assert answer["id"].split("-")[0] == expected["id"].split("-")[0]
        assert {k: v for k, v in answer["usage"].items() if k != "prompt_tokens_details"} == {
            k: v for k, v in expected["usage"].items() if k != "prompt_tokens_details"
        }

    assert found[-1]["response"]["body"]["choices"][0]["message"]["content"].isdigit()


BAD: dict[str, tuple[Any, str, list[str]]] = {
    "json": ("{", "invalid_json_line", ["not valid JSON"]),
    "list": ("[1]", "invalid_json_line", ["custom_id, method, url and body"]),
    "no id": ({"method": "POST", "url": CHAT, "body": {}}, "missing_required_parameter", ["custom_id is missing"]),
    "number": (request(3, CHAT, {}), "missing_required_parameter", ["custom_id must be a text, not 3"]),
    "no url": ({"custom_id": "u", "method": "POST", "body": {}}, "missing_required_parameter", ["url is missing"]),
    "method": (request("m", CHAT, {}) | {"method": "GET"}, "invalid_method", ["'GET'", "POST"]),
    "url": (request("v", "/v1/embeddings", {}), "invalid_url", ["/v1/embeddings", CHAT, TEXT]),
    "body": (request("b", CHAT, [1]), "invalid_request", ["must be an object"]),
    "twice": (request("good", CHAT, {}), "duplicate_custom_id", ["'good' is that of line 1 already"]),
}
REFUSED: dict[str, tuple[str, dict[str, Any], int, str, str | None]] = {
    "field": (CHAT, {"messages": []}, 400, "BadRequestError", "messages"),
    "value": (TEXT, {"prompt": "a", "temperature": "hot"}, 400, "BadRequestError", "temperature"),
    "token": (TEXT, {"prompt": [99999]}, 400, "BadRequestError", None),
    "long": (TEXT, {"prompt": "Zq" * 400}, 400, "BadRequestError", "prompt"),
    "stream": (TEXT, {"prompt": "a", "stream": True}, 400, "BadRequestError", "stream"),
    "model": (TEXT, {"prompt": "a", "model": "another"}, 404, "NotFoundError", "model"),
    "feature": (TEXT, {"prompt": "a", "suffix": "b"}, 501, "NotImplementedError", "suffix"),
}


def test_lines_that_cannot_be_answered(run: Run, tiny: Path, tmp_path: Path) -> None:
    good = {"model": str(tiny), "prompt": "a", "max_tokens": 1}
    rows = [request("good", TEXT, good), *(row for row, _, _ in BAD.values())]
    rows += [request(name, url, {"model": str(tiny), **body}) for name, (url, body, *_) in REFUSED.items()]
    write(tmp_path / "in.jsonl", rows)
    ran = run("batch", "in.jsonl", "out.jsonl", "--json", *EXACT)
    assert ran.code == 0, ran
    tally = json.loads(ran.out)
    assert (tally["lines"], tally["answered"], tally["errors"]) == (len(rows), 1, len(rows) - 1)
    found = read(tmp_path / "out.jsonl")
    assert [one["id"] for one in found] == [f"batch_req_{n}" for n in range(1, len(rows) + 1)]
    for line, (one, (row, code, words)) in enumerate(zip(found[1:], BAD.values(), strict=False), start=2):
        assert (one["response"], one["error"]["code"]) == (None, code), one
        for word in words:
            assert word in one["error"]["message"]
            assert word in ran.err
        name = row.get("custom_id") if isinstance(row, dict) else None
        assert one["custom_id"] == (name if isinstance(name, str) else None)
        assert f"in.jsonl line {line}: " in ran.err
    for one, (name, (_, _, status, kind, param)) in zip(found[1 + len(BAD) :], REFUSED.items(), strict=True):
        assert (one["custom_id"], one["error"], one["response"]["status_code"]) == (name, None, status), one
        error = one["response"]["body"]["error"]
        assert (error["type"], error["code"], error["param"]) == (kind, status, param), error
    again = run("batch", "in.jsonl", "out.jsonl", "--json", *EXACT)
    assert (again.code, json.loads(again.out)["found"]) == (0, len(rows))
    assert read(tmp_path / "out.jsonl") == found


def requests_of(tiny: Path, count: int) -> list[dict[str, Any]]:
    """Lines of many lengths, greedy and not, most without a seed."""
    rows = []
    for n in range(count):
        body = {"model": str(tiny), "max_tokens": 1 + n * 7 % 40, "ignore_eos": True, "temperature": n % 3 / 2}
        if n % 2:
            rows.append(request(f"r{n}", CHAT, {**body, "messages": said(f"fox {n}")}))
        else:
            rows.append(request(f"r{n}", TEXT, {**body, "prompt": [n % 90 + 1] * (n % 11 + 1), "n": 1 + n % 4 // 3}))
    return rows


def test_killed_at_any_moment(run: Run, tiny: Path, tmp_path: Path) -> None:
    """SIGKILL, then Ctrl-C, after some lines: what is there stays, and the end is that of an undisturbed run."""
    write(tmp_path / "in.jsonl", requests_of(tiny, 90))
    flags = ("--max-num-seqs", "4", *EXACT)
    assert run("batch", "in.jsonl", "whole.jsonl", *flags).code == 0
    target = tmp_path / "out.jsonl"
    line = [sys.executable, "-m", "omniserve", "batch", "in.jsonl", "out.jsonl", *flags]
    before: list[str] = []
    for number, more in ((signal.SIGKILL, 20), (signal.SIGINT, 25)):
        process = subprocess.Popen(line, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
        engines = wait_for(target, len(before) + more, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (130 if number == signal.SIGINT else -9), err
        now = target.read_text().splitlines(keepends=True)
        assert now[: len(before)] == before
        before = [one for one in now if one.endswith("\n")]
        for engine in engines:
            gone(engine)
    assert len(before) < 90
    with target.open("a") as file:
        file.write('{"id": "batch_req_')
    ran = run("batch", "in.jsonl", "out.jsonl", *flags)
    assert ran.code == 0, ran
    assert "of a torn line" in ran.err
    assert f"{len(before)} of 90 lines are there, going on" in ran.err
    assert choices(read(target)) == choices(read(tmp_path / "whole.jsonl"))
    assert [one["id"] for one in read(target)] == [f"batch_req_{n}" for n in range(1, 91)]


def wait_for(target: Path, count: int, process: "subprocess.Popen[str]") -> list[int]:
    """Wait for so many lines, and return the process's children: its engine among them."""
    end = time.monotonic() + 120
    while not target.exists() or target.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    return [int(child) for child in children]


def gone(process: int) -> None:
    """Wait until a process has ended."""
    end = time.monotonic() + 30
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < end, process
        time.sleep(0.02)


def test_other_settings_are_refused(run: Run, tiny: Path, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", requests_of(tiny, 2))
    assert run("batch", "in.jsonl", "out.jsonl", *EXACT).code == 0
    check_refusal(run("batch", "in.jsonl", "out.jsonl", *EXACT, "--seed", "3"), "seed 0, now 3", "--overwrite")
    write(tmp_path / "in.jsonl", requests_of(tiny, 3))
    check_refusal(run("batch", "in.jsonl", "out.jsonl", *EXACT), "another input", "--overwrite")
    (tmp_path / "out.jsonl.job").unlink()
    check_refusal(run("batch", "in.jsonl", "out.jsonl", *EXACT), "no run was begun in it", "--overwrite")


def test_files_and_models(run: Run, tmp_path: Path) -> None:
    check_refusal(run("batch", "none.jsonl", "out.jsonl"), "none.jsonl")
    write(tmp_path / "in.jsonl", [request("a", TEXT, {"prompt": "a"}), "{"])
    check_refusal(run("batch", "in.jsonl", "in.jsonl"), "in.jsonl")
    check_refusal(run("batch", "in.jsonl", "out.jsonl"), "no line names a model")
    check_refusal(run("batch", "in.jsonl", "out.jsonl", "--shape", "tiny"), "shape=tiny")
    (tmp_path / "out.jsonl").write_text("something\n")
    ran = run("batch", "in.jsonl", "out.jsonl", "--dummy-weights", "--shape", "tiny", "--overwrite")
    assert ran.code == 0, ran
    assert [one["error"] is None for one in read(tmp_path / "out.jsonl")] == [True, False]
    write(tmp_path / "other.jsonl", [request("a", TEXT, {"prompt": "a", "model": "./nowhere"})])
    check_refusal(run("batch", "other.jsonl", "b.jsonl"), "nowhere")
    assert not (tmp_path / "b.jsonl").exists()


# Faults


def faulty(fault: str, tmp_path: Path, count: int = 12) -> tuple[Job, Path]:
    """A job without a model, whose engine has a fault."""
    rows = [request(f"r{n}", TEXT, {"prompt": [n + 1], "max_tokens": 20 + n}) for n in range(count)]
    source, target = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    service = Service(None, Options(max_num_seqs=2), _settings(), null=Null(step_seconds=0.001), command=command(fault))
    return Job(service, Lines.scan(source), target, {"input": "x"}, overwrite=False), target


def _settings() -> Any:
    from omniserve.cli.batch import _limits

    return _limits("null")


def test_a_step_that_fails_costs_its_requests_alone(tmp_path: Path) -> None:
    job, target = faulty("raise 30", tmp_path)
    asyncio.run(asyncio.wait_for(job.run(lambda phase, done, total: None), 60))
    found = read(target)
    statuses = [one["response"]["status_code"] for one in found]
    assert len(found) == 12
    assert 1 <= statuses.count(500) <= 2
    assert statuses.count(200) == 12 - statuses.count(500)
    assert job.tally.errors == statuses.count(500)
    (error,) = {one["response"]["body"]["error"]["message"] for one in found if one["response"]["status_code"] == 500}
    assert "step" in error


def test_an_engine_that_dies_leaves_what_is_done(tmp_path: Path) -> None:
    """No line is written for what it had under way; the next run answers it."""
    job, target = faulty("kill 70", tmp_path)
    with pytest.raises(EngineDeadError):
        asyncio.run(asyncio.wait_for(job.run(lambda phase, done, total: None), 60))
    found = read(target)
    assert 0 < len(found) < 12
    assert {one["response"]["status_code"] for one in found} == {200}
    rows = Lines.scan(tmp_path / "in.jsonl")
    facts = json.loads((tmp_path / "out.jsonl.job").read_text())["facts"]
    with Output(target, facts, rows.last, ordered=True, overwrite=False, marks=MARKS) as output:
        assert (output.filled, output.errors) == (len(found), 0)
