"""Every weight format by name, and the format of a precision."""

from omniserve.base.errors import ConfigError
from omniserve.formats.w4a8 import W4A8
from omniserve.formats.w8a8 import W8A8
from omniserve.formats.w16a16 import W16A16
from omniserve.formats.weight import HeadFormat, WeightFormat

FORMATS: dict[str, WeightFormat] = {form.name: form for form in (W16A16(), W8A8(), W4A8(None), W4A8(128))}
"""By the names that checkpoints and recipes use."""


HEADS: dict[str, HeadFormat] = {"w16": W16A16(), "w8": W8A8()}
"""Formats of the projection to logits, by the words of `--lm-head`."""


def head_format(name: str) -> HeadFormat:
    """Return a format of the projection to logits."""
    return HEADS[name]


def weight_format(precision_weight: str, group: int = 128) -> WeightFormat:
    """Return the format of a precision's weights: `w16a16`, `w8a8`, or `w4a8` with group 128 or -1 (per channel).

    Raises ConfigError.
    """
    name = {"w4a8": {128: "w4a8-g128", -1: "w4a8-row"}.get(group, "")}.get(precision_weight, precision_weight)
    if name not in FORMATS:
        raise ConfigError(
            f"weights {precision_weight}, group size {group}: must be w16a16, w8a8, or w4a8 with group size 128 or -1"
        )
    return FORMATS[name]
