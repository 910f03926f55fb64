"""What the tests of the command line share: a finished command, the rules of a refusal, a subprocess's environment."""

import os
from dataclasses import dataclass
from pathlib import Path

CONTEXT = 256
"""Tokens that the tiny model takes."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def check_refusal(ran: Ran, *words: str) -> None:
    """Exit code 2, nothing on standard output, one sentence that holds `words`."""
    assert ran.code == 2, ran
    assert ran.out == ""
    last = ran.err.strip().splitlines()[-1]
    assert last.startswith("omniserve: error: "), ran.err
    assert "Traceback" not in ran.err
    assert "0x" not in last
    for word in words:
        assert word in last, (word, last)


def environment() -> dict[str, str]:
    """The environment of a subprocess: this checkout first, one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
