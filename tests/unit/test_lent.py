"""How much of a product's tiles programs on free multiprocessors take."""

import pytest

pytest.importorskip("triton")

from omniserve.kernels.hopper import HAND, lent


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
