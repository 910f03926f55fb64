"""Engine processes that the tests start in place of the real one: in float64, or with a fault.

`python -c "from tests.server.engines import main; main()" KIND SOCKET PATHS...`; kinds:

float64       the model, with the reference in float64, where laws hold token for token
poison N      the same, and the embedding of token N is not a number
FAULT WHEN    without a model: a step fails. FAULT: raise; always (so do all that follow); hang (it never ends);
              kill (the process ends in it); wait (it and all that follow wait until the path is gone). WHEN: the
              number of the step, warm-up included (2), or a path: the first step that finds it there
say TEXT      without a model: every answer is this text, a byte for each token, over and over
marked        without a model: fails where the first token of a prompt says so (QUEUE, PLAN, STEP); after every step
              the scheduler's invariants are checked
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from omniserve.base.types import Output, Request, Step, StepResult
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
    word, _, when = kind.partition(" ")
    if word in ("float64", "poison"):
        from omniserve.engine.build import build

        built = build(start.model, start.options, dtype="float64")
        if word == "poison":
            poison(built.engine, int(when))
        return built.engine, described(built)
    engine, ready = load_engine(start, link)
    if word == "marked":
        mark(engine)
    elif word == "say":
        engine.executor = Parrot(engine.executor, when)
    else:
        engine.executor = Faulty(engine.executor, word, when)
    return engine, ready


QUEUE, PLAN, STEP = 250, 251, 252


def mark(engine: Engine) -> None:
    """Make an engine fail at marked requests."""
    scheduler = engine.scheduler
    add, reserve, submit, step = scheduler.add, scheduler.cache.reserve, engine.executor.submit, engine.step

    def fail_at(mark: int, tokens: Sequence[int]) -> None:
        if tokens and tokens[0] == mark:
            raise RuntimeError("a fault at /secret/path 0xdeadbeef")

    def marked_add(request: Request) -> None:
        fail_at(QUEUE, request.tokens)
        add(request)

    def marked_reserve(request: Request, count: int) -> bool:
        fail_at(PLAN, request.tokens)
        return reserve(request, count)

    def marked_submit(planned: Step) -> Handle:
        for each in planned.works:
            fail_at(STEP, each.new_tokens)
        return submit(planned)

    def checked_step() -> list[Output]:
        outputs = step()
        scheduler.check()
        return outputs

    scheduler.add = marked_add  # type: ignore[method-assign]
    scheduler.cache.reserve = marked_reserve  # type: ignore[method-assign]
    engine.executor.submit = marked_submit  # type: ignore[method-assign]
    engine.step = checked_step  # type: ignore[method-assign]


def poison(engine: Engine, token: int) -> None:
    """Spoil one weight of a loaded model: a checkpoint that holds NaN is not loaded at all."""
    from omniserve.engine.executor import LocalExecutor

    executor = engine.executor
    assert isinstance(executor, LocalExecutor)
    executor._runner.model.embedding[token, 3] = float("nan")


class Faulty:
    """Fails in the step that it is told."""

    def __init__(self, executor: Executor, fault: str, when: str) -> None:
        self.executor = executor
        self.fault = fault
        self.number = int(when) if when.isdecimal() else None
        self.path = Path(when)
        self.steps = 0
        self.failed = False

    def submit(self, step: Step) -> Handle:
        self.steps += 1
        if self._due():
            self.failed = True
            match self.fault:
                case "raise" | "always":
                    raise RuntimeError("a fault at /secret/path 0xdeadbeef")
                case "hang":
                    time.sleep(3600)
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "wait":
                    while self.path.exists():
                        time.sleep(0.01)
        return self.executor.submit(step)

    def _due(self) -> bool:
        if self.fault == "always" and self.failed:
            return True
        if self.number is not None:
            return self.steps == self.number
        return self.path.exists() and (self.fault == "wait" or not self.failed)

    def close(self) -> None:
        self.executor.close()


class Parrot:
    """Says a text in the letters that the tokenizer of dummy weights knows."""

    def __init__(self, executor: Executor, text: str) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        alphabet = {sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.tokens: list[int] = tokenizer.encode(text).ids
        self.executor = executor

    def submit(self, step: Step) -> Handle:
        drawn = {
            work.request: self.tokens[(work.start + work.count - work.prompt) % len(self.tokens)]
            for work in step.works
            if work.draws
        }
        return _Said(self.executor.submit(step), StepResult(tokens=drawn))

    def close(self) -> None:
        self.executor.close()


class _Said:
    def __init__(self, handle: Handle, result: StepResult) -> None:
        self.handle = handle
        self.said = result

    def result(self) -> StepResult:
        self.handle.result()
        return self.said
