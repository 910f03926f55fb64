"""`omniserve demo`: a small model is calibrated to 4 bits and answers; then one table of what precisions cost."""

import importlib.resources
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from omniserve.base.config import GROUP, Options, Precision
from omniserve.base.errors import CheckpointError, ConfigError
from omniserve.base.numbers import human_bytes
from omniserve.base.serving import ServerOptions
from omniserve.base.types import SamplingParams
from omniserve.cli import machine
from omniserve.cli.answer import Answer, collect
from omniserve.cli.flags import NO_FLAGS, Common
from omniserve.cli.loading import kernels, leaving_at_once, need_torch
from omniserve.cli.models import (
    SMOLLM2,
    SMOLLM2_BYTES,
    SMOLLM2_LICENCE,
    fetch_smollm2,
    find_smollm2,
    model_directory,
)
from omniserve.cli.output import Bars, piece, result, say, table
from omniserve.cli.quantize import make
from omniserve.cli.serve import ServerFlags, serve_until_stopped
from omniserve.cli.serve import settings as serve_settings

if TYPE_CHECKING:
    from omniserve import LLM

NO_SERVER_FLAGS = ServerFlags()
QUESTION = "What is the capital of France, and what is it known for?"
SHOWN = "w4a8kv4"
COMPARED = ("w16a16kv16", "w8a8kv8", SHOWN)
"""What the model itself is served at, for comparison; 4 bits of it are rounded to nearest."""
SAMPLES = 8
"""Samples of the demo's recipe: a quarter of the default's, so that it takes two minutes and not eight."""
WINDOW = 512
SPEED_TOKENS = 32


def demo(
    *,
    yes: Annotated[bool, Parameter(negative="")] = False,
    download_dir: Path | None = None,
    serve: Annotated[bool, Parameter(negative="")] = False,
    server: ServerFlags = NO_SERVER_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> None:
    """See a small model answer in 4 bits, and what each precision costs; fetches it (98 MB) and calibrates it once.

    Parameters
    ----------
    yes
        Fetch the model without asking.
    download_dir
        Folder of the model and of its 4-bit checkpoint; default: ~/.cache/omniserve/models.
    serve
        Instead of the table start a server with the 4-bit model; takes the flags of `omniserve serve`.
    """
    need_torch()
    if not serve and server != NO_SERVER_FLAGS:
        name = next(
            one.name for one in fields(server) if getattr(server, one.name) != getattr(NO_SERVER_FLAGS, one.name)
        )
        raise ConfigError(f"--{name.replace('_', '-')} goes with --serve")
    options, serving = serve_settings(server, NO_FLAGS, common)
    options = replace(options, precision="auto", group_size=None)
    path = _model(download_dir or model_directory(), ask=not yes and sys.stdin.isatty())
    result(f"{SMOLLM2}: {SMOLLM2_BYTES / 1e6:.0f} MB, licence {SMOLLM2_LICENCE}\n  {path}")
    calibrated = _calibrated(path, download_dir or model_directory())
    if serve:
        names = serving.served_model_name or (path.name.partition(".")[0],)
        serving = replace(serving, served_model_name=names)
        serve_until_stopped(str(calibrated), options, serving, on_ready=lambda address: _try_it(address, serving))
    options = replace(options, max_num_seqs=1)
    with _engine(calibrated, options, "auto") as llm:
        _facts(llm)
        result(f"\n> {QUESTION}\n")
        result("\n\n" + _ask(llm, write=piece, max_tokens=80).line())
        rows = [_row(llm)]
    for word in reversed(COMPARED):
        with _engine(path, options, word) as llm:
            rows.insert(0, _row(llm))
            if word == SHOWN:
                warnings = llm.warnings
    result("")
    columns = ["precision", "weights", "KV per token", "tokens/s", "perplexity"]
    table(columns, rows, title="The same model in three precisions, 4 bits without and with calibration")
    for sentence in warnings:
        result(f"! {sentence}")
    _next_steps(calibrated)


def _calibrated(model: Path, folder: Path) -> Path:
    """Return the demo's w4a8kv4 checkpoint in a folder; made from the model once, and continued if it was cut off."""
    with leaving_at_once():
        from omniserve.quantize import recipe as recipes
    chosen = recipes.for_precision(Precision.parse(SHOWN, GROUP))
    assert chosen.calibration is not None, chosen
    chosen = replace(chosen, name="demo", calibration=replace(chosen.calibration, samples=SAMPLES))
    made = folder / f"{model.name.partition('.')[0]}-{SHOWN}-{chosen.sha256[:8]}"
    if not (made / "config.json").is_file():
        say(f"calibrating {SHOWN} once, about two minutes on two cores ({SAMPLES} samples); kept in {made}")
        make(str(model), chosen, made)
    return made


def _model(folder: Path, *, ask: bool) -> Path:
    """Return the model's file, from this folder, the checkout or the network."""
    for place in (folder, Path.cwd(), Path.cwd() / ".models"):
        if found := find_smollm2(place):
            return found
    if ask:
        say(f"{SMOLLM2} is not here yet: {SMOLLM2_BYTES / 1e6:.0f} MB, licence {SMOLLM2_LICENCE}, to {folder}")
        piece("Fetch it? [Y/n] ")
        if sys.stdin.readline().strip().lower() not in ("", "y", "yes"):
            raise CheckpointError(f"the demo needs its model: put {SMOLLM2} into {folder}, or run it with --yes")
    return fetch_smollm2(folder, progress=say)


@contextmanager
def _engine(path: Path, options: Options, precision: str) -> "Iterator[LLM]":
    """Load the model at a precision; its warnings are left to the caller."""
    with leaving_at_once():
        from omniserve import LLM
    with Bars() as bars:

        def update(phase: str, done: int, total: int) -> None:
            bars.update(f"{phase} {precision}", done, total)

        llm = LLM(path, options=replace(options, precision=precision), on_load=update)
    with llm:
        yield llm


def _facts(llm: "LLM") -> None:
    """Print where and how the model runs."""
    from omniserve.formats.kv import kv_format

    config, plan, spec = llm.config, llm.plan, llm.spec
    in_16 = kv_format("kv16").token_bytes(spec.kv_heads, spec.head_dim, spec.layers)
    result(f"  {config.device.kind}: {machine.cpu()}, {machine.cores()} cores; {kernels(llm)}")
    result(f"  precision {config.precision.label}, context {config.limits.max_model_len:,} tokens")
    result(
        f"  KV cache {human_bytes(plan.kv_bytes)} = {plan.kv_tokens:,} tokens (16 bit:"
        f" {human_bytes(plan.kv_tokens * in_16)}); {plan.kv_token_bytes:,} B per token, {in_16:,} B in 16 bit"
    )


def _ask(llm: "LLM", *, write: Callable[[str], None] | None, max_tokens: int, ignore_eos: bool = False) -> Answer:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=ignore_eos)
    return collect(lambda: llm.stream_chat([{"role": "user", "content": QUESTION}], params), write=write)


def _row(llm: "LLM") -> list[str]:
    """Return the table's row of an engine: sizes, speed of one request, perplexity of the shipped text."""
    from omniserve.evals.perplexity import measure

    speed = _ask(llm, write=None, max_tokens=SPEED_TOKENS, ignore_eos=True).tokens_per_second
    text = importlib.resources.files("omniserve.cli").joinpath("data/roosevelt-1905.txt").read_text("utf-8")
    score = measure(llm, [llm.tokenizer.encode(text, special=False)[:WINDOW]])
    note = "" if llm.config.precision.weight != "w4a8" else " (uncalibrated)" if llm.warnings else " (calibrated)"
    return [
        llm.config.precision.label + note,
        human_bytes(llm.plan.weight_bytes),
        f"{llm.plan.kv_token_bytes:,} B",
        "-" if speed is None else f"{speed:.1f}",
        f"{score.perplexity:.2f}",
    ]


def _program() -> str:
    return "omniserve" if Path(sys.argv[0]).name == "omniserve" else "python -m omniserve"


def _try_it(address: str, serving: ServerOptions) -> None:
    """Say how to talk with the server, in lines to paste."""
    key = ' -H "Authorization: Bearer $OMNISERVE_API_KEY"' if serving.api_key else ""
    path = address.removeprefix("unix:")
    where = address if path == address else f"--unix-socket {shlex.quote(path)} http://localhost"
    body = '{"messages": [{"role": "user", "content": "Is water wet?"}], "max_tokens": 64}'
    say(f"  curl {where}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    if path == address:
        say(f"  {_program()} chat --url {address}/v1")
        say(f"  {_program()} top --url {address}/v1")
        if serving.ui:
            say(f"  {address}/ in a browser")


def _next_steps(path: Path) -> None:
    where = shlex.quote(str(path))
    program = _program()
    result("\nGo on with")
    for line in (
        f"chat {where} --stats",
        f"serve {where}",
        f"generate {where} --prompt 'Once upon a time' --json",
        f"bench throughput {where} --batch 1,8",
        "doctor",
    ):
        result(f"  {program} {line}")
