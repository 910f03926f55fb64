"""Engine processes that the tests start in place of the real one: in float64, or with a fault.

`python -c "from tests.server.engines import main; main()" KIND SOCKET PATHS...`; kinds:

float64      the model, with the reference in float64, where laws hold token for token
raise N      without a model: step N raises; with `always N` so do all that follow
hang N       step N never ends
kill N       the process is killed in step N
"""

import os
import signal
import sys
import time

from omniserve.base.types import Step
from omniserve.engine.engine import Engine, Executor, Handle
from omniserve.engine.process import Link, Ready, Start, described, load_engine, work

CODE = "import sys; sys.path[:] = sys.argv[3:]; from tests.server.engines import main; main()"


def command(kind: str) -> list[str]:
    """The engine's command line; the server adds the socket and the module paths."""
    return [sys.executable, "-P", "-c", CODE, kind]


def no_pickle(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook that tells of every class that a pickle asks for."""
    if event == "pickle.find_class":
        os.write(2, f"a pickle asked for {arguments}\n".encode())


def main() -> None:
    sys.addaudithook(no_pickle)
    kind, path = sys.argv[1:3]
    work(path, load=lambda start, link: load(kind, start, link))


def load(kind: str, start: Start, link: Link) -> tuple[Engine, Ready]:
    word, _, number = kind.partition(" ")
    if word == "float64":
        from omniserve.engine.build import build

        built = build(start.model, start.options, dtype="float64")
        return built.engine, described(built)
    engine, ready = load_engine(start, link)
    engine.executor = Faulty(engine.executor, word, int(number))
    return engine, ready


class Faulty:
    """Counts steps from 1, warm-up included (2), and fails in one."""

    def __init__(self, executor: Executor, fault: str, number: int) -> None:
        self.executor = executor
        self.fault = fault
        self.number = number
        self.steps = 0

    def submit(self, step: Step) -> Handle:
        self.steps += 1
        if self.steps == self.number or (self.fault == "always" and self.steps > self.number):
            match self.fault:
                case "raise" | "always":
                    raise RuntimeError("a fault at /secret/path 0xdeadbeef")
                case "hang":
                    time.sleep(3600)
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
        return self.executor.submit(step)

    def close(self) -> None:
        self.executor.close()
