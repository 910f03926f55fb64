"""Scores by length and depth as a picture, one map for each run. Needs matplotlib; nothing else here does."""

import importlib.util
import io
from collections.abc import Mapping

from omniserve.evals.retrieval import Cell, mean


def heatmap(scores: Mapping[str, Mapping[Cell, float]], *, task: str, title: str) -> bytes | None:
    """Return a PNG: per run a grid of mean scores, lengths across and depths down; None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = [cell for of in scores.values() for cell in of if cell.task == task]
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    figure = Figure(
        figsize=(1.5 + (1 + 0.6 * len(lengths)) * len(scores), 1.5 + 0.4 * len(depths)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    for place, (run, of) in enumerate(scores.items(), 1):
        axes = figure.add_subplot(1, len(scores), place)
        grid = [[mean(of, task=task, length=length, depth=depth) for length in lengths] for depth in depths]
        axes.imshow(
            [[float("nan") if value is None else value for value in line] for line in grid],
            vmin=0,
            vmax=100,
            cmap="RdYlGn",
            aspect="auto",
        )
        for down, line in enumerate(grid):
            for across, value in enumerate(line):
                if value is not None:
                    axes.text(across, down, f"{value:.0f}", ha="center", va="center", fontsize=7)
        axes.set_title(run, fontsize=9)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=7)
        axes.set_yticks(range(len(depths)), [str(depth) for depth in depths], fontsize=7)
        axes.set_xlabel("tokens", fontsize=8)
        axes.set_ylabel("depth, %", fontsize=8)
    made = io.BytesIO()
    figure.savefig(made, format="png", dpi=110)
    return made.getvalue()
