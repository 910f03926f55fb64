"""Decode steps as CUDA graphs: captured for a few numbers of rows, replayed for any requests and lengths."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from omniserve.ops.transfer import parts, staged


class _Lent:
    """Memory of a tensor without a hold on it, for `torch.as_tensor`."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), (tensor.dtype, tensor.stride())
        self.__cuda_array_interface__ = {
            "data": (tensor.data_ptr(), False), "shape": tuple(tensor.shape), "typestr": "<f4", "version": 3
        }  # fmt: skip


Numbers = tuple[Tensor, Tensor, Tensor]
"""Slots, positions and prompt lengths of R rows, each int64 [R]."""


def sizes(most: int) -> tuple[int, ...]:
    """Return the numbers of rows that steps are padded to, ascending: closer where a row more costs more."""
    wanted = (1, 2, 4, 8, *range(16, 32, 8), *range(32, 128, 16), *range(128, 512, 32), *range(512, 1025, 64))
    below = [size for size in wanted if size < most]
    return (*below, most) if most <= wanted[-1] else wanted


class DecodeGraphs:
    """Captured steps by number of rows. Mutable: each has fixed places that its numbers are copied into.

    step  from numbers on the device to logits [R, V], without a look from the host
    idle  slot, position and prompt length of a row that only pads
    beside  others that never run at the same time: the memory of both is one
    on_done  called as on_done(captured, all) after each capture
    """

    def __init__(
        self,
        step: Callable[[Numbers], Tensor],
        idle: tuple[int, int, int],
        *,
        most: int,
        device: torch.device,
        beside: "DecodeGraphs | None" = None,
        on_done: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._idle = idle
        self._device = device
        self._sizes = sizes(most)
        self.pool: Any = torch.cuda.graph_pool_handle() if beside is None else beside.pool
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Numbers]] = {}
        for size in reversed(self._sizes):  # the largest first: the others find their memory in its pool
            lists = [[one] * size for one in idle]
            places = staged(lists, device).to(device)
            numbers = self._numbers(places, lists)
            step(numbers)  # kernels are compiled before the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                made = step(numbers)
            # Nobody holds the logits: graphs captured later take their place, since one step is read before the next.
            logits = torch.as_tensor(_Lent(made))
            del made
            self._graphs[size] = graph, places, logits, numbers
            on_done(len(self._graphs), len(self._sizes))

    @property
    def most(self) -> int:
        """The largest number of rows."""
        return self._sizes[-1]

    def run(self, lists: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Run a step of slots, positions and prompt lengths; return its logits [R, V] and the slots on the device.

        Both hold until the next step is put on the device.
        """
        rows = len(lists[0])
        size = next(size for size in self._sizes if size >= rows)
        graph, places, logits, numbers = self._graphs[size]
        padded = [[*one, *[idle] * (size - rows)] for one, idle in zip(lists, self._idle, strict=True)]
        places.copy_(staged(padded, self._device), non_blocking=True)
        graph.replay()
        return logits[:rows], numbers[0][:rows]

    @staticmethod
    def _numbers(places: Tensor, lists: Sequence[Sequence[int]]) -> Numbers:
        slots, positions, prompts = parts(places, lists)
        return slots, positions, prompts
