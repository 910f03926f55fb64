"""Dummy weights on the command line: no MODEL, and a label in every output."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.commands import Ran, check_refusal

Run = Callable[..., Ran]
TINY = ("--dummy-weights", "--shape", "tiny")
LABEL = "tiny (dummy weights)"
BENCH = ("bench", "throughput", "--batch", "2", "--input-len", "8", "--output-len", "4", "--repeats", "1")


def done(ran: Ran) -> Ran:
    assert ran.code == 0, ran
    return ran


def test_benchmark(run: Run) -> None:
    ran = done(run(*BENCH, *TINY, "--json", "--precisions", "w8a8kv8,w16a16kv16"))
    found = json.loads(ran.out)
    assert (found["model"], found["dummy_weights"]) == (LABEL, True)
    assert len(found["rows"]) == 2
    assert f"warning: {LABEL}: speed and memory are real" in ran.err
    assert LABEL in done(run(*BENCH, *TINY)).out


def test_a_model_is_no_dummy(run: Run, tiny: Path) -> None:
    found = json.loads(done(run(*BENCH, tiny, "--json")).out)
    assert found["dummy_weights"] is False


def test_other_commands(run: Run, tmp_path: Path) -> None:
    flags = ("--max-tokens", "3", *TINY)
    ran = done(run("generate", "--prompt", "a", "--json", *flags))
    assert json.loads(ran.out)["model"] == LABEL
    assert f"warning: {LABEL}" in ran.err
    assert f"warning: {LABEL}" in done(run("generate", "--prompt", "a", "--load-format=dummy", "--shape=tiny")).err
    (tmp_path / "t.txt").write_text("one two three " * 20)
    ran = done(run("eval", "perplexity", "--text", "t.txt", "--length", "64", "--json", *TINY))
    assert json.loads(ran.out)["model"] == LABEL
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    ran = done(run("generate", "--prompt-file", "in.jsonl", "--output", "out.jsonl", *flags))
    assert f"warning: {LABEL}" in ran.err
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["generate", "--prompt", "a"], ["MODEL is missing"]),
        ([*BENCH], ["MODEL is missing"]),
        ([*BENCH, "--shape", "tiny"], ["shape=tiny", "load_format=dummy"]),
        ([*BENCH, "--dummy-weights"], ["give the shape"]),
        ([*BENCH, "x", *TINY], ["instead of the model"]),
        ([*BENCH, *TINY, "--peer", "transformers"], ["--peer transformers"]),
        (["chat", "-q", "a", *TINY], ["no chat template"]),
    ],
)
def test_refusals(command: list[str], words: list[str], run: Run, tmp_path: Path) -> None:
    check_refusal(run(*command), *words)
    assert list(tmp_path.iterdir()) == []
