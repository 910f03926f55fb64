"""Recipes as TOML, calibration text, and the picture of a report."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from omniserve.base.config import Precision
from omniserve.base.errors import ConfigError
from omniserve.formats.checkpoint import open_checkpoint
from omniserve.models.families import family
from omniserve.quantize.calibration import cut, shipped_text
from omniserve.quantize.recipe import Rotate, Samples, default, for_precision, parse, read
from omniserve.quantize.report import picture, summary
from tests.quantize.conftest import RECIPES
from tests.tiny import tiny_model

LEAST = '[weights]\nformat = "w8a8"\n[kv]\nkeys = 8\nvalues = 8\n'


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes(name: str) -> None:
    recipe = default(name)
    assert recipe.name == name
    assert recipe.calibrated
    assert recipe.sha256 == default(name).sha256 != replace(recipe, name="other").sha256
    assert json.loads(json.dumps(recipe.as_dict()))["weights"]["format"] == recipe.weights.format
    bare = recipe.without(["rotate", "reorder", "keys", "smooth", "solve"])
    assert not bare.calibrated
    assert bare.transforms == []


@pytest.mark.parametrize(
    ("word", "group", "name", "bits", "centred"),
    [
        ("w4a8kv4", 128, "w4a8kv4-g128", 4, True),
        ("w4a8kv4", -1, "w4a8kv4-row", 4, True),
        ("w4a8kv8", 128, "w4a8kv8-g128", 8, True),
        ("w8a8kv8", 128, "w8a8kv8", 8, True),
        ("w8a8kv4", 128, "w8a8kv4", 4, True),
        ("w8a8kv16", 128, "w8a8kv16", 16, False),
    ],
)
def test_recipe_of_a_precision(word: str, group: int, name: str, bits: int, centred: bool) -> None:
    recipe = for_precision(Precision.parse(word, group))
    assert (recipe.name, recipe.kv.keys, recipe.kv.values, recipe.centred) == (name, bits, bits, centred)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x", "not valid TOML"),
        ("", r"must have the tables \[weights\] and \[kv\]"),
        ("[wieghts]\n", r"unknown table 'wieghts' \(did you mean weights"),
        (LEAST + "[rotate]\nresidul = true\n", r"rotate.residul: unknown \(did you mean residual"),
        (LEAST + "[rotate]\nresidual = 1\n", "must be true or false"),
        (LEAST + '[rotate]\nconstruction = "paley"\n', "must be one of auto, hadamard, random"),
        (LEAST.replace("w8a8", "w3a8"), "must be one of w4a8-row"),
        (LEAST.replace("keys = 8", "keys = 5"), "must be 4, 8 or 16"),
        (LEAST.replace("keys = 8", "keys = 4"), "the same number"),
        (LEAST + "[solve]\n", r"needs the table \[calibration\]"),
        (LEAST + "[solve]\ndamp = -1\n[calibration]\n", "must be a number from 0 to 10"),
        (LEAST + "[smooth]\ndown = [2]\n[calibration]\n", "numbers from 0 to 1"),
        (LEAST + "[calibration]\nlength = 1\n", "2 or more"),
        (LEAST + "kv = 3\n", "unknown"),
        ("kv = 3\n", "must be a table"),
    ],
)
def test_mistakes_in_a_recipe(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse(text, origin="mine.toml")


def test_a_recipe_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(LEAST)
    assert read(file).weights.format == "w8a8"
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none.toml")
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read(file)


def test_leaving_passes_out() -> None:
    recipe = default("w4a8kv4-g128")
    assert recipe.without(["rotate"]).rotate is None
    assert recipe.without(["rotate.heads"]).rotate == Rotate(heads=False)
    assert recipe.without(["keys.smooth"]).transforms.count("smooth-attention") == 0
    with pytest.raises(ConfigError, match="did you mean rotate"):
        recipe.without(["rotat"])
    with pytest.raises(ConfigError, match="rotate has residual, heads"):
        recipe.without(["rotate.tails"])


def test_a_pass_that_cannot_fold_is_named(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model(tmp_path / "model", hidden=104, head_dim=26))
    spec = family(source.config).spec(source.config)
    recipe = default("w4a8kv4-row")
    recipe.check(spec)
    assert recipe.rotate is not None
    strict = replace(recipe, rotate=replace(recipe.rotate, construction="hadamard"))
    with pytest.raises(ConfigError, match=r"rotate.heads: no Hadamard matrix of size 26 .* --without rotate.heads"):
        strict.check(spec)
    strict.without(["rotate.heads"]).check(spec)
    fused = replace(recipe, weights=replace(recipe.weights, overrides={"model.layers.0.mlp.up_proj": "w8a8"}))
    with pytest.raises(ConfigError, match="fused with its neighbours"):
        fused.check(spec)


def test_samples_of_a_text(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model(tmp_path / "model"))
    spec = family(source.config).spec(source.config)
    ids = [number % 97 for number in range(1000)]
    made = cut(ids, Samples(samples=4, length=100, stride=250), spec, origin="x")
    assert [one[0] for one in made.ids] == [ids[start] for start in (0, 250, 500, 750)]
    assert made.positions == (0, 0, 0, 0)
    spread = cut(ids, Samples(samples=4, length=100), spec, origin="x")
    assert [one[0] for one in spread.ids] == [ids[start] for start in (0, 300, 600, 900)]
    moved = cut(ids, Samples(samples=4, length=100, positions=10_000), spec, origin="x")
    assert max(moved.positions) <= spec.context - 100
    assert len(set(moved.positions)) > 1
    assert moved.sha256 != spread.sha256
    with pytest.raises(ConfigError, match="1000 tokens, but 11 samples of 100 need 1100"):
        cut(ids, Samples(samples=11, length=100), spec, origin="x")
    with pytest.raises(ConfigError, match="token 500"):
        cut([500] * 200, Samples(samples=1, length=100), spec, origin="x")


def test_the_shipped_text_is_there() -> None:
    text = shipped_text()
    assert 350_000 < len(text) < 700_000
    assert "\ufffd" not in text


def test_summary_and_picture() -> None:
    layer = {
        "linears": {"model.layers.0.self_attn.q_proj": {"nearest": 0.02, "gptq": 0.01}},
        "keys": {"before": 0.1, "after": 0.05},
        "output_error": 0.01,
    }
    report = {"model": "m", "recipe": {"name": "r"}, "layers": [layer, layer]}
    assert summary(report) == {"q_proj": (0.02, 0.01)}
    made = picture(report)
    if importlib.util.find_spec("matplotlib") is None:
        assert made is None
    else:
        assert made is not None
        assert made.startswith(b"\x89PNG")
