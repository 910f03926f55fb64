"""What the kernels ask of the card, and how they refuse what they cannot do."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from omniserve.base.errors import ConfigError
from omniserve.ops.dispatch import Operation, implements

OLDEST = (8, 0)
"""The first compute capability with int8 tensor cores and asynchronous copies as these kernels use them."""

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""True where Triton runs kernels in Python, on the CPU: inline PTX does not exist there, plain twins take its place."""

GLUON = ("3.6.0",)
"""Triton versions that the kernels in Gluon were tested with; under others those in Triton take their place."""

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Shared memory that one block of threads may use, by compute capability times ten."""

OUTPUTS = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of results."""

NEEDS = f"an NVIDIA GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or newer"
"""What `capable` asks for, for people."""


@functools.cache
def capable() -> bool:
    """True if the GPU here is new enough."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= OLDEST


@functools.cache
def architecture() -> int:
    """Return the compute capability times ten; the interpreter plays a 9.0."""
    if INTERPRETED:
        return 90
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


@functools.cache
def pdl() -> bool:
    """Whether a kernel may start while the one before it still runs (programmatic dependent launch)."""
    return not INTERPRETED and torch.cuda.is_available() and architecture() >= 90


@functools.cache
def processors() -> int:
    """Return how many streaming multiprocessors the card has; the interpreter plays a small one."""
    return 8 if INTERPRETED else torch.cuda.get_device_properties(0).multi_processor_count


def cache_folder(given: Path | None = None) -> str:
    """Return where compiled kernels are kept, by names that hold versions and card; `given` makes it another folder."""
    if given is not None:
        triton.knobs.cache.dir = str(given)
    return str(triton.knobs.cache.dir)


def kernel_of(
    operation: Operation[..., Any], inside: Callable[[], str] = str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the implementation of an operation on NVIDIA GPUs.

    inside: for people, which of several kernels serve on this card
    """
    return implements(operation, device="cuda", when=capable, needs=NEEDS, inside=inside)


def need(condition: bool, what: str) -> None:
    """Raise ConfigError unless a kernel can take its arguments; `what` says what was given and what is allowed."""
    if not condition:
        raise ConfigError(f"{what}; `--backend reference` computes it without the kernel")
