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


TOOLS_TEMPLATE = (
    "{# <tool_call> #}{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}!{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Writes tools and calls in few tokens; what the model is to write is Hermes'."""


@pytest.fixture(scope="session")
def tooled(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tiny model in float64, with a chat template that knows tools."""
    template = tmp_path_factory.mktemp("templates") / "hermes.jinja"
    template.write_text(TOOLS_TEMPLATE)
    options = {"precision": "w8a8kv8", "chat_template": str(template)}
    server = program(model=str(tiny), engine="float64", options=options)
    yield server
    server.close()


@pytest.fixture(scope="session")
def null() -> Iterator[Server]:
    """No model, steps of 4 ms."""
    options = {"max_num_seqs": 256, "async_scheduling": True, "max_num_batched_tokens": 8192}
    server = program(null=0.004, options=options)
    yield server
    server.close()
