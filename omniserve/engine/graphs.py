"""Steps as CUDA graphs: captured for a few sizes, replayed for any requests and lengths."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from omniserve.base.types import Work
from omniserve.engine.mixture import Mixture
from omniserve.ops.batch import Most
from omniserve.ops.transfer import parts, staged

CHUNKS = 32
"""Chunks of prompts in a captured step at most."""

PAGES = 480
"""Pages of their sequences at most: more of them keep the device busy for longer than launches take."""

PRODUCED = (16, 64, 128, 256)
TOKENS = (64, 128, 256, 512, 1024, 2048)
"""Produced positions, and tokens of chunks, that steps which mix both are padded to."""

Numbers = tuple[Tensor, Tensor, Tensor]
"""Slots, positions and prompt lengths of R rows, each int64 [R]."""

Replay = Callable[[], Tensor]
"""Runs a captured step and returns what it made; that holds until another step is put on the device."""


def sizes(most: int) -> tuple[int, ...]:
    """Return the numbers of rows that decode steps are padded to, ascending: closer where a row more costs more."""
    wanted = (1, 2, 4, 8, *range(16, 32, 8), *range(32, 128, 16), *range(128, 512, 32), *range(512, 1025, 64))
    below = [size for size in wanted if size < most]
    return (*below, most) if most <= wanted[-1] else wanted


def mixtures(seqs: int, tokens: int) -> tuple[tuple[int, int], ...]:
    """Return (produced positions, tokens of chunks) that mixed steps are padded to; smaller ones come first.

    seqs  sequences of a step at most; tokens: of a step at most
    """
    rows = [0, *(size for size in PRODUCED if size < seqs), min(seqs, PRODUCED[-1])]
    found = {(some, more) for some in rows for more in TOKENS if some + more <= tokens}
    return tuple(sorted(found, key=lambda size: (sum(size), size)))


class _Lent:
    """Memory of a tensor without a hold on it, for `torch.as_tensor`."""

    def __init__(self, tensor: Tensor) -> None:
        kind = {torch.float32: "<f4", torch.int16: "<i2"}.get(tensor.dtype)
        assert kind is not None and tensor.is_contiguous(), (tensor.dtype, tensor.stride())
        self.__cuda_array_interface__ = {
            "data": (tensor.data_ptr(), False), "shape": tuple(tensor.shape), "typestr": kind, "version": 3
        }  # fmt: skip


def capture(step: Replay, pool: Any) -> Replay:
    """Return a step as a graph whose memory comes from a pool; the largest is captured first, others find theirs there.

    Nobody holds what it makes: graphs captured later take its place, since one step is read before the next.
    """
    step()  # kernels are compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        made = step()
    kind = made.dtype
    made = torch.as_tensor(_Lent(made if kind == torch.float32 else made.view(torch.int16))).view(kind)

    def replay() -> Tensor:
        graph.replay()
        return made

    return replay


class DecodeGraphs:
    """Captured steps by number of rows. Mutable: each has fixed places that its numbers are copied into.

    step  from numbers on the device to logits [R, V], without a look from the host
    idle  slot, position and prompt length of a row that only pads
    pool  memory for graphs, none of which ever run at the same time
    on_done  called as on_done(captured, all) after each capture
    """

    def __init__(
        self,
        step: Callable[[Numbers], Tensor],
        idle: tuple[int, int, int],
        *,
        most: int,
        device: torch.device,
        pool: Any,
        on_done: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._idle = idle
        self._device = device
        self._sizes = sizes(most)
        self._graphs: dict[int, tuple[Tensor, Replay, Numbers]] = {}
        for size in reversed(self._sizes):
            lists = [[one] * size for one in idle]
            places = staged(lists, device).to(device)
            numbers = self._numbers(places, lists)
            self._graphs[size] = places, capture(partial(step, numbers), pool), numbers
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
        places, replay, numbers = self._graphs[size]
        padded = [[*one, *[idle] * (size - rows)] for one, idle in zip(lists, self._idle, strict=True)]
        places.copy_(staged(padded, self._device), non_blocking=True)
        return replay()[:rows], numbers[0][:rows]

    @staticmethod
    def _numbers(places: Tensor, lists: Sequence[Sequence[int]]) -> Numbers:
        slots, positions, prompts = parts(places, lists)
        return slots, positions, prompts


class MixedGraphs:
    """Captured steps of chunks of prompts beside produced positions, by what they hold at most. Mutable likewise.

    step  from the numbers of a `Mixture` on the device to the residual stream [T, C], without a look from the host
    idle  the slot of what only pads
    seqs, tokens  of a step at most
    hold  how a step becomes one that can be run again
    """

    def __init__(
        self,
        step: Callable[[Sequence[Tensor], Most], Tensor],
        idle: int,
        *,
        seqs: int,
        tokens: int,
        device: torch.device,
        pool: Any,
        hold: Callable[[Replay, Any], Replay] = capture,
        on_done: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._idle = idle
        self._device = device
        self._sizes = mixtures(seqs, tokens)
        self._graphs: dict[tuple[int, int], tuple[Tensor, Replay]] = {}
        one = Work(request="", slot=idle, start=0, count=1, prompt=1, new_tokens=(0,), logits="none", draws=False)
        for size in reversed(self._sizes):
            lists = Mixture(works=(one,), produced=(), chunks=(one,)).lists((*size, CHUNKS), idle)
            places = staged(lists, device).to(device)
            numbers = parts(places, lists)
            self._graphs[size] = places, hold(partial(step, numbers, Most(size[1], PAGES)), pool)
            on_done(len(self._graphs), len(self._sizes))

    def run(self, mixture: Mixture) -> tuple[Tensor, tuple[slice, ...]] | None:
        """Run a step; return its residual stream and where each work's tokens are there; None if no graph holds it.

        The stream holds until the next step is put on the device.
        """
        if len(mixture.chunks) > CHUNKS or mixture.pages > PAGES:
            return None
        rows, tokens = len(mixture.produced), mixture.tokens
        size = next((one for one in self._sizes if one[0] >= rows and one[1] >= tokens), None)
        if size is None:
            return None
        places, replay = self._graphs[size]
        places.copy_(staged(mixture.lists((*size, CHUNKS), self._idle), self._device), non_blocking=True)
        return replay(), mixture.spans(size[0])
