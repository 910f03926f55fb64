"""Activations of all calibration samples in files: memory holds them while it lasts (page cache), then the disk."""

import os
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError

SUFFIX = ".part"
"""Of a file that is being written."""


def sync_replace(temporary: Path, final: Path) -> None:
    """Make a written file visible under its name, durably: its bytes reach the disk before the name does."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(path: Path, raw: bytes) -> None:
    """Write a file that is there as a whole or not at all."""
    temporary = path.with_name(path.name + SUFFIX)
    temporary.write_bytes(raw)
    sync_replace(temporary, path)


class Spill:
    """One stream of activations: `samples` tensors [T, C] in one file.

    durable  its bytes reach the disk before its name appears; scratch files need not
    What is read back is what was stored: fp32, or fp16 of long streams, whatever memory there is.
    """

    def __init__(
        self,
        path: Path,
        *,
        samples: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        durable: bool = False,
    ) -> None:
        self.path = path
        self.durable = durable
        self._samples, self._shape, self._dtype, self._device = samples, shape, dtype, device
        self._count = shape[0] * shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._samples * self._count * self._dtype.itemsize

    def writer(self) -> "Writer":
        """Return a context in which all samples are written in order; the file appears when it ends well."""
        return Writer(self, self._samples, self._dtype)

    def __getitem__(self, sample: int) -> Tensor:
        """Return a sample in fp32 (fp64 if that is stored) on the device."""
        kind = np.dtype(str(self._dtype).removeprefix("torch."))
        raw = np.fromfile(self.path, kind, self._count, offset=sample * self._count * kind.itemsize)
        found = torch.from_numpy(raw).view(self._shape).to(self._device)
        return found if found.dtype == torch.float64 else found.float()

    def remove(self) -> None:
        """Delete the file, if it is there."""
        self.path.unlink(missing_ok=True)


class Writer:
    """Writes the samples of one spill."""

    def __init__(self, spill: Spill, samples: int, dtype: torch.dtype) -> None:
        self._spill, self._samples, self._dtype = spill, samples, dtype
        self._temporary = spill.path.with_name(spill.path.name + SUFFIX)
        self._file = self._temporary.open("wb")
        self._written = 0

    def __enter__(self) -> Self:
        return self

    def add(self, x: Tensor) -> None:
        """Append the next sample [T, C].

        Raises CheckpointError if it holds values that are not finite.
        """
        stored = x.to(self._dtype)
        if not bool(torch.isfinite(stored).all()):
            raise CheckpointError(
                f"activations of the calibration text overflow {str(self._dtype).removeprefix('torch.')} "
                f"({self._spill.path.stem}, sample {self._written})"
            )
        stored.cpu().contiguous().numpy().tofile(self._file)
        self._written += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        self._file.close()
        if kind is None:
            assert self._written == self._samples, f"{self._spill.path}: {self._written} of {self._samples} samples"
            if self._spill.durable:
                sync_replace(self._temporary, self._spill.path)
            else:
                self._temporary.replace(self._spill.path)
        else:
            self._temporary.unlink(missing_ok=True)
        return False
