"""Tiles of products: the measured table, its nearest entry, and defaults where nothing was measured."""

import json

import pytest

from omniserve.base.numbers import ceil_div
from omniserve.kernels.tiles import KINDS, TABLES, Entry, Tile, choose, default, entry_of, nearest, table


def entry(n: int, k: int, m: int) -> Entry:
    return Entry("row", n, k, m, Tile(16, 64, 1, 4, 3), 1.0)


def test_tables_can_be_read() -> None:
    for path in TABLES.glob("*.json"):
        held = json.loads(path.read_text())
        assert {"card", "arch", "date", "torch", "triton"} < set(held)
        entries = [entry_of(one) for one in held["entries"]]
        keys = [(one.kind, one.n, one.k, one.m, one.tile.language != "cuda") for one in entries]
        assert keys
        assert keys == sorted(set(keys)), f"{path.name}: entries twice, or out of order"
        assert {kind for kind, *_ in keys} <= set(KINDS)


def test_the_nearest_shape_counts_first_then_the_next_number_of_tokens() -> None:
    entries = [entry(4096, 4096, m) for m in (1, 16, 64)] + [entry(28672, 4096, 256)]
    found = [nearest(entries, tokens, 4096, 4096).m for tokens in (1, 2, 16, 17, 64, 65, 9999)]
    assert found == [1, 16, 16, 64, 64, 64, 64]
    assert nearest(entries, 1, 22016, 4096).n == 28672


@pytest.mark.parametrize("arch", [80, 86, 89, 90])
@pytest.mark.parametrize("kind", KINDS)
def test_every_choice_fits_its_product(arch: int, kind: str) -> None:
    for n, k in ((64, 64), (200, 130), (960, 576), (4096, 4096), (4096, 14336), (128256, 4096)):
        for tokens in (1, 3, 16, 33, 100, 1000, 8192):
            tile = choose(tokens, n, k, kind, arch=arch, sms=132)
            blocks = ceil_div(k, 128)
            if tile.language != "triton":  # shares units, or takes parts of any length, none among them
                assert arch == 90
                continue
            assert 1 <= tile.split <= blocks
            assert blocks % tile.step == 0
            assert ceil_div(blocks, tile.split) % tile.step == 0 or tile.step == 1


def test_a_card_without_a_table_takes_the_defaults() -> None:
    assert not table(80)
    assert choose(64, 4096, 4096, "row", arch=80, sms=108) == default(64, 4096, 4096, "row", arch=80, sms=108)
