"""Perplexity through the served path, and the distance to a reference, in bounded memory.

Protocol (docs/accuracy.md): independent windows, positions from 0, the first token of a window is context only.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Queue
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from omniserve.base.errors import RequestError

if TYPE_CHECKING:
    from omniserve.llm import LLM

_ROWS = 128
"""Positions whose log-probabilities are held at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Result of a measurement.

    predictions  how many tokens were predicted
    nll          mean negative log-likelihood in nats
    kl           mean of Σ p ln(p/p̂) in nats, p of the reference; None without one
    agreement    share of predictions whose likeliest token is the reference's; None without one
    seconds      time of the measured engine alone
    """

    predictions: int
    nll: float
    kl: float | None
    agreement: float | None
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


def cut(ids: Sequence[int], *, length: int, stride: int, which: Sequence[int] | None = None) -> dict[int, list[int]]:
    """Return window number -> its tokens [stride·i, stride·i + length); without `which` all whole windows.

    A text shorter than one window is one window.
    Raises RequestError for a window that the text does not hold, or a text without two tokens.
    """
    if len(ids) < 2:
        raise RequestError(f"the text has {len(ids)} tokens: needs at least 2, the first one is context only")
    whole = (len(ids) - length) // stride + 1 if len(ids) >= length else 0
    if which is None and whole == 0:
        return {0: list(ids)}
    for number in which or ():
        if number >= whole:
            raise RequestError(
                f"window {number}: the text of {len(ids)} tokens holds {whole} windows of {length} tokens"
            )
    return {i: list(ids[stride * i : stride * i + length]) for i in (range(whole) if which is None else which)}


def measure(
    llm: "LLM",
    windows: Sequence[Sequence[int]],
    *,
    reference: "LLM | None" = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Return the score of `llm` on the windows, against `reference` if there is one.

    on_progress(done, total) counts predictions. Logits are reduced chunk by chunk, as the engines compute them.
    """
    total = sum(len(window) - 1 for window in windows)
    sums = _Sums()
    began = time.perf_counter()
    if reference is None:
        for window in windows:
            llm.score(window, _reducer(window, sums, None, total, on_progress))
        return sums.score(time.perf_counter() - began)
    with _Twin(reference, windows) as twin:
        for window in windows:
            llm.score(window, _reducer(window, sums, twin, total, on_progress))
    return sums.score(time.perf_counter() - began - twin.waited)


@dataclass(slots=True)
class _Sums:
    """Sums over predictions, in float64."""

    predictions: int = 0
    nll: float = 0.0
    kl: float | None = None
    equal: int = 0

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        """Add predictions: logits [t, V], the tokens that came [t], logits of the reference [t, V]."""
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            log_q = _log_probabilities(logits[rows])
            self.nll -= log_q.gather(1, targets[rows, None]).double().sum().item()
            if reference is None:
                continue
            log_p = _log_probabilities(reference[rows])
            self.equal += int((log_p.argmax(1) == log_q.argmax(1)).sum())
            terms = log_p.exp().mul_(log_p.sub_(log_q)).nan_to_num_(nan=0.0)
            self.kl = (self.kl or 0.0) + terms.sum(1).double().sum().item()
        self.predictions += len(targets)

    def score(self, seconds: float) -> Score:
        """Return the means."""
        count = self.predictions
        compared = self.kl is not None
        return Score(
            predictions=count,
            nll=self.nll / count,
            kl=None if self.kl is None else self.kl / count,
            agreement=self.equal / count if compared else None,
            seconds=seconds,
        )


def _log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def _reducer(
    window: Sequence[int],
    sums: _Sums,
    twin: "_Twin | None",
    total: int,
    on_progress: Callable[[int, int], None] | None,
) -> Callable[[Tensor, Tensor], None]:
    """Return the function that `LLM.score` calls with each chunk; the last position predicts nothing."""

    def reduce(positions: Tensor, logits: Tensor) -> None:
        first = int(positions[0])
        count = min(len(positions), len(window) - 1 - first)
        other = None if twin is None else twin.take(len(positions))
        if count < 1:
            return
        targets = torch.tensor(window[first + 1 : first + 1 + count], device=logits.device)
        with torch.inference_mode():
            sums.add(logits[:count], targets, None if other is None else other[:count].to(logits.device))
        if on_progress is not None:
            on_progress(sums.predictions, total)

    return reduce


class _Stop(Exception):  # noqa: N818  # not an error: unwinds the reference's engine when nobody listens any more
    pass


class _Twin:
    """Logits of the reference for the same windows, computed only while `take` waits for them.

    `LLM.score` calls back, so the reference runs in a thread of its own; the two take turns and never compute at
    the same time, which on a busy machine would be slower than one after the other. At most one chunk is held.
    """

    def __init__(self, llm: "LLM", windows: Sequence[Sequence[int]]) -> None:
        self.waited = 0.0
        self._llm = llm
        self._windows = windows
        self._turn = threading.Semaphore(0)
        self._chunks: Queue[Tensor | BaseException] = Queue(maxsize=1)
        self._left: Tensor | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="omniserve-reference", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # after the last chunk the reference may return from `score`; after an error it must not go on
        self._closed = error is not None
        self._turn.release()
        self._thread.join(timeout=0.2 if error is not None else None)

    def take(self, count: int) -> Tensor:
        """Return the logits [count, V] of the next positions. Valid until the next call."""
        began = time.perf_counter()
        parts: list[Tensor] = [] if self._left is None else [self._left]
        held = sum(len(part) for part in parts)
        while held < count:
            # what is kept must be a copy: the engine may reuse the tensor once its callback returns
            parts = [part.clone() for part in parts]
            self._turn.release()
            chunk = self._chunks.get()
            if isinstance(chunk, BaseException):
                raise chunk
            parts.append(chunk)
            held += len(chunk)
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        self._left = logits[count:] if held > count else None
        self.waited += time.perf_counter() - began
        return logits[:count]

    def _run(self) -> None:
        self._turn.acquire()
        try:
            for window in self._windows:
                if self._closed:
                    return
                self._llm.score(window, self._hand_over)
        except _Stop:
            return
        except BaseException as error:  # the thread that waits raises it
            self._chunks.put(error)

    def _hand_over(self, positions: Tensor, logits: Tensor) -> None:
        self._chunks.put(logits)
        self._turn.acquire()
        if self._closed:
            raise _Stop
