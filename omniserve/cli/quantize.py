"""`omniserve quantize`: a 16-bit model becomes a calibrated low-bit checkpoint; killed at any moment, it continues."""

import importlib.resources
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from omniserve.base.config import GROUP, Options, Precision
from omniserve.base.errors import ConfigError
from omniserve.base.numbers import human_bytes
from omniserve.cli.flags import Common, Whole, read_text
from omniserve.cli.loading import leaving_at_once, load, need_torch, words
from omniserve.cli.output import Bars, as_json, result, say, table, warn

if TYPE_CHECKING:
    from omniserve.evals.perplexity import Score
    from omniserve.formats.checkpoint import Source
    from omniserve.quantize.calibration import Calibration
    from omniserve.quantize.recipe import Recipe
    from omniserve.quantize.stream import Result
    from omniserve.text import Tokenizer

CHECKED = "roosevelt-1905.txt"
"""The text, beside this package, on which the result is compared with the model."""
WINDOW = 512


def quantize(
    model: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    recipe: Path | None = None,
    precision: str = "w4a8kv4",
    group_size: int = GROUP,
    calibration: Path | None = None,
    samples: Whole | None = None,
    stride: Whole | None = None,
    without: str | None = None,
    static_kv: Literal["head", "tensor"] | None = None,
    quick: Annotated[bool, Parameter(negative="")] = False,
    check: bool = True,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
    common: Common = Common(),  # noqa: ARG001, B008, RUF100  # the log level is read before; frozen
) -> None:
    """Quantize a 16-bit model (QoQ): rotation, smoothing, clip search, GPTQ, layer by layer.

    Parameters
    ----------
    model
        A .gguf file or a folder of safetensors, in 16 bit.
    output
        Folder to write. A run that was stopped continues there and ends with the same bytes.
    recipe
        TOML file with the passes; default: the one that ships for the precision.
    precision
        What to make: w4a8kv4, w4a8kv8, w8a8kv8, ...
    group_size
        Columns per scale of 4-bit weights: 128, or -1 per channel.
    calibration
        Text to calibrate on; default: public-domain speeches that ship with omniserve.
    samples
        Samples of the calibration text; default: as the recipe says. More are slower and mostly better.
    stride
        Tokens between the starts of samples; default: spread evenly over the text.
    without
        Passes to leave out, with commas between them: rotate, reorder, keys, smooth, solve, or one switch of a pass
        such as rotate.heads.
    static_kv
        With 8-bit KV: one fixed scale per key head, or one per layer (tensor), instead of one per token and head.
    quick
        Round to nearest with a clip search: no calibration, seconds instead of minutes, worse.
    check
        Compare perplexity before and after through the served path.
    device
        Where to compute; auto: a GPU that the kernels run on, else the CPU.
    json
        Print one JSON object.
    """
    need_torch()
    with leaving_at_once():
        from omniserve.quantize import recipe as recipes
    chosen = recipes.read(recipe) if recipe else recipes.for_precision(Precision.parse(precision, group_size))
    chosen = _adjusted(chosen, samples, stride, without, static_kv)
    if quick:
        chosen = replace(chosen.without(recipes.PASSES), name=f"{chosen.name}-quick")
    made = make(model, chosen, output, calibration=calibration, device=device, quiet=json)
    if made.resumed:
        say(f"continued after {made.resumed} layers of an earlier run")
    if chosen.calibrated is False:
        warn("rounded to nearest without calibration (--quick): compare with `omniserve eval fidelity`")
    scores = _compared(model, output, device) if check else {}
    _draw(made.report, output)
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    if json:
        rows = {name: {"perplexity": score.perplexity, "kl": score.kl} for name, score in scores.items()}
        as_json({"folder": str(output), "recipe": chosen.name, "bytes": size, "resumed": made.resumed, "check": rows})
        return
    if scores:
        lines = [[name, f"{s.perplexity:.3f}", "" if s.kl is None else f"{s.kl:.4f}"] for name, s in scores.items()]
        table(["served", "perplexity", "KL (nats)"], lines, title=f"{CHECKED}, {WINDOW} tokens")
    result(f"{output}: {chosen.name}, {human_bytes(size)}")


def make(
    model: str,
    recipe: "Recipe",
    output: Path,
    *,
    calibration: Path | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> "Result":
    """Quantize a model into a folder, with progress bars unless quiet; continues what was begun there."""
    with leaving_at_once():
        import torch

        from omniserve.engine.device import find_device
        from omniserve.formats.checkpoint import open_checkpoint
        from omniserve.quantize.stream import quantize as run
        from omniserve.text import Tokenizer
    where = torch.device(find_device(Options(device=device)).kind)
    source = open_checkpoint(model)
    tokenizer = Tokenizer.load(source)
    text = _calibration(source, tokenizer, recipe, calibration) if recipe.calibrated else None
    with Bars(quiet=quiet) as bars:
        return run(
            source, recipe, output, calibration=text, files=tokenizer.files(), device=where, progress=bars.update
        )


def _adjusted(
    recipe: "Recipe", samples: int | None, stride: int | None, without: str | None, static_kv: str | None
) -> "Recipe":
    """Return the recipe with what the command line says about it."""
    if without is not None:
        recipe = recipe.without(words(without, "--without"))
    if static_kv is not None:
        if recipe.kv.keys != 8:
            raise ConfigError(
                f"--static-kv {static_kv}: static scales exist for 8-bit KV, not for {recipe.kv.keys} bits"
            )
        recipe = replace(recipe, kv=replace(recipe.kv, range=static_kv))
    given = {name: number for name, number in (("samples", samples), ("stride", stride)) if number is not None}
    for name, number in given.items():
        if number < 1:
            raise ConfigError(f"--{name}={number}: must be 1 or more")
        if recipe.calibration is None:
            raise ConfigError(f"--{name}: recipe {recipe.name} has no table [calibration]")
    return recipe if recipe.calibration is None else replace(recipe, calibration=replace(recipe.calibration, **given))


def _calibration(source: "Source", tokenizer: "Tokenizer", recipe: "Recipe", file: Path | None) -> "Calibration":
    """Return the samples that a recipe asks for, of the user's text or the shipped one."""
    from omniserve.models.families import family
    from omniserve.quantize.calibration import DEFAULT, cut, shipped_text

    text = shipped_text() if file is None else read_text(file, "calibration text")
    ids = tokenizer.encode(text, special=False)
    spec = family(source.config).spec(source.config)
    assert recipe.calibration is not None, recipe
    return cut(ids, recipe.calibration, spec, origin=DEFAULT if file is None else file.name)


def _draw(report: "Mapping[str, Any]", output: Path) -> None:
    """Write the report as a picture beside its JSON, where matplotlib is installed."""
    from omniserve.quantize.report import picture

    if (png := picture(report)) is not None:
        (output / "quantize-report.png").write_bytes(png)


def _compared(model: str, output: Path, device: str) -> "Mapping[str, Score]":
    """Return perplexity before and after, and the KL between them, through the served path."""
    from omniserve.evals.perplexity import measure

    options = Options(max_model_len=WINDOW, max_num_seqs=1, device=device)
    with load(model, replace(options, precision="w16a16kv16"), quiet=True, brief=True) as before:
        if before.spec.context < WINDOW:
            raise ConfigError(f"the model's context of {before.spec.context} tokens is too short for the check")
        text = importlib.resources.files("omniserve.cli").joinpath("data", CHECKED).read_text("utf-8")
        window = before.tokenizer.encode(text, special=False)[:WINDOW]
        with load(str(output), options, quiet=True, brief=True) as after:
            return {
                "w16a16kv16": measure(before, [window]),
                after.config.precision.label: measure(after, [window], reference=before),
            }
