"""The report of a run as a picture: what each step did to each layer. Needs matplotlib; nothing else here does."""

import importlib.util
import io
from collections.abc import Mapping
from typing import Any

STEPS = {"nearest": "rounded to nearest", "search": "ranges searched", "gptq": "GPTQ", "refine": "refined"}
"""Steps of the solver in order, for people."""


def picture(report: Mapping[str, Any]) -> bytes | None:
    """Return a PNG of a report: error per linear and step, of the keys, and of the layers' outputs; None without
    matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = report["layers"]
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for layer in layers for name in layer["linears"]))
    figure = Figure(figsize=(12, 3 * (len(kinds) + 2) // 2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{report['model']}: {report['recipe']['name']}, relative squared errors by layer")
    rows = -(-(len(kinds) + 2) // 2)
    for place, kind in enumerate(kinds):
        axes = figure.add_subplot(rows, 2, place + 1)
        axes.set_title(kind, fontsize=9)
        for step, label in STEPS.items():
            if any(step in errors for layer in layers for errors in _of(layer, kind)):
                axes.plot([_mean(_of(layer, kind), step) for layer in layers], label=label, marker=".")
        _finish(axes)
    axes = figure.add_subplot(rows, 2, len(kinds) + 1)
    axes.set_title("attention output with quantized keys", fontsize=9)
    for name in ("before", "after"):
        axes.plot([layer.get("keys", {}).get(name) for layer in layers], label=f"{name} smoothing", marker=".")
    _finish(axes)
    axes = figure.add_subplot(rows, 2, len(kinds) + 2)
    axes.set_title("residual stream behind the layer", fontsize=9)
    axes.plot([layer.get("output_error") for layer in layers], label="quantized against full precision", marker=".")
    _finish(axes)
    made = io.BytesIO()
    figure.savefig(made, format="png", dpi=90)
    return made.getvalue()


def summary(report: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return the mean error of each kind of linear over the layers: rounded to nearest, and as it is stored."""
    found: dict[str, list[tuple[float, float]]] = {}
    for layer in report["layers"]:
        for name, errors in layer["linears"].items():
            steps = list(errors.values())
            found.setdefault(name.rpartition(".")[2], []).append((steps[0], steps[-1]))
    return {kind: (_average([a for a, _ in pairs]), _average([b for _, b in pairs])) for kind, pairs in found.items()}


def _of(layer: Mapping[str, Any], kind: str) -> list[Mapping[str, float]]:
    """Return the errors of a layer's linears of one kind; experts have many."""
    return [errors for name, errors in layer["linears"].items() if name.rpartition(".")[2] == kind]


def _mean(errors: list[Mapping[str, float]], step: str) -> float | None:
    have = [one[step] for one in errors if step in one]
    return _average(have) if have else None


def _average(values: list[float]) -> float:
    return sum(values) / len(values)


def _finish(axes: Any) -> None:
    axes.set_yscale("log")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=7)
