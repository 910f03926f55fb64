"""Files of prompts: every line gets its line, whatever happens to the process; one bad line is one bad line."""

import errno
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve import LLM, SamplingParams
from omniserve.base.errors import CapacityError, ConfigError, RequestError
from omniserve.cli import bulk as module
from omniserve.cli import jsonl
from omniserve.cli.bulk import Reader, answer_lines
from omniserve.cli.jsonl import Lines, Output, fingerprint, job_file
from omniserve.cli.main import main
from tests.cli.commands import CONTEXT, Ran, check_refusal, environment

Run = Callable[..., Ran]
EXACT = ("--precision", "w16a16kv32", "--dtype", "float32")
"""Settings under which no answer of these tests depends on the batch: no two likeliest tokens are nearly equal."""
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "is",
    "water",
    "wet",
    "some",
    "say",
    "yes",
    "no",
)


def prompts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Lines of all kinds: texts, token ids, conversations, with parameters of their own, greedy and not."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
        row: dict[str, Any] = {"max_tokens": rng.randint(1, 16), "ignore_eos": True}
        match number % 4:
            case 0:
                row |= {"prompt": text, "id": f"é-{number}"}
            case 1:
                row |= {"messages": [{"role": "user", "content": text}], "temperature": 1.0}
            case 2:
                row |= {
                    "prompt_token_ids": [rng.randrange(1, 250) for _ in range(rng.randint(1, 20))],
                    "id": number + 0.5,
                }
            case _:
                row |= {"prompt": text, "temperature": 0.9, "top_k": 20, "seed": number}
        rows.append(row)
    return rows


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(tiny, precision="w16a16kv32", dtype="float32", max_num_seqs=4) as llm:
        yield llm


def answer(llm: LLM, source: Path, target: Path, **settings: Any) -> module.Tally:
    params = settings.pop("params", SamplingParams(temperature=0, max_tokens=8))
    lines = Lines.scan(source)
    return answer_lines(llm, lines, target, params, facts={"input": lines.digest}, quiet=True, **settings)


# What comes out


def test_each_line_gets_its_answer(run: Run, tiny: Path, tmp_path: Path) -> None:
    rows = prompts(12)
    write(tmp_path / "in.jsonl", rows)
    flags = ("generate", tiny, "--prompt-file", "in.jsonl", "--output", "out.jsonl", "--seed", "5", *EXACT)
    ran = run(*flags)
    assert (ran.code, ran.out) == (0, ""), ran
    assert "out.jsonl: 12 lines, 12 answered, 0 with an error, " in ran.err
    found = read(tmp_path / "out.jsonl")
    assert [one["line"] for one in found] == list(range(1, 13))
    assert [one["id"] for one in found] == [row.get("id", n) for n, row in enumerate(rows, start=1)]
    llm = LLM(tiny, precision="w16a16kv32", dtype="float32", seed=5)
    own = {"prompt", "prompt_token_ids", "messages", "id"}
    params = [SamplingParams(**{"temperature": 0.0} | {k: v for k, v in r.items() if k not in own}) for r in rows]
    asked = [
        llm.tokenizer.chat(r["messages"]) if "messages" in r else r.get("prompt", r.get("prompt_token_ids"))
        for r in rows
    ]
    # A line's default seed is that of the prompt in its place, were all of them given to a fresh engine.
    for one, row, expected in zip(found, rows, llm.generate(asked, params), strict=True):
        (completion,) = expected.outputs
        assert one["text"] == completion.text
        assert one["finish_reason"] == completion.finish_reason == "length"
        assert one["usage"] == {
            "prompt_tokens": len(expected.prompt_token_ids),
            "completion_tokens": row["max_tokens"],
            "total_tokens": len(expected.prompt_token_ids) + row["max_tokens"],
        }
        assert one.get("token_ids") == (list(completion.token_ids) if "prompt_token_ids" in row else None)


def test_any_order_holds_the_same_lines(llm: LLM, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", prompts(20))
    answer(llm, source, tmp_path / "ordered.jsonl")
    answer(llm, source, tmp_path / "any.jsonl", ordered=False)
    ordered, unordered = read(tmp_path / "ordered.jsonl"), read(tmp_path / "any.jsonl")
    assert [one["line"] for one in ordered] == list(range(1, 21))
    assert unordered != ordered
    assert sorted(unordered, key=lambda one: one["line"]) == ordered


def test_the_batch_does_not_show(tiny: Path, llm: LLM, tmp_path: Path) -> None:
    """What the tests of killed runs rest on."""
    source = write(tmp_path / "in.jsonl", prompts(60))
    answer(llm, source, tmp_path / "4.jsonl")
    for seqs in (1, 16):
        with LLM(tiny, precision="w16a16kv32", dtype="float32", max_num_seqs=seqs) as other:
            answer(other, source, tmp_path / "other.jsonl", overwrite=True)
        assert (tmp_path / "other.jsonl").read_bytes() == (tmp_path / "4.jsonl").read_bytes()


def test_several_answers_and_logprobs(llm: LLM, tmp_path: Path) -> None:
    asked = {"prompt": "the quick", "n": 2, "logprobs": 1, "prompt_logprobs": 0, "temperature": 1.0, "max_tokens": 3}
    source = write(tmp_path / "in.jsonl", [asked | {"ignore_eos": True, "logit_bias": {"5": -100}}])
    answer(llm, source, tmp_path / "out.jsonl")
    (one,) = read(tmp_path / "out.jsonl")
    assert "text" not in one
    assert len(one["outputs"]) == 2
    for each in one["outputs"]:
        assert len(each["logprobs"]) == 3
        for options in each["logprobs"]:
            assert all(set(entry) == {"logprob", "rank", "decoded_token"} for entry in options.values())
    assert one["prompt_logprobs"][0] is None
    assert len(one["prompt_logprobs"]) == one["usage"]["prompt_tokens"]


def test_lines_may_ask_for_a_form(llm: LLM, tmp_path: Path) -> None:
    forms: list[dict[str, Any]] = [{"regex": "[0-9]{3}"}, {"choice": ["yes", "no"]}, {"regex": "("}, {"regx": "a"}]
    source = write(tmp_path / "in.jsonl", [{"prompt": "the", "structured_outputs": form} for form in forms])
    answer(llm, source, tmp_path / "out.jsonl")
    number, word, broken, unknown = sorted(read(tmp_path / "out.jsonl"), key=lambda one: one["line"])
    assert re.fullmatch("[0-9]{3}", number["text"])
    assert word["text"] in ("yes", "no")
    assert number["finish_reason"] == word["finish_reason"] == "stop"
    assert "unclosed group" in broken["error"]
    assert "'regx' is none of" in unknown["error"]


def test_odd_files(llm: LLM, tmp_path: Path) -> None:
    """A byte order mark, blank lines, Windows line ends, no end of the last line, no lines at all."""
    one = json.dumps({"prompt": "é", "max_tokens": 1}, ensure_ascii=False)
    source = tmp_path / "in.jsonl"
    source.write_bytes(("\ufeff" + one + "\r\n\r\n  \n" + one + "\n\n" + one).encode())
    assert answer(llm, source, tmp_path / "out.jsonl").lines == 3
    assert [(row["id"], row["line"]) for row in read(tmp_path / "out.jsonl")] == [(1, 1), (4, 4), (6, 6)]
    (tmp_path / "nothing.jsonl").write_bytes(b"\n \n")
    assert answer(llm, tmp_path / "nothing.jsonl", tmp_path / "none.jsonl").lines == 0
    assert (tmp_path / "none.jsonl").read_bytes() == b""


def test_ids_keep_what_utf8_has_not(llm: LLM, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ['{"id": "a\\ud83d", "prompt": "x"}', '{"id": "b", "prompt": "a\\ud83d"}'])
    answer(llm, source, tmp_path / "out.jsonl")
    first, second = read(tmp_path / "out.jsonl")
    assert first["id"] == "a\ud83d"
    assert "half a surrogate pair" in second["error"]


# Bad lines

BAD = {
    "{": "not valid JSON: Expecting property name",
    "nope": "not valid JSON: Expecting value (character 0)",
    "[1, 2]": "not a JSON object with prompt, prompt_token_ids or messages",
    "[" * 100_000: "not valid JSON: nested too deeply",
    "1" * 5000: "not valid JSON: nested too deeply, or a number with too many digits",
    '{"prompt": "caf\udce9"}': "not UTF-8 text (byte 15)",
    "{}": "there must be one of prompt, prompt_token_ids, messages, here is none",
    '{"prompt": "a", "prompt_token_ids": [1]}': "here is prompt and prompt_token_ids",
    '{"prompt": "a", "temprature": 1}': "unknown field 'temprature' (did you mean temperature?)",
    '{"prompt": ""}': "prompt='': must be a text of at least one character",
    '{"prompt": 3}': "prompt=3: must be a text",
    '{"prompt": "a\\ud800"}': "half a surrogate pair",
    '{"prompt_token_ids": []}': "prompt_token_ids=[]: must be a list of at least one token id",
    '{"prompt_token_ids": [1, 999999]}': "token id 999999 at position 1: must be a whole number from 0 to ",
    '{"prompt_token_ids": [1, -1]}': "token id -1 at position 1",
    '{"prompt_token_ids": [1, true]}': "token id True at position 1",
    '{"prompt_token_ids": "12"}': "prompt_token_ids='12': must be a list",
    '{"messages": []}': "messages must be a non-empty list",
    '{"messages": [{"content": "x"}]}': "messages[0] must be an object with a role",
    '{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": [1]}': "chat_template_kwargs=[1]",
    '{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tools": 1}}': "'tools' is no variable",
    '{"prompt": "a", "chat_template_kwargs": {}}': "chat_template_kwargs goes with messages only",
    '{"prompt": "a", "temperature": 3}': "temperature=3: must be 0 to 2",
    '{"prompt": "a", "temperature": NaN}': "temperature=nan: must be 0 to 2",
    '{"prompt": "a", "temperature": null}': "temperature=None: must be 0 to 2",
    '{"prompt": "a", "max_tokens": 1.5}': "max_tokens=1.5: must be",
    '{"prompt": "a", "stop": 5}': "stop=5: must be a non-empty string or a list of them",
    '{"prompt": "a", "stop_token_ids": 5}': "stop_token_ids=5: must be",
    '{"prompt": "a", "top_p": "much"}': "top_p='much': must be",
    '{"prompt": "a", "logit_bias": {"x": 1}}': "logit_bias={'x': 1}: must be",
    '{"prompt": "a", "allowed_token_ids": [999999]}': "allowed_token_ids=999999: the model has",
    '{"prompt": "a", "id": null}': "id=None: must be a text or a number",
    '{"prompt": "a", "id": true}': "id=True: must be a text or a number",
    '{"prompt": "a", "id": Infinity}': "id=inf: must be a text or a number",
    '{"prompt": "a", "id": [1]}': "id=[1]: must be a text or a number",
    json.dumps({"prompt": "Zq" * 600}): f"the prompt has 1200 tokens: max_model_len is {CONTEXT}",
    json.dumps({"prompt": "a", "x" * 9999: 1}): "unknown field 'xxxx",
    json.dumps({"prompt": "a" * (17 << 20)}): "longer than 16 MiB",
}


def test_bad_lines_are_reported_and_skipped(run: Run, tiny: Path, tmp_path: Path) -> None:
    """All of them in one file, between good lines."""
    good = json.dumps({"prompt": "the quick", "max_tokens": 2, "ignore_eos": True})
    rows = [row for bad in BAD for row in (bad, good)]
    source = tmp_path / "in.jsonl"
    source.write_bytes("".join(row + "\n" for row in rows).encode("utf-8", "surrogateescape"))
    ran = run("generate", tiny, "--prompt-file", source, "--output", "out.jsonl", "--json", *EXACT)
    assert ran.code == 0, ran
    summary = json.loads(ran.out)
    assert (summary["lines"], summary["answered"], summary["errors"]) == (2 * len(BAD), len(BAD), len(BAD))
    found = read(tmp_path / "out.jsonl")
    assert [one["line"] for one in found] == list(range(1, 2 * len(BAD) + 1))
    texts = {one["text"] for one in found[1::2]}
    assert len(texts) == 1
    for (bad, words), one in zip(BAD.items(), found[::2], strict=True):
        assert set(one) == {"id", "line", "error"}
        assert words in one["error"], (bad[:100], one)
        assert len(one["error"]) <= 400
        assert "\n" not in one["error"]
    assert ran.err.count(f"omniserve: {source} line ") == module.REPORTED
    assert "omniserve: further errors stand in out.jsonl only" in ran.err
    assert "Traceback" not in ran.err


def test_ids_are_not_used_twice(llm: LLM, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": 3},
        {"id": "3"},
        {},
        {"id": 3.0},
        {"id": 2},
        {"id": "é"},
        {"id": "é"},
        {"id": 2.5},
    ]
    source = write(tmp_path / "in.jsonl", [{"prompt": "x", "max_tokens": 1} | row for row in rows])
    answer(llm, source, tmp_path / "out.jsonl")
    errors = {one["line"]: one["error"] for one in read(tmp_path / "out.jsonl") if "error" in one}
    assert errors == {
        3: "id=3: is that of line 1 already, each line needs its own",
        4: "id=3.0: is that of line 1 already, each line needs its own",
        7: "id='é': is that of line 6 already, each line needs its own",
    }


# Runs that are stopped


@pytest.fixture(scope="module")
def whole(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A prompt file with good and bad lines, and the output of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    rows: list[Any] = prompts(14)
    rows[3:3] = ["{", ""]
    rows[9:9] = [{"prompt": "a", "id": "é-0"}]
    source = write(folder / "in.jsonl", rows)
    answer(llm, source, folder / "out.jsonl")
    return source, (folder / "out.jsonl").read_bytes()


@given(data=st.data(), ordered=st.booleans())
def test_cut_anywhere_it_ends_as_if_it_had_not_been(
    data: st.DataObject, ordered: bool, llm: LLM, whole: tuple[Path, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, expected = whole
    target = tmp_path_factory.mktemp("cut") / "out.jsonl"
    answer(llm, source, target, ordered=ordered)
    done = target.read_bytes()
    cut = data.draw(st.integers(0, len(done)))
    garbage = data.draw(st.sampled_from([b"", b"", b"\0" * 100, b"\0\n\0\0\n", b'{"line": 2', b"\xff\xfe\n"]))
    target.write_bytes(done[:cut] + garbage)
    tally = answer(llm, source, target, ordered=ordered)
    assert tally.found == done[:cut].count(b"\n")
    assert sorted(target.read_bytes().splitlines()) == sorted(expected.splitlines())
    if ordered:
        assert target.read_bytes() == expected


def test_a_finished_run_is_left_as_it_is(llm: LLM, whole: tuple[Path, bytes], tmp_path: Path) -> None:
    source, expected = whole
    for _ in range(2):
        tally = answer(llm, source, tmp_path / "out.jsonl")
        assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert (tally.lines, tally.found, tally.answered, tally.errors) == (16, 16, 14, 2)
    assert tally.completion_tokens == 0


def test_failures_leave_a_run_that_goes_on(
    llm: LLM, whole: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk after half a line, an exception in the engine, Ctrl-C: the engine is free again each time."""
    source, expected = whole
    target = tmp_path / "out.jsonl"
    real_write, real_step = os.write, llm._engine.step

    def full(file: int, content: bytes) -> int:
        if os.fstat(file).st_ino == target.stat().st_ino and os.fstat(file).st_size >= 4 * 90:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(file, content[:90])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(CapacityError, match="No space left on device"):
            answer(llm, source, target)
    assert expected.startswith(target.read_bytes())
    assert target.read_bytes()[-1:] != b"\n"
    for error in (RuntimeError("lost"), KeyboardInterrupt()):
        steps = itertools.count()

        def failing(steps: Iterator[int] = steps, error: BaseException = error) -> Any:
            if next(steps) == 5:
                raise error
            return real_step()

        with monkeypatch.context() as patch:
            patch.setattr(llm._engine, "step", failing)
            with pytest.raises(type(error)):
                answer(llm, source, target)
        assert not llm._engine.has_work
        assert not llm._streams
        assert expected.startswith(target.read_bytes())
    answer(llm, source, target)
    assert target.read_bytes() == expected


CHANGED = {
    "input": ({}, ["another input"]),
    "order": ({"ordered": False}, ["ordered true, now false"]),
    "sampling": (
        {"params": SamplingParams(temperature=0.5, max_tokens=8, stop=("x",))},
        ["temperature 0, now 0.5", "stop [], now ['x']"],
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_run_with_other_settings_is_refused(case: str, llm: LLM, whole: tuple[Path, bytes], tmp_path: Path) -> None:
    source, expected = whole
    target = tmp_path / "out.jsonl"
    answer(llm, source, target)
    target.write_bytes(expected[:500])
    settings, words = CHANGED[case]
    if case == "input":
        source = write(tmp_path / "in.jsonl", prompts(3))
    with pytest.raises(ConfigError) as caught:
        answer(llm, source, target, **settings)
    for word in ("was begun with other settings", "--overwrite", *words):
        assert word.replace("true", "True").replace("false", "False") in str(caught.value)
    assert target.read_bytes() == expected[:500]
    answer(llm, source, target, **settings, overwrite=True)
    assert len(read(target)) == (3 if case == "input" else 16)


def test_outputs_that_cannot_be_continued(llm: LLM, whole: tuple[Path, bytes], tmp_path: Path) -> None:
    source, expected = whole
    target = tmp_path / "out.jsonl"
    target.write_text("my diary\n")
    with pytest.raises(ConfigError, match=r"no run began|no run was begun"):
        answer(llm, source, target)
    assert target.read_text() == "my diary\n"
    job_file(target).write_text("{")
    with pytest.raises(ConfigError, match=r"out.jsonl.job: cannot be read"):
        answer(llm, source, target)
    target.write_bytes(b"")  # nothing can be lost
    answer(llm, source, target)
    rows = expected.splitlines(keepends=True)
    for changed in (
        [*rows[:2], b"edited\n", *rows[3:]],
        [rows[1], rows[0]],
        [rows[0], rows[0]],
        [b'{"line": 99, "error": ""}\n'],
        [b'{"line": 0, "error": ""}\n'],
    ):
        target.write_bytes(b"".join(changed))
        with pytest.raises(ConfigError, match=r"was changed by something else"):
            answer(llm, source, target)
        assert target.read_bytes() == b"".join(changed)
    target.write_bytes(b"".join([rows[0], *rows[2:5]]))
    with pytest.raises(ConfigError, match=r"has lines after line 2 but not that one"):
        answer(llm, source, target)
    other = tmp_path / "other.jsonl"
    with (
        Output(other, {}, 9, ordered=True, overwrite=False),
        pytest.raises(ConfigError, match=r"another process is writing it"),
    ):
        answer(llm, source, other)


def test_an_input_that_changes_meanwhile(llm: LLM, whole: tuple[Path, bytes], tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(whole[0].read_bytes())
    lines = Lines.scan(source)
    with source.open("ab") as file:
        file.write(b'{"prompt": "one more"}\n')
    with pytest.raises(ConfigError, match=r"in.jsonl: was changed while it was read"):
        answer_lines(llm, lines, tmp_path / "out.jsonl", SamplingParams(), facts={}, quiet=True)


# Memory and pace


def test_a_slow_line_holds_back_few_others(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, answers wait in memory for an earlier one: no more than WINDOW lines are under way."""
    monkeypatch.setattr(jsonl, "WINDOW", 12)
    rows = [{"prompt": "a", "max_tokens": 150 if n % 40 == 0 else 1, "ignore_eos": True} for n in range(80)]
    source = write(tmp_path / "in.jsonl", rows)
    lines = Lines.scan(source)
    most = 0
    with Output(tmp_path / "out.jsonl", {}, lines.last, ordered=True, overwrite=False) as output:
        params = SamplingParams(temperature=0)
        run = module.Run(llm, lines, output, Reader(params, 0), module.Tally(lines=80), ordered=True)
        for _ in run.answers():
            most = max(most, len(run._answers._due))
    assert 8 < most <= 12
    assert [one["line"] for one in read(tmp_path / "out.jsonl")] == list(range(1, 81))


def test_requests_are_taken_as_they_are_needed(llm: LLM) -> None:
    """An endless iterator is fine; closing the result frees the engine."""
    taken = 0

    def endless() -> Iterator[tuple[int, list[int], SamplingParams] | None]:
        nonlocal taken
        for taken in itertools.count(1):
            yield taken, [taken % 200 + 1], SamplingParams(temperature=0, max_tokens=taken % 3 + 1, ignore_eos=True)
            if taken % 3 == 0:
                yield None

    results = llm.run(endless(), ahead=6)
    seen = []
    for key, outcome in results:
        assert not isinstance(outcome, Exception)
        assert len(outcome.outputs[0].token_ids) == key % 3 + 1
        seen.append(key)
        assert taken <= len(seen) + 6
        if len(seen) == 30:
            break
    results.close()  # type: ignore[attr-defined]  # a generator
    assert len(set(seen)) == 30
    assert not llm._engine.has_work
    assert not llm._streams


def test_a_request_that_cannot_be_served_does_not_stop_the_others(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=2)
    asked: list[tuple[str, Any, SamplingParams]] = [("a", [5], params), ("b", [-1], params), ("c", "x", params)]
    outcomes = dict(llm.run(iter(asked), ahead=2))
    assert isinstance(outcomes["b"], RequestError)
    for key in "ac":
        assert not isinstance(outcomes[key], Exception)


def test_other_calls_may_come_in_between(llm: LLM) -> None:
    """What the engine brings for one caller while another one steps it is not lost."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    alone = llm.generate([[7]], params)[0]
    results = llm.run(((n, [n], params) for n in range(5, 15)), ahead=3)
    found = {}
    for key, outcome in results:
        found[key] = outcome
        assert llm.generate([[7]], params)[0].outputs == alone.outputs
    assert len(found) == 10
    assert found[7].outputs == alone.outputs  # type: ignore[union-attr]  # no error


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    with source.open("w") as file:
        for number in range(50_000):
            file.write(json.dumps({"id": f"line number {number}", "prompt": "x" * 100}) + "\n")
    tracemalloc.start()
    try:
        lines = Lines.scan(source)
        reader = Reader(SamplingParams(), 0)
        for number, content in lines:
            reader.identify(number, content)
        assert lines.filled == lines.last == 50_000
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_progress_counts_what_is_left(
    llm: LLM, whole: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = whole
    target = tmp_path / "out.jsonl"
    answer(llm, source, target)
    target.write_bytes(b"".join(expected.splitlines(keepends=True)[:6]))
    seen: list[tuple[str, int, int]] = []
    monkeypatch.setattr(module.Bars, "update", lambda self, *values: seen.append(values))
    answer(llm, source, target)
    assert seen[0] == ("answer", 0, 10)
    assert seen[-1] == ("answer", 10, 10)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_fingerprint_tells_models_apart(tiny: Path, smollm2: Path, tmp_path: Path) -> None:
    assert fingerprint("no/such-model") == "no/such-model"
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert fingerprint(str(copy)) == fingerprint(str(tiny)) != fingerprint(str(smollm2))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert fingerprint(str(copy)) != fingerprint(str(tiny))


# The command line

USAGE = {
    "neither": ([], ["--prompt TEXT", "--prompt-file"]),
    "both": (["--prompt", "a", "--prompt-file", "in.jsonl"], ["give one of the two"]),
    "no output": (["--prompt-file", "in.jsonl"], ["needs --output"]),
    "output alone": (["--prompt", "a", "--output", "out.jsonl"], ["--output goes with --prompt-file"]),
    "order alone": (["--prompt", "a", "--no-ordered"], ["goes with --prompt-file"]),
    "overwrite alone": (["--prompt", "a", "--overwrite"], ["--overwrite goes with --prompt-file"]),
    "no input": (["--prompt-file", "no.jsonl", "--output", "out.jsonl"], ["no.jsonl: no such prompt file"]),
    "input is a folder": (["--prompt-file", ".", "--output", "out.jsonl"], ["is no regular file"]),
    "output is a folder": (["--prompt-file", "in.jsonl", "--output", "."], ["is no regular file"]),
    "output is a device": (["--prompt-file", "in.jsonl", "--output", "/dev/null"], ["is no regular file"]),
    "no folder": (["--prompt-file", "in.jsonl", "--output", "no/out.jsonl"], ["there is no folder no"]),
    "itself": (["--prompt-file", "in.jsonl", "--output", "in.jsonl"], ["is the prompt file itself"]),
    "its own job": (["--prompt-file", "x.job", "--output", "x"], ["is the prompt file itself"]),
    "foreign": (["--prompt-file", "in.jsonl", "--output", "diary.txt"], ["diary.txt", "--overwrite"]),
    "bad parameter": (["--prompt-file", "in.jsonl", "--output", "o", "--temperature", "3"], ["temperature=3.0"]),
}  # fmt: skip


@pytest.mark.parametrize("case", USAGE)
def test_usage(case: str, run: Run, tmp_path: Path) -> None:
    """Told before any model is looked at; nothing is left behind."""
    for name in ("in.jsonl", "x.job"):
        write(tmp_path / name, [{"prompt": "a"}])
    (tmp_path / "diary.txt").write_text("dear diary\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    arguments, words = USAGE[case]
    check_refusal(run("generate", "no-model.gguf", *arguments), *words)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_that_does_not_load_leaves_no_output(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [{"prompt": "a"}])
    check_refusal(run("generate", "no-model.gguf", "--prompt-file", "in.jsonl", "--output", "o"), "no-model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_other_settings_are_told_before_the_model_is_loaded(run: Run, tiny: Path, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", prompts(3))
    flags = ("generate", tiny, "--prompt-file", "in.jsonl", "--output", "out.jsonl", *EXACT)
    assert run(*flags).code == 0
    ran = run(*flags, "--seed", "8")
    check_refusal(ran, "was begun with other settings (seed 0, now 8)", "--overwrite")
    assert "context" not in ran.err
    check_refusal(run(*flags, "--max-model-len", "64"), "max_model_len 256, now 64")
    check_refusal(run(*flags, "--sparsity", "dynamic", "--token-budget", "128"), "(sparsity None, now {'streaming'")
    assert run(*flags, "--max-num-seqs", "2").code == 0
    assert run(*flags, "--seed", "8", "--overwrite").code == 0


def server() -> Any:
    """A way to start processes in which everything is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["omniserve.llm", "omniserve.cli.app"])
    return context


def command(arguments: list[str], out: str) -> None:
    """The command line in a process of its own, whose words go to a file."""
    import torch

    torch.set_num_threads(1)
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os._exit(main(arguments))


def lines_in(target: Path) -> int:
    return target.read_bytes().count(b"\n") if target.exists() else 0


def stop(context: Any, arguments: list[str], target: Path, more: int, delay: float, number: int) -> int:
    """Start the command, send it a signal a while after `more` lines have come, and return its exit code."""
    log, there = Path(str(target) + ".log"), lines_in(target)
    process = context.Process(target=command, args=(arguments, str(log)))
    process.start()
    until = time.monotonic() + 120
    while process.is_alive() and lines_in(target) < there + more:
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(process.pid, number)
    process.join()
    code: int = process.exitcode
    process.close()
    return code


def test_killed_three_times(tiny: Path, llm: LLM, tmp_path: Path) -> None:
    rows = prompts(60)
    for row in rows:
        row["max_tokens"] *= 5  # time to be killed in
    source = write(tmp_path / "in.jsonl", rows)
    answer(llm, source, tmp_path / "expected.jsonl")
    expected = (tmp_path / "expected.jsonl").read_bytes()
    target = tmp_path / "out.jsonl"
    flags = ["generate", str(tiny), "--prompt-file", str(source), "--output", str(target), "--max-tokens", "8", *EXACT]
    flags += ["--max-num-seqs", "4"]
    context, rng = server(), random.Random(3)
    for _ in range(3):
        assert stop(context, flags, target, 6, rng.uniform(0, 0.02), signal.SIGKILL) == -signal.SIGKILL
        assert lines_in(target) < 60
        assert expected.startswith(target.read_bytes())
    began = time.monotonic()
    assert stop(context, flags, target, 1, 0, signal.SIGINT) == 130
    assert time.monotonic() - began < 30
    log = Path(str(target) + ".log").read_text()
    assert "of 60 lines there; the same command goes on" in log
    assert "Traceback" not in log
    process = context.Process(target=command, args=(flags, str(target) + ".log"))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert target.read_bytes() == expected
    assert "60 lines, 60 answered, 0 with an error" in Path(str(target) + ".log").read_text()


@pytest.mark.long
@pytest.mark.parametrize("ordered", [True, False])
def test_two_thousand_prompts_killed_ten_times(ordered: bool, smollm2: Path, tmp_path: Path) -> None:
    """The real model; each run is killed at a random moment, also while it loads."""
    rng = random.Random(11)
    rows = [{"prompt": f"Question {n}: " + " ".join(rng.choices(WORDS, k=rng.randint(3, 30)))} for n in range(2000)]
    source, target = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    flags = ["generate", str(smollm2), "--prompt-file", str(source), "--output", str(target)]
    flags += ["--max-tokens", "16", "--precision", "w8a8kv8", "--max-model-len", "256", "--max-num-seqs", "32"]
    flags += [] if ordered else ["--no-ordered"]
    context = server()
    before = b""
    for kill in range(10):
        more, delay = (0, rng.uniform(0, 4)) if kill % 3 == 0 else (rng.randrange(1, 180), rng.uniform(0, 0.3))
        stop(context, flags, target, more, delay, signal.SIGKILL)
        there = target.read_bytes() if target.exists() else b""
        assert there[: before.rfind(b"\n") + 1] == before[: before.rfind(b"\n") + 1], kill
        before = there
    assert 0 < lines_in(target) < 2000
    command_line = [sys.executable, "-m", "omniserve", *flags]
    ran = subprocess.run(command_line, capture_output=True, text=True, env=environment())
    assert ran.returncode == 0, ran.stderr
    found = read(target)
    numbers = [one["line"] for one in found]
    assert (numbers if ordered else sorted(numbers)) == list(range(1, 2001))
    assert all(one["usage"]["completion_tokens"] <= 16 and "text" in one for one in found)
