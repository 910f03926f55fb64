"""What `from omniserve import LLM` costs: the heavy and the optional libraries are imported where they are used."""

import subprocess
import sys

LATER = ("cyclopts", "gguf", "jinja2", "rich", "transformers", "triton", "yaml")


def test_importing_the_package_leaves_heavy_libraries_alone() -> None:
    code = f"import sys, omniserve; omniserve.LLM; print(*[name for name in {LATER} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
