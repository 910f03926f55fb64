"""The loop: plan the next step while the last one runs, then take in what has landed."""

from collections import deque
from typing import Protocol

from omniserve.base import log
from omniserve.base.errors import DeviceMemoryError
from omniserve.base.types import Output, Request, Step, StepResult
from omniserve.engine.scheduler import Scheduler

_LOG = log.get(__name__)


class Handle(Protocol):
    """A step on its way."""

    def result(self) -> StepResult:
        """Wait until the step has landed and return what it drew."""


class Executor(Protocol):
    """Runs steps, in the order of submission."""

    def submit(self, step: Step) -> Handle:
        """Hand a step to the ranks. Raises DeviceMemoryError, and then nothing of it counts."""

    def close(self) -> None:
        """Stop the ranks."""


class Engine:
    """Owns a scheduler, an executor and the steps in flight: with overlap one while the next is planned, else none.

    A step for which the device has not memory enough is cut: its requests start again, in smaller steps from then on.
    Any other exception leaves `step` as it came. If it was the executor's the requests in flight are aborted, if it
    was the plan's the one whose turn it was; the others start again, and what was already known comes with the next
    call.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, *, overlap: bool) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.overlap = overlap
        self._flight: deque[tuple[Step, Handle]] = deque()
        self._outputs: list[Output] = []

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished, a step in flight, or an output not handed out."""
        return self.scheduler.has_work or bool(self._flight) or bool(self._outputs)

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError or CapacityError if it can never be served."""
        self.scheduler.add(request)

    def abort(self, request_id: str) -> Output | None:
        """End a request and return its last output; None if it has ended already or never was."""
        return self.scheduler.abort(request_id)

    def step(self) -> list[Output]:
        """Run one step, or let the one in flight land, and return what came of it."""
        try:
            step = self.scheduler.plan()
        except Exception:
            self._outputs += self.scheduler.tear_up()
            raise
        try:
            if step.works:
                try:
                    self._flight.append((step, self.executor.submit(step)))
                except DeviceMemoryError as error:
                    if not self.scheduler.retreat(step):
                        raise
                    _LOG.warning("smaller steps %s", log.fields(tokens=self.scheduler.step_tokens, reason=error))
                    step = Step(works=())
            ahead = 1 if step.works and not step.sync and self.overlap else 0
            while len(self._flight) > ahead:
                issued, handle = self._flight.popleft()
                landed = self.scheduler.commit(issued, handle.result())
                for output in landed:
                    if output.fault is not None:
                        _LOG.error("request failed %s", log.fields(request=output.request, fault=output.fault))
                self._outputs += landed
        except BaseException:
            self._abandon()
            raise
        outputs, self._outputs = self._outputs, []
        return outputs

    def _abandon(self) -> None:
        self._outputs += self.scheduler.abandon()
        while self._flight:
            _, handle = self._flight.popleft()
            try:
                handle.result()  # wait for it: nothing of a lost step may run beside the next one
            except Exception:
                _LOG.warning("lost a step in flight", exc_info=True)

    def drain(self) -> list[Output]:
        """Step until nothing is left and return what came of it."""
        outputs: list[Output] = []
        while self.has_work:
            outputs += self.step()
        return outputs

    def close(self) -> None:
        """Abort all requests, let the steps in flight land and stop the ranks."""
        for request_id in self.scheduler.requests:
            self.scheduler.abort(request_id)
        try:
            self.drain()
        finally:
            self.executor.close()
