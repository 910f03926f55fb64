"""The limits of kernels: the figures that were computed by hand for Llama-3-8B on an H200."""

import pytest

from omniserve.bench.kernels.limits import CARDS, Work, decode, pairs, product, prompt
from omniserve.formats.kv import kv_format

H200 = CARDS["NVIDIA H200"]
LAYER = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))


@pytest.mark.parametrize(
    ("form", "tokens", "microseconds"),
    [
        ("w4a8-g128", 1, 26.2),
        ("w4a8-row", 1, 25.4),
        ("w8a8", 16, 51.1),
        ("w16a16", 64, 103.5),
        ("w4a8-g128", 128, 35.3),
        ("w4a8-row", 8192, 2262),
        ("w16a16", 2048, 1131),
    ],
)
def test_products_of_a_layer(form: str, tokens: int, microseconds: float) -> None:
    total = sum(product(form, tokens, n, k).microseconds(H200) for n, k in LAYER)
    assert total == pytest.approx(microseconds, rel=0.01)


@pytest.mark.parametrize(("kv", "microseconds"), [("kv16", 250), ("kv8", 129), ("kv4", 66)])
def test_decode_of_256k(kv: str, microseconds: float) -> None:
    size = kv_format(kv).page_bytes(128)  # type: ignore[arg-type]  # a name of the table
    assert decode(size, 1, 1 << 18, 32, 8, 128).microseconds(H200) == pytest.approx(microseconds, rel=0.01)


def test_prompts() -> None:
    dense = prompt(8704, pairs(8192, 8192), 8192, 8192, 32, 8, 128)
    assert dense.microseconds(H200) == pytest.approx(696, rel=0.01)
    assert dense.half == 4 * 32 * 128 * 8192 * 8193 / 2


@pytest.mark.parametrize(
    ("tokens", "context", "sink", "local"), [(5, 9, 2, 3), (9, 9, 4, 2), (3, 40, 0, 8), (4, 4, 8, 8)]
)
def test_pairs_are_those_of_the_rule(tokens: int, context: int, sink: int, local: int) -> None:
    seen = [(i, j) for i in range(context - tokens, context) for j in range(i + 1) if j < sink or j > i - local]
    assert pairs(tokens, context, sink=sink, local=local) == len(seen)
    assert pairs(tokens, context) == sum(i + 1 for i in range(context - tokens, context))


def test_both_kinds_of_limit() -> None:
    assert Work(bytes=4.3e6).microseconds(H200) == pytest.approx(1)
    assert Work(bytes=1, int8=1580e6, half=790e6).microseconds(H200) == pytest.approx(2)
    assert (Work(bytes=1, int8=2) + Work(bytes=3, half=4)) == Work(bytes=4, int8=2, half=4)
