"""Statistics of logical pages: bounds of the keys as stored, however and whenever these were written."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniserve.base.config import KVName
from omniserve.base.types import PAGE
from omniserve.formats.kv import LOGICAL, LayerPages, _half_above, kv_format

H, D = 2, 8
FORMATS: dict[str, tuple[KVName, bool, torch.dtype]] = {
    "kv4": ("kv4", False, torch.float64),
    "kv8": ("kv8", False, torch.float64),
    "kv8 in fp32": ("kv8", False, torch.float32),
    "kv8 static": ("kv8", True, torch.float64),
    "kv16": ("kv16", False, torch.float64),
    "kv16 bf16": ("kv16", False, torch.bfloat16),
    "kv32": ("kv32", False, torch.float64),
}


def pages_of(name: str, pages: int = 3, fill: int = 0) -> LayerPages:
    word, static, dtype = FORMATS[name]
    kv = kv_format(word, dtype=dtype, static=static)
    return LayerPages(
        torch.full((pages, H, kv.page_bytes(D)), fill, dtype=torch.uint8),
        kv,
        D,
        torch.full((2, H), 0.3) if static else None,
        torch.linspace(-1, 1, H * D).view(H, D),
        torch.full((pages, H, PAGE // LOGICAL, 2, D), float("nan"), dtype=torch.float16),
    )


def draw(name: str, count: int, seed: int, size: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = FORMATS[name][2]
    k, v = (size * torch.randn(count, H, D, generator=generator) for _ in range(2))
    return k.to(dtype), v.to(dtype)


def true_bounds(pages: LayerPages, page: int, part: int, count: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest of the first `count` keys of a logical page, [H, D]."""
    wide = torch.float32 if pages.format.element == torch.bfloat16 else torch.float64
    k, _ = pages.read(torch.tensor([[page]]), wide)
    keys = k[0, :, part * LOGICAL : part * LOGICAL + count]
    return keys.amin(1).double(), keys.amax(1).double()


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=5)
@given(count=st.integers(1, 150), cuts=st.lists(st.integers(1, 150)), seed=st.integers(0, 99))
def test_one_call_chunks_and_single_tokens_give_the_same_bounds(
    name: str, count: int, cuts: list[int], seed: int
) -> None:
    """In the reference the appending kernel writes to another address than the pooling one."""
    k, v = draw(name, count, seed)
    slots = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    slots = slots[torch.arange(count) // PAGE] * PAGE + torch.arange(count) % PAGE
    whole, chunked, single = (pages_of(name) for _ in range(3))
    whole.write(slots, k, v)
    edges = sorted({0, count, *(cut for cut in cuts if cut < count)})
    for first, last in itertools.pairwise(edges):
        chunked.write(slots[first:last], k[first:last], v[first:last])
    for token in range(count):
        single.write(slots[token : token + 1], k[token : token + 1], v[token : token + 1])
    for other in (chunked, single):
        assert whole.statistics is not None
        assert other.statistics is not None
        assert torch.equal(torch.nan_to_num(whole.statistics, 7), torch.nan_to_num(other.statistics, 7))


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=12)
@given(count=st.integers(1, PAGE), seed=st.integers(0, 99), before=st.booleans())
def test_bounds_hold_and_are_tight_after_recycling_too(name: str, count: int, seed: int, before: bool) -> None:
    """What a page held before does not show, not even in a partial logical page."""
    pages = pages_of(name)
    if before:
        for huge in (6e4, -6e4):
            k, v = draw(name, PAGE, seed + 1)
            pages.write(torch.arange(PAGE) + PAGE, k.sign() * huge, v)
    k, v = draw(name, count, seed)
    pages.write(torch.arange(count) + PAGE, k, v)
    assert pages.statistics is not None
    for part in range(-(-count // LOGICAL)):
        low, high = true_bounds(pages, 1, part, min(count - part * LOGICAL, LOGICAL))
        bounds = pages.statistics[1, :, part].double()
        assert (bounds[:, 0] <= low).all()
        assert (bounds[:, 1] >= high).all()
        ulp = 2.0**-10 * torch.maximum(low.abs(), high.abs()) + 2.0**-24
        assert (low - bounds[:, 0] <= ulp).all()
        assert (bounds[:, 1] - high <= ulp).all()


def test_other_logical_pages_are_left_alone() -> None:
    pages = pages_of("kv8")
    k, v = draw("kv8", 1, 0)
    pages.write(torch.tensor([PAGE + LOGICAL]), k, v)
    assert pages.statistics is not None
    assert pages.statistics[1, :, 1].isfinite().all()
    assert pages.statistics.isnan().sum() == pages.statistics.numel() - H * 2 * D


def test_a_skipped_token_leaves_no_trace() -> None:
    pages = pages_of("kv4")
    k, v = draw("kv4", 2, 0)
    pages.write(torch.tensor([-1, -1]), k, v)
    assert pages.statistics is not None
    assert pages.statistics.isnan().all()


@given(st.floats(-66000, 66000, width=64))
def test_rounding_up_to_fp16(x: float) -> None:
    up = _half_above(torch.tensor([x], dtype=torch.float64)).double()
    down = -_half_above(torch.tensor([-x], dtype=torch.float64)).double()
    assert float(down) <= x <= float(up)
    assert float(up) == float(down) or float(up - down) <= max(2.0**-10 * abs(x), 2.0**-24) or abs(x) > 65504
