"""Calibration text: token ids cut into samples, each with the position it begins at."""

import hashlib
import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omniserve.base.errors import ConfigError
from omniserve.base.spec import ModelSpec
from omniserve.quantize.recipe import Samples

DEFAULT = "the text that ships with omniserve"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Samples of a text.

    ids        one tuple of token ids per sample, all of the same length
    positions  where each sample begins
    origin     where the text came from, for people
    """

    ids: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]
    origin: str

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return len(self.ids[0])

    @property
    def sha256(self) -> str:
        """Hash of the ids and positions."""
        raw = np.asarray(self.ids, dtype="<i8").tobytes() + np.asarray(self.positions, dtype="<i8").tobytes()
        return hashlib.sha256(raw).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return what config.json says of it."""
        return {"text": self.origin, "sha256": self.sha256, "samples": len(self.ids), "length": self.length}


def shipped_text() -> str:
    """Return the public-domain text that ships with the package."""
    return importlib.resources.files("omniserve.quantize").joinpath("data/calibration.txt").read_text("utf-8")


def cut(ids: Sequence[int], wanted: Samples, spec: ModelSpec, *, origin: str) -> Calibration:
    """Return the samples of a tokenized text, at most as long as the model's context.

    Raises ConfigError if the text is too short, or holds a token that the model does not know.
    """
    length = min(wanted.length, spec.context)
    count = wanted.samples
    need = (count - 1) * (wanted.stride or length) + length
    if len(ids) < need:
        raise ConfigError(
            f"the calibration text has {len(ids)} tokens, but {count} samples of {length} "
            f"{f'every {wanted.stride} tokens ' if wanted.stride else ''}need {need}: give more text or fewer samples"
        )
    if ids and not 0 <= min(ids) <= max(ids) < spec.vocab:
        raise ConfigError(f"the calibration text has token {max(ids)}, the model's vocabulary ends at {spec.vocab}")
    spread = (len(ids) - length) // max(1, count - 1)
    starts = [number * (wanted.stride or spread) for number in range(count)]
    room = min(wanted.positions, spec.context) - length
    generator = np.random.default_rng(wanted.seed)
    positions = generator.integers(0, room + 1, count).tolist() if room > 0 else [0] * count
    return Calibration(
        ids=tuple(tuple(ids[start : start + length]) for start in starts),
        positions=tuple(positions),
        origin=origin,
    )
