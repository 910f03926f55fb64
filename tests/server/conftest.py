"""Servers that several tests share. Those without a model start quickly; the tiny model is that of tests/cli."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import run, tiny
from tests.server.harness import Server, program

__all__ = ["run", "tiny"]


@pytest.fixture(scope="session")
def served(tiny: Path) -> Iterator[Server]:
    """The tiny model in float64, the settings of `omniserve serve`."""
    server = program(model=str(tiny), engine="float64", options={"precision": "w8a8kv8", "max_num_seqs": 32})
    yield server
    server.close()


@pytest.fixture(scope="session")
def null() -> Iterator[Server]:
    """No model, steps of 4 ms."""
    options = {"max_num_seqs": 256, "async_scheduling": True, "max_num_batched_tokens": 8192}
    server = program(null=0.004, options=options)
    yield server
    server.close()
