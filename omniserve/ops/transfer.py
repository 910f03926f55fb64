"""Numbers between host and device without waiting: one copy for all lists of a step, and results that arrive later."""

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_EVEN = 2
"""Lists begin at multiples of 16 bytes: kernels are compiled for how their arguments are aligned."""


def staged(lists: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return whole numbers on the host, int64, one list after the other, from which a copy to `device` need not wait.

    `parts` takes them apart again.
    """
    flat = array("q")
    for numbers in lists:
        flat.extend(numbers)
        flat.extend([0] * (len(numbers) % _EVEN))
    host = torch.frombuffer(flat, dtype=torch.int64) if flat else torch.empty(0, dtype=torch.int64)
    return host.pin_memory() if device.type == "cuda" else host


def parts(numbers: Tensor, lists: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Return what `staged` put one after the other, as views of `numbers` int64."""
    found, first = [], 0
    for one in lists:
        found.append(numbers[first : first + len(one)])
        first += len(one) + len(one) % _EVEN
    return tuple(found)


def sent(lists: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Return lists of whole numbers on the device, int64, in one copy that the host does not wait for."""
    return parts(staged(lists, device).to(device, non_blocking=True), lists)


def placed(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers (nested sequences of one shape) on the device, in a copy that the host does not wait for."""
    host = torch.tensor(values, dtype=dtype)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


class Arriving:
    """A tensor on its way from the device to the host: what is put on the device later is not waited for."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch says no more
            self._event.record()

    def tolist(self) -> list[Any]:
        """Wait for it and return its numbers."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.tolist()
