"""Pictures of benchmarks: panels of lines or bars, written as PNG. matplotlib is imported when one is drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniserve.base.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One diagram: points by the name of their line.

    lines   name -> (x, y) points
    log_x, log_y  logarithmic axes
    ticks   names of the x values 0, 1, 2, ..., where these are categories
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = False
    log_y: bool = False
    ticks: Sequence[str] | None = None


def draw(panels: Sequence[Panel], path: Path, *, title: str) -> None:
    """Write the panels side by side, three in a row at most. Raises ConfigError if the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(3, max(1, len(panels)))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(6 * across, 4.5 * max(down, 1)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    for place, panel in enumerate(panels, start=1):
        _panel(figure.add_subplot(down, across, place), panel)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the plot cannot be written: {error}") from None


def _panel(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.grid(alpha=0.3)
    for name, points in panel.lines.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3, label=name)
    if panel.log_x:
        axes.set_xscale("log", base=2)
    if panel.log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    if panel.ticks is not None:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks, rotation=60, fontsize=7, ha="right")
    if panel.lines:
        axes.legend(fontsize=7)
