"""What the kernels are to reach on an H200 with the shapes of Llama-3-8B, and what a run says about it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omniserve.bench.kernels.sums import LSERVE, STEP, step
from omniserve.bench.results import Row

SHAPE = "llama-3-8b"

TOKENS = (1, 16, 32, 64, 128, 256, 2048, 8192)

DECODE = ((64, 4096), (256, 1280), (8, 65536), (1, 262144))

PROMPTS = ((8192, 32768, None), (8192, 65536, None), (8192, 131072, None))

WHOLES = (65536, 131072)

Metric = Literal["share", "us", "faster"]

DENSE = "kv4"
"""The whole prompt that one with streaming heads is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Milestone:
    """One figure to reach.

    kind, name  of the rows that it is asked of
    sizes       smallest and largest: tokens of a product, keys of all contexts of a decode step, of a prompt's context
    metric      share: of the limit, at least; us: microseconds, at most; faster: than the dense prompt, at least
    """

    title: str
    kind: str
    name: str
    sizes: tuple[float, float]
    metric: Metric
    need: float

    def covers(self, kind: str, name: str, size: str) -> bool:
        """Whether it is asked of a row."""
        return (kind, name) == (self.kind, self.name) and self.sizes[0] <= _amount(kind, size) <= self.sizes[1]

    def met(self, found: float) -> bool:
        """Whether a figure reaches it."""
        return found <= self.need if self.metric == "us" else found >= self.need


def _amount(kind: str, size: str) -> int:
    """Return the number that `sizes` is about: `8 x 65536` has 524288 keys, `8192 of 65536` a context of 65536."""
    if " x " in size:
        rows, context = map(int, size.split(" x "))
        return rows * context if kind == "decode" else context if rows == 1 else 0
    return int(size.split(" of ")[-1])


_INFINITE = float("inf")


def _products(title: str, form: str, sizes: tuple[int, int], need: float) -> Milestone:
    return Milestone(title=title, kind="four products", name=form, sizes=sizes, metric="share", need=need)


MILESTONES = (
    _products("W4A8 channel", "w4a8-row", (1, 64), 0.65),
    _products("W4A8 g128", "w4a8-g128", (1, 64), 0.65),
    _products("W4A8 channel", "w4a8-row", (128, 256), 0.60),
    _products("W4A8 g128", "w4a8-g128", (128, 256), 0.60),
    _products("W4A8 channel", "w4a8-row", (2048, 8192), 0.80),
    _products("W4A8 g128", "w4a8-g128", (2048, 8192), 0.70),
    _products("W8A8", "w8a8", (8192, 8192), 0.65),
    *(
        Milestone(
            title=f"decode {name}", kind="decode", name=name, sizes=(1 << 16, _INFINITE), metric="share",
            need=need,
        )
        for name, need in {"kv16": 0.80, "kv8": 0.65, "kv4": 0.55}.items()
    ),
    Milestone(title="dense prefill", kind="prefill", name="kv4", sizes=(1 << 15, _INFINITE), metric="share", need=0.75),
    Milestone(
        title="streaming 256", kind="whole prompt", name="kv4 half window 256", sizes=(1 << 16, _INFINITE),
        metric="faster", need=1.7,
    ),
    *(
        Milestone(
            title=f"select {name.split(' ')[0]}", kind="select", name=name, sizes=(1 << 18, 1 << 18), metric="us",
            need=15.0,
        )
        for name in ("bounds", "keys kv4")
    ),
)  # fmt: skip

STEP_FORM, STEP_SIZE = "w4a8-row", "1 x 262144"
"""The decode step with LServe whose operations are measured with the milestones."""


def needed(kind: str, name: str, size: str) -> bool:
    """Whether a milestone or the step with LServe needs a row."""
    parts = step(STEP_FORM, f"kv4 {LSERVE}", STEP_SIZE, 1)
    return (
        kind == "whole prompt" or (kind, name, size) in parts or any(one.covers(kind, name, size) for one in MILESTONES)
    )


def judged(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield what rows say about the milestones, in their order: title, size, figure, what is needed, met, peers.

    A row without a figure, or with a wrong result, meets nothing. `step`: the share of a decode step with LServe.
    """
    for milestone in MILESTONES:
        for row in rows:
            if milestone.covers(row["kind"], row["name"], row["size"]):
                found = _figure(milestone, row, rows)
                yield {
                    "title": milestone.title,
                    "size": row["size"],
                    "us": row.get("us"),
                    "metric": milestone.metric,
                    "found": found,
                    "need": milestone.need,
                    "ok": row["ok"],
                    "met": row["ok"] and found is not None and milestone.met(found),
                    "peers": {name: one["ratio"] for name, one in _peers(row, rows).items() if "ratio" in one},
                    "step": _step_share(row, rows),
                }


def _figure(milestone: Milestone, row: Row, rows: Sequence[Row]) -> float | None:
    if milestone.metric != "faster":
        return row.get(milestone.metric)
    dense = _find(rows, row["kind"], DENSE, row["size"])
    return None if dense is None or "us" not in row or "us" not in dense else dense["us"] / row["us"]


def _peers(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """Return a row's peers, and for decode attention of fewer bits our own with 16."""
    peers = dict(row.get("peers", {}))
    own = _find(rows, row["kind"], "kv16", row["size"]) if row["kind"] == "decode" and row["name"] != "kv16" else None
    if own is not None and "us" in own and "us" in row:
        peers["kv16"] = {"us": own["us"], "ratio": own["us"] / row["us"]}
    return peers


def _step_share(row: Row, rows: Sequence[Row]) -> float | None:
    """Return the share that a choice of pages has in the step with LServe that it is part of."""
    if row["kind"] != "select":
        return None
    whole = _find(rows, STEP, f"{STEP_FORM} kv4 {LSERVE}, {row['name'].split(' ')[0]}", row["size"])
    return None if whole is None else float(whole["parts"][f"select {row['name']}"])


def _find(rows: Sequence[Row], kind: str, name: str, size: str) -> Row | None:
    return next((row for row in rows if (row["kind"], row["name"], row["size"]) == (kind, name, size)), None)
