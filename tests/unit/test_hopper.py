"""Tiles of products on compute capability 9.0: stages, and how much of tiles programs on free multiprocessors take."""

import pytest

pytest.importorskip("triton")

from omniserve.kernels.hopper import HAND, fitted, groups, lent
from omniserve.kernels.tiles import Tile, table


@pytest.mark.parametrize("tiles", [1, 40, 64, 66, 80, 88])
@pytest.mark.parametrize("steps", [1, 8, 32, 112])
def test_a_helper_is_done_before_the_tiles_own_programs_are(tiles: int, steps: int) -> None:
    given = lent(tiles, steps, 1, 132)
    helpers = min(132, 2 * tiles) - tiles
    turns = -(-tiles // helpers)
    assert 0 <= given < steps
    assert not given or turns * (given + HAND) <= steps - given


def test_a_long_k_is_shared_and_a_step_of_two_blocks_counts_as_two() -> None:
    assert lent(64, 112, 1, 132) == 52
    assert lent(64, 56, 2, 132) == 26


@pytest.mark.parametrize("tiles", [89, 112, 132, 500])
def test_without_a_helper_per_two_tiles_nobody_helps(tiles: int) -> None:
    assert lent(tiles, 112, 1, 132) == 0


def test_every_group_of_warps_has_stages_of_its_own() -> None:
    """Another one would take a phase that has not begun for one that is over."""
    measured = [(one.tile, one.kind) for one in table(90) if one.tile.language == "gluon"]
    for tile, kind in [*measured, (Tile(32, 64, 4, 9, 5, language="gluon"), "row")]:
        for element in (2, 4):
            found = fitted(tile, element, bits=8 if kind == "w8a8" else 4, grouped=kind == "g128")
            assert found.stages > 0
            assert found.stages % groups(tile)[1] == 0, (tile, kind)
