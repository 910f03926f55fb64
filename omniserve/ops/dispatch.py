"""Operations: a contract with its torch reference, and the implementations registered for it.

An operation is called like a function. It runs the highest-ranked implementation whose predicate holds on the
device of its first tensor, or its reference; which one is never decided silently: `choices()` tells.
"""

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

KERNELS = {"cuda": "omniserve.kernels"}
"""The package whose import registers the implementations for a kind of device. It stands above this floor, so it is
loaded by name, when an operation is first asked who serves it there."""


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute an operation on one kind of device.

    For people: `needs` says what `when` asks for, `inside` which of its own kernels serve here.
    """

    name: str
    function: Callable[..., Any]
    device: str
    when: Callable[[], bool]
    rank: int
    needs: str = ""
    inside: Callable[[], str] = str


class Operation(Generic[P, T]):
    """A contract; calling it runs the chosen implementation."""

    def __init__(self, reference: Callable[P, T]) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.__doc__ = reference.__doc__
        self.implementations: list[Implementation] = []
        self._chosen: dict[str, Callable[..., Any]] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the implementation chosen for the device of the first tensor."""
        if _forced.reference:
            return self.reference(*args, **kwargs)
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        function = self._chosen.get(device)
        if function is None:
            function = self._chosen[device] = self.pick(device).function
        return function(*args, **kwargs)  # type: ignore[no-any-return]  # registered functions carry Any

    def pick(self, device: str) -> Implementation:
        """Return the implementation that serves `device`. Raises ConfigError if its kernels cannot be loaded."""
        load_kernels(device)
        able = [i for i in self.implementations if i.device == device and i.when()]
        best = max(able, key=lambda i: i.rank, default=None)
        return best or Implementation("reference", self.reference, device, lambda: True, 0)


def load_kernels(device: str) -> None:
    """Import the package that registers implementations for a kind of device, if it has one."""
    if device in KERNELS:
        importlib.import_module(KERNELS[device])


TABLE: dict[str, Operation[..., Any]] = {}
"""Every operation by name."""


def operation(reference: Callable[P, T]) -> Operation[P, T]:
    """Make a reference function the contract of an operation."""
    made = Operation(reference)
    TABLE[made.name] = made
    return made


def implements(
    of: Operation[..., Any],
    *,
    device: str,
    when: Callable[[], bool] = lambda: True,
    rank: int = 10,
    needs: str = "",
    inside: Callable[[], str] = str,
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Register an implementation; `when` is asked once, at first use on the device."""

    def register(function: Callable[P, T]) -> Callable[P, T]:
        of.implementations.append(Implementation(function.__name__, function, device, when, rank, needs, inside))
        return function

    return register


class _Forced(threading.local):
    reference = False


_forced = _Forced()


@contextlib.contextmanager
def force_reference() -> Iterator[None]:
    """Run references only, within the block, in this thread: for parity tests and bisecting."""
    before, _forced.reference = _forced.reference, True
    try:
        yield
    finally:
        _forced.reference = before


def choices(device: str, *, reference: bool = False) -> dict[str, str]:
    """Return operation -> name of the implementation that serves it on `device`.

    reference  within `force_reference`
    """
    return {name: "reference" if reference else op.pick(device).name for name, op in sorted(TABLE.items())}
