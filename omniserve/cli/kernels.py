"""`omniserve bench kernels`: every operation on the GPU here, against the physical limit and torch's own kernels."""

import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omniserve.base.config import SHAPES, Options
from omniserve.base.errors import ConfigError
from omniserve.bench.kernels import milestones
from omniserve.bench.kernels.sums import STEP, sums
from omniserve.bench.results import Results, Row, ratio, read_rows
from omniserve.cli import machine
from omniserve.cli.exits import GATE, OK
from omniserve.cli.flags import Common, Whole, whole_numbers
from omniserve.cli.loading import cells, leaving_at_once, need_torch, words
from omniserve.cli.output import Bars, as_json, say, table, warn
from omniserve.cli.report import NO_REPORT_FLAGS, ReportFlags, check_plot, machine_line, stamp

if TYPE_CHECKING:
    from omniserve.base.spec import ModelSpec

SHAPE = milestones.SHAPE

TOKENS = "1,16,32,64,128,256,512,1024,2048,8192"

_UNITS = {"share": "", "us": " us", "faster": "x"}

KEYS = ("model", "dtype", "kind", "name", "size", "device")
"""What tells rows apart."""


def kernels(
    model: str | None = None,
    /,
    *,
    shape: str | None = None,
    dtype: Literal["float16", "bfloat16"] = "float16",
    only: str | None = None,
    tokens: str | None = None,
    suite: Literal["targets"] | None = None,
    replays: Whole = 20,
    peers: bool = True,
    jobs: Whole | None = None,
    report: ReportFlags = NO_REPORT_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> int:
    """Microseconds of every operation on an NVIDIA GPU, share of the physical limit, ratio to torch's own kernels.

    Products of all weight formats, attention over pages, norm, quantization, rotation and writing, page selection,
    head, sampling, and whole decode steps added up. CUDA graphs are replayed over inputs that no cache holds; every
    result is compared with the reference. Exit code 4 if one is wrong.

    Parameters
    ----------
    model
        A .gguf file, a model folder or a name on huggingface.co (ORG/NAME) whose sizes are measured; nothing is loaded.
    shape
        Published model instead of MODEL (default llama-3-8b).
    dtype
        Type of what is not quantized.
    only
        Parts of titles with commas between them, for instance "gemm w4a8-g128,decode kv4"; others are left out.
    tokens
        Tokens of a step, with commas between them (default 1,16,32,64,128,256,512,1024,2048,8192).
    suite
        Measure what the milestones of an H200 ask for and no more, about 90 seconds, and tell which are met. A later
        call goes on with the rows that --results does not hold.
    replays
        Replays of which the median counts.
    peers
        Measure torch's products and attention of the same sizes as well.
    jobs
        Processes that compile kernels ahead (default 8, or fewer with fewer cores); 1: none.
    """
    _check(model, shape, suite, tokens)
    counts = milestones.TOKENS if suite is not None else whole_numbers(tokens or TOKENS, "--tokens")
    for name, value in {"tokens": min(counts), "replays": replays, "jobs": jobs or 1}.items():
        if value < 1:
            raise ConfigError(f"--{name} {value}: must be 1 or more")
    parts = [] if only is None else words(only, "--only")
    check_plot(report.plot)
    others = [] if report.compare is None else read_rows(report.compare)
    results = Results(report.results or (None if suite is None else Path(f"bench-{suite}.json")), KEYS)
    _need_gpu()
    import torch

    from omniserve.bench.kernels.run import Wanted, cases, compile_ahead, gpu_sizes, run

    spec = _spec(model, shape or SHAPE)
    wanted = Wanted(spec=spec, dtype=dtype, tokens=counts, suite=suite is not None)
    about = {"model": model or shape or SHAPE, "dtype": dtype, "device": torch.cuda.get_device_name()}
    found = list(cases(gpu_sizes(wanted), parts, suite=wanted.suite))
    if not found and not list(results):
        raise ConfigError(
            f"--only {only}: no case has such a title; give for instance gemm, decode, prefill or add_norm"
        )
    heads = [{**about, "kind": case.kind, "name": case.name, "size": case.size} for case in found]
    todo = deque(case for case, head in zip(found, heads, strict=True) if results.find(head) is None)
    del found  # cases hold weights
    processes = min(jobs or min(8, os.cpu_count() or 1), len(todo))
    if processes > 1:
        compile_ahead(wanted, [case.title for case in todo], processes)
    facts, count = machine.facts(), len(todo)
    with Bars(quiet=report.json) as bars:

        def keep(row: dict[str, Any]) -> None:
            results.add({**about, **row, "machine": facts, "date": stamp()})
            bars.update("kernels", count - len(todo), count)

        run(todo, replays=replays, peers=peers, on_row=keep)
    rows = [*results, *({**about, **row} for row in sums(list(results), spec.layers))]
    code = _tell(rows, others, report, replays, suite=wanted.suite)
    if todo:
        warn(f"the device answers no more: {len(todo)} cases were not measured, the same command goes on with them")
    return code


def _check(model: str | None, shape: str | None, suite: str | None, tokens: str | None) -> None:
    """Raise ConfigError for flags that do not go together."""
    given = {"MODEL": model, "--shape": shape, "--tokens": tokens}
    surplus = [f"{name} {value}" for name, value in given.items() if value is not None]
    if suite is not None and surplus:
        raise ConfigError(f"{surplus[0]}: --suite {suite} has its own, those of {milestones.SHAPE}; leave it out")
    if shape is not None and (model is not None or shape not in SHAPES[1:]):
        allowed = "instead of MODEL, leave one out" if model is not None else f"one of {', '.join(SHAPES[1:])}"
        raise ConfigError(f"--shape {shape}: must be {allowed}")


def _spec(model: str | None, shape: str) -> "ModelSpec":
    """Return the numbers of a model. Raises OmniserveError."""
    from omniserve.engine.build import open_source
    from omniserve.models.families import family

    options = Options(load_format="dummy", shape=shape) if model is None else Options()
    config = open_source(model, options).config
    return family(config).spec(config)


def _need_gpu() -> None:
    """Raise ConfigError unless there is a GPU that the kernels run on."""
    need_torch()
    with leaving_at_once():
        from omniserve.engine.device import gpu_problem
    problem = gpu_problem()
    if problem is not None:
        raise ConfigError(f"bench kernels measures kernels on an NVIDIA GPU: {problem}")


def _tell(rows: Sequence[Row], others: Sequence[Row], report: ReportFlags, replays: int, *, suite: bool) -> int:
    """Print the rows, and draw them if asked; return the exit code."""
    facts = machine.facts()
    keys = KEYS[:5]
    compared = [{**row, "against": ratio(row, others, keys, "us")} for row in rows]
    judged = list(milestones.judged(rows)) if suite else []
    if report.plot is not None:
        _draw(compared, report.plot, title=machine_line(facts))
    if report.json:
        more = {"milestones": judged} if suite else {}
        as_json({"model": rows[0]["model"], "replays": replays, **facts, "rows": compared, **more})
    else:
        say(machine_line(facts))
        _print(compared, others=bool(others), replays=replays)
        if suite:
            _print_milestones(judged)
    wrong = [row for row in rows if not row["ok"] and row["kind"] != STEP]
    for row in wrong[:8]:
        title = f"{row['kind']} {row['name']} {row['size']}"
        warn(f"{title}: {row.get('problem') or 'the result is off by {:.2g}'.format(row.get('error', float('nan')))}")
    if len(wrong) > 8:
        warn(f"{len(wrong) - 8} more are wrong or failed")
    return GATE if wrong else OK


def _print_milestones(judged: Sequence[dict[str, Any]]) -> None:
    """Print what the milestones want and what was found."""
    names = sorted({name for row in judged for name in row["peers"]})
    columns = ["milestone", "size", "us", "found", "needed", "met", *names, "step"]
    made = [
        [
            row["title"],
            row["size"],
            *cells([row["us"]]),
            _short(row["found"], 3),
            f"{row['need']:g}{_UNITS[row['metric']]}",
            "yes" if row["met"] else "no" if row["ok"] else "WRONG",
            *(_short(row["peers"].get(name)) for name in names),
            _short(row["step"]),
        ]
        for row in judged
    ]
    met = sum(row["met"] for row in judged)
    about = "shares of the limit, at least; us, at most; peers: their time over ours; step: share of an LServe step"
    table(columns, made, title=f"{met} of {len(judged)} milestones met ({about})")


def _short(number: float | None, places: int = 2) -> str:
    return "-" if number is None else f"{number:.{places}f}"


def _print(rows: Sequence[dict[str, Any]], *, others: bool, replays: int) -> None:
    names = sorted({name for row in rows for name in row.get("peers", ())})
    columns = ["operation", "size", "us", "limit us", "share", "error", *names, *(["against"] if others else [])]
    made = [
        [
            f"{row['kind']} {row['name']}",
            row["size"],
            row.get("us"),
            row["limit_us"],
            row.get("share"),
            row.get("error"),
            *(row.get("peers", {}).get(name, {}).get("ratio") for name in names),
            *([row["against"]] if others else []),
        ]
        for row in rows
    ]
    title = f"{rows[0]['model']}, {rows[0]['dtype']}, median of {replays} replays; peers: their time over ours"
    table(columns, [cells(row) for row in made], title=title)


def _draw(rows: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    from omniserve.bench.plots import Panel, draw

    panels = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind and row.get("share")]
        ticks = list(dict.fromkeys(row["size"] for row in mine))
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in mine:
            lines.setdefault(row["name"] or kind, []).append((ticks.index(row["size"]), row["share"]))
        if lines:
            panels.append(Panel(title=kind, x="size", y="share of the limit", lines=lines, ticks=ticks))
    draw(panels, path, title=title)
