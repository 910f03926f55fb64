"""The solver: grids, GPTQ against rounding, searches that never hurt, parameters that stay legal."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.formats.table import FORMATS
from omniserve.formats.w4a8 import group_grid, group_legal, unpack_columns
from omniserve.formats.weight import WeightFormat
from omniserve.quantize.recipe import Solve
from omniserve.quantize.solve import (
    descend,
    full_grid,
    gptq,
    inverse_factor,
    normalized,
    reaim,
    refine,
    search,
    solve,
)

QUANTIZED = pytest.mark.parametrize("name", ["w4a8-row", "w4a8-g128", "w8a8"])
SIZES = pytest.mark.parametrize(("n", "k"), [(48, 320), (7, 64), (5, 130), (33, 256)])


def weights(n: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * torch.linspace(0.01, 0.2, n)[:, None]
    w[:, k // 3] *= 4
    return w


def hessian(k: int, seed: int = 1, tokens: int = 600) -> Tensor:
    """Of correlated inputs with some large channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64) / k**0.5 + torch.eye(k, dtype=torch.float64)
    x = torch.randn(tokens, k, generator=generator, dtype=torch.float64) @ mix
    x[:, ::17] *= 5
    return x.T @ x


def error(form: WeightFormat, stored: dict[str, Tensor], w: Tensor, h: Tensor) -> float:
    delta = form.dense(stored, torch.float64) - w.double()
    return float((delta @ h * delta).sum())


def test_grid_law_over_all_ranges_in_eighths() -> None:
    """For every (min, max) within ±119 all 16 codes decode into int8."""
    ends = torch.arange(0, 119 * 8 + 1, dtype=torch.float64) / 8
    low, high = -ends[:, None], ends[None, :]
    scale, zero = group_grid(low, high)
    zero = zero.expand_as(scale)
    assert bool(group_legal(scale, zero).all())
    assert 1 <= scale.min() <= scale.max() <= 17
    assert 0 <= zero.min() <= zero.max() <= 119
    assert (15 * scale).max() <= 255
    assert (15 * scale - zero).max() <= 127


def test_a_protective_range_of_120_breaks_the_law() -> None:
    ends = torch.arange(0, 120 * 8 + 1, dtype=torch.float64) / 8
    scale, zero = group_grid(-ends[:, None], ends[None, :])
    assert not bool(group_legal(scale, zero.expand_as(scale)).all())


def test_wrapped_int8_arithmetic_equals_wide_for_every_legal_parameter() -> None:
    for scale, zero in itertools.product(range(1, 18), range(129)):
        legal = bool(group_legal(torch.tensor(scale), torch.tensor(zero)))
        wide = torch.arange(16) * scale - zero
        wrapped = torch.remainder(wide, 256).to(torch.uint8).view(torch.int8).long()
        assert legal == (int(wide.min()) >= -128 and int(wide.max()) <= 127)
        assert legal <= torch.equal(wrapped, wide)


@QUANTIZED
@SIZES
def test_gptq_with_a_unit_hessian_is_rounding_to_nearest(name: str, n: int, k: int) -> None:
    w, form = weights(n, k), FORMATS[name]
    grid = full_grid(w, form)
    codes = gptq(w, grid, inverse_factor(torch.eye(k, dtype=torch.float64), 0.01))
    assert torch.equal(codes, grid.nearest(w))
    assert torch.equal(descend(w, torch.eye(k), grid, codes), codes)


@QUANTIZED
@SIZES
def test_each_step_lowers_the_error(name: str, n: int, k: int) -> None:
    w, form, h = weights(n, k), FORMATS[name], normalized(hessian(k))
    flat = h.float()

    def miss(grid: object, codes: Tensor) -> Tensor:
        delta = grid.values(codes) - w  # type: ignore[attr-defined]  # a Grid
        return (delta @ flat * delta).sum(1)

    full = full_grid(w, form)
    searched = search(w, flat, full)
    plain, found = miss(full, full.nearest(w)), miss(searched, searched.nearest(w))
    if searched.scale.shape[1] == 1:  # per row the search minimizes this very error
        assert bool((found <= plain * 1.0001).all())
    assert float(found.sum()) <= float(plain.sum()) * 1.01
    codes = gptq(w, searched, inverse_factor(h, 0.01))
    propagated = miss(searched, codes)
    assert float(propagated.sum()) <= float(found.sum()) * 1.01
    improved = descend(w, flat, searched, codes)
    descended = miss(searched, improved)
    assert bool((descended <= propagated * 1.0001 + 1e-9).all())
    refined = refine(w, flat, searched, improved)
    assert bool((miss(refined, improved) <= descended * 1.0001 + 1e-9).all())


@QUANTIZED
def test_solved_tensors_are_those_of_the_format_and_its_errors_are_true(name: str) -> None:
    w, form, h = weights(24, 320), FORMATS[name], hessian(320)
    solved = solve(w, h, form, Solve(descend=1))
    for field, want in form.fields(24, 320).items():
        assert tuple(solved.stored[field].shape) == want.shape
        assert solved.stored[field].dtype == want.dtype
    size = float((w.double() @ h * w.double()).sum())
    assert list(solved.relative()) == ["nearest", "search", "gptq", "refine"]
    assert solved.relative()["refine"] == pytest.approx(error(form, solved.stored, w, h) / size, rel=1e-3)
    upper, lower = solved.rows(slice(0, 10)), solved.rows(slice(10, 24))
    assert torch.equal(form.concat([upper.stored, lower.stored])["codes"], solved.stored["codes"])


@QUANTIZED
def test_rows_do_not_depend_on_each_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Solving in parts, as large matrices are, changes no code."""
    w, form, h = weights(20, 192), FORMATS[name], hessian(192)
    whole = solve(w, h, form, Solve())
    monkeypatch.setattr("omniserve.quantize.solve.PART", 192 * 7)
    parts = solve(w, h, form, Solve())
    for field, tensor in whole.stored.items():
        assert torch.equal(parts.stored[field], tensor), field


def test_reaim_recovers_what_changed_inputs_lost() -> None:
    """Where x̂ is a matrix times x, the outputs on x̂ can be those on x; a large δ keeps the weights."""
    k = 40
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(500, k, generator=generator, dtype=torch.float64)
    seen = x @ (torch.eye(k, dtype=torch.float64) + 0.2 * torch.randn(k, k, generator=generator, dtype=torch.float64))
    w = torch.randn(8, k, generator=generator)
    h, c = seen.T @ seen, (x - seen).T @ seen
    before = float((seen @ w.double().T - x @ w.double().T).norm())
    after = float((seen @ reaim(w, h, c, 1e-9).double().T - x @ w.double().T).norm())
    assert after < 1e-4 * before
    assert torch.allclose(reaim(w, h, c, 1e9), w, atol=1e-6)
    assert torch.equal(reaim(w, torch.zeros_like(h), torch.zeros_like(c), 0.5), w)


def test_dead_channels_and_few_tokens_are_solved() -> None:
    w, h = weights(16, 192), hessian(192, tokens=30)
    h[:, 5], h[5] = 0, 0
    for name in ("w4a8-row", "w4a8-g128", "w8a8"):
        form = FORMATS[name]
        dense = form.dense(solve(w, h, form, Solve(descend=1)).stored)
        assert torch.isfinite(dense).all()
        nothing = form.dense(solve(w, torch.zeros_like(h), form, Solve()).stored)
        assert float((nothing - w).norm() / w.norm()) < 0.2


def test_bad_hessians_and_weights_are_refused() -> None:
    w, h = weights(4, 64), hessian(64)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        solve(w, h * float("nan"), FORMATS["w4a8-row"], Solve())
    with pytest.raises(CheckpointError, match="even number"):
        solve(weights(4, 63), hessian(63), FORMATS["w4a8-row"], Solve())
    form = FORMATS["w4a8-g128"]
    with pytest.raises(CheckpointError, match="int8 cannot hold"):
        form.from_codes(torch.zeros(1, 4), torch.tensor([[17.0]]), torch.tensor([[0.0]]), torch.ones(1, 1))  # type: ignore[attr-defined]  # of W4A8
    with pytest.raises(CheckpointError, match="not positive"):
        form.from_codes(torch.zeros(1, 4), torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1))  # type: ignore[attr-defined]  # of W4A8


@given(
    rows=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=130, max_size=130), min_size=1, max_size=3),
    seed=st.integers(0, 5),
)
def test_codes_of_adversarial_groups_stay_in_range(rows: list[list[float]], seed: int) -> None:
    """Whatever the weights, GPTQ's overshoot and the refinement included, every stored group decodes into int8."""
    w = torch.tensor(rows)
    form = FORMATS["w4a8-g128"]
    stored = solve(w, hessian(130, seed=seed, tokens=200), form, Solve(descend=1)).stored
    scale, zero = stored["group_scale"].long(), stored["group_zero"].long()
    assert bool(group_legal(scale, zero).all())
    level1 = unpack_columns(stored["codes"]).long()[:, :128] * scale[:, :1] - zero[:, :1]
    assert -128 <= int(level1.min()) <= int(level1.max()) <= 127
    assert torch.isfinite(form.dense(stored, torch.float64)).all()
