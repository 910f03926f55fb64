"""What the scripts of this folder share. Needs nothing but Python: clients have environments of their own."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

Subject = TypeVar("Subject")
IDLE = ("num_requests_running", "num_requests_waiting", "kv_pages_used")
"""Gauges that are 0, with any labels, when nobody uses the server."""
ABORTED = 'request_success_total{finished_reason="abort"}'
"""Counts what was dropped because its client had gone."""


def run(checks: Sequence[Callable[[Subject], str]], subject: Subject) -> None:
    """Call each check with `subject` and print its name, its seconds and the sentence that it returns.

    A check that fails raises, which ends the script with exit code 1.
    """
    for check in checks:
        began = time.monotonic()
        seen = check(subject)
        name = check.__name__.replace("_", " ")
        print(f"ok  {name} ({time.monotonic() - began:.1f} s): {seen}", flush=True)


def command(words: Sequence[object], environment: Mapping[str, str] | None = None, cwd: str | None = None) -> str:
    """Run a command and return its standard output; if it fails, end this script with all that it said."""
    ran = subprocess.run([str(word) for word in words], env=environment, cwd=cwd, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"{words[0]} ended with {ran.returncode}\n{ran.stdout}\n{ran.stderr}")
    return ran.stdout


def export_tokenizer(model: str, folder: Path) -> None:
    """Write the tokenizer folder of a model, with the omniserve of this interpreter."""
    command([sys.executable, "-m", "omniserve", "export-tokenizer", model, "-o", folder])


def get(url: str, key: str = "x") -> str:
    """The text at an address."""
    asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=60) as answer:
        return str(answer.read().decode())


def model(url: str) -> str:
    """Name of the one model that a server has."""
    (card,) = json.loads(get(f"{url}/v1/models"))["data"]
    return str(card["id"])


def metrics(url: str, key: str = "x") -> dict[str, float]:
    """The server's metrics as Prometheus writes them, without prefix and model name: `request_success_total{...}`."""
    text = re.sub(r',?model_name="[^"]*"', "", get(f"{url}/metrics", key)).replace("{}", "")
    return {name: float(value) for name, value in re.findall(r"^omniserve:(\S+) (\S+)$", text, re.MULTILINE)}


def until_idle(url: str, key: str = "x", seconds: float = 10) -> str:
    """Wait until nothing runs, waits or holds a page. A busy machine may take longer than the promised second."""
    began = time.monotonic()
    while any((now := {name: value for name, value in metrics(url, key).items() if name.startswith(IDLE)}).values()):
        if time.monotonic() - began > seconds:
            raise AssertionError(f"still {now} after {seconds:g} s")
        time.sleep(0.05)
    return ", ".join(f"{name} {value:g}" for name, value in now.items())
