"""What `from omniserve import LLM` costs: the heavy and the optional libraries are imported where they are used."""

import subprocess
import sys

LATER = ("cyclopts", "gguf", "jinja2", "rich", "transformers", "triton", "yaml")
OF_A_SERVER = ("omniserve.server.run", "omniserve.text", "omniserve.formats.dummy", "omniserve.engine.process")


def test_importing_the_package_leaves_heavy_libraries_alone() -> None:
    code = f"import sys, omniserve; omniserve.LLM; print(*[name for name in {LATER} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_a_server_needs_no_torch() -> None:
    """The engine's process alone imports it: a second or two of start-up, and 200 MB."""
    code = f"import sys, {', '.join(OF_A_SERVER)}; print(*[name for name in ('torch', 'yaml') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
