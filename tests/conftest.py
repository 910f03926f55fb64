"""Shared by all tests: one thread, hypothesis profiles, long tests on request, the real model, the time budget."""

import os
import signal
from collections import Counter, defaultdict
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CUDA_VISIBLE_DEVICES"] = (
    ""  # the tests are the CPU's, on a machine with a GPU too; tests.kernels.check is its
)
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background; commands under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"

BUDGET = {
    "arch": 30,
    "unit": 120,
    "parity": 60,
    "kernels": 150,
    "property": 240,
    "model": 120,
    "engine": 120,
    "cli": 120,
    "fuzz": 60,
    "quantize": 120,
    "server": 180,
    "clients": 60,
}
"""Seconds that `make test` may spend in each folder on 2 cores; with lint and set-up they stay under 20 minutes."""

hypothesis.settings.register_profile("default", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=1000, deadline=None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run tests marked long and the long hypothesis profile")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes minutes; runs with --long only")
    chosen = os.environ.get("HYPOTHESIS_PROFILE", "long" if config.getoption("--long") else "default")
    hypothesis.settings.load_profile(chosen)
    if not hasattr(config, "workerinput"):  # in the process that reports, not in its workers
        config.pluginmanager.register(Clock())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


class Clock:
    """Adds up the seconds of each folder of tests/ and prints them beside their budget at the end."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.tests: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        parts = Path(report.location[0]).parts
        folder = parts[1] if parts[0] == "tests" and len(parts) > 2 else "tests"
        self.seconds[folder] += report.duration
        self.tests[folder] += report.when == "setup"

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
    ) -> None:
        if not self.tests:
            return
        workers = config.getoption("numprocesses", None) or 1
        terminalreporter.section("time per folder")
        terminalreporter.line(f"seconds of the tests (setup included), shared by {workers} worker(s)")
        terminalreporter.line(f"{'folder':<12}{'tests':>8}{'seconds':>10}{'budget':>10}")
        for folder in sorted(self.seconds, key=lambda f: list(BUDGET).index(f) if f in BUDGET else len(BUDGET)):
            spent, budget = self.seconds[folder] / workers, BUDGET.get(folder)
            note = "  over" if budget is not None and spent > budget and not config.getoption("--long") else ""
            terminalreporter.line(f"{folder:<12}{self.tests[folder]:>8}{spent:>10.1f}{budget or '-':>10}{note}")
        total = sum(self.seconds.values()) / workers
        terminalreporter.line(f"{'all':<12}{sum(self.tests.values()):>8}{total:>10.1f}{sum(BUDGET.values()):>10}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model's GGUF file: `$SMOLLM2`, or the one that `make model` put into `.models/`."""
    path = Path(os.environ.get("SMOLLM2", MODEL))
    if not path.is_file():
        pytest.fail(f"{path} is missing: run `make model` to fetch it (98 MB)")
    return path


@pytest.fixture(scope="session")
def time_budget() -> dict[str, int]:
    """Seconds that `make test` may spend in each folder of tests/."""
    return BUDGET
