"""What the benchmarks of a model share: their report's flags, the facts that go with every figure, freeing a model."""

import gc
import importlib.util
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from omniserve.base.config import Options
from omniserve.base.errors import ConfigError
from omniserve.bench.results import Row
from omniserve.cli import machine
from omniserve.cli.loading import leaving_at_once, need_torch

if TYPE_CHECKING:
    from omniserve import LLM

REPORT = Group("Report", sort_key=1)


@Parameter(name="*", group=REPORT)
@dataclass(frozen=True, kw_only=True)
class ReportFlags:
    """Where results go.

    Parameters
    ----------
    results
        JSON file that keeps every finished row: a second call goes on from it (default with --suite: bench-SUITE.json).
    compare
        JSON file of an earlier run; the ratio to its rows is shown.
    plot
        PNG file for a picture.
    json
        Print one JSON object.
    """

    results: Path | None = None
    compare: Path | None = None
    plot: Path | None = None
    json: Annotated[bool, Parameter(negative="")] = False


NO_REPORT_FLAGS = ReportFlags()


def check_plot(plot: Path | None) -> None:
    """Raise ConfigError unless a picture can be written there."""
    if plot is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'omniserve[eval]'")
    if plot.suffix != ".png" or not plot.parent.is_dir():
        raise ConfigError(f"--plot {plot}: must be a file .png in a folder that is there")


def configuration(llm: "LLM") -> dict[str, Any]:
    """Return everything that was decided for an engine."""
    return {**asdict(llm.config), "plan": asdict(llm.plan), "operations": llm.operations()}


def configuration_line(row: Row) -> str:
    """Return what decides an engine's speed beside its precision, from a measured row."""
    made = row["configuration"]
    limits, cache = made["limits"], made["cache"]
    return (
        f"{row['runner']} {row['dtype']}: max_num_seqs {limits['max_seqs']}, max_num_batched_tokens "
        f"{limits['max_step_tokens']}, max_model_len {limits['max_model_len']}, KV of {made['plan']['kv_tokens']:,}, "
        f"prefix caching {'on' if cache['prefix_caching'] else 'off'}, async scheduling "
        f"{'on' if made['overlap'] else 'off'}, {row['options'] or 'no other option'}"
    )


def stamp() -> str:
    """Return the time now, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def device_of(options: Options) -> str:
    """Return the name of what an engine with these options runs on. Imports torch; raises ConfigError."""
    need_torch()
    with leaving_at_once():
        import torch

        from omniserve.engine.device import find_device
    return machine.cpu() if find_device(options).kind == "cpu" else torch.cuda.get_device_name()


def machine_line(facts: dict[str, Any]) -> str:
    """Return what a benchmark ran on, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    cards = [
        f"{gpu['name']} (driver {gpu['driver_version']}, SM {gpu['clocks.sm']} of {gpu['clocks.max.sm']}, memory "
        f"{gpu['clocks.mem']}, {gpu['power.draw']} of {gpu['power.limit']}, {gpu['temperature.gpu']} C)"
        for gpu in facts["gpus"]
    ]
    parts = [*cards, f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['isa']}"]
    return f"{'; '.join(parts)}; {versions}"


def release() -> None:
    """Give back the memory of a model that nobody holds any more, so that the next one finds it free."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
