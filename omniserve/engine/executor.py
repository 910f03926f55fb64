"""How steps reach the ranks."""

import contextlib

import torch

from omniserve.base.errors import DeviceMemoryError
from omniserve.base.types import Step
from omniserve.engine.runner import Drawn, Runner
from omniserve.ops.dispatch import force_reference


class LocalExecutor:
    """One rank in this process; a CUDA device works while the host goes on, a CPU works within `submit`.

    reference  compute every operation by its reference, whatever implementations there are
    """

    def __init__(self, runner: Runner, *, reference: bool = False) -> None:
        self._runner = runner
        self._context = force_reference if reference else contextlib.nullcontext

    def submit(self, step: Step) -> Drawn:
        """Hand a step to the device; results come in the order of submission. Raises DeviceMemoryError."""
        try:
            with self._context():
                return self._runner.run(step)
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
        torch.cuda.empty_cache()  # not within the clause: the error holds the step's tensors
        raise DeviceMemoryError(f"a step of {step.tokens} tokens: {reason}")

    def close(self) -> None:
        """Nothing to stop: the rank lives in this process."""
