"""Checkpoints that other quantizers wrote, translated to our layout: one file each, one line each in `IMPORTERS`."""

from collections.abc import Callable, Mapping

from omniserve.base.errors import CheckpointError
from omniserve.base.spec import ModelSpec
from omniserve.formats import legacy
from omniserve.formats.artifact import METHOD, METHODS
from omniserve.formats.checkpoint import Source
from omniserve.formats.imports import awq, compressed, gptq
from omniserve.formats.imports.packed import settings

Importer = Callable[[Source, ModelSpec], Source]

IMPORTERS: dict[str, Importer] = {
    "qoq": legacy.translate,
    "awq": awq.translate,
    "gptq": gptq.translate,
    "compressed-tensors": compressed.translate,
}
"""By `quant_method`."""


def translated(source: Source, spec: ModelSpec) -> Source:
    """Return the checkpoint in our layout: itself if it is in 16 bit or ours, else translated.

    Raises CheckpointError for a method that is not read, and for whatever is wrong with the foreign tensors.
    """
    method = method_of(source)
    if method is None or method == METHOD:
        return source
    if not isinstance(method, str) or method not in IMPORTERS:
        raise CheckpointError(f"{source.path}: quantized by {method!r}, this version reads {', '.join(METHODS)}")
    return IMPORTERS[method](source, spec)


def method_of(source: Source) -> object:
    """Return who quantized the checkpoint, by its config or else by its tensors; None if it is in 16 bit."""
    if legacy.is_published(source):
        return "qoq"
    block = settings(source)
    return block.get("quant_method") if isinstance(block, Mapping) else block
