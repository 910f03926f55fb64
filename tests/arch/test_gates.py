"""The lint rules that guard the design do bite: each forbidden habit, written in a product file, is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HABITS = {
    "module without docstring": ("D100", "X = 1\n"),
    "public function without docstring": ("D103", '"""M."""\n\n\ndef f() -> None:\n    pass\n'),
    "print": ("T201", '"""M."""\n\nprint(1)\n'),
    "environment": ("TID251", '"""M."""\n\nimport os\n\nX = os.environ["HOME"]\n'),
    "environment by getenv": ("TID251", '"""M."""\n\nfrom os import getenv\n\nX = getenv("HOME")\n'),
    "pickle": ("TID251", '"""M."""\n\nimport pickle\n'),
    "torch.load": ("TID251", '"""M."""\n\nimport torch\n\nX = torch.load("x")\n'),
}


def findings(path: str, code: str) -> set[str]:
    """The codes that ruff reports for `code`, were it the file `path` of the repository."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"]
    command += ["--stdin-filename", path, "-"]
    run = subprocess.run(command, input=code, capture_output=True, text=True, check=False, cwd=ROOT)
    return {line.split()[1] for line in run.stdout.splitlines() if line.startswith(path)}


@pytest.mark.parametrize("habit", HABITS)
def test_refused(habit: str) -> None:
    rule, code = HABITS[habit]
    assert rule in findings("omniserve/engine/sample.py", code)


def test_one_module_reads_the_environment() -> None:
    _, code = HABITS["environment"]
    assert "TID251" not in findings("omniserve/base/environment.py", code)


def test_every_folder_of_tests_has_a_budget(time_budget: dict[str, int]) -> None:
    folders = {path.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/test_*.py")}
    assert folders <= set(time_budget)
