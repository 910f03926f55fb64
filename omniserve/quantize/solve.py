"""The weight solver: ranges searched with the Hessian, GPTQ with error propagation, and parameters refined afterwards.

Everything minimizes tr(Δ H Δᵀ): Δ [N, K] the rounding error of the weights, H [K, K] the sum of x̂ᵀ x̂ over what the
quantized model feeds. Grids and rounding are those of `formats`. Rows are independent; large matrices go in parts.
Source: GPTQ (arXiv 2210.17323) algorithm 1; the two-level grid: QServe (arXiv 2405.04532) section 4.1, with the
protective range of qoq.md section 2; the re-aim and the searches: qoq.md section 3.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.formats import w4a8, w8a8
from omniserve.formats.weight import WeightFormat
from omniserve.quantize.recipe import Solve

BLOCK = 128
"""Columns between two updates of the rest."""

PART = 1 << 26
"""Weights that are solved at once: what is held beside them is five times their fp32 size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Values (code * scale - zero) * outer.

    scale, zero  [N, groups]; outer [N, 1] or None for 1; width: columns of a group; codes low..top
    """

    scale: Tensor
    zero: Tensor
    outer: Tensor | None
    width: int
    low: int
    top: int

    def columns(self, p: Tensor, k: int) -> Tensor:
        """Return a parameter [N, groups] for each of k columns."""
        return p if p.shape[1] == 1 else p.repeat_interleave(self.width, 1)[:, :k]

    def inner(self, w: Tensor) -> Tensor:
        """Return weights in the units of scale and zero: w / outer, within ±119 of the grouped form."""
        return w if self.outer is None else self.exact(w).clamp_(-w4a8.PROTECTED, w4a8.PROTECTED)

    def exact(self, w: Tensor) -> Tensor:
        """Return weights in the units of scale and zero, wherever they lie."""
        return w if self.outer is None else w / self.outer

    def nearest(self, w: Tensor) -> Tensor:
        """Return the codes nearest to weights [N, K]."""
        k = w.shape[1]
        return w8a8.snap(self.inner(w), self.columns(self.scale, k), self.columns(self.zero, k), self.low, self.top)

    def values(self, codes: Tensor) -> Tensor:
        """Return the weights that codes [N, K] mean."""
        level1 = self.level1(codes)
        return level1 if self.outer is None else level1.mul_(self.outer)

    def level1(self, codes: Tensor) -> Tensor:
        """Return code * scale - zero of codes [N, K]."""
        k = codes.shape[1]
        return (codes * self.columns(self.scale, k)).sub_(self.columns(self.zero, k))

    def rows(self, part: slice) -> "Grid":
        """Return the grid of some rows."""
        outer = None if self.outer is None else self.outer[part]
        return replace(self, scale=self.scale[part], zero=self.zero[part], outer=outer)


@dataclass(frozen=True, slots=True)
class Solved:
    """A solved weight: its stored tensors; Δ H Δᵀ of each row [N] after each step by the step's name; W H Wᵀ [N]."""

    stored: dict[str, Tensor]
    errors: dict[str, Tensor]
    size: Tensor

    def rows(self, part: slice) -> "Solved":
        """Return some rows."""
        stored = {name: tensor[part] for name, tensor in self.stored.items()}
        return Solved(stored, {name: error[part] for name, error in self.errors.items()}, self.size[part])

    def relative(self) -> dict[str, float]:
        """Return tr(Δ H Δᵀ) / tr(W H Wᵀ) after each step."""
        size = float(self.size.sum())
        return {name: float(error.sum()) / size if size else 0.0 for name, error in self.errors.items()}


def solve(w: Tensor, h: Tensor, form: WeightFormat, options: Solve) -> Solved:
    """Return the weight w [N, K] in a format, and its errors. Rows do not depend on each other.

    h  fp64 [K, K]
    Raises CheckpointError if the format cannot hold the weight, or H is not finite.
    """
    if not bool(torch.isfinite(h.diagonal()).all()):
        raise CheckpointError("the calibration activations hold NaN or infinity")
    form.fields(*w.shape)
    h = normalized(h)
    factor = inverse_factor(h, options.damp) if options.gptq else None
    flat, damped = h.float(), ridged(h, options.damp).float() if options.refine or options.descend else None
    del h  # K² numbers in fp64 are what a run holds most of
    stored: list[dict[str, Tensor]] = []
    errors: list[dict[str, Tensor]] = []
    for part in torch.split(w.float(), max(1, PART // w.shape[1])):
        grid, codes, steps = _solve_rows(part, flat, damped, factor, form, options)
        stored.append(store(form, grid, codes))
        errors.append({**steps, "": _energy(part, flat)[:, 0].double()})
    whole = {name: torch.cat([part[name] for part in errors]) for name in errors[0]}
    size = whole.pop("")
    return Solved(form.concat(stored), whole, size)


def nearest(w: Tensor, form: WeightFormat) -> Solved:
    """Return the weight w [N, K] as the format alone rounds it, without a Hessian."""
    stored = form.from_dense(w)
    wide = w.double()
    error = (form.dense(stored, torch.float64) - wide).square().sum(1)
    return Solved(stored, {"nearest": error}, wide.square().sum(1))


def reaim(w: Tensor, h: Tensor, c: Tensor, delta: float) -> Tensor:
    """Return weights whose outputs on x̂ are nearest to those of w [N, K] on x: w + w C (H + δ mean(diag H) I)⁻¹.

    h = Σ x̂ x̂ᵀ, c = Σ (x - x̂) x̂ᵀ, fp64 [K, K]
    """
    mean = float(h.diagonal().mean())
    if mean <= 0:
        return w
    shift = torch.cholesky_solve((w.double() @ c).T, torch.linalg.cholesky(ridged(h, delta * mean))).T
    return (w.double() + shift).to(w.dtype)


def store(form: WeightFormat, grid: Grid, codes: Tensor) -> dict[str, Tensor]:
    """Return the stored tensors of codes on a grid."""
    if isinstance(form, w4a8.W4A8):
        return form.from_codes(codes, grid.scale, grid.zero, grid.outer)
    assert isinstance(form, w8a8.W8A8), f"solve: {form.name} has no grid"
    return form.from_codes(codes, grid.scale[:, 0])


def full_grid(w: Tensor, form: WeightFormat) -> Grid:
    """Return the grid of w [N, K] over its full ranges."""
    if isinstance(form, w8a8.W8A8):
        scale = w8a8.symmetric_scale(w)
        return Grid(
            scale=scale, zero=torch.zeros_like(scale), outer=None, width=w.shape[1], low=-w8a8.TOP, top=w8a8.TOP
        )
    assert isinstance(form, w4a8.W4A8), f"solve: {form.name} has no grid"
    if form.group is None:
        scale, zero = w4a8.row_grid(w.amin(1, keepdim=True), w.amax(1, keepdim=True))
        return Grid(scale=scale, zero=zero, outer=None, width=w.shape[1], low=0, top=w4a8.TOP)
    outer = w4a8.level1_scale(w)
    found = [_group_range(u) for _, u in _groups((w / outer).clamp_(-w4a8.PROTECTED, w4a8.PROTECTED), w4a8.GROUP)]
    scale, zero = (torch.cat(p, 1) for p in zip(*(w4a8.group_grid(*ends) for ends in found), strict=True))
    return Grid(scale=scale, zero=zero, outer=outer, width=w4a8.GROUP, low=0, top=w4a8.TOP)


def search(w: Tensor, h: Tensor, grid: Grid) -> Grid:
    """Return the grid whose groups' own errors Δ_g H_gg Δ_gᵀ are least, over shares of their ranges.

    Of a group also the neighbouring scales are tried, where all codes stay within int8.
    """
    inner = grid.inner(w)
    scales, zeros = [], []
    for columns, u in _groups(inner, grid.width):
        found = _search_group(u, h[columns, columns], grid)
        scales.append(found[0])
        zeros.append(found[1])
    return replace(grid, scale=torch.cat(scales, 1), zero=torch.cat(zeros, 1))


def _search_group(u: Tensor, h: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return scale and zero [N, 1] of least error for one group u [N, k]."""
    best, scale, zero = None, u, u
    for new_scale, new_zero in _trials(u, grid):
        delta = w8a8.snap(u, new_scale, new_zero, grid.low, grid.top).mul_(new_scale).sub_(new_zero).sub_(u)
        error = _energy(delta, h)
        if best is None:
            best, scale, zero = error, new_scale, new_zero
            continue
        better = error < best
        scale, zero = torch.where(better, new_scale, scale), torch.where(better, new_zero, zero)
        best = torch.minimum(best, error)
    return scale, zero


def _trials(u: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the parameters to try, those of the full range first; illegal ones are replaced by those."""
    if grid.low < 0:
        for ratio in w4a8.RATIOS[:5]:
            scale = w8a8.symmetric_scale(u, ratio)
            yield scale, torch.zeros_like(scale)
        return
    if grid.outer is None:
        low, high = u.amin(1, keepdim=True), u.amax(1, keepdim=True)
        for ratio in w4a8.RATIOS:
            yield w4a8.row_grid(low * ratio, high * ratio)
        return
    low, high = _group_range(u)
    first = w4a8.group_grid(low, high)
    yield first
    for ratio in w4a8.RATIOS:
        scale, zero = w4a8.group_grid(low * ratio, high * ratio)
        for step in (-1, 0, 1) if ratio < 1 else (-1, 1):
            legal = w4a8.group_legal(scale + step, zero)
            yield torch.where(legal, scale + step, first[0]), torch.where(legal, zero, first[1])


def _group_range(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the range of a group's level-1 values, which includes 0."""
    return u.amin(1, keepdim=True).clamp_(max=0), u.amax(1, keepdim=True).clamp_(min=0)


def _groups(u: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the columns of each group and their values; the last group may be short."""
    for start in range(0, u.shape[1], width):
        columns = slice(start, min(start + width, u.shape[1]))
        yield columns, u[:, columns]


def _solve_rows(
    w: Tensor, h: Tensor, damped: Tensor | None, factor: "Factor | None", form: WeightFormat, options: Solve
) -> tuple[Grid, Tensor, dict[str, Tensor]]:
    def error(grid: Grid, codes: Tensor) -> Tensor:
        return _energy(grid.values(codes) - w, h)[:, 0].double()

    grid = full_grid(w, form)
    codes = grid.nearest(w)
    errors = {"nearest": error(grid, codes)}
    if options.search:
        grid = search(w, h, grid)
        codes = grid.nearest(w)
        errors["search"] = error(grid, codes)
    if factor is not None:
        codes = gptq(w, grid, factor)
        errors["gptq"] = error(grid, codes)
    for _ in range(max(options.descend, 1 if options.refine else 0)):
        assert damped is not None
        if options.descend:
            codes = descend(w, damped, grid, codes)
        if options.refine:
            grid = refine(w, damped, grid, codes)
    if options.refine or options.descend:
        errors["refine"] = error(grid, codes)
    return grid, codes, errors


@dataclass(frozen=True, slots=True)
class Factor:
    """order int64 [K]: columns by descending diagonal; upper fp32 [K, K]: Cholesky factor of the inverse of H there."""

    order: Tensor
    upper: Tensor


def inverse_factor(h: Tensor, damp: float) -> Factor:
    """Return U with Uᵀ U = (H + damp · mean diagonal · I)⁻¹, in the order of GPTQ; fp64 inside."""
    order = h.diagonal().argsort(descending=True, stable=True)
    mean = h.diagonal()[order].mean()
    for extra in range(100):
        damped = ridged(h[order[:, None], order], (damp + 0.001 * extra) * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            del lower
            return Factor(order, torch.linalg.cholesky(inverse, upper=True).float())
    raise CheckpointError("the calibration activations give no positive definite Hessian: use more or other text")


def gptq(w: Tensor, grid: Grid, factor: Factor) -> Tensor:
    """Return the codes [N, K] that GPTQ chooses on a fixed grid.

    Columns go by descending diagonal of H in blocks of 128, transposed so that a column is contiguous.
    """
    k = w.shape[1]
    order, upper = factor.order, factor.upper
    rest = grid.inner(w).T[order].contiguous()
    scale, zero = (grid.columns(p, k).T for p in (grid.scale, grid.zero))
    fixed = scale.shape[0] == 1
    scale, zero = (p.contiguous() if fixed else p[order].contiguous() for p in (scale, zero))
    codes = torch.empty_like(rest)
    diagonal = upper.diagonal().tolist()
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        errors = torch.empty_like(rest[start:stop])
        for j in range(start, stop):
            s, z = (scale[0], zero[0]) if fixed else (scale[j], zero[j])
            code = w8a8.snap(rest[j], s, z, grid.low, grid.top)
            codes[j] = code
            error = torch.sub(rest[j], code.mul_(s).sub_(z), out=errors[j - start]).div_(diagonal[j])
            if j + 1 < stop:
                rest[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
        if stop < k:
            rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    made = torch.empty_like(codes)
    made[order] = codes
    return made.T.contiguous()


def descend(w: Tensor, h: Tensor, grid: Grid, codes: Tensor) -> Tensor:
    """Return codes [N, K] after each in turn took the value that is best with all others as they are.

    The error never grows. One round costs as much as GPTQ.
    """
    k = w.shape[1]
    scale, zero = (grid.columns(p, k).T.contiguous() for p in (grid.scale, grid.zero))
    fixed = scale.shape[0] == 1
    made = codes.T.contiguous()
    values = made * scale - zero
    residual = h @ (values - grid.exact(w).T)
    diagonal = h.diagonal().tolist()
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        moved = torch.zeros_like(values[start:stop])
        for j in range(start, stop):
            if diagonal[j] <= 0:
                continue
            s, z = (scale[0], zero[0]) if fixed else (scale[j], zero[j])
            wanted = torch.sub(values[j], residual[j], alpha=1 / diagonal[j])
            made[j] = code = w8a8.snap(wanted, s, z, grid.low, grid.top)
            torch.sub(code * s - z, values[j], out=moved[j - start])
            residual[start:stop].addr_(h[start:stop, j], moved[j - start])
        if stop < k:
            residual[stop:].addmm_(h[stop:, start:stop], moved)
    return made.T.contiguous()


def refine(w: Tensor, h: Tensor, grid: Grid, codes: Tensor) -> Grid:
    """Return the grid with scales and zeros improved for fixed codes; the error never grows."""
    if grid.low < 0:
        return _refine_outer(w, h, grid, codes)
    if grid.outer is None:
        return _refine_row(w, h, grid, codes)
    return _refine_outer(w, h, _refine_groups(w, h, grid, codes), codes)


def _refine_row(w: Tensor, h: Tensor, grid: Grid, codes: Tensor) -> Grid:
    """Least squares over scale and zero of each row together, kept where it helps after rounding to fp16."""
    through = codes @ h
    ones = h.sum(0)
    total = float(ones.sum())
    qq, q1 = (through * codes).sum(1, keepdim=True), through.sum(1, keepdim=True)
    qw, w1 = (through * w).sum(1, keepdim=True), (w * ones).sum(1, keepdim=True)
    determinant = qq * total - q1 * q1
    scale = ((qw * total - w1 * q1) / determinant).half().float()
    zero = ((qw * q1 - w1 * qq) / determinant).half().float()
    return _better(w, h, codes, grid, replace(grid, scale=scale, zero=zero))


def _refine_outer(w: Tensor, h: Tensor, grid: Grid, codes: Tensor) -> Grid:
    """Least squares over the row scale: of the grouped form, rounded to fp16, or of 8-bit codes."""
    level1 = grid.level1(codes)
    through = level1 @ h
    share = (through * w).sum(1, keepdim=True) / (through * level1).sum(1, keepdim=True)
    if grid.outer is None:
        return _better(w, h, codes, grid, replace(grid, scale=grid.scale * share, zero=grid.zero * share))
    return _better(w, h, codes, grid, replace(grid, outer=share.half().float()))


def _better(w: Tensor, h: Tensor, codes: Tensor, old: Grid, new: Grid) -> Grid:
    """Return per row the grid of smaller error; a scale that is not positive and finite loses."""
    first = new.scale if new.outer is None else new.outer
    legal = torch.isfinite(first) & (first > 0) & torch.isfinite(new.zero).all(1, keepdim=True)
    errors = [_energy(grid.values(codes) - w, h) for grid in (old, new)]
    take = legal & (errors[1] < errors[0])
    outer = None if old.outer is None or new.outer is None else torch.where(take, new.outer, old.outer)
    return replace(
        old,
        scale=torch.where(take, new.scale, old.scale),
        zero=torch.where(take, new.zero, old.zero),
        outer=outer,
    )


def _refine_groups(w: Tensor, h: Tensor, grid: Grid, codes: Tensor) -> Grid:
    """Try scale ± 1 and zero ± 2 of each group in turn, by the error of the whole row.

    Changing a group's values by a q - b 1 changes the row's error by a² qHq - 2ab qH1 + b² 1H1 + 2a qr - 2b 1r with
    r = H Δ: all neighbours cost one product.
    """
    scale, zero = grid.scale.clone(), grid.zero.clone()
    residual = (grid.level1(codes) - grid.exact(w)) @ h
    for number, (columns, q) in enumerate(_groups(codes, grid.width)):
        block, r = h[columns, columns], residual[:, columns]
        through = q @ block
        ones = block.sum(0)
        qq, q1, one = (through * q).sum(1), through.sum(1), float(ones.sum())
        qr, r1 = (q * r).sum(1), r.sum(1)
        s, z = scale[:, number], zero[:, number]
        least, move_s, move_z = torch.zeros_like(s), torch.zeros_like(s), torch.zeros_like(s)
        for a in (-1, 0, 1):
            for b in (-2, -1, 0, 1, 2):
                change = a * a * qq - 2 * a * b * q1 + b * b * one + 2 * a * qr - 2 * b * r1
                take = (change < least) & w4a8.group_legal(s + a, z + b)
                least = torch.where(take, change, least)
                move_s, move_z = move_s.masked_fill(take, a), move_z.masked_fill(take, b)
        scale[:, number] += move_s
        zero[:, number] += move_z
        residual += (q * move_s[:, None] - move_z[:, None]) @ h[columns]
    return replace(grid, scale=scale, zero=zero)


def _energy(delta: Tensor, h: Tensor) -> Tensor:
    """Return Δ H Δᵀ of each row [N, 1]."""
    return (delta @ h).mul_(delta).sum(1, keepdim=True)


def ridged(h: Tensor, ridge: float | Tensor) -> Tensor:
    """Return H + ridge · I."""
    made = h.clone()
    made.diagonal().add_(ridge)
    return made


def normalized(h: Tensor) -> Tensor:
    """Return H with a mean diagonal of 1, so that fp32 holds its errors; of no activations at all, the identity."""
    mean = float(h.diagonal().mean())
    return h / mean if mean > 0 else torch.eye(len(h), dtype=h.dtype, device=h.device)
