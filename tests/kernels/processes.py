"""Processes for Triton: whether kernels are interpreted or compiled is decided when they are defined."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, interpret: bool, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python on `arguments` in the repository's root, one thread, with Triton interpreting or compiling."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    variables |= {"TRITON_INTERPRET": "1"} if interpret else {}
    variables |= {} if cache is None else {"TRITON_CACHE_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT, env=variables, timeout=900
    )
