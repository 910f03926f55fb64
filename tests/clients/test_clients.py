"""Unmodified clients against `omniserve serve`: see docs/clients.md. What needs an environment of its own is long.

Environments are kept in `.clients/`, or in the folder that `$CLIENTS` names.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands import environment
from tests.clients.client import CLIENTS, ENVIRONMENTS, HERE, command
from tests.server.harness import Server

FOLDER = Path(os.environ.get("CLIENTS", ENVIRONMENTS))
KEY = "sk-clients"
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def serve(*arguments: object) -> Server:
    return Server(["omniserve", "serve", *map(str, arguments), "--port", "0"])


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Iterator[Server]:
    """The real model, loaded as the offline API of use_lm_eval.py does; its template knows nothing of tools."""
    engine = ["--precision", "w8a8kv8", "--max-model-len", 2048, "--max-num-seqs", 16]
    server = serve(smollm2, *engine, "--tool-call-parser", "hermes")
    yield server
    server.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that costs next to nothing, behind a key: what counts is which requests are taken."""
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    shape = [
        "--load-format",
        "dummy",
        "--shape",
        "tiny",
        "--max-model-len",
        64,
        "--chat-template",
        template,
        "--tool-call-parser",
        "hermes",
    ]
    server = serve(*shape, "--api-key", KEY)
    yield server
    server.close()


def check(words: list[str], seconds: float) -> str:
    """Run a script, which must succeed, and return what it printed."""
    inherited = {name: value for name, value in environment().items() if not name.lower().endswith("_proxy")}
    ran = subprocess.run(words, capture_output=True, text=True, env=inherited, timeout=seconds)
    print(ran.stdout)  # shown if it fails, or by `pytest -rP`
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_openai(real: Server, smollm2: Path) -> None:
    """The version that the tests are installed with."""
    check(command("openai", real.url, smollm2, FOLDER), 600)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name, client in CLIENTS.items() if client.pins is not None])
def test_clients_of_their_own_environment(real: Server, smollm2: Path, name: str) -> None:
    check(command(name, real.url, smollm2, FOLDER), 1800)


@pytest.mark.long
def test_hey_and_wrk(real: Server, smollm2: Path) -> None:
    if not (shutil.which("hey") and shutil.which("wrk")):
        pytest.skip("hey or wrk is missing: apt-get install hey wrk")
    check(command("hey", real.url, smollm2, FOLDER), 600)


@pytest.mark.parametrize("examples", [10, pytest.param(50, marks=pytest.mark.long)])
def test_schemathesis(small: Server, examples: int) -> None:
    """No 5xx on any input, nothing that the OpenAPI file does not declare."""
    script = str(HERE / "use_schemathesis.py")
    said = check([sys.executable, script, small.url, KEY, str(examples)], 1200)
    assert "No issues found" in said
    assert "9 selected / 10 total" in said  # all but the endless stream
    assert "step failed" not in small.log
