"""Benchmarks that load engines: which rows are measured with which engine, what is already there, what does not fit."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from omniserve.base.config import GROUP, Options, Precision
from omniserve.base.errors import CapacityError
from omniserve.bench.results import MEASURED, UNFIT, Results, Row
from omniserve.cli import machine
from omniserve.cli.loading import leaving_at_once, load, need_torch
from omniserve.cli.output import Bars, warn
from omniserve.cli.report import configuration, release, stamp

if TYPE_CHECKING:
    from omniserve import LLM

NOT_RUN = "not run"
"""The status that is shown for a row of a suite that no file holds."""

Measure = Callable[["LLM", dict[str, Any], Bars], Iterable[dict[str, Any]]]
"""measure(llm, head, bars) returns the rows of a head: what they have besides it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An engine, and for each row that is measured with it what tells it from the others (its head)."""

    model: str | None
    options: Options
    heads: Sequence[dict[str, Any]]


def run_cases(
    cases: Sequence[Case],
    results: Results,
    measure: Measure,
    *,
    suite: bool,
    quiet: bool,
    prepare: Callable[["LLM"], None] = lambda llm: None,
) -> None:
    """Measure the rows that are not there yet; each engine is loaded once.

    suite    stop after one model; what does not fit in memory is a row that says so
    prepare  what is done with an engine before its first row
    """
    chosen = None
    for case in cases:
        todo = [head for head in case.heads if results.find(head) is None]
        if not todo:
            continue
        if suite and chosen not in (None, todo[0]["model"]):
            return
        chosen = todo[0]["model"]
        while todo:
            todo = _run(case, todo, results, measure, prepare, suite=suite, quiet=quiet)
            release()


def _run(
    case: Case,
    todo: list[dict[str, Any]],
    results: Results,
    measure: Measure,
    prepare: Callable[["LLM"], None],
    *,
    suite: bool,
    quiet: bool,
) -> list[dict[str, Any]]:
    """Measure rows with one engine and return those that are left because one did not fit."""
    need_torch()
    with leaving_at_once():
        import torch
    done = -1
    try:
        with load(case.model, case.options, quiet=quiet) as llm, Bars(quiet=quiet) as bars:
            prepare(llm)
            for done, head in enumerate(todo):  # noqa: B007  # told below when one does not fit
                for row in measure(llm, head, bars):
                    about = {"configuration": configuration(llm), "machine": machine.facts(), "date": stamp()}
                    results.add({**head, **row, "status": MEASURED, **about})
    except (CapacityError, torch.OutOfMemoryError) as error:
        if not suite:
            raise
        why = " ".join(str(error).split())
        unfit, left = (todo, []) if done < 0 else ([todo[done]], todo[done + 1 :])
        for head in unfit:
            results.add({**head, "status": UNFIT, "why": why, "date": stamp()})
        warn(f"{todo[0]['model']} does not fit: {why}")
        return left
    return []


def precision_label(options: Options) -> str:
    """Return the label of the precision that is asked for; auto where the model decides."""
    if options.precision == "auto":
        return "auto"
    return Precision.parse(options.precision, options.group_size or GROUP).label


_TOLD = {"precision", "group_size", "load_format", "shape", "device", "seed"}
"""Options that a head tells by other names, or that change no figure."""


def asked(options: Options, base: Options) -> str:
    """Return the options that differ from a benchmark's own, as `name=value` words."""
    names = [one.name for one in fields(Options) if one.name not in _TOLD]
    return " ".join(f"{n}={getattr(options, n)}" for n in names if getattr(options, n) != getattr(base, n))


def rows_of(cases: Sequence[Case], results: Results) -> list[Row]:
    """Return the rows of every head, those of peers included; one that was not run says so."""
    found: list[Row] = []
    for head in (head for case in cases for head in case.heads):
        rows = [row for row in results if all(row.get(name) == value for name, value in head.items())]
        found += rows or [{**head, "status": NOT_RUN}]
    return found


def left_over(rows: Sequence[Row]) -> str | None:
    """Return what there is to say about rows of a suite that were not run."""
    count = sum(row["status"] == NOT_RUN for row in rows)
    return f"{count} of {len(rows)} rows were not run: the same command goes on with them" if count else None
