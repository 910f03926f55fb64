"""Every transform leaves the function of every family unchanged; λ without the rotation's pairs does not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omniserve.base.config import Options
from omniserve.base.spec import ModelSpec
from omniserve.engine.build import build
from omniserve.formats.checkpoint import open_checkpoint
from omniserve.formats.table import FORMATS
from omniserve.quantize.forward import Forward
from omniserve.quantize.hadamard import orthogonal
from omniserve.quantize.kvsmooth import fold_key_factor, key_factor
from omniserve.quantize.layer import Layer
from omniserve.quantize.observe import Statistics
from omniserve.quantize.recipe import Recipe
from omniserve.quantize.reorder import reorder_down, reorder_out
from omniserve.quantize.rotate import fold_norms, rotate_heads, rotate_residual, turned
from omniserve.quantize.smooth import smooth_down, smooth_out
from omniserve.quantize.stages import Notes, Work, observe, transform
from tests.model.test_transformers import score
from tests.quantize.conftest import SHAPES, calibration, small
from tests.quantize.fakequant import CPU, Model, read, streams
from tests.tiny import tiny_model

Change = Callable[[Layer, Statistics, ModelSpec], tuple[Layer, Statistics]]

ROW = FORMATS["w4a8-row"]


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of logits, relative to the largest logit."""
    return float((a - b).abs().max() / a.abs().max())


def per_layer(model: Model, folder: Path, recipe: Recipe, change: Callable[[Layer, Statistics, Work], Layer]) -> Model:
    """The model with each layer changed, by statistics of a sample that runs through the unchanged ones."""
    spec, dtype = model.spec, model.embedding.dtype
    work = Work(
        recipe=recipe,
        spec=spec,
        forward=Forward(spec, positions=40, device=CPU),
        positions=(0, 0),
        length=40,
        device=CPU,
    )
    ids = calibration(Path(folder / "model"), samples=2).ids
    samples = [model.embedding[list(one)] for one in ids]
    made = []
    for layer in model.layers:
        files = streams(folder, samples, dtype, spec.heads * spec.head_dim)
        seen = observe(layer, files, work)
        made.append(change(layer, seen, work))
        samples = [files.next_plain[number] for number in range(2)]
    return replace(model, layers=made)


def rotated(model: Model, *, residual: bool, heads: bool) -> Model:
    layers = list(model.layers)
    if heads:
        layers = [rotate_heads(layer, orthogonal(model.spec.head_dim)) for layer in layers]
    if not residual:
        return replace(model, layers=layers)
    r = orthogonal(model.spec.hidden)
    return replace(
        model,
        layers=[rotate_residual(fold_norms(layer), r) for layer in layers],
        embedding=turned(model.embedding, r),
        head=turned(model.head * model.norm, r),
        norm=torch.ones_like(model.norm),
    )


CHANGES: dict[str, Change] = {
    "reorder-out": reorder_out,
    "reorder-down": lambda layer, seen, spec: reorder_down(layer, seen),
    "smooth-down": lambda layer, seen, spec: smooth_down(layer, seen, ROW, [(0.3, 0.7)])[:2],
    "smooth-out": lambda layer, seen, spec: smooth_out(layer, seen, spec, ROW, [(0.3, 0.7)])[:2],
    "smooth-attention": lambda layer, seen, spec: fold_key_factor(
        layer, seen, spec, key_factor(layer, seen, spec, (0.5, 0.5))
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_transforms_leave_logits_unchanged(any_model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    limit = 1e-9 if dtype == torch.float64 else 1e-4
    model = read(any_model, dtype)
    ids = torch.randint(0, model.spec.vocab, (40,), generator=torch.Generator().manual_seed(9)).tolist()
    before = model.logits(ids)
    assert largest(before, rotated(model, residual=True, heads=False).logits(ids)) < limit
    assert largest(before, rotated(model, residual=False, heads=True).logits(ids)) < limit
    for name, change in CHANGES.items():
        recipe = small("w4a8kv4-g128")
        changed = per_layer(model, tmp_path, recipe, lambda one, seen, work, do=change: do(one, seen, work.spec)[0])
        assert any(
            not torch.equal(a.weight, b.weight)
            for old, new in zip(model.layers, changed.layers, strict=True)
            for a, b in zip(old.linears(), new.linears(), strict=True)
        ) or (name == "smooth-attention" and model.spec.qk_norm)
        assert largest(before, changed.logits(ids)) < limit, name
    everything = per_layer(
        rotated(model, residual=True, heads=True),
        tmp_path,
        small("w4a8kv4-g128"),
        lambda layer, seen, work: transform(layer, seen, work, Notes()),
    )
    assert largest(before, everything.logits(ids)) < limit


def test_statistics_move_with_the_weights(any_model: Path, tmp_path: Path) -> None:
    """What the passes say of a transformed layer is what observing it says."""
    model = read(any_model, torch.float64)
    changes = list(CHANGES.values())

    def check(layer: Layer, seen: Statistics, work: Work) -> Layer:
        for change in changes:
            layer, seen = change(layer, seen, work.spec)
        ids = calibration(tmp_path / "model", samples=2).ids
        samples = [model.embedding[list(one)] for one in ids]
        again = observe(layer, streams(tmp_path / "again", samples, torch.float64, layer.out.weight.shape[1]), work)
        pairs = [
            (seen.key_peak, again.key_peak),
            (seen.query_peak, again.query_peak),
            (seen.key_mean, again.key_mean),
            (seen.out.peak, again.out.peak),
            (seen.out.rows, again.out.rows),
            *zip(seen.attention, again.attention, strict=True),
            *((a.peak, b.peak) for a, b in zip(seen.down, again.down, strict=True)),
            *((a.rows, b.rows) for a, b in zip(seen.down, again.down, strict=True)),
        ]
        for moved, observed in pairs:
            assert torch.allclose(moved, observed, rtol=1e-9, atol=1e-12)
        return layer

    (tmp_path / "again").mkdir()
    per_layer(replace(model, layers=model.layers[:1]), tmp_path, small("w4a8kv4-g128"), check)


@pytest.mark.parametrize("name", ["gqa", "qwen2", "qwen3"])
def test_factors_that_break_the_pairs_of_the_rotation_change_logits(name: str, tmp_path: Path) -> None:
    model = read(tiny_model(tmp_path / "model", **SHAPES[name]), torch.float64)  # type: ignore[arg-type]
    ids = list(range(40))
    before = model.logits(ids)

    def broken(layer: Layer, seen: Statistics, work: Work) -> Layer:
        factor = key_factor(layer, seen, work.spec, (0.5, 0.0))
        first, second = factor.chunk(2, 1)
        one_sided = torch.cat([first, torch.ones_like(second)], 1)
        return fold_key_factor(layer, seen, work.spec, one_sided)[0]

    changed = per_layer(model, tmp_path, small("w4a8kv4-g128"), broken)
    assert largest(before, changed.logits(ids)) > 1e-3


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_the_arithmetic_is_the_served_one(name: str, tmp_path: Path) -> None:
    """In full precision the quantizer's forward pass and the engine's give the same logits."""
    path = tiny_model(tmp_path / "model", **SHAPES[name])  # type: ignore[arg-type]
    ids = torch.randint(0, 97, (80,), generator=torch.Generator().manual_seed(3)).tolist()
    served = score(build(path, Options(precision="w16a16kv32", dtype="float32", max_num_seqs=2)), ids)
    assert largest(served, read(open_checkpoint(path), torch.float32).logits(ids)) < 1e-4
