"""The table of implementations at start-up is what runs: compared with a traced run (row 25 of docs/security.md)."""

import logging
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omniserve import LLM, SamplingParams
from omniserve.ops.dispatch import TABLE
from tests.cli.conftest import tiny

__all__ = ["tiny"]
ALWAYS = {"add_norm", "rope_write", "attend", "sample"}
BY_WEIGHT = {"w16a16": {"gemm_w16a16"}, "w8a8": {"gemm_w8a8", "quantize"}, "w4a8": {"quantize"}}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Names of the implementations that ran, by operation."""
    found: dict[str, set[str]] = defaultdict(set)

    def noted(operation: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            found[operation].add(name)
            return function(*arguments, **named)

        return run

    for name, operation in TABLE.items():
        implementations = [
            replace(one, function=noted(name, one.name, one.function)) for one in operation.implementations
        ]
        monkeypatch.setattr(operation, "implementations", implementations)
        monkeypatch.setattr(operation, "reference", noted(name, "reference", operation.reference))
        monkeypatch.setattr(operation, "_chosen", {})
    return found


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("precision", ["w16a16kv16", "w8a8kv8", "w4a8kv4"])
def test_what_was_announced_is_what_runs(
    tiny: Path, precision: str, backend: str, seen: dict[str, set[str]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "omniserve"):
        llm = LLM(tiny, precision=precision, backend=backend, max_model_len=256)
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("operations ")]
    announced = dict(re.findall(r"(\w+)=(\w+)", line))
    seen.clear()  # loading quantizes, and may use what serves nothing
    with llm:
        llm.generate([[1, 2, 3] * 30, [4, 5]], SamplingParams(temperature=0.7, seed=1, max_tokens=4, ignore_eos=True))
        assert llm.operations() == announced
    assert seen == {name: {announced[name]} for name in seen}
    assert ALWAYS | BY_WEIGHT[precision.split("kv")[0]] <= seen.keys()
    if backend == "reference":
        assert set(announced.values()) == {"reference"}
