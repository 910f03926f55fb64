"""Rows of a benchmark in a JSON file: each is written as soon as it is there, and a second call goes on from them."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omniserve.base.errors import ConfigError

Row = Mapping[str, Any]

MEASURED, UNFIT = "measured", "does not fit"
"""What became of a row: its `status`. A row that is in no file was not run."""


class Results:
    """The rows of one file; without a path they are only held.

    keys  names of the values that tell rows apart; a new row takes the place of an equal one
    """

    def __init__(self, path: Path | None, keys: Sequence[str]) -> None:
        self._path = path
        self._keys = tuple(keys)
        self._rows = {self.key(row): row for row in read_rows(path)} if path is not None and path.exists() else {}
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}")

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def key(self, row: Row) -> tuple[Any, ...]:
        """Return what tells a row from others; a value that it lacks is None."""
        return tuple(row.get(name) for name in self._keys)

    def find(self, row: Row) -> Row | None:
        """Return the row of the same keys."""
        return self._rows.get(self.key(row))

    def add(self, row: Row) -> None:
        """Keep a row; the file is replaced in one piece."""
        self._rows[self.key(row)] = row
        if self._path is None:
            return
        beside = self._path.with_name(f"{self._path.name}.part")
        try:
            beside.write_text(json.dumps({"rows": list(self._rows.values())}, indent=1, ensure_ascii=False) + "\n")
            os.replace(beside, self._path)
        except OSError as error:
            raise ConfigError(f"{self._path}: the results cannot be written: {error.strerror}") from None


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file that a benchmark wrote, with --json or while it ran. Raises ConfigError."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file of results") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{path}: is no JSON, hence no results of `omniserve bench`") from None
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path}: holds no rows: give a file of `omniserve bench --json` or --results")
    return rows


def ratio(row: Row, others: Sequence[Row], keys: Sequence[str], metric: str) -> float | None:
    """Return the row's metric divided by that of the first of `others` with equal keys; None if there is none."""
    for other in others:
        if all(row.get(name) == other.get(name) for name in keys) and other.get(metric):
            mine = row.get(metric)
            return None if mine is None else float(mine) / float(other[metric])
    return None
