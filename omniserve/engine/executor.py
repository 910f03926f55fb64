"""How steps reach the ranks."""

from omniserve.base.types import Step
from omniserve.engine.runner import Drawn, Runner


class LocalExecutor:
    """One rank in this process; a CUDA device works while the host goes on, a CPU works within `submit`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def submit(self, step: Step) -> Drawn:
        """Hand a step to the device; results come in the order of submission."""
        return self._runner.run(step)

    def close(self) -> None:
        """Nothing to stop: the rank lives in this process."""
