"""`omniserve convert`: published QServe files, dumps and other tools' checkpoints become ours, or ours QServe's."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from omniserve.base.errors import CheckpointError, ConfigError
from omniserve.cli.flags import Common
from omniserve.cli.loading import leaving_at_once, need_torch
from omniserve.cli.output import Bars, result, warn

if TYPE_CHECKING:
    from omniserve.base.spec import ModelSpec
    from omniserve.formats.checkpoint import Source
    from omniserve.formats.legacy import Export
    from omniserve.formats.translated import Translated


def convert(
    source: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    to: Literal["omniserve", "qserve"] = "omniserve",
    original: Path | None = None,
    common: Common = Common(),  # noqa: ARG001, B008, RUF100  # the log level is read before; frozen
) -> None:
    """Convert a checkpoint of another layout to ours, codes as they are wherever the grids allow it.

    Reads published QServe and LServe files, DeepCompressor dumps (model.pt and scale.pt), AWQ, GPTQ and
    compressed-tensors folders, and 16-bit pickles. This is the only command that opens a pickle, and it lets one build
    tensors and nothing else.

    Parameters
    ----------
    source
        Folder of the checkpoint.
    output
        Folder to write; it must not exist, and appears only when it is complete.
    to
        Layout to write: ours, or QServe's tensors as safetensors.
    original
        Folder of the model that was quantized, for config.json and tokenizer where SOURCE has none.
    """
    need_torch()
    with leaving_at_once():
        from omniserve import __version__
        from omniserve.formats.translated import described_config
        from omniserve.formats.writer import refuse_existing, write_folder
    refuse_existing(output)
    opened, spec, foreign = _open(source, original)
    if to == "omniserve" and not foreign:
        raise ConfigError(f"{source} is served as it is: there is nothing to convert")
    view = _export(opened, spec) if to == "qserve" else opened

    def config() -> Mapping[str, object]:
        made = dict(described_config(view))
        block = made.get("quantization_config")
        if to == "omniserve" and isinstance(block, dict):
            block["made_by"] = {**block["made_by"], "omniserve": __version__}
        return made

    with Bars() as bars:
        write_folder(
            view,
            output,
            config=config,
            extra=[] if original is None else [original],
            progress=lambda done, total: bars.update("convert", done, total),
        )
    for sentence in _notes(opened, view):
        warn(sentence)
    result(f"{output}: {_summary(opened, view)}")


def _open(place: Path, original: Path | None) -> "tuple[Source, ModelSpec, bool]":
    """Return a checkpoint in our layout, its numbers, and whether it had another one.

    Its tensors are checked against its config.
    """
    from omniserve.formats import dumps
    from omniserve.formats.checkpoint import open_checkpoint
    from omniserve.formats.imports import translated
    from omniserve.formats.pickles import PickleSource, weight_files
    from omniserve.formats.translated import Translated
    from omniserve.models.families import check_tensors, family

    found: Source
    pickled = place.is_dir() and not any(place.glob("*.safetensors")) and bool(weight_files(place))
    if pickled:
        config = _config(place, original)
        spec = family(config).spec(config)
        if dumps.is_dump(place):
            found = dumps.translate(place, config, spec)
        else:
            found = translated(PickleSource(place, config), spec)
    else:
        opened = open_checkpoint(place)
        spec = family(opened.config).spec(opened.config)
        found = translated(opened, spec)
    check_tensors(found, spec)
    return found, spec, pickled or isinstance(found, Translated)


def _config(place: Path, original: Path | None) -> dict[str, object]:
    """Return the config.json of the checkpoint, or else of the model that it was made from."""
    from omniserve.formats.checkpoint import read_json

    for folder in (place, original):
        if folder is not None and (folder / "config.json").is_file():
            return read_json(folder / "config.json")
    hint = "give --original FOLDER" if original is None else f"neither has {original}"
    raise CheckpointError(f"{place / 'config.json'} is missing: {hint}, the folder of the model that was quantized")


def _export(source: "Source", spec: "ModelSpec") -> "Export":
    from omniserve.formats.artifact import scheme_of
    from omniserve.formats.legacy import Export
    from omniserve.models.families import linears

    scheme = scheme_of(source)
    if scheme is None:
        raise ConfigError(f"{source.path} is not quantized: QServe's layout holds 4- and 8-bit weights")
    return Export(source, scheme, spec, sorted(linears(spec)))


def _notes(opened: "Source", view: "Source") -> list[str]:
    """Return the sentences a user should read."""
    from omniserve.formats.legacy import Export
    from omniserve.formats.translated import Translated

    notes = list(opened.notes) if isinstance(opened, Translated) else []
    if isinstance(view, Export):
        notes += view.notes
        if view.rounded:
            first = min(view.rounded)
            notes.append(f"scales or zeros of {len(view.rounded)} linears ({first}, ...) were rounded to fp16")
    return notes


def _summary(opened: "Source", view: "Source") -> str:
    from omniserve.formats.legacy import Export
    from omniserve.formats.translated import Translated

    what = "QServe layout" if isinstance(view, Export) else "16-bit safetensors"
    if not isinstance(opened, Translated):
        return what if isinstance(view, Export) or "quantization_config" not in opened.config else "omniserve layout"
    what = what if isinstance(view, Export) else opened.scheme.precision.label
    return f"{what}, from {opened.origin}; {_loss(opened)}"


def _loss(opened: "Translated") -> str:
    """Return what the conversion cost, in words."""
    if not opened.losses:
        return "every weight is exactly what it was"
    worst = max(opened.losses, key=lambda module: opened.losses[module])
    mean = sum(opened.losses.values()) / len(opened.losses)
    return (
        f"relative squared error of {len(opened.losses)} linears: {mean:.2g} on average, {opened.losses[worst]:.2g} at "
        f"most ({worst})"
    )
