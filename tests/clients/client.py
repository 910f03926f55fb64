"""The clients and their environments; `python -m tests.clients.client NAME http://127.0.0.1:8000` runs one by hand."""

import argparse
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
ENVIRONMENTS = ROOT / ".clients"
"""Where environments are kept unless the caller names another folder. Git ignores it."""


@dataclass(frozen=True)
class Client:
    """A script and what it runs in.

    pins    file of pins/ that its environment is made from; None: the environment of the tests
    inside  whether the script runs in that environment; otherwise it runs in that of the tests, and gets the model's
            path and the folder of the client's executables
    """

    script: str
    pins: str | None = None
    inside: bool = False


CLIENTS = {
    "openai": Client("use_openai.py"),
    "openai-2": Client("use_openai.py", pins="openai-2", inside=True),
    "langchain": Client("use_langchain.py", pins="langchain", inside=True),
    "lm-eval": Client("use_lm_eval.py", pins="lm-eval"),
    "aiperf": Client("use_aiperf.py", pins="aiperf"),
    "guidellm": Client("use_guidellm.py", pins="guidellm"),
    "hey": Client("use_hey.py"),
}


def environment(pins: str, folder: Path) -> Path:
    """Return the folder of an environment's executables, which is made unless it is there with the same pins."""
    made, wanted = folder / pins, HERE / "pins" / f"{pins}.txt"
    stamp = made / wanted.name
    if not stamp.is_file() or stamp.read_text() != wanted.read_text():
        venv.create(made, clear=True, with_pip=True)
        install = [made / "bin" / "python", "-m", "pip", "install", "--quiet", "-r", wanted]
        subprocess.run([str(word) for word in install], check=True)
        shutil.copyfile(wanted, stamp)
    return made / "bin"


def command(name: str, url: str, model: Path, environments: Path) -> list[str]:
    """Return the command that runs a client against a server of `model`."""
    client = CLIENTS[name]
    script = str(HERE / client.script)
    if client.pins is None:
        return [sys.executable, script, url]
    executables = environment(client.pins, environments)
    if client.inside:
        return [str(executables / "python"), script, url]
    return [sys.executable, script, url, str(model), str(executables)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CLIENTS)
    parser.add_argument("url", help="address of a server that serves MODEL as w8a8kv8")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    given = parser.parse_args()
    return subprocess.run(command(given.name, given.url, given.model, given.environments)).returncode


if __name__ == "__main__":
    sys.exit(main())
