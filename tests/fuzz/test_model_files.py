"""Fuzzed model files end in one sentence: no traceback, no hang, bounded memory; reader.py sets the bounds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import ROOT, environment


def read(kind: str, count: int, folder: Path, *swept: str) -> dict[str, Any]:
    """Let another process read `count` fuzzed files, and the swept ones of some models; return its report."""
    command = [sys.executable, "-m", "tests.fuzz.reader", kind, str(count), str(folder), *swept]
    ran = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=120 + count / 5
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr[-6000:]}"
    report: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    sys.stdout.write(f"{kind}: {report}\n")
    return report


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_some_fuzzed_files(kind: str, tmp_path: Path) -> None:
    report = read(kind, 400, tmp_path, "llama", *(["quantized"] if kind == "safetensors" else []))
    assert report["fuzzed"] >= 400
    assert report["swept"] > 600
    assert report["sentences"] > 50, "the fuzzer does not reach into the readers"
    assert report.get("served", 0) > 10, "the fuzzer only makes files that are refused at once"


@pytest.mark.long
@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_ten_thousand_fuzzed_files(kind: str, tmp_path: Path) -> None:
    assert read(kind, 5000, tmp_path, "llama", "qwen2_moe")["fuzzed"] >= 5000
