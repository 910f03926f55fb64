"""`omniserve warmup`: compile the kernels that a model needs, so that the next start finds them."""

import importlib
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from omniserve.base.config import check_model
from omniserve.cli.flags import NO_FLAGS, Common, EngineFlags, settings
from omniserve.cli.loading import leaving_at_once, load, need_torch
from omniserve.cli.output import as_json, result


def warmup(
    model: str | None = None,
    /,
    *,
    cache_dir: Path | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    engine: EngineFlags = NO_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> None:
    """Load a model as `serve` would with the same flags and compile its kernels; they are kept for the next start.

    Parameters
    ----------
    model
        A .gguf file, a model folder or a name on huggingface.co (ORG/NAME); with --dummy-weights none.
    cache_dir
        Folder for the kernels, for images; whoever serves sets TRITON_CACHE_DIR to it. Default: that of Triton.
    json
        Print one JSON object.
    """
    need_torch()
    with leaving_at_once():
        from omniserve.engine.device import find_device
    options = settings(engine, common)
    check_model(model, options)
    if cache_dir is not None and find_device(options).kind == "cuda":
        _kept(cache_dir.resolve())
    with load(model, options, quiet=json) as llm:
        seconds, kind = llm.plan.seconds, llm.config.device.kind
    folder = _kept() if kind == "cuda" else None
    if json:
        as_json({"device": kind, "kernels": folder, "seconds": seconds})
    elif folder is None:
        result("nothing to compile: this engine runs on the CPU")
    else:
        result(f"kernels compiled and steps captured in {seconds['prepare']:.1f} s; kept in {folder}")


def _kept(given: Path | None = None) -> str:
    """Return where kernels are kept; only where there is a GPU, and so Triton."""
    folder: str = importlib.import_module("omniserve.kernels.device").cache_folder(given)
    return folder
