"""How products are cut, and the measured table that says so for a card.

`tables/CARD.json` holds what was measured on one card. A product takes the entry of its
own shape, or of the nearest one, measured on a card of the same compute capability; cards without a table take safe
defaults. A result's bits do not depend on any of it.
"""

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omniserve.base.numbers import ceil_div
from omniserve.formats.blocks import SIDE

TABLES = Path(__file__).parent / "tables"
"""One JSON file per card."""

KINDS = ("row", "g128", "w8a8")
"""4-bit weights with a scale per row, 4-bit weights in groups of 128 columns, int8 weights."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How one product is cut: BM tokens by BN weights, `step` blocks of 128 columns per turn of the loop.

    split     parts of K that are added up afterwards; "gluon": above 1, free multiprocessors help (`hopper.lent`)
    language  "triton"; on compute capability 9.0, under tested versions of Triton, "gluon" (`hopper.py`) or "few"
              (`few.py`), and where NVRTC is, "cuda" (`clusters.py`)
    order     tiles of tokens that follow each other on one panel of weights
    programs  "cuda": that fit on a multiprocessor
    """

    tokens: int
    weights: int
    step: int
    warps: int
    stages: int
    split: int = 1
    language: str = "triton"
    order: int = 8
    programs: int = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """The tile that was fastest for `m` tokens and a weight [n, k] of one kind, and its median time in us."""

    kind: str
    n: int
    k: int
    m: int
    tile: Tile
    us: float


@functools.cache
def table(arch: int) -> tuple[Entry, ...]:
    """Return all entries measured on cards of a compute capability (times ten)."""
    found: list[Entry] = []
    for path in sorted(TABLES.glob("*.json")):
        held = json.loads(path.read_text())
        if held["arch"] == arch:
            found += [entry_of(one) for one in held["entries"]]
    return tuple(found)


def tables(arch: int) -> list[str]:
    """Return the names of the tables that were measured on cards of a compute capability (times ten)."""
    return [path.stem for path in sorted(TABLES.glob("*.json")) if json.loads(path.read_text())["arch"] == arch]


def entry_of(held: dict[str, Any]) -> Entry:
    """Return one entry of a table's file."""
    return Entry(**(held | {"tile": Tile(**held["tile"])}))


@functools.lru_cache(maxsize=4096)
def choose(tokens: int, rows: int, columns: int, kind: str, *, arch: int, sms: int, cuda: bool = True) -> Tile:
    """Return the tile for a product of T tokens with a weight [N, K] on a card.

    Of the measured shapes of this kind the nearest one counts, of its numbers of tokens the first that is not smaller.
    cuda: whether tiles of that language can be taken; each has a row of another one beside it
    """
    entries = [one for one in table(arch) if one.kind == kind and (cuda or one.tile.language != "cuda")]
    if not entries:
        return default(tokens, rows, columns, kind, arch=arch, sms=sms)
    return fitting(nearest(entries, tokens, rows, columns).tile, columns)


def nearest(entries: Sequence[Entry], tokens: int, rows: int, columns: int) -> Entry:
    """Return the entry of the nearest shape, and of its smallest number of tokens that is not below T, the fastest."""

    def far(one: Entry) -> tuple[float, bool, int, float]:
        shape = abs(math.log2(one.n / rows)) + abs(math.log2(one.k / columns))
        return round(shape, 6), one.m < tokens, abs(one.m - tokens), one.us

    return min(entries, key=far)


def fitting(tile: Tile, columns: int) -> Tile:
    """Return a tile whose turns and parts fit a number of columns."""
    if tile.language != "triton":
        return tile
    blocks = ceil_div(columns, SIDE)
    tile = replace(tile, split=min(tile.split, blocks))
    whole = ceil_div(blocks, tile.split) % tile.step == 0 and blocks % tile.step == 0
    return tile if whole else replace(tile, step=1)


def default(tokens: int, rows: int, columns: int, kind: str, *, arch: int, sms: int) -> Tile:
    """Return a tile that fits every card: those with 99 KiB of shared memory take fewer stages."""
    small, bits = arch in (86, 89), 8 if kind == "w8a8" else 4
    if tokens <= 16:
        tile = Tile(16, 64, 2, 4, 3 if small and bits == 8 else 4)
    elif tokens <= 64:
        tile = Tile(64, 128, 1, 4, 3 if small else 4)
    elif tokens <= 128:
        tile = Tile(128, 128, 1, 4 if arch == 90 else 8, 3)  # mma.sync with 4 warps spills: 272 bytes in groups
    elif tokens <= 512 or rows <= 4096 or small or bits == 8:
        tile = Tile(128, 128, 1, 8, 3)
    else:
        tile = Tile(256, 128, 1, 8, 3)
    if bits == 8 and tile.tokens >= 128:  # both operands lie in shared memory
        tile = Tile(128, 128, 1, 8, 3)
    tiles = ceil_div(tokens, tile.tokens) * ceil_div(rows, tile.weights)
    wanted = min(ceil_div(columns, SIDE) // 2, ceil_div(2 * sms, tiles), 8) if tokens <= 64 else 1
    return fitting(replace(tile, split=1 << max(0, wanted - 1).bit_length()), columns)
