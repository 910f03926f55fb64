"""Attention patterns: which key heads retrieve, as DuoAttention publishes them.

A folder holds `full_attention_heads.tsv`, one line per layer with one number per key head (1: needs the whole context,
0: sink and window are enough), and beside it `config.json` on how it was found, with the window if it names one.
Source: DuoAttention (arXiv 2410.10819).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from omniserve.base.errors import ConfigError

TSV = "full_attention_heads.tsv"
CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """How much each key head needs the whole context, by layer, in [0, 1].

    about   config.json of the folder
    digest  SHA-256 of the table's bytes, in hex: names the pattern in logs and results
    """

    values: tuple[tuple[float, ...], ...]
    about: Mapping[str, object]
    digest: str


def read_pattern(folder: str | Path, *, layers: int, heads: int) -> Pattern:
    """Return the pattern of a model with so many layers and key heads; values are clipped to [0, 1].

    Raises ConfigError if a file is missing or broken, or describes another model.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ConfigError(f"attn_pattern={folder}: must be a folder that holds {TSV}")
    try:
        content = (place / TSV).read_bytes()
        values = tuple(_line(number, line) for number, line in enumerate(content.decode().splitlines(), 1) if line)
    except FileNotFoundError:
        raise ConfigError(f"attn_pattern={folder}: holds no {TSV}") from None
    except OSError as error:
        raise ConfigError(f"attn_pattern={folder}: cannot read {TSV}: {error.strerror}") from None
    except ValueError as error:
        what = "is not text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ConfigError(f"attn_pattern={folder}: {TSV} {what}") from None
    shapes = sorted({len(line) for line in values})
    if len(values) != layers or shapes != [heads]:
        counts = " or ".join(map(str, shapes)) or "no"
        raise ConfigError(
            f"attn_pattern={folder}: describes {len(values)} layers of {counts} key heads, "
            f"this model has {layers} of {heads}"
        )
    return Pattern(values=values, about=_about(place), digest=sha256(content).hexdigest())


def window_of(folder: str | Path) -> int | None:
    """Return how many latest tokens a pattern wants streaming heads to see at produced positions, if it says.

    `config.json` may name it as `local`; published patterns do not. Raises ConfigError.
    """
    local = _about(Path(folder)).get("local")
    if local is None or (isinstance(local, int) and not isinstance(local, bool) and local > 0):
        return local
    raise ConfigError(f"attn_pattern={folder}: local={local!r} in {CONFIG} must be a number of tokens, 1 or more")


def _line(number: int, line: str) -> tuple[float, ...]:
    values = []
    for word in line.split():
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"line {number} holds {word[:20]!r}: must be finite numbers with tabs between them")
        values.append(min(max(value, 0.0), 1.0))
    return tuple(values)


def _about(place: Path) -> Mapping[str, object]:
    path = place / CONFIG
    if not path.exists():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"attn_pattern={place}: cannot read {CONFIG}: {str(error)[:100]}") from None
    if not isinstance(about, dict):
        raise ConfigError(f"attn_pattern={place}: {CONFIG} must hold an object")
    return about


def write_pattern(folder: Path, values: tuple[tuple[float, ...], ...], about: Mapping[str, object]) -> None:
    """Write a folder that `read_pattern` takes. Raises ConfigError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TSV).write_text("".join("\t".join(f"{x:.18e}" for x in line) + "\n" for line in values))
        (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write a pattern: {error.strerror}") from None
