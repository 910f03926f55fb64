"""`demo --serve`: the demo's model behind a server, and lines that talk with it as they stand."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.commands import ROOT, Ran, check_refusal, environment
from tests.server.harness import Server

CODE = """
import sys
from pathlib import Path
from omniserve.cli import demo, main

demo.find_smollm2 = lambda folder: Path(sys.argv[1])
demo._calibrated = lambda model, folder: model
sys.exit(main.main(["demo", "--serve", "--port", "0", *sys.argv[2:]]))
"""


class Demo(Server):
    COMMAND = (sys.executable, "-c", CODE)


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[Server]:
    server = Demo([str(tiny), "--max-num-queued-reqs", "7"])
    yield server
    server.close()


def test_the_lines_do_what_they_say(served: Server) -> None:
    log = served.until(r"(?s)Ready on .*in a browser").group()
    assert "(page, docs, metrics); model tiny" in log
    lines = [line.strip() for line in log.splitlines()[1:]]
    curl, chat, top, page = lines
    assert shutil.which("curl"), "curl is missing"
    answer = subprocess.run(shlex.split(curl), capture_output=True, text=True, timeout=60, check=True)
    assert '"object":"chat.completion"' in answer.stdout
    assert chat == f"python -m omniserve chat --url {served.url}/v1"
    words = [sys.executable, *shlex.split(chat)[1:], "-q", "Is water wet?", "--max-tokens", "3"]
    said = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT, env=environment())
    assert said.stdout.strip()
    assert top == f"python -m omniserve top --url {served.url}/v1"
    assert re.fullmatch(rf"{served.url}/ in a browser", page)


def test_flags_of_the_server_go_with_serve(run: Callable[..., Ran]) -> None:
    check_refusal(run("demo", "--port", "9"), "--port goes with --serve")
    check_refusal(run("demo", "--served-model-name", "x"), "--served-model-name goes with --serve")
