"""Where words go: results to standard output, everything else to standard error."""

import json
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

WIDTH = 120
"""Columns of a table that goes to a file or a pipe."""


def result(text: str) -> None:
    """Print a line of the result."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def piece(text: str) -> None:
    """Print a part of the result at once, without a line end."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say(text: str) -> None:
    """Print a line for the person who watches, on standard error."""
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning on standard error."""
    say(f"omniserve: warning: {text}")


def as_json(value: Any) -> None:
    """Print a result as one JSON object."""
    result(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table: the first column to the left, the others to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    console = Console(file=sys.stdout, highlight=False)
    if console.is_terminal:
        console.print(made)
        return
    console = Console(file=sys.stdout, highlight=False, width=WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(made)
    result("\n".join(line.rstrip() for line in capture.get().rstrip().splitlines()))


class Bars:
    """Progress bars with the time left, one per phase, on standard error; silent unless that is a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._shown = not quiet and sys.stderr.isatty()
        self._tasks: dict[str, TaskID] = {}
        self._bars = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            transient=True,
        )

    def __enter__(self) -> Self:
        if self._shown:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if self._shown:
            self._bars.stop()
        return False

    def update(self, phase: str, done: int, total: int) -> None:
        """Show how far a phase has come."""
        if not self._shown:
            return
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total)
        self._bars.update(self._tasks[phase], completed=done, total=total)
