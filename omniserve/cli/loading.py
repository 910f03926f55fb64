"""Loads an engine for a command: bars while it loads, then one line that says what serves what."""

import os
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from omniserve.base.config import Options, check_model
from omniserve.base.errors import ConfigError
from omniserve.base.numbers import human_bytes
from omniserve.cli import machine
from omniserve.cli.output import Bars, say, warn

if TYPE_CHECKING:
    from omniserve import LLM

OLDEST_TORCH = (2, 11)
TORCH_LINE = "pip install 'torch>=2.11'"


def load(model: str | None, options: Options, *, quiet: bool = False, brief: bool = False, role: str = "") -> "LLM":
    """Return the engine of a model; warnings go to standard error.

    quiet  no progress bars
    brief  no line about what was loaded
    role   what the engine is for, to begin that line with
    """
    check_model(model, options)
    need_torch()
    with leaving_at_once():
        from omniserve import LLM
    with Bars(quiet=quiet) as bars:
        llm = LLM(model, options=options, on_load=bars.update)
    if not brief:
        say(role + plan_line(llm))
    for sentence in llm.warnings:
        warn(sentence)
    return llm


def need_torch() -> None:
    """Raise ConfigError with the line that installs torch if it is missing or too old."""
    found = machine.version("torch")
    if found is None:
        raise ConfigError(f"torch is not installed: {TORCH_LINE}")
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        raise ConfigError(f"torch {found} is too old: {TORCH_LINE}")


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process on the spot, for imports that take seconds and leave nothing behind.

    Raising KeyboardInterrupt is no use there: torch's and numpy's own imports catch it and go on half imported.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    sys.stdout.flush()
    before = signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def plan_line(llm: "LLM") -> str:
    """Return what was loaded, how it is stored and which implementations serve it, in one line."""
    config, plan = llm.config, llm.plan
    seconds = sum(plan.seconds.values())
    working = f", steps {human_bytes(plan.working_bytes)}, in all {human_bytes(plan.total_bytes)}"
    working = working if plan.working_bytes else ""
    rounded = f" ({plan.rounding})" if plan.rounding else ""
    sparse = (
        "" if config.sparsity.off else " (" + ", ".join(f"{n:,} {kind} pages" for kind, n in plan.pages.items()) + ")"
    )
    return (
        f"{plan.model}: {config.precision.label} on {config.device.kind} ({config.dtype}), weights"
        f" {human_bytes(plan.weight_bytes)}{rounded}, KV {human_bytes(plan.kv_bytes)} = {plan.kv_tokens:,} tokens at"
        f" {plan.kv_token_bytes:,} B{sparse}, context {config.limits.max_model_len:,}{working};"
        f" {kernels(llm)}; {seconds:.1f} s"
    )


def kernels(llm: "LLM") -> str:
    """Return `implementation: operations` for everything that serves this engine."""
    if llm.config.backend == "reference":
        return "reference implementations only"
    by_name: dict[str, list[str]] = defaultdict(list)
    for operation, name in llm.operations().items():
        by_name[name].append(operation)
    fast = [f"{'/'.join(ops)}: {name}" for name, ops in sorted(by_name.items()) if name != "reference"]
    return ", ".join([*fast, "reference for the rest" if fast else "reference implementations"])


def words(text: str, what: str) -> list[str]:
    """Return the parts of a comma list; ConfigError if one is empty."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"{what}={text!r}: must be names with commas between them")
    return parts


def cells(values: Sequence[object]) -> list[str]:
    """Return a table row's cells: None is a dash, numbers get three to four digits."""
    return [_cell(value) for value in values]


def _cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        case int():
            return f"{value:,}"
        case _:
            return str(value)
