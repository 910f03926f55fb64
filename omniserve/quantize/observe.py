"""What calibration samples tell of a layer: maxima, means and a few values. It moves with the weights."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError

ROWS = 512
"""Tokens of the first sample that are kept of the inputs of out and down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a linear is fed: peak [K] = max |x_c| over all tokens, rows [t, K] = some tokens' values."""

    peak: Tensor
    rows: Tensor

    def take(self, order: Tensor) -> "Inputs":
        """Return the inputs in another order, int64 [K]."""
        return Inputs(peak=self.peak[order], rows=self.rows[:, order])

    def divide(self, factor: Tensor) -> "Inputs":
        """Return the inputs divided by factor [K]."""
        return Inputs(peak=self.peak / factor, rows=self.rows / factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What calibration knows of a layer in full precision.

    key_peak, query_peak  [H, D], [Hq, D]: max |.| after rotation by position
    key_mean              [H, D]
    attention             q [T, Hq, D], k and v [T, H, D] of one sample
    out                   inputs of the out projection
    down                  inputs of down, per part
    """

    key_peak: Tensor
    query_peak: Tensor
    key_mean: Tensor
    attention: tuple[Tensor, Tensor, Tensor]
    out: Inputs
    down: tuple[Inputs, ...]

    def with_down(self, number: int, inputs: Inputs) -> "Statistics":
        """Return the statistics with the inputs of one part's down replaced."""
        return replace(self, down=tuple(inputs if i == number else own for i, own in enumerate(self.down)))


class Peak:
    """The running maximum of |x_c| and the first rows. Refuses values that are not finite, naming where they are."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._peak: Tensor | None = None
        self._rows: list[Tensor] = []
        self._kept = 0

    def add(self, x: Tensor) -> None:
        """Take in some tokens x [t, K]."""
        if not len(x):
            return
        peak = x.abs().amax(0)
        if not bool(torch.isfinite(peak).all()):
            raise CheckpointError(f"{self._where} is fed NaN or infinity by the calibration text: the model overflows")
        self._peak = peak if self._peak is None else torch.maximum(self._peak, peak)
        if self._kept < ROWS:
            kept = x[: ROWS - self._kept].clone()
            self._rows.append(kept)
            self._kept += len(kept)

    def inputs(self, columns: int, like: Tensor) -> Inputs:
        """Return what was seen; of nothing, no rows and peaks of zero."""
        if self._peak is None:
            return Inputs(peak=like.new_zeros(columns), rows=like.new_zeros(0, columns))
        return Inputs(peak=self._peak, rows=torch.cat(self._rows))
